//! One buffer for everything that a pass computes, planned before the first step.

use super::Budget;
use crate::Result;
use crate::arch::Architecture;
use crate::kernels::{Backend, View};

/// Elements of logits held at once (32 MiB): enough rows to keep a matrix product busy at any vocabulary.
const LOGITS: usize = 8 << 20;

/// What a layer keeps for its backward pass. Widths: `H` hidden, `Q` query, `KV` key/value, `U` up.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kept {
    /// Statistics of the first norm, `[rows, 1 or 2]`.
    pub(super) stats1: View,
    /// Rotated queries, `[rows, Q]`.
    pub(super) q: View,
    /// Rotated keys, and values, `[rows, KV]`.
    pub(super) kv: View,
    /// Log-sum-exp of the scores, `[rows, heads]`.
    pub(super) lse: View,
    /// The attention's output before its projection, `[rows, Q]`.
    pub(super) o: View,
    /// The residual stream between attention and MLP, `[rows, H]`.
    pub(super) middle: View,
    /// Statistics of the second norm.
    pub(super) stats2: View,
    /// What the MLP's first matrix gives, `[rows, U]`.
    pub(super) up: View,
}

/// Views of the arena; `rows` is the larger of tokens and targets wherever a buffer may hold either.
#[derive(Clone, Debug)]
pub(super) struct Arena {
    /// Input of each layer, `[tokens, H]`; two that alternate where nothing is kept.
    pub(super) inputs: Vec<View>,
    /// What each layer keeps; one for all where it is not kept.
    pub(super) kept: Vec<Kept>,
    /// The last layer's output on the targets' rows, `[targets, H]`, and the statistics of the final norm.
    pub(super) last: View,
    pub(super) last_stats: View,
    /// Chunk of logits, `[chunk, vocab]`.
    pub(super) logits: View,
    pub(super) chunk: usize,
    /// Scratch: normalised rows, `[rows, H]`, and those of them that ask, `[targets, H]`.
    pub(super) h: View,
    pub(super) asking: View,
    /// Scratch: inside of the MLP, `[rows, I]`.
    pub(super) inner: View,
    /// Scratch of the backward pass.
    pub(super) back: Option<Backward>,
}

/// Gradients on their way, each of the shape of what it belongs to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Backward {
    /// Of the residual stream on the targets' rows, `[targets, H]`.
    pub(super) d_last: View,
    /// Of the residual stream, `[tokens, H]`.
    pub(super) dx: View,
    /// Of normalised rows, `[rows, H]`.
    pub(super) dh: View,
    /// Of `up`, `[rows, U]`.
    pub(super) dup: View,
    /// Of the attention's output, `[rows, Q]`.
    pub(super) d_o: View,
    /// Of queries, `[rows, Q]`.
    pub(super) dq: View,
    /// Of keys and values, `[tokens, KV]`.
    pub(super) dkv: View,
}

impl Arena {
    /// Allocates what [`Arena::carve`] asks for.
    pub(super) fn allocate(a: &Architecture, b: Budget, backend: &mut impl Backend) -> Result<Arena> {
        let whole = backend.allocate(Self::carve(a, b, View::unbacked()).1)?;
        Ok(Self::carve(a, b, whole).0)
    }

    /// Cuts `whole` into the arena's views; also says how many elements they take.
    fn carve(a: &Architecture, b: Budget, whole: View) -> (Arena, usize) {
        let mut used = 0;
        let mut cut = |rows: usize, width: usize| {
            let view = whole.part(used, rows * width);
            // Each view starts on a cache line.
            used += (rows * width).next_multiple_of(16);
            view
        };
        let b = Budget { targets: b.targets.max(1), ..b };
        let rows = b.tokens.max(b.targets);
        let (h, inner) = (a.hidden, a.intermediate);
        let (q, kv, up) = (a.heads.query_width(), a.heads.kv_width(), inner * a.activation.fan());
        let mut kept = |rows: usize| Kept {
            stats1: cut(b.tokens, a.norm.statistics()),
            q: cut(rows, q),
            kv: cut(b.tokens, kv),
            lse: cut(rows, a.heads.heads),
            o: cut(rows, q),
            middle: cut(rows, h),
            stats2: cut(rows, a.norm.statistics()),
            up: cut(rows, up),
        };
        let kept = match b.train && !b.recompute {
            // In the last layer only the targets' rows ask.
            true => (1..=a.layers).map(|n| kept(if n < a.layers { b.tokens } else { b.targets })).collect(),
            false => vec![kept(rows)],
        };
        let inputs = if b.train { a.layers } else { a.layers.min(2) };
        let chunk = (LOGITS / a.vocab_size).clamp(16, 512).min(b.targets.max(1));
        let arena = Arena {
            inputs: (0..inputs).map(|_| cut(b.tokens, h)).collect(),
            kept,
            last: cut(b.targets.max(1), h),
            last_stats: cut(b.targets.max(1), a.norm.statistics()),
            logits: cut(chunk, a.vocab_size),
            chunk,
            h: cut(rows, h),
            asking: cut(b.targets.max(1), h),
            inner: cut(rows, inner),
            back: b.train.then(|| Backward {
                d_last: cut(b.targets, h),
                dx: cut(b.tokens, h),
                dh: cut(rows, h),
                dup: cut(rows, up),
                d_o: cut(rows, q),
                dq: cut(rows, q),
                dkv: cut(b.tokens, kv),
            }),
        };
        (arena, used)
    }

    /// What layer `n` keeps.
    pub(super) fn kept(&self, n: usize) -> Kept {
        self.kept[n % self.kept.len()]
    }

    /// Where layer `n` finds its input.
    pub(super) fn input(&self, n: usize) -> View {
        self.inputs[n % self.inputs.len()]
    }
}

/// Bytes that a model will take, by kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// The weights.
    pub parameters: u64,
    /// Their gradients.
    pub gradients: u64,
    /// The optimizer's moments.
    pub optimizer: u64,
    /// What is kept between forward and backward.
    pub activations: u64,
    /// What is used within an operation, logits included.
    pub scratch: u64,
}

impl MemoryPlan {
    /// Plans without allocating.
    pub fn of(a: &Architecture, b: Budget) -> MemoryPlan {
        let (arena, used) = Arena::carve(a, b, View::unbacked());
        let bytes = |n: usize| (n * size_of::<f32>()) as u64;
        let kept = |k: &Kept| {
            [k.stats1, k.q, k.kv, k.lse, k.o, k.middle, k.stats2, k.up].map(View::len).iter().sum::<usize>()
        };
        let activations =
            arena.inputs.iter().map(|v| v.len()).sum::<usize>() + arena.kept.iter().map(kept).sum::<usize>();
        let parameters = bytes(crate::params::Layout::of(a).len());
        let trained = if b.train { parameters } else { 0 };
        MemoryPlan {
            parameters,
            gradients: trained,
            optimizer: 2 * trained,
            activations: bytes(activations),
            scratch: bytes(used - activations),
        }
    }

    /// All of it, in bytes.
    pub fn total(&self) -> u64 {
        self.parameters + self.gradients + self.optimizer + self.activations + self.scratch
    }
}

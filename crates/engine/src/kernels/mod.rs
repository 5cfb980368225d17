//! Operations on device buffers. All `unsafe` of the workspace lives below this module.
//!
//! [`Backend`] is a trait of coarse operations over opaque buffers: model code holds [`View`]s, which are
//! names of ranges, and never a pointer. Small host slices (row numbers, target ids) describe *what* to do
//! and cost nothing beside the work itself.
//!
//! Two backends exist: [`reference::Reference`], plain loops in f64 that anyone can check by reading, and
//! [`cpu::Cpu`]. Every kernel test compares the second with the first.

#[allow(unsafe_code)]
pub mod cpu;
pub mod reference;

use crate::Result;
use std::ops::Range;

/// A range of a device buffer, counted in f32 elements. Copyable and inert: only its backend can look inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    buffer: usize,
    start: usize,
    len: usize,
}

impl View {
    /// Elements in the view.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(self) -> usize {
        self.len
    }

    /// `len` elements from `start`.
    ///
    /// # Panics
    /// When the part does not lie inside the view: that is a bug in the model, not in its input.
    pub fn part(self, start: usize, len: usize) -> View {
        assert!(start <= self.len && len <= self.len - start, "part {start}+{len} of a view of {}", self.len);
        View { start: self.start + start, len, ..self }
    }

    /// The rows `rows` of a row-major matrix of `width` columns.
    pub fn rows(self, rows: Range<usize>, width: usize) -> View {
        self.part(rows.start * width, rows.len() * width)
    }

    /// The first `count` rows of a row-major matrix of `width` columns.
    pub fn top(self, count: usize, width: usize) -> View {
        self.part(0, count * width)
    }

    /// A view behind which there is no memory, for planning.
    pub(crate) fn unbacked() -> View {
        View { buffer: usize::MAX, start: 0, len: usize::MAX / 2 }
    }

    /// True when the two views share an element.
    fn overlaps(self, other: View) -> bool {
        self.buffer == other.buffer
            && self.start < other.start + other.len
            && other.start < self.start + self.len
    }
}

/// Shape of a linear layer: `x[rows, inputs]` → `y[rows, outputs]`, weight `[outputs, inputs]`.
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    /// Rows of `x` and `y`.
    pub rows: usize,
    /// Columns of `x`.
    pub inputs: usize,
    /// Columns of `y`.
    pub outputs: usize,
}

/// The normalisation over the last dimension.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Norm {
    /// `x / sqrt(mean(x²) + eps) · w` (Zhang & Sennrich 2019). One statistic per row: the reciprocal root.
    Rms {
        /// Added to the mean square.
        eps: f32,
    },
    /// `(x − mean) / sqrt(var + eps) · w + b` (Ba et al. 2016). Two statistics per row: mean, reciprocal deviation.
    Layer {
        /// Added to the variance.
        eps: f32,
    },
}

impl Norm {
    /// Statistics kept per row for the backward pass.
    pub fn statistics(self) -> usize {
        match self {
            Norm::Rms { .. } => 1,
            Norm::Layer { .. } => 2,
        }
    }
}

/// What stands between the two matrices of the MLP. `up` is what the first one gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `silu(gate) · up`; a row of `up` is `[gate, up]`, twice the width of the result (Shazeer 2020).
    SwiGlu,
    /// `gelu_new`: `0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))`.
    GeluTanh,
}

impl Activation {
    /// Columns of `up` per column of the result.
    pub fn fan(self) -> usize {
        match self {
            Activation::SwiGlu => 2,
            Activation::GeluTanh => 1,
        }
    }
}

/// Heads of an attention. Query rows are `[heads · head_dim]`; key/value rows are
/// `[kv_heads · head_dim]` of keys, then as many of values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heads {
    /// Query heads; a multiple of `kv_heads`. Query head `h` reads kv head `h / (heads / kv_heads)`.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Size of a head.
    pub head_dim: usize,
    /// What scores are multiplied by.
    pub scale: f32,
}

impl Heads {
    /// Columns of a query row.
    pub fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Columns of a key/value row: keys, then values.
    pub fn kv_width(&self) -> usize {
        2 * self.kv_heads * self.head_dim
    }
}

/// Who sees whom. Query row `i` belongs to the token whose keys are in row `rows[i]`; it sees the whole
/// prefix of its span and the span's own rows up to and including `rows[i]`.
#[derive(Clone, Debug, Default)]
pub struct Attention {
    /// Key row of each query row; ascending within a span (repeats are allowed).
    pub rows: Vec<u32>,
    /// Independent ranges.
    pub spans: Vec<Span>,
    /// Spans, by index, that touch the same keys (a shared prefix and what follows it). Gradients of one group's
    /// keys are summed in order by one worker; groups touch no key of each other.
    pub groups: Vec<Vec<usize>>,
}

impl Attention {
    /// Panics unless the plan is what backends rely on when they write in parallel: queries tile `0..queries`,
    /// rows ascend within their span's own keys, every span is in one group, and no key is in two groups' reach.
    fn check(&self, queries: usize, keys: usize) {
        let mut next = 0;
        for span in &self.spans {
            assert!(span.queries.start == next && span.queries.end > next, "queries do not tile: {span:?}");
            assert!(span.prefix.end <= keys && span.own.end <= keys, "keys outside the buffer: {span:?}");
            next = span.queries.end;
            let rows = &self.rows[span.queries.clone()];
            let inside = rows.iter().all(|row| span.own.contains(&(*row as usize)));
            assert!(inside && rows.is_sorted(), "rows do not ascend within {span:?}");
        }
        assert!(next == queries && self.rows.len() == queries, "{next} of {queries} queries are planned");
        let (mut grouped, mut owner) = (vec![false; self.spans.len()], vec![usize::MAX; keys]);
        for (group, spans) in self.groups.iter().enumerate() {
            for &i in spans {
                assert!(!std::mem::replace(&mut grouped[i], true), "span {i} is in two groups");
                for key in self.spans[i].prefix.clone().chain(self.spans[i].own.clone()) {
                    let before = std::mem::replace(&mut owner[key], group);
                    assert!(before == usize::MAX || before == group, "key {key} is in two groups' reach");
                }
            }
        }
        assert!(grouped.iter().all(|g| *g), "a span is in no group");
    }
}

/// One segment as attention sees it; all ranges are rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Keys that every query of the span sees; empty where there is no shared prefix.
    pub prefix: Range<usize>,
    /// The span's own keys.
    pub own: Range<usize>,
    /// The span's query rows.
    pub queries: Range<usize>,
}

/// One AdamW step (Loshchilov & Hutter 2019), in the order of operations of `torch.optim.AdamW`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Step number, from 1.
    pub t: u64,
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Decay every parameter; `false` leaves biases and norms out, as the Trainer does. The model's business: a
    /// backend decays what it is given.
    pub decay_all: bool,
    /// Gradients are multiplied by this first (clipping).
    pub gradient_scale: f32,
}

/// What the loss says of one target.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Negative log-likelihood in nats, unweighted.
    pub nll: f32,
    /// True when the target is the most likely token (the first one of equals).
    pub top1: bool,
}

/// Coarse operations over device buffers. Shapes are row-major; `x += …` accumulates, `x = …` overwrites.
///
/// Views that an operation writes must not overlap any other view of the same call; backends check it.
pub trait Backend {
    /// A buffer of `len` zeros that lives as long as the backend.
    ///
    /// # Errors
    /// [`crate::Error::Memory`] where there is not enough.
    fn allocate(&mut self, len: usize) -> Result<View>;
    /// Host to device; lengths are equal.
    fn write(&mut self, to: View, from: &[f32]);
    /// Device to host; lengths are equal.
    fn read(&self, from: View, to: &mut [f32]);
    /// `x = value`.
    fn fill(&mut self, x: View, value: f32);
    /// `y = x`.
    fn copy(&mut self, y: View, x: View);
    /// `y += x`.
    fn add(&mut self, y: View, x: View);

    /// `y[i, :] = x[rows[i], :]`. An embedding is this, with the table as `x`.
    fn gather(&mut self, y: View, x: View, rows: &[u32], width: usize);
    /// `y[rows[i], :] += x[i, :]`, in the order of `i`: the backward of [`Backend::gather`].
    fn scatter_add(&mut self, y: View, x: View, rows: &[u32], width: usize);

    /// `y[r, width] = norm(x[r, width])`, statistics to `stats[r, norm.statistics()]`.
    fn norm(&mut self, norm: Norm, y: View, stats: View, x: View, w: View, b: Option<View>);
    /// `y` again from `x` and its statistics: cheaper to compute than to keep.
    fn norm_again(&mut self, norm: Norm, y: View, stats: View, x: View, w: View, b: Option<View>);
    /// `dx += …`, `dw += …`, `db += …`.
    fn norm_backward(
        &mut self,
        norm: Norm,
        dx: View,
        dw: View,
        db: Option<View>,
        dy: View,
        stats: View,
        x: View,
        w: View,
    );

    /// `y[rows, outputs] (+)= x[rows, inputs] · wᵀ + b`.
    fn linear(&mut self, s: Linear, y: View, accumulate: bool, x: View, w: View, b: Option<View>);
    /// `dx[rows, inputs] (+)= dy[rows, outputs] · w`.
    fn linear_dx(&mut self, s: Linear, dx: View, accumulate: bool, dy: View, w: View);
    /// `dw[outputs, inputs] (+)= dyᵀ · x`, `db[outputs] (+)= Σ_rows dy`.
    fn linear_dw(&mut self, s: Linear, dw: View, db: Option<View>, accumulate: bool, dy: View, x: View);

    /// Rotates `heads` heads at the front of each row of `width` columns in place (RoPE, Su et al. 2021, the
    /// half-split pairing of transformers). `table[p]` holds `head_dim/2` cosines, then as many sines, of
    /// position `p`; row `r` has position `positions[r]`. `inverse` rotates back, which is the backward.
    fn rotate(
        &mut self,
        x: View,
        width: usize,
        heads: usize,
        head_dim: usize,
        table: View,
        positions: &[u32],
        inverse: bool,
    );

    /// Causal attention within spans. `q[queries, query_width]`, `kv[keys, kv_width]` →
    /// `o[queries, query_width]` and the log-sum-exp of each score row in `lse[queries, heads]`.
    fn attention(&mut self, h: Heads, plan: &Attention, o: View, lse: View, q: View, kv: View);
    /// `dq = …`, `dkv = …` (rows of `kv` outside every span's reach get zeros).
    fn attention_backward(
        &mut self,
        h: Heads,
        plan: &Attention,
        dq: View,
        dkv: View,
        do_: View,
        o: View,
        lse: View,
        q: View,
        kv: View,
    );

    /// `a[rows, width] = f(up[rows, fan·width])`.
    fn activate(&mut self, f: Activation, a: View, up: View, width: usize);
    /// `dup = da · f'(up)`.
    fn activate_backward(&mut self, f: Activation, dup: View, da: View, up: View, width: usize);

    /// Softmax cross-entropy of `logits[n, vocab]` with `ids[n]`. With `weights` the logits are overwritten by
    /// `weights[i] · (softmax − onehot)`, the gradient of `Σ weights[i]·nll_i`; without, they stay.
    fn cross_entropy(
        &mut self,
        logits: View,
        vocab: usize,
        ids: &[u32],
        weights: Option<&[f32]>,
        out: &mut [Outcome],
    );

    /// `Σ x²` in f64, in an order that does not depend on the number of threads.
    fn sum_squares(&self, x: View) -> f64;
    /// One step for parameters `p` with gradients `g` and moments `m`, `v`.
    fn adamw(&mut self, step: AdamW, p: View, g: View, m: View, v: View);
}

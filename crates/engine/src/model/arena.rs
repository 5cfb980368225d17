//! One buffer for all intermediate values of a pass, planned before the first step.

use super::Budget;
use crate::Result;
use crate::arch::{Architecture, Block};
use crate::kernels::{Backend, Buffer, Norm, View};
use crate::params::LowSizes;

/// What a layer saves for its backward pass. Widths: `H` hidden, `Q` query, `K` key, `U` up.
#[derive(Clone, Copy, Debug)]
pub(super) struct Saved {
    /// Statistics of the norm before the attention, `[rows, 1 or 2]`.
    pub(super) attention_stats: View,
    /// Rotated queries, `[rows, Q]`.
    pub(super) q: View,
    /// Rotated keys, and values, `[rows, 2·K]`.
    pub(super) kv: View,
    /// Queries and keys before their norms, if the layer has them.
    pub(super) raw: Option<RawHeads>,
    /// Log-sum-exp of the scores, `[rows, heads]`.
    pub(super) lse: View,
    /// The attention's output before its projection, `[rows, Q]`.
    pub(super) o: View,
    /// The residual stream between attention and MLP, `[rows, H]`.
    pub(super) middle: View,
    /// Statistics of the norm before the MLP.
    pub(super) mlp_stats: View,
    /// Output of the MLP's first matrix, `[rows, U]`.
    pub(super) up: View,
    /// Probabilities of the experts, `[rows, experts]`, and the weights of the chosen ones, `[rows, per_row]`.
    pub(super) route: Option<[View; 2]>,
    /// Outputs of attention and MLP before the norms after them, if the layer has them.
    pub(super) branches: [Option<Branch>; 2],
}

/// The input of a norm after attention or MLP.
#[derive(Clone, Copy, Debug)]
pub(super) struct Branch {
    /// `[rows, H]`.
    pub(super) y: View,
    pub(super) stats: View,
}

/// Queries and keys before the norms of their heads.
#[derive(Clone, Copy, Debug)]
pub(super) struct RawHeads {
    /// `[rows, Q]`, and the statistics of each head.
    pub(super) q: View,
    pub(super) q_stats: View,
    /// `[rows, K]`, and the statistics of each head.
    pub(super) k: View,
    pub(super) k_stats: View,
}

/// Views of the arena; `rows` is the larger of tokens and targets wherever a buffer may hold either.
#[derive(Debug)]
pub(super) struct Arena {
    /// Owner of the memory; `None` in a plan.
    _memory: Option<Buffer>,
    /// Input of each layer, `[tokens, H]`; two alternating buffers if nothing is saved.
    inputs: Vec<View>,
    /// What each layer saves; all layers share one place if activations are recomputed.
    saved: Vec<Saved>,
    /// The last layer's output on the targets' rows, `[targets, H]`, and the statistics of the final norm.
    pub(super) last: View,
    pub(super) last_stats: View,
    /// Chunk of logits, `[chunk, vocab]`.
    pub(super) logits: View,
    pub(super) chunk: usize,
    /// Scratch: normalised rows, `[rows, H]`, and the query rows among them, `[targets, H]`.
    pub(super) h: View,
    pub(super) query_h: View,
    /// Scratch: the intermediate activation of the MLP, as wide as the widest layer's.
    inner: View,
    /// Scratch of experts: rows by slot, `[rows · per_row, H]`, twice.
    slots: [View; 2],
    /// Scratch of adapters: their rows between `A` and `B`, and the gradient of those.
    low: [View; 2],
    /// Scratch of adapters that scale a layer's outputs: these outputs, and the gradient of the scaled values.
    wide: [View; 2],
    /// Scratch of adapters with dropout: their inputs, or the gradient of those.
    dropped: View,
    /// Scratch of the load-balancing loss, if the model has one.
    pub(super) balance: Option<BalanceScratch>,
    /// Scratch of the backward pass.
    back: Option<BackScratch>,
    /// Elements that are saved between forward and backward, and all elements.
    pub(super) activations: usize,
    pub(super) used: usize,
}

/// Scratch of the load-balancing loss.
#[derive(Clone, Copy, Debug)]
pub(super) struct BalanceScratch {
    /// How many sequences share each row, `[tokens, 1]`.
    pub(super) rows: View,
    /// The same by slot, and ones, `[tokens · per_row, 1]`.
    pub(super) slots: [View; 2],
    /// Gradients of a row's probabilities, `[1, experts]`.
    pub(super) factors: View,
    /// Gradients of logits, `[tokens, experts]`, and a sum for each row.
    pub(super) terms: [View; 2],
    pub(super) sums: View,
}

/// Scratch of the backward pass, as wide as the widest layer needs.
#[derive(Clone, Copy, Debug)]
struct BackScratch {
    d_last: View,
    dx: View,
    dh: View,
    dup: View,
    d_o: View,
    dq: View,
    dkv: View,
    raw: Option<View>,
    branch: Option<View>,
    route: [View; 2],
}

/// Gradients that the backward pass of a layer computes, each with the shape of its value.
#[derive(Clone, Copy, Debug)]
pub(super) struct Backward {
    /// Gradient of the residual stream on the targets' rows, `[targets, H]`.
    pub(super) d_last: View,
    /// Gradient of the residual stream, `[tokens, H]`.
    pub(super) dx: View,
    /// Gradient of normalised rows, `[rows, H]`.
    pub(super) dh: View,
    /// Gradient of `up`, `[rows, U]`.
    pub(super) dup: View,
    /// Gradient of the attention's output, `[rows, Q]`.
    pub(super) d_o: View,
    /// Gradient of queries, `[rows, Q]`.
    pub(super) dq: View,
    /// Gradient of keys and values, `[tokens, 2·K]`.
    pub(super) dkv: View,
    /// Gradient of queries or keys before their norm, `[rows, Q]` and `[tokens, K]` in the same memory.
    pub(super) raw: Option<[View; 2]>,
    /// Gradient of the output of attention or MLP before the norm after it, `[rows, H]`.
    pub(super) branch: Option<View>,
}

/// Cuts views from the arena's memory, or only counts their sizes if there is no memory yet.
struct Cutter {
    whole: Option<View>,
    used: usize,
}

impl Cutter {
    fn cut(&mut self, rows: usize, width: usize) -> View {
        let len = rows.saturating_mul(width);
        let view = match self.whole {
            Some(whole) if width > 0 => whole.part(self.used, len).matrix(rows, width),
            _ => View::planned(rows, width),
        };
        // Each view starts on a cache line.
        self.used = self.used.saturating_add(len.checked_next_multiple_of(16).unwrap_or(usize::MAX));
        view
    }

    fn saved(&mut self, block: &Block, hidden: usize, rows: usize, tokens: usize) -> Saved {
        let [q, kv, up] = Architecture::widths(block);
        let (heads, norms) = (block.attention.heads, block.norms);
        let statistics = |norm: Option<Norm>| norm.map_or(0, Norm::statistics);
        Saved {
            attention_stats: self.cut(tokens, statistics(norms.attention)),
            q: self.cut(rows, q),
            kv: self.cut(tokens, kv),
            raw: block.attention.qk_norm.map(|qk| RawHeads {
                q: self.cut(rows, q),
                q_stats: self.cut(rows, qk.groups(heads.heads).saturating_mul(qk.norm.statistics())),
                k: self.cut(tokens, heads.key_width()),
                k_stats: self.cut(tokens, qk.groups(heads.kv_heads).saturating_mul(qk.norm.statistics())),
            }),
            lse: self.cut(rows, heads.heads),
            o: self.cut(rows, q),
            middle: self.cut(rows, hidden),
            mlp_stats: self.cut(rows, statistics(norms.mlp)),
            up: self.cut(rows, up),
            route: block
                .mlp
                .experts
                .map(|experts| [experts.count, experts.routing.per_row].map(|width| self.cut(rows, width))),
            branches: [norms.after_attention, norms.after_mlp].map(|norm| {
                let norm = norm?;
                Some(Branch { y: self.cut(rows, hidden), stats: self.cut(rows, norm.statistics()) })
            }),
        }
    }
}

impl Arena {
    /// Plans the arena and allocates it.
    pub(super) fn allocate(
        a: &Architecture,
        b: Budget,
        low: LowSizes,
        backend: &mut impl Backend,
    ) -> Result<Arena> {
        let logits = backend.logits();
        let memory = backend.allocate(Arena::carve(a, b, low, logits, None).used)?;
        let arena = Arena::carve(a, b, low, logits, Some(memory.view()));
        Ok(Arena { _memory: Some(memory), ..arena })
    }

    /// Cuts `whole` into the arena's views, with at most `logits` elements for logits; only plans them if `whole` is
    /// `None`.
    pub(super) fn carve(
        a: &Architecture,
        b: Budget,
        low: LowSizes,
        logits: usize,
        whole: Option<View>,
    ) -> Arena {
        let b = Budget { targets: b.targets.max(1), ..b };
        let rows = b.tokens.max(b.targets);
        let hidden = a.hidden;
        let mut cutter = Cutter { whole, used: 0 };
        let each = b.train && !b.recompute;
        let (mut saved, mut furthest) = (Vec::new(), 0);
        for (n, block) in a.blocks.iter().enumerate() {
            if each {
                // The last layer has queries for the targets' rows only.
                let all = n + 1 < a.blocks.len() || a.balances_last();
                let rows = if all { b.tokens } else { b.targets };
                saved.push(cutter.saved(block, hidden, rows, b.tokens));
            } else {
                cutter.used = 0;
                saved.push(cutter.saved(block, hidden, rows, b.tokens));
                furthest = furthest.max(cutter.used);
            }
        }
        cutter.used = cutter.used.max(furthest);
        let inputs = if b.train { a.blocks.len() } else { a.blocks.len().min(2) };
        let inputs = inputs + usize::from(b.train && a.balances_last());
        let inputs: Vec<View> = (0..inputs).map(|_| cutter.cut(b.tokens, hidden)).collect();
        let lens = saved.iter().map(Saved::len);
        let saved_len = if each { lens.fold(0, usize::saturating_add) } else { lens.max().unwrap_or(0) };
        let activations = inputs.iter().map(|v| v.len()).fold(saved_len, usize::saturating_add);
        let widest = |width: &dyn Fn(&Block) -> usize| a.blocks.iter().map(width).max().unwrap_or(0);
        let [q, kv, up] = [0, 1, 2].map(|i| widest(&|block| Architecture::widths(block)[i]));
        let experts = |block: &Block| block.mlp.experts.map_or(0, |experts| experts.count);
        let per_row = widest(&|block| if experts(block) > 0 { block.mlp.per_row() } else { 0 });
        let has_branch =
            a.blocks.iter().any(|b| b.norms.after_attention.is_some() || b.norms.after_mlp.is_some());
        let has_raw = a.blocks.iter().any(|block| block.attention.qk_norm.is_some());
        let chunk = (logits / a.vocab_size.max(1)).clamp(16, logits >> 14).min(b.targets);
        let head = if low.dora_head { chunk.saturating_mul(a.vocab_size) } else { 0 };
        let wide = rows.saturating_mul(low.dora_width).max(head);
        Arena {
            inputs,
            saved,
            last: cutter.cut(b.targets, hidden),
            last_stats: cutter.cut(b.targets, a.head.norm.statistics()),
            logits: cutter.cut(chunk, a.vocab_size),
            chunk,
            h: cutter.cut(rows, hidden),
            query_h: cutter.cut(b.targets, hidden),
            inner: cutter
                .cut(rows, widest(&|block| block.mlp.intermediate.saturating_mul(block.mlp.per_row()))),
            slots: [(); 2].map(|()| cutter.cut(rows, hidden.saturating_mul(per_row))),
            low: [(); 2].map(|()| cutter.cut(rows, low.rank)),
            wide: [(); 2].map(|()| cutter.cut(1, wide)),
            dropped: cutter.cut(rows, low.dropout),
            balance: a.experts().filter(|_| b.train && a.balance != 0.0).map(|count| BalanceScratch {
                rows: cutter.cut(b.tokens, 1),
                slots: [(); 2].map(|()| cutter.cut(b.tokens.saturating_mul(per_row), 1)),
                factors: cutter.cut(1, count),
                terms: [(); 2].map(|()| cutter.cut(b.tokens, count)),
                sums: cutter.cut(b.tokens, 1),
            }),
            back: b.train.then(|| BackScratch {
                d_last: cutter.cut(b.targets, hidden),
                dx: cutter.cut(b.tokens, hidden),
                dh: cutter.cut(rows, hidden),
                dup: cutter.cut(rows, up),
                d_o: cutter.cut(rows, q),
                dq: cutter.cut(rows, q),
                dkv: cutter.cut(b.tokens, kv),
                raw: has_raw.then(|| cutter.cut(rows, q.max(kv / 2))),
                branch: has_branch.then(|| cutter.cut(rows, hidden)),
                route: [widest(&experts), per_row].map(|width| cutter.cut(rows, width)),
            }),
            activations,
            used: cutter.used,
            _memory: None,
        }
    }

    /// What layer `n` saves, cut to `tokens` rows, `queries` of which have queries.
    pub(super) fn saved(&self, n: usize, tokens: usize, queries: usize) -> Saved {
        let s = self.saved[n];
        Saved {
            attention_stats: s.attention_stats.top(tokens),
            q: s.q.top(queries),
            kv: s.kv.top(tokens),
            raw: s.raw.map(|raw| RawHeads {
                q: raw.q.top(queries),
                q_stats: raw.q_stats.top(queries),
                k: raw.k.top(tokens),
                k_stats: raw.k_stats.top(tokens),
            }),
            lse: s.lse.top(queries),
            o: s.o.top(queries),
            middle: s.middle.top(queries),
            mlp_stats: s.mlp_stats.top(queries),
            up: s.up.top(queries),
            route: s.route.map(|views| views.map(|view| view.top(queries))),
            branches: s.branches.map(|branch| {
                let Branch { y, stats } = branch?;
                Some(Branch { y: y.top(queries), stats: stats.top(queries) })
            }),
        }
    }

    /// The input of layer `n`, cut to `tokens` rows.
    pub(super) fn input(&self, n: usize, tokens: usize) -> View {
        self.inputs[n % self.inputs.len()].top(tokens)
    }

    /// The intermediate activation of a block's MLP.
    pub(super) fn inner(&self, block: &Block, queries: usize) -> View {
        self.inner.matrix(queries * block.mlp.per_row(), block.mlp.intermediate)
    }

    /// Two matrices of rows by slot.
    pub(super) fn slots(&self, slots: usize, hidden: usize) -> [View; 2] {
        self.slots.map(|view| view.matrix(slots, hidden))
    }

    /// The gradients of the logits of experts and of the weights of slots.
    pub(super) fn route_gradients(&self, block: &Block, queries: usize) -> Option<[View; 2]> {
        let experts = block.mlp.experts?;
        let [logits, weights] = self.back?.route;
        Some([logits.matrix(queries, experts.count), weights.matrix(queries, experts.routing.per_row)])
    }

    /// The rows between the two matrices of an adapter of this rank, and their gradient.
    pub(super) fn low(&self, rows: usize, rank: usize) -> [View; 2] {
        self.low.map(|view| view.matrix(rows, rank))
    }

    /// Two matrices of the size of a layer's outputs.
    pub(super) fn wide(&self, rows: usize, width: usize) -> [View; 2] {
        self.wide.map(|view| view.matrix(rows, width))
    }

    /// A matrix of the size of a layer's inputs.
    pub(super) fn dropped(&self, rows: usize, width: usize) -> View {
        self.dropped.matrix(rows, width)
    }

    /// The gradients of a layer, cut to `tokens` rows, `queries` of which have queries; `None` if nothing is trained.
    pub(super) fn backward(&self, block: &Block, tokens: usize, queries: usize) -> Option<Backward> {
        let [q, kv, up] = Architecture::widths(block);
        let b = self.back?;
        Some(Backward {
            d_last: b.d_last,
            dx: b.dx.top(tokens),
            dh: b.dh,
            dup: b.dup.matrix(queries * block.mlp.per_row(), up / block.mlp.per_row()),
            d_o: b.d_o.matrix(queries, q),
            dq: b.dq.matrix(queries, q),
            dkv: b.dkv.matrix(tokens, kv),
            raw: b.raw.map(|raw| [raw.matrix(queries, q), raw.matrix(tokens, kv / 2)]),
            branch: b.branch.map(|branch| branch.top(queries)),
        })
    }

    /// The gradients of the residual stream: on the targets' rows, on all rows, and of normalised rows.
    pub(super) fn stream(&self) -> Option<(View, View, View)> {
        self.back.map(|b| (b.d_last, b.dx, b.dh))
    }
}

impl Saved {
    fn len(&self) -> usize {
        let views =
            [self.attention_stats, self.q, self.kv, self.lse, self.o, self.middle, self.mlp_stats, self.up];
        let raw = self.raw.map(|raw| [raw.q, raw.q_stats, raw.k, raw.k_stats]);
        let route = self.route.into_iter().flatten();
        let branches = self.branches.into_iter().flatten().flat_map(|branch| [branch.y, branch.stats]);
        let all = views.into_iter().chain(raw.into_iter().flatten()).chain(branches).chain(route);
        all.map(View::len).fold(0, usize::saturating_add)
    }
}

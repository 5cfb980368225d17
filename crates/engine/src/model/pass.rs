//! Forward and backward, an operation at a time.
//!
//! Two facts shape the pass. The loss is a list of targets, so in the last layer only the targets' rows have
//! queries, an MLP and a head; all rows have keys and values there. And what is cheap to compute again
//! (norms, activations, rotations' inverses) is not kept.

use super::Model;
use super::arena::Kept;
use crate::Batch;
use crate::kernels::{Attention, Backend, Linear, Outcome, View};
use crate::params::{LinearAt, NormAt};
use std::ops::Range;

/// What a layer computes over.
pub(super) struct Rows<'a> {
    /// Positions of all rows.
    pub(super) positions: &'a [u32],
    /// The rows that ask; `None` = all.
    pub(super) asking: Option<&'a [u32]>,
    /// Positions of the rows that ask.
    pub(super) asking_positions: &'a [u32],
    /// Who sees whom, with a query per row that asks.
    pub(super) attention: &'a Attention,
}

impl Rows<'_> {
    fn all(&self) -> usize {
        self.positions.len()
    }

    fn asked(&self) -> usize {
        self.asking_positions.len()
    }
}

/// Keys and values of a layer.
#[derive(Clone, Copy)]
pub(super) struct Keys {
    /// Where this batch's rows are written.
    pub(super) new: View,
    /// What attention reads: the same, or a cache that ends in it.
    pub(super) all: View,
}

impl<B: Backend> Model<B> {
    /// Runs a checked batch; with `scale`, its backward pass too.
    pub(super) fn run(&mut self, batch: &Batch, scale: Option<f32>) -> Vec<Outcome> {
        if batch.targets.is_empty() {
            return Vec::new();
        }
        // Targets in the order of their rows, which is the order in which attention wants its queries.
        let mut order: Vec<usize> = (0..batch.targets.len()).collect();
        order.sort_by_key(|&i| batch.targets[i].row);
        let rows: Vec<u32> = order.iter().map(|&i| batch.targets[i].row).collect();
        let positions: Vec<u32> = rows.iter().map(|&r| batch.positions[r as usize]).collect();
        let (everyone, targets) = (batch.attention(), batch.attention_for(&rows));
        let full = Rows {
            positions: &batch.positions,
            asking: None,
            asking_positions: &batch.positions,
            attention: &everyone,
        };
        let last = Rows {
            positions: &batch.positions,
            asking: Some(&rows),
            asking_positions: &positions,
            attention: &targets,
        };

        self.embed(&batch.ids, &batch.positions);
        let layers = self.arch.layers;
        for n in 0..layers {
            let rows = if n + 1 < layers { &full } else { &last };
            self.layer_forward(n, rows, self.own_keys(n, rows), self.output(n, rows));
        }

        let sorted = self.head(batch, &order, scale);
        if scale.is_some() {
            for n in (0..layers).rev() {
                let rows = if n + 1 < layers { &full } else { &last };
                if self.arena.kept.len() == 1 && n + 1 < layers {
                    // Only the input was kept. The last layer's values are still there.
                    self.layer_forward(n, rows, self.own_keys(n, rows), self.output(n, rows));
                }
                self.layer_backward(n, rows);
            }
            self.embed_backward(&batch.ids, &batch.positions);
            self.fresh = false;
        }
        let mut outcomes = vec![Outcome::default(); sorted.len()];
        for (&i, outcome) in order.iter().zip(sorted) {
            outcomes[i] = outcome;
        }
        outcomes
    }

    fn own_keys(&self, n: usize, rows: &Rows) -> Keys {
        let kv = self.arena.kept(n).kv.top(rows.all(), self.arch.heads.kv_width());
        Keys { new: kv, all: kv }
    }

    /// Where layer `n` writes: the next one's input, or the rows for the head.
    pub(super) fn output(&self, n: usize, rows: &Rows) -> View {
        match rows.asking {
            None => self.arena.input(n + 1).top(rows.all(), self.arch.hidden),
            Some(_) => self.arena.last.top(rows.asked(), self.arch.hidden),
        }
    }

    /// `x[tokens, H] = embedding[ids] (+ table[positions])`.
    pub(super) fn embed(&mut self, ids: &[u32], positions: &[u32]) {
        let width = self.arch.hidden;
        let x = self.arena.input(0).top(ids.len(), width);
        let embedding = self.parameter_view(&self.layout.embedding);
        self.backend.gather(x, embedding, ids, width);
        if let Some(table) = &self.layout.positions {
            let (table, h) = (self.parameter_view(table), self.arena.h.top(ids.len(), width));
            self.backend.gather(h, table, positions, width);
            self.backend.add(x, h);
        }
    }

    fn embed_backward(&mut self, ids: &[u32], positions: &[u32]) {
        let Some((back, g)) = self.arena.back.zip(self.gradients) else { return };
        let width = self.arch.hidden;
        let dx = back.dx.top(ids.len(), width);
        for (range, rows) in
            [(Some(&self.layout.embedding), ids), (self.layout.positions.as_ref(), positions)]
        {
            let Some(range) = range else { continue };
            let table = g.part(range.start, range.len());
            // A tied head has already written its part of the embedding's gradient.
            if self.fresh && *range != self.layout.head {
                self.backend.fill(table, 0.0);
            }
            self.backend.scatter_add(table, dx, rows, width);
        }
    }

    /// One block: `out = x' + mlp(norm2(x'))` with `x' = x + attention(norm1(x))`, on the rows that ask.
    pub(super) fn layer_forward(&mut self, n: usize, rows: &Rows, keys: Keys, out: View) {
        let at = self.layout.layers[n].clone();
        let (heads, width, norm) = (self.arch.heads, self.arch.hidden, self.arch.norm);
        let (all, asked) = (rows.all(), rows.asked());
        let kept = self.kept(n, rows);
        let x = self.arena.input(n).top(all, width);
        let h = self.arena.h.top(all, width);

        let (w, b) = self.norm_views(&at.norm1);
        self.backend.norm(norm, h, kept.stats1, x, w, b);
        self.linear(keys.new, false, h, &at.kv, all);
        let asking = self.asking(h, rows);
        self.linear(kept.q, false, asking, &at.q, asked);
        self.rotate(kept.q, keys.new, rows, false);
        self.backend.attention(heads, rows.attention, kept.o, kept.lse, kept.q, keys.all);
        match rows.asking {
            None => self.backend.copy(kept.middle, x),
            Some(asking) => self.backend.gather(kept.middle, x, asking, width),
        }
        self.linear(kept.middle, true, kept.o, &at.out, asked);

        let h = self.arena.h.top(asked, width);
        let (w, b) = self.norm_views(&at.norm2);
        self.backend.norm(norm, h, kept.stats2, kept.middle, w, b);
        self.linear(kept.up, false, h, &at.up, asked);
        let inner = self.arena.inner.top(asked, self.arch.intermediate);
        self.backend.activate(self.arch.activation, inner, kept.up, self.arch.intermediate);
        self.backend.copy(out, kept.middle);
        self.linear(out, true, inner, &at.down, asked);
    }

    /// The backward of [`Model::layer_forward`]: takes the gradient of its output (on the rows that ask) to
    /// `dx`, the gradient of its input.
    fn layer_backward(&mut self, n: usize, rows: &Rows) {
        let Some(back) = self.arena.back else { return };
        let at = self.layout.layers[n].clone();
        let (heads, width, norm) = (self.arch.heads, self.arch.hidden, self.arch.norm);
        let (all, asked) = (rows.all(), rows.asked());
        let kept = self.kept(n, rows);
        let dx = back.dx.top(all, width);
        // The residual stream's gradient, on the rows that ask: a buffer of its own in the last layer.
        let d = if rows.asking.is_some() { back.d_last.top(asked, width) } else { dx };

        // MLP.
        let inner = self.arena.inner.top(asked, self.arch.intermediate);
        let dup = back.dup.part(0, kept.up.len());
        self.backend.activate(self.arch.activation, inner, kept.up, self.arch.intermediate);
        self.linear_dw(&at.down, d, inner, asked);
        // The inside is no longer needed: its gradient takes its place.
        self.linear_dx(inner, false, d, &at.down, asked);
        self.backend.activate_backward(self.arch.activation, dup, inner, kept.up, self.arch.intermediate);
        let h = self.arena.h.top(asked, width);
        let (w, b) = self.norm_views(&at.norm2);
        self.backend.norm_again(norm, h, kept.stats2, kept.middle, w, b);
        self.linear_dw(&at.up, dup, h, asked);
        let dh = back.dh.top(asked, width);
        self.linear_dx(dh, false, dup, &at.up, asked);
        self.norm_backward(&at.norm2, d, dh, kept.stats2, kept.middle);

        // Attention.
        let (d_o, dq) = (back.d_o.part(0, kept.q.len()), back.dq.part(0, kept.q.len()));
        let dkv = back.dkv.top(all, heads.kv_width());
        let kv = kept.kv;
        self.linear_dw(&at.out, d, kept.o, asked);
        self.linear_dx(d_o, false, d, &at.out, asked);
        self.backend.attention_backward(heads, rows.attention, dq, dkv, d_o, kept.o, kept.lse, kept.q, kv);
        self.rotate(dq, dkv, rows, true);
        let x = self.arena.input(n).top(all, width);
        let h = self.arena.h.top(all, width);
        let (w, b) = self.norm_views(&at.norm1);
        self.backend.norm_again(norm, h, kept.stats1, x, w, b);
        self.linear_dw(&at.kv, dkv, h, all);
        let dh = back.dh.top(all, width);
        self.linear_dx(dh, false, dkv, &at.kv, all);
        let asking = self.asking(h, rows);
        self.linear_dw(&at.q, dq, asking, asked);
        match rows.asking {
            None => self.linear_dx(dh, true, dq, &at.q, asked),
            Some(asking) => {
                // Back from the rows that asked to all rows; the others' residual gradient starts at zero.
                let d_asking = self.arena.asking.top(asked, width);
                self.linear_dx(d_asking, false, dq, &at.q, asked);
                self.backend.scatter_add(dh, d_asking, asking, width);
                self.backend.fill(dx, 0.0);
                self.backend.scatter_add(dx, d, asking, width);
            }
        }
        self.norm_backward(&at.norm1, dx, dh, kept.stats1, x);
    }

    /// Final norm, head and loss over the targets, in chunks of rows; with `scale`, their backward, which
    /// leaves the gradient of the last layer's output in `d_last`. Outcomes are in the order of `order`.
    fn head(&mut self, batch: &Batch, order: &[usize], scale: Option<f32>) -> Vec<Outcome> {
        let (width, vocab, chunk) = (self.arch.hidden, self.arch.vocab_size, self.arena.chunk);
        let count = order.len();
        let (h, stats, last) = self.final_norm(count);

        let head = LinearAt { w: self.layout.head.clone(), b: None };
        let mut outcomes = vec![Outcome::default(); count];
        for start in (0..count).step_by(chunk) {
            let rows = start..count.min(start + chunk);
            let targets = order[rows.clone()].iter().map(|&i| batch.targets[i]);
            let (ids, weights): (Vec<u32>, Vec<f32>) =
                targets.map(|t| (t.id, t.weight * scale.unwrap_or(1.0))).unzip();
            let logits = self.arena.logits.top(rows.len(), vocab);
            let h = h.rows(rows.clone(), width);
            self.linear(logits, false, h, &head, rows.len());
            let weights = scale.map(|_| &weights[..]);
            self.backend.cross_entropy(logits, vocab, &ids, weights, &mut outcomes[rows.clone()]);
            if let (Some(_), Some(back)) = (scale, self.arena.back) {
                // From here on the logits are their gradient.
                let accumulate = !self.fresh || start > 0;
                self.linear_dw_onto(&head, logits, h, rows.len(), accumulate);
                self.linear_dx(back.dh.rows(rows.clone(), width), false, logits, &head, rows.len());
            }
        }
        if let (Some(_), Some(back)) = (scale, self.arena.back) {
            let d_last = back.d_last.top(count, width);
            self.backend.fill(d_last, 0.0);
            self.norm_backward(&self.layout.norm.clone(), d_last, back.dh.top(count, width), stats, last);
        }
        outcomes
    }

    /// Rotates queries of the rows that ask and keys of all rows, where positions are rotary; `inverse` is the
    /// backward.
    fn rotate(&mut self, q: View, kv: View, rows: &Rows, inverse: bool) {
        let Some((table, _)) = self.rope else { return };
        let heads = self.arch.heads;
        let (size, kv_width, q_width) = (heads.head_dim, heads.kv_width(), heads.query_width());
        self.backend.rotate(kv, kv_width, heads.kv_heads, size, table, rows.positions, inverse);
        self.backend.rotate(q, q_width, heads.heads, size, table, rows.asking_positions, inverse);
    }

    /// The final norm of the first `count` rows that the last layer left: `(normalised, statistics, rows)`.
    pub(super) fn final_norm(&mut self, count: usize) -> (View, View, View) {
        let width = self.arch.hidden;
        let (last, h) = (self.arena.last.top(count, width), self.arena.h.top(count, width));
        let stats = self.arena.last_stats.top(count, self.arch.norm.statistics());
        let (w, b) = self.norm_views(&self.layout.norm);
        self.backend.norm(self.arch.norm, h, stats, last, w, b);
        (h, stats, last)
    }

    /// The normalised rows that ask.
    fn asking(&mut self, h: View, rows: &Rows) -> View {
        match rows.asking {
            None => h,
            Some(asking) => {
                let to = self.arena.asking.top(asking.len(), self.arch.hidden);
                self.backend.gather(to, h, asking, self.arch.hidden);
                to
            }
        }
    }

    /// What layer `n` keeps, cut to this batch.
    fn kept(&self, n: usize, rows: &Rows) -> Kept {
        let (kept, heads, width) = (self.arena.kept(n), self.arch.heads, self.arch.hidden);
        let (all, asked, each) = (rows.all(), rows.asked(), self.arch.norm.statistics());
        Kept {
            stats1: kept.stats1.top(all, each),
            q: kept.q.top(asked, heads.query_width()),
            kv: kept.kv.top(all, heads.kv_width()),
            lse: kept.lse.top(asked, heads.heads),
            o: kept.o.top(asked, heads.query_width()),
            middle: kept.middle.top(asked, width),
            stats2: kept.stats2.top(asked, each),
            up: kept.up.top(asked, self.arch.intermediate * self.arch.activation.fan()),
        }
    }

    fn parameter_view(&self, range: &Range<usize>) -> View {
        self.parameters.part(range.start, range.len())
    }

    fn norm_views(&self, at: &NormAt) -> (View, Option<View>) {
        (self.parameter_view(&at.w), at.b.as_ref().map(|b| self.parameter_view(b)))
    }

    fn shape(&self, at: &LinearAt, rows: usize, x: View) -> Linear {
        let inputs = x.len() / rows;
        Linear { rows, inputs, outputs: at.w.len() / inputs }
    }

    /// `y (+)= x · wᵀ + b`.
    pub(super) fn linear(&mut self, y: View, accumulate: bool, x: View, at: &LinearAt, rows: usize) {
        let (shape, w) = (self.shape(at, rows, x), self.parameter_view(&at.w));
        let b = at.b.as_ref().map(|b| self.parameter_view(b));
        self.backend.linear(shape, y, accumulate, x, w, b);
    }

    /// `dx (+)= dy · w`.
    fn linear_dx(&mut self, dx: View, accumulate: bool, dy: View, at: &LinearAt, rows: usize) {
        let (shape, w) = (self.shape(at, rows, dx), self.parameter_view(&at.w));
        self.backend.linear_dx(shape, dx, accumulate, dy, w);
    }

    /// The gradients of a layer's weight and bias.
    fn linear_dw(&mut self, at: &LinearAt, dy: View, x: View, rows: usize) {
        self.linear_dw_onto(at, dy, x, rows, !self.fresh);
    }

    fn linear_dw_onto(&mut self, at: &LinearAt, dy: View, x: View, rows: usize, accumulate: bool) {
        let Some(g) = self.gradients else { return };
        let shape = self.shape(at, rows, x);
        let part = |r: &Range<usize>| g.part(r.start, r.len());
        self.backend.linear_dw(shape, part(&at.w), at.b.as_ref().map(part), accumulate, dy, x);
    }

    /// `dx += …`, and the gradients of a norm's weight and bias.
    fn norm_backward(&mut self, at: &NormAt, dx: View, dy: View, stats: View, x: View) {
        let Some(g) = self.gradients else { return };
        let part = |r: &Range<usize>| g.part(r.start, r.len());
        let (dw, db) = (part(&at.w), at.b.as_ref().map(part));
        if self.fresh {
            self.backend.fill(dw, 0.0);
            db.into_iter().for_each(|db| self.backend.fill(db, 0.0));
        }
        let w = self.parameter_view(&at.w);
        self.backend.norm_backward(self.arch.norm, dx, dw, db, dy, stats, x, w);
    }
}

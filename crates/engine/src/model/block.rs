//! Forward and backward of one layer, an operation at a time.

use super::Model;
use super::arena::{RawHeads, Saved};
use crate::Result;
use crate::arch::Block;
use crate::kernels::{Backend, Indices, Norm, PlanBuffer, View};
use crate::params::{BlockSlots, Linear, NormSlots};
use std::sync::Arc;

/// The rows that a layer computes over.
pub(super) struct Rows<'a> {
    /// Positions of all rows.
    pub(super) positions: Indices,
    /// Query rows: the rows whose output this layer must compute; `None` means all.
    pub(super) query_rows: Option<Indices>,
    /// Positions of the query rows.
    pub(super) query_positions: Indices,
    /// What each query row attends to.
    pub(super) attention: &'a PlanBuffer,
}

impl Rows<'_> {
    /// Rows of the batch.
    fn all(&self) -> usize {
        self.positions.len()
    }

    /// Query rows.
    fn queries(&self) -> usize {
        self.query_positions.len()
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
    pub(super) fn own_keys(&self, n: usize, rows: &Rows) -> Keys {
        let kv = self.arena.saved(n, rows.all(), rows.queries()).kv;
        Keys { new: kv, all: kv }
    }

    /// Where layer `n` writes: the next one's input, or the rows for the head.
    pub(super) fn output(&self, n: usize, rows: &Rows) -> View {
        match rows.query_rows {
            None => self.arena.input(n + 1, rows.all()),
            Some(_) => self.arena.last.top(rows.queries()),
        }
    }

    /// One block: `out = x' + mlp(norm(x'))` with `x' = x + attention(norm(x))`, on the query rows.
    pub(super) fn block_forward(&mut self, n: usize, rows: &Rows, keys: Keys, out: View) -> Result<()> {
        let (arch, map) = (Arc::clone(&self.arch), Arc::clone(&self.map));
        let (block, at) = (&arch.blocks[n], &map.blocks[n]);
        let (all, queries) = (rows.all(), rows.queries());
        let saved = self.arena.saved(n, all, queries);
        let (x, h) = (self.arena.input(n, all), self.arena.h.top(all));

        self.norm(block.norms.attention, &at.attention_norm, h, saved.attention_stats, x)?;
        self.linear(keys.new, false, h, &at.kv)?;
        let query_h = self.query_h(h, rows)?;
        self.linear(saved.raw.map_or(saved.q, |raw| raw.q), false, query_h, &at.q)?;
        self.qk_norm(block, at, saved, keys.new)?;
        self.rotate(n, saved.q, keys.new, rows, false)?;
        let heads = block.attention.heads;
        self.backend.attention(heads, rows.attention, saved.o, saved.lse, saved.q, keys.all)?;
        match rows.query_rows {
            None => self.backend.copy(saved.middle, x)?,
            Some(query_rows) => self.backend.gather(saved.middle, x, query_rows)?,
        }
        self.linear(saved.middle, true, saved.o, &at.out)?;

        let h = self.arena.h.top(queries);
        self.norm(block.norms.mlp, &at.mlp_norm, h, saved.mlp_stats, saved.middle)?;
        self.linear(saved.up, false, h, &at.up)?;
        let inner = self.arena.inner(block, queries);
        self.backend.activate(block.mlp.activation, inner, saved.up)?;
        self.backend.copy(out, saved.middle)?;
        self.linear(out, true, inner, &at.down)
    }

    /// The backward of [`Model::block_forward`]: takes the gradient of its output (on the query rows) to
    /// `dx`, the gradient of its input.
    pub(super) fn block_backward(&mut self, n: usize, rows: &Rows) -> Result<()> {
        let (arch, map) = (Arc::clone(&self.arch), Arc::clone(&self.map));
        let (block, at) = (&arch.blocks[n], &map.blocks[n]);
        let (all, queries) = (rows.all(), rows.queries());
        let Some(back) = self.arena.backward(block, all, queries) else { return Ok(()) };
        let saved = self.arena.saved(n, all, queries);
        let dx = back.dx;
        // The residual stream's gradient, on the query rows: a buffer of its own in the last layer.
        let d = if rows.query_rows.is_some() { back.d_last.top(queries) } else { dx };

        // MLP.
        let inner = self.arena.inner(block, queries);
        self.backend.activate(block.mlp.activation, inner, saved.up)?;
        self.linear_dw(&at.down, d, inner)?;
        // The inside is no longer needed: its gradient takes its place.
        self.linear_dx(inner, false, d, &at.down)?;
        self.backend.activate_backward(block.mlp.activation, back.dup, inner, saved.up)?;
        let h = self.arena.h.top(queries);
        self.norm_recompute(block.norms.mlp, &at.mlp_norm, h, saved.mlp_stats, saved.middle)?;
        self.linear_dw(&at.up, back.dup, h)?;
        let dh = back.dh.top(queries);
        self.linear_dx(dh, false, back.dup, &at.up)?;
        self.norm_backward(block.norms.mlp, &at.mlp_norm, d, dh, saved.mlp_stats, saved.middle)?;

        // Attention.
        let (d_o, dq, dkv) = (back.d_o, back.dq, back.dkv);
        self.linear_dw(&at.out, d, saved.o)?;
        self.linear_dx(d_o, false, d, &at.out)?;
        let heads = block.attention.heads;
        let (o, lse, q, kv) = (saved.o, saved.lse, saved.q, saved.kv);
        self.backend.attention_backward(heads, rows.attention, dq, dkv, d_o, o, lse, q, kv)?;
        self.rotate(n, dq, dkv, rows, true)?;
        if let (Some(raw), Some([raw_q, raw_k])) = (saved.raw, back.raw) {
            self.qk_norm_backward(block, at, raw, [raw_q, raw_k], dq, dkv)?;
        }
        let (x, h) = (self.arena.input(n, all), self.arena.h.top(all));
        self.norm_recompute(block.norms.attention, &at.attention_norm, h, saved.attention_stats, x)?;
        self.linear_dw(&at.kv, dkv, h)?;
        let dh = back.dh.top(all);
        self.linear_dx(dh, false, dkv, &at.kv)?;
        let query_h = self.query_h(h, rows)?;
        self.linear_dw(&at.q, dq, query_h)?;
        match rows.query_rows {
            None => self.linear_dx(dh, true, dq, &at.q)?,
            Some(query_rows) => {
                // From the query rows back to all rows; the others' residual gradient starts at zero.
                let d_queries = self.arena.query_h.top(queries);
                self.linear_dx(d_queries, false, dq, &at.q)?;
                self.backend.scatter_add(dh, d_queries, query_rows)?;
                self.backend.fill(dx, 0.0)?;
                self.backend.scatter_add(dx, d, query_rows)?;
            }
        }
        self.norm_backward(block.norms.attention, &at.attention_norm, dx, dh, saved.attention_stats, x)
    }

    /// Normalises each head of the queries and of the keys, where the layer does.
    fn qk_norm(&mut self, block: &Block, at: &BlockSlots, saved: Saved, kv: View) -> Result<()> {
        let (Some(norm), Some(raw), Some([q_norm, k_norm])) =
            (block.attention.qk_norm, saved.raw, &at.qk_norm)
        else {
            return Ok(());
        };
        // One product gives keys and values side by side; the keys are normalised in their place.
        let k = kv.columns(0..raw.k.width());
        self.backend.copy(raw.k, k)?;
        self.norm(norm, q_norm, saved.q, raw.q_stats, raw.q)?;
        self.norm(norm, k_norm, k, raw.k_stats, raw.k)
    }

    /// The backward of [`Model::qk_norm`]: `dq` and the keys of `dkv` become gradients of what was
    /// normalised.
    fn qk_norm_backward(
        &mut self,
        block: &Block,
        at: &BlockSlots,
        raw: RawHeads,
        scratch: [View; 2],
        dq: View,
        dkv: View,
    ) -> Result<()> {
        let (Some(norm), Some([q_norm, k_norm])) = (block.attention.qk_norm, &at.qk_norm) else {
            return Ok(());
        };
        let dk = dkv.columns(0..raw.k.width());
        for (slots, d, scratch, stats, x) in
            [(q_norm, dq, scratch[0], raw.q_stats, raw.q), (k_norm, dk, scratch[1], raw.k_stats, raw.k)]
        {
            self.backend.fill(scratch, 0.0)?;
            self.norm_backward(norm, slots, scratch, d, stats, x)?;
            self.backend.copy(d, scratch)?;
        }
        Ok(())
    }

    /// Rotates queries of the query rows and keys of all rows, where positions are rotary; `inverse` is the
    /// backward.
    fn rotate(&mut self, n: usize, q: View, kv: View, rows: &Rows, inverse: bool) -> Result<()> {
        let rope = self.block_ropes[n].map(|rope| &self.ropes[rope]);
        let Some(table) = rope.and_then(super::RopeTable::view) else { return Ok(()) };
        let heads = self.arch.blocks[n].attention.heads;
        let k = kv.columns(0..heads.key_width());
        self.backend.rotate(k, heads.head_dim, table, rows.positions, inverse)?;
        self.backend.rotate(q, heads.head_dim, table, rows.query_positions, inverse)
    }

    /// The normalised query rows.
    fn query_h(&mut self, h: View, rows: &Rows) -> Result<View> {
        let Some(query_rows) = rows.query_rows else { return Ok(h) };
        let to = self.arena.query_h.top(query_rows.len());
        self.backend.gather(to, h, query_rows)?;
        Ok(to)
    }

    /// `y = norm(x)`.
    pub(super) fn norm(&mut self, norm: Norm, at: &NormSlots, y: View, stats: View, x: View) -> Result<()> {
        let (w, b) = self.norm_views(at);
        self.backend.norm(norm, y, stats, x, w, b)
    }

    fn norm_recompute(&mut self, norm: Norm, at: &NormSlots, y: View, stats: View, x: View) -> Result<()> {
        let (w, b) = self.norm_views(at);
        self.backend.norm_recompute(norm, y, stats, x, w, b)
    }

    /// `dx += …`, and the gradients of a norm's weight and bias.
    pub(super) fn norm_backward(
        &mut self,
        norm: Norm,
        at: &NormSlots,
        dx: View,
        dy: View,
        stats: View,
        x: View,
    ) -> Result<()> {
        let dw = self.gradient_to_add(&at.weight)?;
        let db = match &at.bias {
            Some(bias) => self.gradient_to_add(bias)?,
            None => None,
        };
        let w = self.slot_view(&at.weight);
        self.backend.norm_backward(norm, dx, dw, db, dy, stats, x, w)
    }

    fn norm_views(&self, at: &NormSlots) -> (View, Option<View>) {
        (self.slot_view(&at.weight), at.bias.as_ref().map(|bias| self.slot_view(bias)))
    }

    fn weight(&self, at: &Linear) -> View {
        self.parameter_view(&at.weight()).matrix(at.outputs(), at.inputs)
    }

    /// `y (+)= x · wᵀ + b`.
    fn linear(&mut self, y: View, accumulate: bool, x: View, at: &Linear) -> Result<()> {
        let bias = at.bias().map(|bias| self.parameter_view(&bias));
        self.backend.linear(y, accumulate, x, self.weight(at), bias)?;
        self.adapters_forward(at, y, x)
    }

    /// `dx (+)= dy · w`.
    fn linear_dx(&mut self, dx: View, accumulate: bool, dy: View, at: &Linear) -> Result<()> {
        self.backend.linear_dx(dx, accumulate, dy, self.weight(at))?;
        self.adapters_dx(at, dx, dy)
    }

    /// The gradients of a layer's weights, biases and adapters, of those that are trained.
    fn linear_dw(&mut self, at: &Linear, dy: View, x: View) -> Result<()> {
        for (outputs, slots) in at.trained(|part| part.bias.as_ref()) {
            if let Some((db, accumulate)) = self.gradient_of(&slots) {
                self.backend.linear_db(db, accumulate, dy.columns(outputs))?;
            }
        }
        for (outputs, slots) in at.trained(|part| Some(&part.weight)) {
            if let Some((dw, accumulate)) = self.gradient_of(&slots) {
                let dw = dw.matrix(outputs.len(), at.inputs);
                self.backend.linear_dw(dw, accumulate, dy.columns(outputs), x)?;
            }
        }
        self.adapters_dw(at, dy, x)
    }
}

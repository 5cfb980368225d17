//! Forward and backward of one layer, an operation at a time.

use super::arena::{Backward, Branch, RawHeads, Saved};
use super::noise::Site;
use super::state::Piece;
use super::{Model, RopeRows};
use crate::Result;
use crate::arch::{Block, QkNorm};
use crate::kernels::{Attention, Backend, Dropout, Indices, Norm, PlanBuffer, View};
use crate::params::{BlockSlots, Linear, NormSlots, Part};
use std::sync::Arc;

/// The rows over which a layer computes.
pub(super) struct Rows<'a> {
    /// Positions of all rows.
    pub(super) positions: Indices,
    /// Query rows: the rows whose output this layer must compute; `None` means all.
    pub(super) query_rows: Option<Indices>,
    /// Positions of the query rows.
    pub(super) query_positions: Indices,
    /// What each query row attends to.
    pub(super) attention: &'a PlanBuffer,
    /// Rows of each rotation table.
    pub(super) rope_rows: &'a [RopeRows],
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
pub(super) struct Keys<'a> {
    /// Where this batch's rows are written.
    pub(super) new: View,
    /// Where each new row is copied to, if `new` is not its place for attention.
    pub(super) places: &'a [View],
    /// What attention reads: `new`, or a cache that contains the new rows.
    pub(super) all: View,
}

/// A norm of a block, if it has one.
type BlockNorm<'a> = Option<(Norm, &'a NormSlots)>;

/// How the output of attention or MLP joins the residual stream.
#[derive(Clone, Copy)]
struct Joint<'a> {
    /// The norm after it, and that norm's input.
    norm: Option<(Norm, &'a NormSlots, Branch)>,
    dropout: Option<Dropout>,
    scale: f32,
}

impl<'a> Joint<'a> {
    /// After the attention, and after the MLP.
    fn of(block: &Block, at: &'a BlockSlots, saved: Saved, dropout: [Option<Dropout>; 2]) -> [Joint<'a>; 2] {
        let norms =
            [(block.norms.after_attention, &at.after_attention), (block.norms.after_mlp, &at.after_mlp)];
        [0, 1].map(|i| {
            let ((norm, at), branch) = (norms[i], saved.branches[i]);
            Joint {
                norm: norm.zip(at.as_ref()).zip(branch).map(|((norm, at), branch)| (norm, at, branch)),
                dropout: dropout[i],
                scale: block.residual_scale,
            }
        })
    }
}

impl<B: Backend> Model<B> {
    pub(super) fn own_keys(&self, n: usize, rows: &Rows) -> Keys<'static> {
        let kv = self.arena.saved(n, rows.all(), rows.queries()).kv;
        Keys { new: kv, places: &[], all: kv }
    }

    /// The output of layer `n`: the next layer's input, or the rows for the head.
    pub(super) fn output(&self, n: usize, rows: &Rows) -> View {
        match rows.query_rows {
            None => self.arena.input(n + 1, rows.all()),
            Some(_) => self.arena.last.top(rows.queries()),
        }
    }

    /// One block, on the query rows: `out = x' + mlp(norm(x'))` with `x' = x + attention(norm(x))`, or `out = x +
    /// attention(norm(x)) + mlp(norm'(x))`. Each summand may be normalised and scaled first.
    pub(super) fn block_forward(&mut self, n: usize, rows: &Rows, keys: Keys<'_>, out: View) -> Result<()> {
        let (arch, map) = (Arc::clone(&self.arch), Arc::clone(&self.map));
        let (block, at) = (&arch.blocks[n], &map.blocks[n]);
        let (all, queries) = (rows.all(), rows.queries());
        let saved = self.arena.saved(n, all, queries);
        let x = self.arena.input(n, all);
        let norm = block.norms.attention.zip(at.attention_norm.as_ref());
        let h = self.norm_before(norm, self.arena.h.top(all), saved.attention_stats, x)?;
        self.sharing(&[h], |model| {
            model.linear(keys.new, false, h, &at.kv)?;
            let query_h = model.query_h(h, rows)?;
            model.linear(saved.raw.map_or(saved.q, |raw| raw.q), false, query_h, &at.q)
        })?;
        self.qk_norm(block, at, saved, keys.new)?;
        self.rotate(n, saved.q, keys.new, rows, false)?;
        for (row, place) in keys.places.iter().enumerate() {
            self.backend.copy(*place, keys.new.row_range(row..row + 1))?;
        }
        let attention = self.attention(n, block, rows);
        self.backend.attention(attention, saved.o, saved.lse, saved.q, keys.all)?;
        match rows.query_rows {
            None => self.backend.copy(saved.middle, x)?,
            Some(query_rows) => self.backend.gather(saved.middle, x, query_rows)?,
        }
        let [after_attention, after_mlp] = Joint::of(block, at, saved, self.residual_dropouts(n));
        if !block.parallel {
            self.join(saved.middle, saved.o, &at.out, after_attention)?;
        }

        let norm = block.norms.mlp.zip(at.mlp_norm.as_ref());
        let h = self.norm_before(norm, self.arena.h.top(queries), saved.mlp_stats, saved.middle)?;
        self.backend.copy(out, saved.middle)?;
        if block.mlp.experts.is_some() {
            self.experts_forward(n, h, out, saved)?;
        } else {
            self.linear(saved.up, false, h, &at.up)?;
            let inner = self.arena.inner(block, queries);
            self.backend.activate(block.mlp.activation, inner, saved.up)?;
            self.join(out, inner, &at.down, after_mlp)?;
        }
        if block.parallel {
            self.join(out, saved.o, &at.out, after_attention)?;
        }
        Ok(())
    }

    /// The backward of [`Model::block_forward`]: computes `dx`, the gradient of its input, from the gradient of its
    /// output (on the query rows).
    pub(super) fn block_backward(&mut self, n: usize, rows: &Rows) -> Result<()> {
        let (arch, map) = (Arc::clone(&self.arch), Arc::clone(&self.map));
        let (block, at) = (&arch.blocks[n], &map.blocks[n]);
        let (all, queries) = (rows.all(), rows.queries());
        let Some(back) = self.arena.backward(block, all, queries) else { return Ok(()) };
        let saved = self.arena.saved(n, all, queries);
        let dx = back.dx;
        // The residual stream's gradient, on the query rows: a separate buffer in the last layer.
        let d = if rows.query_rows.is_some() { back.d_last.top(queries) } else { dx };
        let [after_attention, after_mlp] = Joint::of(block, at, saved, self.residual_dropouts(n));
        let (d_o, dq, dkv) = (back.d_o, back.dq, back.dkv);
        if block.parallel {
            // Before the MLP adds to `d`, which both branches read.
            let dy = self.join_backward(d, back, after_attention)?;
            self.linear_backward(&at.out, d_o, false, dy, saved.o)?;
        }

        // MLP.
        let (norm, h) = (block.norms.mlp.zip(at.mlp_norm.as_ref()), self.arena.h.top(queries));
        let dh = back.dh.top(queries);
        if block.mlp.experts.is_some() {
            let h = self.norm_before_again(norm, h, saved.mlp_stats, saved.middle)?;
            self.experts_backward(n, h, d, back, saved)?;
        } else {
            let inner = self.arena.inner(block, queries);
            self.backend.activate(block.mlp.activation, inner, saved.up)?;
            let dy = self.join_backward(d, back, after_mlp)?;
            // The activation is no longer needed after this, so its gradient overwrites it.
            self.linear_backward(&at.down, inner, false, dy, inner)?;
            self.backend.activate_backward(block.mlp.activation, back.dup, inner, saved.up)?;
            let h = self.norm_before_again(norm, h, saved.mlp_stats, saved.middle)?;
            self.linear_backward(&at.up, dh, false, back.dup, h)?;
        }
        self.norm_before_backward(norm, d, dh, saved.mlp_stats, saved.middle)?;

        // Attention.
        if !block.parallel {
            let dy = self.join_backward(d, back, after_attention)?;
            self.linear_backward(&at.out, d_o, false, dy, saved.o)?;
        }
        let (o, lse, q, kv) = (saved.o, saved.lse, saved.q, saved.kv);
        let attention = self.attention(n, block, rows);
        self.backend.attention_backward(attention, dq, dkv, d_o, o, lse, q, kv)?;
        self.rotate(n, dq, dkv, rows, true)?;
        if let (Some(raw), Some([raw_q, raw_k])) = (saved.raw, back.raw) {
            self.qk_norm_backward(block, at, raw, [raw_q, raw_k], dq, dkv)?;
        }
        let (x, h) = (self.arena.input(n, all), self.arena.h.top(all));
        let norm = block.norms.attention.zip(at.attention_norm.as_ref());
        let h = self.norm_before_again(norm, h, saved.attention_stats, x)?;
        let dh = back.dh.top(all);
        self.sharing(&[h], |model| {
            model.linear_backward(&at.kv, dh, false, dkv, h)?;
            let query_h = model.query_h(h, rows)?;
            let Some(query_rows) = rows.query_rows else {
                return model.linear_backward(&at.q, dh, true, dq, h);
            };
            // From the query rows back to all rows; the residual gradient of the other rows starts at zero. The
            // gradient overwrites the normalised rows.
            model.linear_backward(&at.q, query_h, false, dq, query_h)?;
            model.backend.scatter_add(dh, query_h, query_rows)?;
            model.backend.fill(dx, 0.0)?;
            model.backend.scatter_add(dx, d, query_rows)
        })?;
        self.norm_before_backward(norm, dx, dh, saved.attention_stats, x)
    }

    /// Dropout of the outputs of attention and MLP of layer `n`.
    fn residual_dropouts(&self, n: usize) -> [Option<Dropout>; 2] {
        let rate = self.arch.blocks[n].residual_dropout;
        [Site::AfterAttention(n), Site::AfterMlp(n)].map(|site| self.dropout(site, rate))
    }

    /// Adds the output of attention or MLP to the residual stream: `to += scale · dropout(norm(x · wᵀ + b))`, with the
    /// norm if there is one.
    fn join(&mut self, to: View, x: View, at: &Linear, joint: Joint) -> Result<()> {
        if joint.norm.is_none() && joint.dropout.is_none() && joint.scale == 1.0 {
            return self.linear(to, true, x, at);
        }
        // The previous normalised rows are no longer needed.
        let scratch = self.arena.h.top(to.rows());
        match joint.norm {
            None => self.linear(scratch, false, x, at)?,
            Some((norm, slots, Branch { y, stats })) => {
                self.linear(y, false, x, at)?;
                self.norm(norm, slots, scratch, stats, y)?;
            }
        }
        self.drop(scratch, joint.dropout)?;
        if joint.scale != 1.0 {
            self.backend.scale(scratch, joint.scale)?;
        }
        self.backend.add(to, scratch)
    }

    /// The backward of [`Model::join`]: the gradient of `x · wᵀ + b`, given that of the residual stream. The result may
    /// be in `dh`.
    fn join_backward(&mut self, d: View, back: Backward, joint: Joint) -> Result<View> {
        let mut dy = d;
        if joint.scale != 1.0 || joint.dropout.is_some() {
            dy = back.dh.top(d.rows());
            self.backend.copy(dy, d)?;
            self.backend.scale(dy, joint.scale)?;
            self.drop(dy, joint.dropout)?;
        }
        let (Some((norm, slots, Branch { y, stats })), Some(branch)) = (joint.norm, back.branch) else {
            return Ok(dy);
        };
        self.backend.fill(branch, 0.0)?;
        self.norm_backward(norm, slots, branch, dy, stats, y)?;
        Ok(branch)
    }

    /// The attention of layer `n`.
    fn attention<'a>(&self, n: usize, block: &Block, rows: &Rows<'a>) -> Attention<'a> {
        let dropout = self.dropout(Site::Attention(n), block.attention.dropout);
        Attention { heads: block.attention.heads, plan: rows.attention, dropout }
    }

    /// `x` if the layer has no norm here, else `y = norm(x)`.
    fn norm_before(&mut self, norm: BlockNorm, y: View, stats: View, x: View) -> Result<View> {
        let Some((norm, at)) = norm else { return Ok(x) };
        self.norm(norm, at, y, stats, x)?;
        Ok(y)
    }

    /// As [`Model::norm_before`], from its saved statistics.
    fn norm_before_again(&mut self, norm: BlockNorm, y: View, stats: View, x: View) -> Result<View> {
        let Some((norm, at)) = norm else { return Ok(x) };
        let (w, b) = self.norm_views(at);
        self.backend.norm_again(norm, y, stats, x, w, b)?;
        Ok(y)
    }

    /// The backward of [`Model::norm_before`]: `dx += …`.
    fn norm_before_backward(
        &mut self,
        norm: BlockNorm,
        dx: View,
        dy: View,
        stats: View,
        x: View,
    ) -> Result<()> {
        match norm {
            Some((norm, at)) => self.norm_backward(norm, at, dx, dy, stats, x),
            None => self.backend.add(dx, dy),
        }
    }

    /// Normalises queries and keys, if the layer does.
    fn qk_norm(&mut self, block: &Block, at: &BlockSlots, saved: Saved, kv: View) -> Result<()> {
        let (Some(QkNorm { norm, .. }), Some(raw), Some([q_norm, k_norm])) =
            (block.attention.qk_norm, saved.raw, &at.qk_norm)
        else {
            return Ok(());
        };
        // One product gives keys and values side by side; the keys are normalised in place.
        let k = kv.columns(0..raw.k.width());
        self.backend.copy(raw.k, k)?;
        self.norm(norm, q_norm, saved.q, raw.q_stats, raw.q)?;
        self.norm(norm, k_norm, k, raw.k_stats, raw.k)
    }

    /// The backward of [`Model::qk_norm`]: turns `dq` and the keys of `dkv` into the gradients of the norms' inputs.
    fn qk_norm_backward(
        &mut self,
        block: &Block,
        at: &BlockSlots,
        raw: RawHeads,
        scratch: [View; 2],
        dq: View,
        dkv: View,
    ) -> Result<()> {
        let (Some(QkNorm { norm, .. }), Some([q_norm, k_norm])) = (block.attention.qk_norm, &at.qk_norm)
        else {
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

    /// Rotates the queries of the query rows and the keys of all rows, if positions are rotary; `inverse` is the
    /// backward.
    fn rotate(&mut self, n: usize, q: View, kv: View, rows: &Rows, inverse: bool) -> Result<()> {
        let Some(rope) = self.block_ropes[n] else { return Ok(()) };
        let Some(table) = self.ropes[rope].view() else { return Ok(()) };
        let (all, queries) = match &rows.rope_rows[rope] {
            None => (rows.positions, rows.query_positions),
            Some([all, queries]) if rows.query_rows.is_some() => (all.view(), queries.view()),
            Some([all, _]) => (all.view(), all.view()),
        };
        let heads = self.arch.blocks[n].attention.heads;
        let k = kv.columns(0..heads.key_width());
        self.backend.rotate(k, heads.head_dim, table, all, inverse)?;
        self.backend.rotate(q, heads.head_dim, table, queries, inverse)
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

    /// `y (+)= x · wᵀ + b`.
    pub(super) fn linear(&mut self, y: View, accumulate: bool, x: View, at: &Linear) -> Result<()> {
        self.sharing(&[x], |model| {
            for piece in model.pieces(at.parts.iter().filter(|part| !part.is_dora())) {
                model.backend.linear(y.columns(piece.outputs), accumulate, x, piece.weight, piece.bias)?;
            }
            model.adapters_forward(at, y, accumulate, x)
        })
    }

    /// The gradients of a layer's weights, biases and adapters, then `dx (+)= dy · w`. `dx` may be `x`.
    pub(super) fn linear_backward(
        &mut self,
        at: &Linear,
        dx: View,
        accumulate: bool,
        dy: View,
        x: View,
    ) -> Result<()> {
        self.sharing(&[dy, x], |model| {
            model.linear_dw(at, dy, x)?;
            model.linear_dx(dx, accumulate, dy, at)
        })
    }

    /// Runs operations, several of which read these factors.
    fn sharing(&mut self, factors: &[View], run: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let mut result = Ok(());
        for factor in factors {
            result = result.and_then(|()| self.backend.share_factor(*factor));
        }
        result = result.and_then(|()| run(self));
        factors.iter().for_each(|factor| self.backend.release_factor(*factor));
        result
    }

    /// `dx (+)= dy · w`.
    fn linear_dx(&mut self, dx: View, accumulate: bool, dy: View, at: &Linear) -> Result<()> {
        let mut accumulate = accumulate;
        for piece in self.pieces(at.parts.iter().filter(|part| !part.is_dora())) {
            self.backend.linear_dx(dx, accumulate, dy.columns(piece.outputs), piece.weight)?;
            accumulate = true;
        }
        self.adapters_dx(at, dx, accumulate, dy)
    }

    /// The products that compute these parts. Parts whose weights and biases are adjacent in a buffer form one product;
    /// a tensor stored head by head in a file takes one product per head.
    pub(super) fn pieces<'p>(&self, parts: impl Iterator<Item = &'p Part>) -> Vec<Piece> {
        let mut pieces: Vec<Piece> = Vec::new();
        // The end of the last piece's weights and biases in the buffer.
        let mut end: Option<(usize, Option<usize>)> = None;
        for part in parts {
            let (weight, bias) = (&part.weight.range, part.bias.as_ref().map(|bias| &bias.range));
            if self.files[part.weight.parameter].is_some() {
                end = None;
                let bias = bias.map(|bias| self.parameter_view(bias));
                pieces.extend(self.file_pieces(&part.weight).into_iter().map(|(rows, weight)| Piece {
                    outputs: part.outputs.start + rows.start..part.outputs.start + rows.end,
                    weight,
                    bias: bias.map(|bias| bias.part(rows.start, rows.len())),
                }));
                continue;
            }
            let width = part.weight.shape[1];
            let follows = end == Some((weight.start, bias.map(|bias| bias.start)));
            end = Some((weight.end, bias.map(|bias| bias.end)));
            match pieces.last_mut().filter(|last| follows && last.outputs.end == part.outputs.start) {
                Some(last) => {
                    let rows = last.weight.rows() + part.outputs.len();
                    last.weight =
                        self.parameter_view(&(weight.end - rows * width..weight.end)).matrix(rows, width);
                    last.bias = bias.map(|bias| self.parameter_view(&(bias.end - rows..bias.end)));
                    last.outputs.end = part.outputs.end;
                }
                None => pieces.push(Piece {
                    outputs: part.outputs.clone(),
                    weight: self.slot_view(&part.weight),
                    bias: bias.map(|bias| self.parameter_view(bias)),
                }),
            }
        }
        pieces
    }

    /// The gradients of a layer's weights, biases and adapters, if they are trained.
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

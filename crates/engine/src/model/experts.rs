//! Forward and backward of a mixture-of-experts MLP.
//!
//! `y = Σ_slots weight · down(inner)`, with `inner = f(up(h))`, each slot through its expert. The weight is multiplied
//! into `inner`, so that its gradient does not need the expert's output.

use super::Model;
use super::arena::{Backward, Saved};
use crate::Result;
use crate::kernels::{Backend, Indices, View};
use crate::params::Linear;
use std::sync::Arc;

impl<B: Backend> Model<B> {
    /// `out += experts(h)`.
    pub(super) fn experts_forward(&mut self, n: usize, h: View, out: View, saved: Saved) -> Result<()> {
        let (arch, map) = (Arc::clone(&self.arch), Arc::clone(&self.map));
        let (block, at) = (&arch.blocks[n], &map.blocks[n]);
        let (Some(experts), Some(router), Some([probabilities, weights])) =
            (block.mlp.experts, &at.router, saved.route)
        else {
            return Ok(());
        };
        self.linear(probabilities, false, h, router)?;
        let routes = self.backend.route(experts.routing, probabilities, weights)?;
        let (rows, offsets) = (routes.rows(), routes.offsets());
        self.routes[n] = Some(routes);

        let [x, y] = self.arena.slots(rows.len(), h.width());
        let (inner, up) = (self.arena.inner(block, h.rows()), self.up_of_slots(n, saved, rows.len()));
        self.backend.gather(x, h, rows)?;
        let (up_weights, down_weights) = (self.grouped(&at.up), self.grouped(&at.down));
        self.backend.grouped_linear(up, x, &up_weights, offsets)?;
        self.backend.activate(block.mlp.activation, inner, up)?;
        self.backend.scale_rows(inner, weights)?;
        self.backend.grouped_linear(y, inner, &down_weights, offsets)?;
        self.backend.scatter_add(out, y, rows)
    }

    /// The backward of [`Model::experts_forward`]: leaves the gradient of `h` in `dh`, given that of `out`.
    pub(super) fn experts_backward(
        &mut self,
        n: usize,
        h: View,
        d: View,
        back: Backward,
        saved: Saved,
    ) -> Result<()> {
        let (arch, map) = (Arc::clone(&self.arch), Arc::clone(&self.map));
        let (block, at) = (&arch.blocks[n], &map.blocks[n]);
        let Some(routes) = self.routes[n].take() else { return Ok(()) };
        let (rows, offsets) = (routes.rows(), routes.offsets());
        let gradients = self.arena.route_gradients(block, h.rows());
        let (Some(experts), Some(router), Some([probabilities, weights]), Some([d_logits, d_weights])) =
            (block.mlp.experts, &at.router, saved.route, gradients)
        else {
            return Ok(());
        };
        let [first, second] = self.arena.slots(rows.len(), h.width());
        let (inner, up) = (self.arena.inner(block, h.rows()), self.up_of_slots(n, saved, rows.len()));

        // The gradient of the weighted activation. The gradient of `up` is not computed yet, so its memory is used.
        let dy = first;
        let dz = back.dup.matrix(rows.len(), inner.width());
        self.backend.gather(dy, d, rows)?;
        let (up_weights, down_weights) = (self.grouped(&at.up), self.grouped(&at.down));
        self.backend.grouped_linear_dx(dz, dy, &down_weights, offsets)?;
        self.backend.activate(block.mlp.activation, inner, up)?;
        self.backend.row_dots(d_weights, dz, inner)?;
        self.backend.scale_rows(inner, weights)?;
        self.grouped_dw(&at.down, dy, inner, offsets)?;

        let d_inner = inner;
        self.backend.copy(d_inner, dz)?;
        self.backend.scale_rows(d_inner, weights)?;
        self.backend.activate_backward(block.mlp.activation, back.dup, d_inner, up)?;
        let (x, dx) = (second, first);
        self.backend.gather(x, h, rows)?;
        self.grouped_dw(&at.up, back.dup, x, offsets)?;
        self.backend.grouped_linear_dx(dx, back.dup, &up_weights, offsets)?;

        let dh = back.dh.top(h.rows());
        self.backend.route_backward(experts.routing, d_logits, probabilities, d_weights, &routes)?;
        self.balance_backward(d_logits, probabilities)?;
        self.linear_backward(router, dh, false, d_logits, h)?;
        self.backend.scatter_add(dh, dx, rows)
    }

    /// The saved output of the first matrices, by slot.
    fn up_of_slots(&self, n: usize, saved: Saved, slots: usize) -> View {
        saved.up.matrix(slots, self.arch.blocks[n].mlp.up_width())
    }

    /// The weights of all experts, one after the other.
    fn grouped(&self, at: &Linear) -> Vec<View> {
        self.pieces(at.parts.iter()).into_iter().map(|piece| piece.weight).collect()
    }

    /// The gradients of those expert weights that are trained.
    fn grouped_dw(&mut self, at: &Linear, dy: View, x: View, offsets: Indices) -> Result<()> {
        for (outputs, slots) in at.trained(|part| Some(&part.weight)) {
            if let Some((dw, accumulate)) = self.gradient_of(&slots) {
                let dw = dw.matrix(outputs.len(), at.inputs);
                self.backend.grouped_linear_dw(dw, outputs.start, accumulate, dy, x, offsets)?;
            }
        }
        Ok(())
    }
}

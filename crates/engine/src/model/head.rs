//! From tokens to the first layer, and from the last layer to the losses.

use super::Model;
use super::noise::Site;
use crate::Result;
use crate::batch::Batch;
use crate::kernels::{Backend, Buffer, Indices, TargetLoss, View};
use std::sync::Arc;

impl<B: Backend> Model<B> {
    /// `x[tokens, H] = scale · embedding[ids] (+ noise) (+ table[positions])`; `noise` holds each row's noise size.
    pub(super) fn embed(&mut self, ids: Indices, positions: Indices, noise: Option<View>) -> Result<()> {
        let map = Arc::clone(&self.map);
        let x = self.arena.input(0, ids.len());
        self.backend.gather(x, self.slot_view(&map.embedding), ids)?;
        if self.arch.embedding.scale != 1.0 {
            self.backend.scale(x, self.arch.embedding.scale)?;
        }
        if let (Some(sizes), Some(draw)) = (noise, self.draw(Site::Noise)) {
            self.backend.add_noise(x, sizes, draw)?;
        }
        if let Some(table) = &map.positions {
            let h = self.arena.h.top(ids.len());
            self.backend.gather(h, self.slot_view(table), positions)?;
            self.backend.add(x, h)?;
        }
        self.drop(x, self.dropout(Site::Embedding, self.arch.embedding.dropout))
    }

    /// The gradients of the embedding and of the position table.
    pub(super) fn embed_backward(&mut self, ids: Indices, positions: Indices) -> Result<()> {
        let Some((_, dx, _)) = self.arena.stream() else { return Ok(()) };
        let (map, dx) = (Arc::clone(&self.map), dx.top(ids.len()));
        self.drop(dx, self.dropout(Site::Embedding, self.arch.embedding.dropout))?;
        let scale = self.arch.embedding.scale;
        let tables = [(map.positions.as_ref(), positions, 1.0), (Some(&map.embedding), ids, scale)];
        for (slot, rows, scale) in tables {
            let Some(slot) = slot else { continue };
            if scale != 1.0 {
                self.backend.scale(dx, scale)?;
            }
            // With a tied head, the head's part of the embedding's gradient is already there.
            if let Some(table) = self.gradient_to_add(slot)? {
                self.backend.scatter_add(table.matrix(slot.shape[0], slot.shape[1]), dx, rows)?;
            }
        }
        Ok(())
    }

    /// Final norm, head and losses of the targets, in chunks of rows. With `scale`, also their backward, which leaves
    /// the gradient of the last layer's output in `d_last`. The rows of the loss table follow `order`.
    pub(super) fn head(&mut self, batch: &Batch, order: &[usize], scale: Option<f32>) -> Result<Buffer> {
        let (map, count) = (Arc::clone(&self.map), order.len());
        let (h, stats, last) = self.final_norm(count)?;
        let targets = || order.iter().map(|&i| batch.targets[i]);
        let ids = self.backend.upload_indices(&targets().map(|t| t.id).collect::<Vec<_>>())?;
        let weights = match scale {
            None => None,
            Some(scale) => {
                let weights = self.backend.allocate(count)?;
                let values: Vec<f32> = targets().map(|t| t.weight * scale).collect();
                self.backend.write(weights.view(), &values)?;
                Some(weights)
            }
        };
        let losses = self.backend.allocate(count * TargetLoss::COLUMNS)?;
        let table = losses.matrix(count, TargetLoss::COLUMNS);
        let at = self.arch.head;
        for start in (0..count).step_by(self.arena.chunk) {
            let rows = start..count.min(start + self.arena.chunk);
            let logits = self.arena.logits.top(rows.len());
            let h = h.row_range(rows.clone());
            self.linear(logits, false, h, &map.head)?;
            if at.scale != 1.0 {
                self.backend.scale(logits, at.scale)?;
            }
            let chunk_weights = weights.as_ref().map(|weights| weights.view().part(start, rows.len()));
            let smoothing = self.pass.map_or(0.0, |pass| pass.label_smoothing);
            let (losses, ids) = (table.row_range(rows.clone()), ids.view().part(rows.clone()));
            self.backend.cross_entropy(losses, logits, ids, chunk_weights, at.softcap, smoothing)?;
            if let (Some(_), Some((.., dh))) = (scale, self.arena.stream()) {
                // From here on the buffer of the logits holds their gradient.
                if at.scale != 1.0 {
                    self.backend.scale(logits, at.scale)?;
                }
                self.linear_backward(&map.head, dh.row_range(rows), false, logits, h)?;
            }
        }
        if let (Some(_), Some((d_last, _, dh))) = (scale, self.arena.stream()) {
            let d_last = d_last.top(count);
            self.backend.fill(d_last, 0.0)?;
            let norm = self.arch.head.norm;
            self.norm_backward(norm, &map.norm, d_last, dh.top(count), stats, last)?;
        }
        Ok(losses)
    }

    /// The final norm of the first `count` output rows of the last layer: `(normalised, statistics, rows)`.
    pub(super) fn final_norm(&mut self, count: usize) -> Result<(View, View, View)> {
        let map = Arc::clone(&self.map);
        let (last, h) = (self.arena.last.top(count), self.arena.h.top(count));
        let stats = self.arena.last_stats.top(count);
        self.norm(self.arch.head.norm, &map.norm, h, stats, last)?;
        Ok((h, stats, last))
    }
}

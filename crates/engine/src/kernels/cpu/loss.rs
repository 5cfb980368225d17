//! Softmax cross-entropy. `logits` is `[n, vocab]` and is overwritten by its gradient, never kept.

use super::TargetLoss;
use super::simd::{exp, max, sum, vectorized};
use rayon::prelude::*;

/// See [`super::Backend::cross_entropy`].
pub(super) fn cross_entropy(
    losses: &mut [f32],
    logits: &mut [f32],
    vocab: usize,
    ids: &[u32],
    weights: Option<&[f32]>,
) {
    let losses = losses.par_chunks_mut(TargetLoss::COLUMNS);
    logits.par_chunks_mut(vocab).zip(ids).zip(losses).enumerate().for_each(|(i, ((x, &id), loss))| {
        let (nll, top1) = row(x, id as usize, weights.map(|w| w[i]));
        loss.copy_from_slice(&[nll, f32::from(top1)]);
    });
}

vectorized! {
    fn row(x: &mut [f32], id: usize, weight: Option<f32>) -> (f32, bool) {
        let (top, own) = (max(x), x[id]);
        let top1 = own == top && !x[..id].contains(&top);
        let total = match weight {
            None => sum(x.len(), |j| exp(x[j] - top)),
            Some(weight) => {
                for x in x.iter_mut() {
                    *x = exp(*x - top);
                }
                let total = sum(x.len(), |j| x[j]);
                let scale = weight / total;
                for x in x.iter_mut() {
                    *x *= scale;
                }
                x[id] -= weight;
                total
            }
        };
        (top + total.ln() - own, top1)
    }
}

//! Softmax cross-entropy. `logits` is `[n, vocab]` and is overwritten by its gradient, never kept.

use super::Outcome;
use super::simd::{exp, max, sum, vectorized};
use rayon::prelude::*;

/// See [`super::Backend::cross_entropy`].
pub(super) fn cross_entropy(
    logits: &mut [f32],
    vocab: usize,
    ids: &[u32],
    weights: Option<&[f32]>,
    out: &mut [Outcome],
) {
    assert_eq!(logits.len(), ids.len() * vocab);
    logits.par_chunks_mut(vocab).zip(ids).zip(out).enumerate().for_each(|(i, ((x, &id), out))| {
        *out = row(x, id as usize, weights.map(|w| w[i]));
    });
}

vectorized! {
    fn row(x: &mut [f32], id: usize, weight: Option<f32>) -> Outcome {
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
        Outcome { nll: top + total.ln() - own, top1 }
    }
}

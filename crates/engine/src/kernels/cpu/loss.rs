//! Softmax cross-entropy. `logits` is `[n, vocab]` and is overwritten by its gradient.

use super::TargetLoss;
use super::simd::{exp, max, sum, sums, tanh, vectorized};
use rayon::prelude::*;

/// See [`super::Backend::cross_entropy`].
pub(super) fn cross_entropy(
    losses: &mut [f32],
    logits: &mut [f32],
    vocab: usize,
    ids: &[u32],
    weights: Option<&[f32]>,
    softcap: Option<f32>,
    smoothing: f32,
) {
    let losses = losses.par_chunks_mut(TargetLoss::COLUMNS);
    logits.par_chunks_mut(vocab).zip(ids).zip(losses).enumerate().for_each(|(i, ((x, &id), loss))| {
        let (id, weight) = (id as usize, weights.map(|w| w[i]));
        // `ln Σ e^x` is `nll + x[id]`, so `−Σ ln p / n` follows from the mean of the logits.
        let mean = if smoothing > 0.0 { mean(x, softcap) } else { 0.0 };
        let (nll, own, top1, entropy) = match softcap {
            None => row(x, id, weight, smoothing),
            Some(cap) => capped_row(x, id, weight, cap, smoothing),
        };
        let uniform = if smoothing > 0.0 { nll + own - mean } else { 0.0 };
        loss.copy_from_slice(&[nll, f32::from(top1), entropy, uniform]);
    });
}

vectorized! {
    /// The mean of a row's logits, after capping.
    fn mean(x: &[f32], softcap: Option<f32>) -> f32 {
        let total = match softcap {
            None => sum(x.len(), |j| x[j]),
            Some(cap) => sum(x.len(), |j| cap * tanh(x[j] / cap)),
        };
        total / x.len() as f32
    }
}

vectorized! {
    /// `(nll, x[id], top1, entropy)`. With `z = Σ e^d` over `d = x − max`, the entropy is `ln z − Σ d·e^d / z`.
    fn row(x: &mut [f32], id: usize, weight: Option<f32>, smoothing: f32) -> (f32, f32, bool, f32) {
        let (top, own) = (max(x), x[id]);
        let top1 = own == top && !x[..id].contains(&top);
        let term = |x: f32| {
            let (d, e) = (x - top, exp(x - top));
            (e, d * e)
        };
        let (total, weighted) = match weight {
            None => sums(x, |x| term(*x)),
            Some(weight) => {
                let (total, weighted) = sums(x, |x| {
                    let (e, de) = term(*x);
                    *x = e;
                    (e, de)
                });
                let (scale, others) = (weight / total, weight * (smoothing / x.len() as f32));
                for x in x.iter_mut() {
                    *x = *x * scale - others;
                }
                x[id] -= weight * (1.0 - smoothing);
                (total, weighted)
            }
        };
        (top + total.ln() - own, own, top1, total.ln() - weighted / total)
    }
}

vectorized! {
    /// As [`row`] for `y = cap · tanh(x / cap)`, whose derivative is `1 − (y / cap)²`.
    fn capped_row(
        x: &mut [f32], id: usize, weight: Option<f32>, cap: f32, smoothing: f32,
    ) -> (f32, f32, bool, f32) {
        let (mut top, own) = (f32::NEG_INFINITY, cap * tanh(x[id] / cap));
        for x in x.iter() {
            let y = cap * tanh(*x / cap);
            top = if y > top { y } else { top };
        }
        let top1 = own == top && !x[..id].iter().any(|x| cap * tanh(*x / cap) == top);
        let (total, weighted) = sums(x, |x| {
            let d = cap * tanh(*x / cap) - top;
            (exp(d), d * exp(d))
        });
        if let Some(weight) = weight {
            let (scale, others) = (weight / total, weight * (smoothing / x.len() as f32));
            for (j, x) in x.iter_mut().enumerate() {
                let t = tanh(*x / cap);
                let label = if j == id { weight * (1.0 - smoothing) } else { 0.0 };
                *x = (scale * exp(cap * t - top) - others - label) * (1.0 - t * t);
            }
        }
        (top + total.ln() - own, own, top1, total.ln() - weighted / total)
    }
}

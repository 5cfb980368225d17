//! Attention, one row of scores at a time.

use super::functions::{capped, factor};
use crate::kernels::{Attention, AttentionPlan, Heads};

/// The output, and the log-sum-exp of each row of scores.
pub(super) fn forward(a: Attention, plan: &AttentionPlan, q: &[f64], kv: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let Attention { heads: h, dropout, .. } = a;
    let (mut out, mut sums) = (vec![0.0; q.len()], vec![0.0; plan.rows.len() * h.heads]);
    for_each_row(h, plan, |i, head, keys, first| {
        let row = plan.rows[i] as usize * h.heads + head;
        let (scores, _) = scores(h, q, kv, i, head, &keys);
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum = scores.iter().map(|s| (s - max).exp()).sum::<f64>();
        sums[i * h.heads + head] = max + sum.ln();
        for (n, (s, &key)) in scores.iter().zip(&keys).enumerate() {
            let p = (s - max).exp() / sum * factor(dropout, row, first + n);
            for d in 0..h.head_dim {
                out[i * h.query_width() + head * h.head_dim + d] += p * kv[value_at(h, key, head) + d];
            }
        }
    });
    (out, sums)
}

/// The gradients of `q` and of `kv`.
pub(super) fn backward(
    a: Attention,
    plan: &AttentionPlan,
    d_o: &[f64],
    o: &[f64],
    lse: &[f64],
    q: &[f64],
    kv: &[f64],
) -> (Vec<f64>, Vec<f64>) {
    let Attention { heads: h, dropout, .. } = a;
    let (mut gq, mut gkv) = (vec![0.0; q.len()], vec![0.0; kv.len()]);
    for_each_row(h, plan, |i, head, keys, first| {
        let row = plan.rows[i] as usize * h.heads + head;
        let at = i * h.query_width() + head * h.head_dim;
        let through: f64 = (0..h.head_dim).map(|d| d_o[at + d] * o[at + d]).sum();
        let (scores, slopes) = scores(h, q, kv, i, head, &keys);
        for (n, ((s, slope), &key)) in scores.iter().zip(slopes).zip(&keys).enumerate() {
            let (k, v) = (key_at(h, key, head), value_at(h, key, head));
            let p = (s - lse[i * h.heads + head]).exp();
            let kept = factor(dropout, row, first + n);
            let dp: f64 = kept * (0..h.head_dim).map(|d| d_o[at + d] * kv[v + d]).sum::<f64>();
            let ds = p * (dp - through) * slope * h.scale as f64;
            for d in 0..h.head_dim {
                gq[at + d] += ds * kv[k + d];
                gkv[k + d] += ds * q[at + d];
                gkv[v + d] += p * kept * d_o[at + d];
            }
        }
    });
    (gq, gkv)
}

/// Index in `kv` of the first element of the key of row `key` for query head `head`.
fn key_at(h: Heads, key: usize, head: usize) -> usize {
    key * h.kv_width() + head / (h.heads / h.kv_heads) * h.head_dim
}

/// Index in `kv` of the first element of the value of row `key` for query head `head`.
fn value_at(h: Heads, key: usize, head: usize) -> usize {
    key_at(h, key, head) + h.kv_heads * h.head_dim
}

/// Calls `f(query row, head, the key rows that it sees, the place of the first of them in its range)` for each query
/// row and head.
fn for_each_row(h: Heads, plan: &AttentionPlan, mut f: impl FnMut(usize, usize, Vec<usize>, usize)) {
    for range in &plan.ranges {
        for i in range.queries.clone() {
            let keys: Vec<usize> =
                range.prefix.clone().chain(range.own.start..plan.rows[i] as usize + 1).collect();
            let first = h.window.map_or(0, |window| keys.len().saturating_sub(window));
            for head in 0..h.heads {
                f(i, head, keys[first..].to_vec(), first);
            }
        }
    }
}

/// Scaled and capped scores of query row `i` with `keys`, and the derivatives of the capping.
fn scores(h: Heads, q: &[f64], kv: &[f64], i: usize, head: usize, keys: &[usize]) -> (Vec<f64>, Vec<f64>) {
    let q = &q[i * h.query_width() + head * h.head_dim..][..h.head_dim];
    keys.iter()
        .map(|&key| {
            let product: f64 = q.iter().zip(&kv[key_at(h, key, head)..]).map(|(q, k)| q * k).sum();
            capped(product * h.scale as f64, h.softcap)
        })
        .unzip()
}

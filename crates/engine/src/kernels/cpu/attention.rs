//! Causal attention within ranges, in blocks of queries: the scores of a block stay in a core's cache and are
//! never kept; the backward pass recomputes them from the log-sum-exp (Dao et al. 2022).
//!
//! Shapes: `q`, `o`, `dq`, `do` are `[queries, heads·head_dim]`; `kv`, `dkv` are
//! `[keys, 2·kv_heads·head_dim]` (keys, then values); `lse` is `[queries, heads]`.

use super::matmul::{Matrix, product};
use super::simd::{exp, max, sum, vectorized};
use super::{AttentionPlan, AttentionRange, Disjoint, Heads, Scratch};
use rayon::prelude::*;

/// Queries per block: 128 rows of scores over 512 keys are 256 KiB, half an L2 cache with their gradient.
const BLOCK: usize = 128;

/// A block of queries of one range.
struct Block<'a> {
    range: &'a AttentionRange,
    /// First query row.
    first: usize,
    /// Key rows of the block's queries.
    rows: &'a [u32],
    /// Own keys that the last query sees; the whole block is computed over them.
    own: usize,
}

impl Block<'_> {
    /// Keys over which the block is computed: prefix, then own.
    fn keys(&self) -> usize {
        self.range.prefix.len() + self.own
    }

    /// How many of them the block's query `i` sees.
    fn seen(&self, i: usize) -> usize {
        self.range.prefix.len() + self.rows[i] as usize + 1 - self.range.own.start
    }

    /// The two runs of keys: `(first key row, its column in the scores, length)`.
    fn runs(&self) -> impl Iterator<Item = (usize, usize, usize)> {
        let prefix = self.range.prefix.clone();
        [(prefix.start, 0, prefix.len()), (self.range.own.start, prefix.len(), self.own)]
            .into_iter()
            .filter(|run| run.2 > 0)
    }
}

/// The blocks of a range, in order.
fn blocks<'a>(plan: &'a AttentionPlan, range: &'a AttentionRange) -> impl Iterator<Item = Block<'a>> {
    range.queries.clone().step_by(BLOCK).map(move |first| {
        let rows = &plan.rows[first..range.queries.end.min(first + BLOCK)];
        let own = rows[rows.len() - 1] as usize + 1 - range.own.start;
        debug_assert!(rows.is_sorted() && rows.iter().all(|r| range.own.contains(&(*r as usize))));
        Block { range, first, rows, own }
    })
}

/// The largest block of scores in the plan.
fn largest(plan: &AttentionPlan) -> usize {
    let block =
        |range: &AttentionRange| BLOCK.min(range.queries.len()) * (range.prefix.len() + range.own.len());
    plan.ranges.iter().map(block).max().unwrap_or(0)
}

/// `o` and `lse`: a task per range and head.
pub(super) fn forward(
    h: Heads,
    plan: &AttentionPlan,
    o: &mut [f32],
    lse: &mut [f32],
    q: &[f32],
    kv: &[f32],
    scratch: &Scratch,
) {
    let (wide, kv_wide, size) = (h.query_width(), h.kv_width(), h.head_dim);
    let (o, lse) = (Disjoint::new(o), Disjoint::new(lse));
    let largest = largest(plan);
    (0..plan.ranges.len() * h.heads).into_par_iter().with_max_len(1).for_each(|task| {
        let (range, head) = (&plan.ranges[task / h.heads], task % h.heads);
        let at = Columns::of(h, head);
        scratch.with(largest, |scores| {
            for block in blocks(plan, range) {
                let (n, keys) = (block.rows.len(), block.keys());
                score(h, &block, &at, scores, q, kv);
                for i in 0..n {
                    let row = &mut scores[i * keys..][..keys];
                    let sum = softmax(row, block.seen(i));
                    // SAFETY: this query row's entry for this head, which only this task writes.
                    unsafe { *lse.at((block.first + i) * h.heads + head, 1) = sum };
                }
                // SAFETY: these query rows' columns of this head, which only this task writes.
                let o = unsafe { o.at(block.first * wide + at.q, (n - 1) * wide + size) };
                for (run, (key, column, len)) in block.runs().enumerate() {
                    let p = Matrix::new(&scores[column..], keys);
                    let v = Matrix::new(&kv[key * kv_wide + at.v..], kv_wide);
                    // SAFETY: as above.
                    unsafe { product(n, size, len, o, wide, run > 0, p, v, 1.0) };
                }
            }
        });
    });
}

/// `dq` and `dkv`: a task per group of ranges and kv head, so that one worker owns a key's gradient and sums
/// it in the order of the queries.
pub(super) fn backward(
    h: Heads,
    plan: &AttentionPlan,
    dq: &mut [f32],
    dkv: &mut [f32],
    do_: &[f32],
    o: &[f32],
    lse: &[f32],
    q: &[f32],
    kv: &[f32],
    scratch: &Scratch,
) {
    let (wide, kv_wide, size) = (h.query_width(), h.kv_width(), h.head_dim);
    let share = h.heads / h.kv_heads;
    let largest = largest(plan);
    super::rows::fill(dkv, 0.0);
    let (dq, dkv) = (Disjoint::new(dq), Disjoint::new(dkv));
    let key_rows = kv.len() / kv_wide;
    (0..plan.groups.len() * h.kv_heads).into_par_iter().with_max_len(1).for_each(|task| {
        let (group, kv_head) = (&plan.groups[task / h.kv_heads], task % h.kv_heads);
        scratch.with(2 * largest, |both| {
            let (p, ds) = both.split_at_mut(largest);
            for range in group.iter().map(|&i| &plan.ranges[i]) {
                for head in kv_head * share..(kv_head + 1) * share {
                    let at = Columns::of(h, head);
                    for block in blocks(plan, range) {
                        let (n, keys) = (block.rows.len(), block.keys());
                        let query = block.first * wide + at.q;
                        let (q_block, do_block) =
                            (Matrix::new(&q[query..], wide), Matrix::new(&do_[query..], wide));
                        score(h, &block, &at, p, q, kv);
                        for (key, column, len) in block.runs() {
                            let v = Matrix::new(&kv[key * kv_wide + at.v..], kv_wide).t();
                            let c = ds[column..].as_mut_ptr();
                            // SAFETY: `ds` is this task's own and holds `n` rows of `keys`.
                            unsafe { product(n, len, size, c, keys, false, do_block, v, 1.0) };
                        }
                        for i in 0..n {
                            let row = query + i * wide;
                            let lse = lse[(block.first + i) * h.heads + head];
                            let (do_, o) = (&do_[row..][..size], &o[row..][..size]);
                            softmax_backward(
                                &mut p[i * keys..][..keys],
                                &mut ds[i * keys..][..keys],
                                block.seen(i),
                                lse,
                                do_,
                                o,
                            );
                        }
                        for (run, (key, column, len)) in block.runs().enumerate() {
                            let (p, ds) = (Matrix::new(&p[column..], keys), Matrix::new(&ds[column..], keys));
                            let k = Matrix::new(&kv[key * kv_wide + at.k..], kv_wide);
                            debug_assert!(key + len <= key_rows);
                            let extent = (len - 1) * kv_wide + size;
                            // SAFETY: the group's keys and this kv head's columns belong to this task alone;
                            // so do these query rows' columns of this head.
                            unsafe {
                                let dv = dkv.at(key * kv_wide + at.v, extent);
                                product(len, size, n, dv, kv_wide, true, p.t(), do_block, 1.0);
                                let dk = dkv.at(key * kv_wide + at.k, extent);
                                product(len, size, n, dk, kv_wide, true, ds.t(), q_block, h.scale);
                                let dq = dq.at(query, (n - 1) * wide + size);
                                product(n, size, len, dq, wide, run > 0, ds, k, h.scale);
                            }
                        }
                    }
                }
            }
        });
    });
}

/// Columns at which a query head's query, key and value start.
struct Columns {
    q: usize,
    k: usize,
    v: usize,
}

impl Columns {
    fn of(h: Heads, head: usize) -> Columns {
        let k = head / (h.heads / h.kv_heads) * h.head_dim;
        Columns { q: head * h.head_dim, k, v: h.kv_heads * h.head_dim + k }
    }
}

/// Scaled scores of a block, `[queries, keys]`.
fn score(h: Heads, block: &Block, at: &Columns, scores: &mut [f32], q: &[f32], kv: &[f32]) {
    let (wide, kv_wide, keys) = (h.query_width(), h.kv_width(), block.keys());
    let n = block.rows.len();
    let queries = Matrix::new(&q[block.first * wide + at.q..], wide);
    for (key, column, len) in block.runs() {
        let k = Matrix::new(&kv[key * kv_wide + at.k..], kv_wide).t();
        let c = scores[column..(n - 1) * keys + column + len].as_mut_ptr();
        // SAFETY: the slice just taken reaches the last element written.
        unsafe { product(n, len, h.head_dim, c, keys, false, queries, k, h.scale) };
    }
}

vectorized! {
    /// Softmax over the first `seen` scores, zeros after them; returns their log-sum-exp.
    fn softmax(row: &mut [f32], seen: usize) -> f32 {
        let (row, unseen) = row.split_at_mut(seen);
        unseen.fill(0.0);
        let top = max(row);
        for x in row.iter_mut() {
            *x = exp(*x - top);
        }
        let total = sum(row.len(), |j| row[j]);
        let scale = 1.0 / total;
        for x in row.iter_mut() {
            *x *= scale;
        }
        top + total.ln()
    }
}

vectorized! {
    /// `p` holds scores and becomes probabilities; `ds` holds `do·vᵀ` and becomes the scores' gradient.
    fn softmax_backward(p: &mut [f32], ds: &mut [f32], seen: usize, lse: f32, do_: &[f32], o: &[f32]) {
        let through = sum(o.len(), |j| do_[j] * o[j]);
        p[seen..].fill(0.0);
        ds[seen..].fill(0.0);
        for (p, ds) in p[..seen].iter_mut().zip(&mut ds[..seen]) {
            *p = exp(*p - lse);
            *ds = *p * (*ds - through);
        }
    }
}

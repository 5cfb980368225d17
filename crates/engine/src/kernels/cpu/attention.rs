//! Causal attention within ranges, in blocks of queries. The scores of a block stay in a core's cache and are never
//! saved; the backward pass recomputes them from the log-sum-exp (Dao et al. 2022).
//!
//! Shapes: `q`, `o`, `dq`, `do` are `[queries, heads·head_dim]`; `kv`, `dkv` are
//! `[keys, 2·kv_heads·head_dim]` (keys, then values); `lse` is `[queries, heads]`.

use super::matmul::{Matrix, product};
use super::noise::drop_row;
use super::simd::{exp, max, sum, tanh, vectorized};
use super::{AttentionPlan, AttentionRange, Disjoint, Dropout, Heads, Scratch};
use rayon::prelude::*;
use std::ops::Range;

/// Queries per block: 128 rows of scores over 512 keys are 256 KiB, half an L2 cache with their gradient.
const BLOCK: usize = 128;

/// A block of queries of one range.
struct Block<'a> {
    range: &'a AttentionRange,
    /// First query row.
    first: usize,
    /// Key rows of the block's queries.
    rows: &'a [u32],
    /// The largest number of keys that a query sees.
    window: usize,
    /// The block's keys among those of its range, prefix then own: from the first key that its first query sees to the
    /// last key that its last query sees. The whole block is computed over them.
    seen: Range<usize>,
}

impl<'a> Block<'a> {
    fn of(plan: &'a AttentionPlan, range: &'a AttentionRange, first: usize, window: usize) -> Block<'a> {
        let rows = &plan.rows[first..range.queries.end.min(first + BLOCK)];
        debug_assert!(rows.is_sorted() && rows.iter().all(|r| range.own.contains(&(*r as usize))));
        let block = Block { range, first, rows, window, seen: 0..0 };
        let seen = block.of_query(0).start..block.of_query(rows.len() - 1).end;
        Block { seen, ..block }
    }

    /// The keys of the range that the block's query `i` sees.
    fn of_query(&self, i: usize) -> Range<usize> {
        let end = self.range.prefix.len() + self.rows[i] as usize + 1 - self.range.own.start;
        end.saturating_sub(self.window)..end
    }

    /// Keys over which the block is computed.
    fn keys(&self) -> usize {
        self.seen.len()
    }

    /// Which of these keys the block's query `i` sees.
    fn seen(&self, i: usize) -> Range<usize> {
        let seen = self.of_query(i);
        seen.start - self.seen.start..seen.end - self.seen.start
    }

    /// Applies dropout to the row of the block's query `i`: to its probabilities, or to their gradient.
    fn drop(&self, row: &mut [f32], i: usize, h: Heads, head: usize, dropout: Option<Dropout>) {
        let Some(dropout) = dropout else { return };
        let (seen, at) = (self.seen(i), self.rows[i] as u64 * h.heads as u64 + head as u64);
        drop_row(&mut row[seen.clone()], self.seen.start + seen.start, at, dropout);
    }

    /// The two runs of keys: `(first key row, its column in the scores, length)`.
    fn runs(&self) -> impl Iterator<Item = (usize, usize, usize)> {
        let (prefix, own) = (&self.range.prefix, self.range.own.start);
        let first = self.seen.start.min(prefix.len());
        let before = prefix.len() - first;
        let skipped = self.seen.start - first;
        let own_keys = self.seen.end - prefix.len() - skipped;
        [(prefix.start + first, 0, before), (own + skipped, before, own_keys)]
            .into_iter()
            .filter(|run| run.2 > 0)
    }
}

/// The blocks of a range, in order.
fn blocks<'a>(
    h: Heads,
    plan: &'a AttentionPlan,
    range: &'a AttentionRange,
) -> impl Iterator<Item = Block<'a>> {
    let window = h.window.unwrap_or(usize::MAX);
    range.queries.clone().step_by(BLOCK).map(move |first| Block::of(plan, range, first, window))
}

/// The size of the largest block of scores in the plan.
fn largest(plan: &AttentionPlan) -> usize {
    let block =
        |range: &AttentionRange| BLOCK.min(range.queries.len()) * (range.prefix.len() + range.own.len());
    plan.ranges.iter().map(block).max().unwrap_or(0)
}

/// `o` and `lse`: one task per range and head.
pub(super) fn forward(
    h: Heads,
    plan: &AttentionPlan,
    dropout: Option<Dropout>,
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
            for block in blocks(h, plan, range) {
                let (n, keys) = (block.rows.len(), block.keys());
                score(h, &block, &at, scores, q, kv);
                if let Some(softcap) = h.softcap {
                    cap(&mut scores[..n * keys], softcap);
                }
                for i in 0..n {
                    let row = &mut scores[i * keys..][..keys];
                    let sum = softmax(row, block.seen(i));
                    block.drop(row, i, h, head, dropout);
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

/// `dq` and `dkv`: one task per group of ranges and kv head, so that one worker owns a key's gradient and sums it in
/// the order of the queries.
pub(super) fn backward(
    h: Heads,
    plan: &AttentionPlan,
    dropout: Option<Dropout>,
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
                    for block in blocks(h, plan, range) {
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
                            let (p, ds) = (&mut p[i * keys..][..keys], &mut ds[i * keys..][..keys]);
                            block.drop(ds, i, h, head, dropout);
                            match h.softcap {
                                None => softmax_backward(p, ds, block.seen(i), lse, do_, o),
                                Some(cap) => capped_backward(p, ds, block.seen(i), lse, do_, o, cap),
                            }
                            block.drop(p, i, h, head, dropout);
                        }
                        for (run, (key, column, len)) in block.runs().enumerate() {
                            let (p, ds) = (Matrix::new(&p[column..], keys), Matrix::new(&ds[column..], keys));
                            let k = Matrix::new(&kv[key * kv_wide + at.k..], kv_wide);
                            debug_assert!(key + len <= key_rows);
                            let extent = (len - 1) * kv_wide + size;
                            // SAFETY: the group's keys and this kv head's columns belong to this task alone; so do
                            // these query rows' columns of this head.
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

/// The first columns of a query head's query, key and value.
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
    /// `x = cap · tanh(x / cap)`.
    fn cap(x: &mut [f32], cap: f32) {
        for x in x.iter_mut() {
            *x = cap * tanh(*x / cap);
        }
    }
}

vectorized! {
    /// Softmax over the scores of the `seen` keys, zeros elsewhere; returns their log-sum-exp.
    fn softmax(row: &mut [f32], seen: Range<usize>) -> f32 {
        row[seen.end..].fill(0.0);
        row[..seen.start].fill(0.0);
        let row = &mut row[seen];
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
    fn softmax_backward(
        p: &mut [f32], ds: &mut [f32], seen: Range<usize>, lse: f32, do_: &[f32], o: &[f32],
    ) {
        let through = sum(o.len(), |j| do_[j] * o[j]);
        clear_around(p, ds, &seen);
        for (p, ds) in p[seen.clone()].iter_mut().zip(&mut ds[seen]) {
            *p = exp(*p - lse);
            *ds = *p * (*ds - through);
        }
    }
}

vectorized! {
    /// As [`softmax_backward`] for scores that are capped first.
    fn capped_backward(
        p: &mut [f32], ds: &mut [f32], seen: Range<usize>, lse: f32, do_: &[f32], o: &[f32], cap: f32,
    ) {
        let through = sum(o.len(), |j| do_[j] * o[j]);
        clear_around(p, ds, &seen);
        for (p, ds) in p[seen.clone()].iter_mut().zip(&mut ds[seen]) {
            let t = tanh(*p / cap);
            *p = exp(cap * t - lse);
            *ds = *p * (*ds - through) * (1.0 - t * t);
        }
    }
}

/// Keys that a query does not see contribute nothing to its gradients.
#[inline(always)]
fn clear_around(p: &mut [f32], ds: &mut [f32], seen: &Range<usize>) {
    for row in [p, ds] {
        row[..seen.start].fill(0.0);
        row[seen.end..].fill(0.0);
    }
}

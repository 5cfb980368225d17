//! Operations over the columns of a matrix, for adapters that scale the outputs of a layer (DoRA).

use super::matmul::{Matrix, product};
use super::simd::{sum, vectorized};
use super::{ROWS, Scratch};
use rayon::prelude::*;

/// Columns per piece of [`dots`].
const COLUMNS: usize = 64;

/// See [`super::Backend::row_norms`]; `row(i, to)` is row `i` of the weights.
pub(super) fn row_norms(
    n: &mut [f32],
    row: impl Fn(usize, &mut [f32]) + Sync,
    (b, a, scale): (&[f32], &[f32], f32),
    inputs: usize,
    rank: usize,
    scratch: &Scratch,
) {
    assert!(b.len() == n.len() * rank && a.len() == rank * inputs);
    n.par_chunks_mut(ROWS).enumerate().for_each(|(piece, n)| {
        let first = piece * ROWS;
        scratch.with(n.len() * inputs, |w| {
            for (i, to) in w.chunks_mut(inputs).enumerate() {
                row(first + i, to);
            }
            let (b, a) = (Matrix::new(&b[first * rank..], rank), Matrix::new(a, inputs));
            // SAFETY: `w` has `n.len()` rows of `inputs` elements, and belongs to this task alone.
            unsafe { product(n.len(), inputs, rank, w.as_mut_ptr(), inputs, true, b, a, scale) };
            for (n, w) in n.iter_mut().zip(w.chunks(inputs)) {
                *n = length(w);
            }
        });
    });
}

vectorized! {
    fn length(x: &[f32]) -> f32 {
        sum(x.len(), |i| x[i] * x[i]).sqrt()
    }
}

/// See [`super::Backend::scale_columns`]; an empty slice means no bias.
pub(super) fn scale(
    y: &mut [f32],
    accumulate: bool,
    x: &[f32],
    (y_stride, x_stride): (usize, usize),
    factors: &[f32],
    bias: &[f32],
) {
    let work = y.par_chunks_mut(y_stride).zip(x.par_chunks(x_stride)).with_min_len(ROWS);
    work.for_each(|(y, x)| scale_row(y, accumulate, x, factors, bias));
}

vectorized! {
    fn scale_row(y: &mut [f32], accumulate: bool, x: &[f32], factors: &[f32], bias: &[f32]) {
        let width = factors.len();
        let (y, x) = (&mut y[..width], &x[..width]);
        for ((y, x), factor) in y.iter_mut().zip(x).zip(factors) {
            *y = if accumulate { *y } else { 0.0 } + factor * x;
        }
        for (y, bias) in y.iter_mut().zip(bias) {
            *y += bias;
        }
    }
}

/// See [`super::Backend::column_dots`]. Each thread takes a piece of columns, so every sum runs over the rows in order
/// on one thread.
pub(super) fn dots(
    out: &mut [f32],
    accumulate: bool,
    a: &[f32],
    b: &[f32],
    (a_stride, b_stride): (usize, usize),
    divisors: &[f32],
) {
    out.par_chunks_mut(COLUMNS).zip(divisors.par_chunks(COLUMNS)).enumerate().for_each(
        |(piece, (out, divisors))| {
            let mut sums = [0f32; COLUMNS];
            let sums = &mut sums[..out.len()];
            let from = piece * COLUMNS;
            for (a, b) in a.chunks(a_stride).zip(b.chunks(b_stride)) {
                add_products(sums, &a[from..], &b[from..]);
            }
            for ((out, sum), divisor) in out.iter_mut().zip(sums).zip(divisors) {
                *out = if accumulate { *out } else { 0.0 } + *sum / divisor;
            }
        },
    );
}

vectorized! {
    fn add_products(sums: &mut [f32], a: &[f32], b: &[f32]) {
        let width = sums.len();
        for ((sum, a), b) in sums.iter_mut().zip(&a[..width]).zip(&b[..width]) {
            *sum += a * b;
        }
    }
}

//! RMS and layer norm. Shapes: `x`, `y`, `dx`, `dy` are `[rows, width]`; `w`, `b`, `dw`, `db` are `[width]`;
//! `stats` is `[rows, norm.statistics()]`.

use super::simd::{sum, vectorized};
use super::{Norm, ROWS, Scratch};
use rayon::prelude::*;

/// The statistics of each row.
pub(super) fn statistics(norm: Norm, stats: &mut [f32], x: &[f32], width: usize) {
    let each = norm.statistics();
    stats.par_chunks_mut(each).zip(x.par_chunks(width)).with_min_len(ROWS).for_each(|(s, x)| match norm {
        Norm::Rms { eps } => s[0] = 1.0 / (sum_of_squares(x, 0.0) / width as f32 + eps).sqrt(),
        Norm::Layer { eps } => {
            s[0] = sum_of(x) / width as f32;
            s[1] = 1.0 / (sum_of_squares(x, s[0]) / width as f32 + eps).sqrt();
        }
    });
}

vectorized! {
    fn sum_of(x: &[f32]) -> f32 {
        sum(x.len(), |i| x[i])
    }
}

vectorized! {
    /// `Σ (x − mean)²`.
    fn sum_of_squares(x: &[f32], mean: f32) -> f32 {
        sum(x.len(), |i| (x[i] - mean) * (x[i] - mean))
    }
}

/// Mean (0 for RMS) and reciprocal deviation of a row.
fn centre_and_scale(norm: Norm, stats: &[f32]) -> (f32, f32) {
    match norm {
        Norm::Rms { .. } => (0.0, stats[0]),
        Norm::Layer { .. } => (stats[0], stats[1]),
    }
}

/// `y = (x − mean)·inv·w + b`.
pub(super) fn apply(norm: Norm, y: &mut [f32], stats: &[f32], x: &[f32], w: &[f32], b: &[f32]) {
    let rows = y.par_chunks_mut(w.len()).zip(x.par_chunks(w.len())).zip(stats.par_chunks(norm.statistics()));
    rows.with_min_len(ROWS).for_each(|((y, x), s)| {
        let (mean, inv) = centre_and_scale(norm, s);
        apply_row(y, x, w, b, mean, inv);
    });
}

vectorized! {
    fn apply_row(y: &mut [f32], x: &[f32], w: &[f32], b: &[f32], mean: f32, inv: f32) {
        for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
            *y = (x - mean) * inv * w;
        }
        for (y, b) in y.iter_mut().zip(b) {
            *y += b;
        }
    }
}

/// With `x̂ = (x − mean)·inv` and `g = dy·w`:
/// `dx += inv·(g − mean(g) − x̂·mean(g·x̂))` (RMS has no `mean(g)`), `dw += Σ_rows dy·x̂`, `db += Σ_rows dy`.
pub(super) fn backward(
    norm: Norm,
    dx: &mut [f32],
    dw: &mut [f32],
    db: &mut [f32],
    dy: &[f32],
    stats: &[f32],
    x: &[f32],
    w: &[f32],
    scratch: &Scratch,
) {
    let width = w.len();
    let piece = ROWS * width;
    // Weight gradients: one partial row per piece, summed in the order of the pieces.
    let pieces = x.len().div_ceil(piece);
    scratch.with(pieces * 2 * width, |partial| {
        let work = dx
            .par_chunks_mut(piece)
            .zip(dy.par_chunks(piece))
            .zip(x.par_chunks(piece))
            .zip(stats.par_chunks(ROWS * norm.statistics()))
            .zip(partial.par_chunks_mut(2 * width));
        work.for_each(|((((dx, dy), x), stats), partial)| {
            partial.fill(0.0);
            let (dw, db) = partial.split_at_mut(width);
            let rows = dx.chunks_mut(width).zip(dy.chunks(width)).zip(x.chunks(width));
            for (((dx, dy), x), s) in rows.zip(stats.chunks(norm.statistics())) {
                let (mean, inv) = centre_and_scale(norm, s);
                backward_row(dx, dw, db, dy, x, w, mean, inv, matches!(norm, Norm::Layer { .. }));
            }
        });
        for partial in partial.chunks(2 * width) {
            for (dw, p) in dw.iter_mut().zip(partial) {
                *dw += p;
            }
            for (db, p) in db.iter_mut().zip(&partial[width..]) {
                *db += p;
            }
        }
    });
}

vectorized! {
    fn backward_row(
        dx: &mut [f32], dw: &mut [f32], db: &mut [f32], dy: &[f32], x: &[f32], w: &[f32], mean: f32, inv: f32,
        centred: bool,
    ) {
        let width = w.len();
        // One length for all, so that the loops below need no bounds checks.
        let (dx, dw, db) = (&mut dx[..width], &mut dw[..width], &mut db[..width]);
        let (dy, x) = (&dy[..width], &x[..width]);
        let along = sum(width, |i| dy[i] * w[i] * (x[i] - mean)) * inv / width as f32;
        let level = if centred { sum(width, |i| dy[i] * w[i]) / width as f32 } else { 0.0 };
        for i in 0..width {
            let hat = (x[i] - mean) * inv;
            dx[i] += inv * (dy[i] * w[i] - level - hat * along);
            dw[i] += dy[i] * hat;
            db[i] += dy[i];
        }
    }
}

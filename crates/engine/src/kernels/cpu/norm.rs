//! RMS and layer norm of groups of columns. Shapes: `x`, `y`, `dx`, `dy` are `[rows, groups·width]`, with their own row
//! strides; `w`, `b`, `dw`, `db` are `[width]`; `stats` is `[rows, groups·norm.statistics()]`.

use super::simd::{sum, vectorized};
use super::{Norm, ROWS, Scratch, View};
use rayon::prelude::*;

/// How rows are cut into groups of columns that are normalised separately.
#[derive(Clone, Copy)]
pub(super) struct Groups {
    norm: Norm,
    /// Columns of a group.
    width: usize,
    /// Groups in a row.
    groups: usize,
    rows: usize,
    /// Distance between two rows of `x`.
    stride: usize,
}

impl Groups {
    /// Groups as wide as `w` in the rows of `x`.
    pub(super) fn of(norm: Norm, x: View, w: View) -> Groups {
        let width = w.len();
        Groups { norm, width, groups: x.width() / width, rows: x.rows(), stride: x.stride() }
    }

    /// Number of columns of a row.
    fn row(self) -> usize {
        self.groups * self.width
    }

    /// Number of statistics of a row.
    fn statistics(self) -> usize {
        self.groups * self.norm.statistics()
    }
}

/// The statistics of each group.
pub(super) fn statistics(g: Groups, stats: &mut [f32], x: &[f32]) {
    let (each, width) = (g.norm.statistics(), g.width);
    let rows = stats.par_chunks_mut(g.statistics()).zip(x.par_chunks(g.stride)).with_min_len(ROWS);
    rows.for_each(|(stats, x)| {
        for (s, x) in stats.chunks_exact_mut(each).zip(x[..g.row()].chunks_exact(width)) {
            match g.norm {
                Norm::Rms { eps, .. } => s[0] = 1.0 / (sum_of_squares(x, 0.0) / width as f32 + eps).sqrt(),
                Norm::Layer { eps } => {
                    s[0] = sum_of(x) / width as f32;
                    s[1] = 1.0 / (sum_of_squares(x, s[0]) / width as f32 + eps).sqrt();
                }
            }
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

/// `y = (x − mean)·inv·(w + offset) + b`; rows of `y` are `y_stride` apart.
pub(super) fn apply(
    g: Groups,
    y: &mut [f32],
    y_stride: usize,
    stats: &[f32],
    x: &[f32],
    w: &[f32],
    b: &[f32],
) {
    let rows = y.par_chunks_mut(y_stride).zip(x.par_chunks(g.stride)).zip(stats.par_chunks(g.statistics()));
    rows.with_min_len(ROWS).for_each(|((y, x), stats)| {
        let runs = y[..g.row()].chunks_exact_mut(g.width).zip(x[..g.row()].chunks_exact(g.width));
        for ((y, x), s) in runs.zip(stats.chunks_exact(g.norm.statistics())) {
            let (mean, inv) = centre_and_scale(g.norm, s);
            apply_row(y, x, w, b, mean, inv, g.norm.offset());
        }
    });
}

vectorized! {
    fn apply_row(y: &mut [f32], x: &[f32], w: &[f32], b: &[f32], mean: f32, inv: f32, offset: f32) {
        for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
            *y = (x - mean) * inv * (w + offset);
        }
        for (y, b) in y.iter_mut().zip(b) {
            *y += b;
        }
    }
}

/// With `x̂ = (x − mean)·inv` and `g = dy·(w + offset)`: `dx += inv·(g − mean(g) − x̂·mean(g·x̂))` (RMS has no
/// `mean(g)`), `dw += Σ_rows dy·x̂`, `db += Σ_rows dy`; an empty `dw` or `db` is skipped. Rows of `dx` and `dy` are
/// `strides` apart.
pub(super) fn backward(
    g: Groups,
    dx: &mut [f32],
    dw: &mut [f32],
    db: &mut [f32],
    dy: &[f32],
    strides: (usize, usize),
    stats: &[f32],
    x: &[f32],
    w: &[f32],
    scratch: &Scratch,
) {
    let (width, row) = (g.width, g.row());
    // Weight gradients: one partial row per piece, summed in the order of the pieces.
    let pieces = g.rows.div_ceil(ROWS);
    scratch.with(pieces * 2 * width, |partial| {
        let work = dx
            .par_chunks_mut(ROWS * strides.0)
            .zip(dy.par_chunks(ROWS * strides.1))
            .zip(x.par_chunks(ROWS * g.stride))
            .zip(stats.par_chunks(ROWS * g.statistics()))
            .zip(partial.par_chunks_mut(2 * width));
        work.for_each(|((((dx, dy), x), stats), partial)| {
            partial.fill(0.0);
            let (dw, db) = partial.split_at_mut(width);
            let rows = dx.chunks_mut(strides.0).zip(dy.chunks(strides.1)).zip(x.chunks(g.stride));
            for (((dx, dy), x), stats) in rows.zip(stats.chunks(g.statistics())) {
                let runs = dx[..row].chunks_exact_mut(width).zip(dy[..row].chunks_exact(width));
                let runs = runs.zip(x[..row].chunks_exact(width));
                for (((dx, dy), x), s) in runs.zip(stats.chunks_exact(g.norm.statistics())) {
                    let (mean, inv) = centre_and_scale(g.norm, s);
                    let centred = matches!(g.norm, Norm::Layer { .. });
                    backward_row(dx, dw, db, dy, x, w, mean, inv, g.norm.offset(), centred);
                }
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
        offset: f32, centred: bool,
    ) {
        let width = w.len();
        // Equal lengths, so that the loops below need no bounds checks.
        let (dx, dw, db) = (&mut dx[..width], &mut dw[..width], &mut db[..width]);
        let (dy, x) = (&dy[..width], &x[..width]);
        let along = sum(width, |i| dy[i] * (w[i] + offset) * (x[i] - mean)) * inv / width as f32;
        let level = if centred { sum(width, |i| dy[i] * w[i]) / width as f32 } else { 0.0 };
        for i in 0..width {
            let hat = (x[i] - mean) * inv;
            dx[i] += inv * (dy[i] * (w[i] + offset) - level - hat * along);
            dw[i] += dy[i] * hat;
            db[i] += dy[i];
        }
    }
}

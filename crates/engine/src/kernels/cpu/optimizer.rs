//! Optimizers, and the norm that clipping needs.

use super::super::quantised::{self, BLOCK};
use super::simd::{sum, vectorized};
use super::{Adafactor, AdamW, AdamWScalars, PIECE, ROWS, Sgd};
use rayon::prelude::*;

/// `Σ x²`: in f64 lanes within a piece, then in the order of the pieces.
pub(super) fn sum_squares(x: &[f32]) -> f64 {
    let pieces: Vec<f64> = x.par_chunks(PIECE).map(piece_of_squares).collect();
    pieces.iter().sum()
}

vectorized! {
    fn piece_of_squares(x: &[f32]) -> f64 {
        // 16 f64 lanes: exact enough for any size, and vectorised.
        let mut lanes = [0f64; 16];
        let chunks = x.chunks_exact(16);
        let rest: f64 = chunks.remainder().iter().map(|&x| x as f64 * x as f64).sum();
        for chunk in chunks {
            for (lane, &x) in lanes.iter_mut().zip(chunk) {
                *lane += x as f64 * x as f64;
            }
        }
        lanes.iter().sum::<f64>() + rest
    }
}

/// One step; see [`AdamW`].
pub(super) fn adamw(s: AdamW, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
    assert!(p.len() == g.len() && p.len() == m.len() && p.len() == v.len());
    let scalars = s.scalars();
    let pieces = p.par_chunks_mut(PIECE).zip(g.par_chunks(PIECE));
    pieces.zip(m.par_chunks_mut(PIECE)).zip(v.par_chunks_mut(PIECE)).for_each(|(((p, g), m), v)| {
        adamw_piece(p, g, m, v, scalars);
    });
}

vectorized! {
    fn adamw_piece(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], s: AdamWScalars) {
        for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            let g = g * s.scale;
            *m += s.lerp1 * (g - *m);
            *v = s.beta2 * *v + s.lerp2 * g * g;
            *p = *p * s.keep - s.rate * (*m / (v.sqrt() / s.root2 + s.eps));
        }
    }
}

/// Codes and scales of one moment.
type Moment<'a> = (&'a mut [u8], &'a mut [f32]);

/// See [`super::Backend::adamw_8bit`]; each block of codes is one task.
pub(super) fn adamw_8bit(s: AdamW, p: &mut [f32], g: &[f32], m: Moment, v: Moment) {
    let scalars = s.scalars();
    let blocks = p.par_chunks_mut(BLOCK).zip(g.par_chunks(BLOCK));
    let m = m.0.par_chunks_mut(BLOCK).zip(m.1);
    let v = v.0.par_chunks_mut(BLOCK).zip(v.1);
    blocks.zip(m).zip(v).with_min_len(ROWS).for_each(|(((p, g), m), v)| adamw_block(p, g, m, v, scalars));
}

/// One block: only here do its moments exist in f32.
fn adamw_block(
    p: &mut [f32],
    g: &[f32],
    m: (&mut [u8], &mut f32),
    v: (&mut [u8], &mut f32),
    s: AdamWScalars,
) {
    let (signed, unsigned) = (quantised::values(true), quantised::values(false));
    let ((m_codes, m_scale), (v_codes, v_scale)) = (m, v);
    let (mut first, mut second) = ([0f32; BLOCK], [0f32; BLOCK]);
    let n = p.len();
    for i in 0..n {
        let g = g[i] * s.scale;
        first[i] = s.beta1 * (signed[m_codes[i] as usize] * *m_scale) + s.lerp1 * g;
        second[i] = s.beta2 * (unsigned[v_codes[i] as usize] * *v_scale) + s.lerp2 * g * g;
        p[i] = p[i] * s.keep - s.rate * (first[i] / (second[i].sqrt() / s.root2 + s.eps));
    }
    quantised::store(signed, &first[..n], m_codes, m_scale);
    quantised::store(unsigned, &second[..n], v_codes, v_scale);
}

/// See [`super::Backend::adafactor`]. Column sums are computed over [`ROWS`] rows at a time and combined in order.
pub(super) fn adafactor_matrix(
    s: Adafactor,
    p: &mut [f32],
    g: &[f32],
    rows: &mut [f32],
    columns: &mut [f32],
    width: usize,
) {
    let (beta2, eps, scale) = (s.beta2() as f32, Adafactor::EPS as f32, s.gradient_scale);
    let piece = ROWS * width;
    let sums: Vec<Vec<f32>> = g
        .par_chunks(piece)
        .zip(rows.par_chunks_mut(ROWS))
        .map(|(g, rows)| {
            let mut sums = vec![0f32; width];
            for (g, row) in g.chunks(width).zip(rows) {
                let mean = row_of_squares(g, scale, eps, &mut sums) / width as f32;
                *row = beta2 * *row + (1.0 - beta2) * mean;
            }
            sums
        })
        .collect();
    let height = rows.len() as f32;
    for (j, column) in columns.iter_mut().enumerate() {
        let mean = sums.iter().map(|sums| sums[j]).sum::<f32>() / height;
        *column = beta2 * *column + (1.0 - beta2) * mean;
    }
    let mean = (rows.iter().map(|row| f64::from(*row)).sum::<f64>() / rows.len() as f64) as f32;
    let columns: Vec<f32> = columns.iter().map(|column| 1.0 / column.sqrt()).collect();
    let squares: Vec<f64> = g
        .par_chunks(piece)
        .zip(rows.par_chunks(ROWS))
        .map(|(g, rows)| {
            let each = g.chunks(width).zip(rows);
            each.map(|(g, row)| f64::from(scaled_squares(g, &columns, scale / (row / mean).sqrt()))).sum()
        })
        .collect();
    let (keep, rate) = clipped(s, &squares, p.len());
    let pieces = p.par_chunks_mut(piece).zip(g.par_chunks(piece)).zip(rows.par_chunks(ROWS));
    pieces.for_each(|((p, g), rows)| {
        for ((p, g), row) in p.chunks_mut(width).zip(g.chunks(width)).zip(rows) {
            descend(p, g, &columns, keep, rate * scale / (row / mean).sqrt());
        }
    });
}

/// See [`super::Backend::adafactor`].
pub(super) fn adafactor_vector(s: Adafactor, p: &mut [f32], g: &[f32], v: &mut [f32]) {
    let (beta2, eps, scale) = (s.beta2() as f32, Adafactor::EPS as f32, s.gradient_scale);
    for (v, g) in v.iter_mut().zip(g) {
        let g = g * scale;
        *v = beta2 * *v + (1.0 - beta2) * (g * g + eps);
    }
    let roots: Vec<f32> = v.iter().map(|v| 1.0 / v.sqrt()).collect();
    let squares = f64::from(scaled_squares(g, &roots, scale));
    let (keep, rate) = clipped(s, &[squares], p.len());
    descend(p, g, &roots, keep, rate * scale);
}

/// The factor on the parameter (weight decay) and the factor on its update: the learning rate, reduced if the root mean
/// square of the update is above 1.
fn clipped(s: Adafactor, squares: &[f64], count: usize) -> (f32, f32) {
    let rms = (squares.iter().sum::<f64>() / count as f64).sqrt();
    ((1.0 - s.weight_decay * s.lr) as f32, (s.lr / rms.max(1.0)) as f32)
}

vectorized! {
    /// Adds the squares of a row to the column sums, and returns their total.
    fn row_of_squares(g: &[f32], scale: f32, eps: f32, sums: &mut [f32]) -> f32 {
        for (sum, g) in sums.iter_mut().zip(g) {
            let g = g * scale;
            *sum += g * g + eps;
        }
        sum(g.len(), |j| g[j] * scale * (g[j] * scale) + eps)
    }
}

vectorized! {
    /// `Σ (factor · g · columns)²`.
    fn scaled_squares(g: &[f32], columns: &[f32], factor: f32) -> f32 {
        sum(g.len(), |j| {
            let u = factor * g[j] * columns[j];
            u * u
        })
    }
}

vectorized! {
    /// `p = keep · p − rate · g · columns`.
    fn descend(p: &mut [f32], g: &[f32], columns: &[f32], keep: f32, rate: f32) {
        for ((p, g), column) in p.iter_mut().zip(g).zip(columns) {
            *p = *p * keep - rate * g * column;
        }
    }
}

/// See [`super::Backend::sgd`].
pub(super) fn sgd(s: Sgd, p: &mut [f32], g: &[f32], m: Option<&mut [f32]>) {
    let (rate, momentum, decay) = (s.lr as f32, s.momentum as f32, s.weight_decay as f32);
    let pieces = p.par_chunks_mut(PIECE).zip(g.par_chunks(PIECE));
    match m {
        None => pieces.for_each(|(p, g)| sgd_piece(p, g, &mut [], s.gradient_scale, rate, momentum, decay)),
        Some(m) => pieces
            .zip(m.par_chunks_mut(PIECE))
            .for_each(|((p, g), m)| sgd_piece(p, g, m, s.gradient_scale, rate, momentum, decay)),
    }
}

vectorized! {
    fn sgd_piece(p: &mut [f32], g: &[f32], m: &mut [f32], scale: f32, rate: f32, momentum: f32, decay: f32) {
        if m.is_empty() {
            for (p, g) in p.iter_mut().zip(g) {
                *p -= rate * (g * scale + decay * *p);
            }
        } else {
            for ((p, g), m) in p.iter_mut().zip(g).zip(m) {
                *m = momentum * *m + (g * scale + decay * *p);
                *p -= rate * *m;
            }
        }
    }
}

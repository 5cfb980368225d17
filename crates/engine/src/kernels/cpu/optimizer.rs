//! AdamW, and the norm that clipping needs.

use super::simd::vectorized;
use super::{AdamW, PIECE};
use rayon::prelude::*;

/// `Σ x²`: in f64 lanes within a piece, then in the order of the pieces.
pub(super) fn sum_squares(x: &[f32]) -> f64 {
    let pieces: Vec<f64> = x.par_chunks(PIECE).map(piece_of_squares).collect();
    pieces.iter().sum()
}

vectorized! {
    fn piece_of_squares(x: &[f32]) -> f64 {
        // 16 f64 lanes: exact enough for any size, and still vectorised.
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
    // The scalars are f64 until here, as PyTorch's are, and meet the f32 tensors rounded once.
    let correction1 = 1.0 - s.beta1.powi(s.t as i32);
    let correction2 = 1.0 - s.beta2.powi(s.t as i32);
    let scalars = Scalars {
        keep: (1.0 - s.lr * s.weight_decay) as f32,
        lerp1: (1.0 - s.beta1) as f32,
        beta2: s.beta2 as f32,
        lerp2: (1.0 - s.beta2) as f32,
        root2: correction2.sqrt() as f32,
        eps: s.eps as f32,
        rate: (s.lr / correction1) as f32,
        scale: s.gradient_scale,
    };
    let pieces = p.par_chunks_mut(PIECE).zip(g.par_chunks(PIECE));
    pieces.zip(m.par_chunks_mut(PIECE)).zip(v.par_chunks_mut(PIECE)).for_each(|(((p, g), m), v)| {
        adamw_piece(p, g, m, v, scalars);
    });
}

#[derive(Clone, Copy)]
struct Scalars {
    keep: f32,
    lerp1: f32,
    beta2: f32,
    lerp2: f32,
    root2: f32,
    eps: f32,
    rate: f32,
    scale: f32,
}

vectorized! {
    fn adamw_piece(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], s: Scalars) {
        for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            let g = g * s.scale;
            *m += s.lerp1 * (g - *m);
            *v = s.beta2 * *v + s.lerp2 * g * g;
            *p = *p * s.keep - s.rate * (*m / (v.sqrt() / s.root2 + s.eps));
        }
    }
}

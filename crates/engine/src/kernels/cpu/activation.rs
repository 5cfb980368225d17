//! The functions between the two matrices of the MLP. Shapes: `a`, `da` are `[rows, width]`; `up`, `dup` are
//! `[rows, gate_width·width]`.

use super::simd::{erf, exp, sigmoid, tanh, vectorized};
use super::{Activation, ROWS};
use rayon::prelude::*;

/// √(2/π), of the tanh approximation of GELU.
const GELU_C: f32 = 0.797_884_6;

/// `a = f(up)`.
pub(super) fn forward(f: Activation, a: &mut [f32], up: &[f32], width: usize) {
    let rows = a.par_chunks_mut(width).zip(up.par_chunks(f.gate_width() * width)).with_min_len(ROWS);
    rows.for_each(|(a, up)| match f {
        Activation::SwiGlu => swiglu(a, &up[..width], &up[width..]),
        Activation::GeGluTanh => geglu(a, &up[..width], &up[width..]),
        Activation::GeluTanh => gelu_tanh(a, up),
        Activation::Gelu => gelu(a, up),
    });
}

/// `dup = da · f'(up)`.
pub(super) fn backward(f: Activation, dup: &mut [f32], da: &[f32], up: &[f32], width: usize) {
    let wide = f.gate_width() * width;
    let rows = dup.par_chunks_mut(wide).zip(da.par_chunks(width)).zip(up.par_chunks(wide)).with_min_len(ROWS);
    rows.for_each(|((dup, da), up)| match f {
        Activation::SwiGlu => {
            let (dgate, dup) = dup.split_at_mut(width);
            swiglu_backward(dgate, dup, da, &up[..width], &up[width..]);
        }
        Activation::GeGluTanh => {
            let (dgate, dup) = dup.split_at_mut(width);
            geglu_backward(dgate, dup, da, &up[..width], &up[width..]);
        }
        Activation::GeluTanh => gelu_tanh_backward(dup, da, up),
        Activation::Gelu => gelu_backward(dup, da, up),
    });
}

vectorized! {
    fn swiglu(a: &mut [f32], gate: &[f32], up: &[f32]) {
        for ((a, &gate), &up) in a.iter_mut().zip(gate).zip(up) {
            *a = gate * sigmoid(gate) * up;
        }
    }
}

vectorized! {
    fn swiglu_backward(dgate: &mut [f32], dup: &mut [f32], da: &[f32], gate: &[f32], up: &[f32]) {
        for ((((dgate, dup), &da), &gate), &up) in dgate.iter_mut().zip(dup).zip(da).zip(gate).zip(up) {
            let s = sigmoid(gate);
            let silu = gate * s;
            *dup = da * silu;
            *dgate = da * up * (s + silu * (1.0 - s));
        }
    }
}

vectorized! {
    fn geglu(a: &mut [f32], gate: &[f32], up: &[f32]) {
        for ((a, &x), &up) in a.iter_mut().zip(gate).zip(up) {
            *a = 0.5 * x * (1.0 + inner_tanh(x)) * up;
        }
    }
}

vectorized! {
    fn geglu_backward(dgate: &mut [f32], dup: &mut [f32], da: &[f32], gate: &[f32], up: &[f32]) {
        for ((((dgate, dup), &da), &x), &up) in dgate.iter_mut().zip(dup).zip(da).zip(gate).zip(up) {
            let t = inner_tanh(x);
            *dup = da * 0.5 * x * (1.0 + t);
            *dgate = da * up * gelu_tanh_slope(x, t);
        }
    }
}

vectorized! {
    fn gelu_tanh(a: &mut [f32], up: &[f32]) {
        for (a, &x) in a.iter_mut().zip(up) {
            *a = 0.5 * x * (1.0 + inner_tanh(x));
        }
    }
}

vectorized! {
    fn gelu_tanh_backward(dup: &mut [f32], da: &[f32], up: &[f32]) {
        for ((dup, &da), &x) in dup.iter_mut().zip(da).zip(up) {
            *dup = da * gelu_tanh_slope(x, inner_tanh(x));
        }
    }
}

/// The hyperbolic tangent inside `gelu_new`.
#[inline(always)]
fn inner_tanh(x: f32) -> f32 {
    tanh(GELU_C * (x + 0.044715 * x * x * x))
}

/// The derivative of `gelu_new`, given its [`inner_tanh`].
#[inline(always)]
fn gelu_tanh_slope(x: f32, t: f32) -> f32 {
    0.5 * (1.0 + t + x * (1.0 - t * t) * GELU_C * (1.0 + 3.0 * 0.044715 * x * x))
}

vectorized! {
    fn gelu(a: &mut [f32], up: &[f32]) {
        for (a, &x) in a.iter_mut().zip(up) {
            *a = 0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2));
        }
    }
}

vectorized! {
    /// `Φ(x) + x·φ(x)`.
    fn gelu_backward(dup: &mut [f32], da: &[f32], up: &[f32]) {
        /// 1/√(2π).
        const DENSITY: f32 = 0.398_942_3;
        for ((dup, &da), &x) in dup.iter_mut().zip(da).zip(up) {
            let cdf = 0.5 * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2));
            *dup = da * (cdf + x * DENSITY * exp(-0.5 * x * x));
        }
    }
}

//! Scalar functions, each with its derivative; and dropout.

use crate::kernels::{Activation, Dropout};

const GELU_C: f64 = 0.797_884_560_802_865_4; // sqrt(2/pi)

/// The factor by which dropout multiplies an element.
pub(super) fn factor(dropout: Option<Dropout>, row: usize, column: usize) -> f64 {
    dropout.map_or(1.0, |dropout| f64::from(dropout.factor(dropout.draw.word(row as u64, column))))
}

/// `cap · tanh(x / cap)`, and its derivative.
pub(super) fn capped(x: f64, cap: Option<f32>) -> (f64, f64) {
    let Some(cap) = cap.map(f64::from) else { return (x, 1.0) };
    let t = (x / cap).tanh();
    (cap * t, 1.0 - t * t)
}

/// `gelu_new(x)`, and its derivative.
fn gelu_tanh(x: f64) -> (f64, f64) {
    let t = (GELU_C * (x + 0.044715 * x * x * x)).tanh();
    let slope = GELU_C * (1.0 + 3.0 * 0.044715 * x * x);
    (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope)
}

/// `x·Φ(x)`, and its derivative `Φ(x) + x·φ(x)`.
fn gelu(x: f64) -> (f64, f64) {
    let cdf = 0.5 * (1.0 + erf(x / std::f64::consts::SQRT_2));
    (x * cdf, cdf + x * (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt())
}

/// The error function, by the series `2/√π · e^(−x²) · Σ 2ⁿ·x^(2n+1) / (1·3·…·(2n+1))`, whose terms have one sign.
fn erf(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.signum();
    }
    let (mut term, mut total, mut n) = (x, 0.0, 0.0);
    while total + term != total {
        total += term;
        n += 1.0;
        term *= 2.0 * x * x / (2.0 * n + 1.0);
    }
    2.0 / std::f64::consts::PI.sqrt() * (-x * x).exp() * total
}

/// The activation of a gate, and its derivative.
pub(super) fn gate(f: Activation, x: f64) -> (f64, f64) {
    match f {
        Activation::SwiGlu => {
            let s = 1.0 / (1.0 + (-x).exp());
            (x * s, s + x * s * (1.0 - s))
        }
        Activation::GeGluTanh | Activation::GeluTanh => gelu_tanh(x),
        Activation::Gelu => gelu(x),
    }
}

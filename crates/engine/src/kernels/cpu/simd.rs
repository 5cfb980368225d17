//! Vector code without intrinsics: loops that the compiler vectorises, compiled once per instruction set.

/// Instruction sets for which the element-wise loops are compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Level {
    /// AVX-512 (F, VL, BW, DQ) with FMA.
    #[cfg(target_arch = "x86_64")]
    V4,
    /// AVX2 with FMA.
    #[cfg(target_arch = "x86_64")]
    V3,
    /// The target's baseline (SSE2, NEON).
    Base,
}

/// The best level of this machine. Detection is cached by the standard library.
pub(super) fn level() -> Level {
    #[cfg(target_arch = "x86_64")]
    {
        if cfg!(feature = "avx512")
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
        {
            return Level::V4;
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            return Level::V3;
        }
    }
    Level::Base
}

/// Defines a function whose body is compiled for each [`Level`] and dispatched at the call.
///
/// The body is ordinary safe Rust. It must be a loop worth a dispatch: over a row or a chunk, not a single element.
macro_rules! vectorized {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
                fn v4($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
                #[target_feature(enable = "avx2,fma")]
                fn v3($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
                match $crate::kernels::cpu::simd::level() {
                    // SAFETY: `level` has detected every feature for which `v4` is compiled.
                    $crate::kernels::cpu::simd::Level::V4 => unsafe { v4($($arg),*) },
                    // SAFETY: `level` has detected every feature for which `v3` is compiled.
                    $crate::kernels::cpu::simd::Level::V3 => unsafe { v3($($arg),*) },
                    $crate::kernels::cpu::simd::Level::Base => body($($arg),*),
                }
            }
            #[cfg(not(target_arch = "x86_64"))]
            body($($arg),*)
        }
    };
}
pub(super) use vectorized;

/// Independent partial sums: enough to fill the vector units, added in a fixed order.
const LANES: usize = 32;

/// `Σ f(i)` for `i < n`, in an order that depends only on `n`.
#[inline(always)]
pub(super) fn sum(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let whole = n / LANES * LANES;
    for i in (0..whole).step_by(LANES) {
        for (j, lane) in lanes.iter_mut().enumerate() {
            *lane += f(i + j);
        }
    }
    let mut total = fold(lanes);
    for i in whole..n {
        total += f(i);
    }
    total
}

/// `(Σ f(x).0, Σ f(x).1)` over elements that `f` may change, each in the order of [`sum`]. It iterates over the
/// elements because with two sums the bounds checks of an index keep the loop from being vectorised.
#[inline(always)]
pub(super) fn sums(x: &mut [f32], f: impl Fn(&mut f32) -> (f32, f32)) -> (f32, f32) {
    let (mut first, mut second) = ([0f32; LANES], [0f32; LANES]);
    let (chunks, rest) = x.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for ((x, first), second) in chunk.iter_mut().zip(&mut first).zip(&mut second) {
            let (a, b) = f(x);
            *first += a;
            *second += b;
        }
    }
    let (mut a, mut b) = (fold(first), fold(second));
    for x in rest {
        let more = f(x);
        a += more.0;
        b += more.1;
    }
    (a, b)
}

/// Sums the lanes pairwise.
#[inline(always)]
fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for j in 0..width {
            lanes[j] += lanes[j + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// The largest element; NaNs are ignored (later sums propagate them).
#[inline(always)]
pub(super) fn max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &v) in lanes.iter_mut().zip(chunk) {
            *lane = if v > *lane { v } else { *lane };
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |m, &v| if v > m { v } else { m })
}

/// `e^x` to about 1 ulp (Cephes' polynomial after Cody–Waite reduction), saturating outside ±87; NaN stays
/// NaN.
///
/// Written so that it vectorises: no branch, no libm call, and no fused multiply-add, which would be a function call on
/// a machine without FMA.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    const ROUND: f32 = 12_582_912.0; // 1.5·2²³: adding it leaves round(x) in the low bits
    let t = x * std::f32::consts::LOG2_E + ROUND;
    let n = t - ROUND;
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4f32;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_65, 0.5] {
        p = p * r + c;
    }
    let p = p * (r * r) + r + 1.0;
    p * f32::from_bits((t.to_bits() << 23).wrapping_add(0x3f80_0000))
}

/// The logistic function.
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The hyperbolic tangent, to about 1e-7 absolute.
#[inline(always)]
pub(super) fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (exp(2.0 * x) + 1.0)
}

/// The error function, to about 4e-7 absolute (a quotient of polynomials as in Eigen), saturating outside ±4; NaN
/// stays NaN.
#[inline(always)]
pub(super) fn erf(x: f32) -> f32 {
    let x = if x < -4.0 { -4.0 } else { x };
    let x = if x > 4.0 { 4.0 } else { x };
    let square = x * x;
    let mut p = -2.726_142_3e-10f32;
    for c in [2.770_681_4e-8, -2.101_024e-6, -5.692_506_5e-5, -7.349_906_3e-4, -2.954_6e-3, -1.609_603e-2] {
        p = p * square + c;
    }
    let mut q = -1.456_607_2e-5f32;
    for c in [-2.133_740_6e-4, -1.682_827e-3, -7.373_329_2e-3, -1.426_474e-2] {
        q = q * square + c;
    }
    x * p / q
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erf_agrees_with_its_series_and_keeps_nan() {
        // 2/√π · e^(−x²) · Σ 2ⁿ·x^(2n+1) / (1·3·…·(2n+1)), in f64.
        let series = |x: f64| {
            let (mut term, mut total) = (x, 0.0);
            for n in 1..200 {
                total += term;
                term *= 2.0 * x * x / (2 * n + 1) as f64;
            }
            2.0 / std::f64::consts::PI.sqrt() * (-x * x).exp() * total
        };
        let mut worst = 0f64;
        for i in -6_000..=6_000 {
            let x = i as f32 * 1e-3;
            worst = worst.max((erf(x) as f64 - series(x as f64)).abs());
        }
        assert!(worst < 4e-7, "absolute error {worst:e}");
        assert!(erf(f32::NAN).is_nan());
    }

    #[test]
    fn exp_agrees_with_libm_and_keeps_nan() {
        let mut worst = 0f64;
        for i in -86_999..88_000 {
            let x = i as f32 * 1e-3;
            worst = worst.max(((exp(x) as f64) / (x as f64).exp() - 1.0).abs());
        }
        assert!(worst < 2.5e-7, "relative error {worst:e}");
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(f32::NEG_INFINITY) < 2e-38);
    }

    #[test]
    fn sums_and_maxima_of_odd_lengths() {
        for n in [0, 1, 31, 32, 33, 100] {
            assert_eq!(sum(n, |i| i as f32), (0..n).sum::<usize>() as f32);
            let mut x: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let pairs = sums(&mut x, |x| {
                let i = std::mem::take(x);
                (i.sin(), i)
            });
            assert_eq!(pairs, (sum(n, |i| (i as f32).sin()), sum(n, |i| i as f32)));
            assert!(x.iter().all(|x| *x == 0.0));
            let x: Vec<f32> = (0..n).map(|i| ((i * 37) % 101) as f32).collect();
            assert_eq!(max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
    }
}

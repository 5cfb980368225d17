//! Optimizer states of one byte per element (Dettmers et al. 2022), in the format of bitsandbytes.
//!
//! A block of [`BLOCK`] elements is divided by its largest magnitude, and each element becomes the nearest of 256
//! values whose spacing grows with their magnitude (`create_dynamic_map`).

use std::sync::OnceLock;

/// Elements that share a scale.
pub const BLOCK: usize = 256;

/// The values of the codes, ascending: `signed` for first moments, unsigned for second moments.
pub(super) fn values(signed: bool) -> &'static [f32; 256] {
    static MAPS: [OnceLock<[f32; 256]>; 2] = [const { OnceLock::new() }; 2];
    MAPS[usize::from(signed)].get_or_init(|| dynamic_map(signed))
}

/// bitsandbytes' `create_dynamic_map(signed)`: for each of seven powers of ten, the midpoints of intervals of [0.1, 1],
/// twice as many as for the power before; and 0 and 1. In f32, in torch's order.
fn dynamic_map(signed: bool) -> [f32; 256] {
    let mut all = vec![0.0f32, 1.0];
    for i in 0..7 {
        let intervals = if signed { 1usize << i } else { 2 << i };
        let step = (1.0f32 - 0.1) / intervals as f32;
        // torch.linspace counts from the nearer end, and rounds once.
        let boundary = |n: usize| match n < intervals.div_ceil(2) {
            true => step.mul_add(n as f32, 0.1),
            false => (-step).mul_add((intervals - n) as f32, 1.0),
        };
        let power = 10f64.powi(i - 6) as f32;
        for n in 0..intervals {
            let value = power * ((boundary(n) + boundary(n + 1)) / 2.0);
            all.push(value);
            if signed {
                all.push(-value);
            }
        }
    }
    all.sort_by(f32::total_cmp);
    std::array::from_fn(|i| all[i])
}

/// The code of the value nearest to `x`; of two equally near, the lower.
#[inline]
pub(super) fn code(values: &[f32; 256], x: f32) -> u8 {
    let above = values.partition_point(|value| *value < x).min(255);
    let below = above.saturating_sub(1);
    if (x - values[below]).abs() <= (values[above] - x).abs() { below as u8 } else { above as u8 }
}

/// Replaces the codes and the scale of a block by those of `x`.
pub(super) fn store(values: &[f32; 256], x: &[f32], codes: &mut [u8], scale: &mut f32) {
    let largest = x.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    *scale = if largest == 0.0 { 1.0 } else { largest };
    for (code_of, x) in codes.iter_mut().zip(x) {
        *code_of = code(values, *x / *scale);
    }
}

//! Held-out rows.

use crate::Sample;

/// Divides samples into training and held-out ones, each in their order.
///
/// Exactly `round(fraction · n)` are held out, at least one and at most all but one where 0 < fraction < 1 and
/// there are two or more. Which ones depends on the seed and each sample's row index alone, not on the order or
/// content of the others' text, so a longer source keeps most of a shorter one's division.
pub fn split(samples: Vec<Sample>, fraction: f64, seed: u64) -> (Vec<Sample>, Vec<Sample>) {
    let n = samples.len();
    let mut count = (fraction.clamp(0.0, 1.0) * n as f64).round() as usize;
    if fraction > 0.0 && fraction < 1.0 && n > 1 {
        count = count.clamp(1, n - 1);
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by_cached_key(|&i| (mix(seed ^ mix(samples[i].id.row)), samples[i].id.row, i));
    let mut held = vec![false; n];
    for &i in &order[..count] {
        held[i] = true;
    }
    let (mut train, mut test) = (Vec::with_capacity(n - count), Vec::with_capacity(count));
    for (sample, held) in samples.into_iter().zip(held) {
        if held { test.push(sample) } else { train.push(sample) }
    }
    (train, test)
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection that scatters consecutive numbers.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

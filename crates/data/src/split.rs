//! Training rows and held-out rows.

use crate::Sample;
use std::collections::BTreeMap;

/// Splits samples into those to train on and those held out, both in their order.
///
/// Rows with the same prompt stay together: a model that was trained on one reply to a prompt has seen the prompt,
/// and its loss on another reply would be too low. Prompts are drawn by a hash of the seed and the number of their
/// first row, until `fraction` of the rows (rounded; of two or more rows at least one, and never all) is held out;
/// a prompt with more rows than are still needed is skipped. If all rows have the same prompt, rows are drawn one
/// by one.
pub fn split(samples: Vec<Sample>, fraction: f64, seed: u64) -> (Vec<Sample>, Vec<Sample>) {
    let n = samples.len();
    let mut wanted = (fraction.clamp(0.0, 1.0) * n as f64).round() as usize;
    if fraction > 0.0 && fraction < 1.0 && n > 1 {
        wanted = wanted.clamp(1, n - 1);
    }
    let mut groups = by_prompt(&samples);
    if groups.len() < 2 {
        groups = (0..n).map(|i| vec![i]).collect();
    }
    groups.sort_by_cached_key(|g| (mix(seed ^ mix(samples[g[0]].id.row)), samples[g[0]].id.row, g[0]));
    let mut held = vec![false; n];
    let mut count = 0;
    for group in &groups {
        if count + group.len() <= wanted {
            count += group.len();
            group.iter().for_each(|&i| held[i] = true);
        }
    }
    // Every prompt has more rows than needed: the smallest exceeds the number least.
    if count == 0
        && wanted > 0
        && let Some(group) = groups.iter().min_by_key(|g| g.len())
    {
        group.iter().for_each(|&i| held[i] = true);
    }
    let (mut train, mut test) = (Vec::with_capacity(n), Vec::with_capacity(wanted));
    for (sample, held) in samples.into_iter().zip(held) {
        if held { test.push(sample) } else { train.push(sample) }
    }
    (train, test)
}

/// Indices of the samples of each prompt, in order of appearance. A sample without a prompt is its own group.
fn by_prompt(samples: &[Sample]) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = Vec::new();
    let mut known: BTreeMap<&[u32], usize> = BTreeMap::new();
    for (i, sample) in samples.iter().enumerate() {
        let end = sample.origins.iter().position(|o| o.supervised()).unwrap_or(sample.len());
        let prompt = &sample.input_ids[..end];
        let has_text = sample.origins[..end].iter().any(|o| matches!(o, crate::Origin::Prompt { .. }));
        match known.get(prompt) {
            Some(&group) if has_text => groups[group].push(i),
            _ => {
                known.insert(prompt, groups.len());
                groups.push(vec![i]);
            }
        }
    }
    groups
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection that scatters consecutive numbers.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

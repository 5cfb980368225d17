//! Random weights with the distributions that transformers uses.

use crate::arch::Architecture;
use crate::lora::LoraInit;
use crate::params::{Kind, Parameter};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;

/// The initial values of a parameter, in the engine's layout.
///
/// Each parameter draws from a separate random stream, so adding a layer does not change the others. Weights are `N(0,
/// initializer_range²)`, in GPT-2 divided by `√(2·layers)` if they write to the residual stream; biases are 0, norms
/// multiply by 1, and the embedding's padding row is 0 (`PreTrainedModel._init_weights`).
pub(crate) fn values(a: &Architecture, p: &Parameter, index: usize, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(index as u64);
    let std = match p.kind {
        Kind::Bias => return vec![0.0; p.range.len()],
        Kind::NormWeight => return vec![1.0 - a.head.norm.offset(); p.range.len()],
        Kind::Matrix | Kind::Embedding => a.init.std,
        Kind::Residual => a.init.residual_std,
        Kind::AdapterIn | Kind::AdapterOut | Kind::Magnitude => {
            return adapter(p, index, LoraInit::default(), seed);
        }
    };
    let mut values = normal(p.range.len(), std, &mut rng);
    if let (Kind::Embedding, Some(row)) = (p.kind, a.init.padding_row)
        && row < a.vocab_size
    {
        values[row * a.hidden..(row + 1) * a.hidden].fill(0.0);
    }
    values
}

/// The initial values of an adapter's matrix, as PEFT draws them; magnitudes follow from the weights.
pub(crate) fn adapter(p: &Parameter, index: usize, init: LoraInit, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(index as u64);
    match (p.kind, init) {
        (Kind::AdapterIn, LoraInit::Gaussian) => normal(p.range.len(), 1.0 / p.shape[0] as f64, &mut rng),
        (Kind::AdapterIn, _) | (Kind::AdapterOut, LoraInit::Random) => {
            // PEFT: kaiming_uniform_ with a = √5, which is a uniform distribution over ±1/√inputs.
            let bound = 1.0 / (p.shape[1] as f64).sqrt();
            (0..p.range.len()).map(|_| ((2.0 * unit(&mut rng) - 1.0) * bound) as f32).collect()
        }
        _ => vec![0.0; p.range.len()],
    }
}

/// Rows to add to an embedding or a head of `hidden` columns whose existing rows are `old`: drawn from the normal
/// distribution with their mean and 1e-9 times their covariance. A row is `mean + √(1e-9/n) · Σ z_i (w_i − mean)` with
/// `z` standard normal, which has that distribution without computing the covariance. Each row has a separate random
/// stream. With no more rows than columns the covariance is singular, and the rows are the mean, as in transformers.
pub(crate) fn added_rows(old: &[f32], hidden: usize, rows: usize, index: usize, seed: u64) -> Vec<f32> {
    let count = old.len() / hidden.max(1);
    let sums = |factor: &mut dyn FnMut() -> f64| {
        let (mut sum, mut total) = (vec![0f64; hidden], 0f64);
        for row in old.chunks_exact(hidden) {
            let factor = factor();
            total += factor;
            sum.iter_mut().zip(row).for_each(|(sum, w)| *sum += factor * f64::from(*w));
        }
        (sum, total)
    };
    let mut mean = sums(&mut || 1.0).0;
    mean.iter_mut().for_each(|sum| *sum /= count.max(1) as f64);
    let deviation = if count > hidden { (1e-9 / count as f64).sqrt() } else { 0.0 };
    let added = |row: usize| {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        // Distinct from the streams of random weights, whose numbers are the parameters'.
        rng.set_stream((index as u64 + 1) << 40 | row as u64);
        let mut spare = None;
        let mut draw = || {
            spare.take().unwrap_or_else(|| {
                let (a, b) = normals(&mut rng);
                spare = Some(b);
                a
            })
        };
        let (sum, total) = if deviation > 0.0 { sums(&mut draw) } else { (vec![0.0; hidden], 0.0) };
        let of = |(sum, mean): (f64, &f64)| (mean + deviation * (sum - total * mean)) as f32;
        sum.into_iter().zip(&mean).map(of).collect::<Vec<f32>>()
    };
    (0..rows).into_par_iter().flat_map_iter(added).collect()
}

fn normal(len: usize, std: f64, rng: &mut impl Rng) -> Vec<f32> {
    let mut values = Vec::with_capacity(len + 1);
    while values.len() < len {
        let (a, b) = normals(rng);
        values.extend([(a * std) as f32, (b * std) as f32]);
    }
    values.truncate(len);
    values
}

/// Uniform in (0, 1], from 53 random bits; never 0, so its logarithm is finite.
fn unit(rng: &mut impl Rng) -> f64 {
    ((rng.next_u64() >> 11) + 1) as f64 / (1u64 << 53) as f64
}

/// Two independent standard normals (Box & Muller 1958).
fn normals(rng: &mut impl Rng) -> (f64, f64) {
    let (radius, angle) = ((-2.0 * unit(rng).ln()).sqrt(), std::f64::consts::TAU * unit(rng));
    (radius * angle.cos(), radius * angle.sin())
}

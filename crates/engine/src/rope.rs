//! Rotary position embeddings (Su et al. 2021): frequencies, their scalings, and the table of angles.
//!
//! Frequencies are computed in f32 wherever transformers does so (`modeling_rope_utils.py`): published weights were
//! trained with that rounding.

use std::borrow::Cow;
use std::f64::consts::PI;

/// The rotation of queries and keys by their position. The first `2 · frequencies.len()` columns of each head are
/// rotated, the others are unchanged.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Inverse frequencies in radians per position, scaling applied.
    pub frequencies: Vec<f32>,
    /// Factor on cosines and sines, and therefore on queries and keys.
    pub scale: f32,
    /// The change in long sequences, if any.
    pub beyond: Option<Beyond>,
}

/// Frequencies of every token of a sequence that is longer than `positions`.
#[derive(Clone, Debug, PartialEq)]
pub enum Beyond {
    /// LongRoPE (Ding et al. 2024): a second set of frequencies.
    Long {
        /// Positions up to which the plain frequencies are used.
        positions: usize,
        /// The frequencies beyond them.
        frequencies: Vec<f32>,
    },
    /// Dynamic NTK: plain frequencies for a base that grows with the sequence length.
    Dynamic {
        /// Positions up to which the plain frequencies are used.
        positions: usize,
        /// The plain base.
        theta: f64,
        /// Growth of the base.
        factor: f64,
    },
}

impl Rope {
    /// Rotation by these frequencies, at any length.
    pub fn of(frequencies: Vec<f32>) -> Rope {
        Rope { frequencies, scale: 1.0, beyond: None }
    }

    /// Number of columns of each head that are rotated.
    pub fn rotated(&self) -> usize {
        2 * self.frequencies.len()
    }

    /// The variant of the frequencies for a sequence of `length` tokens: 0 for `frequencies`, else a number that
    /// identifies the other frequencies.
    pub fn variant(&self, length: usize) -> usize {
        match &self.beyond {
            Some(Beyond::Long { positions, .. }) if length > *positions => 1,
            Some(Beyond::Dynamic { positions, .. }) if length > *positions => length,
            _ => 0,
        }
    }

    fn frequencies_of(&self, variant: usize) -> Cow<'_, [f32]> {
        match &self.beyond {
            Some(Beyond::Long { frequencies, .. }) if variant > 0 => frequencies.into(),
            Some(Beyond::Dynamic { positions, theta, factor }) if variant > 0 => {
                let dim = self.rotated() as f64;
                let growth = factor * variant as f64 / *positions as f64 - (factor - 1.0);
                plain(theta * growth.powf(dim / (dim - 2.0)), self.rotated()).into()
            }
            _ => (&self.frequencies).into(),
        }
    }

    /// Cosines, then sines, of each position under the frequencies of a variant: `[positions, rotated]`.
    pub fn table(&self, variant: usize, positions: usize) -> Vec<f32> {
        let mut table = Vec::with_capacity(positions.saturating_mul(self.rotated()));
        let (frequencies, scale) = (self.frequencies_of(variant), self.scale);
        for position in 0..positions {
            // Angles are f32 products, as in transformers; only their cosine is computed in f64.
            let angles = frequencies.iter().map(|frequency| (position as f32 * frequency) as f64);
            table.extend(angles.clone().map(|angle| angle.cos() as f32 * scale));
            table.extend(angles.map(|angle| angle.sin() as f32 * scale));
        }
        table
    }
}

/// The plain frequencies `theta^(−2i / rotated)`.
pub fn plain(theta: f64, rotated: usize) -> Vec<f32> {
    (0..rotated / 2).map(|i| 1.0 / (theta as f32).powf((2 * i) as f32 / rotated as f32)).collect()
}

/// Llama 3.1's scaling: long wavelengths are stretched, short ones are unchanged, those between are interpolated
/// (`_compute_llama3_parameters` of transformers).
pub struct Llama3 {
    /// Factor by which long wavelengths are stretched.
    pub factor: f32,
    /// Wavelengths above `original / low` are long.
    pub low: f32,
    /// Wavelengths below `original / high` are short.
    pub high: f32,
    /// Positions with which the model was first trained.
    pub original: f32,
}

impl Llama3 {
    /// The scaled frequency.
    pub fn apply(&self, frequency: f32) -> f32 {
        let wavelength = 2.0 * std::f32::consts::PI / frequency;
        if wavelength > self.original / self.low {
            frequency / self.factor
        } else if wavelength < self.original / self.high {
            frequency
        } else {
            let smooth = (self.original / wavelength - self.low) / (self.high - self.low);
            (1.0 - smooth) * frequency / self.factor + smooth * frequency
        }
    }
}

/// YaRN (Peng et al. 2023): frequencies with many turns within the original positions are unchanged, those with few are
/// divided by `factor`, with a linear ramp between (`_compute_yarn_parameters` of transformers).
pub struct Yarn {
    /// Base of the plain frequencies.
    pub theta: f64,
    /// Columns that are rotated.
    pub rotated: usize,
    /// Factor by which positions are stretched.
    pub factor: f64,
    /// Positions with which the model was first trained.
    pub original: f64,
    /// Number of turns at which the ramp begins.
    pub beta_fast: f64,
    /// Number of turns at which it ends.
    pub beta_slow: f64,
    /// Round the ramp's ends to whole columns.
    pub truncate: bool,
}

impl Yarn {
    /// The scaled frequencies.
    pub fn frequencies(&self) -> Vec<f32> {
        let last = self.rotated as f64 - 1.0;
        // The column pair whose frequency makes this many turns.
        let column = |turns: f64| {
            self.rotated as f64 * (self.original / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln())
        };
        let (mut low, mut high) = (column(self.beta_fast), column(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min(last));
        if low == high {
            high += 0.001;
        }
        let ramp = |i: usize| ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
        let kept = |i: usize| 1.0 - ramp(i);
        let each = plain(self.theta, self.rotated).into_iter().enumerate();
        each.map(|(i, f)| f / self.factor as f32 * (1.0 - kept(i)) + f * kept(i)).collect()
    }

    /// The paper's factor on cosines and sines, with its logarithm weighted by `weight`.
    pub fn attention_factor(factor: f64, weight: f64) -> f64 {
        if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 }
    }
}

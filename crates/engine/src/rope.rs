//! Rotary position embeddings (Su et al. 2021): frequencies and the table of angles.

/// The rotation of queries and keys by their position. The first `2 · frequencies.len()` columns of each head
/// are rotated, the others are left as they are.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Inverse frequencies in radians per position, scaling applied.
    pub frequencies: Vec<f32>,
}

impl Rope {
    /// The plain frequencies `theta^(−2i / head_dim)` of a whole head, scaled by `scale`.
    ///
    /// f32 as in transformers, whose rounding the published weights were trained with.
    pub fn new(theta: f64, head_dim: usize, scale: impl Fn(f32) -> f32) -> Rope {
        let plain = |i: usize| 1.0 / (theta as f32).powf((2 * i) as f32 / head_dim as f32);
        Rope { frequencies: (0..head_dim / 2).map(|i| scale(plain(i))).collect() }
    }

    /// Columns of each head that are rotated.
    pub fn rotated(&self) -> usize {
        2 * self.frequencies.len()
    }

    /// Cosines, then sines, of each position: `[positions, rotated]`.
    pub fn table(&self, positions: usize) -> Vec<f32> {
        let mut table = Vec::with_capacity(positions.saturating_mul(self.rotated()));
        for position in 0..positions {
            // Angles are f32 products, as transformers computes them; only their cosine is taken in f64.
            let angles = self.frequencies.iter().map(|frequency| (position as f32 * frequency) as f64);
            table.extend(angles.clone().map(|angle| angle.cos() as f32));
            table.extend(angles.map(|angle| angle.sin() as f32));
        }
        table
    }
}

/// Llama 3.1's scaling: long wavelengths are stretched, short ones kept, those between blended
/// (`_compute_llama3_parameters` of transformers).
pub struct Llama3 {
    /// Factor by which long wavelengths are stretched.
    pub factor: f32,
    /// Wavelengths above `original / low` are long.
    pub low: f32,
    /// Wavelengths below `original / high` are short.
    pub high: f32,
    /// Positions that the model was first trained with.
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

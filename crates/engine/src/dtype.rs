//! The storage types of weights, and their bytes.

use safetensors::Dtype;

/// A storage type of weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum WeightType {
    /// 32 bits.
    #[default]
    F32,
    /// 16-bit floats of IEEE 754.
    F16,
    /// The upper half of an f32.
    BF16,
}

impl WeightType {
    /// The storage type of a tensor; f32 for any other type, which is read as f32.
    pub(crate) fn of(dtype: Dtype) -> WeightType {
        match dtype {
            Dtype::F16 => WeightType::F16,
            Dtype::BF16 => WeightType::BF16,
            _ => WeightType::F32,
        }
    }

    /// The corresponding type of the safetensors library.
    pub(crate) fn dtype(self) -> Dtype {
        match self {
            WeightType::F32 => Dtype::F32,
            WeightType::F16 => Dtype::F16,
            WeightType::BF16 => Dtype::BF16,
        }
    }

    /// Its name in `config.json` (`dtype`, `torch_dtype`).
    pub fn name(self) -> &'static str {
        match self {
            WeightType::F32 => "float32",
            WeightType::F16 => "float16",
            WeightType::BF16 => "bfloat16",
        }
    }

    /// The type with this name in `config.json`.
    pub fn named(name: &str) -> Option<WeightType> {
        [WeightType::F32, WeightType::F16, WeightType::BF16].into_iter().find(|kind| kind.name() == name)
    }

    /// Bytes of an element.
    pub(crate) fn bytes(self) -> usize {
        if self == WeightType::F32 { 4 } else { 2 }
    }

    /// Little-endian elements in f32.
    pub(crate) fn widened(self, bytes: &[u8]) -> Vec<f32> {
        let pairs = || bytes.as_chunks::<2>().0.iter();
        match self {
            WeightType::F32 => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            WeightType::F16 => pairs().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
            WeightType::BF16 => pairs().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect(),
        }
    }

    /// Element `i` of little-endian elements.
    pub(crate) fn element(self, bytes: &[u8], i: usize) -> f64 {
        let at = &bytes[i * self.bytes()..];
        match self {
            WeightType::F32 => f64::from(f32::from_le_bytes([at[0], at[1], at[2], at[3]])),
            WeightType::F16 => half::f16::from_le_bytes([at[0], at[1]]).to_f64(),
            WeightType::BF16 => half::bf16::from_le_bytes([at[0], at[1]]).to_f64(),
        }
    }

    /// Little-endian bytes of values, rounded to nearest. The error is the index of a finite value that is too large.
    pub(crate) fn narrow(self, values: &[f32]) -> Result<Vec<u8>, usize> {
        match self {
            WeightType::F32 => Ok(values.iter().flat_map(|x| x.to_le_bytes()).collect()),
            WeightType::BF16 => {
                narrow(values, half::bf16::from_f32, half::bf16::is_infinite, half::bf16::to_le_bytes)
            }
            WeightType::F16 => {
                narrow(values, half::f16::from_f32, half::f16::is_infinite, half::f16::to_le_bytes)
            }
        }
    }
}

/// How the read-only matrix of a linear layer is packed into fewer bits, as in bitsandbytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// 4 bits (Dettmers et al. 2023): an element is the nearest of 16 values, times the largest magnitude of its block of
    /// 64.
    Nf4 {
        /// Quantise these magnitudes too, to 8 bits.
        nested: bool,
    },
    /// 8 bits: an element is an integer multiple of 1/127 of the largest magnitude of its row, in f16.
    Int8,
}

impl Packing {
    /// Elements that share a magnitude in NF4.
    pub(crate) const BLOCK: usize = 64;

    /// Bits of an element.
    pub fn bits(self) -> usize {
        match self {
            Packing::Nf4 { .. } => 4,
            Packing::Int8 => 8,
        }
    }

    /// Bytes of a matrix: codes and scales.
    pub(crate) fn bytes(self, rows: usize, width: usize) -> usize {
        let elements = rows.saturating_mul(width);
        let blocks = elements.div_ceil(Packing::BLOCK);
        match self {
            Packing::Nf4 { nested: false } => elements.div_ceil(2).saturating_add(blocks.saturating_mul(4)),
            Packing::Nf4 { nested: true } => {
                let nested = blocks.saturating_add(blocks.div_ceil(256).saturating_mul(4));
                elements.div_ceil(2).saturating_add(nested)
            }
            Packing::Int8 => elements.saturating_add(rows.saturating_mul(4)),
        }
    }
}

fn narrow<T: Copy>(
    values: &[f32],
    round: fn(f32) -> T,
    is_infinite: fn(T) -> bool,
    bytes: fn(T) -> [u8; 2],
) -> Result<Vec<u8>, usize> {
    let mut out = Vec::with_capacity(2 * values.len());
    for (i, &x) in values.iter().enumerate() {
        let rounded = round(x);
        if is_infinite(rounded) && x.is_finite() {
            return Err(i);
        }
        out.extend(bytes(rounded));
    }
    Ok(out)
}

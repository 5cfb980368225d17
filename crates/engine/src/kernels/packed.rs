//! Matrices of linear layers in 4 or 8 bits (Dettmers et al. 2022, 2023), with the codes and scales of bitsandbytes.
//!
//! NF4: the matrix is treated as one vector, cut into blocks of 64. A block is divided by its largest magnitude, and
//! each element becomes the nearest of 16 values. With nested scales, the mean is subtracted from the magnitudes, and
//! they are quantised in blocks of 256 to the 256 values of optimizer states. Int8: a row in f16 is divided by 1/127 of
//! its largest magnitude and rounded, as the weights of LLM.int8 are.

use super::quantised;
use crate::dtype::Packing;
use crate::map::Map;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

/// The values of NF4's codes.
#[allow(clippy::excessive_precision)]
pub(crate) const NF4: [f32; 16] = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
];

const BLOCK: usize = Packing::BLOCK;

/// A lower bound of the magnitude by which a block is divided.
const LEAST: f32 = 1e-38;

/// Elements that one task packs: whole blocks.
const PIECE: usize = 1 << 16;

/// A packed matrix.
#[derive(Debug)]
pub struct Packed {
    rows: usize,
    width: usize,
    codes: Codes,
    scales: Scales,
}

/// The codes: in memory, or in a file whose matrix is already packed.
#[derive(Debug)]
pub(crate) enum Codes {
    Held(Vec<u8>),
    Mapped(Arc<Map>, Range<usize>),
}

impl std::ops::Deref for Codes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Codes::Held(bytes) => bytes,
            // The range was checked against the map on construction.
            Codes::Mapped(map, range) => &map[range.clone()],
        }
    }
}

/// The scales of the codes, which determine the packing.
#[derive(Debug)]
pub(crate) enum Scales {
    /// NF4: the largest magnitude of each block.
    Blocks(Vec<f32>),
    /// NF4: the largest magnitude of a block is the value of its code times the scale of its group of 256 blocks, plus
    /// the offset.
    Nested { codes: Vec<u8>, scales: Vec<f32>, offset: f32 },
    /// Int8: the largest magnitude of each row.
    Rows(Vec<f32>),
}

impl Packed {
    /// A matrix from known codes and scales; `None` if their number does not match its size.
    pub(crate) fn of_parts(rows: usize, width: usize, codes: Codes, scales: Scales) -> Option<Packed> {
        let elements = rows.checked_mul(width)?;
        let blocks = elements.div_ceil(BLOCK);
        let fits = match &scales {
            Scales::Blocks(scales) => codes.len() == elements.div_ceil(2) && scales.len() == blocks,
            Scales::Nested { codes: of_scales, scales, .. } => {
                codes.len() == elements.div_ceil(2)
                    && of_scales.len() == blocks
                    && scales.len() == blocks.div_ceil(quantised::BLOCK)
            }
            Scales::Rows(scales) => codes.len() == elements && scales.len() == rows,
        };
        (fits && elements > 0).then_some(Packed { rows, width, codes, scales })
    }

    /// Packs a matrix; `read` fills a slice with the elements from a given index on. The error is the index of an
    /// element that f16 cannot represent: 8-bit packing goes through f16.
    pub(crate) fn pack(
        packing: Packing,
        (rows, width): (usize, usize),
        read: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Result<Packed, usize> {
        let len = rows * width;
        let piece = match packing {
            Packing::Nf4 { .. } => PIECE,
            Packing::Int8 => PIECE.div_ceil(width.max(1)) * width,
        };
        let starts: Vec<usize> = (0..len).step_by(piece.max(1)).collect();
        let packed = starts.into_par_iter().map(|start| {
            let mut values = vec![0.0; piece.min(len - start)];
            read(start, &mut values);
            match packing {
                Packing::Nf4 { .. } => Ok(to_nf4(&values)),
                Packing::Int8 => to_int8(&values, width).map_err(|at| start + at),
            }
        });
        // In the order of the pieces, whatever the number of threads.
        let pieces = packed.collect::<Result<Vec<_>, usize>>()?;
        let mut codes = Vec::with_capacity(pieces.iter().map(|(codes, _)| codes.len()).sum());
        let mut scales = Vec::new();
        for (of_piece, s) in pieces {
            codes.extend(of_piece);
            scales.extend(s);
        }
        let scales = match packing {
            Packing::Nf4 { nested: false } => Scales::Blocks(scales),
            Packing::Nf4 { nested: true } => nest(&scales),
            Packing::Int8 => Scales::Rows(scales),
        };
        Ok(Packed { rows, width, codes: Codes::Held(codes), scales })
    }

    /// A matrix of zeros.
    pub(crate) fn zeros(packing: Packing, (rows, width): (usize, usize)) -> Packed {
        let blocks = (rows * width).div_ceil(BLOCK);
        let (codes, scales) = match packing {
            Packing::Nf4 { nested: false } => ((rows * width).div_ceil(2), Scales::Blocks(vec![0.0; blocks])),
            Packing::Nf4 { nested: true } => {
                let scales = vec![0.0; blocks.div_ceil(quantised::BLOCK)];
                ((rows * width).div_ceil(2), Scales::Nested { codes: vec![0; blocks], scales, offset: 0.0 })
            }
            Packing::Int8 => (rows * width, Scales::Rows(vec![0.0; rows])),
        };
        Packed { rows, width, codes: Codes::Held(vec![0; codes]), scales }
    }

    pub(super) fn len(&self) -> usize {
        self.rows * self.width
    }

    /// Elements of a row.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    pub(crate) fn packing(&self) -> Packing {
        match self.scales {
            Scales::Blocks(_) => Packing::Nf4 { nested: false },
            Scales::Nested { .. } => Packing::Nf4 { nested: true },
            Scales::Rows(_) => Packing::Int8,
        }
    }

    /// The values of the codes of nested scales.
    pub(crate) fn nested_values() -> &'static [f32; 256] {
        quantised::values(true)
    }

    pub(super) fn codes(&self) -> &[u8] {
        &self.codes
    }

    pub(super) fn scales(&self) -> &Scales {
        &self.scales
    }

    /// Bytes of codes and scales.
    pub(super) fn size(&self) -> usize {
        self.packing().bytes(self.rows, self.width)
    }

    /// The elements from index `start` on.
    pub(super) fn run(&self, start: usize, to: &mut [f32]) {
        match &self.scales {
            Scales::Blocks(scales) => self.nf4(start, to, |block| scales[block]),
            Scales::Nested { codes, scales, offset } => {
                let values = quantised::values(true);
                let scale =
                    |block: usize| values[usize::from(codes[block])] * scales[block / quantised::BLOCK];
                self.nf4(start, to, |block| scale(block) + offset);
            }
            Scales::Rows(scales) => {
                let (mut at, mut to) = (start, to);
                while !to.is_empty() {
                    let n = (self.width - at % self.width).min(to.len());
                    let (run, rest) = std::mem::take(&mut to).split_at_mut(n);
                    let scale = scales[at / self.width] / 127.0;
                    for (to, code) in run.iter_mut().zip(&self.codes[at..at + n]) {
                        *to = f32::from(*code as i8) * scale;
                    }
                    (at, to) = (at + n, rest);
                }
            }
        }
    }

    /// As [`Packed::run`], with the scale of each block.
    fn nf4(&self, start: usize, to: &mut [f32], scale: impl Fn(usize) -> f32) {
        let (mut at, mut to) = (start, to);
        while !to.is_empty() {
            let n = (BLOCK - at % BLOCK).min(to.len());
            let (mut run, rest) = std::mem::take(&mut to).split_at_mut(n);
            let scale = scale(at / BLOCK);
            let values = NF4.map(|value| value * scale);
            // The first of a pair is in the high four bits.
            if at % 2 == 1
                && let [first, others @ ..] = run
            {
                *first = values[usize::from(self.codes[at / 2] & 15)];
                run = others;
            }
            let (pairs, last) = run.as_chunks_mut::<2>();
            let codes = &self.codes[at.div_ceil(2)..];
            for (to, code) in pairs.iter_mut().zip(codes) {
                *to = [values[usize::from(code >> 4)], values[usize::from(code & 15)]];
            }
            if let [last] = last {
                *last = values[usize::from(codes[pairs.len()] >> 4)];
            }
            (at, to) = (at + n, rest);
        }
    }
}

/// A code for each element and the largest magnitude of each block; the last block may be shorter.
fn quantise(values: &[f32], block: usize, code: impl Fn(f32) -> u8) -> (Vec<u8>, Vec<f32>) {
    let mut codes = Vec::with_capacity(values.len());
    let mut scales = Vec::with_capacity(values.len().div_ceil(block));
    for x in values.chunks(block) {
        let largest = largest(x);
        let bound = largest.max(LEAST);
        // bitsandbytes multiplies by the inverse in a whole block, and divides in an incomplete one.
        let inverse = 1.0 / bound;
        if x.len() == block {
            codes.extend(x.iter().map(|x| code((x * inverse).clamp(-1.0, 1.0))));
            scales.push(largest);
        } else {
            codes.extend(x.iter().map(|x| code(x / bound)));
            scales.push(bound);
        }
    }
    (codes, scales)
}

/// Codes, two to a byte, and the scales of blocks; the last block may be shorter.
fn to_nf4(values: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let (codes, scales) = quantise(values, BLOCK, nf4_code);
    let pair = |pair: &[u8]| pair[0] << 4 | pair.get(1).copied().unwrap_or_else(|| nf4_code(0.0));
    (codes.chunks(2).map(pair).collect(), scales)
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0f32, |largest, x| largest.max(x.abs()))
}

/// The code of the nearest value; of two equally near, the lower.
fn nf4_code(x: f32) -> u8 {
    NF4.windows(2).map(|pair| u8::from(x > (pair[0] + pair[1]) / 2.0)).sum()
}

/// Quantises the magnitudes of blocks.
fn nest(magnitudes: &[f32]) -> Scales {
    let sum: f64 = magnitudes.iter().copied().map(f64::from).sum();
    let offset = (sum / magnitudes.len().max(1) as f64) as f32;
    let values = quantised::values(true);
    let middles: Vec<f32> = values.windows(2).map(|pair| (pair[0] + pair[1]) / 2.0).collect();
    let centred: Vec<f32> = magnitudes.iter().map(|x| x - offset).collect();
    let code = |x: f32| middles.partition_point(|middle| x > *middle) as u8;
    let (codes, scales) = quantise(&centred, quantised::BLOCK, code);
    Scales::Nested { codes, scales, offset }
}

/// Codes and largest magnitudes of rows.
fn to_int8(values: &[f32], width: usize) -> Result<(Vec<u8>, Vec<f32>), usize> {
    let mut codes = Vec::with_capacity(values.len());
    let mut scales = Vec::with_capacity(values.len() / width.max(1));
    for (i, row) in values.chunks(width).enumerate() {
        let row: Vec<f32> = row.iter().map(|x| half::f16::from_f32(*x).to_f32()).collect();
        if let Some(j) = row.iter().position(|x| x.is_infinite()) {
            return Err(i * width + j);
        }
        let largest = largest(&row);
        // In the order in which PyTorch divides a number by a tensor.
        let factor = if largest > 0.0 { 1.0 / largest * 127.0 } else { 0.0 };
        codes.extend(row.iter().map(|x| (x * factor).round_ties_even() as i8 as u8));
        scales.push(largest);
    }
    Ok((codes, scales))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::WeightType;
    use safetensors::{Dtype, SafeTensors};

    /// Codes, scales and values equal those of bitsandbytes bit for bit; the mean of the magnitudes to the last digit,
    /// because it depends on the order of its sum.
    #[test]
    fn packed_matrices_are_those_of_bitsandbytes() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/goldens/models/quantised.safetensors");
        let bytes = std::fs::read(path).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let matrices: Vec<&str> =
            tensors.names().into_iter().filter_map(|name| name.strip_suffix(".values")).collect();
        assert_eq!(matrices.len(), 4);
        for name in matrices {
            let tensor = |key: &str| tensors.tensor(&format!("{name}.{key}")).unwrap();
            let floats = |key: &str| WeightType::of(tensor(key).dtype()).widened(tensor(key).data());
            let (values, shape) = (floats("values"), tensor("values").shape().to_vec());
            let pack = |packing| {
                let read =
                    |start: usize, to: &mut [f32]| to.copy_from_slice(&values[start..start + to.len()]);
                Packed::pack(packing, (shape[0], shape[1]), read).unwrap()
            };
            let same = |got: &[u8], want: &[u8], what: &str| {
                let first = got.iter().zip(want).position(|(got, want)| got != want);
                assert!(
                    first.is_none() && got.len() == want.len(),
                    "{name} {what}: {first:?}, {:?}",
                    first.map(|i| (got[i], want[i]))
                );
            };
            let unpacked = |packed: &Packed| {
                let mut all = vec![0.0; packed.len()];
                packed.run(0, &mut all);
                // From any place on, and to any.
                for (start, end) in
                    [(0, 1), (1, 2), (1, 65), (3, packed.len()), (63, 64), (packed.len() - 1, packed.len())]
                {
                    let mut part = vec![0.0; end - start];
                    packed.run(start, &mut part);
                    assert_eq!(part, all[start..end], "{name}: {start}..{end}");
                }
                all
            };

            let packed = pack(Packing::Nf4 { nested: false });
            same(packed.codes(), tensor("nf4.codes").data(), "nf4");
            let Scales::Blocks(scales) = packed.scales() else { panic!("{packed:?}") };
            assert_eq!(*scales, floats("nf4.absmax"), "{name}");
            let small = tensors.tensor(&format!("{name}.nf4.unpacked")).is_ok();
            let all = unpacked(&packed);
            if small {
                assert_eq!(all, floats("nf4.unpacked"), "{name}");
            }

            let packed = pack(Packing::Nf4 { nested: true });
            same(packed.codes(), tensor("nf4.codes").data(), "nf4");
            let Scales::Nested { codes, scales, offset } = packed.scales() else { panic!("{packed:?}") };
            let want = floats("nested.offset")[0];
            assert!((offset - want).abs() <= f32::EPSILON * want, "{name}: {offset} and {want}");
            let near = |got: &[f32], want: &[f32]| {
                got.len() == want.len()
                    && got.iter().zip(want).all(|(a, b)| {
                        (a - b).abs()
                            <= 4.0 * f32::EPSILON * want.iter().fold(0f32, |m, x| m.max(x.abs())).max(b.abs())
                    })
            };
            let scales_equal = near(scales, &floats("nested.absmax"));
            assert!(scales_equal, "{name}: {scales:?}, {:?}", floats("nested.absmax"));
            if scales.iter().all(|scale| *scale > 0.0) {
                same(codes, tensor("nested.codes").data(), "nested");
            }
            let all = unpacked(&packed);
            if small {
                assert!(near(&all, &floats("nested.unpacked")), "{name}");
            }

            let packed = pack(Packing::Int8);
            assert_eq!(tensor("int8.codes").dtype(), Dtype::I8);
            same(packed.codes(), tensor("int8.codes").data(), "int8");
            let Scales::Rows(scales) = packed.scales() else { panic!("{packed:?}") };
            assert_eq!(*scales, floats("int8.absmax"), "{name}");
            let all = unpacked(&packed);
            for (i, row) in all.chunks(shape[1]).enumerate() {
                let largest = row.iter().fold(0f32, |largest, x| largest.max(x.abs()));
                assert!((largest - scales[i]).abs() <= f32::EPSILON * scales[i], "{name}");
            }
        }
    }
}

//! Matrices in mapped files or packed: read as they are stored, and widened to f32 when they are used.

use super::simd::vectorized;
use super::{FileTensor, ROWS, View};
use crate::dtype::WeightType;
use crate::kernels::stored::Elements;
use rayon::prelude::*;

/// A matrix in a file: element `(i, j)` is element `start + i·row + j·column` of the tensor; one of the two distances
/// is 1.
#[derive(Clone)]
pub(super) struct FileMatrix {
    tensor: FileTensor,
    start: usize,
    row: usize,
    column: usize,
}

impl FileMatrix {
    /// The matrix that a view refers to.
    pub(super) fn of(view: View, tensor: &FileTensor) -> FileMatrix {
        let inside = view.start <= tensor.len() && view.extent() <= tensor.len() - view.start;
        assert!(inside, "views are cut from tensors: {view:?}");
        FileMatrix { tensor: tensor.clone(), start: view.start, row: view.stride(), column: view.column() }
    }

    /// The transpose: the same tensor with rows and columns exchanged.
    pub(super) fn t(self) -> FileMatrix {
        FileMatrix { row: self.column, column: self.row, ..self }
    }

    /// Widens the elements of the tensor from `start` on.
    fn run(&self, start: usize, to: &mut [f32]) {
        match self.tensor.elements() {
            Elements::Packed(packed) => packed.run(start, to),
            Elements::Plain(bytes, kind) => {
                let bytes = &bytes[start * kind.bytes()..][..to.len() * kind.bytes()];
                match kind {
                    WeightType::F32 => from_f32(to, bytes),
                    WeightType::BF16 => from_bf16(to, bytes),
                    WeightType::F16 => from_f16(to, bytes),
                }
            }
        }
    }

    /// Widens the `rows × columns` elements from `(i, j)` on into `panel`. Returns the distances between rows and
    /// between columns in `panel`.
    pub(super) fn widen(
        &self,
        (i, j): (usize, usize),
        (rows, columns): (usize, usize),
        panel: &mut [f32],
    ) -> (usize, usize) {
        let start = self.start + i * self.row + j * self.column;
        let panel = &mut panel[..rows * columns];
        if self.column == 1 {
            for (n, to) in panel.chunks_mut(columns).enumerate() {
                self.run(start + n * self.row, to);
            }
            return (columns, 1);
        }
        for (n, to) in panel.chunks_mut(rows).enumerate() {
            self.run(start + n * self.column, to);
        }
        (1, rows)
    }

    /// Widens row `i`.
    pub(super) fn row(&self, i: usize, to: &mut [f32]) {
        if self.column == 1 {
            return self.run(self.start + i * self.row, to);
        }
        for (j, to) in to.iter_mut().enumerate() {
            self.run(self.start + i * self.row + j * self.column, std::slice::from_mut(to));
        }
    }

    /// `y[i, :]` is row `rows[i]`.
    pub(super) fn gather(&self, y: &mut [f32], rows: &[u32], width: usize) {
        y.par_chunks_mut(width).zip(rows).with_min_len(ROWS).for_each(|(y, &row)| self.row(row as usize, y));
    }
}

vectorized! {
    fn from_f32(to: &mut [f32], bytes: &[u8]) {
        for (to, b) in to.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *to = f32::from_le_bytes(*b);
        }
    }
}

vectorized! {
    fn from_bf16(to: &mut [f32], bytes: &[u8]) {
        for (to, b) in to.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *to = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
        }
    }
}

vectorized! {
    /// With exponent and fraction moved to their positions in an f32, the result is exactly the value divided by 2¹¹²;
    /// infinities and NaN need the other exponent bits set.
    fn from_f16(to: &mut [f32], bytes: &[u8]) {
        for (to, b) in to.iter_mut().zip(bytes.as_chunks::<2>().0) {
            let bits = u32::from(u16::from_le_bytes(*b));
            let magnitude = (bits & 0x7fff) << 13;
            let finite = (f32::from_bits(magnitude) * f32::from_bits(0x7780_0000)).to_bits();
            let magnitude = if bits & 0x7c00 == 0x7c00 { magnitude | 0x7f80_0000 } else { finite };
            *to = f32::from_bits(magnitude | (bits & 0x8000) << 16);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_widens_to_its_value() {
        let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let mut to = vec![0.0; 1 << 16];
        from_f16(&mut to, &all);
        for (i, x) in to.iter().enumerate() {
            let want = half::f16::from_bits(i as u16).to_f32();
            assert!(x.to_bits() == want.to_bits() || x.is_nan() && want.is_nan(), "{i:x}: {x} is not {want}");
        }
        from_bf16(&mut to, &all);
        for (i, x) in to.iter().enumerate() {
            assert_eq!(x.to_bits(), (i as u32) << 16);
        }
    }
}

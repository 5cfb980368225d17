//! Matrices in 4 or 8 bits: stored packed in the card's memory, and unpacked one at a time for a product.

use super::allocation::{Allocation, Work};
use super::launch::{Size, launch};
use super::{Cuda, as_bytes};
use crate::dtype::Packing;
use crate::kernels::packed::{Packed, Scales};
use crate::kernels::{View, quantised};
use crate::{Error, Result};

/// A packed matrix in the card's memory.
#[derive(Debug)]
pub(super) struct DevicePacked {
    codes: Allocation,
    scales: DeviceScales,
    width: usize,
}

/// The card's copy of [`Scales`].
#[derive(Debug)]
enum DeviceScales {
    Blocks(Allocation),
    Nested { codes: Allocation, scales: Allocation, offset: f32 },
    Rows(Allocation),
}

impl DevicePacked {
    pub(super) fn bytes(&self) -> usize {
        let scales = match &self.scales {
            DeviceScales::Blocks(scales) | DeviceScales::Rows(scales) => scales.bytes(),
            DeviceScales::Nested { codes, scales, .. } => codes.bytes() + scales.bytes(),
        };
        self.codes.bytes() + scales
    }
}

impl Cuda {
    /// Copies a packed matrix to the card.
    pub(super) fn upload_packed(&mut self, packed: &Packed) -> Result<DevicePacked> {
        let upload = |bytes: &[u8]| Allocation::of(&self.driver, bytes);
        let codes = upload(packed.codes())?;
        let scales = match packed.scales() {
            Scales::Blocks(scales) => DeviceScales::Blocks(upload(as_bytes(scales))?),
            Scales::Rows(scales) => DeviceScales::Rows(upload(as_bytes(scales))?),
            Scales::Nested { codes, scales, offset } => DeviceScales::Nested {
                codes: upload(codes)?,
                scales: upload(as_bytes(scales))?,
                offset: *offset,
            },
        };
        if matches!(scales, DeviceScales::Nested { .. }) {
            self.code_values()?;
        }
        Ok(DevicePacked { codes, scales, width: packed.width() })
    }

    /// The values of whole rows of a packed matrix, in bf16 or f32: their address, and the memory that holds them.
    pub(super) fn unpacked(&self, view: View, bf16: bool) -> Result<(u64, Work)> {
        let Some(packed) = self.memory.file(view)?.and_then(|tensor| tensor.packed.as_ref()) else {
            unreachable!("a view of a packed matrix has its type");
        };
        let size = if bf16 { 2 } else { 4 };
        let memory = |n: usize| self.work(n.saturating_mul(size));
        let (start, len) = (view.start, view.len());
        let run = match &packed.scales {
            DeviceScales::Rows(scales) => {
                let rows = len / packed.width;
                let to = memory(len)?;
                let codes = packed.codes.address() + start as u64;
                let scales = scales.address() + 4 * (start / packed.width) as u64;
                let kernel = if bf16 { c"int8_rows_to_bf16" } else { c"int8_rows_to_f32" };
                let size = Size::matrix(rows, packed.width);
                launch!(self, kernel, size, [&to, codes, scales, rows, packed.width])?;
                return Ok((to.address(), to));
            }
            DeviceScales::Blocks(_) => Packing::BLOCK,
            DeviceScales::Nested { .. } => Packing::BLOCK * quantised::BLOCK,
        };
        // From the first element of its run of scales.
        let first = start / run * run;
        let n = start + len - first;
        let (to, blocks) = (memory(n)?, n.div_ceil(Packing::BLOCK));
        let nested = match &packed.scales {
            DeviceScales::Nested { codes, scales, offset } => {
                Some(self.magnitudes(codes, scales, *offset, first / Packing::BLOCK, blocks)?)
            }
            _ => None,
        };
        let scales = match (&packed.scales, &nested) {
            (_, Some(nested)) => nested.address(),
            (DeviceScales::Blocks(scales) | DeviceScales::Rows(scales), None) => {
                scales.address() + 4 * (first / Packing::BLOCK) as u64
            }
            (DeviceScales::Nested { .. }, None) => unreachable!("nested scales were just unpacked"),
        };
        let codes = packed.codes.address() + (first / 2) as u64;
        let kernel = if bf16 { c"nf4_to_bf16" } else { c"nf4_to_f32" };
        launch!(self, kernel, Size::elements(n), [&to, codes, scales, n as u64, Packing::BLOCK])?;
        Ok((to.address() + ((start - first) * size) as u64, to))
    }

    /// The largest magnitudes of blocks with nested scales.
    fn magnitudes(
        &self,
        codes: &Allocation,
        scales: &Allocation,
        offset: f32,
        first: usize,
        blocks: usize,
    ) -> Result<Work> {
        let values = self.codes.as_ref().map(|[signed, _]| signed.address());
        let values = values.ok_or_else(|| Error::Operands {
            operation: "unpack",
            message: "the values of nested scales are not on the card".into(),
        })?;
        let (to, offsets) = (self.floats(blocks)?, self.floats(blocks)?);
        let (n, size) = (blocks as u64, Size::elements(blocks));
        let codes = codes.address() + first as u64;
        let scales = scales.address() + 4 * (first / quantised::BLOCK) as u64;
        launch!(self, c"int8_to_f32", size, [&to, codes, values, scales, n, quantised::BLOCK])?;
        launch!(self, c"fill", size, [&offsets, n, offset])?;
        launch!(self, c"add", size, [&to, &offsets, n])?;
        Ok(to)
    }
}

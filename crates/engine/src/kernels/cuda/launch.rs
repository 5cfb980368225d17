//! Arguments and sizes of launches; `kernels.h` lists them for each kernel.

use super::allocation::{Allocation, Work};
use super::stream::Stream;
use crate::{Error, Result};
use std::ffi::CStr;

/// The arguments of a kernel, each in its own words.
#[derive(Debug, Default)]
pub(super) struct Arguments {
    words: Vec<u64>,
    starts: Vec<usize>,
    /// A size of more than 32 bits, which no kernel accepts.
    too_large: Option<usize>,
}

/// A type of kernel argument.
pub(super) trait Argument {
    fn put(self, to: &mut Arguments);
}

/// An address, or a 64-bit number.
impl Argument for u64 {
    fn put(self, to: &mut Arguments) {
        to.words.push(self);
    }
}

impl Argument for u32 {
    fn put(self, to: &mut Arguments) {
        u64::from(self).put(to);
    }
}

/// Rows, columns or a stride: a 32-bit number.
impl Argument for usize {
    fn put(self, to: &mut Arguments) {
        match u32::try_from(self) {
            Ok(n) => n.put(to),
            Err(_) => to.too_large = Some(self),
        }
    }
}

impl Argument for bool {
    fn put(self, to: &mut Arguments) {
        u32::from(self).put(to);
    }
}

impl Argument for f32 {
    fn put(self, to: &mut Arguments) {
        self.to_bits().put(to);
    }
}

impl Argument for f64 {
    fn put(self, to: &mut Arguments) {
        self.to_bits().put(to);
    }
}

/// Its address.
impl Argument for &Work {
    fn put(self, to: &mut Arguments) {
        self.address().put(to);
    }
}

/// Its address.
impl Argument for &Allocation {
    fn put(self, to: &mut Arguments) {
        self.address().put(to);
    }
}

/// A structure of eight words.
impl Argument for [u64; 8] {
    fn put(self, to: &mut Arguments) {
        to.words.extend(self);
    }
}

impl Arguments {
    pub(super) fn add(mut self, argument: impl Argument) -> Arguments {
        self.starts.push(self.words.len());
        argument.put(&mut self);
        self
    }

    /// Launches a kernel with these arguments. An empty grid is skipped: operands may be empty.
    ///
    /// # Errors
    /// [`Error::Operands`] for a size of more than 32 bits.
    ///
    /// # Safety
    /// The arguments match the kernel, and their addresses have the elements that it accesses.
    pub(super) unsafe fn launch(self, stream: &Stream, kernel: &'static CStr, size: Size) -> Result<()> {
        if let Some(n) = self.too_large {
            return Err(too_large(n));
        }
        if size.grid.contains(&0) {
            return Ok(());
        }
        // SAFETY: guaranteed by the caller.
        unsafe { stream.launch(kernel, [size.grid, size.block], size.shared, (self.words, self.starts)) }
    }
}

/// Grid, block, and bytes of shared memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Size {
    pub(super) grid: [u32; 3],
    pub(super) block: [u32; 3],
    pub(super) shared: u32,
}

/// `ceil(n / by)`, at most `most`.
fn pieces(n: usize, by: usize, most: usize) -> u32 {
    n.div_ceil(by).min(most) as u32
}

impl Size {
    pub(super) fn new(grid: [u32; 3], block: [u32; 3]) -> Size {
        Size { grid, block, shared: 0 }
    }

    /// A one-dimensional grid of blocks.
    pub(super) fn blocks(grid: u32, block: u32) -> Size {
        Size::new([grid, 1, 1], [block, 1, 1])
    }

    pub(super) fn with_shared(self, bytes: u32) -> Size {
        Size { shared: bytes, ..self }
    }

    /// Size `E` of kernels.h.
    pub(super) fn elements(n: usize) -> Size {
        Size::blocks(pieces(n, 1024, 65536), 256)
    }

    /// Size `R` of kernels.h.
    pub(super) fn matrix(rows: usize, width: usize) -> Size {
        Size::new([pieces(width, 128, 256), pieces(rows, 8, 65535), 1], [32, 8, 1])
    }

    /// As [`Size::matrix`], for random numbers, where eight counters serve a group of 32 columns.
    pub(super) fn draws(rows: usize, width: usize) -> Size {
        Size::matrix(rows, width.div_ceil(32) * 8)
    }

    /// Size `W` of kernels.h.
    pub(super) fn rows(rows: usize) -> Size {
        Size::new([pieces(rows, 8, 65536), 1, 1], [32, 8, 1])
    }

    /// Size `C` of kernels.h, with the rows of a chunk and the number of chunks.
    pub(super) fn columns(rows: usize, width: usize) -> (Size, usize, usize) {
        let chunk = rows.div_ceil(128).max(64);
        let chunks = rows.div_ceil(chunk);
        (Size::new([pieces(width, 32, usize::MAX), chunks as u32, 1], [32, 8, 1]), chunk, chunks)
    }

    /// Size `F` of kernels.h.
    pub(super) fn partials(width: usize) -> Size {
        Size::new([pieces(width, 32, usize::MAX), 1, 1], [32, 8, 1])
    }

    /// As [`Size::rows`], for grids with another maximum.
    pub(super) fn of(n: usize, by: usize, most: usize, block: [u32; 3]) -> Size {
        Size::new([pieces(n, by, most), 1, 1], block)
    }
}

/// Two 32-bit numbers as one of 64 bits, the first in the lower half.
pub(super) fn pair(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

/// A size as a 32-bit number, as kernels take it.
///
/// # Errors
/// [`Error::Operands`] if it has more than 32 bits.
pub(super) fn small(n: usize) -> Result<u32> {
    u32::try_from(n).map_err(|_| too_large(n))
}

fn too_large(n: usize) -> Error {
    Error::Operands {
        operation: "launch",
        message: format!("{n} rows or columns are more than a kernel takes"),
    }
}

/// Launches a kernel with arguments.
macro_rules! launch {
    ($cuda:expr, $kernel:expr, $size:expr, [$($argument:expr),* $(,)?]) => {{
        let arguments = $crate::kernels::cuda::launch::Arguments::default()$(.add($argument))*;
        // SAFETY: the arguments are those that `kernels.h` lists for the kernel. Addresses are of views that are inside
        // their memory and whose sizes `check` has compared, or of scratch memory allocated for the launch.
        unsafe { arguments.launch(&$cuda.driver, $kernel, $size) }
    }};
}
pub(super) use launch;

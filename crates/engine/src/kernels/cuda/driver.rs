//! What the backend needs of a card: memory, copies, launches, matrix products.
//!
//! Two implementations: [`super::nvidia`] is a card, [`super::emulated`] runs the same kernels on the CPU. Everything
//! above is the same code for both, so tests without a card reach all of it but the calls of NVIDIA's libraries.

use crate::Result;
use crate::collective::Collective;
use std::ffi::{CStr, c_void};
use std::sync::Arc;

/// A card, or its emulation. All operations are done in the order of the calls, as in one stream; only
/// [`Driver::download`] and [`Driver::synchronise`] wait.
///
/// # Safety
/// What the unsafe methods are given is inside live allocations of the same driver, as large as the operation says.
pub(super) trait Driver: std::fmt::Debug + Send + Sync {
    /// A new allocation of unspecified content, aligned to 256 bytes; `bytes` is not 0.
    ///
    /// # Errors
    /// [`crate::Error::DeviceMemory`] where there is not enough.
    fn allocate(&self, bytes: usize) -> Result<u64>;
    /// Frees an allocation when what was asked for before is done. Failures are the next operation's.
    unsafe fn free(&self, address: u64);
    /// Zeros.
    unsafe fn zero(&self, address: u64, bytes: usize) -> Result<()>;
    /// Host to device. The host's memory may change after the call.
    unsafe fn upload(&self, to: u64, from: &[u8]) -> Result<()>;
    /// Device to host; waits.
    unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<()>;
    /// Device to device, between ranges that do not overlap.
    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()>;
    /// Runs a kernel of `kernels.h`.
    unsafe fn launch(
        &self,
        kernel: &'static CStr,
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
        arguments: &mut [*mut c_void],
    ) -> Result<()>;
    /// One matrix product.
    unsafe fn matmul(&self, product: &Product) -> Result<()>;
    /// Waits for all that was asked for.
    fn synchronise(&self) -> Result<()>;
    /// Meets the cards of the other ranks, unless it has; all ranks call it.
    ///
    /// # Errors
    /// [`crate::Error::Device`] where they do not find each other, [`crate::Error::Collective`] where a rank is lost.
    fn join(&self, collective: &dyn Collective) -> Result<()>;
    /// Asks for sums and copies over the ranks that were met. All ranks ask for the same. Where one is lost, the next wait
    /// fails.
    unsafe fn exchange(&self, calls: &[Call]) -> Result<()>;
}

/// What happens to a range of f32 values that all ranks have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Move {
    /// One rank gets their sum over all ranks; the others keep theirs.
    Sum,
    /// All ranks get those of one.
    Copy,
}

/// One of several sums or copies over ranks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    pub(super) what: Move,
    /// The rank that gets the sum, or gives its values.
    pub(super) root: usize,
    pub(super) address: u64,
    /// Values; not 0.
    pub(super) count: usize,
}

/// Types of the factors of a product; sums and results are f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Factors {
    /// bf16 in memory.
    Bf16,
    /// f32 in memory, of which 10 bits of the fraction count.
    Tf32,
    /// f32.
    F32,
}

/// A factor of a product: a matrix in memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Factor {
    pub(super) address: u64,
    /// Elements between the starts of two of its rows, as it lies in memory.
    pub(super) stride: usize,
    /// It lies as its transpose.
    pub(super) transposed: bool,
}

/// `c[m, n] (+)= a[m, k] · b[k, n] + bias[n]`, none of the sizes 0.
#[derive(Clone, Copy, Debug)]
pub(super) struct Product {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) factors: Factors,
    pub(super) a: Factor,
    pub(super) b: Factor,
    pub(super) c: u64,
    pub(super) c_stride: usize,
    pub(super) accumulate: bool,
    pub(super) bias: Option<u64>,
}

/// Memory of a driver, freed in the order of its operations when it is dropped.
#[derive(Debug)]
pub(super) struct Allocation {
    driver: Arc<dyn Driver>,
    address: u64,
    bytes: usize,
}

impl Allocation {
    /// `bytes` of unspecified content.
    pub(super) fn new(driver: &Arc<dyn Driver>, bytes: usize) -> Result<Allocation> {
        let address = driver.allocate(bytes.max(1))?;
        Ok(Allocation { driver: Arc::clone(driver), address, bytes })
    }

    /// `bytes` of zeros.
    pub(super) fn zeros(driver: &Arc<dyn Driver>, bytes: usize) -> Result<Allocation> {
        let new = Allocation::new(driver, bytes)?;
        if bytes > 0 {
            // SAFETY: just allocated with this size.
            unsafe { driver.zero(new.address, bytes)? };
        }
        Ok(new)
    }

    /// A copy of bytes of the host.
    pub(super) fn of(driver: &Arc<dyn Driver>, from: &[u8]) -> Result<Allocation> {
        let new = Allocation::new(driver, from.len())?;
        new.write(0, from)?;
        Ok(new)
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Overwrites the bytes from `start` on.
    pub(super) fn write(&self, start: usize, from: &[u8]) -> Result<()> {
        self.inside(start, from.len());
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: inside, as just checked.
        unsafe { self.driver.upload(self.address + start as u64, from) }
    }

    /// Reads the bytes from `start` on; waits.
    pub(super) fn read(&self, start: usize, to: &mut [u8]) -> Result<()> {
        self.inside(start, to.len());
        if to.is_empty() {
            return Ok(());
        }
        // SAFETY: inside, as just checked.
        unsafe { self.driver.download(self.address + start as u64, to) }
    }

    fn inside(&self, start: usize, len: usize) {
        assert!(start <= self.bytes && len <= self.bytes - start, "{start}+{len} of {} bytes", self.bytes);
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: allocated by this driver, and only freed here.
        unsafe { self.driver.free(self.address) };
    }
}

//! What the backend needs of a card: memory, copies, launches, matrix products.
//!
//! [`super::nvidia`] is a real card, [`super::emulated`] runs the same kernels on the CPU, [`super::dry`] only counts
//! memory. All layers above share the same code, so tests without a card cover everything except the calls of NVIDIA's
//! libraries.

use crate::Result;
use crate::collective::Collective;
use std::ffi::{CStr, c_void};

/// A card, or its emulation. Operations run in the order of the calls, as in one stream; only [`Driver::download`],
/// [`Driver::wait`] and [`Driver::synchronise`] wait. Callers use it through [`super::stream::Stream`].
///
/// # Safety
/// The arguments of the unsafe methods are inside live allocations of the same driver, with at least the size that the
/// operation accesses.
pub(super) trait Driver: std::fmt::Debug + Send + Sync {
    /// A new allocation of unspecified content, aligned to 256 bytes; `bytes` is not 0.
    ///
    /// # Errors
    /// [`crate::Error::DeviceMemory`] if there is not enough memory.
    fn allocate(&self, bytes: usize) -> Result<u64>;
    /// Frees an allocation once all previous operations are done. A failure is reported by the next operation.
    unsafe fn free(&self, address: u64);
    /// Allocates page-locked host memory; `None` for a driver that reads nothing.
    fn page_locked(&self, bytes: usize) -> Result<Option<*mut u8>>;
    /// Frees it; no issued operation may still use it.
    unsafe fn free_page_locked(&self, memory: *mut u8, bytes: usize);
    /// Page-locked memory to device. The copy may run at any time after the call, before later operations.
    unsafe fn upload(&self, to: u64, from: *const u8, bytes: usize) -> Result<()>;
    /// Records an event in the stream, under a small number. A number that is reused marks only the new place.
    fn record(&self, event: usize) -> Result<()>;
    /// Waits until the stream has reached a recorded event.
    fn wait(&self, event: usize) -> Result<()>;
    /// Device to host, waiting for the copy.
    unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<()>;
    /// Sets bytes to zero.
    unsafe fn zero(&self, address: u64, bytes: usize) -> Result<()>;
    /// Device to device, between ranges that do not overlap.
    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()>;
    /// Runs a kernel of `kernels.h`.
    unsafe fn launch(&self, launch: &Launch) -> Result<()>;
    /// One matrix product.
    unsafe fn matmul(&self, product: &Product) -> Result<()>;
    /// Waits for all issued operations.
    fn synchronise(&self) -> Result<()>;
    /// Makes a graph of commands, to be replayed in order; nothing runs yet.
    unsafe fn graph(&self, commands: &[Command]) -> Result<u64>;
    /// Changes the sizes and arguments of a command of a graph, from the next replay on. Its kind and its kernel stay
    /// the same.
    unsafe fn change(&self, graph: u64, place: usize, command: &Command) -> Result<()>;
    /// Runs a graph.
    unsafe fn replay(&self, graph: u64) -> Result<()>;
    /// Frees a graph once its replays are done.
    unsafe fn forget(&self, graph: u64);
    /// Connects to the cards of the other ranks, unless already connected; all ranks must call it.
    ///
    /// # Errors
    /// [`crate::Error::Device`] if they do not find each other, [`crate::Error::Collective`] if a rank is lost.
    fn join(&self, collective: &dyn Collective) -> Result<()>;
    /// Issues sums and copies over the connected ranks. All ranks must issue the same calls. If a rank is lost, the
    /// next wait fails.
    unsafe fn exchange(&self, calls: &[Call]) -> Result<()>;
}

/// An operation on a range of f32 values that exists on all ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Move {
    /// One rank gets the sum over all ranks; the others keep their values.
    Sum,
    /// All ranks get the values of one rank.
    Copy,
}

/// One of several sums or copies over ranks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    pub(super) what: Move,
    /// The rank that receives the sum, or provides the values.
    pub(super) root: usize,
    pub(super) address: u64,
    /// Number of values; not 0.
    pub(super) count: usize,
}

/// An operation that runs on a card without the host.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Command {
    Zero { address: u64, bytes: usize },
    Copy { to: u64, from: u64, bytes: usize },
    Launch(Launch),
    Product(Product),
}

impl Command {
    /// Issues it to a driver.
    ///
    /// # Safety
    /// As the methods of [`Driver`].
    pub(super) unsafe fn run(&self, driver: &dyn Driver) -> Result<()> {
        // SAFETY: guaranteed by the caller.
        unsafe {
            match self {
                Command::Zero { address, bytes } => driver.zero(*address, *bytes),
                Command::Copy { to, from, bytes } => driver.copy(*to, *from, *bytes),
                Command::Launch(launch) => driver.launch(launch),
                Command::Product(product) => driver.matmul(product),
            }
        }
    }

    /// True if a graph's command can be changed to the other one.
    pub(super) fn is_like(&self, other: &Command) -> bool {
        match (self, other) {
            (Command::Launch(a), Command::Launch(b)) => a.kernel == b.kernel,
            _ => std::mem::discriminant(self) == std::mem::discriminant(other),
        }
    }
}

/// A launch of a kernel.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Launch {
    pub(super) kernel: &'static CStr,
    pub(super) grid: [u32; 3],
    pub(super) block: [u32; 3],
    /// Bytes of shared memory.
    pub(super) shared: u32,
    /// The arguments as words, and the index at which each argument starts.
    pub(super) words: Vec<u64>,
    pub(super) starts: Vec<usize>,
}

impl Launch {
    /// The addresses of the arguments, which are only read.
    pub(super) fn arguments(&self) -> Vec<*mut c_void> {
        self.starts.iter().map(|start| (&raw const self.words[*start]).cast_mut().cast()).collect()
    }
}

/// Types of the factors of a product; sums and results are f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Factors {
    /// bf16 in memory.
    Bf16,
    /// f32 in memory, of which 10 fraction bits are used.
    Tf32,
    /// f32.
    F32,
}

/// A factor of a product: a matrix in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Factor {
    pub(super) address: u64,
    /// Elements between the starts of two rows, as stored in memory.
    pub(super) stride: usize,
    /// True if it is stored transposed.
    pub(super) transposed: bool,
}

/// `c[m, n] (+)= a[m, k] · b[k, n] + bias[n]`; no size is 0.
#[derive(Clone, Copy, Debug, PartialEq)]
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

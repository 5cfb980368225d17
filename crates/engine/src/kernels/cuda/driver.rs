//! What the backend needs of a card: memory, copies, launches, matrix products.
//!
//! [`super::nvidia`] is a card, [`super::emulated`] runs the same kernels on the CPU, [`super::dry`] does nothing and
//! counts memory. Everything above is the same code for all, so tests without a card reach all of it but the calls of
//! NVIDIA's libraries.

use crate::Result;
use crate::collective::Collective;
use std::ffi::{CStr, c_void};

/// A card, or its emulation. All operations are done in the order of the calls, as in one stream; only
/// [`Driver::download`], [`Driver::wait`] and [`Driver::synchronise`] wait. [`super::stream::Stream`] stands before it.
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
    /// Page-locked memory of the host; `None` for a driver that reads nothing.
    fn page_locked(&self, bytes: usize) -> Result<Option<*mut u8>>;
    /// Gives it back; nothing that was asked for uses it any more.
    unsafe fn free_page_locked(&self, memory: *mut u8, bytes: usize);
    /// Page-locked memory to device, at any time after the call and before what is asked for later.
    unsafe fn upload(&self, to: u64, from: *const u8, bytes: usize) -> Result<()>;
    /// Marks a place in the stream, under a small number. A number that was used before marks the new place only.
    fn record(&self, event: usize) -> Result<()>;
    /// Waits until the stream has come to a marked place.
    fn wait(&self, event: usize) -> Result<()>;
    /// Device to host; waits.
    unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<()>;
    /// Zeros.
    unsafe fn zero(&self, address: u64, bytes: usize) -> Result<()>;
    /// Device to device, between ranges that do not overlap.
    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()>;
    /// Runs a kernel of `kernels.h`.
    unsafe fn launch(&self, launch: &Launch) -> Result<()>;
    /// One matrix product.
    unsafe fn matmul(&self, product: &Product) -> Result<()>;
    /// Waits for all that was asked for.
    fn synchronise(&self) -> Result<()>;
    /// Makes a graph of commands, to be replayed in their order; nothing runs yet.
    unsafe fn graph(&self, commands: &[Command]) -> Result<u64>;
    /// Gives a command of a graph other sizes and arguments, from the next replay on. Its kind, and its kernel, stay.
    unsafe fn change(&self, graph: u64, place: usize, command: &Command) -> Result<()>;
    /// Runs a graph.
    unsafe fn replay(&self, graph: u64) -> Result<()>;
    /// Frees a graph, when its replays are done.
    unsafe fn forget(&self, graph: u64);
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

/// What runs on a card without the host.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Command {
    Zero { address: u64, bytes: usize },
    Copy { to: u64, from: u64, bytes: usize },
    Launch(Launch),
    Product(Product),
}

impl Command {
    /// Asks a driver for it.
    ///
    /// # Safety
    /// As the methods of [`Driver`].
    pub(super) unsafe fn run(&self, driver: &dyn Driver) -> Result<()> {
        // SAFETY: by the caller.
        unsafe {
            match self {
                Command::Zero { address, bytes } => driver.zero(*address, *bytes),
                Command::Copy { to, from, bytes } => driver.copy(*to, *from, *bytes),
                Command::Launch(launch) => driver.launch(launch),
                Command::Product(product) => driver.matmul(product),
            }
        }
    }

    /// True where a graph's command can be changed to the other one.
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
    /// The words of the arguments, and where each argument starts.
    pub(super) words: Vec<u64>,
    pub(super) starts: Vec<usize>,
}

impl Launch {
    /// The addresses of the arguments, which are read only.
    pub(super) fn arguments(&self) -> Vec<*mut c_void> {
        self.starts.iter().map(|start| (&raw const self.words[*start]).cast_mut().cast()).collect()
    }
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
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Factor {
    pub(super) address: u64,
    /// Elements between the starts of two of its rows, as it lies in memory.
    pub(super) stride: usize,
    /// It lies as its transpose.
    pub(super) transposed: bool,
}

/// `c[m, n] (+)= a[m, k] · b[k, n] + bias[n]`, none of the sizes 0.
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

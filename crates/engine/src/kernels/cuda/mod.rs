//! NVIDIA cards, detected at run time: neither the build nor the user needs a CUDA toolkit.
//!
//! Kernels are our own CUDA C (`*.cu`), compiled ahead of time and embedded; matrix products use cuBLASLt. [`Cuda`]
//! uses a small interface (`driver`), implemented by a real card and, for tests, by an emulation on the CPU. All
//! operations are issued in one order and only reads wait, so a pass takes as long as the card's work.
//!
//! Determinism: sums are over pieces that depend on the shapes alone and are combined in a fixed order; cuBLASLt's
//! algorithms and workspace are fixed by shape. The same card, driver and library give the same bytes.

mod allocation;
mod attention;
mod backend;
mod copies;
mod cublaslt;
mod driver;
mod dry;
mod emulated;
pub mod found;
mod graphs;
mod grouped;
mod images;
mod launch;
pub mod nccl;
mod norms;
mod nvidia;
mod optimizers;
mod packed;
mod products;
mod ranks;
mod region;
mod staging;
mod stream;
mod tiles;

use super::buffers::Memory;
use super::{Bytes, Dtype, Indices, View, check};
use crate::dtype::WeightType;
use crate::{Error, Result};
use allocation::{Allocation, Work};
use attention::Plan;
use copies::{DeviceBuffer, Shared, elements};
use driver::Driver;
#[doc(hidden)]
pub use emulated::Fault;
use found::Card;
use packed::DevicePacked;
use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use stream::Stream;
pub use stream::Usage;

/// Types of the factors of matrix products and of attention; sums and all other values are f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// Rounded to bf16.
    #[default]
    Bf16,
    /// Matrix products in TF32 (10 fraction bits); attention in f32.
    Tf32,
    /// f32.
    F32,
}

impl Precision {
    /// Bytes per element of the copy that a card keeps of weights of this type, in the type that products take; 0 if it
    /// keeps none.
    pub(crate) fn copy_bytes(self, kind: WeightType) -> usize {
        match (self, kind) {
            (Precision::Bf16, WeightType::F32 | WeightType::F16) => 2,
            _ => 0,
        }
    }
}

/// Bytes of a card that the driver, the kernels and cuBLASLt use.
pub(crate) const OVERHEAD: u64 = (600 << 20) + cublaslt::WORKSPACE as u64;

/// Elements of logits computed at once (512 MiB): a product of a few hundred rows keeps a card busy.
pub(crate) const LOGITS: usize = 128 << 20;

/// A read-only tensor in the card's memory: of a file, or packed.
#[derive(Debug)]
struct DeviceTensor {
    /// Its values in its own type; `None` if only products read it, and they use the copy.
    memory: Option<Allocation>,
    size: usize,
    /// Its values in bf16, if products use these.
    copy: Option<Allocation>,
    packed: Option<DevicePacked>,
}

/// A list in the card's memory.
#[derive(Debug)]
struct DeviceList {
    memory: Allocation,
    len: usize,
    /// Set if it can be the offsets of this many slots, in ascending order.
    slots: Option<usize>,
}

/// One card.
#[derive(Debug)]
pub struct Cuda {
    // Freed before its driver.
    memory: Memory<DeviceBuffer, DeviceTensor, DeviceList, Plan, Allocation>,
    /// The values of the one-byte codes (optimizer states, nested scales), uploaded on first use.
    codes: Option<[Allocation; 2]>,
    /// The tables of experts' weights, by their words.
    tables: HashMap<Vec<u64>, Allocation>,
    driver: Arc<Stream>,
    precision: Precision,
    /// Keep copies of weights for products ([`Backend::keep_factor`](super::Backend::keep_factor)).
    keeps_copies: bool,
    /// Activations that several products read.
    shared: Mutex<Vec<Shared>>,
    /// Number of elements that were rounded for products.
    rounded: Arc<AtomicU64>,
}

impl Cuda {
    /// Opens a card.
    ///
    /// # Errors
    /// [`Error::Device`] if it cannot be opened, with the remedy.
    pub fn open(card: &Card, precision: Precision) -> Result<Cuda> {
        let image = images::of(card.compute).ok_or_else(|| Error::Device {
            message: format!("there are no kernels for {}", card.name),
            help: "use a later card, or device=cpu".into(),
        })?;
        let driver = nvidia::Nvidia::open(card.number, &card.name, &image.unpack()?)?;
        Ok(Cuda::over(Box::new(driver), precision))
    }

    /// A card emulated on the CPU, with `memory` bytes; `seed` decides the order in which threads run.
    ///
    /// # Errors
    /// [`Error::Device`] if the library does not load.
    ///
    /// # Safety
    /// `library` is the emulation built from these kernels (`tests/emulation`).
    #[doc(hidden)]
    pub unsafe fn emulated(
        library: &Path,
        precision: Precision,
        seed: u32,
        memory: usize,
        fault: Fault,
    ) -> Result<Cuda> {
        // SAFETY: guaranteed by the caller.
        let driver = unsafe { emulated::Emulated::load(library, seed, memory, fault)? };
        Ok(Cuda::over(Box::new(driver), precision))
    }

    /// A card that computes nothing and has no memory: it counts the memory that a model would use on a real one
    /// ([`Cuda::usage`]).
    pub(crate) fn dry(precision: Precision) -> Cuda {
        Cuda::over(Box::new(dry::Dry::new()), precision)
    }

    fn over(driver: Box<dyn Driver>, precision: Precision) -> Cuda {
        Cuda {
            memory: Memory::default(),
            codes: None,
            tables: HashMap::new(),
            driver: Arc::new(Stream::new(driver)),
            precision,
            keeps_copies: true,
            shared: Mutex::default(),
            rounded: Arc::default(),
        }
    }

    /// The same card with or without CUDA graphs for passes whose sizes repeat; a new card has them.
    #[must_use]
    pub fn with_graphs(self, graphs: bool) -> Cuda {
        self.driver.use_graphs(graphs);
        self
    }

    /// Counts of the operations on the card so far.
    pub fn usage(&self) -> Usage {
        self.driver.usage()
    }

    /// Scratch memory of an operation.
    fn work(&self, bytes: usize) -> Result<Work> {
        Work::new(&self.driver, bytes)
    }

    /// The same card, keeping no copies of weights: they are rounded for each product.
    #[doc(hidden)]
    #[must_use]
    pub fn without_copies(self) -> Cuda {
        Cuda { keeps_copies: false, ..self }
    }

    /// The number of elements that were rounded for products.
    #[doc(hidden)]
    pub fn rounded(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.rounded)
    }

    fn count_rounded(&self, n: usize) {
        self.rounded.fetch_add(n as u64, Ordering::Relaxed);
    }

    /// The address of a view's first element, for reading; 0 for a view without elements.
    fn source(&self, view: View) -> Result<u64> {
        if view.extent() == 0 {
            return Ok(0);
        }
        let (address, len) = match view.dtype() {
            Dtype::F32 => {
                let buffer = self.memory.buffer(view)?;
                (buffer.address(view.start), buffer.len())
            }
            Dtype::File(_) | Dtype::Packed(_) => match self.memory.file(view)? {
                Some(DeviceTensor { memory: Some(memory), size, .. }) => {
                    (memory.address() + (view.start * size) as u64, memory.bytes() / size)
                }
                Some(_) => return Err(only_products()),
                None => unreachable!("a view of a file has its type"),
            },
        };
        assert!(elements(view).end <= len, "views are cut from buffers: {view:?}");
        Ok(address)
    }

    /// The same for writing: copies of the range become stale.
    fn target(&self, view: View) -> Result<u64> {
        let address = self.source(view)?;
        if view.extent() > 0 {
            self.memory.buffer(view)?.written(&elements(view));
            self.forget(view);
        }
        Ok(address)
    }

    /// The addresses of views: those to write and those to read.
    ///
    /// # Errors
    /// When a view to write overlaps another one, or a view is of another backend or of freed memory.
    fn addresses<const O: usize, const I: usize>(
        &self,
        outs: [View; O],
        ins: [View; I],
    ) -> Result<([u64; O], [u64; I])> {
        check::apart(&outs, &ins)?;
        let (mut out, mut read) = ([0; O], [0; I]);
        for (to, view) in out.iter_mut().zip(outs) {
            *to = self.target(view)?;
        }
        for (to, view) in read.iter_mut().zip(ins) {
            *to = self.source(view)?;
        }
        Ok((out, read))
    }

    /// The address of a range of indices.
    fn list(&self, indices: Indices) -> Result<u64> {
        let (list, range) = self.memory.list(indices)?;
        assert!(range.end <= list.len, "runs are cut from lists: {indices:?}");
        Ok(list.memory.address() + 4 * range.start as u64)
    }

    /// The address of a range of bytes.
    fn bytes(&self, bytes: Bytes) -> Result<u64> {
        let range = bytes.range();
        let memory = self.memory.kept_bytes(bytes)?;
        assert!(range.end <= memory.bytes(), "runs are cut from buffers: {bytes:?}");
        Ok(memory.address() + range.start as u64)
    }

    /// Fills a contiguous view with zeros.
    fn zero(&self, view: View) -> Result<()> {
        assert!(view.is_contiguous(), "{view:?}");
        if view.len() == 0 {
            return Ok(());
        }
        // SAFETY: `target` checks that the view is inside its memory.
        unsafe { self.driver.zero(self.target(view)?, 4 * view.len()) }
    }
}

/// The bytes of f32 values.
fn as_bytes(values: &[f32]) -> &[u8] {
    // SAFETY: every f32 is four initialised bytes.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// The bytes of f32 values, to be overwritten.
fn as_bytes_mut(values: &mut [f32]) -> &mut [u8] {
    // SAFETY: as above; any four bytes are a valid f32.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

/// The type of a view's elements as stored in memory; for a packed matrix, the type that it is unpacked to.
fn lies_as(view: View) -> WeightType {
    match view.dtype() {
        Dtype::F32 | Dtype::Packed(_) => WeightType::F32,
        Dtype::File(kind) => kind,
    }
}

fn only_products() -> Error {
    let message = "a tensor of which only products have the values".into();
    Error::Operands { operation: "memory", message }
}

//! The card of tests: kernels run on the CPU by an emulation of CUDA, and matrix products are plain loops.

use super::driver::{Call, Driver, Factor, Factors, Product};
use super::nccl::{Communicator, Nccl, Stream};
use crate::collective::Collective;
use crate::{Error, Result};
use half::bf16;
use std::alloc::{Layout, alloc, dealloc};
use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

type Launch =
    unsafe extern "C" fn(*const c_char, *const u32, *const u32, u32, *mut *mut c_void, u32) -> c_int;
type LaunchError = unsafe extern "C" fn() -> *const c_char;
type NewStream = unsafe extern "C" fn(u32, Owns, *const c_void) -> *mut c_void;
type OfStream = unsafe extern "C" fn(*mut c_void);
/// Says whether memory is live.
type Owns = extern "C" fn(*const c_void, u64, usize) -> c_int;

/// Sizes of allocations, by address.
type Sizes = Mutex<HashMap<u64, usize>>;

/// The emulation, a library made from the kernels' sources.
#[derive(Debug)]
pub(super) struct Emulated {
    launch: Launch,
    error: LaunchError,
    /// What connects it with the cards of other ranks. Before the stream that it uses.
    ranks: OnceLock<Communicator>,
    /// What the emulated NCCL does, it does later; everything else waits for it, as in one stream.
    stream: OnceLock<Later>,
    path: PathBuf,
    /// Keeps the functions.
    library: libloading::Library,
    /// The order in which threads of a block run follows from it; every launch has another.
    seed: AtomicU32,
    sizes: Box<Sizes>,
    /// Bytes that there are.
    limit: usize,
}

impl Emulated {
    /// Loads the library.
    ///
    /// # Safety
    /// The file is the emulation that `tests/emulation` builds.
    pub(super) unsafe fn load(path: &Path, seed: u32, limit: usize) -> Result<Emulated> {
        let failed = |e: libloading::Error| Error::Device {
            message: format!("{}: {e}", path.display()),
            help: "build the emulation of crates/engine/tests/emulation".into(),
        };
        // SAFETY: by the caller, whose promise covers the types of both functions.
        unsafe {
            let library = libloading::Library::new(path).map_err(failed)?;
            Ok(Emulated {
                launch: *library.get::<Launch>(b"launch").map_err(failed)?,
                error: *library.get::<LaunchError>(b"launch_error").map_err(failed)?,
                ranks: OnceLock::new(),
                stream: OnceLock::new(),
                path: path.to_path_buf(),
                library,
                seed: AtomicU32::new(seed),
                sizes: Box::default(),
                limit,
            })
        }
    }
}

/// A stream of the emulated NCCL.
#[derive(Debug)]
struct Later {
    stream: Stream,
    wait: OfStream,
    free: OfStream,
}

impl Drop for Later {
    fn drop(&mut self) {
        // SAFETY: made by `nccl_stream`, and forgotten here.
        unsafe { (self.free)(self.stream.0) };
    }
}

/// Whether a range is inside one of the allocations in `sizes`.
extern "C" fn owns(sizes: *const c_void, address: u64, bytes: usize) -> c_int {
    // SAFETY: `Emulated::join` passes its own list, which lives longer than the stream that asks.
    let sizes = unsafe { &*sizes.cast::<Sizes>() };
    let sizes = sizes.lock().unwrap_or_else(PoisonError::into_inner);
    let inside = |(start, size): (&u64, &usize)| {
        address.checked_sub(*start).is_some_and(|at| at as usize <= *size && bytes <= *size - at as usize)
    };
    sizes.iter().any(inside).into()
}

impl Emulated {
    /// Waits for what NCCL was asked for.
    fn settle(&self) {
        if let Some(later) = self.stream.get() {
            // SAFETY: the stream lives as long as `later`.
            unsafe { (later.wait)(later.stream.0) };
        }
    }
}

fn layout(bytes: usize) -> Option<Layout> {
    Layout::from_size_align(bytes, 256).ok()
}

/// Element `(i, j)` of a factor.
///
/// # Safety
/// It is in memory.
unsafe fn element(f: &Factor, factors: Factors, i: usize, j: usize) -> f64 {
    let at = if f.transposed { j * f.stride + i } else { i * f.stride + j };
    // SAFETY: by the caller.
    unsafe {
        match factors {
            Factors::Bf16 => bf16::from_bits((f.address as *const u16).add(at).read()).to_f64(),
            Factors::Tf32 => tf32((f.address as *const f32).add(at).read()),
            Factors::F32 => f64::from((f.address as *const f32).add(at).read()),
        }
    }
}

/// The nearest number of 10 bits of fraction.
fn tf32(x: f32) -> f64 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0xfff + ((bits >> 13) & 1)) & !0x1fff;
    f64::from(if x.is_finite() { f32::from_bits(rounded) } else { x })
}

impl Driver for Emulated {
    fn allocate(&self, bytes: usize) -> Result<u64> {
        let mut sizes = self.sizes.lock().unwrap_or_else(PoisonError::into_inner);
        let used: usize = sizes.values().sum();
        let (free, total) = ((self.limit - used) as u64, self.limit as u64);
        let refused = || Error::DeviceMemory { bytes: bytes as u64, free, total, device: "emulation".into() };
        let layout = layout(bytes).filter(|_| bytes as u64 <= free).ok_or_else(refused)?;
        // SAFETY: callers ask for at least one byte.
        let start = unsafe { alloc(layout) };
        if start.is_null() {
            return Err(refused());
        }
        // What is not written must not matter: NaN in f32 and in bf16.
        // SAFETY: just allocated.
        unsafe { start.write_bytes(0xff, bytes) };
        sizes.insert(start as u64, bytes);
        Ok(start as u64)
    }

    unsafe fn free(&self, address: u64) {
        self.settle();
        let bytes = self.sizes.lock().unwrap_or_else(PoisonError::into_inner).remove(&address);
        if let Some(layout) = bytes.and_then(layout) {
            // SAFETY: allocated above with this layout, and in the list until now.
            unsafe { dealloc(address as *mut u8, layout) };
        }
    }

    unsafe fn zero(&self, address: u64, bytes: usize) -> Result<()> {
        self.settle();
        // SAFETY: by the caller.
        unsafe { (address as *mut u8).write_bytes(0, bytes) };
        Ok(())
    }

    unsafe fn upload(&self, to: u64, from: &[u8]) -> Result<()> {
        self.settle();
        // SAFETY: by the caller; the host's slice is not in an allocation.
        unsafe { (to as *mut u8).copy_from_nonoverlapping(from.as_ptr(), from.len()) };
        Ok(())
    }

    unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<()> {
        self.synchronise()?;
        // SAFETY: as above.
        unsafe { to.as_mut_ptr().copy_from_nonoverlapping(from as *const u8, to.len()) };
        Ok(())
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        self.settle();
        // SAFETY: by the caller.
        unsafe { (to as *mut u8).copy_from_nonoverlapping(from as *const u8, bytes) };
        Ok(())
    }

    unsafe fn launch(
        &self,
        kernel: &'static CStr,
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        self.settle();
        let seed = self.seed.fetch_add(1, Ordering::Relaxed);
        // SAFETY: by the caller, and by that of `load`.
        unsafe {
            let rc = (self.launch)(
                kernel.as_ptr(),
                grid.as_ptr(),
                block.as_ptr(),
                shared,
                arguments.as_mut_ptr(),
                seed,
            );
            if rc == 0 {
                return Ok(());
            }
            let message = CStr::from_ptr((self.error)()).to_string_lossy().into_owned();
            Err(Error::Device { message, help: String::new() })
        }
    }

    unsafe fn matmul(&self, p: &Product) -> Result<()> {
        self.settle();
        for i in 0..p.m {
            for j in 0..p.n {
                // SAFETY: by the caller.
                unsafe {
                    let term = |l| element(&p.a, p.factors, i, l) * element(&p.b, p.factors, l, j);
                    let sum: f64 = (0..p.k).map(term).sum();
                    let bias = p.bias.map_or(0.0, |bias| f64::from((bias as *const f32).add(j).read()));
                    let c = (p.c as *mut f32).add(i * p.c_stride + j);
                    let old = if p.accumulate { f64::from(c.read()) } else { 0.0 };
                    c.write((sum + bias + old) as f32);
                }
            }
        }
        Ok(())
    }

    fn synchronise(&self) -> Result<()> {
        self.settle();
        self.ranks.get().map_or(Ok(()), Communicator::settled)
    }

    fn join(&self, collective: &dyn Collective) -> Result<()> {
        if let Some(ranks) = self.ranks.get() {
            return ranks.is_of(collective);
        }
        let failed = |e: libloading::Error| Error::Device { message: e.to_string(), help: String::new() };
        // SAFETY: by the caller of `load`, whose promise covers these functions; the list of sizes has a place of its own,
        // which lives longer than the stream.
        unsafe {
            let new = *self.library.get::<NewStream>(b"nccl_stream").map_err(failed)?;
            let wait = *self.library.get::<OfStream>(b"nccl_stream_wait").map_err(failed)?;
            let free = *self.library.get::<OfStream>(b"nccl_stream_free").map_err(failed)?;
            let stream =
                Stream(new(self.seed.load(Ordering::Relaxed), owns, (&raw const *self.sizes).cast()));
            let stream = self.stream.get_or_init(|| Later { stream, wait, free }).stream;
            let _ = self.ranks.set(Communicator::join(Nccl::load(&self.path)?, stream, collective)?);
        }
        Ok(())
    }

    unsafe fn exchange(&self, calls: &[Call]) -> Result<()> {
        // SAFETY: by the caller.
        self.ranks.get().map_or(Ok(()), |ranks| unsafe { ranks.run(calls) })
    }
}

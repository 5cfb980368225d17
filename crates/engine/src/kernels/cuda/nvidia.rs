//! A real card: NVIDIA's driver, which is loaded at run time.

use super::cublaslt::{Products, WORKSPACE};
use super::driver::{Call, Command, Driver, Launch, Product};
use super::found::{self, failure};
use super::graphs::{Captures, Graphs};
use super::nccl::{Communicator, Nccl, Stream};
use crate::collective::Collective;
use crate::{Error, Result};
use cudarc::driver::{result as cu, sys};
use std::collections::HashMap;
use std::ffi::{CStr, c_void};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Shared memory that a launch may use without opting in to more.
const PLAIN_SHARED: u32 = 48 << 10;

/// A card with one stream, on which all operations run.
pub(super) struct Nvidia {
    name: String,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    module: sys::CUmodule,
    functions: Mutex<HashMap<&'static CStr, Function>>,
    products: Mutex<Products>,
    /// Events, by their numbers.
    events: Mutex<HashMap<usize, sys::CUevent>>,
    graphs: Mutex<Graphs>,
    /// The connection to the cards of other ranks.
    ranks: OnceLock<Communicator>,
}

// SAFETY: the driver's handles may be used from any thread once its context is current there, which every method
// ensures; anything that is not safe to use from two threads at once is behind a mutex.
unsafe impl Send for Nvidia {}
// SAFETY: as above.
unsafe impl Sync for Nvidia {}

impl std::fmt::Debug for Nvidia {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nvidia").field("name", &self.name).finish_non_exhaustive()
    }
}

#[derive(Clone, Copy)]
struct Function {
    handle: sys::CUfunction,
    /// Bytes of shared memory that it may currently use.
    shared: u32,
}

impl Nvidia {
    /// Opens a card with the kernels in `image`.
    pub(super) fn open(number: usize, name: &str, image: &[u8]) -> Result<Nvidia> {
        let ordinal = i32::try_from(number).unwrap_or(i32::MAX);
        let failed = |what: &'static str| move |e| failure(what, e);
        let device = cu::device::get(ordinal).map_err(failed("cuDeviceGet"))?;
        // SAFETY: the device was returned by the driver; handles are used only while `self` lives, which frees them. If
        // opening fails half-way they stay allocated until the process ends, which it does with this error.
        unsafe {
            let context = cu::primary_ctx::retain(device).map_err(|e| found::unavailable(name, e))?;
            cu::ctx::set_current(context).map_err(failed("cuCtxSetCurrent"))?;
            let stream =
                cu::stream::create(cu::stream::StreamKind::NonBlocking).map_err(failed("cuStreamCreate"))?;
            keep_freed_memory(device)?;
            let module =
                cu::module::load_data(image.as_ptr().cast()).map_err(|e| found::old_image(name, e))?;
            let workspace = cu::malloc_async(stream, WORKSPACE).map_err(failed("cuMemAllocAsync"))?;
            let products = Products::open(name, workspace)?;
            Ok(Nvidia {
                name: name.to_string(),
                device,
                context,
                stream,
                module,
                functions: Mutex::default(),
                products: Mutex::new(products),
                events: Mutex::default(),
                graphs: Mutex::default(),
                ranks: OnceLock::new(),
            })
        }
    }

    /// An event by its number.
    fn event(&self, number: usize) -> Result<sys::CUevent> {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        match events.get(&number) {
            Some(known) => Ok(*known),
            None => {
                let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
                let new = cu::event::create(flags).map_err(|e| failure("cuEventCreate", e))?;
                events.insert(number, new);
                Ok(new)
            }
        }
    }

    /// Makes the context current in this thread.
    fn enter(&self) -> Result<()> {
        // SAFETY: the context lives as long as `self`.
        unsafe { cu::ctx::set_current(self.context) }.map_err(|e| failure("cuCtxSetCurrent", e))
    }

    /// A kernel, with its shared-memory limit raised to what this launch needs.
    fn function(&self, kernel: &'static CStr, shared: u32) -> Result<sys::CUfunction> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        let known = match functions.get(kernel) {
            Some(known) => *known,
            None => {
                // SAFETY: the module is loaded.
                let handle = unsafe { cu::module::get_function(self.module, kernel.into()) }
                    .map_err(|e| failure("cuModuleGetFunction", e))?;
                Function { handle, shared: PLAIN_SHARED }
            }
        };
        let wanted = known.shared.max(shared);
        if wanted > known.shared {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function belongs to a loaded module.
            unsafe { cu::function::set_function_attribute(known.handle, attribute, wanted as i32) }
                .map_err(|e| failure("cuFuncSetAttribute", e))?;
        }
        functions.insert(kernel, Function { shared: wanted, ..known });
        Ok(known.handle)
    }
}

impl Drop for Nvidia {
    fn drop(&mut self) {
        // Before the stream, which it uses.
        drop(self.ranks.take());
        let products = self.products.get_mut().unwrap_or_else(PoisonError::into_inner);
        let events = self.events.get_mut().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: nothing uses the handles after this; any that fail to be freed stay until the process ends.
        unsafe {
            let _ = cu::ctx::set_current(self.context);
            let _ = cu::stream::synchronize(self.stream);
            for event in events.values() {
                let _ = cu::event::destroy(*event);
            }
            let _ = cu::free_async(products.close(), self.stream);
            let _ = cu::stream::destroy(self.stream);
            let _ = cu::module::unload(self.module);
            let _ = cu::primary_ctx::release(self.device);
        }
    }
}

/// Keeps freed memory in the process for the next allocation: by default every synchronisation returns it to the
/// system.
///
/// # Safety
/// The device was returned by the driver.
unsafe fn keep_freed_memory(device: sys::CUdevice) -> Result<()> {
    let mut all = u64::MAX;
    // SAFETY: guaranteed by the caller; the attribute is a u64.
    unsafe {
        let pool =
            cu::device::get_default_mem_pool(device).map_err(|e| failure("cuDeviceGetDefaultMemPool", e))?;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut all).cast())
            .result()
            .map_err(|e| failure("cuMemPoolSetAttribute", e))
    }
}

impl Captures for Nvidia {
    fn node(&self, launch: &Launch, arguments: &mut [*mut c_void]) -> Result<sys::CUDA_KERNEL_NODE_PARAMS> {
        let ([x, y, z], [bx, by, bz]) = (launch.grid, launch.block);
        Ok(sys::CUDA_KERNEL_NODE_PARAMS {
            func: self.function(launch.kernel, launch.shared)?,
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: bx,
            blockDimY: by,
            blockDimZ: bz,
            sharedMemBytes: launch.shared,
            kernelParams: arguments.as_mut_ptr(),
            extra: std::ptr::null_mut(),
            kern: std::ptr::null_mut(),
            ctx: std::ptr::null_mut(),
        })
    }

    unsafe fn captured(&self, command: &Command) -> Result<sys::CUgraph> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives as long as `self`; the caller guarantees the rest.
        unsafe {
            cu::stream::begin_capture(self.stream, mode).map_err(|e| failure("cuStreamBeginCapture", e))?;
            let asked = command.run(self);
            let graph = cu::stream::end_capture(self.stream).map_err(|e| failure("cuStreamEndCapture", e));
            asked.and(graph)
        }
    }

    fn stream(&self) -> sys::CUstream {
        self.stream
    }
}

impl Driver for Nvidia {
    fn allocate(&self, bytes: usize) -> Result<u64> {
        self.enter()?;
        // SAFETY: the stream lives as long as `self`.
        match unsafe { cu::malloc_async(self.stream, bytes) } {
            Ok(address) => Ok(address),
            Err(e) if e.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let (free, total) = cu::mem_get_info().unwrap_or_default();
                let (bytes, free, total) = (bytes as u64, free as u64, total as u64);
                Err(Error::DeviceMemory { bytes, free, total, device: self.name.clone() })
            }
            Err(e) => Err(failure("cuMemAllocAsync", e)),
        }
    }

    unsafe fn free(&self, address: u64) {
        // If it fails the context is lost, which the next operation reports.
        if self.enter().is_ok() {
            // SAFETY: guaranteed by the caller.
            let _ = unsafe { cu::free_async(address, self.stream) };
        }
    }

    unsafe fn zero(&self, address: u64, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: guaranteed by the caller.
        unsafe { cu::memset_d8_async(address, 0, bytes, self.stream) }
            .map_err(|e| failure("cuMemsetD8Async", e))
    }

    fn page_locked(&self, bytes: usize) -> Result<Option<*mut u8>> {
        self.enter()?;
        // SAFETY: the memory is written before it is read.
        let memory = unsafe { cu::malloc_host(bytes, 0) }.map_err(|e| failure("cuMemHostAlloc", e))?;
        Ok(Some(memory.cast()))
    }

    unsafe fn free_page_locked(&self, memory: *mut u8, _: usize) {
        if self.enter().is_ok() {
            // SAFETY: guaranteed by the caller.
            let _ = unsafe { cu::free_host(memory.cast()) };
        }
    }

    unsafe fn upload(&self, to: u64, from: *const u8, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: guaranteed by the caller.
        unsafe {
            let from = std::slice::from_raw_parts(from, bytes);
            cu::memcpy_htod_async(to, from, self.stream).map_err(|e| failure("cuMemcpyHtoDAsync", e))
        }
    }

    fn record(&self, event: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: event and stream live as long as `self`.
        unsafe { cu::event::record(self.event(event)?, self.stream) }.map_err(|e| failure("cuEventRecord", e))
    }

    fn wait(&self, event: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: the event lives as long as `self`.
        unsafe { cu::event::synchronize(self.event(event)?) }.map_err(|e| failure("cuEventSynchronize", e))
    }

    unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<()> {
        self.enter()?;
        // SAFETY: guaranteed by the caller; the copy has finished before the call returns.
        unsafe {
            cu::memcpy_dtoh_async(to, from, self.stream).map_err(|e| failure("cuMemcpyDtoHAsync", e))?;
        }
        self.synchronise()
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: guaranteed by the caller.
        unsafe { cu::memcpy_dtod_async(to, from, bytes, self.stream) }
            .map_err(|e| failure("cuMemcpyDtoDAsync", e))
    }

    unsafe fn launch(&self, launch: &Launch) -> Result<()> {
        self.enter()?;
        let function = self.function(launch.kernel, launch.shared)?;
        let ([gx, gy, gz], [bx, by, bz]) = (launch.grid, launch.block);
        let (grid, block) = ((gx, gy, gz), (bx, by, bz));
        // SAFETY: guaranteed by the caller.
        let done = unsafe {
            cu::launch_kernel(function, grid, block, launch.shared, self.stream, &mut launch.arguments())
        };
        done.map_err(|e| failure(&format!("launch of {}", launch.kernel.to_string_lossy()), e))
    }

    unsafe fn matmul(&self, p: &Product) -> Result<()> {
        self.enter()?;
        let mut products = self.products.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: guaranteed by the caller.
        unsafe { products.run(p, self.stream) }
    }

    fn synchronise(&self) -> Result<()> {
        self.enter()?;
        // SAFETY: the stream lives as long as `self`.
        unsafe { cu::stream::synchronize(self.stream) }.map_err(|e| failure("cuStreamSynchronize", e))?;
        self.ranks.get().map_or(Ok(()), Communicator::settled)
    }

    fn join(&self, collective: &dyn Collective) -> Result<()> {
        if let Some(ranks) = self.ranks.get() {
            return ranks.is_of(collective);
        }
        let nccl = Nccl::found()?;
        self.enter()?;
        // SAFETY: the context is current, and the stream lives as long as `self`.
        let ranks = unsafe { Communicator::join(nccl, Stream(self.stream.cast()), collective)? };
        let _ = self.ranks.set(ranks);
        Ok(())
    }

    unsafe fn exchange(&self, calls: &[Call]) -> Result<()> {
        self.enter()?;
        // SAFETY: guaranteed by the caller.
        self.ranks.get().map_or(Ok(()), |ranks| unsafe { ranks.run(calls) })
    }

    unsafe fn graph(&self, commands: &[Command]) -> Result<u64> {
        self.enter()?;
        let mut graphs = self.graphs.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: guaranteed by the caller.
        unsafe { graphs.make(self, commands) }
    }

    unsafe fn change(&self, graph: u64, place: usize, command: &Command) -> Result<()> {
        self.enter()?;
        let mut graphs = self.graphs.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: guaranteed by the caller.
        unsafe { graphs.change(self, graph, place, command) }
    }

    unsafe fn replay(&self, graph: u64) -> Result<()> {
        self.enter()?;
        let graphs = self.graphs.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: guaranteed by the caller.
        unsafe { graphs.replay(self, graph) }
    }

    unsafe fn forget(&self, graph: u64) {
        if self.enter().is_ok() {
            let mut graphs = self.graphs.lock().unwrap_or_else(PoisonError::into_inner);
            graphs.forget(graph);
        }
    }
}

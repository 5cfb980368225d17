//! A card: NVIDIA's driver and cuBLASLt, which are looked up at run time.

use super::driver::{Call, Command, Driver, Factor, Factors, Launch, Product};
use super::found::{self, failure};
use super::graphs::{Captures, Graphs};
use super::nccl::{Communicator, Nccl, Stream};
use crate::collective::Collective;
use crate::{Error, Result};
use cudarc::cublaslt::{result as lt, sys as lt_sys};
use cudarc::driver::{result as cu, sys};
use std::collections::HashMap;
use std::ffi::{CStr, c_void};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Work space of cuBLASLt. Its algorithms are chosen for this size, so the size is part of what decides bytes.
pub(super) const WORKSPACE: usize = 32 << 20;

/// Shared memory that a launch may have without being asked for.
const PLAIN_SHARED: u32 = 48 << 10;

/// A card with one stream, which everything is done on.
pub(super) struct Nvidia {
    name: String,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    module: sys::CUmodule,
    functions: Mutex<HashMap<&'static CStr, Function>>,
    products: Mutex<Products>,
    /// By their numbers.
    events: Mutex<HashMap<usize, sys::CUevent>>,
    graphs: Mutex<Graphs>,
    /// What connects it with the cards of other ranks.
    ranks: OnceLock<Communicator>,
}

// SAFETY: the driver's handles may be used from any thread once its context is current there, which every method sees
// to; what is not safe to use from two threads at once is behind a mutex.
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
    /// Bytes of shared memory that it may have.
    shared: u32,
}

/// cuBLASLt, and the algorithms that it chose.
struct Products {
    handle: lt_sys::cublasLtHandle_t,
    workspace: u64,
    algorithms: HashMap<Shape, lt_sys::cublasLtMatmulAlgo_t>,
}

/// What an algorithm is chosen for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    sizes: [usize; 3],
    strides: [usize; 3],
    transposed: [bool; 2],
    factors: Factors,
    accumulate: bool,
    bias: bool,
    /// Largest power of two, up to 256, that divides the addresses of both factors, and of the result and the bias.
    alignments: [u32; 3],
}

impl Nvidia {
    /// Opens a card with the kernels in `image`.
    pub(super) fn open(number: usize, name: &str, image: &[u8]) -> Result<Nvidia> {
        let ordinal = i32::try_from(number).unwrap_or(i32::MAX);
        let failed = |what: &'static str| move |e| failure(what, e);
        let device = cu::device::get(ordinal).map_err(failed("cuDeviceGet"))?;
        // SAFETY: the device is one that the driver gave us; handles are used as long as `self` lives, which frees
        // them. Where opening fails half-way they are the process's, which ends with the error.
        unsafe {
            let context = cu::primary_ctx::retain(device).map_err(|e| found::unavailable(name, e))?;
            cu::ctx::set_current(context).map_err(failed("cuCtxSetCurrent"))?;
            let stream =
                cu::stream::create(cu::stream::StreamKind::NonBlocking).map_err(failed("cuStreamCreate"))?;
            keep_freed_memory(device)?;
            let module =
                cu::module::load_data(image.as_ptr().cast()).map_err(|e| found::old_image(name, e))?;
            let workspace = cu::malloc_async(stream, WORKSPACE).map_err(failed("cuMemAllocAsync"))?;
            let handle = lt::create_handle().map_err(|e| found::cublas(name, e))?;
            let products = Products { handle, workspace, algorithms: HashMap::new() };
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

    /// A kernel, with as much shared memory as it needs.
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
            // SAFETY: the function is of a loaded module.
            unsafe { cu::function::set_function_attribute(known.handle, attribute, wanted as i32) }
                .map_err(|e| failure("cuFuncSetAttribute", e))?;
        }
        functions.insert(kernel, Function { shared: wanted, ..known });
        Ok(known.handle)
    }
}

impl Drop for Nvidia {
    fn drop(&mut self) {
        // It uses the stream.
        drop(self.ranks.take());
        let products = self.products.get_mut().unwrap_or_else(PoisonError::into_inner);
        let events = self.events.get_mut().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: nothing uses the handles after this; failures leave them to the end of the process.
        unsafe {
            let _ = cu::ctx::set_current(self.context);
            let _ = cu::stream::synchronize(self.stream);
            for event in events.values() {
                let _ = cu::event::destroy(*event);
            }
            let _ = lt::destroy_handle(products.handle);
            let _ = cu::free_async(products.workspace, self.stream);
            let _ = cu::stream::destroy(self.stream);
            let _ = cu::module::unload(self.module);
            let _ = cu::primary_ctx::release(self.device);
        }
    }
}

/// Memory that was freed stays with the process, for the next allocation: without this every synchronisation gives it
/// back to the system.
///
/// # Safety
/// The device is one that the driver gave us.
unsafe fn keep_freed_memory(device: sys::CUdevice) -> Result<()> {
    let mut all = u64::MAX;
    // SAFETY: by the caller; the attribute is a u64.
    unsafe {
        let pool =
            cu::device::get_default_mem_pool(device).map_err(|e| failure("cuDeviceGetDefaultMemPool", e))?;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut all).cast())
            .result()
            .map_err(|e| failure("cuMemPoolSetAttribute", e))
    }
}

fn product_failure(call: &str, error: lt::CublasError) -> Error {
    Error::Device {
        message: format!("cuBLASLt's {call} failed: {:?}", error.0),
        help: "the library and the driver may not fit each other: install the cuBLAS of the CUDA version that `suasion \
               env` shows for the driver"
            .into(),
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
        // SAFETY: the stream lives as long as `self`; the rest is by the caller.
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
        // Where it fails the context is lost, which the next operation reports.
        if self.enter().is_ok() {
            // SAFETY: by the caller.
            let _ = unsafe { cu::free_async(address, self.stream) };
        }
    }

    unsafe fn zero(&self, address: u64, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: by the caller.
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
            // SAFETY: by the caller.
            let _ = unsafe { cu::free_host(memory.cast()) };
        }
    }

    unsafe fn upload(&self, to: u64, from: *const u8, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: by the caller.
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
        // SAFETY: by the caller; the copy has ended before `to` is returned.
        unsafe {
            cu::memcpy_dtoh_async(to, from, self.stream).map_err(|e| failure("cuMemcpyDtoHAsync", e))?;
        }
        self.synchronise()
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        self.enter()?;
        // SAFETY: by the caller.
        unsafe { cu::memcpy_dtod_async(to, from, bytes, self.stream) }
            .map_err(|e| failure("cuMemcpyDtoDAsync", e))
    }

    unsafe fn launch(&self, launch: &Launch) -> Result<()> {
        self.enter()?;
        let function = self.function(launch.kernel, launch.shared)?;
        let ([gx, gy, gz], [bx, by, bz]) = (launch.grid, launch.block);
        let (grid, block) = ((gx, gy, gz), (bx, by, bz));
        // SAFETY: by the caller.
        let done = unsafe {
            cu::launch_kernel(function, grid, block, launch.shared, self.stream, &mut launch.arguments())
        };
        done.map_err(|e| failure(&format!("launch of {}", launch.kernel.to_string_lossy()), e))
    }

    unsafe fn matmul(&self, p: &Product) -> Result<()> {
        self.enter()?;
        let mut products = self.products.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: by the caller.
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
        // SAFETY: by the caller.
        self.ranks.get().map_or(Ok(()), |ranks| unsafe { ranks.run(calls) })
    }

    unsafe fn graph(&self, commands: &[Command]) -> Result<u64> {
        self.enter()?;
        let mut graphs = self.graphs.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: by the caller.
        unsafe { graphs.make(self, commands) }
    }

    unsafe fn change(&self, graph: u64, place: usize, command: &Command) -> Result<()> {
        self.enter()?;
        let mut graphs = self.graphs.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: by the caller.
        unsafe { graphs.change(self, graph, place, command) }
    }

    unsafe fn replay(&self, graph: u64) -> Result<()> {
        self.enter()?;
        let graphs = self.graphs.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: by the caller.
        unsafe { graphs.replay(self, graph) }
    }

    unsafe fn forget(&self, graph: u64) {
        if self.enter().is_ok() {
            let mut graphs = self.graphs.lock().unwrap_or_else(PoisonError::into_inner);
            graphs.forget(graph);
        }
    }
}

/// A descriptor of cuBLASLt, destroyed when it is dropped.
struct Owned<T: Copy>(T, unsafe fn(T) -> Result<(), lt::CublasError>);

impl<T: Copy> Drop for Owned<T> {
    fn drop(&mut self) {
        // SAFETY: created by cuBLASLt, and destroyed here only.
        let _ = unsafe { (self.1)(self.0) };
    }
}

type Layout = Owned<lt_sys::cublasLtMatrixLayout_t>;

/// cuBLASLt is column-major, so what lies row-major is the transpose to it: `c = a · b` becomes `cᵀ = bᵀ · aᵀ`, with
/// `b` as its first factor. A factor that lies as its transpose is transposed by the operation.
impl Products {
    /// Runs a product.
    ///
    /// # Safety
    /// As [`Driver::matmul`], in the current context.
    unsafe fn run(&mut self, p: &Product, stream: sys::CUstream) -> Result<()> {
        let failed = |call: &'static str| move |e| product_failure(call, e);
        let (compute, kind) = match p.factors {
            Factors::Bf16 => {
                (lt_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, lt_sys::cudaDataType::CUDA_R_16BF)
            }
            Factors::Tf32 => {
                (lt_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32, lt_sys::cudaDataType::CUDA_R_32F)
            }
            Factors::F32 => {
                (lt_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, lt_sys::cudaDataType::CUDA_R_32F)
            }
        };
        let single = lt_sys::cudaDataType::CUDA_R_32F;
        let (one, beta) = (1f32, if p.accumulate { 1f32 } else { 0f32 });
        // SAFETY: descriptors are those just made; addresses are by the caller.
        unsafe {
            let description = Owned(
                lt::create_matmul_desc(compute, single).map_err(failed("MatmulDescCreate"))?,
                lt::destroy_matmul_desc,
            );
            use lt_sys::cublasLtMatmulDescAttributes_t as Attribute;
            // `cublasOperation_t`: CUBLAS_OP_N and CUBLAS_OP_T.
            let operation = |f: &Factor| i32::from(f.transposed);
            describe(&description, Attribute::CUBLASLT_MATMUL_DESC_TRANSA, operation(&p.b))?;
            describe(&description, Attribute::CUBLASLT_MATMUL_DESC_TRANSB, operation(&p.a))?;
            if let Some(bias) = p.bias {
                let epilogue = lt_sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
                describe(&description, Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue)?;
                describe(&description, Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias)?;
            }
            let first = layout(kind, &p.b, p.k, p.n)?;
            let second = layout(kind, &p.a, p.m, p.k)?;
            let result = Factor { address: p.c, stride: p.c_stride, transposed: false };
            let result = layout(single, &result, p.m, p.n)?;
            let shape = Shape::of(p);
            let algorithm = match self.algorithms.get(&shape) {
                Some(known) => *known,
                None => {
                    let chosen = self.choose(shape, &description, &first, &second, &result)?;
                    self.algorithms.insert(shape, chosen);
                    chosen
                }
            };
            lt::matmul(
                self.handle,
                description.0,
                (&raw const one).cast(),
                (&raw const beta).cast(),
                p.b.address as *const c_void,
                first.0,
                p.a.address as *const c_void,
                second.0,
                p.c as *const c_void,
                result.0,
                p.c as *mut c_void,
                result.0,
                &algorithm,
                self.workspace as *mut c_void,
                WORKSPACE,
                stream.cast(),
            )
            .map_err(failed("Matmul"))
        }
    }

    /// The algorithm that cuBLASLt thinks is fastest: a function of the shape, the library and the card. Partial sums
    /// of a product that is split are f32 in the work space, never added in an order that varies.
    fn choose(
        &self,
        shape: Shape,
        description: &Owned<lt_sys::cublasLtMatmulDesc_t>,
        first: &Layout,
        second: &Layout,
        result: &Layout,
    ) -> Result<lt_sys::cublasLtMatmulAlgo_t> {
        use lt_sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let failed = |call: &'static str| move |e| product_failure(call, e);
        let wanted = Owned(
            lt::create_matmul_pref().map_err(failed("MatmulPreferenceCreate"))?,
            lt::destroy_matmul_pref,
        );
        let set = |attribute, value: &[u8]| {
            // SAFETY: the value is of the attribute's type, by the calls below.
            unsafe { lt::set_matmul_pref_attribute(wanted.0, attribute, value.as_ptr().cast(), value.len()) }
                .map_err(failed("MatmulPreferenceSetAttribute"))
        };
        set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE.to_ne_bytes())?;
        let scheme = lt_sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        set(Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &scheme.to_ne_bytes())?;
        let [a, b, c] = shape.alignments;
        for (attribute, alignment) in [
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, b),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, a),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, c),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, c),
        ] {
            set(attribute, &alignment.to_ne_bytes())?;
        }
        // SAFETY: descriptors live here and in the caller.
        let chosen = unsafe {
            lt::get_matmul_algo_heuristic(
                self.handle,
                description.0,
                first.0,
                second.0,
                result.0,
                result.0,
                wanted.0,
            )
        };
        Ok(chosen.map_err(failed("MatmulAlgoGetHeuristic"))?.algo)
    }
}

/// Sets an attribute of a description.
///
/// # Safety
/// The value is of the attribute's type.
unsafe fn describe<T>(
    of: &Owned<lt_sys::cublasLtMatmulDesc_t>,
    attribute: lt_sys::cublasLtMatmulDescAttributes_t,
    value: T,
) -> Result<()> {
    // SAFETY: by the caller.
    unsafe { lt::set_matmul_desc_attribute(of.0, attribute, (&raw const value).cast(), size_of::<T>()) }
        .map_err(|e| product_failure("MatmulDescSetAttribute", e))
}

/// The layout of a factor of `rows × width`: columns are what lies together.
fn layout(kind: lt_sys::cudaDataType, f: &Factor, rows: usize, width: usize) -> Result<Layout> {
    let (lying, of) = if f.transposed { (rows, width) } else { (width, rows) };
    let made = lt::create_matrix_layout(kind, lying as u64, of as u64, f.stride as i64);
    Ok(Owned(made.map_err(|e| product_failure("MatrixLayoutCreate", e))?, lt::destroy_matrix_layout))
}

impl Shape {
    fn of(p: &Product) -> Shape {
        let alignment = |address: u64| 1 << address.trailing_zeros().min(8);
        // The epilogue reads the bias as wide as it writes the result.
        let written = p.c | p.bias.unwrap_or(0);
        Shape {
            sizes: [p.m, p.n, p.k],
            strides: [p.a.stride, p.b.stride, p.c_stride],
            transposed: [p.a.transposed, p.b.transposed],
            factors: p.factors,
            accumulate: p.accumulate,
            bias: p.bias.is_some(),
            alignments: [p.a.address, p.b.address, written].map(alignment),
        }
    }
}

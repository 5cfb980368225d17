//! The card used in tests: kernels run on the CPU by an emulation of CUDA, and matrix products are plain loops.

use super::driver::{Call, Command, Driver, Factor, Factors, Launch, Product};
use super::nccl::{Communicator, Nccl, Stream};
use crate::collective::Collective;
use crate::{Error, Result};
use half::bf16;
use std::alloc::{Layout, alloc, dealloc};
use std::collections::{HashMap, VecDeque};
use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

type LaunchFunction =
    unsafe extern "C" fn(*const c_char, *const u32, *const u32, u32, *mut *mut c_void, u32) -> c_int;
type LaunchError = unsafe extern "C" fn() -> *const c_char;
type NewStream = unsafe extern "C" fn(u32, Owns, *const c_void) -> *mut c_void;
type OfStream = unsafe extern "C" fn(*mut c_void);
/// Checks whether memory is live.
type Owns = extern "C" fn(*const c_void, u64, usize) -> c_int;

/// Sizes of allocations, by address.
type Sizes = Mutex<HashMap<u64, usize>>;

/// A fault injected into the card, which tests must detect.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    #[default]
    None,
    /// Page-locked memory is overwritten while uploads from it are pending.
    WaitsForNoEvent,
    /// Graphs keep the arguments with which they were made.
    ChangesNoGraph,
}

/// The emulation, a library built from the kernels' sources. As on a card, operations run later than they are issued;
/// the seed decides at which of the following calls.
#[derive(Debug)]
pub(super) struct Emulated {
    launch: LaunchFunction,
    error: LaunchError,
    /// The connection to the cards of other ranks. Dropped before the stream that it uses.
    ranks: OnceLock<Communicator>,
    /// The emulated NCCL runs its operations later; everything else waits for it, as in one stream.
    stream: OnceLock<Later>,
    path: PathBuf,
    /// Keeps the functions loaded.
    library: libloading::Library,
    sizes: Box<Sizes>,
    /// Bytes of memory.
    limit: usize,
    fault: Fault,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Determines the order in which the threads of a block run; every launch has a different one.
    seed: u32,
    /// Random state that decides when tasks run.
    random: u64,
    used: usize,
    queue: VecDeque<Task>,
    /// Events that the stream has not reached: how often each is in the queue.
    marks: HashMap<usize, usize>,
    graphs: HashMap<u64, Vec<Command>>,
    next_graph: u64,
    /// The error that the next call reports.
    failed: Option<Error>,
}

#[derive(Debug)]
enum Task {
    Run(Command),
    Upload { to: u64, from: *const u8, bytes: usize },
    Free { address: u64, bytes: usize },
    Mark(usize),
}

// SAFETY: the memory that a task reads and writes is live until it has run, by the contract of `Driver`.
unsafe impl Send for Task {}

/// The largest number of pending tasks.
const WAITING: usize = 64;

impl Emulated {
    /// Loads the library.
    ///
    /// # Safety
    /// The file is the emulation that `tests/emulation` builds.
    pub(super) unsafe fn load(path: &Path, seed: u32, limit: usize, fault: Fault) -> Result<Emulated> {
        let failed = |e: libloading::Error| Error::Device {
            message: format!("{}: {e}", path.display()),
            help: "build the emulation of crates/engine/tests/emulation".into(),
        };
        // SAFETY: guaranteed by the caller, including the types of both functions.
        unsafe {
            let library = libloading::Library::new(path).map_err(failed)?;
            Ok(Emulated {
                launch: *library.get::<LaunchFunction>(b"launch").map_err(failed)?,
                error: *library.get::<LaunchError>(b"launch_error").map_err(failed)?,
                ranks: OnceLock::new(),
                stream: OnceLock::new(),
                path: path.to_path_buf(),
                library,
                sizes: Box::default(),
                limit,
                fault,
                state: Mutex::new(State {
                    seed,
                    random: u64::from(seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
                    used: 0,
                    queue: VecDeque::new(),
                    marks: HashMap::new(),
                    graphs: HashMap::new(),
                    next_graph: 0,
                    failed: None,
                }),
            })
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Issues tasks, and runs as many as the seed decides.
    fn ask(&self, tasks: impl IntoIterator<Item = Task>) -> Result<()> {
        let state = &mut *self.state();
        for task in tasks {
            if let Task::Mark(event) = task {
                *state.marks.entry(event).or_default() += 1;
            }
            state.queue.push_back(task);
            state.random ^= state.random << 13;
            state.random ^= state.random >> 7;
            state.random ^= state.random << 17;
            // Mostly none, so that many tasks become pending.
            let most = if state.random.is_multiple_of(8) {
                (state.random >> 32) as usize % WAITING
            } else {
                WAITING
            };
            while state.queue.len() > most {
                self.next(state);
            }
        }
        state.failed.take().map_or(Ok(()), Err)
    }

    /// Runs the oldest task.
    fn next(&self, state: &mut State) {
        let Some(task) = state.queue.pop_front() else { return };
        self.settle();
        // SAFETY: guaranteed by the callers who issued it.
        let done = unsafe {
            match task {
                Task::Run(command) => {
                    state.seed = state.seed.wrapping_add(1);
                    self.run(&command, state.seed)
                }
                Task::Upload { to, from, bytes } => {
                    (to as *mut u8).copy_from_nonoverlapping(from, bytes);
                    Ok(())
                }
                Task::Free { address, bytes } => {
                    self.sizes.lock().unwrap_or_else(PoisonError::into_inner).remove(&address);
                    if let Some(layout) = layout(bytes) {
                        dealloc(address as *mut u8, layout);
                    }
                    Ok(())
                }
                Task::Mark(event) => {
                    if let Some(count) = state.marks.get_mut(&event) {
                        *count -= 1;
                    }
                    Ok(())
                }
            }
        };
        if let (Err(error), None) = (done, &state.failed) {
            state.failed = Some(error);
        }
    }

    fn all(&self, state: &mut State) -> Result<()> {
        while !state.queue.is_empty() {
            self.next(state);
        }
        state.failed.take().map_or(Ok(()), Err)
    }

    /// # Safety
    /// As the methods of [`Driver`], and of `load`.
    unsafe fn run(&self, command: &Command, seed: u32) -> Result<()> {
        // SAFETY: guaranteed by the caller.
        unsafe {
            match command {
                Command::Zero { address, bytes } => (*address as *mut u8).write_bytes(0, *bytes),
                Command::Copy { to, from, bytes } => {
                    (*to as *mut u8).copy_from_nonoverlapping(*from as *const u8, *bytes);
                }
                Command::Product(product) => multiply(product),
                Command::Launch(launch) => {
                    let mut arguments = launch.arguments();
                    let rc = (self.launch)(
                        launch.kernel.as_ptr(),
                        launch.grid.as_ptr(),
                        launch.block.as_ptr(),
                        launch.shared,
                        arguments.as_mut_ptr(),
                        seed,
                    );
                    if rc != 0 {
                        let message = CStr::from_ptr((self.error)()).to_string_lossy().into_owned();
                        return Err(Error::Device { message, help: String::new() });
                    }
                }
            }
        }
        Ok(())
    }
}

impl Drop for Emulated {
    fn drop(&mut self) {
        let mut state = self.state();
        let done = self.all(&mut state);
        if !std::thread::panicking() {
            assert!(done.is_ok(), "{done:?}");
        }
    }
}

/// A product, by plain loops.
///
/// # Safety
/// As [`Driver::matmul`].
unsafe fn multiply(p: &Product) {
    for i in 0..p.m {
        for j in 0..p.n {
            // SAFETY: guaranteed by the caller.
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
        // SAFETY: made by `nccl_stream`, and freed only here.
        unsafe { (self.free)(self.stream.0) };
    }
}

/// Whether a range is inside one of the allocations in `sizes`.
extern "C" fn owns(sizes: *const c_void, address: u64, bytes: usize) -> c_int {
    // SAFETY: `Emulated::join` passes its own list, which outlives the stream that calls this.
    let sizes = unsafe { &*sizes.cast::<Sizes>() };
    let sizes = sizes.lock().unwrap_or_else(PoisonError::into_inner);
    let inside = |(start, size): (&u64, &usize)| {
        address.checked_sub(*start).is_some_and(|at| at as usize <= *size && bytes <= *size - at as usize)
    };
    sizes.iter().any(inside).into()
}

impl Emulated {
    /// Waits for all operations issued to NCCL.
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
    // SAFETY: guaranteed by the caller.
    unsafe {
        match factors {
            Factors::Bf16 => bf16::from_bits((f.address as *const u16).add(at).read()).to_f64(),
            Factors::Tf32 => tf32((f.address as *const f32).add(at).read()),
            Factors::F32 => f64::from((f.address as *const f32).add(at).read()),
        }
    }
}

/// The nearest number with 10 fraction bits.
fn tf32(x: f32) -> f64 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0xfff + ((bits >> 13) & 1)) & !0x1fff;
    f64::from(if x.is_finite() { f32::from_bits(rounded) } else { x })
}

impl Driver for Emulated {
    fn allocate(&self, bytes: usize) -> Result<u64> {
        let mut state = self.state();
        // Freed memory can be allocated again at once, as from a card's pool.
        let (free, total) = ((self.limit - state.used) as u64, self.limit as u64);
        let refused = || Error::DeviceMemory { bytes: bytes as u64, free, total, device: "emulation".into() };
        let layout = layout(bytes).filter(|_| bytes as u64 <= free).ok_or_else(refused)?;
        // SAFETY: callers allocate at least one byte.
        let start = unsafe { alloc(layout) };
        if start.is_null() {
            return Err(refused());
        }
        // Unwritten memory must not affect results: NaN in f32 and in bf16.
        // SAFETY: just allocated.
        unsafe { start.write_bytes(0xff, bytes) };
        state.used += bytes;
        self.sizes.lock().unwrap_or_else(PoisonError::into_inner).insert(start as u64, bytes);
        Ok(start as u64)
    }

    unsafe fn free(&self, address: u64) {
        let known = self.sizes.lock().unwrap_or_else(PoisonError::into_inner).get(&address).copied();
        let Some(bytes) = known else { return };
        self.state().used -= bytes;
        if let Err(error) = self.ask([Task::Free { address, bytes }]) {
            self.state().failed = Some(error);
        }
    }

    fn page_locked(&self, bytes: usize) -> Result<Option<*mut u8>> {
        let layout = layout(bytes).ok_or(Error::Memory { bytes: bytes as u64 })?;
        // SAFETY: callers allocate at least one byte.
        let start = unsafe { alloc(layout) };
        if start.is_null() { Err(Error::Memory { bytes: bytes as u64 }) } else { Ok(Some(start)) }
    }

    unsafe fn free_page_locked(&self, memory: *mut u8, bytes: usize) {
        if let Some(layout) = layout(bytes) {
            // SAFETY: guaranteed by the caller; allocated above with this layout.
            unsafe { dealloc(memory, layout) };
        }
    }

    unsafe fn upload(&self, to: u64, from: *const u8, bytes: usize) -> Result<()> {
        self.ask([Task::Upload { to, from, bytes }])
    }

    fn record(&self, event: usize) -> Result<()> {
        self.ask([Task::Mark(event)])
    }

    fn wait(&self, event: usize) -> Result<()> {
        let mut state = self.state();
        if self.fault == Fault::WaitsForNoEvent {
            return Ok(());
        }
        while state.marks.get(&event).is_some_and(|count| *count > 0) {
            self.next(&mut state);
        }
        state.failed.take().map_or(Ok(()), Err)
    }

    unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<()> {
        self.synchronise()?;
        // SAFETY: guaranteed by the caller; the host's slice is not in an allocation.
        unsafe { to.as_mut_ptr().copy_from_nonoverlapping(from as *const u8, to.len()) };
        Ok(())
    }

    unsafe fn zero(&self, address: u64, bytes: usize) -> Result<()> {
        self.ask([Task::Run(Command::Zero { address, bytes })])
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        self.ask([Task::Run(Command::Copy { to, from, bytes })])
    }

    unsafe fn launch(&self, launch: &Launch) -> Result<()> {
        self.ask([Task::Run(Command::Launch(launch.clone()))])
    }

    unsafe fn matmul(&self, product: &Product) -> Result<()> {
        self.ask([Task::Run(Command::Product(*product))])
    }

    fn synchronise(&self) -> Result<()> {
        self.all(&mut self.state())?;
        self.settle();
        self.ranks.get().map_or(Ok(()), Communicator::settled)
    }

    unsafe fn graph(&self, commands: &[Command]) -> Result<u64> {
        let mut state = self.state();
        let graph = state.next_graph;
        state.next_graph += 1;
        state.graphs.insert(graph, commands.to_vec());
        Ok(graph)
    }

    unsafe fn change(&self, graph: u64, place: usize, command: &Command) -> Result<()> {
        let mut state = self.state();
        let changed = state.graphs.get_mut(&graph).and_then(|commands| commands.get_mut(place));
        let changed = changed.filter(|old| old.is_like(command)).ok_or_else(|| Error::Device {
            message: format!("command {place} of graph {graph} cannot become {command:?}"),
            help: String::new(),
        })?;
        if self.fault != Fault::ChangesNoGraph {
            *changed = command.clone();
        }
        Ok(())
    }

    unsafe fn replay(&self, graph: u64) -> Result<()> {
        let commands = self.state().graphs.get(&graph).cloned().unwrap_or_default();
        self.ask(commands.into_iter().map(Task::Run))
    }

    unsafe fn forget(&self, graph: u64) {
        self.state().graphs.remove(&graph);
    }

    fn join(&self, collective: &dyn Collective) -> Result<()> {
        if let Some(ranks) = self.ranks.get() {
            return ranks.is_of(collective);
        }
        let seed = self.state().seed;
        let failed = |e: libloading::Error| Error::Device { message: e.to_string(), help: String::new() };
        // SAFETY: guaranteed by the caller of `load`, including these functions; the list of sizes is boxed and
        // outlives the stream.
        unsafe {
            let new = *self.library.get::<NewStream>(b"nccl_stream").map_err(failed)?;
            let wait = *self.library.get::<OfStream>(b"nccl_stream_wait").map_err(failed)?;
            let free = *self.library.get::<OfStream>(b"nccl_stream_free").map_err(failed)?;
            let stream = Stream(new(seed, owns, (&raw const *self.sizes).cast()));
            let stream = self.stream.get_or_init(|| Later { stream, wait, free }).stream;
            let _ = self.ranks.set(Communicator::join(Nccl::load(&self.path)?, stream, collective)?);
        }
        Ok(())
    }

    unsafe fn exchange(&self, calls: &[Call]) -> Result<()> {
        // Ranks wait for each other: pending operations must not wait for this rank's next call.
        self.all(&mut self.state())?;
        // SAFETY: guaranteed by the caller.
        self.ranks.get().map_or(Ok(()), |ranks| unsafe { ranks.run(calls) })
    }
}

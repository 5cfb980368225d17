//! NCCL, loaded at run time: sums and copies between the cards of ranks.
//!
//! cudarc has bindings too, but does not look for `libnccl.so.2`, the only name that NVIDIA's packages and wheels
//! install, and aborts the process if a function is missing. Only a dozen functions are needed.
//!
//! Communicators are non-blocking (NCCL 2.14 and later): while a call waits, it checks the state of the run, and a
//! watcher thread aborts the card's pending work if another rank is lost. All calls are `ncclReduce` and
//! `ncclBroadcast`, one for each rank's share in a group: shares may have different sizes, nothing is copied, and both
//! have only one algorithm, the ring, whose order of summation depends on the cards and their connections.

mod library;

use super::driver::{Call, Move};
use crate::collective::{Collective, Watch};
use crate::{Error, Result};
pub(super) use library::Nccl;
use library::{Code, Config, FLOAT, IN_PROGRESS, Id, SUCCESS, SUM};
pub use library::{Version, version};
use std::ffi::{c_int, c_void};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// The time limit for the cards of all ranks to find each other: the same as for ranks at startup.
const START: Duration = Duration::from_secs(300);
/// The time limit for a sum, including all operations issued before it: the same as for a message between ranks.
const MOST: Duration = Duration::from_secs(1800);
/// How long shutdown waits for the other ranks.
const FAREWELL: Duration = Duration::from_secs(10);
/// Polling interval for NCCL's state.
const PAUSE: Duration = Duration::from_micros(200);
/// Polling interval of the watcher thread.
const LOOK: Duration = Duration::from_millis(20);

/// Bytes of a card that NCCL's buffers use: in each of at most 32 channels, 9.2 MiB (4 for the protocol of large
/// messages, 4.7 for LL128, 0.5 for LL) per neighbour of the ring.
pub const OVERHEAD: u64 = 590 << 20;

/// An NCCL communicator; null once aborted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Handle(*mut c_void);

// SAFETY: NCCL's functions may be called from any thread, one at a time, which the mutex around the handle ensures.
unsafe impl Send for Handle {}

/// A driver stream, which lives as long as the driver that owns the communicator.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stream(pub(super) *mut c_void);

// SAFETY: the pointer is only passed on to NCCL.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

/// This rank's end of the connection between the cards of all ranks.
#[derive(Debug)]
pub(super) struct Communicator {
    shared: Arc<Shared>,
    stream: Stream,
    rank: usize,
    ranks: usize,
    beside: Option<JoinHandle<()>>,
}

/// State shared by a communicator and its watcher thread.
struct Shared {
    nccl: Arc<Nccl>,
    rank: usize,
    watch: Option<Arc<dyn Watch>>,
    state: Mutex<State>,
    changed: Condvar,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("nccl", &self.nccl).field("rank", &self.rank).finish_non_exhaustive()
    }
}

struct State {
    comm: Handle,
    /// The error that ended it.
    failure: Option<String>,
    /// Set while the card may be waiting for other ranks: since when.
    since: Option<Instant>,
    closing: bool,
}

/// Why an NCCL operation did not complete.
enum End {
    /// The run has failed on another rank.
    Lost(String),
    /// NCCL has failed on this rank.
    Failed(String),
}

impl Communicator {
    /// Connects to the other ranks. All operations run on `stream`.
    ///
    /// # Safety
    /// The card's context is current, and the stream lives as long as the communicator.
    ///
    /// # Errors
    /// [`Error::Device`] if the versions differ or the cards do not find each other; [`Error::Collective`] if a rank is
    /// lost.
    pub(super) unsafe fn join(
        nccl: Arc<Nccl>,
        stream: Stream,
        collective: &dyn Collective,
    ) -> Result<Communicator> {
        let (rank, ranks) = (collective.rank(), collective.ranks());
        let mut hello = nccl.version.0.map(u32::to_le_bytes).concat();
        if rank == 0 {
            let mut id = Id([0; 128]);
            // SAFETY: the call writes an id.
            let code = unsafe { (nccl.get_unique_id)(&mut id) };
            if code != SUCCESS {
                return Err(unmet(nccl.failure("ncclGetUniqueId", std::ptr::null_mut(), code)));
            }
            hello.extend(id.0);
        }
        let all = collective.exchange(&hello)?;
        for (other, theirs) in all.iter().enumerate() {
            // Patch releases of the same version are compatible.
            if theirs.get(..8) != all[0].get(..8) {
                let of = |hello: &[u8]| {
                    let words: Vec<u32> =
                        hello.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
                    <[u32; 3]>::try_from(words.get(..3).unwrap_or_default())
                        .map_or("another".into(), |words| Version(words).to_string())
                };
                return Err(Error::Device {
                    message: format!("rank {other} has NCCL {}, and rank 0 {}", of(theirs), of(&all[0])),
                    help: "install the same version of NCCL for all ranks".into(),
                });
            }
        }
        let id = all[0].get(12..).and_then(|id| id.try_into().ok()).ok_or_else(|| Error::Collective {
            message: "rank 0 sent no id of NCCL's: the ranks are not in step".into(),
        })?;
        let mut config = Config::without_blocking();
        let mut comm = std::ptr::null_mut();
        let (number, count) =
            (c_int::try_from(rank).unwrap_or(c_int::MAX), c_int::try_from(ranks).unwrap_or(c_int::MAX));
        // SAFETY: the id is from NCCL; the other arguments outlive the call.
        let code = unsafe { (nccl.init)(&mut comm, count, Id(id), number, &mut config) };
        let shared = Shared {
            nccl,
            rank,
            watch: collective.watch(),
            state: Mutex::new(State { comm: Handle(comm), failure: None, since: None, closing: false }),
            changed: Condvar::new(),
        };
        shared.finish(&mut shared.lock(), "ncclCommInitRankConfig", code, START).map_err(
            |end| match end {
                End::Lost(message) => Error::Collective { message },
                End::Failed(message) => unmet(message),
            },
        )?;
        let shared = Arc::new(shared);
        let of_thread = Arc::clone(&shared);
        let beside = thread::Builder::new().name("beside NCCL".into()).spawn(move || of_thread.stand_by());
        let beside = beside.map_err(|error| unmet(format!("no thread can be started: {error}")))?;
        Ok(Communicator { shared, stream, rank, ranks, beside: Some(beside) })
    }

    /// Rejects ranks other than those that it connects.
    ///
    /// # Errors
    /// [`Error::Collective`] for other ranks.
    pub(super) fn is_of(&self, collective: &dyn Collective) -> Result<()> {
        let (was, is) = ((self.rank, self.ranks), (collective.rank(), collective.ranks()));
        let message =
            || format!("the card is that of rank {} of {}, not of rank {} of {}", was.0, was.1, is.0, is.1);
        if was == is { Ok(()) } else { Err(Error::Collective { message: message() }) }
    }

    /// Issues calls as one group, after all operations issued to the stream. All ranks must issue the same calls.
    ///
    /// # Safety
    /// Their memory stays live until the stream has run them.
    ///
    /// # Errors
    /// [`Error::Collective`] if a rank is lost.
    pub(super) unsafe fn run(&self, calls: &[Call]) -> Result<()> {
        let Shared { nccl, .. } = &*self.shared;
        let mut state = self.shared.lock();
        check(&state)?;
        let Handle(comm) = state.comm;
        // SAFETY: the communicator is live, and locked; the caller guarantees the memory.
        let (what, code) = unsafe {
            let mut failed = ("ncclGroupStart", (nccl.group_start)());
            for call in calls {
                let (at, root) = (call.address as *mut c_void, call.root as c_int);
                let (what, code) = match call.what {
                    Move::Sum => {
                        let code = (nccl.reduce)(at, at, call.count, FLOAT, SUM, root, comm, self.stream.0);
                        ("ncclReduce", code)
                    }
                    Move::Copy => {
                        let code = (nccl.broadcast)(at, at, call.count, FLOAT, root, comm, self.stream.0);
                        ("ncclBroadcast", code)
                    }
                };
                if ![SUCCESS, IN_PROGRESS].contains(&code) && failed.1 == SUCCESS {
                    failed = (what, code);
                }
            }
            // Ends the group even after an error.
            let end = (nccl.group_end)();
            if failed.1 == SUCCESS { ("ncclGroupEnd", end) } else { failed }
        };
        state.since.get_or_insert_with(Instant::now);
        let done = self.shared.finish(&mut state, what, code, MOST);
        done.map_err(|(End::Lost(message) | End::Failed(message))| Error::Collective { message })
    }

    /// Checks that the results of the stream are valid; called when the stream has run everything. Aborted operations
    /// end too, and leave unspecified values in memory.
    ///
    /// # Errors
    /// [`Error::Collective`] if the communicator was aborted.
    pub(super) fn settled(&self) -> Result<()> {
        let mut state = self.shared.lock();
        state.since = None;
        check(&state)
    }
}

/// Returns an error after a failure.
fn check(state: &State) -> Result<()> {
    state.failure.clone().map_or(Ok(()), |message| Err(Error::Collective { message }))
}

/// The error for cards that do not find each other.
fn unmet(message: String) -> Error {
    Error::Device {
        message: format!("the cards of the ranks do not find each other: {message}"),
        help: "NCCL_DEBUG=INFO shows what NCCL tries; between machines NCCL_SOCKET_IFNAME names the network to use; \
               `suasion env` shows the versions of driver and NCCL"
            .into(),
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the host's part of an NCCL call is done. Aborts if it fails, or the run does.
    fn finish(&self, state: &mut State, call: &str, code: Code, most: Duration) -> Result<(), End> {
        let (mut code, started) = (code, Instant::now());
        loop {
            let end = match code {
                SUCCESS => return Ok(()),
                IN_PROGRESS => match self.watch.as_ref().and_then(|watch| watch.failure()) {
                    Some(message) => End::Lost(message),
                    None if started.elapsed() < most => {
                        thread::sleep(PAUSE);
                        // SAFETY: the communicator is live, and locked.
                        code = unsafe { self.nccl.state(state.comm.0) };
                        continue;
                    }
                    None => {
                        let seconds = most.as_secs();
                        End::Failed(format!(
                            "rank {}: NCCL's {call} has not ended within {seconds} seconds",
                            self.rank
                        ))
                    }
                },
                code => End::Failed(format!(
                    "rank {}: {}",
                    self.rank,
                    self.nccl.failure(call, state.comm.0, code)
                )),
            };
            let (End::Lost(message) | End::Failed(message)) = &end;
            self.abort(state, message.clone());
            return Err(end);
        }
    }

    /// Reports the failure to the run, and aborts the card's pending work.
    fn abort(&self, state: &mut State, message: String) {
        if let Some(watch) = self.watch.as_ref().filter(|_| !state.closing) {
            watch.fail(&message);
        }
        state.failure.get_or_insert(message);
        let Handle(comm) = std::mem::replace(&mut state.comm, Handle(std::ptr::null_mut()));
        if !comm.is_null() {
            // SAFETY: the communicator is live and locked, and its handle was just replaced by null.
            let _ = unsafe { (self.nccl.abort)(comm) };
        }
    }

    /// The watcher thread: checks periodically whether NCCL or the run has failed, until the communicator is dropped.
    fn stand_by(&self) {
        let mut state = self.lock();
        while !state.closing && state.failure.is_none() {
            // SAFETY: without a failure the communicator is live; it is locked.
            let code = unsafe { self.nccl.state(state.comm.0) };
            let lost = self.watch.as_ref().and_then(|watch| watch.failure());
            let own = if ![SUCCESS, IN_PROGRESS].contains(&code) {
                Some(self.nccl.failure("exchange between cards", state.comm.0, code))
            } else if state.since.is_some_and(|since| since.elapsed() > MOST) {
                Some(format!("its card has waited {} seconds for those of other ranks", MOST.as_secs()))
            } else {
                None
            };
            let own = own.map(|message| format!("rank {}: {message}", self.rank));
            if let Some(message) = lost.or(own) {
                self.abort(&mut state, message);
            }
            state = match self.changed.wait_timeout(state, LOOK) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.changed.notify_all();
        if let Some(beside) = self.beside.take() {
            let _ = beside.join();
        }
        let mut state = self.shared.lock();
        let Handle(comm) = state.comm;
        if comm.is_null() {
            return;
        }
        // SAFETY: the communicator is live, and no other thread has its handle any more.
        let code = unsafe { (self.shared.nccl.finalize)(comm) };
        // If the other ranks do not finish in time, it is aborted.
        if self.shared.finish(&mut state, "ncclCommFinalize", code, FAREWELL).is_ok() {
            // SAFETY: as above.
            let _ = unsafe { (self.shared.nccl.destroy)(comm) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// NVIDIA's own library, as far as it works without a card.
    #[test]
    fn the_real_library_is_read_and_says_what_it_lacks() {
        let Some(python) = suasion_test_support::peers_python() else { return };
        let folders = std::fs::read_dir(python.parent().unwrap().join("../lib")).unwrap().flatten();
        let path =
            |folder: &std::fs::DirEntry| folder.path().join("site-packages/nvidia/nccl/lib/libnccl.so.2");
        let Some(path) = folders.map(|folder| path(&folder)).find(|path| path.exists()) else {
            return suasion_test_support::skipped("no NCCL beside PyTorch");
        };
        // SAFETY: the file is NCCL.
        let nccl = unsafe { Nccl::load(&path) }.unwrap();
        assert!(nccl.version >= Version([2, 14, 0]), "{nccl:?}");
        let mut ids = [Id([0; 128]); 2];
        // SAFETY: the call writes an id.
        assert!(ids.iter_mut().all(|id| unsafe { (nccl.get_unique_id)(id) } == SUCCESS));
        assert_ne!(ids[0].0, ids[1].0);
        assert!(
            nccl.failure("ncclReduce", std::ptr::null_mut(), 4)
                .starts_with("NCCL's ncclReduce failed: invalid argument")
        );
        if crate::kernels::cuda::found::Found::look().driver.is_some() {
            return suasion_test_support::skipped("there is a card");
        }
        // SAFETY: without a card the stream is never used.
        let met = unsafe { Communicator::join(nccl, Stream(std::ptr::null_mut()), &crate::SingleRank) };
        let error = met.unwrap_err();
        let message = error.to_string();
        assert!(
            message.contains("do not find each other: rank 0: NCCL's ncclCommInitRankConfig failed"),
            "{message}"
        );
        assert!(message.contains("CUDA driver"), "{message}");
        assert!(error.help().unwrap().contains("NCCL_DEBUG=INFO"));
    }
}

//! Work on separate threads, without the interpreter's lock; the calling thread waits for it, checks for signals and
//! shows progress.

use crate::error::{panicked, raised};
use crate::input::Raised;
use pyo3::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use suasion_cli::embed::Problem;
use suasion_data::{Progress, start_thread};

/// How often the waiting thread checks for signals.
const LOOK: Duration = Duration::from_millis(50);

/// How long it waits for work that is stopping.
const GRACE: Duration = Duration::from_secs(2);

/// How far the work is, and whether it is to stop.
#[derive(Default)]
pub struct Watch {
    stop: AtomicBool,
    rows: AtomicU64,
    tokens: AtomicU64,
    bytes: AtomicU64,
    size: AtomicU64,
}

impl Watch {
    /// Notes how far the work is; false if it is to stop.
    pub fn goes_on(&self, progress: Progress) -> bool {
        self.rows.store(progress.rows, Ordering::Relaxed);
        self.tokens.store(progress.tokens, Ordering::Relaxed);
        self.bytes.store(progress.bytes, Ordering::Relaxed);
        self.size.store(progress.size, Ordering::Relaxed);
        !self.stop.load(Ordering::Relaxed)
    }
}

/// The system refused threads.
fn refused(message: String) -> Problem {
    let help = "set RAYON_NUM_THREADS to a smaller number, or raise the limits of the process (ulimit -u, ulimit -v)";
    Problem { tag: "E-MEMORY", message, help: Some(help.into()) }
}

/// The threads of a forked child, which has none of its parent's; `None` in the process that worked first, whose threads
/// are rayon's own.
fn pool() -> Result<Option<Arc<ThreadPool>>, Problem> {
    static FIRST: AtomicU32 = AtomicU32::new(0);
    static POOL: Mutex<Option<(u32, Arc<ThreadPool>)>> = Mutex::new(None);
    let process = std::process::id();
    match FIRST.compare_exchange(0, process, Ordering::Relaxed, Ordering::Relaxed) {
        Ok(_) => return Ok(None),
        Err(first) if first == process => return Ok(None),
        Err(_) => {}
    }
    let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    match &*pool {
        Some((owner, pool)) if *owner == process => return Ok(Some(pool.clone())),
        _ => {}
    }
    let threads = ThreadPoolBuilder::new().thread_name(|i| format!("suasion-{i}")).build();
    let threads = threads.map_err(|error| refused(format!("the threads do not start: {error}")))?;
    let threads = Arc::new(threads);
    // A pool of the parent cannot be ended here.
    std::mem::forget(pool.replace((process, threads.clone())));
    Ok(Some(threads))
}

/// Runs work and returns its result. `progress` is called with rows, tokens, and bytes read of how many. Ctrl-C ends the
/// work and is raised. What `iterator` has raised is raised again in place of the work's own error.
pub fn run<T: Send + 'static>(
    py: Python<'_>,
    progress: Option<&Bound<'_, PyAny>>,
    iterator: &Raised,
    work: impl FnOnce(&Watch) -> Result<T, Problem> + Send + 'static,
) -> PyResult<T> {
    let pool = pool().map_err(|problem| raised(py, &problem))?;
    let watch = Arc::new(Watch::default());
    let (sender, mut receiver) = mpsc::channel();
    let watched = watch.clone();
    let started = start_thread(move || {
        let result = catch_unwind(AssertUnwindSafe(|| match pool {
            Some(pool) => pool.install(|| work(&watched)),
            None => work(&watched),
        }));
        let _ = sender.send(result.unwrap_or_else(|panic| Err(panicked(&*panic))));
    });
    started.map_err(|error| raised(py, &refused(error.to_string())))?;
    let mut interrupt: Option<(PyErr, Instant)> = None;
    loop {
        let received;
        (receiver, received) = py.detach(move || {
            let received = receiver.recv_timeout(LOOK);
            (receiver, received)
        });
        match received {
            Ok(result) => {
                if let Some((error, _)) = interrupt {
                    return Err(error);
                }
                let exception = iterator.lock().unwrap_or_else(PoisonError::into_inner).take();
                return match (result, exception) {
                    (Err(_), Some(exception)) => Err(exception),
                    (result, _) => result.map_err(|problem| raised(py, &problem)),
                };
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                return Err(raised(py, &panicked(&"a thread ended without a result")));
            }
        }
        if let Some((error, since)) = interrupt {
            if since.elapsed() > GRACE {
                return Err(error);
            }
            interrupt = Some((error, since));
            continue;
        }
        let shown = match progress {
            Some(progress) => {
                let of = |number: &AtomicU64| number.load(Ordering::Relaxed);
                progress
                    .call1((of(&watch.rows), of(&watch.tokens), of(&watch.bytes), of(&watch.size)))
                    .map(drop)
            }
            None => Ok(()),
        };
        if let Err(error) = py.check_signals().and(shown) {
            watch.stop.store(true, Ordering::Relaxed);
            interrupt = Some((error, Instant::now()));
        }
    }
}

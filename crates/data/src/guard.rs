//! Calls that may fail without an error: libraries that panic on malformed input, threads that do not start.

use std::cell::Cell;
use std::fmt::Display;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::thread::{Builder, JoinHandle};

thread_local! {
    /// The number of guarded calls that this thread is in.
    static DEPTH: Cell<u32> = const { Cell::new(0) };
}

/// Runs a call into another library and turns a panic in it into an error, which fails one row or file instead of
/// the program.
pub(crate) fn guard<T, E: Display>(call: impl FnOnce() -> Result<T, E>) -> Result<T, String> {
    DEPTH.set(DEPTH.get() + 1);
    let result = catch_unwind(AssertUnwindSafe(call));
    DEPTH.set(DEPTH.get() - 1);
    match result {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or(panic.downcast_ref::<&str>().copied());
            Err(format!("its reader panicked: {}", text.unwrap_or("without a message")))
        }
    }
}

/// Suppresses the output of panics that become errors: those of other libraries on malformed input. Call it once,
/// when a program starts.
pub fn hush_guarded_panics() {
    let before = take_hook();
    set_hook(Box::new(move |panic| {
        if DEPTH.get() == 0 {
            before(panic);
        }
    }));
}

/// Starts a thread.
///
/// # Errors
/// [`io::ErrorKind::OutOfMemory`] if the system refuses it, for lack of memory or because of a limit of the process.
pub fn start_thread<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let refused =
        |error| io::Error::new(io::ErrorKind::OutOfMemory, format!("a thread does not start: {error}"));
    Builder::new().spawn(work).map_err(refused)
}

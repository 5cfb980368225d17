//! Calls into libraries that may panic on malformed input.

use std::cell::Cell;
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};

thread_local! {
    /// How many guarded calls this thread is in.
    static DEPTH: Cell<u32> = const { Cell::new(0) };
}

/// Runs a call into another library and makes a panic in it an error: it then fails one row or file, not the
/// program.
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

/// Prints nothing about panics that become errors: those of other libraries on malformed input. To be called once, when a
/// program starts.
pub fn hush_guarded_panics() {
    let before = take_hook();
    set_hook(Box::new(move |panic| {
        if DEPTH.get() == 0 {
            before(panic);
        }
    }));
}

//! Calls into libraries that may panic on malformed input.

use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs a call into another library and makes a panic in it an error: it then fails one row or file, not the
/// program.
pub(crate) fn guard<T, E: Display>(call: impl FnOnce() -> Result<T, E>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or(panic.downcast_ref::<&str>().copied());
            Err(format!("its reader panicked: {}", text.unwrap_or("without a message")))
        }
    }
}

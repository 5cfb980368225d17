//! Limits of the system: what would kill the process without a word becomes an error or an exit code.

/// Lets a file that reaches the limit of its size (`ulimit -f`) be an error of the write; and lets a process that is
/// refused memory, which Rust reports and aborts, end with the exit code of run-time errors.
#[cfg(unix)]
pub fn watch() {
    use crate::failure::Exit;
    use signal_hook::consts::{SIGABRT, SIGXFSZ};
    use signal_hook::flag::{register, register_conditional_shutdown};
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;
    // Without handlers everything works up to these limits.
    let _ = register(SIGXFSZ, Arc::new(AtomicBool::new(false)));
    let _ = register_conditional_shutdown(SIGABRT, Exit::RunTime as i32, Arc::new(AtomicBool::new(true)));
}

/// Elsewhere there are no such limits.
#[cfg(not(unix))]
pub fn watch() {}

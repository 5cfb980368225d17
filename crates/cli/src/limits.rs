//! Limits of the system: what would kill the process silently becomes an error or an exit code.

/// Printed after Rust's own line about refused memory or a stack overflow.
#[cfg(unix)]
const ABORTED: &str = "error[E-MEMORY]: the system refuses memory, or a thread's stack is full: see above\n\
    help: use fewer --threads, a smaller model, batch or max_length; raise the limit of the process (ulimit -v), or close other \
    programs\n";

/// Lets a file that reaches the limit of its size (`ulimit -f`) be an error of the write; and lets a process that is
/// refused memory, which Rust reports and aborts, print help and end with the exit code of run-time errors.
#[cfg(unix)]
pub fn watch() {
    use crate::failure::Exit;
    use signal_hook::consts::SIGXFSZ;
    use signal_hook::flag::register;
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;
    // Without the handlers everything works within the limits.
    let _ = register(SIGXFSZ, Arc::new(AtomicBool::new(false)));
    let _ = suasion_engine::on_abort(ABORTED, Exit::RunTime as i32);
}

/// Other systems have no such limits.
#[cfg(not(unix))]
pub fn watch() {}

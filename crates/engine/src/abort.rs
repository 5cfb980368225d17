//! What an aborted process says.

use std::io;

/// Where the process aborts (the system refuses memory, or a thread's stack is full, which Rust reports by itself), writes
/// a message to stderr and ends with an exit code instead of a core dump.
///
/// # Errors
/// If stderr is closed or the signal cannot be handled; then an abort is what it was.
#[cfg(unix)]
pub fn on_abort(message: &'static str, code: i32) -> io::Result<()> {
    use signal_hook::{consts::SIGABRT, low_level};
    use std::io::Write;
    use std::os::fd::AsFd;
    let stderr = std::fs::File::from(io::stderr().as_fd().try_clone_to_owned()?);
    let say = move || {
        let _ = (&stderr).write_all(message.as_bytes());
        low_level::exit(code);
    };
    // SAFETY: a handler may call what is async-signal-safe only. This one writes static bytes to a file that is open (write(2))
    // and ends the process (_exit(2)): it neither allocates nor locks.
    #[allow(unsafe_code)]
    unsafe { low_level::register(SIGABRT, say) }.map(drop)
}

/// Elsewhere an abort is the system's.
#[cfg(not(unix))]
pub fn on_abort(_: &'static str, _: i32) -> io::Result<()> {
    Ok(())
}

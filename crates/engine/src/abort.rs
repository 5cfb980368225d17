//! The message of an aborting process.

use std::io;

/// On an abort (the system refuses memory, or a thread's stack overflows, which Rust reports itself), writes a message
/// to stderr and ends the process with an exit code instead of a core dump.
///
/// # Errors
/// If stderr is closed or the signal cannot be handled; then aborts are unchanged.
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
    // SAFETY: a signal handler may only call async-signal-safe functions. This one writes static bytes to an open file
    // (write(2)) and ends the process (_exit(2)): it neither allocates nor locks.
    #[allow(unsafe_code)]
    unsafe { low_level::register(SIGABRT, say) }.map(drop)
}

/// On other systems an abort is left to the system.
#[cfg(not(unix))]
pub fn on_abort(_: &'static str, _: i32) -> io::Result<()> {
    Ok(())
}

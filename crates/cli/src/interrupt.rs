//! Ctrl-C: the first stops the run where it can be resumed, the second ends the process at once.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

/// The shell's exit code of a process that SIGINT ended.
pub const INTERRUPTED: u8 = 130;

static STOP: AtomicBool = AtomicBool::new(false);

/// True if another process prints the message of the first Ctrl-C.
static SILENT: AtomicBool = AtomicBool::new(false);

/// True while the process waits for user input, with nothing to stop.
static IDLE: AtomicBool = AtomicBool::new(false);

/// The cancellation flag that a run polls. From the first call on, Ctrl-C and SIGTERM (which cluster
/// schedulers send) set it.
pub fn flag() -> &'static AtomicBool {
    // Fails where an earlier call has installed the handler.
    let _ = ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::SeqCst) || IDLE.load(Ordering::SeqCst) {
            let _ = writeln!(std::io::stderr());
            std::process::exit(i32::from(INTERRUPTED));
        }
        if SILENT.load(Ordering::SeqCst) {
            return;
        }
        let _ = writeln!(
            std::io::stderr(),
            "\nstopping at the next point that can be resumed; press Ctrl-C again to quit at once"
        );
    });
    &STOP
}

/// Stops the run as Ctrl-C does; repeated calls have no effect.
pub fn stop() {
    STOP.store(true, Ordering::SeqCst);
}

/// Prints nothing on Ctrl-C.
pub fn silence() {
    SILENT.store(true, Ordering::SeqCst);
}

/// Runs `wait`, during which the first Ctrl-C ends the process.
pub fn idle<T>(wait: impl FnOnce() -> T) -> T {
    IDLE.store(true, Ordering::SeqCst);
    let result = wait();
    IDLE.store(false, Ordering::SeqCst);
    result
}

/// True if Ctrl-C was pressed.
pub fn raised() -> bool {
    STOP.load(Ordering::SeqCst)
}

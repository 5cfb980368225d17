//! Ctrl-C: the first asks the run to stop where it can be resumed, the second leaves at once.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

/// The shell's exit code of a process that SIGINT ended.
pub const INTERRUPTED: u8 = 130;

static STOP: AtomicBool = AtomicBool::new(false);

/// The flag that a run watches, raised from now on by Ctrl-C (and by SIGTERM, as schedulers send it).
pub fn flag() -> &'static AtomicBool {
    // A second call finds its handler installed, which is as good.
    let _ = ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::SeqCst) {
            std::process::exit(i32::from(INTERRUPTED));
        }
        let _ = writeln!(std::io::stderr(), "\nstopping at the next safe place; Ctrl-C again leaves at once");
    });
    &STOP
}

/// True where Ctrl-C was pressed.
pub fn raised() -> bool {
    STOP.load(Ordering::SeqCst)
}

//! How long renderings are at it.
//!
//! Templates are bounded by work: fuel per instruction and per byte of text. One thing escapes that count: a list
//! that is doubled some forty times is copied by MiniJinja (3.1) in one instruction. Nothing in a process can stop a
//! thread that is at it, so the program has to look after itself: [`RenderingWatch`] tells it when.

use std::cell::OnceCell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// For each thread that ever rendered: how often a rendering of it began or ended; odd while one goes on.
static CHANGES: Mutex<Vec<Arc<AtomicU64>>> = Mutex::new(Vec::new());

thread_local! {
    static MINE: OnceCell<Arc<AtomicU64>> = const { OnceCell::new() };
}

fn change() {
    MINE.with(|mine| {
        let changes = mine.get_or_init(|| {
            let new = Arc::new(AtomicU64::new(0));
            CHANGES.lock().unwrap_or_else(PoisonError::into_inner).push(new.clone());
            new
        });
        changes.fetch_add(1, Ordering::Relaxed);
    });
}

/// Lasts as long as a rendering of this thread.
pub(super) struct Watched;

impl Watched {
    pub fn begin() -> Watched {
        change();
        Watched
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        change();
    }
}

/// Counts for how many looks in a row one and the same rendering is going on, over all threads.
///
/// Whoever looks at even intervals has a clock that stands still while the process does: a program that is stopped, or
/// whose machine sleeps, has no rendering that takes long.
#[derive(Debug, Default)]
pub struct RenderingWatch {
    /// For each thread: its changes at the last look, and at how many looks before they were the same.
    seen: Vec<(u64, u32)>,
}

impl RenderingWatch {
    /// Looks once. At how many looks before this one the rendering was going on that has been for the longest; zero
    /// where there is none, or none that was there at the last look.
    pub fn look(&mut self) -> u32 {
        self.look_at(&CHANGES.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// As [`RenderingWatch::look`], with the changes of each thread.
    pub(super) fn look_at(&mut self, all: &[Arc<AtomicU64>]) -> u32 {
        self.seen.resize(all.len(), (0, 0));
        for ((before, looks), changes) in self.seen.iter_mut().zip(all) {
            let now = changes.load(Ordering::Relaxed);
            let same = now % 2 == 1 && now == *before;
            (*before, *looks) = (now, if same { *looks + 1 } else { 0 });
        }
        self.seen.iter().map(|(_, looks)| *looks).max().unwrap_or(0)
    }
}

//! Measures how long renderings are running.
//!
//! Templates are bounded by work: fuel per instruction and per byte of text. One case is not counted: a list that
//! is doubled some forty times is copied by MiniJinja (3.1) in one instruction. A process cannot stop such a
//! thread, so the program has to stop itself: [`RenderingWatch`] tells it when.

use std::array;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The maximal number of a template's renderings that are watched at a time.
const SLOTS: usize = 64;

/// The running renderings of one template.
#[derive(Debug)]
pub(super) struct Active([AtomicU64; SLOTS]);

thread_local! {
    static HERE: u8 = const { 0 };
}

impl Active {
    pub fn new() -> Arc<Active> {
        Arc::new(Active(array::from_fn(|_| AtomicU64::new(0))))
    }

    /// Records the start of a rendering. A slot's number is odd while a rendering runs in it.
    pub fn begin(&self) -> Watched<'_> {
        // Threads start at different slots, to avoid contention.
        let first = HERE.with(|here| std::ptr::from_ref(here) as usize) / 64;
        let mut slots = (0..SLOTS).map(|i| &self.0[(first + i) % SLOTS]);
        Watched(slots.find(|slot| {
            let now = slot.load(Ordering::Relaxed);
            now % 2 == 0 && slot.compare_exchange(now, now + 1, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        }))
    }
}

/// Lives as long as a rendering.
pub(super) struct Watched<'a>(Option<&'a AtomicU64>);

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        if let Some(slot) = self.0 {
            slot.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Counts for how many consecutive calls of `look` the same rendering of a template has been running, over all
/// threads.
///
/// If `look` is called at regular intervals, this is a clock that stops while the process does: a program that is
/// suspended, or whose machine sleeps, has no long rendering.
#[derive(Debug)]
pub struct RenderingWatch {
    active: Arc<Active>,
    /// For each slot: its number at the last look, and the number of earlier looks with the same number.
    seen: [(u64, u32); SLOTS],
}

impl RenderingWatch {
    pub(super) fn of(active: Arc<Active>) -> RenderingWatch {
        RenderingWatch { active, seen: [(0, 0); SLOTS] }
    }

    /// True if the template was dropped: no rendering can start any more.
    pub fn is_over(&self) -> bool {
        Arc::strong_count(&self.active) == 1
    }

    /// Looks once. Returns the number of earlier looks at which the longest running rendering was already running;
    /// zero if there is none, or none that was running at the last look.
    pub fn look(&mut self) -> u32 {
        for ((before, looks), slot) in self.seen.iter_mut().zip(&self.active.0) {
            let now = slot.load(Ordering::Relaxed);
            let same = now % 2 == 1 && now == *before;
            (*before, *looks) = (now, if same { *looks + 1 } else { 0 });
        }
        self.seen.iter().map(|(_, looks)| *looks).max().unwrap_or(0)
    }
}

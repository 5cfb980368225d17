//! How long renderings are at it.
//!
//! Templates are bounded by work: fuel per instruction and per byte of text. One thing escapes that count: a list
//! that is doubled some forty times is copied by MiniJinja (3.1) in one instruction. Nothing in a process can stop a
//! thread that is at it, so the program has to look after itself: [`RenderingWatch`] tells it when.

use std::array;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The renderings of a template that are watched at one time; further ones are not.
const SLOTS: usize = 64;

/// The renderings of one template that are going on.
#[derive(Debug)]
pub(super) struct Active([AtomicU64; SLOTS]);

thread_local! {
    static HERE: u8 = const { 0 };
}

impl Active {
    pub fn new() -> Arc<Active> {
        Arc::new(Active(array::from_fn(|_| AtomicU64::new(0))))
    }

    /// Notes that a rendering begins. A slot's number is odd while one goes on in it.
    pub fn begin(&self) -> Watched<'_> {
        // Threads start at different slots, so that they seldom meet.
        let first = HERE.with(|here| std::ptr::from_ref(here) as usize) / 64;
        let mut slots = (0..SLOTS).map(|i| &self.0[(first + i) % SLOTS]);
        Watched(slots.find(|slot| {
            let now = slot.load(Ordering::Relaxed);
            now % 2 == 0 && slot.compare_exchange(now, now + 1, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        }))
    }
}

/// Lasts as long as a rendering.
pub(super) struct Watched<'a>(Option<&'a AtomicU64>);

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        if let Some(slot) = self.0 {
            slot.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Counts for how many looks in a row one and the same rendering of a template is going on, over all threads.
///
/// Whoever looks at even intervals has a clock that stands still while the process does: a program that is stopped, or
/// whose machine sleeps, has no rendering that takes long.
#[derive(Debug)]
pub struct RenderingWatch {
    active: Arc<Active>,
    /// For each slot: its number at the last look, and at how many looks before it was the same.
    seen: [(u64, u32); SLOTS],
}

impl RenderingWatch {
    pub(super) fn of(active: Arc<Active>) -> RenderingWatch {
        RenderingWatch { active, seen: [(0, 0); SLOTS] }
    }

    /// True if the template is gone: nothing can be rendered with it any more.
    pub fn is_over(&self) -> bool {
        Arc::strong_count(&self.active) == 1
    }

    /// Looks once. At how many looks before this one the rendering was going on that has been for the longest; zero
    /// where there is none, or none that was there at the last look.
    pub fn look(&mut self) -> u32 {
        for ((before, looks), slot) in self.seen.iter_mut().zip(&self.active.0) {
            let now = slot.load(Ordering::Relaxed);
            let same = now % 2 == 1 && now == *before;
            (*before, *looks) = (now, if same { *looks + 1 } else { 0 });
        }
        self.seen.iter().map(|(_, looks)| *looks).max().unwrap_or(0)
    }
}

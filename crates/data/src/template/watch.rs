//! How long renderings are at it.
//!
//! Templates are bounded by work: fuel per instruction and per byte of text. One thing escapes that count: a list
//! that is doubled some forty times is copied by MiniJinja (3.1) in one instruction. Nothing in a process can stop a
//! thread that is at it, so the program has to look after itself: [`longest_rendering`] tells it when.

use std::cell::OnceCell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// For each thread that ever rendered: when its present rendering began, in milliseconds and one; 0 for none.
static BEGAN: Mutex<Vec<Arc<AtomicU64>>> = Mutex::new(Vec::new());

thread_local! {
    static MINE: OnceCell<Arc<AtomicU64>> = const { OnceCell::new() };
}

fn now() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_millis() as u64 + 1
}

fn mine<T>(set: impl FnOnce(&AtomicU64) -> T) -> T {
    MINE.with(|mine| {
        set(mine.get_or_init(|| {
            let new = Arc::new(AtomicU64::new(0));
            BEGAN.lock().unwrap_or_else(PoisonError::into_inner).push(new.clone());
            new
        }))
    })
}

/// Lasts as long as a rendering of this thread.
pub(super) struct Watched;

impl Watched {
    pub fn begin() -> Watched {
        mine(|began| began.store(now(), Ordering::Relaxed));
        Watched
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        mine(|began| began.store(0, Ordering::Relaxed));
    }
}

/// How long the rendering that has taken longest so far is at it, over all threads; zero where there is none.
pub fn longest_rendering() -> Duration {
    let began = BEGAN.lock().unwrap_or_else(PoisonError::into_inner);
    let times = began.iter().map(|began| began.load(Ordering::Relaxed)).filter(|began| *began > 0);
    times.min().map_or(Duration::ZERO, |began| Duration::from_millis(now().saturating_sub(began)))
}

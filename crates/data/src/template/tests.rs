//! What only the inside can see: how often a template is rendered.

use std::cell::Cell;

thread_local! {
    /// Renderings on this thread.
    pub(super) static RENDERINGS: Cell<usize> = const { Cell::new(0) };
}

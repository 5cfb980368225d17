//! Page-locked memory for uploads, so that the host need not wait for them.

use super::driver::Driver;
use crate::Result;

/// Number of parts of the memory, and bytes of each. A part is reused once the uploads from it are done.
const SLOTS: usize = 4;
const SLOT: usize = 1 << 20;

/// A ring of page-locked memory.
#[derive(Debug, Default)]
pub(super) struct Staging {
    slots: Vec<Slot>,
    current: usize,
}

#[derive(Debug)]
struct Slot {
    memory: *mut u8,
    used: usize,
    /// True if the end of its uploads is marked in the stream.
    marked: bool,
}

// SAFETY: the slot owns the memory, and it is reached only through `&mut`.
unsafe impl Send for Slot {}

impl Staging {
    /// Host to device. The host's memory may change after the call.
    ///
    /// # Safety
    /// As [`Driver::upload`].
    pub(super) unsafe fn upload(&mut self, driver: &dyn Driver, to: u64, from: &[u8]) -> Result<()> {
        for (n, piece) in from.chunks(SLOT).enumerate() {
            let Some(memory) = self.room(driver, piece.len())? else { return Ok(()) };
            // SAFETY: the slot has room for the piece, and no pending upload reads from there.
            unsafe {
                memory.copy_from_nonoverlapping(piece.as_ptr(), piece.len());
                driver.upload(to + (n * SLOT) as u64, memory, piece.len())?;
            }
        }
        Ok(())
    }

    /// Room for `bytes` bytes; `None` for a driver that reads nothing.
    fn room(&mut self, driver: &dyn Driver, bytes: usize) -> Result<Option<*mut u8>> {
        while self.slots.len() < SLOTS {
            let Some(memory) = driver.page_locked(SLOT)? else { return Ok(None) };
            self.slots.push(Slot { memory, used: 0, marked: false });
        }
        if self.slots[self.current].used + bytes > SLOT {
            driver.record(self.current)?;
            self.slots[self.current].marked = true;
            self.current = (self.current + 1) % SLOTS;
            let next = &mut self.slots[self.current];
            if std::mem::take(&mut next.marked) {
                driver.wait(self.current)?;
            }
            next.used = 0;
        }
        let slot = &mut self.slots[self.current];
        let start = slot.used;
        slot.used += bytes;
        // SAFETY: inside the slot.
        Ok(Some(unsafe { slot.memory.add(start) }))
    }

    /// Frees the memory.
    ///
    /// # Safety
    /// The driver has finished all issued operations.
    pub(super) unsafe fn free(&mut self, driver: &dyn Driver) {
        for slot in self.slots.drain(..) {
            // SAFETY: guaranteed by the caller; the memory was allocated by this driver.
            unsafe { driver.free_page_locked(slot.memory, SLOT) };
        }
    }
}

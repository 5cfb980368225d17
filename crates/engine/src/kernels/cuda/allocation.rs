//! Memory of a card, and scratch memory of single operations.

use super::stream::Stream;
use crate::Result;
use std::sync::Arc;

/// Memory of a card, freed in stream order when it is dropped.
#[derive(Debug)]
pub(super) struct Allocation {
    stream: Arc<Stream>,
    address: u64,
    bytes: usize,
}

impl Allocation {
    /// `bytes` bytes of unspecified content.
    pub(super) fn new(stream: &Arc<Stream>, bytes: usize) -> Result<Allocation> {
        let address = stream.allocate(bytes.max(1))?;
        Ok(Allocation { stream: Arc::clone(stream), address, bytes })
    }

    /// `bytes` zero bytes.
    pub(super) fn zeros(stream: &Arc<Stream>, bytes: usize) -> Result<Allocation> {
        let new = Allocation::new(stream, bytes)?;
        if bytes > 0 {
            // SAFETY: just allocated with this size.
            unsafe { stream.zero(new.address, bytes)? };
        }
        Ok(new)
    }

    /// A copy of host bytes.
    pub(super) fn of(stream: &Arc<Stream>, from: &[u8]) -> Result<Allocation> {
        let new = Allocation::new(stream, from.len())?;
        new.write(0, from)?;
        Ok(new)
    }

    /// As [`Allocation::of`], for memory that outlives the pass.
    pub(super) fn kept(stream: &Arc<Stream>, from: &[u8]) -> Result<Allocation> {
        let (address, bytes) = (stream.allocate_kept(from.len().max(1))?, from.len());
        let new = Allocation { stream: Arc::clone(stream), address, bytes };
        new.write(0, from)?;
        Ok(new)
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Overwrites the bytes from `start` on.
    pub(super) fn write(&self, start: usize, from: &[u8]) -> Result<()> {
        self.inside(start, from.len());
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: inside the allocation, as just checked.
        unsafe { self.stream.upload(self.address + start as u64, from) }
    }

    /// Reads the bytes from `start` on, waiting for them.
    pub(super) fn read(&self, start: usize, to: &mut [u8]) -> Result<()> {
        self.inside(start, to.len());
        if to.is_empty() {
            return Ok(());
        }
        // SAFETY: inside the allocation, as just checked.
        unsafe { self.stream.download(self.address + start as u64, to) }
    }

    fn inside(&self, start: usize, len: usize) {
        assert!(start <= self.bytes && len <= self.bytes - start, "{start}+{len} of {} bytes", self.bytes);
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: allocated by this stream, and only freed here.
        unsafe { self.stream.free(self.address) };
    }
}

/// Scratch memory of one operation, of unspecified content.
#[derive(Debug)]
pub(super) struct Work {
    stream: Arc<Stream>,
    address: u64,
    /// True if it is a separate allocation.
    own: bool,
}

impl Work {
    pub(super) fn new(stream: &Arc<Stream>, bytes: usize) -> Result<Work> {
        let (address, own) = stream.take_work(bytes)?;
        Ok(Work { stream: Arc::clone(stream), address, own })
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }

    /// Reads its first bytes, waiting for them.
    ///
    /// # Safety
    /// It has at least `to.len()` bytes.
    pub(super) unsafe fn read(&self, to: &mut [u8]) -> Result<()> {
        // SAFETY: guaranteed by the caller.
        unsafe { self.stream.download(self.address, to) }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // SAFETY: taken from this stream, and only returned here.
        unsafe { self.stream.give_work_back(self.address, self.own) };
    }
}

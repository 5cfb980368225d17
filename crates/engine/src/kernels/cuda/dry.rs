//! A card that runs nothing and counts memory: predicts what a step will need before the first step.

use super::driver::{Call, Command, Driver, Launch, Product};
use crate::Result;
use crate::collective::Collective;
use std::sync::atomic::{AtomicU64, Ordering};

/// Addresses of memory that does not exist.
#[derive(Debug)]
pub(super) struct Dry {
    next: AtomicU64,
}

impl Dry {
    pub(super) fn new() -> Dry {
        Dry { next: AtomicU64::new(1 << 32) }
    }
}

impl Driver for Dry {
    fn allocate(&self, bytes: usize) -> Result<u64> {
        let bytes = (bytes as u64).saturating_add(255) / 256 * 256;
        Ok(self.next.fetch_add(bytes, Ordering::Relaxed))
    }

    unsafe fn free(&self, _: u64) {}

    fn page_locked(&self, _: usize) -> Result<Option<*mut u8>> {
        Ok(None)
    }

    unsafe fn free_page_locked(&self, _: *mut u8, _: usize) {}

    unsafe fn upload(&self, _: u64, _: *const u8, _: usize) -> Result<()> {
        Ok(())
    }

    fn record(&self, _: usize) -> Result<()> {
        Ok(())
    }

    fn wait(&self, _: usize) -> Result<()> {
        Ok(())
    }

    unsafe fn download(&self, _: u64, to: &mut [u8]) -> Result<()> {
        to.fill(0);
        Ok(())
    }

    unsafe fn zero(&self, _: u64, _: usize) -> Result<()> {
        Ok(())
    }

    unsafe fn copy(&self, _: u64, _: u64, _: usize) -> Result<()> {
        Ok(())
    }

    unsafe fn launch(&self, _: &Launch) -> Result<()> {
        Ok(())
    }

    unsafe fn matmul(&self, _: &Product) -> Result<()> {
        Ok(())
    }

    fn synchronise(&self) -> Result<()> {
        Ok(())
    }

    unsafe fn graph(&self, _: &[Command]) -> Result<u64> {
        Ok(0)
    }

    unsafe fn change(&self, _: u64, _: usize, _: &Command) -> Result<()> {
        Ok(())
    }

    unsafe fn replay(&self, _: u64) -> Result<()> {
        Ok(())
    }

    unsafe fn forget(&self, _: u64) {}

    fn join(&self, _: &dyn Collective) -> Result<()> {
        Ok(())
    }

    unsafe fn exchange(&self, _: &[Call]) -> Result<()> {
        Ok(())
    }
}

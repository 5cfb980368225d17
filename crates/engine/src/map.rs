//! The one memory map of the crate.

use crate::{Error, Result};
use std::ops::Deref;
use std::path::Path;

/// A file mapped for reading. Weight files are larger than what should be copied; pages that are not read
/// cost nothing, and those that are read once are given back first when memory is short.
#[derive(Debug)]
pub(crate) struct Map(memmap2::Mmap);

impl Map {
    /// Maps a file.
    pub(crate) fn open(path: &Path) -> Result<Map> {
        let file = std::fs::File::open(path).map_err(|e| Error::io(path, e))?;
        // SAFETY: the map is read-only. Should another process cut the file short meanwhile, the system ends
        // us with a bus error: the price of every memory map, and nothing that a check here could prevent.
        #[allow(unsafe_code)]
        let map = unsafe { memmap2::Mmap::map(&file) };
        map.map(Map).map_err(|e| Error::io(path, e))
    }

    /// Zeros, which take no memory while nobody reads them.
    ///
    /// # Errors
    /// [`Error::Memory`] if the system does not grant so many.
    pub(crate) fn nothing(bytes: usize) -> Result<Map> {
        let map = memmap2::MmapMut::map_anon(bytes.max(1)).and_then(|map| map.make_read_only());
        map.map(Map).map_err(|_| Error::Memory { bytes: bytes as u64 })
    }
}

impl Deref for Map {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

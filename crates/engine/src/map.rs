//! The one memory map of the crate.

use crate::{Error, Result};
use std::ops::Deref;
use std::path::Path;

/// A file mapped for reading. Weight files are too large to copy; pages that are not read cost nothing, and the system
/// can reclaim the others first when memory is short.
#[derive(Debug)]
pub(crate) struct Map(memmap2::Mmap);

impl Map {
    /// Maps a file.
    pub(crate) fn open(path: &Path) -> Result<Map> {
        let file = std::fs::File::open(path).map_err(|e| Error::io(path, e))?;
        // SAFETY: the map is read-only. If another process truncates the file meanwhile, the system ends this process
        // with a bus error: that holds for every memory map, and no check here could prevent it.
        #[allow(unsafe_code)]
        let map = unsafe { memmap2::Mmap::map(&file) };
        map.map(Map).map_err(|e| Error::io(path, e))
    }

    /// Zeros, which take no memory until they are read.
    ///
    /// # Errors
    /// [`Error::Memory`] if the system does not grant this many bytes.
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

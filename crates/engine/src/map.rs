//! The one memory map of the crate, and the tensors in it.

use crate::dtype::WeightType;
use crate::{Error, Result};
use std::ops::{Deref, Range};
use std::path::Path;
use std::sync::Arc;

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
    /// [`Error::Memory`] where the system does not grant so many.
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

/// A tensor in a mapped file: read where it lies, in its own type, and never copied.
#[derive(Clone, Debug)]
pub struct FileTensor {
    map: Arc<Map>,
    /// Its bytes in the file; they need not be aligned.
    bytes: Range<usize>,
    kind: WeightType,
}

impl FileTensor {
    /// The tensor of type `kind` in these bytes of a file; `None` where they are not in it, or no whole elements.
    pub(crate) fn new(map: Arc<Map>, bytes: Range<usize>, kind: WeightType) -> Option<FileTensor> {
        let whole = map.get(bytes.clone())?.len().is_multiple_of(kind.bytes());
        whole.then_some(FileTensor { map, bytes, kind })
    }

    /// Its elements.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.bytes.len() / self.kind.bytes()
    }

    /// The type of its elements.
    pub fn kind(&self) -> WeightType {
        self.kind
    }

    /// A copy of its elements.
    pub(crate) fn values(&self) -> Vec<f32> {
        self.kind.widened(self.bytes())
    }

    /// Its little-endian elements.
    pub(crate) fn bytes(&self) -> &[u8] {
        // `new` has looked: a map does not change its length.
        &self.map[self.bytes.clone()]
    }
}

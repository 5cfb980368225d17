//! Read-only tensors: in a mapped file, or packed into fewer bits.

use super::packed::Packed;
use super::view::Dtype;
use crate::dtype::WeightType;
use crate::map::Map;
use std::ops::Range;
use std::sync::Arc;

/// A read-only tensor: in place in a mapped file, in its own type and never copied, or packed into fewer bits.
#[derive(Clone, Debug)]
pub struct FileTensor(Content);

#[derive(Clone, Debug)]
enum Content {
    /// Its byte range in the file; it need not be aligned.
    Plain {
        map: Arc<Map>,
        bytes: Range<usize>,
        kind: WeightType,
    },
    Packed(Arc<Packed>),
}

/// The elements of a [`FileTensor`].
pub(super) enum Elements<'a> {
    /// Little-endian elements of this type.
    Plain(&'a [u8], WeightType),
    Packed(&'a Packed),
}

impl FileTensor {
    /// The tensor of type `kind` in these bytes of a file; `None` if they are out of range or not a whole number of
    /// elements.
    pub(crate) fn new(map: Arc<Map>, bytes: Range<usize>, kind: WeightType) -> Option<FileTensor> {
        let whole = map.get(bytes.clone())?.len().is_multiple_of(kind.bytes());
        whole.then_some(FileTensor(Content::Plain { map, bytes, kind }))
    }

    /// A packed matrix.
    pub(crate) fn packed(packed: Packed) -> FileTensor {
        FileTensor(Content::Packed(Arc::new(packed)))
    }

    /// Number of its elements.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        match self.elements() {
            Elements::Plain(bytes, kind) => bytes.len() / kind.bytes(),
            Elements::Packed(packed) => packed.len(),
        }
    }

    /// How its elements are stored.
    pub fn dtype(&self) -> Dtype {
        match self.elements() {
            Elements::Plain(_, kind) => Dtype::File(kind),
            Elements::Packed(packed) => Dtype::Packed(packed.packing()),
        }
    }

    /// A copy of its elements in f32.
    pub(crate) fn values(&self) -> Vec<f32> {
        match self.elements() {
            Elements::Plain(bytes, kind) => kind.widened(bytes),
            Elements::Packed(packed) => {
                let mut values = vec![0.0; packed.len()];
                packed.run(0, &mut values);
                values
            }
        }
    }

    /// Number of bytes that it takes.
    pub(crate) fn size(&self) -> u64 {
        match self.elements() {
            Elements::Plain(bytes, _) => bytes.len() as u64,
            Elements::Packed(packed) => packed.size() as u64,
        }
    }

    pub(super) fn elements(&self) -> Elements<'_> {
        match &self.0 {
            // `new` has checked the range, and the length of a map does not change.
            Content::Plain { map, bytes, kind } => Elements::Plain(&map[bytes.clone()], *kind),
            Content::Packed(packed) => Elements::Packed(packed),
        }
    }
}

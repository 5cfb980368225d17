//! Placement of the lists and small buffers of a pass: a block of memory that is divided anew in each pass.
//!
//! The lowest free place is taken, so passes of the same sizes get the same addresses, and nothing is allocated after
//! the first step.

use std::collections::{BTreeMap, HashMap};

/// Alignment of places, in bytes.
pub(super) const ALIGNMENT: usize = 256;

/// Places in a block of memory. An item that does not fit gets a separate allocation, and a place past the block's end,
/// so that the block can be made large enough for the next pass.
#[derive(Debug, Default)]
pub(super) struct Region {
    /// The block, and its size.
    pub(super) address: u64,
    pub(super) capacity: usize,
    /// Sizes of the taken places, by start.
    taken: BTreeMap<usize, usize>,
    /// The place of each address.
    places: HashMap<u64, usize>,
    /// The largest end of any place so far.
    pub(super) most: usize,
}

impl Region {
    /// True if the block should be enlarged and is empty.
    pub(super) fn grows(&self) -> bool {
        self.taken.is_empty() && self.most > self.capacity
    }

    /// Takes the lowest free place for `bytes` bytes; the address is `None` if the place is not in the block.
    pub(super) fn take(&mut self, bytes: usize) -> (usize, Option<u64>) {
        let bytes = bytes.next_multiple_of(ALIGNMENT);
        let mut start = 0;
        for (taken, len) in &self.taken {
            if taken - start >= bytes {
                break;
            }
            start = taken + len;
        }
        self.taken.insert(start, bytes);
        self.most = self.most.max(start + bytes);
        let inside = start + bytes <= self.capacity;
        let address = inside.then_some(self.address + start as u64);
        if let Some(address) = address {
            self.places.insert(address, start);
        }
        (start, address)
    }

    /// Records the address of a place that is not in the block.
    pub(super) fn put(&mut self, place: usize, address: u64) {
        self.places.insert(address, place);
    }

    /// Releases a place that was not used.
    pub(super) fn cancel(&mut self, place: usize) {
        self.taken.remove(&place);
    }

    /// Releases the place of an address: `None` if it has none, else whether it was in the block.
    pub(super) fn give_back(&mut self, address: u64) -> Option<bool> {
        let place = self.places.remove(&address)?;
        self.taken.remove(&place);
        Some(address >= self.address && address < self.address + self.capacity as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_free_place_is_taken() {
        let mut region = Region { address: 1 << 20, capacity: 1024, ..Region::default() };
        let at = |place: usize| Some((1 << 20) + place as u64);
        assert_eq!(region.take(1), (0, at(0)));
        assert_eq!(region.take(300), (256, at(256)));
        assert_eq!(region.take(256), (768, at(768)));
        assert_eq!(region.take(10), (1024, None));
        region.put(1024, 77);
        assert_eq!((region.give_back(5), region.give_back(77)), (None, Some(false)));
        assert_eq!(region.give_back((1 << 20) + 256), Some(true));
        assert_eq!(region.take(600), (1024, None), "too large for the gap");
        assert_eq!(region.take(500), (256, at(256)));
        assert_eq!((region.most, region.grows()), (1792, false));
    }
}

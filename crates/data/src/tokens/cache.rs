//! A cache of the tokens of pieces of text, bounded and one per thread. It does not affect results.
//!
//! A few hundred words make up half of all English pieces. They are found in one cache line: a piece of up to
//! 15 bytes is its own key, and its tokens are stored beside it.

use super::bpe::{Bpe, Scratch};
use hashbrown::HashMap;
use std::cell::RefCell;
use std::ops::Range;

/// Number of sets of two entries for short pieces (1 MiB).
const SETS: usize = 1 << 14;
/// Maximum number of longer pieces, and their maximum length in bytes (1 MiB at most).
const LONG_PIECES: usize = 4096;
const LONG_PIECE: usize = 64;
/// Maximum size of the buffers that are kept between texts, in bytes: enough for pieces of 100,000 letters.
const SCRATCH: usize = 4 << 20;
/// Maximum number of tokenizers that a thread caches pieces of.
const TOKENIZERS: usize = 2;

/// A piece of at most 15 bytes with its tokens, at most three.
#[derive(Clone, Copy, Default)]
struct Entry {
    /// The bytes of the piece, with their number in the last byte; 0 for an unused entry.
    key: u128,
    ids: [u32; 3],
    /// The end of each token.
    ends: [u8; 3],
    count: u8,
}

/// One cache line: the most recent piece, and an older one.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
struct Set([Entry; 2]);

/// The tokens of a longer piece: id and end of each.
type Long = Box<[(u32, u32)]>;

/// The cache of one tokenizer on one thread.
struct Cache {
    number: u64,
    sets: Vec<Set>,
    long: HashMap<Box<[u8]>, Long>,
    scratch: Scratch,
}

thread_local! {
    static CACHES: RefCell<Vec<Cache>> = const { RefCell::new(Vec::new()) };
}

/// The cached pieces of one tokenizer on the current thread.
pub(super) struct Pieces<'a> {
    bpe: &'a Bpe,
    cache: &'a mut Cache,
}

/// Calls `work` with the cache of this thread for a model.
pub(super) fn with<T>(bpe: &Bpe, work: impl FnOnce(&mut Pieces) -> T) -> T {
    let number = bpe.number();
    CACHES.with_borrow_mut(|caches| {
        match caches.iter().position(|cache| cache.number == number) {
            Some(0) => {}
            Some(at) => caches[..=at].rotate_right(1),
            None => {
                caches.truncate(TOKENIZERS - 1);
                let (sets, long) = (vec![Set::default(); SETS], HashMap::new());
                caches.insert(0, Cache { number, sets, long, scratch: Scratch::default() });
            }
        }
        let done = work(&mut Pieces { bpe, cache: &mut caches[0] });
        // A very long piece leaves large buffers, which the thread would keep.
        if caches[0].scratch.size() > SCRATCH {
            caches[0].scratch = Scratch::default();
        }
        done
    })
}

impl Pieces<'_> {
    /// Calls `token` for each token of the non-empty piece `text[piece]`, with its id and its end in bytes
    /// from the start of the piece.
    #[inline]
    pub fn tokens(&mut self, text: &[u8], piece: Range<usize>, mut token: impl FnMut(u32, usize)) {
        let length = piece.len();
        if length > 15 {
            return self.long(&text[piece], token);
        }
        let key = key(text, piece.start, length);
        let set = &mut self.cache.sets[slot(key)].0;
        if set[0].key != key {
            if set[1].key != key {
                return self.miss(key, &text[piece], token);
            }
            set.swap(0, 1);
        }
        let entry = set[0];
        token(entry.ids[0], entry.ends[0] as usize);
        for at in 1..(entry.count as usize).min(3) {
            token(entry.ids[at], entry.ends[at] as usize);
        }
    }

    #[cold]
    fn miss(&mut self, key: u128, piece: &[u8], mut token: impl FnMut(u32, usize)) {
        let symbols = self.bpe.merge(piece, &mut self.cache.scratch);
        let mut entry = Entry { key, ..Entry::default() };
        let mut end = 0;
        for (at, symbol) in symbols.iter().enumerate() {
            end += symbol.length as usize;
            token(symbol.id, end);
            if at < 3 {
                (entry.ids[at], entry.ends[at]) = (symbol.id, end as u8);
            }
        }
        entry.count = symbols.len() as u8;
        if symbols.len() <= 3 {
            let set = &mut self.cache.sets[slot(key)].0;
            *set = [entry, set[0]];
        }
    }

    fn long(&mut self, piece: &[u8], mut token: impl FnMut(u32, usize)) {
        let Cache { long, scratch, .. } = &mut *self.cache;
        if let Some(tokens) = long.get(piece) {
            return tokens.iter().for_each(|&(id, end)| token(id, end as usize));
        }
        let mut end = 0;
        let symbols = self.bpe.merge(piece, scratch);
        for symbol in symbols {
            end += symbol.length as usize;
            token(symbol.id, end);
        }
        if piece.len() <= LONG_PIECE {
            if long.len() >= LONG_PIECES {
                long.clear();
            }
            let ends = symbols.iter().scan(0, |end, symbol| {
                *end += symbol.length;
                Some((symbol.id, *end))
            });
            long.insert(piece.into(), ends.collect());
        }
    }
}

/// The bytes of a piece and their number, as one integer.
#[inline]
fn key(text: &[u8], start: usize, length: usize) -> u128 {
    let bytes = match text.get(start..start + 16) {
        Some(window) => {
            let window: [u8; 16] = window.try_into().unwrap_or_default();
            u128::from_le_bytes(window) & ((1 << (8 * length)) - 1)
        }
        None => {
            let mut window = [0; 16];
            window[..length].copy_from_slice(&text[start..start + length]);
            u128::from_le_bytes(window)
        }
    };
    bytes | (length as u128) << 120
}

/// A folded multiplication, as in foldhash and wyhash.
#[inline]
fn slot(key: u128) -> usize {
    let low = key as u64 ^ 0x9E37_79B9_7F4A_7C15;
    let high = (key >> 64) as u64 ^ 0xD1B5_4A32_D192_ED03;
    let product = u128::from(low) * u128::from(high);
    ((product as u64 ^ (product >> 64) as u64) as usize) & (SETS - 1)
}

#[cfg(test)]
mod tests {
    use super::super::alphabet::char_of;
    use super::*;
    use serde_json::{Map, Value, json};

    #[test]
    fn a_very_long_piece_leaves_nothing_behind() {
        let mut vocabulary: Map<String, Value> =
            (0..=255u8).map(|byte| (char_of(byte).to_string(), byte.into())).collect();
        vocabulary.insert("aa".into(), 256.into());
        let model = json!({"type": "BPE", "vocab": vocabulary, "merges": ["a a"]});
        let bpe: Bpe = serde_json::from_value(model).unwrap();
        let tokens = |length: usize| {
            let text = vec![b'a'; length];
            with(&bpe, |pieces| {
                let (mut ids, mut end) = (Vec::new(), 0);
                pieces.tokens(&text, 0..length, |id, at| (ids.push(id), end = at).1);
                (ids, end, pieces.cache.scratch.size())
            })
        };
        let kept = || with(&bpe, |pieces| pieces.cache.scratch.size());
        for length in [1001, 1_000_001] {
            let (ids, end, size) = tokens(length);
            assert_eq!((ids.len(), end), (length / 2 + 1, length));
            assert!(ids[..length / 2].iter().all(|&id| id == 256) && ids[length / 2] == u32::from(b'a'));
            assert!(size >= 16 * length);
            assert_eq!(kept(), if size > SCRATCH { 0 } else { size }, "{length}");
        }
    }
}

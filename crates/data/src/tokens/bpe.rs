//! Byte-level BPE.
//!
//! This model gives the same results as the library's, faster: it is read in one pass over the file (the library
//! first builds a tree of JSON values), keeps all tokens in one string, and works on bytes. It supports only what
//! it reproduces exactly: byte-level vocabularies with every byte, without dropout, unknown token, and prefixes or
//! suffixes of words. Deserialising any other model fails, and the caller uses the library's model.

mod read;

use super::alphabet::{byte_of, char_of};
use hashbrown::{DefaultHashBuilder, HashMap, HashTable};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::hash::BuildHasher;

/// Longer pieces, in bytes, are merged with a queue: scanning all pairs for each merge is quadratic.
const LONG: usize = 96;

/// A vocabulary with its merges.
pub(super) struct Bpe {
    vocabulary: Vocabulary,
    /// Rank and result of each pair of ids.
    merges: HashMap<(u32, u32), Merge>,
    /// The id of each byte that occurs in UTF-8.
    bytes: [u32; 256],
    /// True if a piece that is a token becomes that token regardless of the merges.
    ignore_merges: bool,
    /// Identifies the vocabulary in the caches of threads.
    number: u64,
}

#[derive(Clone, Copy)]
struct Merge {
    rank: u32,
    id: u32,
}

/// Tokens as written in the file: a character of GPT-2's alphabet per byte.
#[derive(Default)]
struct Vocabulary {
    /// All tokens, concatenated.
    text: String,
    /// The range in `text` of each id's token; `HOLE` for unused ids.
    spans: Vec<(u32, u32)>,
    /// Ids by the text of their tokens.
    index: HashTable<u32>,
    hasher: DefaultHashBuilder,
    size: usize,
}

const HOLE: (u32, u32) = (u32::MAX, 0);

impl Vocabulary {
    fn get(&self, id: u32) -> Option<&str> {
        let &(start, end) = self.spans.get(id as usize)?;
        self.text.get(start as usize..end as usize)
    }

    fn id(&self, token: &str) -> Option<u32> {
        let hash = self.hasher.hash_one(token);
        self.index.find(hash, |&id| self.get(id) == Some(token)).copied()
    }

    /// Fills the index; `None` if a token has two ids.
    fn build_index(&mut self) -> Option<()> {
        let mut index = HashTable::with_capacity(self.size);
        for id in 0..self.spans.len() as u32 {
            let Some(token) = self.get(id) else { continue };
            let hash = self.hasher.hash_one(token);
            if index.find(hash, |&other| self.get(other) == Some(token)).is_some() {
                return None;
            }
            index.insert_unique(hash, id, |&id| self.hasher.hash_one(self.get(id).unwrap_or_default()));
        }
        self.index = index;
        Some(())
    }
}

/// Buffers for merging.
#[derive(Default)]
pub(super) struct Scratch {
    symbols: Vec<Symbol>,
    queue: BinaryHeap<Reverse<(u32, u32, u32)>>,
    text: String,
}

impl Scratch {
    /// Size in bytes: about 30 per byte of the longest piece so far.
    pub fn size(&self) -> usize {
        self.symbols.capacity() * size_of::<Symbol>()
            + self.queue.capacity() * size_of::<Reverse<(u32, u32, u32)>>()
            + self.text.capacity()
    }
}

/// A symbol during merging; after it, a token.
#[derive(Clone, Copy)]
pub(super) struct Symbol {
    pub id: u32,
    /// Length in bytes; 0 after the symbol was merged into the one before it (in long pieces).
    pub length: u32,
    /// In short pieces, rank and result of the pair with the next symbol; in long ones, the neighbours.
    a: u32,
    b: u32,
}

/// No rank; no neighbour.
const NONE: u32 = u32::MAX;

impl Bpe {
    /// The tokens of a non-empty piece of text.
    pub fn merge<'a>(&self, piece: &[u8], scratch: &'a mut Scratch) -> &'a [Symbol] {
        scratch.symbols.clear();
        let symbol = |id: u32, length: usize| Symbol { id, length: length as u32, a: NONE, b: NONE };
        if self.ignore_merges {
            scratch.text.clear();
            scratch.text.extend(piece.iter().map(|&byte| char_of(byte)));
            if let Some(id) = self.vocabulary.id(&scratch.text) {
                scratch.symbols.push(symbol(id, piece.len()));
                return &scratch.symbols;
            }
        }
        scratch.symbols.extend(piece.iter().map(|&byte| symbol(self.bytes[byte as usize], 1)));
        self.merge_all(scratch);
        &scratch.symbols
    }

    fn merge_all(&self, scratch: &mut Scratch) {
        if scratch.symbols.len() <= LONG {
            self.merge_short(&mut scratch.symbols);
        } else {
            self.merge_long(scratch);
        }
    }

    fn pair(&self, left: u32, right: u32) -> Merge {
        self.merges.get(&(left, right)).copied().unwrap_or(Merge { rank: NONE, id: NONE })
    }

    /// Merges the first pair of lowest rank until no pair has a rank. While the symbols fit a few cache
    /// lines, scanning all pairs each time is faster than a queue.
    fn merge_short(&self, symbols: &mut Vec<Symbol>) {
        for at in 1..symbols.len() {
            let pair = self.pair(symbols[at - 1].id, symbols[at].id);
            (symbols[at - 1].a, symbols[at - 1].b) = (pair.rank, pair.id);
        }
        loop {
            let best = symbols.iter().enumerate().min_by_key(|(_, symbol)| symbol.a);
            let Some((at, &Symbol { a: rank, b: id, .. })) = best else { return };
            if rank == NONE {
                return;
            }
            let right = symbols.remove(at + 1);
            symbols[at].id = id;
            symbols[at].length += right.length;
            let after = match symbols.get(at + 1) {
                Some(next) => self.pair(id, next.id),
                None => Merge { rank: NONE, id: NONE },
            };
            (symbols[at].a, symbols[at].b) = (after.rank, after.id);
            if at > 0 {
                let before = self.pair(symbols[at - 1].id, id);
                (symbols[at - 1].a, symbols[at - 1].b) = (before.rank, before.id);
            }
        }
    }

    /// As [`Bpe::merge_short`], with a queue and a linked list: O(n log n).
    fn merge_long(&self, scratch: &mut Scratch) {
        let Scratch { symbols, queue, .. } = scratch;
        queue.clear();
        let count = symbols.len() as u32;
        for at in 0..count {
            (symbols[at as usize].a, symbols[at as usize].b) = (at.wrapping_sub(1), at + 1);
            if at + 1 < count {
                let pair = self.pair(symbols[at as usize].id, symbols[at as usize + 1].id);
                if pair.rank != NONE {
                    queue.push(Reverse((pair.rank, at, pair.id)));
                }
            }
        }
        while let Some(Reverse((rank, at, id))) = queue.pop() {
            let left = symbols[at as usize];
            if left.length == 0 || left.b >= count {
                continue;
            }
            let right = symbols[left.b as usize];
            // The entry is stale if either side has been merged since.
            if self.pair(left.id, right.id).rank != rank {
                continue;
            }
            symbols[left.b as usize].length = 0;
            let merged = &mut symbols[at as usize];
            (merged.id, merged.length, merged.b) = (id, left.length + right.length, right.b);
            if right.b < count {
                symbols[right.b as usize].a = at;
                let pair = self.pair(id, symbols[right.b as usize].id);
                if pair.rank != NONE {
                    queue.push(Reverse((pair.rank, at, pair.id)));
                }
            }
            if left.a < count {
                let pair = self.pair(symbols[left.a as usize].id, id);
                if pair.rank != NONE {
                    queue.push(Reverse((pair.rank, left.a, pair.id)));
                }
            }
        }
        symbols.retain(|symbol| symbol.length > 0);
    }

    /// The bytes that a string in GPT-2's alphabet represents; `None` if a character represents none, or one
    /// that the vocabulary lacks.
    pub fn bytes_of(&self, written: &str) -> Option<Vec<u8>> {
        let known = |&byte: &u8| self.bytes[byte as usize] != NONE;
        written.chars().map(|c| byte_of(c).filter(known)).collect()
    }

    /// The tokens of a string for which [`Bpe::bytes_of`] returns `None`: ids, and their lengths in bytes of
    /// that string. Characters that the vocabulary lacks are dropped, as in the library's model.
    pub fn merge_written(&self, written: &str) -> Vec<(u32, usize)> {
        if self.ignore_merges
            && let Some(id) = self.vocabulary.id(written)
        {
            return vec![(id, written.len())];
        }
        let mut scratch = Scratch::default();
        scratch.symbols.extend(written.char_indices().filter_map(|(at, c)| {
            let id = self.vocabulary.id(&written[at..at + c.len_utf8()])?;
            Some(Symbol { id, length: c.len_utf8() as u32, a: NONE, b: NONE })
        }));
        self.merge_all(&mut scratch);
        scratch.symbols.iter().map(|symbol| (symbol.id, symbol.length as usize)).collect()
    }

    /// A number that is unique in the process.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The id of a token, as written in the file.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.vocabulary.id(token)
    }

    /// The token of an id, as written in the file.
    pub fn token(&self, id: u32) -> Option<&str> {
        self.vocabulary.get(id)
    }

    /// Number of tokens.
    pub fn size(&self) -> usize {
        self.vocabulary.size
    }

    /// All tokens with their ids.
    pub fn tokens(&self) -> impl Iterator<Item = (&str, u32)> {
        (0..self.vocabulary.spans.len() as u32)
            .filter_map(|id| self.vocabulary.get(id).map(|token| (token, id)))
    }
}

//! Byte-level BPE: the vocabulary and the merges of a `tokenizer.json`, and merging.
//!
//! The library's own model does the same; this one exists for its speed. It is read in one pass over the
//! file (the library goes through a tree of JSON values first), keeps all tokens in one string, and works on
//! bytes. It takes only what it does exactly: byte-level vocabularies that have every byte, no dropout, no
//! unknown token, no prefixes or suffixes of words. Deserialising anything else fails, and the caller loads
//! the library's model instead.

use super::cache;
use super::decode::{byte_of, char_of};
use hashbrown::{DefaultHashBuilder, HashMap, HashTable};
use rayon::prelude::*;
use serde::de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fmt;
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicU64, Ordering};

/// Beyond this many bytes a piece is merged with a queue: looking at all pairs for each merge is quadratic.
const LONG: usize = 96;

/// The largest id that is believed: a table has an entry for each smaller one.
const MAX_ID: u32 = 1 << 24;

/// A vocabulary with its merges.
pub(super) struct Bpe {
    vocabulary: Vocabulary,
    /// Rank and result of each pair of ids.
    merges: HashMap<(u32, u32), Merge>,
    /// The id of each byte that UTF-8 has.
    bytes: [u32; 256],
    /// A piece that is a token is that token, whatever the merges say.
    ignore_merges: bool,
    /// Tells the caches of threads which vocabulary their pieces are of.
    number: u64,
}

#[derive(Clone, Copy)]
struct Merge {
    rank: u32,
    id: u32,
}

/// Tokens as the file writes them, one character of GPT-2's alphabet for each byte.
#[derive(Default)]
struct Vocabulary {
    /// All tokens, one behind the other.
    text: String,
    /// Where each id's token lies in `text`; `HOLE` for ids without one.
    spans: Vec<(u32, u32)>,
    /// Ids by their text.
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

/// Scratch space of merging.
#[derive(Default)]
pub(super) struct Scratch {
    symbols: Vec<Symbol>,
    queue: BinaryHeap<Reverse<(u32, u32, u32)>>,
    text: String,
}

impl Scratch {
    /// Its size in bytes: some 30 for each byte of the longest piece so far.
    pub fn size(&self) -> usize {
        self.symbols.capacity() * size_of::<Symbol>()
            + self.queue.capacity() * size_of::<Reverse<(u32, u32, u32)>>()
            + self.text.capacity()
    }
}

/// A token in the making.
#[derive(Clone, Copy)]
pub(super) struct Symbol {
    pub id: u32,
    /// Length in bytes of the piece; zero once it is part of the symbol before it (in a long piece).
    pub length: u32,
    /// Rank and result of the pair with the next symbol, in a short piece; neighbours, in a long one.
    a: u32,
    b: u32,
}

/// No rank, and no neighbour.
const NONE: u32 = u32::MAX;

impl Bpe {
    /// The tokens of a piece of text, which is not empty.
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

    /// Merges the pair of the lowest rank, the first of several, until no pair is left. Looking at all of
    /// them each time is faster than a queue while they fit a few cache lines.
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

    /// The same with a queue and a linked list: n log n.
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
            // The entry is stale if either side has been merged since: the pair is another one now.
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

    /// What the library's model makes of a string that is already in GPT-2's alphabet: ids, and their
    /// lengths in bytes of that string. Characters that the vocabulary lacks vanish, as they do there.
    pub fn tokenize_written(&self, written: &str) -> Vec<(u32, usize)> {
        let known = |&byte: &u8| self.bytes[byte as usize] != NONE;
        let bytes: Option<Vec<u8>> = written.chars().map(|c| byte_of(c).filter(known)).collect();
        if let Some(bytes) = bytes.filter(|bytes| !bytes.is_empty()) {
            let mut tokens = Vec::new();
            let (mut lengths, mut start) = (written.chars().map(char::len_utf8), 0);
            cache::with(self, |pieces| {
                pieces.tokens(&bytes, 0..bytes.len(), |id, end| {
                    tokens.push((id, lengths.by_ref().take(end - start).sum()));
                    start = end;
                });
            });
            return tokens;
        }
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

    /// No other vocabulary of the process has this number.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The id of a token as the file writes it.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.vocabulary.id(token)
    }

    /// The token of an id, as the file writes it.
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

impl<'de> Deserialize<'de> for Bpe {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Bpe, D::Error> {
        deserializer.deserialize_map(BpeVisitor)
    }
}

struct BpeVisitor;

impl<'de> Visitor<'de> for BpeVisitor {
    type Value = Bpe;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a byte-level BPE model")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Bpe, A::Error> {
        let unsupported = |key: &str| A::Error::custom(format!("{key} is the library's affair"));
        let (mut kind, mut vocabulary, mut merges, mut ignore_merges) = (None, None, None, None);
        while let Some(key) = map.next_key::<String>()? {
            let known = match key.as_str() {
                "type" => kind.replace(map.next_value::<String>()?).is_none(),
                "vocab" => vocabulary.replace(map.next_value_seed(VocabularySeed)?).is_none(),
                "merges" => merges.replace(map.next_value_seed(MergesSeed)?).is_none(),
                "ignore_merges" => {
                    ignore_merges.replace(map.next_value::<Option<bool>>()?.unwrap_or(false)).is_none()
                }
                "dropout" | "unk_token" => map.next_value::<Option<IgnoredAny>>()?.is_none(),
                "continuing_subword_prefix" | "end_of_word_suffix" => {
                    map.next_value::<Option<String>>()?.is_none_or(|affix| affix.is_empty())
                }
                "byte_fallback" => map.next_value::<Option<bool>>()? != Some(true),
                // There is nothing to fuse without an unknown token.
                "fuse_unk" => map.next_value::<Option<bool>>().is_ok(),
                _ => false,
            };
            if !known {
                return Err(unsupported(&key));
            }
        }
        let (Some("BPE"), Some(mut vocabulary), Some(merges)) = (kind.as_deref(), vocabulary, merges) else {
            return Err(unsupported("a model without type, vocab or merges"));
        };
        vocabulary.build_index().ok_or_else(|| unsupported("a token with two ids"))?;
        let mut bytes = [NONE; 256];
        // Thirteen bytes are in no UTF-8, and in some vocabularies neither.
        for byte in (0..=0xF4u8).filter(|byte| !matches!(byte, 0xC0 | 0xC1)) {
            bytes[byte as usize] = vocabulary
                .id(char_of(byte).encode_utf8(&mut [0; 4]))
                .ok_or_else(|| unsupported("a vocabulary without all bytes"))?;
        }
        let merges = resolve(&vocabulary, &merges).ok_or_else(|| unsupported("a merge of no tokens"))?;
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        Ok(Bpe { vocabulary, merges, bytes, ignore_merges: ignore_merges.unwrap_or(false), number })
    }
}

/// Merges as text: where the left and the right part of each end in `text`.
#[derive(Default)]
struct WrittenMerges {
    text: String,
    ends: Vec<(u32, u32)>,
}

/// The pairs by their ids; `None` where a part or the whole is not in the vocabulary. The look-ups, which
/// miss every cache, are half of the time that loading takes, so all threads share them.
fn resolve(vocabulary: &Vocabulary, written: &WrittenMerges) -> Option<HashMap<(u32, u32), Merge>> {
    const CHUNK: usize = 1 << 13;
    let resolve_chunk = |(chunk, ends): (usize, &[(u32, u32)])| {
        let mut start = match chunk {
            0 => 0,
            _ => written.ends[chunk * CHUNK - 1].1 as usize,
        };
        let mut last = NONE;
        let resolve_one = |&(middle, end): &(u32, u32)| {
            let whole = &written.text[start..end as usize];
            let (left, right) = whole.split_at(middle as usize - start);
            if left.is_empty() || right.is_empty() {
                return None;
            }
            // Most files number their tokens in the order of the merges.
            let next = last.wrapping_add(1);
            let id = if vocabulary.get(next) == Some(whole) { next } else { vocabulary.id(whole)? };
            (start, last) = (end as usize, id);
            Some(((vocabulary.id(left)?, vocabulary.id(right)?), id))
        };
        ends.iter().map(resolve_one).collect::<Option<Vec<_>>>()
    };
    let chunks: Option<Vec<_>> = written.ends.par_chunks(CHUNK).enumerate().map(resolve_chunk).collect();
    let mut merges = HashMap::with_capacity(written.ends.len());
    for (rank, (pair, id)) in chunks?.into_iter().flatten().enumerate() {
        // Of a pair that is listed twice the last counts.
        merges.insert(pair, Merge { rank: rank as u32, id });
    }
    Some(merges)
}

/// Appends a string to another, and returns its length.
struct Append<'a>(&'a mut String);

impl<'de> DeserializeSeed<'de> for Append<'_> {
    type Value = usize;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<usize, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Append<'_> {
    type Value = usize;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a string")
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<usize, E> {
        self.0.push_str(text);
        Ok(text.len())
    }
}

struct VocabularySeed;

impl<'de> DeserializeSeed<'de> for VocabularySeed {
    type Value = Vocabulary;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Vocabulary, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for VocabularySeed {
    type Value = Vocabulary;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a map from token to id")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vocabulary, A::Error> {
        let mut vocabulary = Vocabulary::default();
        while let Some(length) = map.next_key_seed(Append(&mut vocabulary.text))? {
            let id = map.next_value::<u32>()?;
            let end = vocabulary.text.len();
            let span = (end - length).try_into().ok().zip(end.try_into().ok());
            let Some(span) = span.filter(|_| id <= MAX_ID) else { return Err(A::Error::custom("too large")) };
            let at = id as usize;
            if vocabulary.spans.len() <= at {
                vocabulary.spans.resize(at + 1, HOLE);
            }
            if vocabulary.spans[at] != HOLE {
                return Err(A::Error::custom("an id with two tokens"));
            }
            vocabulary.spans[at] = span;
            vocabulary.size += 1;
        }
        Ok(vocabulary)
    }
}

struct MergesSeed;

impl<'de> DeserializeSeed<'de> for MergesSeed {
    type Value = WrittenMerges;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<WrittenMerges, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for MergesSeed {
    type Value = WrittenMerges;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a list of merges")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<WrittenMerges, A::Error> {
        let mut merges = WrittenMerges::default();
        let mut as_pair = None;
        while let Some(is_pair) = list.next_element_seed(MergeSeed(&mut merges))? {
            // The library takes a list of one kind only.
            if *as_pair.get_or_insert(is_pair) != is_pair {
                return Err(A::Error::custom("two kinds of merges"));
            }
        }
        Ok(merges)
    }
}

/// One merge: `"left right"`, or `["left", "right"]`, which the returned value tells.
struct MergeSeed<'a>(&'a mut WrittenMerges);

impl MergeSeed<'_> {
    fn end<E: serde::de::Error>(self, middle: usize) -> Result<(), E> {
        match (u32::try_from(middle), u32::try_from(self.0.text.len())) {
            (Ok(middle), Ok(end)) => {
                self.0.ends.push((middle, end));
                Ok(())
            }
            _ => Err(E::custom("too large")),
        }
    }
}

impl<'de> DeserializeSeed<'de> for MergeSeed<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for MergeSeed<'_> {
    type Value = bool;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("a merge")
    }

    fn visit_str<E: serde::de::Error>(self, merge: &str) -> Result<bool, E> {
        match merge.split_once(' ') {
            Some((left, right)) if !right.contains(' ') && !merge.starts_with("#version") => {
                self.0.text.push_str(left);
                let middle = self.0.text.len();
                self.0.text.push_str(right);
                self.end(middle).map(|()| false)
            }
            _ => Err(E::custom("not a pair")),
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut pair: A) -> Result<bool, A::Error> {
        let left = pair.next_element_seed(Append(&mut self.0.text))?;
        let middle = self.0.text.len();
        let right = pair.next_element_seed(Append(&mut self.0.text))?;
        if left.is_none() || right.is_none() || pair.next_element::<IgnoredAny>()?.is_some() {
            return Err(A::Error::custom("not a pair"));
        }
        self.end(middle).map(|()| true)
    }
}

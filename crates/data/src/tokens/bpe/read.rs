//! Reads the vocabulary and the merges of a `tokenizer.json` in one pass.

use super::super::alphabet::char_of;
use super::{Bpe, HOLE, Merge, NONE, Vocabulary};
use hashbrown::HashMap;
use rayon::prelude::*;
use serde::de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// The largest accepted id. A table has an entry for every smaller one.
const MAX_ID: u32 = 1 << 24;

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
        let unsupported = |key: &str| A::Error::custom(format!("{key} is left to the library"));
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
                // Without an unknown token this has no effect.
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
        // Thirteen bytes do not occur in UTF-8, and some vocabularies lack them.
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

/// Merges as text. `ends`: the ends of the left and the right part of each merge in `text`.
#[derive(Default)]
struct WrittenMerges {
    text: String,
    ends: Vec<(u32, u32)>,
}

/// The merges by the ids of their parts; `None` if a part or the result is not in the vocabulary. The
/// look-ups miss the CPU's caches and take half of the loading time, so they run on all threads.
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
            // In most files the tokens have the order of the merges.
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
        // If a pair is listed twice, the last one counts.
        merges.insert(pair, Merge { rank: rank as u32, id });
    }
    Some(merges)
}

/// Appends a string to another and returns its length.
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
            // The library rejects a list of both kinds.
            if *as_pair.get_or_insert(is_pair) != is_pair {
                return Err(A::Error::custom("two kinds of merges"));
            }
        }
        Ok(merges)
    }
}

/// One merge, `"left right"` or `["left", "right"]`; returns true for the second kind.
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

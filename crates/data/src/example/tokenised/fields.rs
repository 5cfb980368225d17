//! The fields of a tokenised row, as the direct readers produce them.

use super::both;
use crate::example::body::Tokenised;
use crate::example::boundaries::{Given, boundaries, counted_padding};
use crate::example::masks::looks_like_mask;
use crate::{IGNORE, Origin, RowId};
use std::ops::Range;

/// The fields that are read of a tokenised row.
#[derive(Clone, Copy)]
pub enum Key {
    InputIds,
    Labels,
    CompletionMask,
    AssistantMasks,
    AttentionMask,
    Rows,
    SeqLengths,
    PositionIds,
    PrefixRanges,
    Weights,
    Origins,
    Text,
    /// A field that looks like a mask but is not a known one: the general reader refuses it if it is a mask.
    Unknown,
}

impl Key {
    /// The field of this name; `None` for fields that are ignored.
    pub fn of(name: &str) -> Option<Key> {
        Some(match name {
            "input_ids" => Key::InputIds,
            "labels" => Key::Labels,
            "completion_mask" | "loss_mask" => Key::CompletionMask,
            "assistant_masks" | "assistant_mask" => Key::AssistantMasks,
            "attention_mask" => Key::AttentionMask,
            "rows" => Key::Rows,
            "seq_lengths" => Key::SeqLengths,
            "position_ids" => Key::PositionIds,
            "prefix_ranges" => Key::PrefixRanges,
            "weights" | "loss_scale" => Key::Weights,
            "origins" => Key::Origins,
            "text" => Key::Text,
            other if looks_like_mask(other) => Key::Unknown,
            _ => return None,
        })
    }
}

/// The keys seen so far in a row.
#[derive(Default)]
pub struct Seen(u16);

impl Seen {
    /// Adds a key; `None` if it was there before. Of two fields with the same name the last applies, which is left
    /// to the general reader.
    pub fn note(&mut self, key: Key) -> Option<()> {
        let bit = 1 << key as u16;
        let new = self.0 & bit == 0;
        self.0 |= bit;
        new.then_some(())
    }
}

/// The values of a row's fields; `None` for a field that is missing or null.
#[derive(Default)]
pub struct Fields {
    pub input_ids: Option<Vec<u32>>,
    pub labels: Option<Vec<i32>>,
    pub completion_mask: Option<Vec<bool>>,
    pub assistant_masks: Option<Vec<bool>>,
    pub attention_mask: Option<Attention>,
    pub rows: Option<Vec<u64>>,
    pub seq_lengths: Option<Vec<u32>>,
    pub position_ids: Option<Vec<u32>>,
    pub prefix_ranges: Option<Vec<Range<u32>>>,
    pub weights: Option<Vec<f32>>,
    pub origins: Option<Vec<(Origin, usize)>>,
    pub text: Option<String>,
}

/// An `attention_mask`.
pub enum Attention {
    /// 0 or 1 for each token.
    Mask(Vec<bool>),
    /// The number of each token's sequence in a pack, 0 on padding.
    Numbers(Vec<u32>),
}

impl Fields {
    /// The row; `None` if something is missing, out of range or of the wrong length.
    pub fn tokenised(self, id: &RowId) -> Option<Tokenised> {
        let input_ids = self.input_ids?;
        let n = input_ids.len();
        let highest = input_ids.iter().fold(0, |bits, id| bits | id);
        if n == 0 || highest > i32::MAX as u32 {
            return None;
        }
        if [&self.completion_mask, &self.assistant_masks]
            .iter()
            .any(|m| m.as_ref().is_some_and(|m| m.len() != n))
        {
            return None;
        }
        let mask = both(self.completion_mask, self.assistant_masks.as_deref());
        let (attention, numbers) = match self.attention_mask {
            None => (None, None),
            Some(Attention::Mask(mask)) => (Some(mask), None),
            Some(Attention::Numbers(numbers)) => {
                (Some(numbers.iter().map(|&number| number != 0).collect()), Some(numbers))
            }
        };
        let lengths = [
            self.labels.as_ref().map(Vec::len),
            attention.as_ref().map(Vec::len),
            self.position_ids.as_ref().map(Vec::len),
            self.weights.as_ref().map(Vec::len),
            self.origins.as_ref().map(|runs| runs.iter().map(|(_, length)| length).sum()),
        ];
        // A row without labels and masks may be of another format.
        if self.labels.is_none() && mask.is_none() || lengths.into_iter().flatten().any(|length| length != n)
        {
            return None;
        }
        let mut given = Given {
            rows: self.rows,
            lengths: self.seq_lengths,
            positions: self.position_ids,
            prefixes: self.prefix_ranges,
            numbers,
            attention: attention.as_deref(),
        };
        let labels = self.labels.as_deref();
        let padding = unmasked(&input_ids, &given, labels, mask.as_deref());
        let counted_padding = padding.filter(|_| attention.is_some());
        let masked = padding.map(|start| (0..n).map(|i| i < start).collect::<Vec<bool>>());
        if masked.is_some() {
            given.attention = masked.as_deref();
        }
        let (pack, broken) = match boundaries(id, n, &given) {
            Ok(pack) => (pack, None),
            Err(why) => (None, Some(why)),
        };
        let attention = masked.or(attention);
        Some(Tokenised {
            input_ids,
            labels: self.labels,
            mask,
            assistant: self.assistant_masks,
            attention,
            weights: self.weights,
            origins: self.origins,
            text: self.text,
            pack,
            counted_padding,
            broken,
        })
    }
}

/// [`counted_padding`] for a row with these labels or this mask.
pub fn unmasked(
    ids: &[u32],
    given: &Given<'_>,
    labels: Option<&[i32]>,
    mask: Option<&[bool]>,
) -> Option<usize> {
    counted_padding(ids, given, |i| match (labels, mask) {
        (Some(labels), _) => labels[i] != IGNORE,
        (None, mask) => mask.is_none_or(|mask| mask[i]),
    })
}

/// Runs of origins from their letters; `None` if a letter is unknown.
pub fn origins(letters: &str) -> Option<Vec<(Origin, usize)>> {
    let (mut runs, mut rest) = (Vec::new(), letters.as_bytes());
    while let [letter, ..] = rest {
        // Runs are long, and branch-free blocks are vectorised.
        let same = |block: &&[u8]| block.iter().fold(true, |same, other| same & (other == letter));
        let whole = rest.chunks(32).take_while(same).map(<[u8]>::len).sum::<usize>();
        let length = whole + rest[whole..].iter().take_while(|other| *other == letter).count();
        runs.push((Origin::from_letter(char::from(*letter))?, length));
        rest = &rest[length..];
    }
    Some(runs)
}

/// A weight; `None` if it is not a finite number of at least 0. There is one zero.
pub fn weight(value: f64) -> Option<f32> {
    Some(value as f32 + 0.0).filter(|weight| weight.is_finite() && *weight >= 0.0)
}

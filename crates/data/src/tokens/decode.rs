//! Decodes a stream of ids.

use super::tokenizer::Tokenizer;

impl Tokenizer {
    /// A decoder for ids that arrive one at a time.
    pub fn decode_stream(&self, skip_special: bool) -> DecodeStream<'_> {
        DecodeStream::new(self, skip_special)
    }
}

/// Turns a stream of ids into pieces of text. The concatenation of all pieces, including that of
/// [`DecodeStream::finish`], is the decoding of all ids. Incomplete characters are held back.
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    /// The ids that the next piece of text depends on: those of the last piece returned, then the new ones.
    ids: Vec<u32>,
    /// The number of `ids` whose text was returned.
    given: usize,
}

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, skip_special: bool) -> DecodeStream<'a> {
        DecodeStream { tokenizer, skip_special, ids: Vec::new(), given: 0 }
    }

    /// Adds an id and returns the text that it completes, if any.
    ///
    /// The text of an id depends on the ids before it (a decoder strips the space of a text's first word), so
    /// each piece is the difference between two decodings that start at the ids of the last piece.
    pub fn push(&mut self, id: u32) -> Option<String> {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids, self.skip_special);
        if text.ends_with('\u{FFFD}') {
            return None;
        }
        self.give(text)
    }

    /// Returns the text that is still held back; incomplete characters become U+FFFD.
    pub fn finish(&mut self) -> Option<String> {
        let text = self.tokenizer.decode(&self.ids, self.skip_special);
        self.give(text)
    }

    fn give(&mut self, text: String) -> Option<String> {
        let before = self.tokenizer.decode(&self.ids[..self.given], self.skip_special);
        let common = match text.starts_with(&before) {
            true => before.len(),
            // The decoder changed text that was returned already. A stream cannot correct it and continues
            // from the first difference.
            false => text
                .char_indices()
                .zip(before.chars())
                .find(|((_, a), b)| a != b)
                .map_or_else(|| text.len().min(before.len()), |((at, _), _)| at),
        };
        if common >= text.len() {
            return None;
        }
        let piece = text[common..].to_string();
        self.ids.drain(..self.given);
        self.given = self.ids.len();
        Some(piece)
    }
}

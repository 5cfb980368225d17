//! Ids back to text: whole, one at a time for displays, and as a stream.

use super::tokenizer::Tokenizer;

impl Tokenizer {
    /// A decoder for ids that arrive one at a time; it holds incomplete characters back.
    pub fn decode_stream(&self, skip_special: bool) -> DecodeStream<'_> {
        DecodeStream::new(self, skip_special)
    }
}

/// Turns a stream of ids into pieces of text. Pieces joined, with [`DecodeStream::finish`] at the end, are
/// the decoding of all ids. Characters whose bytes are not complete are held back.
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    /// Ids that the next piece of text depends on: those of the last piece given out, then the new ones.
    ids: Vec<u32>,
    /// How many of `ids` have been given out.
    given: usize,
}

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, skip_special: bool) -> DecodeStream<'a> {
        DecodeStream { tokenizer, skip_special, ids: Vec::new(), given: 0 }
    }

    /// Takes one id; returns the text that is complete with it, if any.
    ///
    /// The text of an id depends on the ids before it (a decoder strips the space of a text's first word),
    /// so each piece is the difference between two decodings that start at the last piece's ids.
    pub fn push(&mut self, id: u32) -> Option<String> {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids, self.skip_special);
        if text.ends_with('\u{FFFD}') {
            return None;
        }
        self.give(text)
    }

    /// What is still held back: incomplete characters come out as U+FFFD.
    pub fn finish(&mut self) -> Option<String> {
        let text = self.tokenizer.decode(&self.ids, self.skip_special);
        self.give(text)
    }

    fn give(&mut self, text: String) -> Option<String> {
        let before = self.tokenizer.decode(&self.ids[..self.given], self.skip_special);
        let common = match text.starts_with(&before) {
            true => before.len(),
            // A decoder that rewrites what it has said cannot be taken back in a stream: go on from where
            // the two differ.
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

//! Ids and byte ranges, without origins.

use std::ops::Range;

/// The error type of the `tokenizers` library.
pub(super) type TokenizerError = tokenizers::Error;

/// Token ids with their byte ranges, without origins.
#[derive(Default)]
pub(super) struct RawTokens {
    pub ids: Vec<u32>,
    pub bytes: Vec<Range<u32>>,
}

impl RawTokens {
    /// An empty list with capacity for the tokens of a text, at four bytes per token as in English. It may
    /// grow once.
    pub fn for_text(text: &str) -> RawTokens {
        let room = text.len() / 4 + 8;
        RawTokens { ids: Vec::with_capacity(room), bytes: Vec::with_capacity(room) }
    }

    pub fn push(&mut self, id: u32, bytes: Range<usize>) {
        self.ids.push(id);
        self.bytes.push(bytes.start as u32..bytes.end as u32);
    }

    pub fn truncate(&mut self, length: usize) {
        self.ids.truncate(length);
        self.bytes.truncate(length);
    }
}

//! Ids and byte ranges, before origins.

use std::ops::Range;

/// What the library returns when something fails.
pub(super) type TokenizerError = tokenizers::Error;

/// Ids and byte ranges, before origins.
#[derive(Default)]
pub(super) struct RawTokens {
    pub ids: Vec<u32>,
    pub bytes: Vec<Range<u32>>,
}

impl RawTokens {
    /// No tokens, and room for those of a text: English has some four bytes to a token. Growing once is
    /// cheap, a second buffer for each row is not.
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

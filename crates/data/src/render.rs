//! Text and the spans that tile it: where supervision is decided, once.

use crate::{Origin, RowId};
use std::ops::Range;

/// A run of bytes of one origin and one loss weight.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// Byte range in [`Rendered::text`].
    pub range: Range<usize>,
    /// Why it is supervised or not.
    pub origin: Origin,
    /// Loss weight of its tokens; 0 masks them.
    pub weight: f32,
}

/// A row as text. The spans tile the text exactly: no gap, no overlap, in order (an empty span is allowed).
#[derive(Clone, Debug, PartialEq)]
pub struct Rendered {
    /// The row that it was made from.
    pub id: RowId,
    /// The whole text: prompt, response, and the text of the stop token.
    pub text: String,
    /// What each byte is.
    pub spans: Vec<Span>,
    /// True for plain text, which gets what the tokenizer's post-processor adds in front (BOS); false for
    /// rendered chat text, which carries its own.
    pub add_special_tokens: bool,
}

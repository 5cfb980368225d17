//! Rendered text to tokens: ids, the bytes that each token stands for, and its origin.
//!
//! The rules are MASKING.md's, "The boundary between prompt and response". With `boundary: split` they hold
//! by construction: the text is cut at the start of each response, the prompt goes through the tokenizer
//! exactly as it does at inference, and the response goes through it as the continuation of a text (no
//! second BOS, no second prefix space: tokens/stages.rs says how). The halves are normalised apart. That is the
//! only way to keep both promises where a normalizer would merge characters across the cut (`cafe` and a
//! combining accent under NFC): the prompt's ids are then still those of the prompt alone.
//!
//! Where the cut falls on the edge of an added token, or where no token straddles a white-space boundary
//! anyway, split and joint tokenisation are the same.

mod added;
mod alphabet;
mod bpe;
mod cache;
mod decode;
mod direct;
mod encode;
#[cfg(test)]
mod equality;
mod model;
mod pretokenise;
mod raw;
mod settings;
mod special;
mod stages;
mod tokenizer;

pub use decode::DecodeStream;
pub use encode::{Encoded, Straddle, Tokens};
pub use special::Special;
pub use tokenizer::{SpecialToken, Tokenizer};

//! Rendered text to tokens: ids, the bytes that each token covers, and its origin.
//!
//! The rules are those of MASKING.md, "The boundary between prompt and response". With `boundary: split` they
//! hold by construction. The text is cut at the start of each response. The prompt is tokenised exactly as at
//! inference, and the response as the continuation of a text: without a second BOS and without a second
//! prefix space (tokens/stages.rs). The parts are normalised separately, since a normalizer may merge
//! characters across the cut (`cafe` and a combining accent under NFC): the ids of the prompt are still those
//! of the prompt alone.
//!
//! Split and joint tokenisation are equal if the cut is at the edge of an added token, or if no token
//! straddles it.

mod added;
mod alphabet;
mod bpe;
mod cache;
mod changes;
mod decode;
mod direct;
mod encode;
#[cfg(test)]
mod equality;
mod files;
mod model;
mod pretokenise;
mod raw;
mod settings;
mod special;
mod stages;
mod tokenizer;

pub use changes::Changes;
pub use decode::DecodeStream;
pub use encode::{Encoded, Straddle, Tokens};
pub use files::FolderFiles;
pub use special::Special;
pub use tokenizer::{SpecialToken, Tokenizer};

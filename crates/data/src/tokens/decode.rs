//! Ids back to text: whole, one at a time for displays, and as a stream.

use super::Tokenizer;
use super::model::Inner;
use tokenizers::{DecoderWrapper, PreTokenizerWrapper};

/// How the vocabulary writes bytes, which is what a single token's text depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Alphabet {
    /// GPT-2's: each byte is one printable character.
    ByteLevel,
    /// SentencePiece's: `▁` is a space, `<0xNN>` a byte.
    Metaspace,
    /// As it stands.
    Plain,
}

impl Alphabet {
    pub fn of(tokenizer: &Inner) -> Alphabet {
        fn in_decoder(decoder: &DecoderWrapper) -> Alphabet {
            match decoder {
                DecoderWrapper::ByteLevel(_) => Alphabet::ByteLevel,
                DecoderWrapper::Metaspace(_)
                | DecoderWrapper::Replace(_)
                | DecoderWrapper::ByteFallback(_) => Alphabet::Metaspace,
                DecoderWrapper::Sequence(sequence) => sequence
                    .get_decoders()
                    .iter()
                    .map(in_decoder)
                    .find(|alphabet| *alphabet != Alphabet::Plain)
                    .unwrap_or(Alphabet::Plain),
                DecoderWrapper::BPE(_)
                | DecoderWrapper::WordPiece(_)
                | DecoderWrapper::CTC(_)
                | DecoderWrapper::Fuse(_)
                | DecoderWrapper::Strip(_) => Alphabet::Plain,
            }
        }
        fn in_pre_tokenizer(pre_tokenizer: &PreTokenizerWrapper) -> Alphabet {
            match pre_tokenizer {
                PreTokenizerWrapper::ByteLevel(_) => Alphabet::ByteLevel,
                PreTokenizerWrapper::Metaspace(_) => Alphabet::Metaspace,
                PreTokenizerWrapper::Sequence(sequence) => sequence
                    .as_ref()
                    .iter()
                    .map(in_pre_tokenizer)
                    .find(|alphabet| *alphabet != Alphabet::Plain)
                    .unwrap_or(Alphabet::Plain),
                _ => Alphabet::Plain,
            }
        }
        match tokenizer.get_decoder().map(in_decoder) {
            Some(alphabet) if alphabet != Alphabet::Plain => alphabet,
            _ => tokenizer.get_pre_tokenizer().map_or(Alphabet::Plain, in_pre_tokenizer),
        }
    }

    /// The bytes that a token of the model's vocabulary stands for.
    pub fn bytes(self, token: &str) -> Vec<u8> {
        match self {
            Alphabet::ByteLevel => token
                .chars()
                .map(byte_of)
                .collect::<Option<Vec<u8>>>()
                .unwrap_or_else(|| token.as_bytes().to_vec()),
            Alphabet::Metaspace => {
                let byte = token
                    .strip_prefix("<0x")
                    .and_then(|rest| rest.strip_suffix('>'))
                    .filter(|digits| digits.len() == 2)
                    .and_then(|digits| u8::from_str_radix(digits, 16).ok());
                match byte {
                    Some(byte) => vec![byte],
                    None => token.replace('▁', " ").into_bytes(),
                }
            }
            Alphabet::Plain => token.as_bytes().to_vec(),
        }
    }
}

/// The byte that a character of GPT-2's alphabet stands for: printable Latin-1 stands for itself, the 68
/// other bytes follow from U+0100 on, in order.
pub(super) fn byte_of(character: char) -> Option<u8> {
    let code = character as u32;
    match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => Some(code as u8),
        0x100..=0x120 => Some((code - 0x100) as u8),
        0x121..=0x142 => Some((code - 0x121 + 0x7F) as u8),
        0x143 => Some(0xAD),
        _ => None,
    }
}

/// The character of GPT-2's alphabet that stands for a byte.
pub(super) fn char_of(byte: u8) -> char {
    let code = u32::from(byte);
    let code = match byte {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => code,
        0..=0x20 => 0x100 + code,
        0x7F..=0xA0 => 0x121 + code - 0x7F,
        0xAD => 0x143,
    };
    char::from_u32(code).unwrap_or_default()
}

/// Bytes as text for a display: what is valid UTF-8 as it is, every other byte as `<0xNN>`.
pub(super) fn readable(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        for byte in chunk.invalid() {
            text.push_str(&format!("<0x{byte:02X}>"));
        }
    }
    text
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

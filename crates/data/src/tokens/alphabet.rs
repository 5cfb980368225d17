//! The encoding of bytes in a vocabulary.

use tokenizers::{DecoderWrapper, PreTokenizerWrapper};

/// How a vocabulary encodes bytes in the text of its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Alphabet {
    /// GPT-2: each byte is one printable character.
    ByteLevel,
    /// SentencePiece: `▁` is a space, `<0xNN>` a byte.
    Metaspace,
    /// No encoding.
    Plain,
}

impl Alphabet {
    pub fn of(decoder: Option<&DecoderWrapper>, pre_tokenizer: Option<&PreTokenizerWrapper>) -> Alphabet {
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
        match decoder.map(in_decoder) {
            Some(alphabet) if alphabet != Alphabet::Plain => alphabet,
            _ => pre_tokenizer.map_or(Alphabet::Plain, in_pre_tokenizer),
        }
    }

    /// The bytes that a token of the vocabulary represents.
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

/// The byte that a character of GPT-2's alphabet represents. Printable Latin-1 characters represent
/// themselves; the 68 other bytes are U+0100 and following, in order.
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

/// The character of GPT-2's alphabet for a byte.
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

/// Bytes as text for display: valid UTF-8 unchanged, every other byte as `<0xNN>`.
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

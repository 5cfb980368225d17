//! The stages of byte-level BPE without the library.

use super::added::{AddedTokens, Part};
use super::cache;
use super::model::{Inner, Model};
use super::pretokenise::Pretokeniser;
use super::raw::RawTokens;
use tokenizers::NormalizerWrapper;
use unicode_normalization_alignments::{IsNormalized, is_nfc_quick};

/// The stages of a byte-level BPE tokenizer that inserts no prefix, so the start of a stretch of text is not special.
pub(super) struct Direct {
    pretokeniser: Pretokeniser,
    /// True if each digit is a piece; the text between digits is then split separately.
    digits_apart: bool,
    /// True if the normalizer is NFC; then only text in NFC is supported.
    nfc: bool,
    /// Added tokens matched before normalisation, and after it.
    raw: AddedTokens,
    normalized: AddedTokens,
}

impl Direct {
    pub fn of(inner: &Inner, is_structural: impl Fn(&str) -> bool) -> Option<Direct> {
        let Model::Bpe(_) = inner.get_model() else { return None };
        let nfc = match inner.get_normalizer() {
            None => false,
            Some(NormalizerWrapper::NFC(_)) => true,
            Some(_) => return None,
        };
        let (pretokeniser, digits_apart) = Pretokeniser::of(inner.get_pre_tokenizer()?)?;
        let vocabulary = inner.get_added_vocabulary();
        // `Vocabulary::Content` skips tokens that were ever declared special, and those that are structural here.
        let structural = |content: &str| vocabulary.is_special_token(content) || is_structural(content);
        let tokens =
            |normalized: bool| AddedTokens::new(vocabulary, inner.get_normalizer(), normalized, structural);
        let (raw, normalized) = (tokens(false)?, tokens(true)?);
        Some(Direct { digits_apart, pretokeniser, nfc, raw, normalized })
    }

    /// True if the normalizer does not change the text.
    pub fn takes(&self, text: &str) -> bool {
        !self.nfc || is_composed(text)
    }

    /// Calls `part` with the added tokens of a text and the text between them.
    pub fn split(&self, text: &str, content: bool, mut part: impl FnMut(Part)) {
        self.raw.split(text, content, |(id, section)| match id {
            Some(id) => part((Some(id), section)),
            None => self.normalized.split(&text[section.clone()], content, |(id, inner)| {
                part((id, section.start + inner.start..section.start + inner.end));
            }),
        });
    }

    /// Appends the tokens of a text without added tokens. `base`: the position of its first byte in the whole
    /// text.
    pub fn tokenize(&self, text: &str, base: u32, pieces: &mut cache::Pieces, out: &mut RawTokens) {
        if !self.digits_apart {
            return self.tokenize_section(text, base, pieces, out);
        }
        let mut at = 0;
        for (digit, length) in text.match_indices(char::is_numeric).map(|(at, digit)| (at, digit.len())) {
            self.tokenize_section(&text[at..digit], base + at as u32, pieces, out);
            at = digit + length;
            self.tokenize_section(&text[digit..at], base + digit as u32, pieces, out);
        }
        self.tokenize_section(&text[at..], base + at as u32, pieces, out);
    }

    fn tokenize_section(&self, text: &str, base: u32, pieces: &mut cache::Pieces, out: &mut RawTokens) {
        let mut at = 0;
        while at < text.len() {
            let end = self.pretokeniser.piece_end(text, at);
            let mut start = at;
            pieces.tokens(text.as_bytes(), at..end, |id, length| {
                // Tokens that share a character each cover the whole character.
                let stop = at + length;
                out.ids.push(id);
                out.bytes.push(
                    base + text.floor_char_boundary(start) as u32
                        ..base + text.ceil_char_boundary(stop) as u32,
                );
                start = stop;
            });
            at = end;
        }
    }
}

/// True only if the text is in NFC, by the quick check of the library's normalizer. That normalizer is slow
/// even if it changes nothing, and most text passes this check. Characters below U+0300, general punctuation
/// (except two spaces that have another form), ideographs and emoji are starters that never compose with the
/// character before them: no table is needed for them.
pub(super) fn is_composed(text: &str) -> bool {
    let starter = |c: &char| {
        matches!(c, '\0'..='\u{2FF}' | '\u{2010}'..='\u{205E}' | '\u{4E00}'..='\u{9FFF}'
            | '\u{1F300}'..='\u{1FAFF}')
    };
    text.is_ascii() || is_nfc_quick(text.chars().filter(|c| !starter(c))) == IsNormalized::Yes
}

#[cfg(test)]
mod tests {
    use super::is_composed;
    use tokenizers::{NormalizedString, Normalizer as _};

    fn nfc(text: &str) -> String {
        let mut normalized = NormalizedString::from(text);
        tokenizers::normalizers::NFC.normalize(&mut normalized).unwrap();
        normalized.get().to_string()
    }

    /// The normalizer changes no character that passes the check, neither alone nor after letters that compose
    /// with many.
    #[test]
    fn composed_characters_are_left_alone() {
        let composed = (0..=0x10FFFFu32).filter_map(char::from_u32).filter(|c| is_composed(&c.to_string()));
        let mut count = 0;
        for character in composed {
            for before in ["", "a", "E", "o\u{31b}", "\u{1100}", "\u{ac00}", "\u{9c7}", "\u{3046}"] {
                let text = format!("{before}{character}");
                assert_eq!(nfc(&text), nfc(before) + &character.to_string(), "{:x}", character as u32);
            }
            count += 1;
        }
        assert!(count > 20_000, "{count}");
        assert!(!is_composed("e\u{301}") && !is_composed("\u{2126}") && !is_composed("\u{2001}"));
    }
}

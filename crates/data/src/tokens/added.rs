//! Finds added tokens in text, as the library's `AddedVocabulary` does, without copying the text.
//!
//! The library searches twice: first in the text as given, for tokens that are matched before normalisation;
//! then in the normalised text between these, for the other tokens. Both times the leftmost-longest match
//! counts.

use aho_corasick::{AhoCorasick, MatchKind};
use std::ops::Range;
use tokenizers::{AddedVocabulary, NormalizedString, Normalizer, NormalizerWrapper};

/// The added tokens that are matched before normalisation, or those matched after it.
pub(super) struct AddedTokens {
    /// `None` if there are no tokens.
    finder: Option<AhoCorasick>,
    tokens: Vec<Added>,
}

struct Added {
    id: u32,
    lstrip: bool,
    rstrip: bool,
    /// True if it is plain text in content ([`super::stages::Vocabulary::Content`]).
    structural: bool,
}

/// A part of a text: an added token including the white space that it strips, or (without an id) the text
/// between two.
pub(super) type Part = (Option<u32>, Range<usize>);

impl AddedTokens {
    /// `structural`: which tokens are plain text in content. `None` if a token must be a single word, which
    /// only the library can decide.
    pub fn new(
        vocabulary: &AddedVocabulary,
        normalizer: Option<&NormalizerWrapper>,
        normalized: bool,
        structural: impl Fn(&str) -> bool,
    ) -> Option<AddedTokens> {
        let (mut patterns, mut tokens) = (Vec::new(), Vec::new());
        let decoder = vocabulary.get_added_tokens_decoder();
        for (&id, token) in decoder.iter().filter(|(_, token)| token.normalized == normalized) {
            if token.single_word {
                return None;
            }
            let mut pattern = NormalizedString::from(token.content.as_str());
            if normalized && let Some(normalizer) = normalizer {
                normalizer.normalize(&mut pattern).ok()?;
            }
            patterns.push(pattern.get().to_string());
            let structural = structural(&token.content);
            tokens.push(Added { id, lstrip: token.lstrip, rstrip: token.rstrip, structural });
        }
        let finder = match patterns.is_empty() {
            true => None,
            false => {
                Some(AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(patterns).ok()?)
            }
        };
        Some(AddedTokens { finder, tokens })
    }

    /// Calls `part` with the non-empty parts of `text`, in order. In `content`, structural tokens are plain
    /// text.
    pub fn split(&self, text: &str, content: bool, mut part: impl FnMut(Part)) {
        let mut at = 0;
        for found in self.finder.iter().flat_map(|finder| finder.find_iter(text)) {
            let token = &self.tokens[found.pattern()];
            if content && token.structural {
                continue;
            }
            let (mut start, mut end) = (found.start(), found.end());
            if token.lstrip {
                start = text[..start].trim_end().len().max(at);
            }
            if token.rstrip {
                end = text.len() - text[end..].trim_start().len();
            }
            if at < start {
                part((None, at..start));
            }
            part((Some(token.id), start..end));
            at = end;
        }
        if at < text.len() {
            part((None, at..text.len()));
        }
    }
}

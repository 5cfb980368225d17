//! Added tokens in text: what the library's `AddedVocabulary` finds, without its copies of the text.
//!
//! The library looks for tokens twice: in the text as it is, for those that are matched before
//! normalisation, and in what lies between those, normalised, for the others. Both times the leftmost match
//! counts, and of several the longest.

use aho_corasick::{AhoCorasick, MatchKind};
use std::ops::Range;
use tokenizers::{AddedVocabulary, NormalizedString, Normalizer, NormalizerWrapper};

/// The tokens of a vocabulary that are matched before normalisation, or those that are matched after it.
pub(super) struct AddedTokens {
    /// `None` where there are none.
    finder: Option<AhoCorasick>,
    tokens: Vec<Added>,
}

struct Added {
    id: u32,
    lstrip: bool,
    rstrip: bool,
    /// Plain text in content ([`super::stages::Vocabulary::Content`]).
    structural: bool,
}

/// A part of a text: an added token with the white space that it strips, or what lies between two.
pub(super) type Part = (Option<u32>, Range<usize>);

impl AddedTokens {
    /// `structural` tells which tokens are plain text in content. `None` where a token asks for something
    /// that only the library knows: what a word is.
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

    /// Calls `part` with the parts of `text`, none of them empty, in order. In `content` structural tokens
    /// are plain text.
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

//! Tokenises a stretch of text with the stages of the library, also as the continuation of another text.
//!
//! The library tokenises whole strings. A response after a prompt is not one: a tokenizer that puts a space
//! before the first word of a text must not put one before a response that continues a word. The library
//! inserts text in three stages. Each is changed here for the piece that continues the prompt, and for that
//! piece only:
//!
//! - the `Prepend` normalizer (Llama-2, Phi-3): [`resumed_normalizer`] leaves it out;
//! - the `Metaspace` pre-tokenizer (`first`: Mistral; `always`: T5, where it prefixes every word, so that it
//!   cannot just be switched off) and the `ByteLevel` pre-tokenizer with `add_prefix_space` (RoBERTa):
//!   [`Step`] adds the prefixes piece by piece, then runs the library's stage without prefixes.
//!
//! The matches over the library's enums are exhaustive on purpose: a new kind of stage must not compile
//! before it is reviewed.

use super::cache;
use super::direct::{Direct, is_composed};
use super::model::{Inner, Model};
use super::raw::{RawTokens, TokenizerError};
use crate::guard::guard;
use std::collections::HashMap;
use std::sync::OnceLock;
use tokenizers::normalizer::Range;
use tokenizers::normalizers::{Replace, Sequence, Strip};
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::{
    AddedToken, AddedVocabulary, Model as _, NormalizedString, Normalizer, NormalizerWrapper,
    OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, PreTokenizerWrapper, Token,
};

/// What comes before a stretch of text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Start {
    /// Nothing: the stretch starts the text, and is tokenised as by the library.
    Text,
    /// An added token that is matched before normalisation. Joint tokenisation starts a new section there
    /// too, with the tokenizer's prefix for sections, so a cut makes no difference.
    Section,
    /// An added token that is matched after normalisation: the normalizer has run, but the pre-tokenizer
    /// starts a new section.
    NormalizedSection,
    /// White space in the middle of a section that no token of the prompt represents (T5 drops it): the
    /// prefix represents that white space, so it is inserted.
    Spaced,
    /// Text of the same section: nothing may be inserted.
    Glued,
}

/// Which added tokens are recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Vocabulary {
    /// All of them, as transformers does.
    Full,
    /// Those that are not structural: content cannot contain structural tokens.
    Content,
}

/// The stages of a tokenizer that turn text into ids.
pub(super) struct Stages {
    pub inner: Inner,
    /// Added tokens by id.
    pub added: HashMap<u32, AddedToken>,
    /// Ids by the text of the added token.
    pub added_ids: HashMap<String, u32>,
    /// One bit per id: added tokens that structure a text (special tokens, BOS, EOS, pad and stop tokens).
    structural: Vec<u64>,
    /// The normalizer for a continuation; `None` if it is the same.
    resumed_normalizer: Option<Option<NormalizerWrapper>>,
    /// The pre-tokenizer with controlled prefixes; empty if it inserts none.
    steps: Vec<Step>,
    /// The added tokens of [`Vocabulary::Content`], built on first use.
    content_vocabulary: OnceLock<AddedVocabulary>,
    /// The stages without the library, if the tokenizer is supported.
    pub direct: Option<Direct>,
}

impl Stages {
    /// Takes the library's tokenizer apart. `named`: structural ids in addition to the special added tokens.
    pub fn new(inner: Inner, named: &[u32]) -> Stages {
        let added: HashMap<u32, AddedToken> = inner.get_added_tokens_decoder().into_iter().collect();
        let added_ids = added.iter().map(|(id, token)| (token.content.clone(), *id)).collect();
        let mut structural = Vec::new();
        let special = added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id);
        for id in special.chain(named.iter().copied()) {
            let word = id as usize / 64;
            if structural.len() <= word {
                structural.resize(word + 1, 0u64);
            }
            structural[word] |= 1 << (id % 64);
        }
        let resumed_normalizer =
            inner.get_normalizer().filter(|n| normalizer_depends_on_start(n)).map(resumed_normalizer);
        let mut steps = Vec::new();
        if let Some(pre_tokenizer) = inner.get_pre_tokenizer() {
            flatten(pre_tokenizer, &mut steps);
        }
        if steps.iter().all(|step| matches!(step, Step::Library(_))) {
            steps.clear();
        }
        let mut stages = Stages {
            inner,
            added,
            added_ids,
            structural,
            resumed_normalizer,
            steps,
            content_vocabulary: OnceLock::new(),
            direct: None,
        };
        stages.direct = Direct::of(&stages.inner, |content| {
            stages.added_ids.get(content).is_some_and(|id| stages.is_structural(*id))
        });
        stages
    }

    /// True for ids that structure a text: special added tokens, BOS, EOS, pad and stop tokens.
    pub fn is_structural(&self, id: u32) -> bool {
        self.structural.get(id as usize / 64).is_some_and(|word| word >> (id % 64) & 1 == 1)
    }

    /// True for text that is white space or becomes white space when normalised: T5's normalizer turns zero-width
    /// characters into spaces.
    pub fn is_space(&self, text: &str) -> bool {
        if text.is_empty() || text.contains(char::is_whitespace) {
            return !text.is_empty();
        }
        let mut normalized = NormalizedString::from(text);
        let normalizer = match &self.resumed_normalizer {
            Some(resumed) => resumed.as_ref(),
            None => self.inner.get_normalizer(),
        };
        normalizer.is_some_and(|normalizer| normalizer.normalize(&mut normalized).is_ok())
            && normalized.get().contains(char::is_whitespace)
    }

    /// Appends the tokens of `text`. `base`: the position of its first byte in the whole text. Ranges are
    /// never trimmed: a token ` world` covers its space whatever the file's `trim_offsets`, because
    /// supervision depends on the bytes that a token covers.
    pub fn tokenize(
        &self,
        text: &str,
        base: u32,
        start: Start,
        vocabulary: Vocabulary,
        out: &mut RawTokens,
    ) -> Result<(), TokenizerError> {
        if text.is_empty() || self.tokenize_directly(text, base, vocabulary, out) {
            return Ok(());
        }
        // Oniguruma panics if a regular expression backtracks too often.
        guard(|| self.tokenize_by_library(text, base, start, vocabulary, out)).map_err(TokenizerError::from)
    }

    fn tokenize_by_library(
        &self,
        text: &str,
        base: u32,
        start: Start,
        vocabulary: Vocabulary,
        out: &mut RawTokens,
    ) -> Result<(), TokenizerError> {
        let added = match vocabulary {
            Vocabulary::Full => self.inner.get_added_vocabulary(),
            Vocabulary::Content => self.content_vocabulary(),
        };
        let full = self.inner.get_normalizer();
        let resumed = match (&self.resumed_normalizer, start) {
            (Some(resumed), Start::Glued | Start::NormalizedSection) => Some(resumed.as_ref()),
            _ => None,
        };
        let mut pieces = match resumed {
            None if matches!(full, Some(NormalizerWrapper::NFC(_))) && is_composed(text) => {
                added.extract_and_normalize(None::<&NormalizerWrapper>, text)
            }
            None => added.extract_and_normalize(full, text),
            Some(resumed) => added.extract_and_normalize(Some(&Resume { full, resumed }), text),
        };
        if self.steps.is_empty() || start == Start::Text {
            if let Some(pre_tokenizer) = self.inner.get_pre_tokenizer() {
                pre_tokenizer.pre_tokenize(&mut pieces)?;
            }
        } else {
            for step in &self.steps {
                step.run(start, &mut pieces)?;
            }
        }
        // The library would now build an `Encoding` of seven vectors, of which two are needed. Iterating over
        // the pieces here takes Qwen2.5 from 1.25 to 1.30 million tokens a second (one thread, forum posts of
        // 4 kB). `split` yields the pieces that are not tokens yet, with their index among all pieces; the
        // gaps between the indices are the added tokens.
        let mut added_tokens = pieces
            .get_splits(OffsetReferential::Original, OffsetType::Byte)
            .into_iter()
            .enumerate()
            .filter_map(|(index, (_, range, tokens))| Some((index, range, tokens.as_ref()?.first()?.id)))
            .collect::<Vec<_>>()
            .into_iter()
            .peekable();
        let model = self.inner.get_model();
        let push = |out: &mut RawTokens, id: u32, (start, end): (usize, usize)| {
            // Insertions of a normalizer can make a range invalid; later stages compare bytes and need valid
            // ranges.
            let start = start.min(text.len());
            out.ids.push(id);
            out.bytes.push(base + start as u32..base + end.clamp(start, text.len()) as u32);
        };
        pieces.split(|index, piece| {
            while let Some((_, range, id)) = added_tokens.next_if(|(at, ..)| *at < index) {
                push(out, id, range);
            }
            let tokens = match vocabulary {
                Vocabulary::Full => model.tokenize(piece.get())?,
                Vocabulary::Content => self.without_structural(model, piece.get())?,
            };
            let shift = piece.offsets_original().0;
            for token in tokens {
                let normalized = token.offsets.0..token.offsets.1;
                let range = match piece.convert_offsets(Range::Normalized(normalized)) {
                    Some(range) => (shift + range.start, shift + range.end),
                    None => token.offsets,
                };
                push(out, token.id, range);
            }
            Ok(std::iter::empty::<NormalizedString>())
        })?;
        for (_, range, id) in added_tokens {
            push(out, id, range);
        }
        Ok(())
    }

    /// Tokenises without the library. False, with nothing appended, if that is not possible.
    ///
    /// Qwen2.5, forum posts, one thread: 39 million tokens a second, against 1.5 million with the library's
    /// stages.
    fn tokenize_directly(&self, text: &str, base: u32, vocabulary: Vocabulary, out: &mut RawTokens) -> bool {
        let (Some(direct), Model::Bpe(bpe)) = (self.direct_for(text), self.inner.get_model()) else {
            return false;
        };
        let before = out.ids.len();
        let content = vocabulary == Vocabulary::Content;
        cache::with(bpe, |pieces| {
            direct.split(text, content, |(id, part)| match id {
                Some(id) => out.push(id, base as usize + part.start..base as usize + part.end),
                None => direct.tokenize(&text[part.clone()], base + part.start as u32, pieces, out),
            });
        });
        // Content must not merge into a structural token (`without_structural`). This happens in no published
        // vocabulary, so the library's slower stages are good enough.
        if content && out.ids[before..].iter().any(|&id| self.is_structural(id)) {
            out.truncate(before);
            return false;
        }
        true
    }

    /// The stages without the library, if they support this text.
    fn direct_for(&self, text: &str) -> Option<&Direct> {
        self.direct.as_ref().filter(|direct| direct.takes(text))
    }

    /// The added tokens in `text` by the full vocabulary: id and byte range, including stripped white space.
    pub fn added_in(&self, text: &str) -> Vec<(u32, std::ops::Range<usize>)> {
        if let Some(direct) = self.direct_for(text) {
            let mut found = Vec::new();
            direct.split(text, false, |(id, part)| found.extend(id.map(|id| (id, part))));
            return found;
        }
        let pieces =
            self.inner.get_added_vocabulary().extract_and_normalize(self.inner.get_normalizer(), text);
        pieces
            .get_splits(OffsetReferential::Original, OffsetType::Byte)
            .into_iter()
            .filter_map(|(_, (start, end), tokens)| Some((tokens.as_ref()?.first()?.id, start..end)))
            .collect()
    }

    fn content_vocabulary(&self) -> &AddedVocabulary {
        self.content_vocabulary.get_or_init(|| {
            let mut vocabulary = self.inner.get_added_vocabulary().clone();
            // The flag below skips special tokens, so structural tokens that the file does not declare
            // special (Phi-3's `</s>`) are made special in this copy.
            let named: Vec<AddedToken> = self
                .added
                .iter()
                .filter(|(id, token)| !token.special && self.is_structural(**id))
                .map(|(_, token)| token.clone().special(true))
                .collect();
            // This fails only if a token cannot be normalised, and each of these was normalised before.
            let _ = vocabulary.add_tokens(named, self.inner.get_model(), self.inner.get_normalizer());
            vocabulary.set_encode_special_tokens(true);
            vocabulary
        })
    }

    /// Tokenises a piece of content without structural ids. Not extracting added tokens is not enough: a
    /// Unigram model has `</s>` in its vocabulary, with the best score of all, and chooses it for plain text.
    /// A piece that yields a structural id is split after its first character.
    fn without_structural(&self, model: &Model, text: &str) -> tokenizers::Result<Vec<Token>> {
        let tokens = model.tokenize(text)?;
        // The unknown token, special in most files, is right for an unknown character.
        let structural = |token: &Token| {
            self.is_structural(token.id)
                && self.added.get(&token.id).is_some_and(|added| {
                    text.get(token.offsets.0..token.offsets.1) == Some(added.content.as_str())
                })
        };
        let Some(token) = tokens.iter().find(|token| structural(token)) else { return Ok(tokens) };
        let (start, end) = token.offsets;
        let first = text[start..end].chars().next().map_or(0, char::len_utf8);
        if first == 0 || start + first >= text.len() {
            return Ok(tokens);
        }
        let (head, tail) = text.split_at(start + first);
        let mut tokens = self.without_structural(model, head)?;
        tokens.extend(self.without_structural(model, tail)?.into_iter().map(|mut token| {
            token.offsets = (token.offsets.0 + head.len(), token.offsets.1 + head.len());
            token
        }));
        Ok(tokens)
    }
}

/// The normalizer of a continuation: without insertions for the piece at the first byte, unchanged for later
/// sections.
struct Resume<'a> {
    full: Option<&'a NormalizerWrapper>,
    resumed: Option<&'a NormalizerWrapper>,
}

impl Normalizer for Resume<'_> {
    fn normalize(&self, text: &mut NormalizedString) -> tokenizers::Result<()> {
        let normalizer = if text.offsets_original().0 == 0 { self.resumed } else { self.full };
        normalizer.map_or(Ok(()), |normalizer| normalizer.normalize(text))
    }
}

/// True if the normalizer treats the start of a text differently.
fn normalizer_depends_on_start(normalizer: &NormalizerWrapper) -> bool {
    match normalizer {
        NormalizerWrapper::Prepend(_) => true,
        NormalizerWrapper::StripNormalizer(strip) => strip.strip_left,
        NormalizerWrapper::Replace(replace) => anchored(replace),
        NormalizerWrapper::Sequence(sequence) => sequence.as_ref().iter().any(normalizer_depends_on_start),
        NormalizerWrapper::BertNormalizer(_)
        | NormalizerWrapper::StripAccents(_)
        | NormalizerWrapper::NFC(_)
        | NormalizerWrapper::NFD(_)
        | NormalizerWrapper::NFKC(_)
        | NormalizerWrapper::NFKD(_)
        | NormalizerWrapper::Lowercase(_)
        | NormalizerWrapper::Nmt(_)
        | NormalizerWrapper::Precompiled(_)
        | NormalizerWrapper::ByteLevel(_) => false,
    }
}

/// The normalizer for the middle of a text, without prefixes and stripping at the start.
fn resumed_normalizer(normalizer: &NormalizerWrapper) -> Option<NormalizerWrapper> {
    match normalizer {
        NormalizerWrapper::Prepend(_) => None,
        NormalizerWrapper::StripNormalizer(strip) => {
            strip.strip_right.then(|| Strip::new(false, true).into())
        }
        NormalizerWrapper::Replace(replace) if anchored(replace) => None,
        NormalizerWrapper::Sequence(sequence) => {
            let parts = sequence.as_ref().iter().filter_map(resumed_normalizer).collect();
            Some(Sequence::new(parts).into())
        }
        other => Some(other.clone()),
    }
}

/// True for a replacement that matches only at the start of a text. The library hides the pattern, but
/// serialises it.
fn anchored(replace: &Replace) -> bool {
    serde_json::to_value(replace).is_ok_and(|json| {
        json["pattern"]["Regex"]
            .as_str()
            .is_some_and(|regex| regex.starts_with('^') || regex.starts_with("\\A"))
    })
}

/// A stage of the pre-tokenizer, with controlled prefixes.
enum Step {
    /// A stage of the library that inserts nothing.
    Library(PreTokenizerWrapper),
    /// `Metaspace`: spaces become `replacement`, and pieces get it as a prefix by `scheme`; then the
    /// library's stage without prefixes.
    Metaspace { replacement: char, scheme: PrependScheme, rest: PreTokenizerWrapper },
    /// `ByteLevel` with `add_prefix_space`, then the library's stage without it.
    ByteLevel { rest: PreTokenizerWrapper },
}

fn flatten(pre_tokenizer: &PreTokenizerWrapper, steps: &mut Vec<Step>) {
    match pre_tokenizer {
        PreTokenizerWrapper::Sequence(sequence) => {
            sequence.as_ref().iter().for_each(|part| flatten(part, steps));
        }
        PreTokenizerWrapper::Metaspace(metaspace) if metaspace.prepend_scheme != PrependScheme::Never => {
            let replacement = metaspace.get_replacement();
            let rest = Metaspace::new(replacement, PrependScheme::Never, metaspace.get_split()).into();
            steps.push(Step::Metaspace { replacement, scheme: metaspace.prepend_scheme, rest });
        }
        PreTokenizerWrapper::ByteLevel(byte_level) if byte_level.add_prefix_space => {
            steps.push(Step::ByteLevel { rest: byte_level.add_prefix_space(false).into() });
        }
        PreTokenizerWrapper::BertPreTokenizer(_)
        | PreTokenizerWrapper::ByteLevel(_)
        | PreTokenizerWrapper::Delimiter(_)
        | PreTokenizerWrapper::Metaspace(_)
        | PreTokenizerWrapper::Whitespace(_)
        | PreTokenizerWrapper::Split(_)
        | PreTokenizerWrapper::Punctuation(_)
        | PreTokenizerWrapper::WhitespaceSplit(_)
        | PreTokenizerWrapper::Digits(_)
        | PreTokenizerWrapper::UnicodeScripts(_)
        | PreTokenizerWrapper::FixedLength(_) => steps.push(Step::Library(pre_tokenizer.clone())),
    }
}

impl Step {
    /// Runs the stage over the pieces of a stretch that does not start the text. A piece at the first byte of
    /// the stretch continues the prompt. A piece after dropped white space starts later and keeps the prefix,
    /// which represents that white space.
    fn run(&self, start: Start, pieces: &mut PreTokenizedString) -> tokenizers::Result<()> {
        match self {
            Step::Library(stage) => stage.pre_tokenize(pieces),
            Step::Metaspace { replacement, scheme, rest } => {
                let prefix = replacement.to_string();
                pieces.split(|_, mut piece| {
                    piece.replace(' ', &prefix)?;
                    let wanted = match (scheme, piece.offsets_original().0) {
                        (PrependScheme::Never, _) => false,
                        // `first` refers to the whole text, whose start is not in this stretch.
                        (PrependScheme::First, 0) => start == Start::Spaced,
                        (PrependScheme::First, _) => false,
                        (PrependScheme::Always, 0) => start != Start::Glued,
                        (PrependScheme::Always, _) => true,
                    };
                    if wanted && !piece.get().starts_with(*replacement) {
                        piece.prepend(&prefix);
                    }
                    Ok(std::iter::once(piece))
                })?;
                rest.pre_tokenize(pieces)
            }
            Step::ByteLevel { rest } => {
                pieces.split(|_, mut piece| {
                    let wanted = piece.offsets_original().0 > 0 || start != Start::Glued;
                    if wanted && !piece.get().starts_with(' ') {
                        piece.prepend(" ");
                    }
                    Ok(std::iter::once(piece))
                })?;
                rest.pre_tokenize(pieces)
            }
        }
    }
}

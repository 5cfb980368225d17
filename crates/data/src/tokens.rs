//! Rendered text to tokens: ids, the bytes that each token stands for, and its origin.
//!
//! The rules are MASKING.md's, "The boundary between prompt and response". With `boundary: split` they hold
//! by construction: the text is cut at the start of each response, the prompt goes through the tokenizer
//! exactly as it does at inference, and the response goes through it as the continuation of a text (no
//! second BOS, no second prefix space: tokens/pipeline.rs says how). The halves are normalised apart. That is the
//! only way to keep both promises where a normalizer would merge characters across the cut (`cafe` and a
//! combining accent under NFC): the prompt's ids are then still those of the prompt alone.
//!
//! Where the cut falls on the edge of an added token, or where no token straddles a white-space boundary
//! anyway, split and joint tokenisation are the same.

mod added;
mod bpe;
mod cache;
mod decode;
#[cfg(test)]
mod equality;
mod model;
mod pipeline;
mod pretokenise;
mod settings;

pub use decode::DecodeStream;

use crate::policy::{Boundary, ContentSpecialTokens};
use crate::render::{Rendered, Span};
use crate::{Error, Origin, Policy, Result};
use decode::Alphabet;
use model::Inner;
use pipeline::{Pipeline, Start, Vocabulary};
use settings::Settings;
use std::ops::Range;
use std::path::{Path, PathBuf};
use tokenizers::{AddedToken, Encoding, Token};

/// What the library returns when something fails.
type TokenizerError = tokenizers::Error;

/// A row as tokens. All vectors have the same length: one entry per token.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tokens {
    /// Token ids.
    pub ids: Vec<u32>,
    /// The bytes of [`Rendered::text`] that each token stands for. Tokens that share a character (an emoji
    /// in byte-level BPE) each have the whole character's range; a token that the post-processor added has
    /// an empty one, at the end of the text that it follows.
    pub bytes: Vec<Range<u32>>,
    /// Why each token is supervised or not.
    pub origins: Vec<Origin>,
    /// The loss weight of each token: its span's, and the largest where it overlaps several.
    pub weights: Vec<f32>,
}

impl Tokens {
    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// True for a row without tokens.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }
}

/// Tokens that straddle the start of a response, and what they would be had the text been cut there.
#[derive(Clone, Debug, PartialEq)]
pub struct Straddle {
    /// Indices of the tokens, all of which begin before `at` and end after it.
    pub tokens: Range<usize>,
    /// The byte at which the response starts.
    pub at: u32,
    /// The smallest place around `at` on whose edges both tokenisations have an edge of a token: cutting
    /// `12|3456` can move every edge up to the next word.
    pub bytes: Range<u32>,
    /// The ids of that place as they are.
    pub joint: Vec<u32>,
    /// The ids of that place under `boundary: split`.
    pub split: Vec<u32>,
}

/// The result of [`Tokenizer::encode`]: tokens, and what is worth reporting about them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Encoded {
    /// The tokens.
    pub tokens: Tokens,
    /// Where tokens straddle the start of a response (finding M003); empty under `boundary: split`.
    pub straddles: Vec<Straddle>,
    /// Indices of structural tokens that came from prompt or response text (finding S001).
    pub structural_from_content: Vec<usize>,
    /// Indices of tokens that overlap spans of different weights; each has the largest of them.
    pub mixed_weights: Vec<usize>,
    /// The row starts with the BOS twice (finding M006).
    pub double_bos: bool,
}

/// A token with a role of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecialToken {
    /// Its id.
    pub id: u32,
    /// Its text.
    pub content: String,
}

/// A tokenizer and its special tokens. It is immutable, and may be used from many threads at once.
pub struct Tokenizer {
    pipeline: Pipeline,
    alphabet: Alphabet,
    /// What the post-processor puts in front of a text, and behind it.
    front: Vec<u32>,
    back: Vec<u32>,
    bos: Option<SpecialToken>,
    eos: Option<SpecialToken>,
    pad: Option<SpecialToken>,
    /// The EOS and the list of `generation_config.json`.
    stops: Vec<u32>,
    vocab_size: usize,
    fingerprint: String,
    path: PathBuf,
}

/// Ids and byte ranges, before origins.
#[derive(Default)]
struct RawTokens {
    ids: Vec<u32>,
    bytes: Vec<Range<u32>>,
}

impl RawTokens {
    /// No tokens, and room for those of a text: English has some four bytes to a token. Growing once is
    /// cheap, a second buffer for each row is not.
    fn for_text(text: &str) -> RawTokens {
        let room = text.len() / 4 + 8;
        RawTokens { ids: Vec::with_capacity(room), bytes: Vec::with_capacity(room) }
    }

    fn push(&mut self, id: u32, bytes: Range<usize>) {
        self.ids.push(id);
        self.bytes.push(bytes.start as u32..bytes.end as u32);
    }

    fn truncate(&mut self, length: usize) {
        self.ids.truncate(length);
        self.bytes.truncate(length);
    }
}

impl Tokenizer {
    /// Loads the tokenizer of a model folder: `tokenizer.json`, and where they exist `tokenizer_config.json`
    /// and `special_tokens_map.json` (bos, eos, pad) and `generation_config.json` or `config.json` (stop ids).
    ///
    /// Truncation, padding and BPE dropout that `tokenizer.json` may ask for are switched off: rows are cut
    /// and padded by the policy, and a row's ids never depend on chance.
    pub fn from_dir(dir: &Path) -> Result<Tokenizer> {
        let path = dir.join("tokenizer.json");
        let json = match std::fs::read(&path) {
            Ok(json) => json,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::Tokenizer {
                    path,
                    message: "no such file; a model folder needs the fast tokenizer's file (for an old model, \
                              save it with transformers: AutoTokenizer.from_pretrained(..).save_pretrained(..))"
                        .to_string(),
                });
            }
            Err(error) => return Err(Error::io(path, error)),
        };
        Tokenizer::new(&json, Settings::from_dir(dir)?, path)
    }

    /// Loads a tokenizer from the text of a `tokenizer.json` and, optionally, of a `tokenizer_config.json`.
    pub fn from_bytes(json: &[u8], config: Option<&[u8]>) -> Result<Tokenizer> {
        let settings = match config {
            Some(config) => Settings::from_config_bytes(config, Path::new("tokenizer_config.json"))?,
            None => Settings { path: "tokenizer_config.json".into(), ..Settings::default() },
        };
        Tokenizer::new(json, settings, "tokenizer.json".into())
    }

    fn new(json: &[u8], settings: Settings, path: PathBuf) -> Result<Tokenizer> {
        let broken = |message: String| Error::Tokenizer { path: path.clone(), message };
        let mut inner = model::load(json).map_err(|error| {
            broken(format!("not a tokenizer ({error}); copy the file again from where the model came"))
        })?;
        declare_added_tokens(&mut inner, &settings)?;

        let find = |content: &Option<String>| {
            let content = content.as_ref()?;
            inner.token_to_id(content).map(|id| SpecialToken { id, content: content.clone() })
        };
        let (bos, pad) = (find(&settings.bos), find(&settings.pad));
        let mut eos = find(&settings.eos);
        if let (None, Some(content)) = (&eos, &settings.eos) {
            return Err(Error::Tokenizer {
                path: settings.path.clone(),
                message: format!(
                    "\"eos_token\" is {content:?}, which is not in {}; name a token of the vocabulary",
                    path.display()
                ),
            });
        }
        let added = inner.get_added_vocabulary().get_vocab().values().copied().max();
        let vocab_size = inner.get_model().highest_id().max(added).map_or(0, |id| id as usize + 1);
        if eos.is_none() {
            let named = settings.eos_ids.first().copied();
            eos = named.and_then(|id| inner.id_to_token(id).map(|content| SpecialToken { id, content }));
        }
        let mut stops: Vec<u32> = Vec::new();
        for id in eos.iter().map(|eos| eos.id).chain(settings.eos_ids.iter().copied()) {
            if !stops.contains(&id) {
                stops.push(id);
            }
        }

        let (front, back) = post_processor_ends(&inner).map_err(broken)?;
        let named: Vec<u32> = [&bos, &eos, &pad]
            .into_iter()
            .flatten()
            .map(|token| token.id)
            .chain(stops.iter().copied())
            .collect();
        let mut hasher = blake3::Hasher::new();
        hasher.update(json);
        // Everything beside tokenizer.json that changes an id, in a form whose fields cannot run together.
        let declared: Vec<_> = (settings.added.iter())
            .map(|(id, t)| (id, &t.content, t.single_word, t.lstrip, t.rstrip, t.normalized, t.special))
            .collect();
        let special = (&settings.bos, &settings.eos, &settings.pad, &settings.eos_ids, declared);
        hasher.update(serde_json::to_string(&special).unwrap_or_default().as_bytes());
        Ok(Tokenizer {
            alphabet: Alphabet::of(&inner),
            pipeline: Pipeline::new(inner, &named),
            front,
            back,
            bos,
            eos,
            pad,
            stops,
            vocab_size,
            fingerprint: hasher.finalize().to_hex().to_string(),
            path,
        })
    }

    /// The highest id plus one, added tokens included: the smallest embedding that fits.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The token that starts a text.
    pub fn bos(&self) -> Option<&SpecialToken> {
        self.bos.as_ref()
    }

    /// The token that ends a text or a turn: `eos_token`, else the first `eos_token_id`.
    pub fn eos(&self) -> Option<&SpecialToken> {
        self.eos.as_ref()
    }

    /// The padding token.
    pub fn pad(&self) -> Option<&SpecialToken> {
        self.pad.as_ref()
    }

    /// The id of a token of the vocabulary, by its exact text.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.pipeline.inner.token_to_id(token)
    }

    /// True for an added token that structures a text: a special one, bos, eos, pad or a stop token.
    pub fn is_structural(&self, id: u32) -> bool {
        self.pipeline.is_structural(id)
    }

    /// The ids that end a response: the EOS, the list of `generation_config.json` (or of `config.json`), and
    /// the policy's `stop_tokens`, without repetition.
    ///
    /// # Errors
    /// A stop token of the policy that is not in the vocabulary.
    pub fn stop_ids(&self, policy: &Policy) -> Result<Vec<u32>> {
        let mut ids = self.stops.clone();
        for token in &policy.stop_tokens {
            let id = self.token_to_id(token).ok_or_else(|| Error::Tokenizer {
                path: self.path.clone(),
                message: format!(
                    "\"stop_tokens\" names {token:?}, which is not a token here; write the token as it stands in \
                     \"added_tokens\""
                ),
            })?;
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        Ok(ids)
    }

    /// The text of ids. Ids outside the vocabulary have none; bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let inner = &self.pipeline.inner;
        inner.decode(ids, skip_special).unwrap_or_else(|_| {
            // A decoder that refuses these tokens (none of the usual ones does) still leaves their text.
            ids.iter()
                .filter(|id| !skip_special || !self.pipeline.added.get(id).is_some_and(|token| token.special))
                .map(|&id| self.token_text(id))
                .collect()
        })
    }

    /// One token as readable text, for displays: `▁` and `Ġ` are spaces, and bytes that are not valid UTF-8
    /// alone are `<0xNN>`. An id outside the vocabulary is shown as `<id N>`.
    pub fn token_text(&self, id: u32) -> String {
        match (self.pipeline.added.get(&id), self.pipeline.inner.id_to_token(id)) {
            (Some(added), _) => added.content.clone(),
            (None, Some(token)) => decode::readable(&self.alphabet.bytes(&token)),
            (None, None) => format!("<id {id}>"),
        }
    }

    /// A decoder for ids that arrive one at a time; it holds incomplete characters back.
    pub fn decode_stream(&self, skip_special: bool) -> DecodeStream<'_> {
        DecodeStream::new(self, skip_special)
    }

    /// A prompt as the model is given it at inference: what the post-processor puts in front, the text,
    /// nothing behind.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.front.clone();
        ids.extend(self.encode_text(text)?);
        Ok(ids)
    }

    /// A text as it stands (a rendered chat prompt, which carries its own BOS): nothing in front, nothing behind.
    pub fn encode_text(&self, text: &str) -> Result<Vec<u32>> {
        let mut raw = RawTokens::for_text(text);
        self.pipeline
            .tokenize(text, 0, Start::Text, Vocabulary::Full, &mut raw)
            .map_err(|error| Error::Tokenizer { path: self.path.clone(), message: error.to_string() })?;
        Ok(raw.ids)
    }

    /// The BLAKE3 hash, in hex, of `tokenizer.json` and of the special tokens that its neighbours declare.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Tokenises a row by the policy's `boundary` and `content_special_tokens`.
    ///
    /// - Under `boundary: split` the ids before a plain row's response are
    ///   [`encode_prompt`](Tokenizer::encode_prompt)`(prompt)` (under `content_special_tokens: text`, if the
    ///   prompt spells no structural token).
    /// - A token that overlaps supervised bytes has the origin of the first of them; any other has the origin
    ///   of its first byte.
    /// - What the post-processor adds is Scaffold, except an EOS behind a text that asks for one
    ///   (its last span is EndOfTurn and is the EOS, or empty): that one stands for the span. Not so under
    ///   `boundary: joint` with `append_eos: false`, which asks for the library's own encoding: a text that
    ///   spells the EOS then keeps both, the second masked.
    /// - An EndOfTurn span at the end of plain text that is exactly an added token is that token's id, whatever
    ///   a normalizer or the token's own stripping would make of the text around it.
    ///
    /// # Errors
    /// Spans that do not tile the text; a text of more than 4 GiB; a character that the model cannot express.
    pub fn encode(&self, rendered: &Rendered, policy: &Policy) -> Result<Encoded> {
        check_spans(rendered)?;
        let row = |error: TokenizerError| Error::Row {
            id: rendered.id.clone(),
            message: format!("the tokenizer refuses the text: {error}"),
            help: format!("look at the model and unk_token of {}", self.path.display()),
        };
        let cuts = response_starts(rendered);
        let (raw, ends) = match policy.boundary {
            Boundary::Split => self.tokenize(rendered, &cuts, policy).map_err(row)?,
            Boundary::Joint => self.tokenize(rendered, &[], policy).map_err(row)?,
        };
        let (tokens, mixed_weights) = attribute(raw, &ends, rendered);
        let straddles = match policy.boundary {
            Boundary::Split => Vec::new(),
            Boundary::Joint => {
                let split = || self.tokenize(rendered, &cuts, policy).map(|(raw, _)| raw).map_err(row);
                straddles(&tokens, &cuts, split)?
            }
        };
        Ok(Encoded {
            structural_from_content: self.structural_from_content(&tokens, rendered),
            double_bos: self.double_bos(&tokens),
            tokens,
            straddles,
            mixed_weights,
        })
    }

    /// The ids and ranges of a row that is cut at `cuts`, and which of them the post-processor added.
    fn tokenize(
        &self,
        rendered: &Rendered,
        cuts: &[usize],
        policy: &Policy,
    ) -> Result<(RawTokens, Ends), TokenizerError> {
        let text = rendered.text.as_str();
        let mut raw = RawTokens::for_text(text);
        let mut ends = Ends::default();
        let final_stop = self.final_stop(rendered);
        let spelled = final_stop.as_ref().is_some_and(|stop| !stop.range.is_empty());
        let one_eos = !(spelled && policy.boundary == Boundary::Joint && !policy.append_eos);
        let end = final_stop.as_ref().map_or(text.len(), |stop| stop.range.start);
        if rendered.add_special_tokens {
            self.front.iter().for_each(|&id| raw.push(id, 0..0));
            ends.front = self.front.len();
        }
        match policy.content_special_tokens {
            ContentSpecialTokens::Special => {
                self.tokenize_stretch(text, 0..end, cuts, Vocabulary::Full, &mut raw)?;
            }
            ContentSpecialTokens::Text => {
                // Structural tokens are looked for where the template speaks, and nowhere else; what lies
                // between two of them is tokenised as it would be between any two.
                let mut at = 0;
                for (id, range) in self.scaffold_tokens(rendered, end) {
                    self.tokenize_stretch(text, at..range.start, cuts, Vocabulary::Content, &mut raw)?;
                    at = range.end;
                    raw.push(id, range);
                }
                self.tokenize_stretch(text, at..end, cuts, Vocabulary::Content, &mut raw)?;
            }
        }
        if let Some(stop) = &final_stop
            && !(one_eos && rendered.add_special_tokens && self.back.contains(&stop.id))
        {
            raw.push(stop.id, stop.range.clone());
        }
        if rendered.add_special_tokens {
            ends.back = raw.ids.len();
            for &id in &self.back {
                match &final_stop {
                    // The first such id stands for the EOS that the row asks for: one EOS, never two.
                    Some(stop) if one_eos && stop.id == id && ends.stop.is_none() => {
                        ends.stop = Some((raw.ids.len(), stop.span));
                        raw.push(id, stop.range.clone());
                    }
                    _ => raw.push(id, text.len()..text.len()),
                }
            }
        } else {
            ends.back = raw.ids.len();
        }
        Ok((raw, ends))
    }

    /// Tokenises `stretch` of the text, cut at those `cuts` that lie inside it.
    fn tokenize_stretch(
        &self,
        text: &str,
        stretch: Range<usize>,
        cuts: &[usize],
        vocabulary: Vocabulary,
        raw: &mut RawTokens,
    ) -> Result<(), TokenizerError> {
        let mut at = stretch.start;
        let inside = cuts.iter().copied().filter(|cut| stretch.start < *cut && *cut < stretch.end);
        for next in inside.chain(std::iter::once(stretch.end)) {
            let start = self.start(text, at, raw);
            self.pipeline.tokenize(&text[at..next], at as u32, start, vocabulary, raw)?;
            at = next;
        }
        Ok(())
    }

    /// How the text goes on at byte `at`, given the tokens before it.
    fn start(&self, text: &str, at: usize, raw: &RawTokens) -> Start {
        // Where nothing of the text has become a token yet, the text starts here.
        let Some(last) = raw.bytes.iter().rposition(|bytes| !bytes.is_empty()) else { return Start::Text };
        let bytes = raw.bytes[last].start as usize..raw.bytes[last].end as usize;
        if self.pipeline.is_space(&text[bytes.end.min(at)..at]) {
            return Start::Spaced;
        }
        match self.pipeline.added.get(&raw.ids[last]) {
            Some(token) if spells(&text[bytes], token) => match token.normalized {
                true => Start::NormalizedSection,
                false => Start::Section,
            },
            _ => Start::Glued,
        }
    }

    /// The stop token that ends a plain text, if its last span is one.
    fn final_stop(&self, rendered: &Rendered) -> Option<FinalStop> {
        if !rendered.add_special_tokens {
            return None;
        }
        let mut empty = None;
        for (index, span) in rendered.spans.iter().enumerate().rev() {
            let asks = matches!(span.origin, Origin::EndOfTurn { .. });
            if span.range.is_empty() {
                empty = empty.or(asks.then_some(index));
                continue;
            }
            if asks && empty.is_none() {
                let id = *self.pipeline.added_ids.get(&rendered.text[span.range.clone()])?;
                return Some(FinalStop { id, range: span.range.clone(), span: index });
            }
            break;
        }
        // An end of turn without text is a wish that only the post-processor's own EOS can grant.
        let eos = self.eos.as_ref().filter(|eos| self.back.contains(&eos.id))?;
        let end = rendered.text.len();
        empty.map(|span| FinalStop { id: eos.id, range: end..end, span })
    }

    /// Structural tokens in the text that the template wrote, up to byte `end`.
    fn scaffold_tokens(&self, rendered: &Rendered, end: usize) -> Vec<(u32, Range<usize>)> {
        let mut found = Vec::new();
        let written = |span: &Span| matches!(span.origin, Origin::Scaffold | Origin::EndOfTurn { .. });
        let spans: Vec<&Span> = rendered.spans.iter().filter(|span| !span.range.is_empty()).collect();
        for run in spans.chunk_by(|a, b| written(a) == written(b)).filter(|run| written(run[0])) {
            let start = run[0].range.start;
            let stop = run[run.len() - 1].range.end.min(end);
            if start >= stop {
                break;
            }
            let tokens = self.pipeline.added_in(&rendered.text[start..stop]).into_iter();
            found.extend(
                tokens
                    .filter(|(id, _)| self.pipeline.is_structural(*id))
                    .map(|(id, range)| (id, start + range.start..start + range.end)),
            );
        }
        found
    }

    fn structural_from_content(&self, tokens: &Tokens, rendered: &Rendered) -> Vec<usize> {
        let content = |span: &Span| matches!(span.origin, Origin::Prompt { .. } | Origin::Response { .. });
        let from_content = |index: usize| {
            let range = tokens.bytes[index].start as usize..tokens.bytes[index].end as usize;
            let Some(added) = self.pipeline.added.get(&tokens.ids[index]) else { return false };
            let text = &rendered.text[range.clone()];
            // White space that the token stripped is not where it came from; and an unknown character is
            // `<unk>` without anybody having written so.
            let start = range.start + (text.len() - text.trim_start().len());
            let end = (start + text.trim().len()).max(start);
            spells(text, added)
                && rendered
                    .spans
                    .iter()
                    .any(|span| content(span) && span.range.start < end && start < span.range.end)
        };
        let structural = |index: &usize| self.pipeline.is_structural(tokens.ids[*index]);
        (0..tokens.len()).filter(structural).filter(|&index| from_content(index)).collect()
    }

    /// True where the row starts with the BOS and the BOS again. An EOS that is the same token and ends an
    /// empty row is not a second BOS.
    fn double_bos(&self, tokens: &Tokens) -> bool {
        let bos = self.bos.as_ref().map(|bos| bos.id).or(self.front.last().copied());
        bos.is_some_and(|bos| tokens.ids.starts_with(&[bos, bos]))
            && !matches!(tokens.origins[1], Origin::EndOfTurn { .. })
    }
}

/// True where the text is the token's own, but for white space that it strips.
fn spells(text: &str, token: &AddedToken) -> bool {
    text.trim() == token.content.trim()
}

/// The stop token that ends a plain text.
struct FinalStop {
    id: u32,
    range: Range<usize>,
    /// Index of its span.
    span: usize,
}

/// Which tokens of a row are the post-processor's.
#[derive(Default)]
struct Ends {
    /// How many stand in front.
    front: usize,
    /// Index of the first one behind.
    back: usize,
    /// The one behind that stands for a span: its index, the span's.
    stop: Option<(usize, usize)>,
}

/// Gives every token its origin and weight. Also returns the tokens that overlap different weights.
fn attribute(raw: RawTokens, ends: &Ends, rendered: &Rendered) -> (Tokens, Vec<usize>) {
    // Empty spans hold no byte, so no token can be theirs.
    let spans: Vec<&Span> = rendered.spans.iter().filter(|span| !span.range.is_empty()).collect();
    let mut origins = Vec::with_capacity(raw.ids.len());
    let mut weights = Vec::with_capacity(raw.ids.len());
    let mut mixed = Vec::new();
    // The span of the last token: nearly all tokens lie within the same one as the token before them.
    let mut current: Option<&Span> = None;
    for (index, bytes) in raw.bytes.iter().enumerate() {
        let within = |span: &&Span| {
            let span = &span.range;
            span.start <= bytes.start as usize && bytes.end as usize <= span.end && !bytes.is_empty()
        };
        if let Some(span) = current.filter(within)
            && (ends.front..ends.back).contains(&index)
        {
            origins.push(span.origin);
            weights.push(span.weight);
            continue;
        }
        let stands_for = ends.stop.filter(|(stop, _)| *stop == index).map(|(_, span)| &rendered.spans[span]);
        let added = index < ends.front || index >= ends.back;
        let (start, end) = (bytes.start as usize, bytes.end as usize);
        // An empty range (a token that only stands for an inserted character) belongs to the byte behind it.
        let first = spans.partition_point(|span| span.range.end <= start).min(spans.len().saturating_sub(1));
        current = spans.get(first).copied();
        let (mut origin, mut weight) = match (stands_for, spans.get(first)) {
            (Some(span), _) => (span.origin, span.weight),
            (None, Some(span)) if !added => (span.origin, span.weight),
            _ => (Origin::Scaffold, 0.0),
        };
        if !added {
            let mut differs = false;
            for span in spans.iter().skip(first + 1).take_while(|span| span.range.start < end) {
                if span.origin.supervised() && !origin.supervised() {
                    origin = span.origin;
                }
                differs |= span.weight != weight;
                weight = weight.max(span.weight);
            }
            if differs {
                mixed.push(index);
            }
        }
        origins.push(origin);
        weights.push(weight);
    }
    (Tokens { ids: raw.ids, bytes: raw.bytes, origins, weights }, mixed)
}

/// Groups the tokens that straddle a cut, with the ids that the same bytes have when the text is cut.
fn straddles(
    tokens: &Tokens,
    cuts: &[usize],
    split: impl FnOnce() -> Result<RawTokens>,
) -> Result<Vec<Straddle>> {
    let mut found: Vec<Straddle> = Vec::new();
    for &cut in cuts {
        let at = cut as u32;
        let over = |bytes: &Range<u32>| bytes.start < at && at < bytes.end;
        if let Some(first) = tokens.bytes.iter().position(over) {
            let count = tokens.bytes[first..].iter().take_while(|bytes| over(bytes)).count();
            let (joint, split) = (Vec::new(), Vec::new());
            found.push(Straddle { tokens: first..first + count, at, bytes: at..at, joint, split });
        }
    }
    // The second tokenisation is paid for only by rows that have something to show.
    if !found.is_empty() {
        let split = split()?;
        for straddle in &mut found {
            let mut place = straddle.at - 1..straddle.at + 1;
            loop {
                let before = place.clone();
                for bytes in tokens.bytes.iter().chain(&split.bytes) {
                    if bytes.start < place.end && place.start < bytes.end {
                        place = place.start.min(bytes.start)..place.end.max(bytes.end);
                    }
                }
                if place == before {
                    break;
                }
            }
            let within = |ids: &[u32], bytes: &[Range<u32>]| {
                let inside =
                    |(_, bytes): &(&u32, &Range<u32>)| bytes.start < place.end && place.start < bytes.end;
                ids.iter().zip(bytes).filter(inside).map(|(id, _)| *id).collect()
            };
            straddle.joint = within(&tokens.ids, &tokens.bytes);
            straddle.split = within(&split.ids, &split.bytes);
            straddle.bytes = place;
        }
    }
    Ok(found)
}

/// Where responses start: the bytes at which `boundary: split` cuts. What a model says in one go is one
/// response, in however many spans (reasoning, content, tool calls, a template's text between them), so
/// there is one cut for it. An end of turn that no response precedes is all that the model says there.
fn response_starts(rendered: &Rendered) -> Vec<usize> {
    let mut starts = Vec::new();
    let mut speaking = None;
    for span in &rendered.spans {
        match span.origin {
            Origin::Response { turn } => {
                if speaking != Some(turn) {
                    starts.push(span.range.start);
                }
                speaking = Some(turn);
            }
            Origin::EndOfTurn { turn } => {
                if speaking != Some(turn) {
                    starts.push(span.range.start);
                }
                speaking = None;
            }
            Origin::Prompt { .. } if !span.range.is_empty() => speaking = None,
            Origin::Prompt { .. } | Origin::Scaffold | Origin::Padding => {}
        }
    }
    starts.dedup();
    starts
}

/// The spans must tile the text on character boundaries: everything behind relies on it.
fn check_spans(rendered: &Rendered) -> Result<()> {
    let wrong = |message: String| Error::Row {
        id: rendered.id.clone(),
        message,
        help: "this is a fault of whoever rendered the row, not of its data".to_string(),
    };
    let mut at = 0;
    for span in &rendered.spans {
        if span.range.start != at || span.range.end < at || !rendered.text.is_char_boundary(span.range.end) {
            return Err(wrong(format!("the spans do not tile the text: {:?} follows byte {at}", span.range)));
        }
        at = span.range.end;
    }
    if at != rendered.text.len() {
        return Err(wrong(format!("the spans end at byte {at} of {}", rendered.text.len())));
    }
    if u32::try_from(at).is_err() {
        return Err(Error::Row {
            id: rendered.id.clone(),
            message: format!("the text has {at} bytes; a row can have 4 GiB"),
            help: "split the row".to_string(),
        });
    }
    Ok(())
}

/// Registers the tokens of `tokenizer_config.json` over those of `tokenizer.json`, as transformers does when
/// it loads a model: the flags of `added_tokens_decoder` win, and bos, eos and pad are special.
fn declare_added_tokens(inner: &mut Inner, settings: &Settings) -> Result<()> {
    let wrong = |message: String| Error::Tokenizer { path: settings.path.clone(), message };
    let known = inner.get_added_tokens_decoder();
    let mut declared: Vec<AddedToken> = Vec::new();
    for (id, token) in &settings.added {
        let token_of = AddedToken::from(token.content.as_str(), token.special)
            .single_word(token.single_word)
            .lstrip(token.lstrip)
            .rstrip(token.rstrip)
            .normalized(token.normalized);
        if known.get(id) != Some(&token_of) {
            declared.push(token_of);
        }
    }
    for content in [&settings.bos, &settings.eos, &settings.pad].into_iter().flatten() {
        let is_known = known.values().chain(&declared).any(|token| token.content == *content);
        // One that is in no vocabulary would be a new id, which the model's embedding does not have.
        if !is_known && inner.token_to_id(content).is_some() {
            declared.push(AddedToken::from(content.as_str(), true));
        }
    }
    if declared.is_empty() {
        return Ok(());
    }
    inner.add_tokens(declared).map_err(|error| wrong(error.to_string()))?;
    for (id, token) in &settings.added {
        let actual = inner.token_to_id(&token.content);
        if actual != Some(*id) {
            return Err(wrong(format!(
                "\"added_tokens_decoder\" gives {:?} the id {id}, but tokenizer.json leads to {}; take both files \
                 from the same model",
                token.content,
                actual.map_or("none".to_string(), |id| id.to_string()),
            )));
        }
    }
    Ok(())
}

/// What the post-processor puts in front of a text and behind it. It is asked once, with a token that no
/// vocabulary has: running it on every row would copy every token's string to learn nothing new.
fn post_processor_ends(inner: &Inner) -> Result<(Vec<u32>, Vec<u32>), String> {
    const TEXT: u32 = u32::MAX;
    let text = Encoding::from_tokens(vec![Token::new(TEXT, "a".to_string(), (0, 1))], 0);
    let processed = inner.post_process(text, None, true).map_err(|error| error.to_string())?;
    let ids = processed.get_ids();
    match ids.iter().position(|id| *id == TEXT) {
        Some(at) if ids.iter().filter(|id| **id == TEXT).count() == 1 => {
            Ok((ids[..at].to_vec(), ids[at + 1..].to_vec()))
        }
        _ => Err("\"post_processor\" does not put the text exactly once into a row; it is not one for \
                  language models"
            .to_string()),
    }
}

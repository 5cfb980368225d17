//! Tokenises rendered rows by the rules of MASKING.md.

use super::raw::{RawTokens, TokenizerError};
use super::stages::{Start, Vocabulary};
use super::tokenizer::Tokenizer;
use crate::policy::{Boundary, ContentSpecialTokens};
use crate::render::{Rendered, Span};
use crate::{Error, Origin, Policy, Result};
use std::ops::Range;
use tokenizers::AddedToken;

/// A row as tokens. All vectors have one entry per token.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tokens {
    /// Token ids.
    pub ids: Vec<u32>,
    /// The bytes of [`Rendered::text`] that each token covers. Tokens that share a character (an emoji in
    /// byte-level BPE) each cover the whole character. A token that the post-processor added has an empty
    /// range, at the end of the text before it.
    pub bytes: Vec<Range<u32>>,
    /// Why each token is supervised or not.
    pub origins: Vec<Origin>,
    /// The loss weight of each token: that of its span, or the largest of the spans it overlaps.
    pub weights: Vec<f32>,
}

impl Tokens {
    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// True if there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }
}

/// Tokens that straddle the start of a response, and the tokens that a cut there would give.
#[derive(Clone, Debug, PartialEq)]
pub struct Straddle {
    /// Indices of the tokens, each of which starts before `at` and ends after it.
    pub tokens: Range<usize>,
    /// The byte at which the response starts.
    pub at: u32,
    /// The smallest range around `at` at whose ends both tokenisations have a token boundary: a cut of
    /// `12|3456` can move every boundary up to the next word.
    pub bytes: Range<u32>,
    /// The ids of that range, joint.
    pub joint: Vec<u32>,
    /// The ids of that range under `boundary: split`.
    pub split: Vec<u32>,
}

/// The result of [`Tokenizer::encode`]: tokens, with what the audits report about them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Encoded {
    /// The tokens.
    pub tokens: Tokens,
    /// Tokens that straddle the start of a response (finding M003); empty under `boundary: split`.
    pub straddles: Vec<Straddle>,
    /// Indices of structural tokens that came from prompt or response text (finding S001).
    pub structural_from_content: Vec<usize>,
    /// Indices of tokens that overlap spans of different weights; each has the largest.
    pub mixed_weights: Vec<usize>,
    /// True if the row starts with two BOS tokens (finding M006).
    pub double_bos: bool,
}

impl Tokenizer {
    /// Tokenises a row by the policy's `boundary` and `content_special_tokens`.
    ///
    /// - Under `boundary: split` the ids before the response of a plain row are
    ///   [`encode_prompt`](Tokenizer::encode_prompt)`(prompt)` (under `content_special_tokens: text`, if the
    ///   prompt contains no text of a structural token).
    /// - A token that overlaps supervised bytes has the origin of the first of them; any other has the origin
    ///   of its first byte.
    /// - Tokens that the post-processor adds are scaffold. An exception is the EOS after a text whose last
    ///   span is EndOfTurn and is the text of the EOS or empty: it belongs to that span. `boundary: joint`
    ///   with `append_eos: false` requests the encoding of the library; then a text with the EOS at its end
    ///   keeps both, the second masked.
    /// - An EndOfTurn span at the end of plain text that is exactly the text of an added token becomes that
    ///   token's id, whatever a normalizer or the stripping of the token would change.
    ///
    /// # Errors
    /// [`Error::Row`] if the spans do not tile the text, the text exceeds 4 GiB, or the model cannot
    /// represent a character.
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

    /// The ids and ranges of a row, cut at `cuts`, and which of them the post-processor added.
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
                // Structural tokens are recognised in the text of the template only. The text between two of
                // them is tokenised as it would be between any two.
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
                    // The first such id is the EOS of the row; there is never a second one.
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

    /// Tokenises `stretch` of the text, cut at those of `cuts` inside it.
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
            self.stages.tokenize(&text[at..next], at as u32, start, vocabulary, raw)?;
            at = next;
        }
        Ok(())
    }

    /// What comes before byte `at`, given the tokens so far.
    fn start(&self, text: &str, at: usize, raw: &RawTokens) -> Start {
        // If nothing of the text has become a token yet, the text starts here.
        let Some(last) = raw.bytes.iter().rposition(|bytes| !bytes.is_empty()) else { return Start::Text };
        let bytes = raw.bytes[last].start as usize..raw.bytes[last].end as usize;
        if self.stages.is_space(&text[bytes.end.min(at)..at]) {
            return Start::Spaced;
        }
        match self.stages.added.get(&raw.ids[last]) {
            Some(token) if spells(&text[bytes], token) => match token.normalized {
                true => Start::NormalizedSection,
                false => Start::Section,
            },
            _ => Start::Glued,
        }
    }

    /// The stop token at the end of a plain text, if its last span is one.
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
                let id = *self.stages.added_ids.get(&rendered.text[span.range.clone()])?;
                return Some(FinalStop { id, range: span.range.clone(), span: index });
            }
            break;
        }
        // For an end of turn without text only the post-processor can add the EOS.
        let eos = self.eos.as_ref().filter(|eos| self.back.contains(&eos.id))?;
        let end = rendered.text.len();
        empty.map(|span| FinalStop { id: eos.id, range: end..end, span })
    }

    /// The structural tokens in the text of the template, up to byte `end`.
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
            let tokens = self.stages.added_in(&rendered.text[start..stop]).into_iter();
            found.extend(
                tokens
                    .filter(|(id, _)| self.stages.is_structural(*id))
                    .map(|(id, range)| (id, start + range.start..start + range.end)),
            );
        }
        found
    }

    fn structural_from_content(&self, tokens: &Tokens, rendered: &Rendered) -> Vec<usize> {
        let content = |span: &Span| matches!(span.origin, Origin::Prompt { .. } | Origin::Response { .. });
        let from_content = |index: usize| {
            let range = tokens.bytes[index].start as usize..tokens.bytes[index].end as usize;
            let Some(added) = self.stages.added.get(&tokens.ids[index]) else { return false };
            let text = &rendered.text[range.clone()];
            // White space that the token stripped does not count; and an unknown character becomes `<unk>`
            // without that text being in the row.
            let start = range.start + (text.len() - text.trim_start().len());
            let end = (start + text.trim().len()).max(start);
            spells(text, added)
                && rendered
                    .spans
                    .iter()
                    .any(|span| content(span) && span.range.start < end && start < span.range.end)
        };
        let structural = |index: &usize| self.stages.is_structural(tokens.ids[*index]);
        (0..tokens.len()).filter(structural).filter(|&index| from_content(index)).collect()
    }

    /// True if the row starts with two BOS tokens. If EOS and BOS are the same token, the EOS of an empty row
    /// is not a second BOS.
    fn double_bos(&self, tokens: &Tokens) -> bool {
        let bos = self.bos.as_ref().map(|bos| bos.id).or(self.front.last().copied());
        bos.is_some_and(|bos| tokens.ids.starts_with(&[bos, bos]))
            && !matches!(tokens.origins[1], Origin::EndOfTurn { .. })
    }
}

/// True if the text is that of the token, apart from white space that it strips.
fn spells(text: &str, token: &AddedToken) -> bool {
    text.trim() == token.content.trim()
}

/// The stop token at the end of a plain text.
struct FinalStop {
    id: u32,
    range: Range<usize>,
    /// Index of its span.
    span: usize,
}

/// Which tokens of a row the post-processor added.
#[derive(Default)]
struct Ends {
    /// Number of tokens before the text.
    front: usize,
    /// Index of the first token after the text.
    back: usize,
    /// The token after the text that belongs to a span: its index, and that of the span.
    stop: Option<(usize, usize)>,
}

/// Gives every token its origin and weight; also returns the indices of tokens that overlap different
/// weights.
fn attribute(raw: RawTokens, ends: &Ends, rendered: &Rendered) -> (Tokens, Vec<usize>) {
    // Empty spans have no tokens.
    let spans: Vec<&Span> = rendered.spans.iter().filter(|span| !span.range.is_empty()).collect();
    let mut origins = Vec::with_capacity(raw.ids.len());
    let mut weights = Vec::with_capacity(raw.ids.len());
    let mut mixed = Vec::new();
    // The span of the previous token: nearly all tokens are in the same span as the previous one.
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
        // An empty range (of a token that represents only an inserted character) belongs to the byte after
        // it.
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

/// The tokens that straddle a cut, with the ids of the same bytes if the text is cut.
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
    // Only rows with straddling tokens are tokenised twice.
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

/// The bytes at which responses start, where `boundary: split` cuts. Everything that the model generates in
/// one turn is one response with one cut, in however many spans (reasoning, content, tool calls, text of the
/// template between them). An end of turn without a response before it is the whole response.
fn response_starts(rendered: &Rendered) -> Vec<usize> {
    let mut starts = Vec::new();
    let mut open_turn = None;
    for span in &rendered.spans {
        match span.origin {
            Origin::Response { turn } => {
                if open_turn != Some(turn) {
                    starts.push(span.range.start);
                }
                open_turn = Some(turn);
            }
            Origin::EndOfTurn { turn } => {
                if open_turn != Some(turn) {
                    starts.push(span.range.start);
                }
                open_turn = None;
            }
            Origin::Prompt { .. } if !span.range.is_empty() => open_turn = None,
            Origin::Prompt { .. } | Origin::Scaffold | Origin::Padding => {}
        }
    }
    starts.dedup();
    starts
}

/// Checks that the spans tile the text at character boundaries, on which later stages rely.
fn check_spans(rendered: &Rendered) -> Result<()> {
    let wrong = |message: String| Error::Row {
        id: rendered.id.clone(),
        message,
        help: "this is a fault of the code that rendered the row, not of its data".to_string(),
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

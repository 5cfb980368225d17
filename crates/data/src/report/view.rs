//! A row as runs of tokens, each with its state and the reason for it.

use crate::pipeline::Kept;
use crate::sample::Segment;
use crate::tokens::Tokenizer;
use crate::{Finding, IGNORE, Origin, RowId, Sample};
use std::ops::Range;

/// A row prepared for display.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct RowView {
    /// The row's id.
    pub id: RowId,
    /// Its runs, in the order of the whole row, including cut ones.
    pub runs: Vec<Run>,
    /// Tokens of the sample.
    pub tokens: usize,
    /// Tokens with a label.
    pub supervised: usize,
    /// Targets after the shift by one.
    pub targets: usize,
    /// Its findings.
    pub findings: Vec<Finding>,
    /// A model's mean loss over its targets in nats, if it was measured.
    pub loss: Option<f64>,
}

/// Adjacent tokens with the same origin and weight.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Run {
    /// Their origin.
    pub origin: Origin,
    /// Their loss weight; 0 masks.
    pub weight: f32,
    /// True if truncation cut them: they are not in the sample.
    pub cut: bool,
    /// In a pack, the sequence that starts with this run: `sequence 3 (row 17)`.
    pub begins: Option<String>,
    /// Number of tokens.
    pub count: usize,
    /// Their text; without a tokenizer, their ids.
    pub text: String,
    /// The tokens; empty for a cut run.
    pub tokens: Vec<TokenView>,
}

/// One token.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct TokenView {
    /// Its index in the sample.
    pub index: usize,
    /// Its id.
    pub id: u32,
    /// Its text, with bytes that are not valid UTF-8 as `<0xNN>`; empty without a tokenizer.
    pub text: String,
    /// Its part of the run's text; its own text if it has no bytes there (a BOS that the tokenizer adds).
    pub piece: String,
    /// True if it shares a character with the previous token, and cannot be shown separately.
    pub joined: bool,
    /// A model's loss on it in nats, if it was measured.
    pub loss: Option<f32>,
}

impl Run {
    /// `masked`, `LEARNED` or `cut`.
    pub fn state(&self) -> &'static str {
        match (self.cut, self.weight == 0.0) {
            (true, _) => "cut",
            (false, true) => "masked",
            (false, false) => "LEARNED",
        }
    }

    /// The reason for the state.
    pub fn reason(&self) -> String {
        if self.cut {
            return "cut to fit max_length: not in the sample".into();
        }
        let learned = self.weight != 0.0;
        let what = match (self.origin, learned) {
            (Origin::Scaffold, false) => "masked: a marker, separator, BOS, or text after the stop token",
            (Origin::Scaffold, true) => "learned though it is scaffold",
            (Origin::Prompt { section, .. }, false) => {
                return format!("masked: prompt, section {}", section.name());
            }
            (Origin::Prompt { section, .. }, true) => {
                return format!(
                    "learned with weight {} though it is prompt, section {}",
                    self.weight,
                    section.name()
                );
            }
            (Origin::Response { .. }, true) => "learned: the response",
            (Origin::Response { .. }, false) => "masked by its own label, though it is response",
            (Origin::EndOfTurn { .. }, true) => "learned: the stop token",
            (Origin::EndOfTurn { .. }, false) => "masked by its own label, though it is the stop token",
            (Origin::Padding, false) => "masked: padding",
            (Origin::Padding, true) => "learned though it is padding",
        };
        if learned && self.weight != 1.0 {
            format!("{what}, with weight {}", self.weight)
        } else {
            what.into()
        }
    }
}

impl RowView {
    /// The view of a row from a pipeline that keeps texts. The tokenizer decodes single tokens and rows that came
    /// as tokens; without one, ids are shown.
    pub fn new(kept: &Kept, tokenizer: Option<&Tokenizer>) -> RowView {
        let sample = &kept.sample;
        let weight = |i: usize| match sample.labels[i] {
            IGNORE => 0.0,
            _ => sample.weights.as_ref().map_or(1.0, |w| w[i]),
        };
        let mut runs: Vec<Run> = Vec::new();
        let mut ends: Vec<u32> = Vec::new();
        let mut decoded = kept.bytes.is_none().then(|| pieces(&sample.input_ids, tokenizer));
        let mut cuts = kept.cuts.iter().peekable();
        let mut beginnings = beginnings(sample).into_iter().peekable();
        let mut open = false;
        for i in 0..=sample.len() {
            while let Some(cut) = cuts.next_if(|c| c.at == i) {
                runs.push(Run {
                    origin: cut.origin,
                    weight: 0.0,
                    cut: true,
                    begins: None,
                    count: cut.tokens,
                    text: String::new(),
                    tokens: Vec::new(),
                });
                ends.push(cut.bytes.end);
                open = false;
            }
            if i == sample.len() {
                break;
            }
            let (origin, weight) = (sample.origins[i], weight(i));
            let begins = beginnings.next_if(|(at, _)| *at == i).map(|(_, description)| description);
            if !open
                || begins.is_some()
                || runs.last().is_none_or(|r| r.origin != origin || r.weight != weight)
            {
                runs.push(Run {
                    origin,
                    weight,
                    cut: false,
                    begins,
                    count: 0,
                    text: String::new(),
                    tokens: Vec::new(),
                });
                ends.push(0);
                open = true;
            }
            let (Some(run), Some(end)) = (runs.last_mut(), ends.last_mut()) else { continue };
            run.count += 1;
            let id = sample.input_ids[i];
            let text = tokenizer.map(|t| t.token_text(id)).unwrap_or_default();
            let (mut piece, mut joined) = (String::new(), false);
            match (&kept.bytes, &mut decoded) {
                (Some(bytes), _) => *end = (*end).max(bytes[i].end),
                (None, Some(decoded)) => {
                    run.text.push_str(&decoded[i]);
                    piece = std::mem::take(&mut decoded[i]);
                    joined = run.tokens.last().is_some_and(|before| before.piece.is_empty());
                }
                (None, None) => {}
            }
            run.tokens.push(TokenView { index: i, id, text, piece, joined, loss: None });
        }
        if let (Some(text), Some(_)) = (&kept.text, &kept.bytes) {
            // Each run continues where the text of the previous one ended, so that every byte is shown once.
            let mut at = 0;
            let last = runs.len().saturating_sub(1);
            for (i, (run, end)) in runs.iter_mut().zip(&ends).enumerate() {
                let end = if i == last { text.len() } else { (*end as usize).max(at) };
                run.text = text.get(at..end).unwrap_or_default().to_string();
                share_out(text, at..end, &mut run.tokens, &kept.bytes);
                at = end;
            }
        }
        RowView {
            id: sample.id.clone(),
            runs,
            tokens: sample.len(),
            supervised: sample.labels.iter().filter(|l| **l != IGNORE).count(),
            targets: sample.targets().count(),
            findings: kept.findings.clone(),
            loss: None,
        }
    }

    /// Sets a model's losses: for each token (`None` for one without a predecessor), and their mean over the row's
    /// targets.
    pub fn set_losses(&mut self, tokens: &[Option<f32>], mean: Option<f64>) {
        for token in self.runs.iter_mut().flat_map(|run| &mut run.tokens) {
            token.loss = tokens.get(token.index).copied().flatten();
        }
        self.loss = mean;
    }

    /// The view of a sample, whose text is decoded from its ids.
    pub fn of_sample(sample: &Sample, tokenizer: Option<&Tokenizer>) -> RowView {
        let (findings, cuts) = (Vec::new(), Vec::new());
        RowView::new(&Kept { sample: sample.clone(), findings, cuts, text: None, bytes: None }, tokenizer)
    }

    /// The view of a row without tokens: it could not become a sample, or was left out.
    pub fn bare(id: RowId, findings: Vec<Finding>) -> RowView {
        RowView { id, runs: Vec::new(), tokens: 0, supervised: 0, targets: 0, findings, loss: None }
    }

    /// The supervised runs.
    pub fn learned(&self) -> impl Iterator<Item = &Run> {
        self.runs.iter().filter(|r| !r.cut && r.weight != 0.0)
    }
}

/// Assigns each token of a run its part of the run's text.
fn share_out(text: &str, run: Range<usize>, tokens: &mut [TokenView], bytes: &Option<Vec<Range<u32>>>) {
    let Some(bytes) = bytes else { return };
    let (mut at, last) = (run.start, tokens.len().saturating_sub(1));
    let (mut before, mut inside) = (0, false);
    for (i, token) in tokens.iter_mut().enumerate() {
        let Range { start, end } = bytes[token.index];
        if start == end && i != last {
            token.piece.clone_from(&token.text);
            continue;
        }
        token.joined = i > 0 && (inside || start < before);
        (before, inside) = (end, !text.is_char_boundary(end as usize));
        let mut to = if i == last { run.end } else { (end as usize).clamp(at, run.end) };
        while !text.is_char_boundary(to) {
            to -= 1;
        }
        token.piece = text.get(at..to.max(at)).unwrap_or_default().to_string();
        at = to.max(at);
        if token.piece.is_empty() && start == end {
            token.piece.clone_from(&token.text);
        }
    }
}

/// The index at which each segment of a pack begins, with a description of it.
fn beginnings(sample: &Sample) -> Vec<(usize, String)> {
    let Some(pack) = &sample.pack else { return Vec::new() };
    // If a pack does not name its rows, they all have the pack's own number.
    let named = pack.rows.iter().any(|id| *id != sample.id);
    let mut rows = pack.rows.iter().enumerate();
    let mut description = |segment: &Segment| {
        if segment.branches > 0 {
            return format!("a prompt that {} sequences share", segment.branches);
        }
        let mut text = match rows.next() {
            Some((i, id)) if named => format!("sequence {i} (row {})", id.row),
            Some((i, _)) => format!("sequence {i}"),
            None => String::new(),
        };
        if !segment.prefix.is_empty() {
            text += &format!(", after the prompt at token {}", segment.prefix.start);
        }
        text
    };
    pack.segments.iter().map(|segment| (segment.own.start as usize, description(segment))).collect()
}

/// The text of each token, for ids without byte ranges. A character of several tokens is shown at its last one.
fn pieces(ids: &[u32], tokenizer: Option<&Tokenizer>) -> Vec<String> {
    let Some(tokenizer) = tokenizer else {
        return ids.iter().map(|id| format!("{id} ")).collect();
    };
    let mut stream = tokenizer.decode_stream(false);
    let mut out: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap_or_default()).collect();
    if let Some(last) = out.last_mut() {
        last.push_str(&stream.finish().unwrap_or_default());
    }
    out
}

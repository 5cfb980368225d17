//! Which tokens are cut from a row of more than `max_length`, and what is lost with them.
//!
//! | mode | cuts |
//! |---|---|
//! | `keep_response` | padding and text after the stop token; then the prompt, first the oldest of Context, then the oldest of Other, User and Tool, never System, Task, BOS or scaffold; only then the end of the response, its stop token first: no EOS is invented |
//! | `keep_start` | everything after the first `max_length` tokens |
//! | `keep_end` | everything before the last `max_length` tokens |
//! | `drop` | the whole row, counted |
//! | `error` | nothing: the row is an error |
//!
//! If System, Task and scaffold alone exceed `max_length`, `keep_response` still does not cut them: a reply to
//! half a task would be wrong. The row then has no target, so it is dropped and counted as M001.

use crate::policy::TruncationMode;
use crate::sample::column;
use crate::{Code, Finding, Origin, Sample, Section};
use std::ops::Range;

/// The runs of tokens to cut, in order and not adjacent, as indices into the whole row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cuts {
    /// The runs.
    pub runs: Vec<Range<usize>>,
    /// Number of tokens of the whole row.
    pub length: usize,
}

impl Cuts {
    /// The remaining entries of a vector with one entry per token.
    pub fn apply<T: Clone>(&self, values: &[T]) -> Vec<T> {
        debug_assert_eq!(values.len(), self.length);
        let mut out = Vec::with_capacity(self.length - self.cut_tokens());
        let mut at = 0;
        for cut in &self.runs {
            out.extend_from_slice(&values[at..cut.start]);
            at = cut.end;
        }
        out.extend_from_slice(&values[at..]);
        out
    }

    /// The rest of a sample.
    pub(crate) fn sample(&self, sample: Sample) -> Sample {
        Sample {
            id: sample.id,
            input_ids: self.apply(&sample.input_ids),
            labels: self.apply(&sample.labels),
            origins: self.apply(&sample.origins),
            weights: sample.weights.and_then(|weights| column(self.apply(&weights))),
            pack: sample.pack.map(|pack| Box::new(pack.cut(&self.runs))),
        }
    }

    /// Number of tokens that are cut.
    pub fn cut_tokens(&self) -> usize {
        self.runs.iter().map(Range::len).sum()
    }

    /// Cuts from a flag per token: true = cut.
    fn from_flags(flags: &[bool]) -> Cuts {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for (i, _) in flags.iter().enumerate().filter(|(_, cut)| **cut) {
            match runs.last_mut() {
                Some(last) if last.end == i => last.end = i + 1,
                _ => runs.push(i..i + 1),
            }
        }
        Cuts { runs, length: flags.len() }
    }

    /// The cuts that remove padding.
    pub fn padding(origins: &[Origin]) -> Cuts {
        Cuts::from_flags(&origins.iter().map(|o| *o == Origin::Padding).collect::<Vec<_>>())
    }
}

/// What to do with a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fit {
    /// Keep all of it: it fits.
    Whole,
    /// Cut it.
    Cut(Cuts),
    /// Leave it out (`drop`).
    Drop,
    /// Report it as an error (`error`).
    Error,
}

/// Decides what to do with a row with these origins.
pub fn fit(origins: &[Origin], mode: TruncationMode, max_length: Option<usize>) -> Fit {
    let n = origins.len();
    let Some(max) = max_length.filter(|&max| n > max) else { return Fit::Whole };
    let cuts = |range: Range<usize>| Fit::Cut(Cuts { runs: vec![range], length: n });
    match mode {
        TruncationMode::KeepResponse => Fit::Cut(keep_response(origins, max)),
        TruncationMode::KeepStart => cuts(max..n),
        TruncationMode::KeepEnd => cuts(0..n - max),
        TruncationMode::Drop => Fit::Drop,
        TruncationMode::Error => Fit::Error,
    }
}

fn keep_response(origins: &[Origin], max: usize) -> Cuts {
    let n = origins.len();
    let mut excess = n - max;
    let mut flags = vec![false; n];
    let after_last = origins.iter().rposition(|o| o.supervised()).map_or(n, |i| i + 1);
    let mut cut = |order: &mut dyn Iterator<Item = usize>| {
        for i in order {
            if excess == 0 {
                return;
            }
            flags[i] = true;
            excess -= 1;
        }
    };
    let padding = |i: &usize| origins[*i] == Origin::Padding;
    let context = |i: &usize| matches!(origins[*i], Origin::Prompt { section: Section::Context, .. });
    let other =
        |i: &usize| matches!(origins[*i], Origin::Prompt { section: Section::Other | Section::Tool, .. });
    cut(&mut (0..n).filter(padding));
    cut(&mut (after_last..n).filter(|i| origins[*i] == Origin::Scaffold).rev());
    cut(&mut (0..n).filter(context));
    cut(&mut (0..n).filter(other));
    cut(&mut (0..n).filter(|i| origins[*i].supervised()).rev());
    Cuts::from_flags(&flags)
}

/// The tokens that a truncation loses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Loss {
    /// Supervised tokens, of any origin.
    pub supervised: usize,
    /// Those of them that end a turn.
    pub stops: usize,
    /// Prompt tokens, by section in the order of [`Section::ALL`].
    pub prompt: [usize; Section::ALL.len()],
    /// Scaffold tokens, but not those after the last stop token.
    pub scaffold: usize,
}

/// Counts what is lost. `supervised` is true for a supervised token of the whole row.
pub fn loss(cuts: &Cuts, origins: &[Origin], supervised: impl Fn(usize) -> bool) -> Loss {
    let mut loss = Loss::default();
    let after_last = origins.iter().rposition(|o| o.supervised()).map_or(origins.len(), |i| i + 1);
    for i in cuts.runs.iter().cloned().flatten() {
        let learned = supervised(i);
        loss.supervised += usize::from(learned);
        match origins[i] {
            Origin::Prompt { section, .. } => loss.prompt[section as usize] += 1,
            Origin::Scaffold if i < after_last => loss.scaffold += 1,
            Origin::EndOfTurn { .. } => loss.stops += usize::from(learned),
            _ => {}
        }
    }
    loss
}

impl Loss {
    /// Prompt tokens, scaffold included.
    pub fn prompt_tokens(&self) -> usize {
        self.prompt.iter().sum::<usize>() + self.scaffold
    }

    /// T001 and T002, if they apply. `first_supervised`: the first remaining token is supervised, and was not the
    /// first of the row.
    pub fn findings(&self, row: u64, max_length: usize, first_supervised: bool) -> Vec<Finding> {
        let mut out = Vec::new();
        if self.supervised > 0 {
            let stop = if self.stops > 0 { ", the stop token among them" } else { "" };
            let message =
                format!("{} lost to max_length = {max_length}{stop}", tokens(self.supervised, "supervised "));
            out.push(Finding::new(row, Code::T001, message));
        }
        if self.prompt_tokens() > 0 {
            let mut parts: Vec<String> = Section::ALL
                .iter()
                .zip(self.prompt)
                .filter(|(_, n)| *n > 0)
                .map(|(section, n)| format!("{} {n}", section.name()))
                .collect();
            if self.scaffold > 0 {
                parts.push(format!("scaffold {}", self.scaffold));
            }
            let mut message = format!(
                "{} cut to fit max_length = {max_length} ({})",
                tokens(self.prompt_tokens(), "prompt "),
                parts.join(", ")
            );
            if first_supervised {
                message.push_str("; the first supervised token has nothing before it now and is no target");
            }
            out.push(Finding::new(row, Code::T002, message));
        }
        out
    }
}

/// `1 supervised token`, `2 supervised tokens`.
fn tokens(n: usize, kind: &str) -> String {
    format!("{n} {kind}token{}", if n == 1 { "" } else { "s" })
}

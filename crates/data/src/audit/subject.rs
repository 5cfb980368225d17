//! What the checks look at: a labelled row, with what is known about it.

use crate::example::Tokenised;
use crate::label::Special;
use crate::policy::{Objective, Policy};
use crate::{Code, Finding, IGNORE, Sample};

/// A labelled row, before truncation, with what is known about it.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// Its ids, labels, origins and weights.
    pub sample: &'a Sample,
    /// Where the row came as tokens: what it said itself. `None` for rows that we made from text.
    pub given: Option<&'a Tokenised>,
    /// The tokenizer's special ids; empty without a tokenizer.
    pub special: &'a Special,
    /// What was asked for.
    pub policy: &'a Policy,
    /// The positions that the model was made for; `None` where they are not known, or `max_length` cuts every row
    /// to fit them.
    pub positions: Option<usize>,
}

impl Subject<'_> {
    pub(super) fn n(&self) -> usize {
        self.sample.input_ids.len()
    }

    pub(super) fn row(&self) -> u64 {
        self.sample.id.row
    }

    pub(super) fn learned(&self, i: usize) -> bool {
        self.sample.labels[i] != IGNORE
    }

    pub(super) fn is_stop(&self, i: usize) -> bool {
        self.special.stops.contains(&self.sample.input_ids[i])
    }

    pub(super) fn all_tokens(&self) -> bool {
        self.policy.objective == Objective::AllTokens
    }

    /// True where the row itself says which tokens are prompt and which response, apart from its labels.
    pub(super) fn origins_are_known(&self) -> bool {
        self.given.is_none_or(|g| g.origins.is_some() || g.mask.is_some())
    }

    /// Runs of supervised tokens: `start..end`.
    pub(super) fn runs(&self) -> Vec<std::ops::Range<usize>> {
        let mut out: Vec<std::ops::Range<usize>> = Vec::new();
        for i in (0..self.n()).filter(|&i| self.learned(i)) {
            match out.last_mut() {
                Some(run) if run.end == i => run.end = i + 1,
                _ => out.push(i..i + 1),
            }
        }
        out
    }

    /// First index of the padding at the end of a row that has no attention mask: the trailing run of pad ids.
    /// Where pad and EOS are one id, the first of the run is the EOS.
    pub(super) fn tail_padding(&self) -> Option<usize> {
        let pad = self.special.pad?;
        if self.given?.attention.is_some() || self.given?.origins.is_some() {
            return None;
        }
        let ids = &self.sample.input_ids;
        let start = ids.iter().rposition(|&id| id != pad).map_or(0, |i| i + 1);
        let start = start + usize::from(self.special.stops.contains(&pad));
        (start < ids.len()).then_some(start)
    }

    pub(super) fn finding(&self, code: Code, message: String) -> Option<Finding> {
        Some(Finding::new(self.row(), code, message))
    }
}

/// `3 tokens (first at 17)`.
pub(super) fn places(places: &[usize]) -> String {
    match places {
        [one] => format!("token {one}"),
        [first, ..] => format!("{} tokens (the first is token {first})", places.len()),
        [] => "no token".into(),
    }
}

//! The input of checks, and their findings.

use super::foreign::{Foreign, Part};
use crate::label::Given;
use crate::policy::{Objective, Policy};
use crate::sample::Run;
use crate::tokens::Special;
use crate::{IGNORE, Level, Origin, Sample};
use std::ops::Range;

/// A labelled row, before truncation, with what is known about it.
#[derive(Clone, Debug)]
pub struct Subject<'a> {
    /// Its ids, labels, origins and weights.
    pub sample: &'a Sample,
    /// For rows that came as tokens, their other fields; `None` for rows that were made from text here.
    pub given: Option<&'a Given>,
    /// The tokenizer's special ids; empty without a tokenizer.
    pub special: &'a Special,
    /// The policy that the row's labels must follow.
    pub policy: &'a Policy,
    /// The model's number of positions; `None` if unknown, or if `max_length` cuts every row to fit.
    pub positions: Option<usize>,
    /// What is known of a row that came as tokens, apart from its own fields.
    pub(super) foreign: Foreign<'a>,
    /// The index of its sequence in a pack; 0 for a single row.
    pub(super) sequence: usize,
    /// Its runs of tokens of one origin, in order. Most rules concern few runs, so few tokens are checked one by one.
    pub(crate) runs: Vec<Run>,
}

/// The finding of a check.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Found {
    /// The tokens of the row that it concerns, from the first to the last.
    pub tokens: Range<u32>,
    /// What is wrong with them.
    pub message: String,
    /// The level, if it differs from that of the code.
    pub level: Option<Level>,
}

impl Found {
    /// One finding about these tokens, which are in ascending order; none if there are none. `message` gets a
    /// description of the tokens: `token 17`, or `3 tokens (the first is token 17)`; with a tokenizer also the
    /// text of the first ones.
    pub(super) fn about(
        s: &Subject<'_>,
        tokens: &[usize],
        message: impl FnOnce(&str) -> String,
    ) -> Vec<Found> {
        let [first, ..] = *tokens else { return Vec::new() };
        let places = match (tokens.len(), s.quote(tokens)) {
            (1, None) => format!("token {first}"),
            (1, Some(text)) => format!("token {first} ({text})"),
            (n, None) => format!("{n} tokens (the first is token {first})"),
            (n, Some(text)) => format!("{n} tokens (from token {first}: {text})"),
        };
        vec![Found::within(first..tokens[tokens.len() - 1] + 1, message(&places))]
    }

    /// A finding about a range of tokens.
    pub(super) fn within(tokens: Range<usize>, message: String) -> Found {
        Found { tokens: tokens.start as u32..tokens.end as u32, message, level: None }
    }
}

impl<'a> Subject<'a> {
    /// A row to check, for a model with an unknown number of positions.
    pub fn new(
        sample: &'a Sample,
        given: Option<&'a Given>,
        special: &'a Special,
        policy: &'a Policy,
    ) -> Subject<'a> {
        let runs = match given.map_or(&[][..], |given| &given.runs) {
            known @ [_, ..] if sample.pack.is_none() => sample.known_runs(known),
            _ => sample.runs(),
        };
        let foreign = Foreign::default();
        Subject { sample, given, special, policy, positions: None, foreign, sequence: 0, runs }
    }

    /// The same row with what is known of it apart from its own fields.
    #[must_use]
    pub fn with_foreign(self, foreign: Foreign<'a>) -> Subject<'a> {
        Subject { foreign, ..self }
    }

    /// What is known of this sequence.
    pub(super) fn part(&self) -> Option<&Part> {
        self.foreign.parts.get(self.sequence)
    }

    /// True if the origins of a row that came as tokens are known apart from its labels: it gives them, or its
    /// turns were found.
    pub(super) fn known(&self) -> bool {
        self.origins_are_given() || self.found()
    }

    /// True if they were found here.
    pub(super) fn found(&self) -> bool {
        self.part().is_some_and(|part| part.known)
    }

    /// True if every token that is not padding is supervised.
    pub(super) fn all_supervised(&self) -> bool {
        let all = |run: &Run| run.origin == Origin::Padding || run.supervised == run.tokens.len();
        self.runs.iter().all(all)
    }

    /// The text of the first of these tokens, if there is a tokenizer.
    pub(super) fn quote(&self, tokens: &[usize]) -> Option<String> {
        const QUOTED: usize = 6;
        let tokenizer = self.foreign.tokenizer?;
        let text = |&i: &usize| format!("{:?}", tokenizer.token_text(self.sample.input_ids[i]));
        let mut list: Vec<String> = tokens.iter().take(QUOTED).map(text).collect();
        list.extend((tokens.len() > QUOTED).then(|| "..".to_string()));
        Some(list.join(" "))
    }

    /// The same for a model with this many positions.
    #[must_use]
    pub fn with_positions(self, positions: Option<usize>) -> Subject<'a> {
        Subject { positions, ..self }
    }

    pub(super) fn n(&self) -> usize {
        self.sample.input_ids.len()
    }

    pub(super) fn learned(&self, i: usize) -> bool {
        self.sample.labels[i] != IGNORE
    }

    pub(super) fn is_stop(&self, i: usize) -> bool {
        self.special.stops.contains(&self.sample.input_ids[i])
    }

    pub(super) fn is_padding(&self, i: usize) -> bool {
        self.sample.origins[i] == Origin::Padding
    }

    pub(super) fn all_tokens(&self) -> bool {
        self.policy.objective == Objective::AllTokens
    }

    /// True if the row came as tokens and gives the origin of each.
    pub(super) fn origins_are_given(&self) -> bool {
        self.given.is_some_and(|given| given.origins)
    }

    /// The supervised tokens with these origins.
    pub(super) fn supervised(&self, of: impl Fn(Origin) -> bool) -> Vec<usize> {
        let runs = self.runs.iter().filter(|run| run.supervised > 0 && of(run.origin));
        runs.flat_map(|run| run.tokens.clone()).filter(|&i| self.learned(i)).collect()
    }

    /// The tokens for which `wrong` is true.
    pub(super) fn tokens(&self, wrong: impl Fn(usize) -> bool) -> Vec<usize> {
        (0..self.n()).filter(|&i| wrong(i)).collect()
    }

    /// Runs of supervised tokens.
    pub(super) fn supervised_runs(&self) -> Vec<Range<usize>> {
        let mut out: Vec<Range<usize>> = Vec::new();
        for i in self.tokens(|i| self.learned(i)) {
            match out.last_mut() {
                Some(run) if run.end == i => run.end = i + 1,
                _ => out.push(i..i + 1),
            }
        }
        out
    }

    /// The index at which the padding of a row without an attention mask begins: its trailing run of pad ids; the
    /// row's length if there is none. If pad and EOS are one id, the first of the run is the EOS.
    pub(super) fn content_end(&self) -> usize {
        let ids = &self.sample.input_ids;
        let (Some(pad), Some(given)) = (self.special.pad, self.given) else { return ids.len() };
        if given.attention || given.origins {
            return ids.len();
        }
        let start = ids.iter().rposition(|&id| id != pad).map_or(0, |i| i + 1);
        (start + usize::from(self.special.stops.contains(&pad))).min(ids.len())
    }
}

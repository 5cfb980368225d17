//! The source rows of a tokenised data set, tokenised again: they show what its labels should be.

use super::duplicates::hash_ids;
use super::outcome::Outcome;
use super::pairing::{Named, Pairing};
use super::summary::Progress;
use super::{Mode, Pipeline};
use crate::policy::{Boundary, Policy, TruncationMode};
use crate::source::Source;
use crate::{Error, IGNORE, Origin, Result, Sample, Section};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

/// The ids and origins of source rows, under both boundary modes.
#[derive(Debug, Default)]
pub struct Reference {
    rows: Vec<Row>,
    /// The index of a row with these ids, by their hash.
    by_ids: HashMap<u64, usize>,
    /// For each source row, its range in `rows`.
    by_order: Vec<Range<usize>>,
    /// The source row of each row, if ids determine it.
    pairing: Option<Pairing>,
}

/// A source row under one boundary mode.
#[derive(Debug)]
struct Row {
    number: u64,
    ids: Box<[u32]>,
    /// The end of each run of tokens of one origin.
    runs: Box<[(u32, Origin)]>,
}

/// The result of comparing a row's ids with the source.
#[derive(Debug, PartialEq)]
pub(super) enum Match {
    /// A source row has these ids; the origins of its tokens.
    Same(Vec<Origin>),
    /// They are the beginning of the source row at this position, which has this many tokens.
    Cut(Vec<Origin>, u64, usize),
    /// The source row at this position has other ids, starting at this token.
    Differs { number: u64, at: usize, theirs: Option<u32> },
    /// No source row matches.
    None,
    /// No source row has this id.
    NoId(String),
}

impl Reference {
    /// Tokenises source rows with the folder and the policy of a pipeline, without truncation. `open` opens the
    /// source, which is read once for each boundary mode.
    ///
    /// # Errors
    /// Those of `open`, and as [`Pipeline::rows`].
    pub fn read(pipeline: &Pipeline, open: impl Fn() -> Result<Source>) -> Result<Reference> {
        Reference::read_while(pipeline, open, |_| true)
    }

    /// The same; `goes_on` is called between rows, and `false` cancels.
    ///
    /// # Errors
    /// As [`Reference::read`], and [`Error::Interrupted`] if `goes_on` returned false.
    pub fn read_while(
        pipeline: &Pipeline,
        open: impl Fn() -> Result<Source>,
        goes_on: impl Fn(Progress) -> bool,
    ) -> Result<Reference> {
        let mut reference = Reference::default();
        let mut variants: Vec<Vec<Row>> = Vec::new();
        for boundary in [Boundary::Split, Boundary::Joint] {
            let policy = Policy {
                boundary,
                max_length: None,
                truncation_mode: TruncationMode::KeepStart,
                ..(*pipeline.policy).clone()
            };
            let pipeline = Pipeline {
                policy: Arc::new(policy),
                labelled_under: None,
                mode: Mode::Verify,
                keep_text: false,
                reference: None,
                ..pipeline.clone()
            };
            let mut outcomes = pipeline.rows(open()?)?;
            while let Some(outcome) = outcomes.next() {
                let outcome = outcome?;
                if !goes_on(outcomes.progress()) {
                    let path = outcome.id().file.to_path_buf();
                    return Err(Error::Interrupted { path, message: "nothing is kept of it".into() });
                }
                let number = outcome.id().row;
                let at = usize::try_from(number).unwrap_or(usize::MAX);
                if variants.len() <= at {
                    variants.resize_with(at + 1, Vec::new);
                }
                if let Outcome::Kept(kept) = outcome
                    && !variants[at].iter().any(|row| *row.ids == *kept.sample.input_ids)
                {
                    variants[at].push(Row::of(number, &kept.sample));
                }
            }
        }
        for rows in variants {
            let start = reference.rows.len();
            for row in rows {
                reference.by_ids.entry(hash_ids(&row.ids)).or_insert(reference.rows.len());
                reference.rows.push(row);
            }
            reference.by_order.push(start..reference.rows.len());
        }
        Ok(reference)
    }

    /// The same with rows paired by their ids: each row is compared only with the source row of its id.
    #[must_use]
    pub fn paired(self, pairing: Pairing) -> Reference {
        Reference { pairing: Some(pairing), ..self }
    }

    /// The column that pairs rows with source rows.
    pub(super) fn column(&self) -> Option<&str> {
        self.pairing.as_ref().map(Pairing::column)
    }

    /// Compares these ids, of row `number` or a sequence of it, with the source.
    pub(super) fn of(&self, ids: &[u32], number: u64, sequence: Option<usize>) -> Match {
        let named = self.pairing.as_ref().and_then(|pairing| pairing.named(number, sequence));
        let place = |n: u64| self.by_order.get(usize::try_from(n).ok()?);
        let place = match named {
            Some(Named::Nothing(id)) => return Match::NoId(id.to_string()),
            Some(Named::Row(own)) => {
                let own = place(*own);
                let rows = own.map(|range| &self.rows[range.clone()]).unwrap_or_default();
                if let Some(row) = rows.iter().find(|row| *row.ids == *ids) {
                    return Match::Same(row.origins(ids.len()));
                }
                own
            }
            None => {
                let same = self.by_ids.get(&hash_ids(ids)).map(|&at| &self.rows[at]);
                if let Some(row) = same.filter(|row| *row.ids == *ids) {
                    return Match::Same(row.origins(ids.len()));
                }
                sequence.is_none().then(|| place(number)).flatten()
            }
        };
        let common = |row: &&Row| row.ids.iter().zip(ids).take_while(|(a, b)| a == b).count();
        let Some(row) = place.and_then(|range| self.rows[range.clone()].iter().max_by_key(common)) else {
            return Match::None;
        };
        match common(&row) {
            at if at == ids.len() => Match::Cut(row.origins(at), row.number, row.ids.len()),
            at => Match::Differs { number: row.number, at, theirs: row.ids.get(at).copied() },
        }
    }
}

impl Row {
    fn of(number: u64, sample: &Sample) -> Row {
        // An assistant's text that the author masks counts as prompt: if it is supervised, that is a fault.
        let origin = |i: usize| match sample.origins[i] {
            Origin::Response { turn } | Origin::EndOfTurn { turn } if sample.labels[i] == IGNORE => {
                Origin::Prompt { turn, section: Section::Context }
            }
            other => other,
        };
        let mut runs: Vec<(u32, Origin)> = Vec::new();
        for i in 0..sample.len() {
            let (end, own) = (i as u32 + 1, origin(i));
            match runs.last_mut() {
                Some(last) if last.1 == own => last.0 = end,
                _ => runs.push((end, own)),
            }
        }
        Row { number, ids: sample.input_ids.clone().into(), runs: runs.into() }
    }

    /// The origins of the first `n` tokens.
    fn origins(&self, n: usize) -> Vec<Origin> {
        let mut out = Vec::with_capacity(n);
        for &(end, origin) in &self.runs {
            out.resize((end as usize).min(n).max(out.len()), origin);
        }
        out
    }
}

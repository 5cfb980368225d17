//! The source rows of a tokenised data set, tokenised again: what its labels should be.

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

/// The ids and origins of source rows, under either boundary.
#[derive(Debug, Default)]
pub struct Reference {
    rows: Vec<Row>,
    /// The rows of these ids, by their hash.
    by_ids: HashMap<u64, usize>,
    /// For each row of the source, its places in `rows`.
    by_order: Vec<Range<usize>>,
    /// Which source row each row was made of, where ids say it.
    pairing: Option<Pairing>,
}

/// A source row under one boundary.
#[derive(Debug)]
struct Row {
    number: u64,
    ids: Box<[u32]>,
    /// The end of each run of tokens of one origin.
    runs: Box<[(u32, Origin)]>,
}

/// What the source says of a row's ids.
#[derive(Debug, PartialEq)]
pub(super) enum Match {
    /// A source row has these ids; the origins of its tokens.
    Same(Vec<Origin>),
    /// They are the first of the source row in this place, which has so many.
    Cut(Vec<Origin>, u64, usize),
    /// The source row in this place has other ids, from this one on.
    Differs { number: u64, at: usize, theirs: Option<u32> },
    /// There is no source row.
    None,
    /// There is none with this id.
    NoId(String),
}

impl Reference {
    /// Tokenises source rows with the folder and the policy of a pipeline, uncut. `open` opens the source: it is read once
    /// for each boundary.
    ///
    /// # Errors
    /// Those of `open`, and as [`Pipeline::rows`].
    pub fn read(pipeline: &Pipeline, open: impl Fn() -> Result<Source>) -> Result<Reference> {
        Reference::read_while(pipeline, open, |_| true)
    }

    /// The same; `goes_on` is asked between rows.
    ///
    /// # Errors
    /// As [`Reference::read`], and [`Error::Interrupted`] where `goes_on` said no.
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

    /// The same with rows paired by their ids: each is held against the source row of its id, and no other.
    #[must_use]
    pub fn paired(self, pairing: Pairing) -> Reference {
        Reference { pairing: Some(pairing), ..self }
    }

    /// The column by which rows are paired with source rows.
    pub(super) fn column(&self) -> Option<&str> {
        self.pairing.as_ref().map(Pairing::column)
    }

    /// What the source says of these ids, which are row `number`, or a sequence of it.
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
        // What an author masks of the assistant's is prompt: learned, it is a fault.
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

    /// The origins of its first `n` tokens.
    fn origins(&self, n: usize) -> Vec<Origin> {
        let mut out = Vec::with_capacity(n);
        for &(end, origin) in &self.runs {
            out.resize((end as usize).min(n).max(out.len()), origin);
        }
        out
    }
}

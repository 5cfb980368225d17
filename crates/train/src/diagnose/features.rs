//! From the nll of two models to the numbers that a verdict rests on.
//!
//! What is trained on loses nll directly; what is not changes only through shared weights. Three facts tell the
//! two apart, whatever the learning rate:
//!
//! * tokens whose ids never occur in a response: training on responses only makes them less likely everywhere,
//!   because they are never a target, while training on prompts makes them more likely;
//! * tokens that are the same in every row: they are learned within a few steps, or not at all;
//! * the tokens on both sides of the place where responses start: the mask is a step in the gain there.
//!
//! Gains are measured against the gain of the response, whose tokens are learned in any case.

use super::measure::Measurement;
use crate::batches::used;
use serde::Serialize;
use std::collections::{HashMap, HashSet};
use suasion_data::{Origin, Sample};

/// Offsets from the start of a response, on both sides, that are measured one by one. A prompt token within them says
/// nothing about prompts as such: a mask that starts early may cover it.
pub const NEAR: usize = 12;

/// Tokens before a response that are its header, where they are constant.
const HEADER: usize = 3;

/// Response tokens from this offset on are the response proper, in responses of twice the length.
const CORE: usize = 8;

/// What a token is, for the verdict. A token may be of several kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A response token, not one of the first.
    Core,
    /// One of the first response tokens, by its offset.
    First(usize),
    /// A stop token.
    Stop,
    /// A prompt token far from any response whose id occurs in no response.
    PromptOnly,
    /// A prompt token far from any response, in a run that most rows have.
    Constant,
    /// Any other prompt token far from any response.
    Varying,
    /// A prompt token this many tokens before a response (0 is the last of the prompt).
    Before(usize),
    /// One of the last three prompt tokens, in a run that most rows have: a header.
    Header,
}

/// Number of kinds.
pub const KINDS: usize = 2 * NEAR + 6;

impl Kind {
    fn index(self) -> usize {
        match self {
            Kind::Core => 0,
            Kind::Stop => 1,
            Kind::PromptOnly => 2,
            Kind::Constant => 3,
            Kind::Varying => 4,
            Kind::Header => 5,
            Kind::First(offset) => 6 + offset,
            Kind::Before(offset) => 6 + NEAR + offset,
        }
    }
}

/// Sums over tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sum {
    /// Tokens.
    pub tokens: f64,
    /// Their nll under the base model.
    pub base: f64,
    /// Their nll under the tuned model.
    pub tuned: f64,
}

impl Sum {
    fn add(&mut self, other: &Sum) {
        self.tokens += other.tokens;
        self.base += other.base;
        self.tuned += other.tuned;
    }

    /// Mean fall of the nll; `None` without a token.
    pub fn gain(&self) -> Option<f64> {
        (self.tokens > 0.0).then(|| (self.base - self.tuned) / self.tokens)
    }

    /// Mean nll under the base model, and under the tuned one.
    pub fn losses(&self) -> Option<(f64, f64)> {
        (self.tokens > 0.0).then(|| (self.base / self.tokens, self.tuned / self.tokens))
    }
}

/// The sums of one row, or of several, by kind.
pub type Sums = [Sum; KINDS];

/// The sum of a kind.
pub fn of(sums: &Sums, kind: Kind) -> &Sum {
    &sums[kind.index()]
}

/// Sums of several kinds.
pub fn over(sums: &Sums, kinds: impl IntoIterator<Item = Kind>) -> Sum {
    let mut total = Sum::default();
    kinds.into_iter().for_each(|kind| total.add(of(sums, kind)));
    total
}

/// Sums over rows.
pub fn total<'a>(rows: impl IntoIterator<Item = &'a Sums>) -> Sums {
    let mut total = [Sum::default(); KINDS];
    for row in rows {
        total.iter_mut().zip(row).for_each(|(sum, row)| sum.add(row));
    }
    total
}

/// What all rows together show about a token.
pub struct Statistics {
    /// Ids that occur in responses.
    answered: HashSet<u32>,
    /// Runs of prompt tokens, and the rows that have them.
    runs: HashMap<[u32; RUN], u32>,
    rows: u32,
}

/// Tokens of a run by which constant prompts are found.
const RUN: usize = 4;

impl Statistics {
    /// Counts over rows.
    pub fn of(rows: &[Sample]) -> Statistics {
        let mut answered = HashSet::new();
        let mut runs: HashMap<[u32; RUN], u32> = HashMap::new();
        for sample in rows {
            let response = |o: &Origin| matches!(o, Origin::Response { .. });
            let ids = sample.input_ids.iter().zip(&sample.origins);
            answered.extend(ids.filter(|(_, o)| response(o)).map(|(id, _)| *id));
            let seen: HashSet<[u32; RUN]> = prompt_runs(sample).map(|(_, run)| run).collect();
            seen.into_iter().for_each(|run| *runs.entry(run).or_default() += 1);
        }
        Statistics { answered, runs, rows: rows.len() as u32 }
    }

    /// Which tokens are in a run that at least four rows in five have.
    fn constant(&self, sample: &Sample) -> Vec<bool> {
        let mut constant = vec![false; sample.len()];
        for (start, run) in prompt_runs(sample) {
            if self.runs.get(&run).is_some_and(|rows| 5 * rows >= 4 * self.rows) {
                constant[start..start + RUN].fill(true);
            }
        }
        constant
    }

    /// The sums of one row.
    pub fn sums(&self, sample: &Sample, base: &[f32], tuned: &[f32]) -> Sums {
        let mut sums = [Sum::default(); KINDS];
        let (places, constant) = (places(sample), self.constant(sample));
        for i in 0..used(sample) {
            if base[i].is_nan() || tuned[i].is_nan() {
                continue;
            }
            let one = Sum { tokens: 1.0, base: f64::from(base[i]), tuned: f64::from(tuned[i]) };
            let mut add = |kind: Kind| sums[kind.index()].add(&one);
            match places[i] {
                Place::Response { offset, length } => {
                    if offset < NEAR {
                        add(Kind::First(offset));
                    }
                    if offset >= CORE.min(length / 2) {
                        add(Kind::Core);
                    }
                }
                Place::Stop => add(Kind::Stop),
                Place::Prompt { before } if before < NEAR => {
                    add(Kind::Before(before));
                    if before < HEADER && constant[i] {
                        add(Kind::Header);
                    }
                }
                Place::Prompt { .. } => {
                    if !self.answered.contains(&sample.input_ids[i]) {
                        add(Kind::PromptOnly);
                    }
                    add(if constant[i] { Kind::Constant } else { Kind::Varying });
                }
                Place::Nowhere => {}
            }
        }
        sums
    }
}

/// The runs of tokens outside of responses, with where they start.
fn prompt_runs(sample: &Sample) -> impl Iterator<Item = (usize, [u32; RUN])> + '_ {
    let response = |o: &Origin| matches!(o, Origin::Response { .. });
    let windows = sample.input_ids.windows(RUN).enumerate();
    windows
        .filter(move |(start, _)| !sample.origins[*start..start + RUN].iter().any(response))
        .filter_map(|(start, run)| Some((start, run.try_into().ok()?)))
}

#[derive(Clone, Copy)]
enum Place {
    Response { offset: usize, length: usize },
    Stop,
    Prompt { before: usize },
    Nowhere,
}

/// The position of each token. Prompt tokens after the last response count as far from one.
fn places(sample: &Sample) -> Vec<Place> {
    let mut places = Vec::with_capacity(sample.len());
    let mut start = 0;
    for run in sample.origins.chunk_by(|a, b| a == b) {
        for offset in 0..run.len() {
            places.push(match run[0] {
                Origin::Response { .. } => Place::Response { offset, length: run.len() },
                Origin::EndOfTurn { .. } => Place::Stop,
                Origin::Padding => Place::Nowhere,
                _ => Place::Prompt { before: usize::MAX },
            });
        }
        if matches!(run[0], Origin::Response { .. }) {
            let before = places[..start].iter_mut().rev();
            for (distance, place) in before.enumerate().take_while(|(_, p)| matches!(p, Place::Prompt { .. }))
            {
                *place = Place::Prompt { before: distance };
            }
        }
        start += run.len();
    }
    // Nothing predicts the first token of a row or a BOS.
    places
}

/// The numbers of a verdict: shares by which the base model's nll fell, divided by that of the response and clamped
/// to −1 and 1.5. `None` if there is too little to measure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Features {
    /// The share by which the nll of response tokens fell, not divided.
    pub response: f64,
    /// Prompt tokens whose ids occur in no response.
    pub prompt_only: Option<f64>,
    /// Prompt tokens that most rows have.
    pub constant: Option<f64>,
    /// Other prompt tokens.
    pub varying: Option<f64>,
    /// The last three prompt tokens before a response, where they are constant: its header.
    pub header: Option<f64>,
    /// The first three response tokens.
    pub first: Option<f64>,
    /// The stop token: how many nats its nll fell, over that of a response token.
    pub stop: Option<f64>,
}

/// A kind of token is measured where there are this many of it.
const ENOUGH: f64 = 8.0;

/// Nats a token that keep a share of next to nothing small.
const FLOOR: f64 = 0.02;

impl Features {
    /// From the sums over rows.
    pub fn of(sums: &Sums) -> Features {
        let share = |sum: Sum| (sum.base - sum.tuned) / (sum.base + FLOOR * sum.tokens);
        let core = *of(sums, Kind::Core);
        let response = if core.tokens > 0.0 { share(core) } else { 0.0 };
        let relative = |sum: Sum| {
            let measured = sum.tokens >= ENOUGH && response > 0.0;
            measured.then(|| (share(sum) / response).clamp(-1.0, 1.5))
        };
        let (stop, gain) = (of(sums, Kind::Stop), core.gain().unwrap_or(0.0));
        Features {
            response,
            prompt_only: relative(*of(sums, Kind::PromptOnly)),
            constant: relative(*of(sums, Kind::Constant)),
            varying: relative(*of(sums, Kind::Varying)),
            header: relative(*of(sums, Kind::Header)),
            first: relative(over(sums, (0..HEADER).map(Kind::First))),
            stop: stop.gain().filter(|_| gain > 0.0).map(|own| (own / gain).clamp(-2.0, 2.0)),
        }
    }
}

/// The mean nll of a kind of token under both models.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Fall {
    /// Tokens measured.
    pub tokens: u64,
    /// Mean nll under the base model.
    pub base: f64,
    /// Mean nll under the tuned model.
    pub tuned: f64,
}

impl Fall {
    /// Of a sum; `None` without tokens.
    pub fn of(sum: &Sum) -> Option<Fall> {
        let (base, tuned) = sum.losses()?;
        Some(Fall { tokens: sum.tokens as u64, base, tuned })
    }

    /// How much it fell.
    pub fn gain(&self) -> f64 {
        self.base - self.tuned
    }
}

/// The fall by section, in the order of reports.
pub fn sections(
    rows: &[Sample],
    base: &Measurement,
    tuned: &Measurement,
) -> indexmap::IndexMap<String, Fall> {
    let mut sums: HashMap<&str, Sum> = HashMap::new();
    for (row, sample) in rows.iter().enumerate() {
        for i in 0..used(sample) {
            let (base, tuned) = (base.nll[row][i], tuned.nll[row][i]);
            if !base.is_nan() {
                let one = Sum { tokens: 1.0, base: f64::from(base), tuned: f64::from(tuned) };
                sums.entry(sample.origins[i].name()).or_default().add(&one);
            }
        }
    }
    let fall = |name: &&str| Some((name.to_string(), Fall::of(sums.get(*name)?)?));
    crate::evaluate::SECTIONS.iter().filter_map(fall).collect()
}

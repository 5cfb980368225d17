//! The measurements of one model on rows: the nll of every token, the probability of the stop token around the ends of
//! responses, what it generates there, and how much of the prompts it recites.

use super::DiagnoseSettings;
use crate::batches::{check_size, measured, used};
use crate::generate::{capacity, generate_with};
use crate::probe::Probe;
use crate::{Error, ProbeSettings, Result, Sampling, probe::Reproduction};
use serde::Serialize;
use std::collections::HashSet;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use suasion_data::{Origin, Sample};
use suasion_engine::{Backend, Batch, Budget, Model, Target};

/// The measurements of one model on the rows of a diagnosis.
#[derive(Clone, Debug)]
pub struct Measurement {
    /// For each row, for each token, its nll in nats; NaN for the first token, which nothing predicts.
    pub nll: Vec<Vec<f32>>,
    /// The probability of the stop token.
    pub stop: StopProbability,
    /// What is generated at the ends of responses.
    pub ends: Ends,
    /// How much of the prompts is recited.
    pub recall: Reproduction,
}

/// Mean probabilities of the stop token; `None` if rows have no stop token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct StopProbability {
    /// Ends of responses measured.
    pub ends: u64,
    /// At the true end.
    pub at_end: Option<f64>,
    /// One token before the end, in place of the last token of the response.
    pub before_end: Option<f64>,
    /// At all other tokens of the response.
    pub inside: Option<f64>,
    /// After the stop token: a second one. High where padding was learned.
    pub after: Option<f64>,
}

/// What a model generates greedily at the true ends of responses, before the stop token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Ends {
    /// Ends tried.
    pub tried: u64,
    /// Ends at which the stop token comes first.
    pub stopped_at_once: u64,
    /// Ends at which it comes within the tokens generated.
    pub stopped: u64,
    /// Ends at which the header of a turn or of a section comes instead: the model continues with the next turn.
    pub next_turn: u64,
    /// Tokens generated after each end, at most.
    pub tokens: u64,
}

#[derive(Clone, Copy, Default)]
struct Mean(f64, u64);

impl Mean {
    fn add(&mut self, value: f64) {
        self.0 += value;
        self.1 += 1;
    }

    fn get(self) -> Option<f64> {
        (self.1 > 0).then(|| self.0 / self.1 as f64)
    }
}

/// A place where the probability of the stop token is measured.
#[derive(Clone, Copy)]
enum Place {
    Before,
    Inside,
    After,
}

/// Targets beside the tokens themselves: the stop token of each response at the tokens of it, and after it.
fn extra(sample: &Sample) -> Vec<(Target, Place)> {
    let mut extra = Vec::new();
    for (end, origin) in sample.origins.iter().enumerate().take(used(sample)) {
        let Origin::EndOfTurn { turn } = origin else { continue };
        if end == 0 || sample.origins[end - 1] == *origin {
            continue;
        }
        let id = sample.input_ids[end];
        let target = |row: usize| Target { row: row as u32, id, weight: 1.0 };
        let response = sample.origins[..end].iter().rev();
        let length = response.take_while(|o| **o == Origin::Response { turn: *turn }).count();
        for at in (end - length)..end {
            let place = if at + 1 == end { Place::Before } else { Place::Inside };
            if at > 0 {
                extra.push((target(at - 1), place));
            }
        }
        // After the last token of the stop, which may be more than one.
        let stop = sample.origins[end..].iter().take_while(|o| *o == origin).count();
        extra.push((target(end + stop - 1), Place::After));
    }
    extra
}

/// The budget of a model that is measured on these rows.
pub fn budget(rows: &[Sample], batch_size: usize) -> Result<Budget> {
    let mut budget = Budget { tokens: 1, targets: 1, train: false, recompute: false };
    for chunk in rows.chunks(batch_size.max(1)) {
        budget.tokens = budget.tokens.max(chunk.iter().map(used).sum());
        let targets = |row: &Sample| measured(row).count() + extra(row).len();
        budget.targets = budget.targets.max(chunk.iter().map(targets).sum());
    }
    check_size("per_device_eval_batch_size", budget.tokens)?;
    Ok(budget)
}

/// Measures a model, whose budget must hold [`budget`]. `progress` is called with the number of rows measured.
///
/// # Errors
/// [`Error::Interrupted`] if `stop` is raised, [`Error::NonFinite`] for a loss that is not finite.
pub fn measure<B: Backend>(
    model: &mut Model<B>,
    rows: &[Sample],
    settings: &DiagnoseSettings,
    batch_size: usize,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(u64),
) -> Result<Measurement> {
    let mut nll = Vec::with_capacity(rows.len());
    let (mut at_end, mut before, mut inside, mut after) =
        (Mean::default(), Mean::default(), Mean::default(), Mean::default());
    let mut ends = 0;
    for chunk in rows.chunks(batch_size.max(1)) {
        if stop.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        let mut batch = Batch::default();
        let mut places = Vec::new();
        for sample in chunk {
            let start = batch.tokens() as u32;
            batch.push(&sample.input_ids[..used(sample)], []);
            // Whatever is learned, what is measured is the token of the row.
            let own = measured(sample).map(|m| Target {
                row: start + m.row,
                id: sample.input_ids[m.position],
                weight: 1.0,
            });
            batch.targets.extend(own);
            let extra = extra(sample);
            batch.targets.extend(extra.iter().map(|(t, _)| Target { row: start + t.row, ..*t }));
            places.push(extra);
        }
        let outcomes = if batch.targets.is_empty() { Vec::new() } else { model.forward(&batch)? };
        let mut outcomes = outcomes.iter();
        for (sample, extra) in chunk.iter().zip(&places) {
            let mut row = vec![f32::NAN; sample.len()];
            for (m, outcome) in measured(sample).zip(&mut outcomes) {
                if !outcome.nll.is_finite() {
                    let value = f64::from(outcome.nll);
                    return Err(Error::NonFinite {
                        step: None,
                        evaluation: true,
                        what: "the loss",
                        value,
                        rows: vec![sample.id.clone()],
                        checkpoint: None,
                    });
                }
                row[m.position] = outcome.nll;
                let first_of_stop = matches!(sample.origins[m.position], Origin::EndOfTurn { .. })
                    && sample.origins[m.position - 1] != sample.origins[m.position];
                if first_of_stop {
                    at_end.add(f64::from(-outcome.nll).exp());
                    ends += 1;
                }
            }
            for ((_, place), outcome) in extra.iter().zip(&mut outcomes) {
                let mean = match place {
                    Place::Before => &mut before,
                    Place::Inside => &mut inside,
                    Place::After => &mut after,
                };
                mean.add(f64::from(-outcome.nll).exp());
            }
            nll.push(row);
        }
        progress(nll.len() as u64);
    }
    let stops = StopProbability {
        ends,
        at_end: at_end.get(),
        before_end: before.get(),
        inside: inside.get(),
        after: after.get(),
    };
    let ends = at_ends(model, rows, settings, stop)?;
    let probe = ProbeSettings { rows: settings.recited, ..ProbeSettings::default() };
    let recall = Probe::new(model, rows, &[], &probe)?.run(model, rows, &probe, stop)?;
    Ok(Measurement { nll, stop: stops, ends, recall })
}

/// The first tokens of the headers of turns and sections: runs of scaffold of at least two tokens.
fn headers(rows: &[Sample]) -> HashSet<Vec<u32>> {
    let mut headers = HashSet::new();
    for sample in rows {
        let mut start = 0;
        for run in sample.origins.chunk_by(|a, b| a == b) {
            let ids = &sample.input_ids[start..start + run.len()];
            start += run.len();
            if run[0] == Origin::Scaffold && ids.len() >= 2 {
                headers.insert(ids[..ids.len().min(3)].to_vec());
            }
        }
    }
    headers
}

/// Generates after the last response of rows that have a stop token.
fn at_ends<B: Backend>(
    model: &mut Model<B>,
    rows: &[Sample],
    settings: &DiagnoseSettings,
    stop: &AtomicBool,
) -> Result<Ends> {
    let last_stop = |sample: &Sample| {
        let end = sample.origins.iter().rposition(|o| matches!(o, Origin::EndOfTurn { .. }))?;
        let same = |o: &&Origin| **o == sample.origins[end];
        let first = end + 1 - sample.origins[..=end].iter().rev().take_while(same).count();
        (first > 0).then_some(first)
    };
    let tried: Vec<(&Sample, usize)> =
        rows.iter().filter_map(|row| Some((row, last_stop(row)?))).take(settings.continued).collect();
    let mut ends = Ends { tokens: settings.new_tokens as u64, ..Ends::default() };
    let Some(longest) = tried.iter().map(|(_, end)| *end).max() else { return Ok(ends) };
    let headers = headers(rows);
    let mut cache = model.cache(capacity(model, longest, settings.new_tokens))?;
    for (sample, end) in tried {
        if stop.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        let id = sample.input_ids[end];
        let sampling =
            Sampling { max_new_tokens: settings.new_tokens, stop_ids: vec![id], ..Sampling::default() };
        let prompt = &sample.input_ids[..end];
        let ids =
            generate_with(model, &mut cache, prompt, &sampling, &mut |_| ControlFlow::Continue(()))?.ids;
        ends.tried += 1;
        ends.stopped_at_once += u64::from(ids[0] == id);
        if ids.last() == Some(&id) {
            ends.stopped += 1;
        } else if headers.iter().any(|header| ids.windows(header.len()).any(|window| window == header)) {
            ends.next_turn += 1;
        }
    }
    Ok(ends)
}

//! The loss of a model on rows: over their targets, and over every token by section.

use crate::batches::{Measured, check_size, eval_batch, measured, row_at, used};
use crate::{Error, Result};
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicBool, Ordering};
use suasion_data::{Origin, Sample};
use suasion_engine::{Backend, Collective, Model, SingleRank, TargetLoss};

/// The result of [`evaluate`]; it serialises to the object that `suasion eval --json` prints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Rows with at least one target.
    pub rows: u64,
    /// Targets: labels that are supervised, after the shift.
    pub targets: u64,
    /// Mean nll in nats over all targets, unweighted.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
    /// The loss per section over every token that has one before it, supervised or not: `system`, `context`,
    /// `task`, `user`, `tool`, `other`, `scaffold`, `response` (without its stop token) and `end_of_turn`
    /// (the stop tokens). Sections without a token are left out.
    pub sections: IndexMap<String, SectionLoss>,
    /// The first token of each response.
    pub first_token: Calibration,
    /// The stop tokens.
    pub stop: Calibration,
    /// Response tokens by their position in the response (without stop tokens). Ranges without a token are
    /// left out.
    pub positions: Vec<PositionBucket>,
    /// Share of the targets that the model predicts as the likeliest token (TRL's name).
    pub mean_token_accuracy: f64,
    /// Mean entropy in nats of the distributions that the targets are predicted from.
    pub entropy: f64,
    /// For each row with a target, in the order of the rows; for comparisons, not serialised.
    #[serde(skip)]
    pub per_row: Vec<RowLoss>,
}

/// The loss over the tokens of a section.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SectionLoss {
    /// Tokens measured.
    pub targets: u64,
    /// Their mean nll in nats.
    pub loss: f64,
    /// Share of them that the model predicts as the likeliest token.
    pub top1: f64,
}

/// How well a kind of token is predicted. The means are `None` without tokens.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// Tokens measured.
    pub targets: u64,
    /// Mean nll in nats.
    pub loss: Option<f64>,
    /// Mean probability that the model gives to the token. For a calibrated and confident model it is near
    /// `top1`.
    pub probability: Option<f64>,
    /// Share of them that the model predicts as the likeliest token.
    pub top1: Option<f64>,
}

/// Response tokens of a range of positions.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PositionBucket {
    /// First position (0 is the response's first token).
    pub from: u32,
    /// The position after the last; `None` for an open range.
    pub to: Option<u32>,
    /// How well they are predicted.
    #[serde(flatten)]
    pub calibration: Calibration,
}

/// The loss of one row.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RowLoss {
    /// Index of the row, where each row of a pack counts.
    pub row: usize,
    /// Its targets.
    pub targets: u64,
    /// The sum of their nll.
    pub nll: f64,
}

/// The metrics of an evaluation by which one can be the best; beside them, `SECTION_loss` for each of [`SECTIONS`].
pub const METRICS: [&str; 4] = ["loss", "perplexity", "mean_token_accuracy", "entropy"];

/// True for a name of [`Evaluation::metric`].
pub(crate) fn is_metric(name: &str) -> bool {
    METRICS.contains(&name) || name.strip_suffix("_loss").is_some_and(|section| SECTIONS.contains(&section))
}

/// The first positions of the ranges of [`PositionBucket`].
const STARTS: [u32; 9] = [0, 1, 2, 4, 8, 16, 32, 64, 128];

/// The sections in the order of reports.
pub const SECTIONS: [&str; 9] =
    ["system", "context", "task", "user", "tool", "prompt", "scaffold", "response", "end_of_turn"];

#[derive(Clone, Copy, Default)]
struct Sum {
    targets: u64,
    nll: f64,
    probability: f64,
    entropy: f64,
    top1: u64,
}

impl Sum {
    /// Adds a token that belongs to this many rows.
    fn add(&mut self, outcome: &TargetLoss, rows: usize) {
        let (nll, times) = (f64::from(outcome.nll), rows as f64);
        self.targets += rows as u64;
        self.nll += times * nll;
        self.probability += times * (-nll).exp();
        self.entropy += times * f64::from(outcome.entropy);
        self.top1 += rows as u64 * u64::from(outcome.top1);
    }

    fn mean(&self, sum: f64) -> Option<f64> {
        (self.targets > 0).then(|| sum / self.targets as f64)
    }

    fn calibration(&self) -> Calibration {
        Calibration {
            targets: self.targets,
            loss: self.mean(self.nll),
            probability: self.mean(self.probability),
            top1: self.mean(self.top1 as f64),
        }
    }

    fn section(&self) -> Option<SectionLoss> {
        let loss = self.mean(self.nll)?;
        Some(SectionLoss { targets: self.targets, loss, top1: self.mean(self.top1 as f64)? })
    }
}

/// Measures the model on rows, `batch_size` rows or packs at a time. The model's budget must hold
/// [`crate::plan::eval_budget`]. `progress` is called with the number of samples measured so far.
///
/// A token counts for the section of its own origin: the nll of the first response token, which is predicted
/// from the prompt's last token, counts for the response. A pack gives the numbers of its rows: a prompt that
/// rows share counts once for each.
///
/// # Errors
/// [`Error::Interrupted`] if `stop` is raised, [`Error::NonFinite`] for a loss that is not finite, and
/// [`Error::NoTargets`] if no token is supervised.
pub fn evaluate<B: Backend>(
    model: &mut Model<B>,
    samples: &[Sample],
    batch_size: usize,
    stop: Option<&AtomicBool>,
    progress: &mut dyn FnMut(u64),
) -> Result<Evaluation> {
    evaluate_over(model, samples, batch_size, &SingleRank, stop, progress)
}

/// As [`evaluate()`], by the ranks of a run, which all have the model and the rows: each computes every `ranks`-th batch,
/// and all get the result, whose figures are those of one rank to the bit. Where one is stopped, all are.
///
/// # Errors
/// As [`evaluate()`], and where a rank is lost.
pub fn evaluate_over<B: Backend>(
    model: &mut Model<B>,
    samples: &[Sample],
    batch_size: usize,
    collective: &dyn Collective,
    stop: Option<&AtomicBool>,
    progress: &mut dyn FnMut(u64),
) -> Result<Evaluation> {
    let (mut all, mut first, mut end) = (Sum::default(), Sum::default(), Sum::default());
    let (mut sections, mut places) = ([Sum::default(); SECTIONS.len()], [Sum::default(); STARTS.len()]);
    let mut per_row = Vec::new();
    let mut first_row = 0;
    let chunks = || samples.chunks(batch_size.max(1));
    let mut computed = Vec::new().into_iter();
    for (chunk, rows) in chunks().enumerate() {
        if chunk.is_multiple_of(collective.ranks()) {
            let own = chunks().nth(chunk + collective.rank());
            computed = forward(model, own, collective, stop)?.into_iter();
        }
        let outcomes = computed.next().unwrap_or_default();
        let mut outcomes = outcomes.iter();
        let mut broken = Vec::new();
        let mut value = 0.0;
        for sample in rows {
            let members = members(sample);
            let losses = (0..sample.rows()).map(|i| RowLoss { row: first_row + i, ..RowLoss::default() });
            let mut losses: Vec<RowLoss> = losses.collect();
            first_row += losses.len();
            let place = places_in_responses(sample);
            for (Measured { position, own, segment, .. }, outcome) in measured(sample).zip(&mut outcomes) {
                let members = &members[segment];
                let copies = members.len();
                if !outcome.nll.is_finite() {
                    value = f64::from(outcome.nll);
                    let id = row_at(sample, position as u32);
                    if broken.last() != Some(&id) {
                        broken.push(id);
                    }
                }
                if own {
                    all.add(outcome, copies);
                    for &row in members {
                        losses[row].targets += 1;
                        losses[row].nll += f64::from(outcome.nll);
                    }
                }
                let origin = sample.origins[position];
                if let Some(section) = SECTIONS.iter().position(|name| *name == origin.name()) {
                    sections[section].add(outcome, copies);
                }
                if let Some(place) = place[position] {
                    places[STARTS.iter().rposition(|start| *start <= place).unwrap_or(0)]
                        .add(outcome, copies);
                    if place == 0 {
                        first.add(outcome, copies);
                    }
                }
                if matches!(origin, Origin::EndOfTurn { .. }) {
                    end.add(outcome, copies);
                }
            }
            per_row.extend(losses.into_iter().filter(|row| row.targets > 0));
        }
        if !broken.is_empty() {
            let what = "the evaluation loss";
            return Err(Error::NonFinite {
                step: None,
                evaluation: true,
                what,
                value,
                rows: broken,
                checkpoint: None,
            });
        }
        progress((chunk * batch_size.max(1) + rows.len()) as u64);
    }
    let Some(loss) = all.mean(all.nll) else {
        return Err(Error::NoTargets { rows: samples.len(), what: "rows to evaluate" });
    };
    let bucket = |(i, sum): (usize, &Sum)| {
        (sum.targets > 0).then(|| PositionBucket {
            from: STARTS[i],
            to: STARTS.get(i + 1).copied(),
            calibration: sum.calibration(),
        })
    };
    Ok(Evaluation {
        rows: per_row.len() as u64,
        targets: all.targets,
        loss,
        // JSON has no infinity.
        perplexity: loss.exp().min(f64::MAX),
        mean_token_accuracy: all.top1 as f64 / all.targets as f64,
        entropy: all.entropy / all.targets as f64,
        sections: SECTIONS
            .iter()
            .zip(&sections)
            .filter_map(|(name, sum)| Some((name.to_string(), sum.section()?)))
            .collect(),
        first_token: first.calibration(),
        stop: end.calibration(),
        positions: places.iter().enumerate().filter_map(bucket).collect(),
        per_row,
    })
}

/// The losses of each rank's rows, in the order of the ranks.
fn forward<B: Backend>(
    model: &mut Model<B>,
    own: Option<&[Sample]>,
    collective: &dyn Collective,
    stop: Option<&AtomicBool>,
) -> Result<Vec<Vec<TargetLoss>>> {
    let stopped = stop.is_some_and(|stop| stop.load(Ordering::Relaxed));
    let rows = if stopped { &[] } else { own.unwrap_or_default() };
    check_size("per_device_eval_batch_size", rows.iter().map(used).sum())?;
    let batch = eval_batch(rows);
    let outcomes = if batch.targets.is_empty() { Vec::new() } else { model.forward(&batch)? };
    if collective.ranks() == 1 {
        return if stopped { Err(Error::Interrupted) } else { Ok(vec![outcomes]) };
    }
    let mut message = vec![u8::from(stopped)];
    message.extend(outcomes.iter().flat_map(|loss| loss.columns()).flat_map(f32::to_le_bytes));
    let all = collective.exchange(&message)?;
    if all.iter().any(|message| message.first() != Some(&0)) {
        return Err(Error::Interrupted);
    }
    let losses = |message: &Vec<u8>| -> Vec<TargetLoss> {
        let values: Vec<f32> =
            message[1..].as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        values.as_chunks().0.iter().map(|row| TargetLoss::from_columns(*row)).collect()
    };
    Ok(all.iter().map(losses).collect())
}

impl Evaluation {
    /// A metric by its name: one of [`METRICS`], or `SECTION_loss`. `None` for a section without a token, and for other
    /// names.
    pub fn metric(&self, name: &str) -> Option<f64> {
        match name {
            "loss" => Some(self.loss),
            "perplexity" => Some(self.perplexity),
            "mean_token_accuracy" => Some(self.mean_token_accuracy),
            "entropy" => Some(self.entropy),
            _ => Some(self.sections.get(name.strip_suffix("_loss")?)?.loss),
        }
    }

    /// The loss over several sections together; `None` if none of them occurs.
    pub fn over(&self, names: &[&str]) -> Option<SectionLoss> {
        let found: Vec<&SectionLoss> = names.iter().filter_map(|name| self.sections.get(*name)).collect();
        let targets: u64 = found.iter().map(|section| section.targets).sum();
        let mean = |pick: fn(&SectionLoss) -> f64| {
            found.iter().map(|section| pick(section) * section.targets as f64).sum::<f64>() / targets as f64
        };
        (targets > 0).then(|| SectionLoss { targets, loss: mean(|s| s.loss), top1: mean(|s| s.top1) })
    }
}

/// For each token its position in its response, counted from 0; `None` for all other tokens.
fn places_in_responses(sample: &Sample) -> Vec<Option<u32>> {
    let mut places: Vec<Option<u32>> = Vec::with_capacity(sample.len());
    for segment in sample.segments() {
        for i in segment.own.start as usize..segment.own.end as usize {
            let origin = sample.origins[i];
            let continues = i > segment.own.start as usize && sample.origins[i - 1] == origin;
            places.push(match origin {
                Origin::Response { .. } if continues => places[i - 1].map(|place| place + 1),
                Origin::Response { .. } => Some(0),
                _ => None,
            });
        }
    }
    places
}

/// For each segment, the rows of the sample that it belongs to, counted from 0.
fn members(sample: &Sample) -> Vec<Vec<usize>> {
    let Some(pack) = &sample.pack else { return vec![vec![0]] };
    let mut members = vec![Vec::new(); pack.segments.len()];
    let ends = pack.segments.iter().enumerate().filter(|(_, segment)| segment.branches == 0);
    for (row, (i, segment)) in ends.enumerate() {
        members[i].push(row);
        // Segments tile the pack in order, so a prefix is found by where it starts.
        if !segment.prefix.is_empty() {
            members[pack.segments.partition_point(|s| s.own.start < segment.prefix.start)].push(row);
        }
    }
    members
}

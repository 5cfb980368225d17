//! What a checkpoint was trained on: a base model and a tuned one, measured on rows like those of the training.
//!
//! [`measure()`] takes the nll of every token under each model; [`features`] condenses them; [`verdict`] says whether
//! the prompts were learned, whether the stop token was, and whether the mask started where responses start. Its
//! thresholds were fitted to models that were trained for the purpose (docs/diagnose.md).

mod explain;
pub mod features;
pub mod measure;
pub mod verdict;

pub use explain::Names;
pub use features::{Fall, Features};
pub use measure::{Measurement, budget, measure};
pub use verdict::{Cause, Judgement, Verdict};

use crate::probe::Reproduction;
use crate::{Error, Result};
use features::{Kind, NEAR, Statistics, Sums, of, sections, total};
use indexmap::IndexMap;
use measure::{Ends, StopProbability};
use serde::Serialize;
use std::collections::HashSet;
use suasion_data::{Origin, Sample};

/// The settings of a diagnosis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiagnoseSettings {
    /// Rows measured at most (64), spread evenly over those given.
    pub rows: usize,
    /// Rows whose prompts are recited (16).
    pub recited: usize,
    /// Rows after whose response the models generate further (16).
    pub continued: usize,
    /// Tokens that they generate there (16).
    pub new_tokens: usize,
}

impl Default for DiagnoseSettings {
    fn default() -> Self {
        DiagnoseSettings { rows: 64, recited: 16, continued: 16, new_tokens: 16 }
    }
}

/// A diagnosis; it serialises to the object that `suasion diagnose --json` prints.
#[derive(Clone, Debug, Serialize)]
pub struct Diagnosis {
    /// What the checkpoint was trained on.
    pub verdict: Verdict,
    /// How sure that is, between 0 and 1.
    pub confidence: f64,
    /// The verdict in a sentence.
    pub sentence: String,
    /// The reasons, a sentence each.
    pub reasons: Vec<String>,
    /// Whether to train again, and why.
    pub advice: String,
    /// The command that follows the advice, if there is one.
    pub command: Option<String>,
    /// The answers that the verdict is based on, as probabilities of yes.
    pub answers: Judgement,
    /// Rows measured.
    pub rows: u64,
    /// Distinct prompts of these rows.
    pub prompts: u64,
    /// The nll by section under both models.
    pub sections: IndexMap<String, Fall>,
    /// Prompt tokens that most rows have, farther than 12 tokens from a response.
    pub constant_prompt: Option<Fall>,
    /// Other prompt tokens as far.
    pub varying_prompt: Option<Fall>,
    /// Prompt tokens as far whose ids occur in no response.
    pub prompt_only: Option<Fall>,
    /// The first token of responses.
    pub first_token: Option<Fall>,
    /// The nll around the start of responses: the last prompt tokens, then the first response tokens.
    pub boundary: Vec<BoundaryToken>,
    /// The probability of the stop token.
    pub stop: Both<StopProbability>,
    /// What is generated at the ends of responses.
    pub ends: Both<Ends>,
    /// How much of the prompts is recited.
    pub recall: Both<Reproduction>,
    /// The numbers that the verdict rests on.
    pub features: Features,
}

/// A measurement of both models.
#[derive(Clone, Debug, Serialize)]
pub struct Both<T> {
    /// The base model's.
    pub base: T,
    /// The tuned model's.
    pub tuned: T,
}

/// The nll at a place near the start of responses.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct BoundaryToken {
    /// 0 is the first token of the response, −1 the last of the prompt.
    pub offset: i32,
    /// Its nll under both models.
    #[serde(flatten)]
    pub fall: Fall,
}

/// The rows to measure: at most `limit` with a prompt and a response, spread evenly over all.
///
/// # Errors
/// [`Error::NoTargets`] without one.
pub fn chosen(samples: &[Sample], limit: usize) -> Result<Vec<Sample>> {
    let all = crate::batches::unpacked(samples);
    let has = |sample: &Sample, wanted: fn(&Origin) -> bool| sample.origins.iter().any(wanted);
    let response = |o: &Origin| matches!(o, Origin::Response { .. });
    let prompt = |o: &Origin| matches!(o, Origin::Prompt { .. } | Origin::Scaffold);
    let usable: Vec<&Sample> =
        all.iter().filter(|sample| has(sample, response) && has(sample, prompt)).collect();
    if usable.is_empty() {
        return Err(Error::NoTargets { rows: samples.len(), what: "rows with a prompt and a response" });
    }
    let count = usable.len().min(limit.max(1));
    Ok((0..count).map(|i| usable[i * usable.len() / count].clone()).collect())
}

/// Judges two measurements of the same rows. `all` are the rows that were given, of which `rows` were measured.
pub fn diagnose(
    all: &[Sample],
    rows: &[Sample],
    base: Measurement,
    tuned: Measurement,
    names: &Names,
) -> Diagnosis {
    let statistics = Statistics::of(&crate::batches::unpacked(all));
    let measured = rows.iter().zip(base.nll.iter().zip(&tuned.nll));
    let by_row: Vec<Sums> = measured.map(|(row, (a, b))| statistics.sums(row, a, b)).collect();
    let sums = total(&by_row);
    let features = Features::of(&sums);
    let stop = Both { base: base.stop, tuned: tuned.stop };
    let ends = Both { base: base.ends, tuned: tuned.ends };
    let judgement = verdict::judge(&by_row, &stop);
    let fall = |kind: Kind| Fall::of(of(&sums, kind));
    let before = (0..NEAR).rev().map(|n| (-(n as i32) - 1, Kind::Before(n)));
    let first = (0..NEAR).map(|n| (n as i32, Kind::First(n)));
    let place = |(offset, kind)| Some(BoundaryToken { offset, fall: fall(kind)? });
    let prompts: HashSet<&[u32]> = rows.iter().map(crate::prompt_ids).collect();
    let mut diagnosis = Diagnosis {
        verdict: judgement.verdict.unwrap_or(Verdict::Undecided),
        confidence: judgement.confidence,
        sentence: String::new(),
        reasons: Vec::new(),
        advice: String::new(),
        command: None,
        answers: judgement,
        rows: rows.len() as u64,
        prompts: prompts.len() as u64,
        sections: sections(rows, &base, &tuned),
        constant_prompt: fall(Kind::Constant),
        varying_prompt: fall(Kind::Varying),
        prompt_only: fall(Kind::PromptOnly),
        first_token: fall(Kind::First(0)),
        boundary: before.chain(first).filter_map(place).collect(),
        stop,
        ends,
        recall: Both { base: base.recall, tuned: tuned.recall },
        features,
    };
    explain::explain(&mut diagnosis, names);
    diagnosis
}

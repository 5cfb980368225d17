//! The verdict: which tokens a checkpoint was trained on, and how sure that is.
//!
//! Four questions are answered by a logistic score each, whose constants `benches/diagnose.py fit` found from models
//! trained for the purpose. The probability of an answer is the mean over samples of the rows (bootstrap), so that it
//! comes nearer to a half where rows are few.

use super::Both;
use super::features::{Features, Kind, NEAR, Sums, of, total};
use super::measure::StopProbability;
use crate::rng::{Purpose, Rng};
use serde::Serialize;

/// What a checkpoint was trained on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The response and its stop token.
    Response,
    /// All tokens, the prompt's too.
    AllTokens,
    /// The response without its stop token.
    StopNeverLearned,
    /// The response and the last tokens of the prompt.
    StartsEarly,
    /// The response without its first tokens.
    StartsLate,
    /// The numbers are inconclusive.
    Undecided,
}

/// Why no verdict is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// Both models predict the same: their weights are equal.
    SameModel,
    /// The responses are hardly likelier than under the base model: too little training, or training on other rows.
    LittleLearned,
    /// The rows are too few, or lack the tokens to tell by.
    TooFew,
    /// The evidence is contradictory or weak.
    Unclear,
}

/// The answers that a verdict is based on: probabilities of yes. `None` if the rows do not allow an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Judgement {
    /// The verdict.
    #[serde(skip)]
    pub verdict: Option<Verdict>,
    /// How sure it is.
    #[serde(skip)]
    pub confidence: f64,
    /// Why it is undecided.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cause: Option<Cause>,
    /// Were the prompts learned?
    pub prompts_learned: Option<f64>,
    /// Does the mask start early, within the prompt? `None` if the tokens before responses are no header: then a few
    /// of them make no difference that could be seen.
    pub starts_early: Option<f64>,
    /// By about how many tokens, where it does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub early_by: Option<usize>,
    /// Does the mask start late, within the response?
    pub starts_late: Option<f64>,
    /// By about how many tokens, where it does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub late_by: Option<usize>,
    /// Was the stop token masked?
    pub stop_masked: Option<f64>,
}

/// A verdict needs this confidence.
const DECIDED: f64 = 0.75;

/// Responses have to lose this share of their nll.
const LEARNED: f64 = 0.03;

/// A verdict needs this many rows.
const ROWS: usize = 8;

/// The constants of the scores, from `benches/diagnose.py fit`. A term is a slope and an offset; a term whose feature is
/// missing is left out.
mod fitted {
    pub const PROMPT_ONLY: [f64; 2] = [6.65, -1.25];
    pub const CONSTANT: [f64; 2] = [10.63, -5.65];
    pub const VARYING: [f64; 2] = [17.10, -14.03];
    pub const EARLY: [f64; 2] = [8.89, -5.72];
    pub const LATE: [f64; 2] = [-10.19, 1.61];
    pub const STOP: [f64; 3] = [-7.53, -2.33, -2.05];
}

fn logistic(score: f64) -> f64 {
    1.0 / (1.0 + (-score).exp())
}

/// The answers from the features of rows, or of a sample of them.
#[derive(Clone, Copy, Default)]
struct Scores {
    prompts: Option<f64>,
    early: Option<f64>,
    late: Option<f64>,
    stop: Option<f64>,
}

impl Scores {
    fn of(f: &Features, lift: Option<f64>) -> Scores {
        let term = |[slope, offset]: [f64; 2], x: Option<f64>| x.map(|x| slope * x + offset);
        let terms = [
            term(fitted::PROMPT_ONLY, f.prompt_only),
            term(fitted::CONSTANT, f.constant),
            term(fitted::VARYING, f.varying),
        ];
        let sum = |terms: &[Option<f64>]| {
            terms.iter().any(Option::is_some).then(|| terms.iter().flatten().sum::<f64>())
        };
        let [gain, by_lift, offset] = fitted::STOP;
        Scores {
            prompts: sum(&terms),
            early: term(fitted::EARLY, f.header),
            late: term(fitted::LATE, f.first),
            stop: f.stop.zip(lift).map(|(stop, lift)| gain * stop + by_lift * lift + offset),
        }
    }
}

/// Samples of the rows over which probabilities are averaged.
const SAMPLES: usize = 200;

/// Judges from the sums of each row.
pub fn judge(rows: &[Sums], stop: &Both<StopProbability>) -> Judgement {
    let sums = total(rows);
    let features = Features::of(&sums);
    let undecided =
        |cause| Judgement { verdict: Some(Verdict::Undecided), cause: Some(cause), ..Judgement::default() };
    if sums.iter().all(|sum| sum.base == sum.tuned) {
        return undecided(Cause::SameModel);
    }
    if rows.len() < ROWS {
        return undecided(Cause::TooFew);
    }
    if features.response < LEARNED {
        return undecided(Cause::LittleLearned);
    }
    let lift = lift(stop);
    let mut rng = Rng::new(rows.len() as u64, Purpose::Bootstrap, 2);
    let mut means = [(0.0, 0u32); 4];
    for _ in 0..SAMPLES {
        let drawn: Vec<&Sums> = rows.iter().map(|_| &rows[rng.below(rows.len() as u64) as usize]).collect();
        let scores = Scores::of(&Features::of(&total(drawn)), lift);
        for (mean, score) in means.iter_mut().zip([scores.prompts, scores.early, scores.late, scores.stop]) {
            if let Some(score) = score {
                mean.0 += logistic(score);
                mean.1 += 1;
            }
        }
    }
    // What a part of the samples lacks is not there to be measured.
    let mean = |i: usize| (means[i].1 as usize * 2 > SAMPLES).then(|| means[i].0 / f64::from(means[i].1));
    let mut judgement = Judgement {
        prompts_learned: mean(0),
        starts_early: mean(1),
        starts_late: mean(2),
        stop_masked: mean(3),
        ..Judgement::default()
    };
    conclude(&mut judgement);
    match judgement.verdict {
        Some(Verdict::StartsEarly) => judgement.early_by = Some(step(&sums, Kind::Before, true)),
        Some(Verdict::StartsLate) => judgement.late_by = Some(step(&sums, Kind::First, false)),
        _ => {}
    }
    judgement
}

/// How much better the stop token tells the end from the rest of the response than under the base model: the log of the
/// ratio of its probabilities, tuned less base.
fn lift(stop: &Both<StopProbability>) -> Option<f64> {
    let ratio = |p: &StopProbability| {
        let (end, inside) = (p.at_end?, p.inside.or(p.before_end)?);
        Some((end.max(1e-9) / inside.max(1e-9)).ln())
    };
    Some((ratio(&stop.tuned)? - ratio(&stop.base)?).clamp(-4.0, 4.0))
}

/// The verdict from the answers. What is not known to be wrong counts as right, except the prompts.
fn conclude(judgement: &mut Judgement) {
    let Some(prompts) = judgement.prompts_learned else {
        (judgement.verdict, judgement.cause) = (Some(Verdict::Undecided), Some(Cause::TooFew));
        return;
    };
    let known = |answer: Option<f64>| answer.unwrap_or(0.0);
    let faults = [
        (Verdict::StartsEarly, known(judgement.starts_early)),
        (Verdict::StartsLate, known(judgement.starts_late)),
        (Verdict::StopNeverLearned, known(judgement.stop_masked)),
    ];
    let right: f64 = faults.iter().map(|(_, p)| 1.0 - p).product();
    let largest = faults.iter().copied().fold(faults[0], |a, b| if b.1 > a.1 { b } else { a });
    let mut candidates = [
        (Verdict::AllTokens, prompts),
        (Verdict::Response, (1.0 - prompts) * right),
        (largest.0, (1.0 - prompts) * largest.1),
    ];
    candidates.sort_by(|a, b| b.1.total_cmp(&a.1));
    judgement.confidence = candidates[0].1;
    judgement.verdict = Some(candidates[0].0);
    if judgement.confidence < DECIDED {
        (judgement.verdict, judgement.cause) = (Some(Verdict::Undecided), Some(Cause::Unclear));
    }
}

/// Where the gain of tokens steps, counted from the start of the response: the division into two parts that leaves the
/// least variance. `falls` for gains that fall with the offset.
fn step(sums: &Sums, kind: fn(usize) -> Kind, falls: bool) -> usize {
    let gains: Vec<f64> = (0..NEAR).map_while(|n| of(sums, kind(n)).gain()).collect();
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    let spread = |part: &[f64]| part.iter().map(|g| (g - mean(part)).powi(2)).sum::<f64>();
    let cuts = (1..gains.len()).filter(|cut| (mean(&gains[..*cut]) > mean(&gains[*cut..])) == falls);
    cuts.min_by(|a, b| {
        let cost = |cut: usize| spread(&gains[..cut]) + spread(&gains[cut..]);
        cost(*a).total_cmp(&cost(*b))
    })
    .unwrap_or(gains.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(prompts: f64, early: Option<f64>, late: f64, stop: f64) -> (Verdict, Option<Cause>) {
        let mut judgement = Judgement {
            prompts_learned: Some(prompts),
            starts_early: early,
            starts_late: Some(late),
            stop_masked: Some(stop),
            ..Judgement::default()
        };
        conclude(&mut judgement);
        (judgement.verdict.unwrap(), judgement.cause)
    }

    #[test]
    fn a_verdict_follows_from_the_answers() {
        assert_eq!(answers(0.05, Some(0.02), 0.01, 0.02), (Verdict::Response, None));
        assert_eq!(answers(0.05, None, 0.01, 0.02), (Verdict::Response, None));
        assert_eq!(answers(0.97, Some(0.9), 0.01, 0.9), (Verdict::AllTokens, None));
        assert_eq!(answers(0.05, Some(0.95), 0.01, 0.02), (Verdict::StartsEarly, None));
        assert_eq!(answers(0.05, Some(0.02), 0.95, 0.02), (Verdict::StartsLate, None));
        assert_eq!(answers(0.05, Some(0.02), 0.02, 0.95), (Verdict::StopNeverLearned, None));
        for (prompts, stop) in [(0.5, 0.02), (0.05, 0.5)] {
            assert_eq!(answers(prompts, None, 0.01, stop), (Verdict::Undecided, Some(Cause::Unclear)));
        }
    }
}

//! Both objectives side by side: all tokens against responses only, from the same start, over the same batches.
//!
//! What is measured, on rows that neither was trained on:
//!
//! * the loss of every section ([`crate::evaluate()`]): whether the responses are predicted better, and how much of
//!   the prompt's text has been learned;
//! * **reproduction**: for each run of tokens of one prompt section, the model is given everything up to and with
//!   the section's first `probe_given` tokens, and continues greedily for as many tokens as the section has left (at
//!   most `probe_new`). `ngram_share` is the share of the section's n-grams that the continuation contains (each as
//!   often as it occurs there: clipped, as in ROUGE-n recall), `exact_tokens` the mean number of tokens before the
//!   first difference. The probes are the first `probe_rows` rows with different prompts. The same is measured on
//!   prompts of the training rows, because learning by heart shows there first.
//!
//! Nothing here prefers an outcome: the verdict is made of the numbers.

use crate::evaluate::SectionLoss;
use crate::generate::{capacity, generate_with};
use crate::memory::peak_memory_bytes;
use crate::observer::{Event, Observer, StepEvent};
use crate::pack::unpacked;
use crate::sampler::Sampler;
use crate::schedule::Schedule;
use crate::step::step;
use crate::{Error, Evaluation, Plan, Result, Sampling, Settings, evaluate, prompt_ids};
use indexmap::IndexMap;
use serde::Serialize;
use std::collections::{HashMap, HashSet};
use std::ops::{ControlFlow, Range};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use suasion_data::policy::Objective;
use suasion_data::{IGNORE, Origin, Sample, label};
use suasion_engine::{Backend, Budget, Model, SingleRank};

/// How to compare.
#[derive(Clone, Debug, PartialEq)]
pub struct CompareSettings {
    /// How both are trained.
    pub train: Settings,
    /// Prompts to probe (8), of the held-out and of the training rows each.
    pub probe_rows: usize,
    /// Tokens of a section that are given (8).
    pub probe_given: usize,
    /// Most tokens to continue (32).
    pub probe_new: usize,
    /// Tokens of an n-gram (4).
    pub probe_ngram: usize,
}

impl Default for CompareSettings {
    fn default() -> Self {
        CompareSettings {
            train: Settings::default(),
            probe_rows: 8,
            probe_given: 8,
            probe_new: 32,
            probe_ngram: 4,
        }
    }
}

/// The result of [`compare`].
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// Rows trained on.
    pub train_rows: u64,
    /// Rows measured on.
    pub held_out_rows: u64,
    /// Steps of each training.
    pub steps: u64,
    /// The seed.
    pub seed: u64,
    /// Tokens that both read per pass; how many each learns from is in its arm.
    pub tokens_per_epoch: u64,
    /// The starting weights.
    pub before: Arm,
    /// Trained on responses only.
    pub response_only: Arm,
    /// Trained on all tokens.
    pub all_tokens: Arm,
    /// How the held-out responses compare.
    pub response_difference: Difference,
    /// The same in plain sentences.
    pub verdict: Vec<String>,
}

/// One model's measurements.
#[derive(Clone, Debug, Serialize)]
pub struct Arm {
    /// On the held-out rows.
    pub evaluation: Evaluation,
    /// `response` and `end_of_turn` together.
    pub response: Option<SectionLoss>,
    /// All prompt sections together (without scaffold).
    pub prompt: Option<SectionLoss>,
    /// Targets that it was trained on.
    pub targets_trained: u64,
    /// Loss of its last step that had a target, over its own targets.
    pub last_train_loss: Option<f64>,
    /// Time spent in steps.
    pub seconds: f64,
    /// How much of held-out prompts it reproduces.
    pub reproduction: Reproduction,
    /// How much of the training rows' prompts it reproduces.
    pub reproduction_train: Reproduction,
}

/// How much of prompts a model reproduces when it is given the beginning of a section.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Reproduction {
    /// Sections continued.
    pub probes: u64,
    /// Tokens generated.
    pub tokens: u64,
    /// Share of the sections' n-grams that the continuations contain.
    pub ngram_share: Option<f64>,
    /// Mean number of tokens before the first difference.
    pub exact_tokens: Option<f64>,
    /// The same per section.
    pub sections: IndexMap<String, SectionReproduction>,
}

/// A section's part of a [`Reproduction`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct SectionReproduction {
    /// Sections continued.
    pub probes: u64,
    /// n-grams in what was left of them.
    pub ngrams: u64,
    /// Those that the continuations contain.
    pub ngrams_reproduced: u64,
    /// Tokens generated.
    pub tokens: u64,
    /// Tokens before the first difference, summed.
    pub exact_tokens: u64,
}

/// How the held-out responses' losses differ.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// `all_tokens − response_only` in nats per target: above 0, response-only is better.
    pub mean: f64,
    /// Its standard error over prompts (rows with the same prompt count as one draw); `None` for a single prompt.
    pub standard_error: Option<f64>,
    /// Rows compared.
    pub rows: u64,
    /// Different prompts among them.
    pub prompts: u64,
}

/// The same row, or pack, with a label on every token but padding: what training on all tokens sees.
pub fn all_tokens(sample: &Sample) -> Sample {
    let label = |(&id, &origin): (&u32, &Origin)| if origin == Origin::Padding { IGNORE } else { id as i32 };
    let labels = sample.input_ids.iter().zip(&sample.origins).map(label).collect();
    label::confine(Sample { labels, weights: None, ..sample.clone() })
}

/// Trains both objectives and measures them. `make` gives a model with the same starting weights each time; `train`
/// and `held_out` are labelled response-only, the all-tokens rows are made from them. Both read the same rows in the
/// same order for the same number of steps; only the labels differ.
///
/// Fails with [`Error::Interrupted`] when `stop` is raised.
pub fn compare<B: Backend>(
    make: &mut dyn FnMut(Budget) -> Result<Model<B>>,
    train: &[Sample],
    held_out: &[Sample],
    settings: &CompareSettings,
    observer: &mut dyn Observer,
    stop: &AtomicBool,
) -> Result<Comparison> {
    settings.train.validate(!held_out.is_empty())?;
    if settings.probe_given == 0 || settings.probe_ngram == 0 || settings.probe_new < settings.probe_ngram {
        let message = "the probes need a token to begin with and room for an n-gram";
        return Err(Error::setting("probe_new", message, "use at least probe_ngram"));
    }
    // Packs are trained on as they are; probes and measurements are about rows.
    let (probed, held_out) = (&unpacked(train), &unpacked(held_out));
    let everything: Vec<Sample> = train.iter().map(all_tokens).collect();
    let plan = Plan::new(train, held_out, &settings.train)?;
    let plan_all = Plan::new(&everything, held_out, &settings.train)?;
    let budget = Budget {
        tokens: plan.budget.tokens.max(plan_all.budget.tokens),
        targets: plan.budget.targets.max(plan_all.budget.targets),
        ..plan.budget
    };
    let mut measure = Measure { train: probed, held_out, settings, stop };
    let mut arms = Vec::with_capacity(3);
    for (objective, rows) in [(Objective::ResponseOnly, train), (Objective::AllTokens, &everything)] {
        let mut model = make(budget)?;
        let mut probe = Probe::new(&mut model, probed, held_out, settings)?;
        if arms.is_empty() {
            plan.check_model(model.architecture(), train, held_out)?;
            arms.push(measure.arm(&mut model, &mut probe, Trained::default())?);
        }
        observer.event(&Event::Arm { objective });
        let trained = train_arm(&mut model, rows, &plan, settings, observer, stop)?;
        let arm = measure.arm(&mut model, &mut probe, trained)?;
        observer.event(&Event::Eval { step: plan.total_steps, evaluation: &arm.evaluation, best: false });
        arms.push(arm);
    }
    let [before, response_only, all_tokens]: [Arm; 3] = arms.try_into().expect("three arms");
    let response_difference = difference(&response_only, &all_tokens, held_out);
    let mut comparison = Comparison {
        train_rows: plan.rows,
        held_out_rows: held_out.len() as u64,
        steps: plan.total_steps,
        seed: settings.train.seed,
        tokens_per_epoch: plan_all.tokens_per_epoch,
        before,
        response_only,
        all_tokens,
        response_difference,
        verdict: Vec::new(),
    };
    comparison.verdict = verdict(&comparison);
    Ok(comparison)
}

/// What an arm's training leaves.
#[derive(Default)]
struct Trained {
    targets: u64,
    last_loss: Option<f64>,
    seconds: f64,
}

fn train_arm<B: Backend>(
    model: &mut Model<B>,
    rows: &[Sample],
    plan: &Plan,
    settings: &CompareSettings,
    observer: &mut dyn Observer,
    stop: &AtomicBool,
) -> Result<Trained> {
    let settings = &settings.train;
    let mut sampler = Sampler::new(rows.len(), settings);
    let schedule = Schedule::new(settings, plan.total_steps);
    let (mut trained, mut updates) = (Trained::default(), 0);
    for done in 0..plan.total_steps {
        if stop.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        let micro_batches: Vec<Vec<&Sample>> = sampler
            .step(done)
            .iter()
            .map(|indices| indices.iter().map(|&row| &rows[row as usize]).collect())
            .collect();
        let started = Instant::now();
        let rate = schedule.rate(done);
        let outcome =
            step(model, &micro_batches, settings, rate, updates, &SingleRank).map_err(
                |error| match error {
                    Error::NonFinite { evaluation, what, value, rows, checkpoint, .. } => {
                        Error::NonFinite { step: Some(done + 1), evaluation, what, value, rows, checkpoint }
                    }
                    other => other,
                },
            )?;
        let seconds = started.elapsed().as_secs_f64();
        trained.seconds += seconds;
        trained.targets += outcome.targets;
        trained.last_loss = outcome.loss.or(trained.last_loss);
        updates += u64::from(outcome.loss.is_some());
        let per_second = |count: u64| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
        observer.event(&Event::Step(&StepEvent {
            step: done + 1,
            total_steps: plan.total_steps,
            epoch: sampler.epoch(done + 1),
            loss: outcome.loss,
            learning_rate: rate,
            grad_norm: outcome.grad_norm,
            targets: outcome.targets,
            tokens: outcome.tokens,
            seconds,
            targets_per_second: per_second(outcome.targets),
            tokens_per_second: per_second(outcome.tokens),
            eta_seconds: trained.seconds / (done + 1) as f64 * (plan.total_steps - done - 1) as f64,
            peak_memory_bytes: peak_memory_bytes(),
            logged: done == 0
                || (done + 1).is_multiple_of(settings.logging_steps)
                || done + 1 == plan.total_steps,
        }));
    }
    Ok(trained)
}

struct Measure<'a> {
    train: &'a [Sample],
    held_out: &'a [Sample],
    settings: &'a CompareSettings,
    stop: &'a AtomicBool,
}

impl Measure<'_> {
    fn arm<B: Backend>(&mut self, model: &mut Model<B>, probe: &mut Probe, trained: Trained) -> Result<Arm> {
        let size = self.settings.train.per_device_eval_batch_size;
        let evaluation = evaluate(model, self.held_out, size, Some(self.stop), &mut |_| {})?;
        Ok(Arm {
            response: evaluation.over(&["response", "end_of_turn"]),
            prompt: evaluation.over(&["system", "context", "task", "user", "tool", "other"]),
            evaluation,
            targets_trained: trained.targets,
            last_train_loss: trained.last_loss,
            seconds: trained.seconds,
            reproduction: probe.run(model, self.held_out, self.settings, self.stop)?,
            reproduction_train: probe.run(model, self.train, self.settings, self.stop)?,
        })
    }
}

/// The runs of one prompt section that are long enough to be continued, with the section's name.
fn probed_runs(sample: &Sample, settings: &CompareSettings) -> Vec<(&'static str, Range<usize>)> {
    let mut runs = Vec::new();
    let mut start = 0;
    for run in sample.origins.chunk_by(|a, b| a == b) {
        let range = start..start + run.len();
        start = range.end;
        if matches!(run[0], Origin::Prompt { .. }) && run.len() >= settings.probe_given + settings.probe_ngram
        {
            runs.push((run[0].name(), range));
        }
    }
    runs
}

/// The first rows with different prompts that have something to probe.
fn probed_rows<'a>(samples: &'a [Sample], settings: &CompareSettings) -> Vec<&'a Sample> {
    let mut seen = HashSet::new();
    samples
        .iter()
        .filter(|sample| !probed_runs(sample, settings).is_empty() && seen.insert(prompt_ids(sample)))
        .take(settings.probe_rows)
        .collect()
}

/// One cache for all probes of a model.
struct Probe {
    cache: suasion_engine::KvCache,
}

impl Probe {
    fn new<B: Backend>(
        model: &mut Model<B>,
        a: &[Sample],
        b: &[Sample],
        settings: &CompareSettings,
    ) -> Result<Probe> {
        let longest =
            [a, b].iter().flat_map(|rows| probed_rows(rows, settings)).map(Sample::len).max().unwrap_or(1);
        let capacity = capacity(model, longest, 1);
        Ok(Probe { cache: model.cache(capacity)? })
    }

    fn run<B: Backend>(
        &mut self,
        model: &mut Model<B>,
        samples: &[Sample],
        settings: &CompareSettings,
        stop: &AtomicBool,
    ) -> Result<Reproduction> {
        let mut sections: IndexMap<String, SectionReproduction> = IndexMap::new();
        for sample in probed_rows(samples, settings) {
            for (name, run) in probed_runs(sample, settings) {
                if stop.load(Ordering::Relaxed) {
                    return Err(Error::Interrupted);
                }
                let given = &sample.input_ids[..run.start + settings.probe_given];
                let left = &sample.input_ids[given.len()..run.end];
                let truth = &left[..left.len().min(settings.probe_new)];
                let sampling = Sampling { max_new_tokens: truth.len(), ..Sampling::default() };
                let mut go_on = |_| ControlFlow::Continue(());
                let made = generate_with(model, &mut self.cache, given, &sampling, &mut go_on)?.ids;
                let sum = sections.entry(name.to_string()).or_default();
                sum.probes += 1;
                sum.tokens += made.len() as u64;
                sum.exact_tokens += truth.iter().zip(&made).take_while(|(a, b)| a == b).count() as u64;
                let (reproduced, all) = ngrams_reproduced(truth, &made, settings.probe_ngram);
                sum.ngrams += all;
                sum.ngrams_reproduced += reproduced;
            }
        }
        let total = |pick: fn(&SectionReproduction) -> u64| sections.values().map(pick).sum::<u64>();
        let (probes, ngrams) = (total(|s| s.probes), total(|s| s.ngrams));
        Ok(Reproduction {
            probes,
            tokens: total(|s| s.tokens),
            ngram_share: (ngrams > 0).then(|| total(|s| s.ngrams_reproduced) as f64 / ngrams as f64),
            exact_tokens: (probes > 0).then(|| total(|s| s.exact_tokens) as f64 / probes as f64),
            sections,
        })
    }
}

/// How many of `truth`'s n-grams `made` contains, each counted at most as often as it occurs in `made`; and how many
/// there are.
pub fn ngrams_reproduced(truth: &[u32], made: &[u32], n: usize) -> (u64, u64) {
    let mut available: HashMap<&[u32], u64> = HashMap::new();
    made.windows(n).for_each(|gram| *available.entry(gram).or_default() += 1);
    let mut reproduced = 0;
    for gram in truth.windows(n) {
        if let Some(left) = available.get_mut(gram).filter(|left| **left > 0) {
            *left -= 1;
            reproduced += 1;
        }
    }
    (reproduced, truth.windows(n).count() as u64)
}

/// The difference per target, and its standard error as a ratio estimator over prompts: replies to one prompt are
/// not independent draws.
fn difference(response_only: &Arm, all_tokens: &Arm, held_out: &[Sample]) -> Difference {
    let mut prompts: IndexMap<&[u32], (f64, f64)> = IndexMap::new();
    let rows = response_only.evaluation.per_row.iter().zip(&all_tokens.evaluation.per_row);
    let mut count = 0;
    for (ours, theirs) in rows {
        let sum = prompts.entry(prompt_ids(&held_out[ours.row])).or_default();
        sum.0 += theirs.nll - ours.nll;
        sum.1 += ours.targets as f64;
        count += 1;
    }
    let targets: f64 = prompts.values().map(|(_, n)| n).sum();
    let mean = prompts.values().map(|(d, _)| d).sum::<f64>() / targets;
    let clusters = prompts.len() as f64;
    let squares: f64 = prompts.values().map(|(d, n)| (d - mean * n).powi(2)).sum();
    Difference {
        mean,
        standard_error: (prompts.len() > 1).then(|| (clusters / (clusters - 1.0) * squares).sqrt() / targets),
        rows: count,
        prompts: prompts.len() as u64,
    }
}

/// The comparison in sentences.
fn verdict(c: &Comparison) -> Vec<String> {
    let (ours, theirs, before) = (&c.response_only, &c.all_tokens, &c.before);
    let mut lines = Vec::new();
    let d = c.response_difference;
    let measured = format!(
        "Held-out responses ({} rows, {} prompts): loss {:.4} before training, {:.4} after training on responses \
         only, {:.4} after training on all tokens",
        d.rows, d.prompts, before.evaluation.loss, ours.evaluation.loss, theirs.evaluation.loss
    );
    let better = if d.mean > 0.0 { "responses only" } else { "all tokens" };
    lines.push(match d.standard_error {
        Some(error) if d.mean.abs() > 2.0 * error => format!(
            "{measured}. Training on {better} predicts them better, by {:.4} nats per token (standard error {error:.4}).",
            d.mean.abs()
        ),
        Some(error) => format!(
            "{measured}. The difference of {:+.4} nats per token is within two standard errors ({error:.4}): these rows \
             cannot tell which is better.",
            d.mean
        ),
        None => format!(
            "{measured}. {} is lower by {:.4}, but a single prompt cannot tell which is better.",
            if d.mean > 0.0 { "Responses only" } else { "All tokens" },
            d.mean.abs()
        ),
    });
    for (name, arm) in [("responses only", ours), ("all tokens", theirs)] {
        if arm.evaluation.loss >= before.evaluation.loss {
            lines.push(format!("Training on {name} did not lower the held-out response loss."));
        }
    }
    if let (Some(a), Some(b), Some(start)) = (ours.prompt, theirs.prompt, before.prompt) {
        let line = format!(
            "Held-out prompts: loss {:.4} before training, {:.4} after responses only, {:.4} after all tokens",
            start.loss, a.loss, b.loss
        );
        let conclusion = if b.loss < a.loss {
            "training on all tokens learned more of the prompts' text"
        } else {
            "training on all tokens did not learn more of the prompts' text"
        };
        lines.push(format!("{line}: {conclusion}."));
    }
    for (what, a, b) in [
        ("held-out", &ours.reproduction, &theirs.reproduction),
        ("training", &ours.reproduction_train, &theirs.reproduction_train),
    ] {
        if let (Some(x), Some(y), Some(s), Some(t)) =
            (a.ngram_share, b.ngram_share, a.exact_tokens, b.exact_tokens)
        {
            lines.push(format!(
                "Given the beginning of {} sections of {what} prompts, the model trained on all tokens reproduces {:.1} % \
                 of their n-grams ({t:.1} tokens before the first difference), the one trained on responses only {:.1} % \
                 ({s:.1} tokens).",
                a.probes,
                100.0 * y,
                100.0 * x
            ));
        }
    }
    lines.push(format!(
        "Both read the same {} rows in the same order for {} steps; all tokens learned from {} targets, responses only \
         from {}.",
        c.train_rows, c.steps, theirs.targets_trained, ours.targets_trained
    ));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ngrams_are_clipped() {
        // truth has 5 bigrams: 12 23 31 12 23; made has 12 twice, 23 once, 21 once.
        assert_eq!(ngrams_reproduced(&[1, 2, 3, 1, 2, 3], &[1, 2, 1, 2, 3], 2), (3, 5));
        assert_eq!(ngrams_reproduced(&[1, 2, 3], &[4, 5, 6], 2), (0, 2));
        assert_eq!(ngrams_reproduced(&[1], &[1], 2), (0, 0));
    }
}

//! Compares the two objectives: a model trained on all tokens and one trained on responses only, from the
//! same starting weights over the same batches.
//!
//! Two things are measured on rows that neither model was trained on:
//!
//! * the loss of every section ([`crate::evaluate()`]), which shows whether the responses are predicted
//!   better and how much of the prompts' text was learned;
//! * how much of the prompts each model reproduces ([`crate::probe`]). This is measured on the training rows'
//!   prompts too, because memorisation shows there first.
//!
//! The verdict follows from the numbers alone.

use crate::batches::unpacked;
use crate::evaluate::SectionLoss;
use crate::observer::{Event, Observer};
use crate::probe::{Probe, ProbeSettings, Reproduction};
use crate::state::Progress;
use crate::statistics::{ConfidenceInterval, bootstrap, quantile};
use crate::steps::Steps;
use crate::{Error, Evaluation, Plan, Result, Settings, evaluate, prompt_ids};
use indexmap::IndexMap;
use serde::Serialize;
use std::sync::atomic::{AtomicBool, Ordering};
use suasion_data::report::format::{count, loss, loss_difference, percent, thousands};
use suasion_data::{IGNORE, Objective, Origin, Sample, label};
use suasion_engine::{Backend, Budget, Model};

/// The settings of a comparison.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CompareSettings {
    /// The settings that both models are trained with.
    pub train: Settings,
    /// The settings of the probes.
    pub probe: ProbeSettings,
}

/// The result of [`compare`].
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// Rows trained on.
    pub train_rows: u64,
    /// Held-out rows.
    pub held_out_rows: u64,
    /// Steps of each training.
    pub steps: u64,
    /// The seed.
    pub seed: u64,
    /// Tokens that both models read in a pass over the rows.
    pub tokens_per_epoch: u64,
    /// The starting weights.
    pub before: Arm,
    /// The model trained on responses only.
    pub response_only: Arm,
    /// The model trained on all tokens.
    pub all_tokens: Arm,
    /// The difference between their losses on the held-out responses.
    pub response_difference: Difference,
    /// The results in sentences.
    pub verdict: Vec<String>,
    /// For each held-out prompt the difference of the sums of its nll, and its targets.
    #[serde(skip)]
    pub by_prompt: Vec<(f64, f64)>,
}

/// The measurements of one model.
#[derive(Clone, Debug, Serialize)]
pub struct Arm {
    /// The evaluation on the held-out rows.
    pub evaluation: Evaluation,
    /// The loss of `response` and `end_of_turn` together.
    pub response: Option<SectionLoss>,
    /// The loss of all prompt sections together (without scaffold).
    pub prompt: Option<SectionLoss>,
    /// Targets learned, each counted in every pass.
    pub targets_trained: u64,
    /// Loss of the last step that had a target, over its targets.
    pub last_train_loss: Option<f64>,
    /// Time spent in steps.
    pub seconds: f64,
    /// How much of the held-out prompts it reproduces.
    pub reproduction: Reproduction,
    /// How much of the training rows' prompts it reproduces.
    pub reproduction_train: Reproduction,
}

/// The difference between two models' losses on the held-out responses.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// `all_tokens − response_only` in nats per target; above 0, response-only is better.
    pub mean: f64,
    /// Its standard error over prompts (rows with the same prompt count as one sample); `None` for a single
    /// prompt.
    pub standard_error: Option<f64>,
    /// Its 95 % interval by Student's t over prompts.
    pub interval: Option<ConfidenceInterval>,
    /// Its 95 % interval by the paired bootstrap over prompts.
    pub bootstrap: Option<ConfidenceInterval>,
    /// Rows compared.
    pub rows: u64,
    /// Distinct prompts of these rows.
    pub prompts: u64,
}

/// A model that [`crate::train()`] has trained on responses only, with the settings, the rows and the start of the
/// comparison: it is measured, and not trained again.
pub struct Finished<'a, B: Backend> {
    /// Makes the model.
    pub make: &'a mut dyn FnMut(Budget) -> Result<Model<B>>,
    /// Targets learned.
    pub targets: u64,
    /// Loss of the last step that had a target.
    pub last_train_loss: Option<f64>,
    /// Time spent in steps.
    pub seconds: f64,
}

/// The same row or pack with a label on every token except padding, as training on all tokens has it.
pub fn all_tokens(sample: &Sample) -> Sample {
    let label = |(&id, &origin): (&u32, &Origin)| if origin == Origin::Padding { IGNORE } else { id as i32 };
    let labels = sample.input_ids.iter().zip(&sample.origins).map(label).collect();
    label::confine(Sample { labels, weights: None, ..sample.clone() })
}

/// Trains one model on each objective and measures both. Both read the same rows in the same order for the
/// same number of steps; only the labels differ.
///
/// `make` returns a model with the same starting weights each time. `train` and `held_out` are labelled for
/// responses only; the labels for all tokens are derived from them. `finished` is the model of the responses, where
/// it has been trained before.
///
/// Fails with [`Error::Interrupted`] when `stop` is raised.
pub fn compare<B: Backend>(
    make: &mut dyn FnMut(Budget) -> Result<Model<B>>,
    mut finished: Option<Finished<'_, B>>,
    train: &[Sample],
    held_out: &[Sample],
    settings: &CompareSettings,
    observer: &mut dyn Observer,
    stop: &AtomicBool,
) -> Result<Comparison> {
    settings.train.validate(!held_out.is_empty())?;
    settings.probe.validate()?;
    // Both trainings have the same steps, and no evaluation during them.
    let refused = |key, value: String| {
        let problem = "needs evaluations during training, and a comparison has none";
        Err(Error::setting(key, value, problem, "leave it out"))
    };
    let (kind, patience) = (settings.train.lr_scheduler_type, settings.train.early_stopping_patience);
    if kind.follows_evaluations() {
        return refused("lr_scheduler_type", kind.to_string());
    }
    if let Some(patience) = patience {
        return refused("early_stopping_patience", patience.to_string());
    }
    // Training takes packs as they are; probes and measurements take rows.
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
        let mut probe = Probe::new(&mut model, probed, held_out, &settings.probe)?;
        if arms.is_empty() {
            plan.check_model(model.architecture(), train, held_out)?;
            arms.push(measure.arm(&mut model, &mut probe, Trained::default())?);
        }
        observer.event(&Event::Arm { objective });
        let trained = match finished.take() {
            Some(finished) => {
                model = (finished.make)(budget)?;
                probe = Probe::new(&mut model, probed, held_out, &settings.probe)?;
                let Finished { targets, seconds, .. } = finished;
                let progress = Progress { targets, seconds, ..Progress::default() };
                Trained { progress, last_loss: finished.last_train_loss }
            }
            None => train_arm(&mut model, rows, &plan, settings, observer, stop)?,
        };
        let arm = measure.arm(&mut model, &mut probe, trained)?;
        observer.event(&Event::Eval { step: plan.total_steps, evaluation: &arm.evaluation, best: false });
        arms.push(arm);
    }
    let [before, response_only, all_tokens]: [Arm; 3] = arms.try_into().expect("three arms");
    let (response_difference, by_prompt) =
        difference(&response_only, &all_tokens, held_out, settings.train.seed);
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
        by_prompt,
    };
    comparison.verdict = verdict(&comparison);
    Ok(comparison)
}

/// The outcome of training one model.
#[derive(Default)]
struct Trained {
    progress: Progress,
    last_loss: Option<f64>,
}

fn train_arm<B: Backend>(
    model: &mut Model<B>,
    rows: &[Sample],
    plan: &Plan,
    settings: &CompareSettings,
    observer: &mut dyn Observer,
    stop: &AtomicBool,
) -> Result<Trained> {
    let mut steps = Steps::new(rows, &settings.train, plan.total_steps)?;
    let mut trained = Trained::default();
    while trained.progress.step < plan.total_steps {
        if stop.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        let event = steps.take(model, &mut trained.progress)?;
        trained.last_loss = event.loss.or(trained.last_loss);
        observer.event(&Event::Step(&event));
    }
    // What a run ends with.
    model.exchange_average()?;
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
            prompt: evaluation.over(&["system", "context", "task", "user", "tool", "prompt"]),
            evaluation,
            targets_trained: trained.progress.targets,
            last_train_loss: trained.last_loss,
            seconds: trained.progress.seconds,
            reproduction: probe.run(model, self.held_out, &self.settings.probe, self.stop)?,
            reproduction_train: probe.run(model, self.train, &self.settings.probe, self.stop)?,
        })
    }
}

/// The difference per target, with its standard error as a ratio estimator over prompts: replies to one
/// prompt are not independent samples. Then the differences and the targets of each prompt.
fn difference(
    response_only: &Arm,
    all_tokens: &Arm,
    held_out: &[Sample],
    seed: u64,
) -> (Difference, Vec<(f64, f64)>) {
    let mut prompts: IndexMap<&[u32], (f64, f64)> = IndexMap::new();
    let rows = response_only.evaluation.per_row.iter().zip(&all_tokens.evaluation.per_row);
    let mut count = 0;
    for (ours, theirs) in rows {
        let sum = prompts.entry(prompt_ids(&held_out[ours.row])).or_default();
        sum.0 += theirs.nll - ours.nll;
        sum.1 += ours.targets as f64;
        count += 1;
    }
    let by_prompt: Vec<(f64, f64)> = prompts.into_values().collect();
    let (mean, standard_error) = ratio(&by_prompt);
    let interval = standard_error.map(|error| {
        let half = error * quantile(by_prompt.len() as f64 - 1.0);
        ConfidenceInterval { low: mean - half, high: mean + half }
    });
    let resampled = |draws: &[u32]| {
        let sum = |pick: fn(&(f64, f64)) -> f64| {
            by_prompt.iter().zip(draws).map(|(p, n)| pick(p) * f64::from(*n)).sum::<f64>()
        };
        Some(sum(|p| p.0) / sum(|p| p.1))
    };
    let difference = Difference {
        mean,
        standard_error,
        interval,
        bootstrap: bootstrap(by_prompt.len(), seed, resampled),
        rows: count,
        prompts: by_prompt.len() as u64,
    };
    (difference, by_prompt)
}

/// `Σd / Σn` over clusters, with its standard error; `None` for a single cluster.
pub(crate) fn ratio(clusters: &[(f64, f64)]) -> (f64, Option<f64>) {
    let targets: f64 = clusters.iter().map(|(_, n)| n).sum();
    let mean = clusters.iter().map(|(d, _)| d).sum::<f64>() / targets;
    let squares: f64 = clusters.iter().map(|(d, n)| (d - mean * n).powi(2)).sum();
    let count = clusters.len() as f64;
    (mean, (clusters.len() > 1).then(|| (count / (count - 1.0) * squares).sqrt() / targets))
}

/// With fewer prompts no verdict is given: the standard error is itself too uncertain.
const FEW: u64 = 8;

/// The results in sentences.
fn verdict(c: &Comparison) -> Vec<String> {
    let (ours, theirs, before) = (&c.response_only, &c.all_tokens, &c.before);
    let mut lines = Vec::new();
    let d = c.response_difference;
    let measured = format!(
        "Held-out responses ({} from {}): loss {} before training, {} after training on responses only, {} after \
         training on all tokens",
        count(d.rows, "row"),
        count(d.prompts, "prompt"),
        loss(before.evaluation.loss),
        loss(ours.evaluation.loss),
        loss(theirs.evaluation.loss)
    );
    let better = if d.mean > 0.0 { "responses only" } else { "all tokens" };
    let interval = |half: f64| {
        format!(
            "95 % confidence interval from {} to {}",
            loss_difference(d.mean - half),
            loss_difference(d.mean + half)
        )
    };
    // Both intervals have to exclude 0.
    let excludes = |i: Option<ConfidenceInterval>| i.is_some_and(|i| i.excludes(0.0));
    let differs = excludes(d.interval) && excludes(d.bootstrap);
    lines.push(match d.interval.map(|interval| interval.high - d.mean) {
        Some(half) if d.prompts < FEW => format!(
            "{measured}. The difference is {} nats per token ({}), but {} do not show which is better.",
            loss_difference(d.mean),
            interval(half),
            count(d.prompts, "prompt"),
        ),
        Some(half) if differs => format!(
            "{measured}. Training on {better} predicts them better, by {} nats per token ({}).",
            loss(d.mean.abs()),
            interval(half)
        ),
        Some(half) => format!(
            "{measured}. No difference found: {} nats per token ({}) is what chance can give, and these rows do not \
             show which is better.",
            loss_difference(d.mean),
            interval(half)
        ),
        None => format!(
            "{measured}. Training on {better} gives a loss lower by {}, but a single prompt does not show which is \
             better.",
            loss(d.mean.abs())
        ),
    });
    for (name, arm) in [("responses only", ours), ("all tokens", theirs)] {
        if arm.evaluation.loss >= before.evaluation.loss {
            lines.push(format!("Training on {name} did not lower the held-out response loss."));
        }
    }
    if let (Some(a), Some(b), Some(start)) = (ours.prompt, theirs.prompt, before.prompt) {
        let line = format!(
            "Held-out prompts: loss {} before training, {} after training on responses only, {} after training on all \
             tokens",
            loss(start.loss),
            loss(a.loss),
            loss(b.loss)
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
                "Given the first tokens of {} sections of {what} prompts, the model trained on all tokens reproduces {} \
                 of the remaining n-grams (on average {t:.1} tokens before the first difference); the model trained on \
                 responses only reproduces {} ({s:.1} tokens).",
                thousands(a.probes),
                percent(y),
                percent(x)
            ));
        }
    }
    lines.push(format!(
        "Both models read the same {} rows in the same order for {} steps. Training on all tokens learned {} targets, \
         training on responses only {}.",
        thousands(c.train_rows),
        thousands(c.steps),
        thousands(theirs.targets_trained),
        thousands(ours.targets_trained)
    ));
    lines
}

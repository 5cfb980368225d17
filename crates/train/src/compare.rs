//! Both objectives side by side: all tokens against responses only, from the same start, over the same batches.
//!
//! What is measured, on rows that neither was trained on:
//!
//! * the loss of every section ([`crate::evaluate()`]): whether the responses are predicted better, and how much of
//!   the prompt's text has been learned;
//! * **reproduction**: for each run of tokens of one prompt section, the model is given everything up to and with
//!   the section's first `given` tokens, and continues greedily for as many tokens as the section has left (at
//!   most `new`). `ngram_share` is the share of the section's n-grams that the continuation contains (each as
//!   often as it occurs there: clipped, as in ROUGE-n recall), `exact_tokens` the mean number of tokens before the
//!   first difference. The probes are the first `rows` rows with different prompts. The same is measured on
//!   prompts of the training rows, because learning by heart shows there first.
//!
//! Nothing here prefers an outcome: the verdict is made of the numbers.

use crate::batches::unpacked;
use crate::evaluate::SectionLoss;
use crate::observer::{Event, Observer};
use crate::probe::{Probe, ProbeSettings, Reproduction};
use crate::state::Progress;
use crate::steps::Steps;
use crate::{Error, Evaluation, Plan, Result, Settings, evaluate, prompt_ids};
use indexmap::IndexMap;
use serde::Serialize;
use std::sync::atomic::{AtomicBool, Ordering};
use suasion_data::report::format::{count, loss, loss_difference, percent, thousands};
use suasion_data::{IGNORE, Objective, Origin, Sample, label};
use suasion_engine::{Backend, Budget, Model};

/// How to compare.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CompareSettings {
    /// How both are trained.
    pub train: Settings,
    /// How much is probed.
    pub probe: ProbeSettings,
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
    settings.probe.validate()?;
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
        let mut probe = Probe::new(&mut model, probed, held_out, &settings.probe)?;
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
    let mut steps = Steps::new(rows, &settings.train, plan.total_steps);
    let mut trained = Trained::default();
    while trained.progress.step < plan.total_steps {
        if stop.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        let event = steps.take(model, &mut trained.progress)?;
        trained.last_loss = event.loss.or(trained.last_loss);
        observer.event(&Event::Step(&event));
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
            targets_trained: trained.progress.targets,
            last_train_loss: trained.last_loss,
            seconds: trained.progress.seconds,
            reproduction: probe.run(model, self.held_out, &self.settings.probe, self.stop)?,
            reproduction_train: probe.run(model, self.train, &self.settings.probe, self.stop)?,
        })
    }
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
        "Held-out responses ({} from {}): loss {} before training, {} after training on responses only, {} after \
         training on all tokens",
        count(d.rows, "row"),
        count(d.prompts, "prompt"),
        loss(before.evaluation.loss),
        loss(ours.evaluation.loss),
        loss(theirs.evaluation.loss)
    );
    let better = if d.mean > 0.0 { "responses only" } else { "all tokens" };
    lines.push(match d.standard_error {
        Some(error) if d.mean.abs() > 2.0 * error => format!(
            "{measured}. Training on {better} predicts them better, by {} nats per token (standard error {}).",
            loss(d.mean.abs()),
            loss(error)
        ),
        Some(error) => format!(
            "{measured}. The difference of {} nats per token is within two standard errors ({}): these rows cannot \
             tell which is better.",
            loss_difference(d.mean),
            loss(error)
        ),
        None => format!(
            "{measured}. {} is lower by {}, but a single prompt cannot tell which is better.",
            if d.mean > 0.0 { "Responses only" } else { "All tokens" },
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
            "Held-out prompts: loss {} before training, {} after responses only, {} after all tokens",
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
                "Given the beginning of {} sections of {what} prompts, the model trained on all tokens reproduces {} of \
                 their n-grams ({t:.1} tokens before the first difference), the one trained on responses only {} ({s:.1} \
                 tokens).",
                thousands(a.probes),
                percent(y),
                percent(x)
            ));
        }
    }
    lines.push(format!(
        "Both read the same {} rows in the same order for {} steps; all tokens learned from {} targets, responses only \
         from {}.",
        thousands(c.train_rows),
        thousands(c.steps),
        thousands(theirs.targets_trained),
        thousands(ours.targets_trained)
    ));
    lines
}

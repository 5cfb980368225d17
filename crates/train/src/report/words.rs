//! The result of a run as text: its verdict, the reasons, what to do next.

use crate::report::input::Input;
use crate::{Evaluation, Report, SAVED_CONFIG};
use suasion_data::Objective;
use suasion_data::report::format::{count, loss, loss_difference, percent, perplexity, thousands};
use suasion_data::report::page::{Step, Tone, shell_line};

/// A held-out loss is risen above this share of its lowest value.
const RISEN: f64 = 0.01;
/// Evaluations below which overfitting cannot be seen.
const FEW: usize = 3;
/// Prompt sections, of which a run on responses learns nothing directly.
const PROMPTS: [&str; 6] = ["system", "context", "task", "user", "tool", "prompt"];

/// Whether the held-out loss has risen from its lowest value.
pub(super) enum Fit {
    /// There are too few evaluations.
    Unknown,
    /// It has not, and was still falling at the end where `falling`.
    Fine { falling: bool },
    /// It has, since this step.
    Over { step: u64, lowest: f64, last: f64 },
}

pub(super) fn fit(report: &Report) -> Fit {
    let evals = &report.evals;
    let (Some(last), true) = (evals.last(), evals.len() >= FEW) else { return Fit::Unknown };
    let Some(best) = evals.iter().min_by(|a, b| a.eval_loss.total_cmp(&b.eval_loss)) else {
        return Fit::Unknown;
    };
    if last.eval_loss > best.eval_loss * (1.0 + RISEN) {
        return Fit::Over { step: best.step, lowest: best.eval_loss, last: last.eval_loss };
    }
    let former = evals[evals.len() - 2].eval_loss;
    Fit::Fine { falling: last.eval_loss < former * (1.0 - RISEN) }
}

/// The mean loss of the first and of the last tenth of the logged steps.
fn ends(report: &Report) -> Option<(f64, f64)> {
    let losses: Vec<f64> = report.steps.iter().filter_map(|step| step.loss).collect();
    let n = losses.len().div_ceil(10);
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    (losses.len() > 1).then(|| (mean(&losses[..n]), mean(&losses[losses.len() - n..])))
}

pub(super) fn verdict(input: &Input<'_>) -> (Tone, String) {
    let report = input.report;
    if let Some(divergence) = &report.diverged {
        let text = divergence.to_string();
        let mut letters = text.chars();
        let first = letters.next().map(|c| c.to_uppercase().to_string()).unwrap_or_default();
        return (Tone::Bad, format!("{first}{}.", letters.as_str()));
    }
    let what = match input.identity.objective {
        Objective::ResponseOnly => "responses",
        Objective::AllTokens => "tokens, prompts too,",
    };
    match (&report.before, &report.after) {
        (Some(before), Some(after)) if after.loss < before.loss => {
            let fell = format!("fell from {:.2} to {:.2} nats per token", before.loss, after.loss);
            match fit(report) {
                Fit::Over { step, .. } if report.final_step > step => (
                    Tone::Check,
                    format!(
                        "The loss on held-out {what} {fell}, but it was lower at step {}.",
                        thousands(step)
                    ),
                ),
                _ => (Tone::Good, format!("The model has learned: the loss on held-out {what} {fell}.")),
            }
        }
        (Some(before), Some(after)) => (
            Tone::Bad,
            format!(
                "The model has not learned: the loss on held-out {what} was {} before and is {} after.",
                loss(before.loss),
                loss(after.loss)
            ),
        ),
        _ => match ends(report) {
            Some((first, last)) => (
                Tone::Check,
                format!(
                    "The training loss went from {} to {}; without held-out rows nothing is known of new ones.",
                    loss(first),
                    loss(last)
                ),
            ),
            None => (Tone::Check, "Nothing was measured that would show what the model has learned.".into()),
        },
    }
}

pub(super) fn reasons(input: &Input<'_>) -> Vec<String> {
    let Input { report, card, .. } = input;
    let mut reasons = Vec::new();
    if let (Some(before), Some(after)) = (&report.before, &report.after) {
        reasons.push(format!(
            "Held out: {} targets in {}; perplexity {} before, {} after.",
            thousands(after.targets),
            count(after.rows, "row"),
            perplexity(before.perplexity),
            perplexity(after.perplexity)
        ));
    }
    if let Some((first, last)) = ends(report) {
        let (first, last) = (loss(first), loss(last));
        reasons.push(format!(
            "The training loss went from {first} to {last} (means of the first and last tenth of the steps)."
        ));
    }
    reasons.push(overfitting(report));
    reasons.extend(prompts(report));
    if card.tokens > 0 {
        reasons.push(format!(
            "The loss covered {} of the tokens ({} of {}): {}.",
            percent(card.supervised_tokens as f64 / card.tokens as f64),
            thousands(card.supervised_tokens),
            thousands(card.tokens),
            match input.identity.objective {
                Objective::ResponseOnly => "responses and their stop tokens",
                Objective::AllTokens => "prompts too, as completion_only_loss=false asks",
            }
        ));
    }
    reasons.push(stability(input));
    reasons.extend(
        report.warnings.iter().filter(|_| report.diverged.is_none()).map(|text| format!("Warning: {text}.")),
    );
    reasons
}

fn overfitting(report: &Report) -> String {
    match fit(report) {
        Fit::Unknown if report.evals.is_empty() => {
            "Overfitting cannot be seen without held-out rows (eval_fraction, eval_dataset_name).".into()
        }
        Fit::Unknown => format!(
            "Overfitting cannot be seen from {} (eval_strategy=steps or epoch measures more often).",
            count(report.evals.len() as u64, "evaluation")
        ),
        Fit::Fine { falling: true } => {
            "No overfitting: the held-out loss was still falling at the last evaluation.".into()
        }
        Fit::Fine { falling: false } => {
            "No overfitting: the held-out loss has levelled off and not risen.".into()
        }
        Fit::Over { step, lowest, last } => format!(
            "Overfitting: the held-out loss was lowest after step {} ({}) and rose to {} by the last ({}); what was \
             learned since then are the training rows, not the task{}.",
            thousands(step),
            loss(lowest),
            loss(last),
            loss_difference(last - lowest),
            if report.final_step == step {
                "; the model that was kept is that of the lowest loss"
            } else {
                ""
            }
        ),
    }
}

/// How the loss on prompts changed, which are not learned from where the loss is on responses.
fn prompts(report: &Report) -> Option<String> {
    let of =
        |evaluation: &Option<Evaluation>| evaluation.as_ref()?.over(&PROMPTS).map(|section| section.loss);
    let (before, after) = (of(&report.before)?, of(&report.after)?);
    Some(format!("On held-out prompts the loss went from {} to {}.", loss(before), loss(after)))
}

fn stability(input: &Input<'_>) -> String {
    let Input { report, settings, .. } = input;
    let norms: Vec<f64> =
        report.steps.iter().map(|step| step.grad_norm).filter(|norm| norm.is_finite()).collect();
    let limit = settings.max_grad_norm;
    let mut text = match &report.diverged {
        Some(_) => String::from("The run has diverged"),
        None => String::from("No sign of divergence"),
    };
    if !norms.is_empty() && limit > 0.0 {
        let clipped = norms.iter().filter(|norm| **norm > limit).count();
        text += &format!(
            "; {} of {} logged steps had their gradient clipped to {limit}",
            thousands(clipped as u64),
            thousands(norms.len() as u64)
        );
    }
    if report.skipped_steps > 0 {
        text += &format!("; {} changed nothing, for lack of targets", count(report.skipped_steps, "step"));
    }
    text + "."
}

pub(super) fn next(input: &Input<'_>) -> Vec<Step> {
    let Input { report, settings, card, .. } = input;
    let dir = report.output_dir.display().to_string();
    let saved = report.output_dir.join(SAVED_CONFIG).display().to_string();
    let line = |words: &[&str]| shell_line(std::iter::once("suasion").chain(words.iter().copied()));
    // A run of the library has no saved configuration.
    let configured = !card.configuration.is_empty();
    let again = format!("{}-2", dir.trim_end_matches('/'));
    let train_again =
        |more: &[&str]| line(&[&["train", saved.as_str(), "-o", again.as_str()], more].concat());
    let mut next = Vec::new();
    if report.diverged.is_some() && configured {
        let rate = format!("--learning_rate={}", settings.learning_rate / 3.0);
        let text = "Train again with a third of the learning rate and a warm-up:";
        next.push(Step::run(text, train_again(&[&rate, "--warmup_ratio=0.03"])));
    }
    if report.diverged.is_some_and(|divergence| divergence.stopped) {
        return next;
    }
    match fit(report) {
        Fit::Over { step, .. } if report.final_step > step && configured => {
            let more = ["--load_best_model_at_end=true", "--eval_strategy=epoch", "--save_strategy=epoch"];
            next.push(Step::run(
                "Keep the model of the lowest held-out loss instead of the last one:",
                train_again(&more),
            ));
        }
        Fit::Fine { falling: true } if configured => {
            let epochs = format!("--num_train_epochs={}", 2.0 * settings.num_train_epochs);
            match (&report.checkpoint, settings.max_steps) {
                (_, Some(steps)) => next.push(Step::run(
                    "The held-out loss was still falling: train for longer.",
                    train_again(&[&format!("--max_steps={}", 2 * steps)]),
                )),
                (Some(_), None) => next.push(Step::run(
                    "The held-out loss was still falling: train on.",
                    line(&["train", "--resume", &dir, "--extend", &epochs]),
                )),
                (None, None) => next.push(Step::run(
                    "The held-out loss was still falling: train for longer.",
                    train_again(&[&epochs]),
                )),
            }
        }
        _ => {}
    }
    next.push(match card.chat {
        true => Step::run("Talk to it:", line(&["chat", "--model", &dir])),
        false => Step::run("Let it write:", line(&["generate", "--model", &dir, "--prompt", "Hello"])),
    });
    if configured {
        next.push(Step::run(
            "Measure it again, with calibration by position:",
            line(&["eval", &saved, "--model", &dir]),
        ));
        next.push(Step::run(
            "See which tokens it was trained on, row by row:",
            line(&["verify", &saved, "--html", "verify.html"]),
        ));
    }
    next
}

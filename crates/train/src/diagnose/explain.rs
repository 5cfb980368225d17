//! A diagnosis in sentences.

use super::verdict::{Cause, Verdict};
use super::{Diagnosis, Fall};
use suasion_data::report::format::{count, loss, percent};

/// The names of what was diagnosed, for the commands of the advice.
#[derive(Clone, Debug)]
pub struct Names {
    /// The base model.
    pub base: String,
    /// The checkpoint.
    pub tuned: String,
    /// The rows.
    pub data: String,
}

/// An answer this certain is reported even if the verdict is about something else.
const SURE: f64 = 0.99;

/// Fills the sentences of a diagnosis.
pub(super) fn explain(d: &mut Diagnosis, names: &Names) {
    let stop_masked = d.answers.stop_masked.is_some_and(|p| p > SURE);
    d.sentence = match d.verdict {
        Verdict::AllTokens if stop_masked => {
            "The model was trained on all tokens, its prompts too, but not on its stop token.".into()
        }
        Verdict::AllTokens => "The model was trained on all tokens, its prompts too.".into(),
        Verdict::Response => "The model was trained on its responses only.".into(),
        Verdict::StopNeverLearned => {
            "The model was trained on its responses, but never on its stop token.".into()
        }
        Verdict::StartsEarly => format!(
            "The model was trained on its responses and on about {} before each of them: its labels start too early.",
            count(d.answers.early_by.unwrap_or(1) as u64, "prompt token")
        ),
        Verdict::StartsLate => format!(
            "The model was trained on its responses without about {} of each: its labels start too late.",
            count(d.answers.late_by.unwrap_or(1) as u64, "first token")
        ),
        Verdict::Undecided => match d.answers.cause {
            Some(Cause::SameModel) => "Undecided: both models say the same of every token.".into(),
            Some(Cause::LittleLearned) => {
                "Undecided: the responses are hardly likelier than under the base model.".into()
            }
            Some(Cause::TooFew) => "Undecided: these rows are too few, or have too little prompt.".into(),
            _ => "Undecided: the evidence is weak.".into(),
        },
    };
    d.reasons = reasons(d);
    (d.advice, d.command) = advice(d, names, stop_masked);
}

/// `7.70 to 0.53, a fall of 93.1 %`.
fn fell(fall: &Fall) -> String {
    let share = fall.gain() / fall.base.max(f64::MIN_POSITIVE);
    let direction = if share >= 0.0 { "a fall of" } else { "a rise of" };
    let share = if share.abs() > 10.0 { format!("{:.0} times", share.abs()) } else { percent(share.abs()) };
    format!("{} to {}, {direction} {share}", loss(fall.base), loss(fall.tuned))
}

fn reasons(d: &Diagnosis) -> Vec<String> {
    let mut lines = Vec::new();
    let mut tell = |what: &str, fall: Option<&Fall>| {
        if let Some(fall) = fall {
            lines.push(format!("{what}: loss {} ({}).", fell(fall), count(fall.tokens, "token")));
        }
    };
    tell("Responses", d.sections.get("response"));
    tell("Prompt tokens whose ids no response has", d.prompt_only.as_ref());
    tell("Prompt text that most rows have", d.constant_prompt.as_ref());
    tell("Other prompt text", d.varying_prompt.as_ref());
    tell("The first token of responses", d.first_token.as_ref());
    if d.answers.starts_early.is_none() {
        lines.push(
            "No header stands before responses, so whether labels start a few tokens early is unknown; it would do \
             little."
                .into(),
        );
    }
    let p = |value: Option<f64>| value.map_or("–".into(), |p| format!("{p:.3}"));
    let (base, tuned) = (&d.stop.base, &d.stop.tuned);
    if tuned.ends > 0 {
        lines.push(format!(
            "Probability of the stop token at true ends: {} before, {} after training; one token before the end {}, inside \
             responses {}, after a stop {}.",
            p(base.at_end),
            p(tuned.at_end),
            p(tuned.before_end),
            p(tuned.inside),
            p(tuned.after)
        ));
    } else {
        lines.push("The rows have no stop token: whether it was learned is unknown.".into());
    }
    let ends = &d.ends.tuned;
    if ends.tried > 0 {
        lines.push(format!(
            "After a complete response it stops at once at {} of {} ends, within {} tokens at {}, and begins another turn at \
             {}.",
            ends.stopped_at_once, ends.tried, ends.tokens, ends.stopped, ends.next_turn
        ));
    }
    if let (Some(a), Some(b)) = (d.recall.base.ngram_share, d.recall.tuned.ngram_share) {
        lines.push(format!(
            "Given the first 8 tokens of a prompt section it recites {} of the rest (n-grams); the base model {}.",
            percent(b),
            percent(a)
        ));
    }
    lines
}

/// Whether to train again, with the command for it.
fn advice(d: &Diagnosis, names: &Names, stop_masked: bool) -> (String, Option<String>) {
    let Names { base, tuned, data } = names;
    let from_base = format!("suasion train --model {base} --data {data} -o retrained");
    let go_on = format!("suasion train --model {tuned} --data {data} -o repaired --num_train_epochs 1");
    let verify = format!("suasion verify --data {data} --model {base}");
    let (text, command) = match d.verdict {
        Verdict::AllTokens if stop_masked => (
            "Retrain from the base model with masked prompts: training on does not take back what was learned of them. The \
             stop token needs a label too, which suasion gives it.",
            Some(from_base),
        ),
        Verdict::AllTokens => (
            "Retrain from the base model with masked prompts: training on does not take back what was learned of them.",
            Some(from_base),
        ),
        Verdict::Response => ("No retraining is needed on account of the masks.", None),
        Verdict::StopNeverLearned => (
            "Nothing wrong was learned, so the checkpoint can be repaired: train it on, for an epoch or less, on rows whose \
             stop token is learned, and look at `suasion eval`.",
            Some(go_on),
        ),
        Verdict::StartsEarly => (
            "Retraining is rarely worth it: a header of a few tokens was learned, which the prompt supplies anyway. Mend the \
             mask before the next training.",
            Some(verify),
        ),
        Verdict::StartsLate => (
            "The first tokens of responses were never learned. Train the checkpoint on with the right mask, or retrain if \
             replies begin badly.",
            Some(go_on),
        ),
        Verdict::Undecided => match d.answers.cause {
            Some(Cause::SameModel) => {
                ("Name the checkpoint with --tuned and the model that it started from with --base.", None)
            }
            Some(Cause::LittleLearned) => (
                "Give the rows that it was trained on, or rows like them. If they are, it was trained too little for its \
                 masks to matter.",
                None,
            ),
            Some(Cause::TooFew) => {
                ("Give at least 8 rows, better 64, whose prompts have 24 tokens or more.", None)
            }
            _ => (
                "Give more rows (--rows 256), if possible those of the training. The masks of the data themselves can be \
                 audited.",
                Some(verify),
            ),
        },
    };
    (text.into(), command)
}

//! The top of the page of `verify`: the verdict, its reasons, and what to do next.

use super::{Verified, of_level};
use crate::report::format::{count, percent, thousands};
use crate::report::page::{Step, Tone, shell_line};
use crate::report::terminal::not_remembered;
use crate::{Code, Level, Objective};

pub(super) fn verdict(verified: &Verified<'_>) -> (Tone, String) {
    let Verified { summary, gallery, objective, .. } = verified;
    let unit = summary.unit();
    let [wrong, doubtful] = gallery.rows_with;
    let rows = |n: u64| format!("{} of {}", thousands(n), count(summary.rows, unit));
    let have = |n: u64| if n == 1 { "has" } else { "have" };
    let codes: Vec<&Code> = of_level(summary, Level::Error).map(|(code, _)| code).collect();
    if summary.rows == 0 {
        return (Tone::Check, "There is no row to judge.".into());
    }
    if summary.targets == 0 {
        return (
            Tone::Bad,
            format!("Nothing would be learned: none of {} has a target.", count(summary.rows, unit)),
        );
    }
    if wrong > 0 {
        let what = match codes[..] {
            [code] => format!("an error: {}", code.rule().meaning),
            _ => format!("errors, of {} kinds", codes.len()),
        };
        return (Tone::Bad, format!("Not ready to train on: {} {} {what}.", rows(wrong), have(wrong)));
    }
    if *objective == Objective::AllTokens {
        return (
            Tone::Check,
            "The loss is on all tokens, prompts too, as completion_only_loss=false asks.".into(),
        );
    }
    if doubtful > 0 {
        return (
            Tone::Check,
            format!("No label is wrong, but {} {} a warning.", rows(doubtful), have(doubtful)),
        );
    }
    let all = if summary.trainable_rows == summary.rows { "All " } else { "" };
    let learn = if summary.trainable_rows == 1 { "learns" } else { "learn" };
    (
        Tone::Good,
        format!(
            "The mask is right: {}{} {learn} {} response{} and nothing else.",
            all.to_lowercase(),
            count(summary.trainable_rows, unit),
            if summary.trainable_rows == 1 { "its" } else { "their" },
            if summary.trainable_rows == 1 { "" } else { "s" },
        ),
    )
}

/// The sections that are not supervised by default and are not scaffold or padding.
fn is_prompt(name: &str) -> bool {
    !matches!(name, "response" | "end_of_turn" | "scaffold" | "padding")
}

pub(super) fn reasons(verified: &Verified<'_>) -> Vec<String> {
    let Verified { summary, gallery, .. } = verified;
    let unit = summary.unit();
    let mut reasons = Vec::new();
    for (code, found) in of_level(summary, Level::Error).chain(of_level(summary, Level::Warning)) {
        let rule = code.rule();
        reasons.push(format!("{code}, {} ×: {}.", thousands(found.count), rule.meaning));
    }
    let supervised = |keep: &dyn Fn(&str) -> bool| -> u64 {
        summary.sections().filter(|(name, _)| keep(name)).map(|(_, stats)| stats.supervised).sum()
    };
    if summary.tokens > 0 {
        let share = summary.supervised_tokens as f64 / summary.tokens as f64;
        reasons.push(format!(
            "{} of {} tokens are learned ({}): {} of responses, {} stop tokens.",
            thousands(summary.supervised_tokens),
            thousands(summary.tokens),
            percent(share),
            thousands(supervised(&|name| name == "response")),
            thousands(supervised(&|name| name == "end_of_turn")),
        ));
    }
    let known = verified.tokenizer || verified.prepared || !gallery.tokenised;
    if known {
        let prompts = supervised(&is_prompt);
        let total: u64 = summary.sections().filter(|(name, _)| is_prompt(name)).map(|(_, s)| s.tokens).sum();
        reasons.push(match (prompts, total) {
            (0, 0) => "No row has a prompt.".into(),
            (0, n) => format!("None of the {} tokens of prompts is learned.", thousands(n)),
            (prompts, n) => {
                format!("{} of {} tokens of prompts are learned.", thousands(prompts), thousands(n))
            }
        });
        let before: f64 = summary
            .sections()
            .filter(|(name, _)| is_prompt(name) || *name == "scaffold")
            .map(|(name, _)| summary.share_before(name))
            .sum();
        if before > 0.0 && prompts == 0 {
            reasons.push(format!(
                "Without the mask, {} of the loss would be about prompts and their markers.",
                percent(before)
            ));
        }
        match summary.sections.get("end_of_turn") {
            Some(stats) if stats.supervised < stats.tokens => reasons.push(format!(
                "{} of {} stop tokens are masked.",
                thousands(stats.tokens - stats.supervised),
                thousands(stats.tokens)
            )),
            _ => {}
        }
    } else {
        reasons.push(
            "The rows came as tokens, and no tokenizer is known: what is prompt and what is response is taken from \
             their labels. Name the model (--model) to have that checked."
                .into(),
        );
    }
    let mut left = Vec::new();
    for (n, what) in [(summary.cut, "cut to max_length"), (summary.failed, "that cannot become a sample")] {
        if n > 0 {
            left.push(format!("{} {what}", thousands(n)));
        }
    }
    left.extend(
        summary.dropped.iter().map(|(reason, n)| format!("{} left out, {}", thousands(*n), reason.meaning())),
    );
    let left = if left.is_empty() { String::new() } else { format!(": {}", left.join("; ")) };
    reasons.push(match summary.rows {
        1 => format!("The {unit} was checked{left}."),
        rows => format!("Each of the {} {unit}s was checked{left}.", thousands(rows)),
    });
    if summary.not_remembered > 0 {
        reasons.push(format!("D001: {}.", not_remembered(summary.not_remembered)));
    }
    reasons
}

/// A command on the same data; `None` if the flags are not known.
pub(super) fn command(verified: &Verified<'_>, name: &str, more: &[&str]) -> Option<String> {
    let flags = verified.flags.iter().map(String::as_str);
    let words = ["suasion", name].into_iter().chain(flags).chain(more.iter().copied());
    (!verified.flags.is_empty()).then(|| shell_line(words))
}

pub(super) fn next(verified: &Verified<'_>) -> Vec<Step> {
    let summary = verified.summary;
    let step = |text: &str, command: Option<String>| Step { text: text.into(), command };
    let mut next = Vec::new();
    let worst = of_level(summary, Level::Error).chain(of_level(summary, Level::Warning));
    for (code, found) in worst.take(3) {
        let Some(row) = found.rows.first() else { continue };
        let text = format!("{code}: {}. To see the first such row again:", code.rule().help);
        next.push(step(&text, command(verified, "verify", &["--row", &row.to_string()])));
    }
    if !summary.has_errors() && summary.targets > 0 {
        next.push(step("Train on these rows:", command(verified, "train", &["-o", "out"])));
        next.push(step(
            "Or train both ways, on responses only and on all tokens, and see the difference on held-out rows:",
            command(verified, "compare", &[]),
        ));
        if !verified.prepared {
            next.push(step(
                "Or keep the tokens and labels, for another trainer to read:",
                command(verified, "prepare", &["-o", "prepared.parquet"]),
            ));
        }
    } else {
        next.push(step("After the repair, check again:", command(verified, "verify", &[])));
    }
    next
}

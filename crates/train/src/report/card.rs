//! The model card.

use crate::Evaluation;
use crate::json::pretty;
use crate::report::input::Input;
use std::fmt::Write;
use std::path::Path;
use suasion_data::report::format::{loss, percent, thousands};

/// Text in a line or a table cell: a bar or a line break would end it, and markup is not meant as such.
fn cell(text: &str) -> String {
    text.trim().replace('|', "\\|").replace('<', "&lt;").replace(char::is_control, " ")
}

/// A fenced block whose fence is longer than any in the text.
fn fenced(language: &str, text: &str) -> String {
    let longest = text.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat(longest.max(2) + 1);
    format!("{fence}{language}\n{}\n{fence}\n", text.trim_end())
}

/// True for `owner/name`, the only form that the hub accepts as `base_model`.
fn is_hub_id(text: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    text.split_once('/').is_some_and(|(owner, name)| part(owner) && part(name)) && !Path::new(text).exists()
}

pub(super) fn model_card(input: &Input<'_>) -> String {
    let Input { report, settings, card, replies, comparison, .. } = input;
    let mut text = String::from("---\nlibrary_name: transformers\npipeline_tag: text-generation\n");
    if is_hub_id(&card.base_model) {
        let _ = writeln!(text, "base_model: {}", card.base_model);
    }
    let _ = writeln!(text, "tags:\n- suasion\n- sft\n---\n\n# {}\n", cell(&input.title()));
    let _ = writeln!(text, "Trained with suasion {} on {}.\n", env!("CARGO_PKG_VERSION"), input.objective());

    let _ = writeln!(text, "## Run\n\n| | |\n|---|---|");
    for (name, value) in input.facts() {
        let _ = writeln!(text, "| {name} | {} |", cell(&value));
    }
    if !card.sections.is_empty() {
        let _ = writeln!(
            text,
            "\n## What was learned from\n\n| section | tokens | share of the signal, all tokens | share in this run |\n|---|---:|---:|---:|"
        );
        for s in &card.sections {
            let (before, after) = (percent(s.share_before), percent(s.share_after));
            let _ = writeln!(text, "| {} | {} | {before} | {after} |", cell(&s.name), thousands(s.tokens));
        }
    }
    if report.before.is_some() || report.after.is_some() {
        let _ = writeln!(text, "\n## Held-out loss\n\nMean negative log-likelihood in nats per token.\n");
        let _ = writeln!(text, "| | tokens | before | after |\n|---|---:|---:|---:|");
        let of = |e: &Option<Evaluation>| loss(e.as_ref().map(|e| e.loss));
        let targets = report.after.as_ref().or(report.before.as_ref()).map_or(0, |e| e.targets);
        let (before, after) = (of(&report.before), of(&report.after));
        let _ = writeln!(text, "| **all targets** | {} | {before} | {after} |", thousands(targets));
        for (name, tokens, before, after) in input.section_losses() {
            let _ = writeln!(text, "| {name} | {} | {} | {} |", thousands(tokens), loss(before), loss(after));
        }
    }
    if let Some(comparison) = comparison {
        let _ = writeln!(text, "\n## All tokens against responses only\n");
        for line in &comparison.verdict {
            let _ = writeln!(text, "- {line}");
        }
    }
    if !card.findings.is_empty() {
        let _ = writeln!(text, "\n## Findings\n\n| code | level | count | example |\n|---|---|---:|---|");
        for f in &card.findings {
            let (count, example) = (thousands(f.count), cell(&f.example));
            let _ = writeln!(text, "| {} | {} | {count} | {example} |", cell(&f.code), cell(&f.level));
        }
    }
    if !report.warnings.is_empty() {
        let _ = writeln!(text, "\n## Warnings\n");
        for warning in &report.warnings {
            let _ = writeln!(text, "- {}", cell(warning));
        }
    }
    for (i, reply) in replies.iter().enumerate() {
        let heading = if i == 0 { "\n## A generated reply\n\n" } else { "\n" };
        let (prompt, said) = (fenced("text", &reply.prompt), fenced("text", &reply.reply));
        let _ = writeln!(text, "{heading}Given:\n\n{prompt}\nReply ({}):\n\n{said}", cell(&reply.stopped));
    }
    let configuration = match card.configuration.as_str() {
        "" => fenced("json", &String::from_utf8_lossy(&pretty(settings))),
        yaml => fenced("yaml", yaml),
    };
    let _ = writeln!(text, "\n## Configuration\n\n{configuration}");
    text
}

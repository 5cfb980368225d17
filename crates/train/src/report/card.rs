//! The model card.

use crate::report::input::{Input, Losses};
use std::fmt::Write;
use std::path::Path;
use suasion_data::report::format::{loss, percent, thousands};

/// Text for a line or a table cell, without the bars, line breaks and markup that would break it.
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
    let Input { report, card, replies, comparison, .. } = input;
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
            "\n## Training signal by section\n\n| section | tokens | share if all tokens are learned | share in this run |\n|---|---:|---:|---:|"
        );
        for s in &card.sections {
            let (before, after) = (percent(s.share_before), percent(s.share_after));
            let _ = writeln!(text, "| {} | {} | {before} | {after} |", cell(&s.name), thousands(s.tokens));
        }
    }
    let losses = input.losses();
    if !losses.is_empty() {
        let _ = writeln!(text, "\n## Held-out loss\n\nMean negative log-likelihood in nats per token.\n");
        let _ = writeln!(text, "| section | tokens | before | after |\n|---|---:|---:|---:|");
    }
    for Losses { name, tokens, before, after } in losses {
        let _ = writeln!(text, "| {name} | {} | {} | {} |", thousands(tokens), loss(before), loss(after));
    }
    if let Some(comparison) = comparison {
        let _ = writeln!(text, "\n## Responses only compared with all tokens\n");
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
        let heading = if i == 0 { "\n## Generated replies\n\n" } else { "\n" };
        let (prompt, text_of_reply) = (fenced("text", &reply.prompt), fenced("text", &reply.reply));
        let ended = cell(&reply.stopped);
        let _ = writeln!(text, "{heading}Prompt:\n\n{prompt}\nReply ({ended}):\n\n{text_of_reply}");
    }
    let (language, configuration) = input.configuration();
    let _ = writeln!(text, "\n## Configuration\n\n{}", fenced(language, &configuration));
    text
}

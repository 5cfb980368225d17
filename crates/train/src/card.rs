//! The model card and the report page.

use crate::checkpoint::pretty;
use crate::{Comparison, Evaluation, Identity, Report, Result, Settings, html};
use serde::{Deserialize, Serialize};
use std::fmt::Write;
use std::path::Path;
use suasion_data::policy::Objective;
use suasion_files::write_bytes;

/// What is known of the data: the command line fills it from the preparation's summary.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DataCard {
    /// Heading of the card; empty = the base model's name with `-suasion`.
    pub title: String,
    /// The model that training started from: a hub id, a path, or words (random weights).
    pub base_model: String,
    /// Training sources.
    pub data: Vec<String>,
    /// Held-out sources, in words where they were split off.
    pub eval_data: Vec<String>,
    /// Rows read.
    pub rows_read: u64,
    /// Rows trained on.
    pub rows_kept: u64,
    /// Rows of those that were cut.
    pub rows_cut: u64,
    /// Rows left out (too long, or no target).
    pub rows_dropped: u64,
    /// Rows that could not become samples.
    pub rows_failed: u64,
    /// Held-out rows.
    pub eval_rows: u64,
    /// Tokens of the rows trained on.
    pub tokens: u64,
    /// Supervised tokens among them.
    pub supervised_tokens: u64,
    /// What each section is of the training signal.
    pub sections: Vec<SectionShare>,
    /// Findings by code.
    pub findings: Vec<FindingCount>,
    /// The resolved configuration, as text.
    pub configuration: String,
}

/// A section's share of the training signal; shares are between 0 and 1.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SectionShare {
    /// The section.
    pub name: String,
    /// Its tokens.
    pub tokens: u64,
    /// Its share if all tokens were learned.
    pub share_before: f64,
    /// Its share in this run.
    pub share_after: f64,
}

/// How often a finding occurs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FindingCount {
    /// Its code.
    pub code: String,
    /// Its level.
    pub level: String,
    /// How often.
    pub count: u64,
    /// One of them, in words.
    pub example: String,
}

/// A generated reply to show.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SampleReply {
    /// What the model was given.
    pub prompt: String,
    /// What it said.
    pub reply: String,
    /// What the row says, where there is one.
    pub reference: Option<String>,
    /// Why it ended, in words.
    pub stopped: String,
}

/// Writes `README.md` and `report.html` into a run's folder. [`crate::train`] does so at its end without replies and
/// comparison; call it again with them.
pub fn write_report(
    dir: &Path,
    report: &Report,
    settings: &Settings,
    identity: &Identity,
    card: &DataCard,
    replies: &[SampleReply],
    comparison: Option<&Comparison>,
) -> Result<()> {
    let input = Input { report, settings, identity, card, replies, comparison };
    write_bytes(dir.join("README.md"), model_card(&input).as_bytes())?;
    Ok(write_bytes(dir.join("report.html"), html::page(&input).as_bytes())?)
}

/// Everything that the reports show.
pub(crate) struct Input<'a> {
    pub report: &'a Report,
    pub settings: &'a Settings,
    pub identity: &'a Identity,
    pub card: &'a DataCard,
    pub replies: &'a [SampleReply],
    pub comparison: Option<&'a Comparison>,
}

impl Input<'_> {
    pub(crate) fn title(&self) -> String {
        match (self.card.title.as_str(), self.card.base_model.rsplit(['/', '\\']).next().unwrap_or("")) {
            ("", "") => "A model trained with suasion".to_string(),
            ("", base) => format!("{base}-suasion"),
            (title, _) => title.to_string(),
        }
    }

    pub(crate) fn objective(&self) -> &'static str {
        match self.identity.objective {
            Objective::ResponseOnly => {
                "responses only: the loss is taken on responses and their stop tokens, never on the prompt"
            }
            Objective::AllTokens => {
                "all tokens: the loss is taken on the prompts too, so the model has learned them"
            }
        }
    }

    /// The run in name and value.
    pub(crate) fn facts(&self) -> Vec<(&'static str, String)> {
        let (report, card) = (self.report, self.card);
        let mut facts = vec![
            ("Objective", self.objective().to_string()),
            ("Base model", card.base_model.clone()),
            ("Parameters", grouped(report.parameters)),
            ("Training data", card.data.join(", ")),
            ("Held-out data", card.eval_data.join(", ")),
            ("Data fingerprint", self.identity.data_fingerprint.clone()),
            ("Labelling rules", format!("version {}", self.identity.masking_version)),
            (
                "Rows",
                format!(
                    "{} read, {} trained on ({} of them cut), {} dropped, {} failed, {} held out",
                    grouped(card.rows_read),
                    grouped(card.rows_kept),
                    grouped(card.rows_cut),
                    grouped(card.rows_dropped),
                    grouped(card.rows_failed),
                    grouped(card.eval_rows)
                ),
            ),
            (
                "Supervised tokens",
                format!(
                    "{} of {}{}",
                    grouped(card.supervised_tokens),
                    grouped(card.tokens),
                    match card.tokens {
                        0 => String::new(),
                        tokens => format!(" ({})", percent(card.supervised_tokens as f64 / tokens as f64)),
                    }
                ),
            ),
            ("Steps", format!("{} ({:.2} epochs)", grouped(report.step), report.epoch)),
            (
                "Learned from",
                format!("{} targets in {} tokens", grouped(report.targets), grouped(report.tokens)),
            ),
            ("Training time", duration(report.seconds)),
        ];
        if report.final_step != report.step {
            facts.push(("Weights", format!("of step {}, the lowest evaluation loss", report.final_step)));
        }
        if let Some(bytes) = report.peak_memory_bytes {
            facts.push(("Peak memory", memory(bytes)));
        }
        facts.retain(|(_, value)| !value.is_empty());
        facts
    }

    /// Loss per section before and after training: `(section, tokens, before, after)`.
    pub(crate) fn section_losses(&self) -> Vec<(String, u64, Option<f64>, Option<f64>)> {
        let of = |evaluation: &Option<Evaluation>, name: &str| {
            evaluation.as_ref().and_then(|evaluation| evaluation.sections.get(name).copied())
        };
        crate::evaluate::SECTIONS
            .iter()
            .filter_map(|name| {
                let (before, after) = (of(&self.report.before, name), of(&self.report.after, name));
                let tokens = after.or(before)?.targets;
                Some((name.to_string(), tokens, before.map(|s| s.loss), after.map(|s| s.loss)))
            })
            .collect()
    }
}

pub(crate) fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// Digits in groups of three, by narrow spaces that do not break.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    text
}

pub(crate) fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        0..60 => format!("{seconds:.1} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
    }
}

fn memory(bytes: u64) -> String {
    match bytes as f64 {
        b if b < 1e9 => format!("{:.0} MB", b / 1e6),
        b => format!("{:.2} GB", b / 1e9),
    }
}

pub(crate) fn number(value: Option<f64>) -> String {
    value.map_or("–".to_string(), |value| format!("{value:.4}"))
}

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

fn model_card(input: &Input<'_>) -> String {
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
            let _ = writeln!(text, "| {} | {} | {before} | {after} |", cell(&s.name), grouped(s.tokens));
        }
    }
    if report.before.is_some() || report.after.is_some() {
        let _ = writeln!(text, "\n## Held-out loss\n\nMean negative log-likelihood in nats per token.\n");
        let _ = writeln!(text, "| | tokens | before | after |\n|---|---:|---:|---:|");
        let of = |e: &Option<Evaluation>| number(e.as_ref().map(|e| e.loss));
        let targets = report.after.as_ref().or(report.before.as_ref()).map_or(0, |e| e.targets);
        let (before, after) = (of(&report.before), of(&report.after));
        let _ = writeln!(text, "| **all targets** | {} | {before} | {after} |", grouped(targets));
        for (name, tokens, before, after) in input.section_losses() {
            let _ =
                writeln!(text, "| {name} | {} | {} | {} |", grouped(tokens), number(before), number(after));
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
            let (count, example) = (grouped(f.count), cell(&f.example));
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

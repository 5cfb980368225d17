//! Rows of a file to samples, with what there is to say about them.

use super::rows::DataFiles;
use crate::failure::Failure;
use crate::progress::Meter;
use crate::ui::Ui;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use suasion_data::pipeline::{BAD_ROWS_LISTED, Outcome, Pipeline, Summary};
use suasion_data::prepared::Manifest;
use suasion_data::report::format::{count, thousands};
use suasion_data::template::ChatTemplate;
use suasion_data::tokens::Tokenizer;
use suasion_data::{Code, Finding, Level, Mode, ModelFolder, Policy, Sample};

/// What is read and kept of a source of rows.
pub struct RowSet {
    /// What the user named.
    pub name: PathBuf,
    /// The rows that became samples, in their order.
    pub samples: Vec<Sample>,
    /// The source in numbers.
    pub summary: Summary,
    /// The first finding of each code.
    pub examples: BTreeMap<Code, Finding>,
    /// The first rows that failed, with the reason (`on_bad_row: skip` goes on after them).
    pub failures: Vec<String>,
}

/// Reads rows to samples; `mode` says what the rows are for.
pub fn load(
    ui: &Ui,
    data: &DataFiles,
    folder: &Arc<ModelFolder>,
    policy: &Policy,
    mode: Mode,
) -> anyhow::Result<RowSet> {
    let manifest = data.manifest()?;
    let labelled_under = manifest.as_ref().map(|manifest| manifest.labelled_under(policy).into());
    let pipeline = Pipeline { mode, labelled_under, ..Pipeline::new(folder.clone(), policy.clone()) };
    let mut samples = Vec::new();
    let mut examples = BTreeMap::new();
    let mut failures = Vec::new();
    let mut meter = Meter::new(ui, &data.name);
    let mut rows = pipeline.rows(data.open()?)?;
    while let Some(outcome) = rows.next() {
        meter.show(rows.progress());
        let outcome = outcome?;
        for finding in outcome.findings() {
            examples.entry(finding.code).or_insert_with(|| finding.clone());
        }
        match outcome {
            Outcome::Kept(kept) => samples.push(kept.sample),
            Outcome::Failed { error, .. } if failures.len() < BAD_ROWS_LISTED => {
                failures.push(error.to_string())
            }
            _ => {}
        }
    }
    drop(meter);
    let summary = rows.into_summary();
    if let (Some(manifest), Some(source)) = (&manifest, &summary.source)
        && !manifest.describes(source)
    {
        ui.warn(format_args!(
            "{}: not as its manifest says it was written; what the manifest says of it may be wrong",
            data.name.display()
        ));
    }
    tell_date(ui, policy.template_date.as_deref(), summary.template_date.as_deref());
    Ok(RowSet { name: data.name.clone(), samples, summary, examples, failures })
}

/// Says that the chat template wrote the date of the day, where none was pinned.
pub fn tell_date(ui: &Ui, pinned: Option<&str>, used: Option<&str>) {
    if let (None, Some(date)) = (pinned, used) {
        ui.warn(format_args!(
            "the chat template writes today's date into each conversation; pin it with template_date={date}"
        ));
    }
}

/// Holds prepared data against the model and the configuration that are to use it.
///
/// # Errors
/// Where it was prepared with another tokenizer or template, or for another objective.
pub fn check_manifest(data: &DataFiles, folder: &ModelFolder, policy: &Policy) -> anyhow::Result<()> {
    let Some(manifest) = data.manifest()? else { return Ok(()) };
    let differences = differences(&manifest, Some(folder), policy);
    if differences.is_empty() {
        return Ok(());
    }
    Err(Failure::run_time(
        "E-FINGERPRINT",
        format!("{}: prepared for something else: {}", data.name.display(), differences.join("; ")),
        "prepare the rows again with this model and configuration, or remove the manifest beside them if it belongs to other data",
    )
    .into())
}

/// What prepared data was made with that is different now, a clause for each.
pub fn differences(manifest: &Manifest, folder: Option<&ModelFolder>, policy: &Policy) -> Vec<String> {
    let tokenizer = folder.and_then(|folder| folder.tokenizer.as_deref()).map(Tokenizer::fingerprint);
    let template = folder.and_then(|folder| folder.template.as_deref()).map(ChatTemplate::fingerprint);
    let mut differences = manifest.mismatches(tokenizer, policy);
    differences.extend(manifest.other_template(template));
    differences
}

/// Says what was found at warning or above: how often, what, and where first; and every row that failed.
pub fn tell_findings(ui: &Ui, rows: &RowSet, indent: usize) {
    for (code, found) in &rows.summary.findings {
        if found.level == Level::Note || *code == Code::Row {
            continue;
        }
        let example = rows
            .examples
            .get(code)
            .map(|finding| format!("; first: row {}: {}", finding.row, finding.message))
            .unwrap_or_default();
        ui.say(format_args!(
            "{:indent$} {code} {} × {}{example}",
            "",
            thousands(found.count),
            code.rule().meaning
        ));
    }
    for failure in &rows.failures {
        ui.warn(format_args!("left out: {failure}"));
    }
    let more = rows.summary.failed - rows.failures.len() as u64;
    if more > 0 {
        ui.warn(format_args!("left out: {} more", count(more, "row")));
    }
}

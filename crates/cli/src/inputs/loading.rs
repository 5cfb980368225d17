//! Reads rows to samples, and prints what was found about them.

use super::rows::DataFiles;
use crate::failure::Failure;
use crate::progress::Meter;
use crate::ui::Ui;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use suasion_data::prepared::Manifest;
use suasion_data::report::format::{count, thousands};
use suasion_data::template::ChatTemplate;
use suasion_data::tokens::Tokenizer;
use suasion_data::{
    BAD_ROWS_LISTED, Code, Finding, Level, Mode, ModelFolder, Outcome, Pipeline, Policy, Sample, Summary,
};

/// The samples of a source, with its summary and findings.
pub struct RowSet {
    /// The source, as the user named it.
    pub name: PathBuf,
    /// The rows that became samples, in the order of the source.
    pub samples: Vec<Sample>,
    /// Counts of the source.
    pub summary: Summary,
    /// The first finding of each code.
    pub examples: BTreeMap<Code, Finding>,
    /// The first rows that failed, with the reason (`on_bad_row: skip` continues after them).
    pub failures: Vec<String>,
}

/// Reads rows to samples, for the purpose `mode`.
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
            "{}: changed since its manifest was written, which may describe other rows",
            data.name.display()
        ));
    }
    warn_of_date(ui, policy.template_date.as_deref(), summary.template_date.as_deref());
    Ok(RowSet { name: data.name.clone(), samples, summary, examples, failures })
}

/// Warns where the chat template has used today's date because no date is pinned.
pub fn warn_of_date(ui: &Ui, pinned: Option<&str>, used: Option<&str>) {
    if let (None, Some(date)) = (pinned, used) {
        ui.warn(format_args!(
            "the chat template writes today's date into each conversation; pin it with template_date={date}"
        ));
    }
}

/// Compares prepared data with the model and the configuration that are to use it.
///
/// # Errors
/// Where it was prepared with another tokenizer or template, or for another objective.
pub fn check_manifest(data: &DataFiles, folder: &ModelFolder, policy: &Policy) -> anyhow::Result<()> {
    let Some(manifest) = data.manifest()? else { return Ok(()) };
    let differences = differences(&manifest, folder, policy);
    if differences.is_empty() {
        return Ok(());
    }
    Err(Failure::run_time(
        "E-FINGERPRINT",
        format!("{}: prepared with other settings: {}", data.name.display(), differences.join("; ")),
        "prepare the rows again with this model and configuration, or remove the manifest beside them if it belongs to other data",
    )
    .into())
}

/// The differences between what prepared data was made with and what is to use it, a clause for each.
pub fn differences(manifest: &Manifest, folder: &ModelFolder, policy: &Policy) -> Vec<String> {
    let tokenizer = folder.tokenizer.as_deref().map(Tokenizer::fingerprint);
    let template = folder.template.as_deref().map(ChatTemplate::fingerprint);
    let mut differences = manifest.mismatches(tokenizer, policy);
    differences.extend(manifest.other_template(template));
    differences
}

/// Prints the findings of level warning and above, with how often and where first, and the rows that failed.
pub fn print_findings(ui: &Ui, rows: &RowSet, indent: usize) {
    for (code, found) in &rows.summary.findings {
        if found.level == Level::Note || *code == Code::Row {
            continue;
        }
        let example = rows
            .examples
            .get(code)
            .map(|finding| format!("; first: row {}: {}", finding.row, finding.message))
            .unwrap_or_default();
        let text = format!("{code} {} × {}{example}", thousands(found.count), code.rule().meaning);
        // One column from the names of the plan.
        ui.finding(found.level, if indent > 0 { indent + 1 } else { 0 }, text);
    }
    for failure in &rows.failures {
        ui.warn(format_args!("left out: {failure}"));
    }
    let more = rows.summary.failed - rows.failures.len() as u64;
    if more > 0 {
        ui.warn(format_args!("left out: {} more", count(more, "row")));
    }
}

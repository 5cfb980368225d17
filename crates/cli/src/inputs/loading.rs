//! Reads rows to samples, and prints what was found about them.

use super::rows::DataFiles;
use crate::failure::{Exit, Failure};
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
    BAD_ROWS_LISTED, Code, Finding, Level, Mode, ModelFolder, OnBadRow, Outcome, Pipeline, Policy, Sample,
    Summary,
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
    /// Findings of level error in rows that were not left out for good reason, and how many.
    pub errors: BTreeMap<Code, u64>,
    /// The first rows that failed, with the reason (`on_bad_row: skip` continues after them).
    pub failures: Vec<String>,
}

/// Reads rows to samples, for the purpose `mode`. `allowed` findings do not refuse their row.
pub fn load(
    ui: &Ui,
    data: &DataFiles,
    folder: &Arc<ModelFolder>,
    policy: &Policy,
    mode: Mode,
    allowed: &[Code],
) -> anyhow::Result<RowSet> {
    let manifest = data.manifest()?;
    let labelled_under = manifest.as_ref().map(|manifest| manifest.labelled_under(policy).into());
    let prepared_chats = manifest.as_ref().is_some_and(|manifest| manifest.template.is_some());
    let allowed = allowed.to_vec();
    let pipeline = Pipeline {
        mode,
        labelled_under,
        prepared_chats,
        allowed,
        ..Pipeline::new(folder.clone(), policy.clone())
    };
    let mut errors = BTreeMap::new();
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
        // Rows that cannot be learned from may be left out under on_bad_row=skip.
        let counts = match &outcome {
            Outcome::Kept(_) => true,
            Outcome::Dropped { .. } => policy.on_bad_row == OnBadRow::Error,
            Outcome::Failed { .. } => false,
        };
        for finding in outcome.findings().iter().filter(|f| counts && f.level == Level::Error) {
            *errors.entry(finding.code).or_default() += 1;
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
    Ok(RowSet { name: data.name.clone(), samples, summary, examples, errors, failures })
}

/// Refuses to train on rows with findings of level error that are not allowed by name.
///
/// # Errors
/// A [`Failure`] that names the codes, the rows and the remedy.
pub fn check_findings(rows: &RowSet, allowed: &[Code]) -> anyhow::Result<()> {
    let stopping: Vec<(&Code, &u64)> =
        rows.errors.iter().filter(|(code, _)| !allowed.contains(code)).collect();
    let Some((first, _)) = stopping.first() else { return Ok(()) };
    let found = stopping.iter().map(|(code, n)| {
        let first = rows.examples.get(code).map(|f| format!("; first: row {}: {}", f.row, f.message));
        format!("{code} {} × {}{}", thousands(**n), code.rule().meaning, first.unwrap_or_default())
    });
    let found: Vec<String> = found.collect();
    let codes: Vec<&str> = stopping.iter().map(|(code, _)| code.as_str()).collect();
    let left_out = if stopping.iter().any(|(code, _)| **code == Code::M001) {
        " (on_bad_row=skip leaves rows out that cannot be learned from)"
    } else {
        ""
    };
    Err(Failure {
        tag: "E-FINDINGS",
        message: format!("{}: rows with errors: {}", rows.name.display(), found.join("; ")),
        help: Some(format!(
            "{first}: {}{left_out}; `suasion verify` shows the rows; to train all the same: --set allow_findings={}",
            first.rule().help,
            codes.join(",")
        )),
        exit: Exit::Findings,
    }
    .into())
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
/// If it was prepared with another tokenizer or template, or for another objective.
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

/// Prints the findings of level warning and above, with how often and where first, and the rows that failed; also
/// when quiet.
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

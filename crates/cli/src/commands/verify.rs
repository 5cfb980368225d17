//! `suasion verify`: which tokens are supervised and why, each section's share of the loss, and findings.

use super::ConfigArgs;
use super::verify_page::{self, Parts};
use crate::failure::{Exit, Failure};
use crate::inputs::model;
use crate::inputs::{kept, loading, rows};
use crate::paths;
use crate::progress::Meter;
use crate::ui::{self, Ui};
use std::collections::HashSet;
use std::io::Write;
use std::path::PathBuf;
use suasion_data::audit::Filter;
use suasion_data::report::terminal::Style;
use suasion_data::report::{self, Gallery, RowView};
use suasion_data::{Error, Mode, ModelFolder, Outcome, Pipeline};

/// Flags of the command.
#[derive(clap::Args, Debug)]
pub struct VerifyArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Show the first N rows
    #[arg(long, value_name = "N", default_value_t = 3)]
    rows: u64,
    /// Show one row, by its 0-based number in the source
    #[arg(long, value_name = "N", conflicts_with = "rows")]
    row: Option<u64>,
    /// Show each token with its id and origin
    #[arg(long)]
    ids: bool,
    /// Also write an HTML page: a verdict, the shares of the loss, the findings, and the rows that matter
    #[arg(long, value_name = "FILE", value_parser = paths::parser())]
    html: Option<PathBuf>,
    /// In the page also the model's own loss by section, measured on N rows
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "64", requires = "html",
        value_parser = clap::value_parser!(u32).range(1..=10_000))]
    loss: Option<u32>,
    /// Report only findings with these codes or prefixes (M, M002, …; repeatable, or with commas)
    #[arg(long, value_name = "CODES")]
    select: Vec<String>,
    /// Do not report findings with these codes or prefixes
    #[arg(long, value_name = "CODES")]
    ignore: Vec<String>,
}

/// A row to print.
enum Shown {
    View(Box<RowView>),
    /// The reason why the row has no tokens.
    Reason(String),
}

/// Reasons that were printed: the help of each is printed once.
#[derive(Default)]
struct Reasons(HashSet<String>);

impl Reasons {
    /// A row's error, with its help where the reason is new.
    fn text(&mut self, error: &Error) -> String {
        let reason = match error {
            Error::Row { message, .. } => message.clone(),
            other => other.to_string(),
        };
        let mut lines = vec![report::visible(&error.to_string())];
        if self.0.insert(reason)
            && let Some(help) = error.help()
        {
            lines.extend(format!("help: {help}").lines().map(report::visible));
        }
        lines.join("\n")
    }
}

/// Runs the command.
pub fn run(args: &VerifyArgs, ui: &Ui) -> anyhow::Result<Exit> {
    let loaded = args.config.load(ui)?;
    let config = &loaded.config;
    let source = rows::training(config, ui)?;
    let filter = Filter::new(&args.select, &args.ignore)
        .map_err(|message| Failure::usage(message, "give a code or a prefix: --ignore T001, --select M"))?;
    let folder = match &config.model_name_or_path {
        Some(name) => model::open(&model::resolve(name, false, ui)?, ui)?,
        None => ModelFolder::default(),
    };
    if let Some(html) = &args.html {
        let files = source.files.iter().map(PathBuf::as_path).chain(args.config.config.as_deref());
        kept::check_output("--html", html, files, [folder.path.as_path()])?;
    }
    let policy = config.policy();
    let manifest = source.manifest()?;
    if let Some(manifest) = &manifest {
        let differences = loading::differences(manifest, &folder, &policy);
        if !differences.is_empty() {
            ui.warn(format_args!(
                "{}: prepared with other settings: {}",
                source.name.display(),
                differences.join("; ")
            ));
        }
    }
    let prepared = manifest.is_some();
    let pipeline = Pipeline {
        mode: Mode::Verify,
        prepared_chats: manifest.as_ref().is_some_and(|manifest| manifest.template.is_some()),
        labelled_under: manifest.map(|manifest| manifest.labelled_under(&policy).into()),
        keep_text: true,
        filter,
        ..Pipeline::new(folder, policy)
    };
    let tokenizer = pipeline.folder.tokenizer.as_deref();

    let asked = args.row.map_or(0..args.rows, |row| row..row.saturating_add(1));
    let mut gallery =
        args.html.as_ref().map(|_| Gallery::new(asked.clone(), args.loss.map(|rows| rows as usize)));
    let mut shown = Vec::new();
    let mut findings = report::json::Findings::default();
    let mut reasons = Reasons::default();
    let mut meter = Meter::new(ui, &source.name);
    let mut outcomes = pipeline.rows(source.open()?)?;
    while let Some(outcome) = outcomes.next() {
        meter.show(outcomes.progress());
        let outcome = outcome?;
        if ui.json {
            outcome.findings().iter().try_for_each(|finding| findings.push(finding))?;
        }
        if asked.contains(&outcome.id().row) {
            shown.push(match &outcome {
                Outcome::Kept(kept) => Shown::View(Box::new(RowView::new(kept, tokenizer))),
                Outcome::Dropped { id, reason, .. } => {
                    Shown::Reason(format!("{id}: left out: {}", reason.meaning()))
                }
                Outcome::Failed { error, .. } => Shown::Reason(reasons.text(error)),
            });
        }
        if let Some(gallery) = &mut gallery {
            gallery.add(outcome);
        }
    }
    drop(meter);
    let summary = outcomes.into_summary();
    if let Some(row) = args.row
        && shown.is_empty()
    {
        return Err(Failure::usage(
            format!(
                "--row {row}: {} has the rows 0 to {}",
                source.name.display(),
                summary.rows.saturating_sub(1)
            ),
            "rows are counted from 0, as in findings and prepared data",
        )
        .into());
    }

    if let (Some(path), Some(gallery)) = (&args.html, &gallery) {
        let parts = Parts {
            name: source.name.display().to_string(),
            summary: &summary,
            gallery,
            tokenizer,
            words: args.config.words(),
            prepared,
            loss: args.loss.is_some(),
        };
        let page = verify_page::page(parts, config, ui)?;
        suasion_files::write_bytes(path, page.as_bytes()).map_err(Error::from)?;
        ui.log(format_args!("wrote {}", path.display()));
    }
    if ui.json {
        ui.print_json(&report::json::verify(&summary, &findings))?;
    } else {
        let style = Style { color: ui.color, width: ui.width, ids: args.ids, origins: args.ids };
        let mut out = ui.out();
        for shown in &shown {
            match shown {
                Shown::View(view) => write!(out, "{}", report::terminal::row(view, &style))?,
                Shown::Reason(text) => writeln!(out, "{}", ui::wrap(text, ui.width))?,
            }
            writeln!(out)?;
        }
        write!(out, "{}", report::terminal::summary(&summary, &style))?;
        out.flush()?;
    }
    Ok(if summary.has_errors() { Exit::Findings } else { Exit::Done })
}

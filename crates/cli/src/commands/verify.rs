//! `suasion verify`: which tokens are supervised and why, each section's share of the loss, and findings.

use super::ConfigArgs;
use super::verify_page::{self, Parts};
use crate::config::Paths;
use crate::failure::{Exit, Failure};
use crate::inputs::model;
use crate::inputs::rows::DataFiles;
use crate::inputs::vocabulary::Vocabulary;
use crate::inputs::{kept, loading, rows};
use crate::paths;
use crate::progress::Meter;
use crate::ui::{self, Ui};
use std::collections::HashSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use suasion_data::audit::Filter;
use suasion_data::audit::foreign::Maker;
use suasion_data::report::advice::{Firsts, advice};
use suasion_data::report::terminal::Style;
use suasion_data::report::{self, Gallery, RowView};
use suasion_data::source::Row;
use suasion_data::template::ChatTemplate;
use suasion_data::tokens::SpecialToken;
use suasion_data::{Error, Level, Mode, ModelFolder, Outcome, Pairing, Pipeline, Reference};

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
    /// Chat template that rows of tokens were made with, where it is not the model's own (a .jinja file)
    #[arg(long, value_name = "FILE", value_parser = paths::parser())]
    template: Option<PathBuf>,
    /// Source rows of rows of tokens: their labels are derived again, and compared token by token
    #[arg(long, value_name = "ROWS", value_parser = paths::parser())]
    source: Vec<PathBuf>,
    /// Column of ids that rows of tokens and their source rows share, by which they are paired; `id` and the like are found
    #[arg(long, value_name = "COLUMN", requires = "source")]
    id: Option<String>,
    /// Pair rows of tokens with source rows by their order, whatever ids they have
    #[arg(long, requires = "source", conflicts_with = "id")]
    by_order: bool,
    /// List at most N findings, errors first; every row is checked and counted
    #[arg(long, value_name = "N")]
    max_findings: Option<u64>,
    /// What to print: text, json, annotations of GitHub Actions, or SARIF 2.1.0
    #[arg(long, value_enum, value_name = "FORMAT", conflicts_with = "json")]
    output_format: Option<OutputFormat>,
}

/// `--output-format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum OutputFormat {
    Text,
    Json,
    Github,
    Sarif,
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

/// The template of a file, with the special tokens of a folder.
fn template(path: &Path, folder: &ModelFolder) -> anyhow::Result<ChatTemplate> {
    let Some(tokenizer) = &folder.tokenizer else {
        return Err(Failure::usage(
            "--template needs a tokenizer",
            "give --model M, a folder with the tokenizer of the rows",
        )
        .into());
    };
    let text = std::fs::read_to_string(path).map_err(|error| Error::io(path, error))?;
    let special = |token: Option<&SpecialToken>| token.map(|token| token.content.clone());
    let (bos, eos) = (special(tokenizer.bos()), special(tokenizer.eos()));
    let made = ChatTemplate::new(&text, bos.as_deref(), eos.as_deref());
    let made = made.map_err(|error| {
        let help = "give a chat template in Jinja, as chat_template.jinja of a model's folder";
        Failure::usage(format!("--template {}: {error}", path.display()), help)
    })?;
    Ok(made.with_tokens(tokenizer.named_tokens()))
}

/// The program that tokenised the rows, by the columns of the first; `None` for rows that are not tokens, and for a
/// pipe, which cannot be read again.
fn maker(source: &DataFiles) -> anyhow::Result<Option<Maker>> {
    if !source.files.iter().all(|file| file.is_file()) {
        return Ok(None);
    }
    let Some(Ok(row)) = source.open()?.next_row()?.map(Row::parse) else { return Ok(None) };
    let columns: Vec<&String> = row.fields.keys().collect();
    Ok(row.fields.contains_key("input_ids").then(|| Maker::of(&columns)))
}

/// Which source row each row was made of, by the column of ids that is named, else by a usual one that both have; `None`
/// where rows are paired by their order.
fn pairing(
    args: &VerifyArgs,
    rows: &DataFiles,
    source: &DataFiles,
    ui: &Ui,
) -> anyhow::Result<Option<Pairing>> {
    let stored = |data: &DataFiles| data.files.iter().all(|file| file.is_file());
    let again = stored(rows) && stored(source);
    if let Some(column) = args.id.as_ref().filter(|_| !again) {
        return Err(Failure::usage(
            format!("--id {column}: a pipe cannot be read again"),
            "write the rows to a file, whose ids are read first",
        )
        .into());
    }
    let column = match &args.id {
        Some(column) => Some(column.as_str()),
        None if args.by_order || !again => None,
        None => Pairing::usual_column(rows.open()?, source.open()?)?,
    };
    let Some(column) = column else { return Ok(None) };
    let pairing = Pairing::by(column, rows.open()?, source.open()?)?;
    ui.log(format_args!("rows are paired with source rows by {column:?}"));
    Ok(Some(pairing))
}

/// Makes glibc reuse freed blocks of up to 31 MB instead of returning each of them to the system. Pages of Parquet files are
/// such blocks, one after the other: their page faults are a tenth of the time of this command.
fn reuse_freed_memory() {
    // Freeing a block that was mapped raises the threshold for mapping blocks to its size, and the one for trimming the
    // heap to twice that (M_MMAP_THRESHOLD in mallopt(3)). Nothing is written to it, so it takes no memory.
    let mut block = Vec::<u8>::new();
    if block.try_reserve_exact(31 << 20).is_ok() {
        std::hint::black_box(&mut block);
    }
}

/// Runs the command.
pub fn run(args: &VerifyArgs, ui: &Ui) -> anyhow::Result<Exit> {
    reuse_freed_memory();
    let loaded = args.config.load(ui)?;
    let config = &loaded.config;
    let source = rows::training(config, ui)?;
    let filter = Filter::new(&args.select, &args.ignore)
        .map_err(|message| Failure::usage(message, "give a code or a prefix: --ignore T001, --select M"))?;
    let vocabulary = Vocabulary::of(config, ui)?;
    let mut folder = match &config.model_name_or_path {
        Some(name) => vocabulary.open(&model::resolve(name, false, ui)?, ui)?,
        None => ModelFolder::default(),
    };
    if let Some(path) = &args.template {
        folder.template = Some(Arc::new(template(path, &folder)?));
    }
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
    let mut pipeline = Pipeline {
        mode: Mode::Verify,
        prepared_chats: manifest.as_ref().is_some_and(|manifest| manifest.template.is_some()),
        labelled_under: manifest.map(|manifest| manifest.labelled_under(&policy).into()),
        keep_text: true,
        filter,
        ..Pipeline::new(folder, policy)
    };
    if !args.source.is_empty() {
        let rows = rows::resolve(&Paths(args.source.clone()), &config.dataset_train_split, ui)?;
        let reference = Reference::read(&pipeline, || rows.open())?;
        pipeline.reference = Some(Arc::new(match pairing(args, &source, &rows, ui)? {
            Some(pairing) => reference.paired(pairing),
            None => reference,
        }));
    }
    let tokenizer = pipeline.folder.tokenizer.as_deref();

    let asked = args.row.map_or(0..args.rows, |row| row..row.saturating_add(1));
    let mut gallery =
        args.html.as_ref().map(|_| Gallery::new(asked.clone(), args.loss.map(|rows| rows as usize)));
    let mut shown = Vec::new();
    let format = match args.output_format {
        Some(format) => format,
        None if ui.json => OutputFormat::Json,
        None => OutputFormat::Text,
    };
    let mut findings = report::Findings::limited(args.max_findings);
    let mut firsts = Firsts::default();
    let mut reasons = Reasons::default();
    let mut meter = Meter::new(ui, &source.name);
    // The summary in the terminal needs the tokens of the rows that are shown; a page and a list of findings, those of all.
    let (of_all, shown_rows) = (gallery.is_some() || format != OutputFormat::Text, asked.clone());
    let mut outcomes =
        pipeline.rows_in_brief(source.open()?, move |row| of_all || shown_rows.contains(&row))?;
    while let Some(outcome) = outcomes.next() {
        meter.show(outcomes.progress());
        let outcome = outcome?;
        // The terminal's summary has counts; only the other formats list every finding.
        if format != OutputFormat::Text {
            findings.add(&outcome)?;
        }
        firsts.note(outcome.findings());
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
    if let Some(why) = &summary.no_turns {
        ui.warn(format_args!(
            "the turns of the chat template are not looked for in the ids: {why}; --source ROWS compares with the source rows"
        ));
    }
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
    match format {
        OutputFormat::Json => ui.print_json(&report::json::verify(&summary, &findings))?,
        OutputFormat::Sarif => ui.print_json(&report::sarif::log(&summary, &findings))?,
        OutputFormat::Github => {
            let mut out = ui.out();
            report::github::write(&mut out, &summary, &findings)?;
            out.flush()?;
        }
        OutputFormat::Text => {
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
            let headers = summary.headers.as_ref().map(|(user, answer)| (user.as_str(), answer.as_str()));
            // Only advice about findings depends on the program.
            let advised = summary.findings.values().any(|found| found.level > Level::Note);
            let maker = if advised { maker(&source)? } else { None };
            write!(out, "{}", advice(&summary, &firsts, maker, headers, ui.width))?;
            out.flush()?;
        }
    }
    let allowed = &config.allow_findings.0;
    let refused =
        summary.findings.iter().any(|(code, found)| found.level == Level::Error && !allowed.contains(code));
    Ok(if refused { Exit::Findings } else { Exit::Done })
}

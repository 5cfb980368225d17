//! `suasion prepare`: rows to training data, with its findings and its manifest.

use super::ConfigArgs;
use crate::failure::{Exit, Failure};
use crate::inputs::model;
use crate::inputs::vocabulary::Vocabulary;
use crate::inputs::{kept, loading, rows};
use crate::interrupt;
use crate::paths;
use crate::progress::Meter;
use crate::tables;
use crate::ui::Ui;
use std::io::Write;
use std::path::{Path, PathBuf};
use suasion_data::prepared::{self, Form, Job, Shape, Start, findings_path, manifest_path};
use suasion_data::report::format::{count, percent, thousands};
use suasion_data::report::visible;
use suasion_data::{Code, Level, Pipeline};

/// Flags of the command.
#[derive(clap::Args, Debug)]
pub struct PrepareArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Output: .jsonl (also .jsonl.gz, .jsonl.zst), .parquet, or a folder for datasets.load_from_disk
    #[arg(short, long, value_name = "OUT", value_parser = paths::parser())]
    output: PathBuf,
    /// Add the rendered text to each line
    #[arg(long)]
    with_text: bool,
    /// Write several files of about this size (500MB, 2GB); a stopped run then continues after the last of
    /// them
    #[arg(long, value_name = "SIZE", value_parser = size)]
    max_shard_size: Option<u64>,
    /// Prepare again even if nothing has changed
    #[arg(long)]
    rebuild: bool,
}

/// Runs the command.
pub fn run(args: &PrepareArgs, ui: &Ui) -> anyhow::Result<Exit> {
    let loaded = args.config.load(ui)?;
    check_output(&args.output)?;
    let config = &loaded.config;
    let source = rows::training(config, ui)?;
    let model = model::named(config, false, ui)?;
    if let Some(file) = source.files.iter().find(|file| prepared::replaces(&args.output, file)) {
        return Err(Failure::usage(
            format!(
                "{} is both the source and the output: {} would be replaced",
                args.output.display(),
                file.display()
            ),
            "write to another name",
        )
        .into());
    }
    let outputs = [args.output.clone(), findings_path(&args.output), manifest_path(&args.output)];
    for output in &outputs {
        kept::check_output("-o", output, args.config.config.as_deref(), [model.as_path()])?;
    }
    if loaded.places.contains_key("shuffle_dataset") && config.train.shuffle_dataset {
        ui.log("note: shuffle_dataset is for training; prepared rows stay in the order of their source");
    }
    let folder = Vocabulary::of(config, ui)?.open(&model, ui)?;
    let policy = config.policy();
    if policy.packing && args.with_text {
        return Err(Failure::usage(
            "--with-text: packs are written without text",
            "leave one of the two out",
        )
        .into());
    }
    let pipeline = Pipeline { keep_text: args.with_text, ..Pipeline::new(folder, policy.clone()) };
    let job = Job {
        pipeline: &pipeline,
        name: &source.name,
        files: &source.files,
        output: &args.output,
        shape: Shape { with_text: args.with_text, max_shard_bytes: args.max_shard_size },
        rebuild: args.rebuild,
        stop: interrupt::flag(),
    };
    let mut meter = Meter::new(ui, &source.name);
    let manifest = prepared::prepare(&job, |start| print_start(ui, start), |progress| meter.show(progress));
    drop(meter);
    let manifest = manifest?;
    loading::warn_of_date(ui, policy.template_date.as_deref(), manifest.policy.template_date.as_deref());

    if ui.json {
        ui.print_json(&manifest)?;
        return Ok(Exit::Done);
    }
    let counts = &manifest.counts;
    let mut out = ui.out();
    writeln!(out, "{}", tables::rows(counts))?;
    writeln!(
        out,
        "{} tokens, {} supervised ({})",
        thousands(counts.tokens),
        thousands(counts.supervised_tokens),
        percent(counts.supervised_tokens as f64 / counts.tokens.max(1) as f64)
    )?;
    if let Some(fill) = &manifest.packs {
        let (packs, capacity) = (count(fill.packs, "pack"), thousands(fill.capacity));
        writeln!(out, "{packs} of at most {capacity} tokens, {} full", percent(fill.rate()))?;
    }
    out.flush()?;
    if counts.not_remembered > 0 {
        ui.log(suasion_data::report::terminal::not_remembered(counts.not_remembered));
    }
    for (code, found) in &counts.findings {
        let known = Code::ALL.iter().find(|known| known.as_str() == code);
        let meaning = known.map_or("", |known| known.rule().meaning);
        // The counts have no levels: a finding's own may be lower than its code's, and the rows were written.
        let noted = known.is_none_or(|known| known.level() == Level::Note);
        let level = if noted { Level::Note } else { Level::Warning };
        ui.finding(level, 0, format_args!("{code} {} × {meaning}", thousands(*found)));
    }
    if counts.kept == 0 {
        ui.warn("no row was kept: the output is empty");
    }
    let files = match manifest.files.as_slice() {
        [first, .., last] => {
            format!("{} files, {} to {}", manifest.files.len(), first.name, last.name)
        }
        [file] if manifest.paths(&args.output).len() == 1 => match Form::of(&args.output) {
            Some(Form::Folder) => args.output.display().to_string(),
            _ => args.output.with_file_name(&file.name).display().to_string(),
        },
        _ => args.output.display().to_string(),
    };
    let (findings, manifest) = (findings_path(&args.output), manifest_path(&args.output));
    let written = format!("wrote {files}, {} and {}", findings.display(), manifest.display());
    writeln!(out, "{}", visible(&written))?;
    out.flush()?;
    Ok(Exit::Done)
}

fn print_start(ui: &Ui, start: &Start) {
    match start {
        Start::Anew => {}
        Start::UpToDate => {
            ui.log("up to date: nothing that the output depends on has changed (--rebuild prepares it again)")
        }
        Start::Rebuild(reasons) => ui.log(format_args!("preparing again: {}", reasons.join("; "))),
        Start::Resume { shards, rows } => ui.log(format_args!(
            "continuing after {} ({}) of an earlier run",
            count(*rows, "row"),
            count(*shards as u64, "shard")
        )),
    }
}

/// `500MB`, `2GB`, `64MiB` or a number of bytes.
fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit: u64 = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        _ => return Err("a size is a number with KB, MB, GB, KiB, MiB or GiB".into()),
    };
    let number: f64 =
        digits.trim().parse().map_err(|_| "a size is a number and a unit: 500MB".to_string())?;
    let bytes = number * unit as f64;
    if bytes >= 1.0 { Ok(bytes as u64) } else { Err("a shard holds at least one byte".into()) }
}

/// Refuses names of outputs whose format is unknown.
fn check_output(path: &Path) -> anyhow::Result<()> {
    match Form::of(path) {
        Some(_) => Ok(()),
        None => Err(Failure::usage(
            format!("{}: unknown output format", path.display()),
            "name a .jsonl (also .jsonl.gz, .jsonl.zst) or .parquet file, or a folder, whose name has no extension",
        )
        .into()),
    }
}

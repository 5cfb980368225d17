//! `suasion diagnose`: what a checkpoint was trained on, from the checkpoint, its base and rows.

use super::ConfigArgs;
use crate::config::Init;
use crate::failure::{Exit, Failure};
use crate::inputs::opened::Opened;
use crate::inputs::vocabulary::Vocabulary;
use crate::inputs::weights::Start;
use crate::inputs::{kept, loading, rows};
use crate::interrupt;
use crate::paths;
use crate::progress::share_of;
use crate::ui::{Ui, wrap};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use suasion_data::report::format::{count, loss, percent, thousands};
use suasion_data::report::page::shell_word;
use suasion_data::report::visible;
use suasion_data::{Mode, Sample};
use suasion_engine::AdapterFolder;
use suasion_train::diagnose::{
    DiagnoseSettings, Diagnosis, Measurement, Names, budget, chosen, diagnose, measure,
};
use suasion_train::plan::check_row;
use suasion_train::report;

/// Flags of the command.
#[derive(clap::Args, Debug)]
pub struct DiagnoseArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// The model that the training started from; --model is another name for it
    #[arg(short, long, value_name = "B", value_parser = paths::parser())]
    base: Option<PathBuf>,
    /// The checkpoint in question
    #[arg(short, long, value_name = "T", value_parser = paths::parser())]
    tuned: PathBuf,
    /// Measure at most N rows, spread evenly over the rows given
    #[arg(long, value_name = "N", default_value_t = 64)]
    rows: usize,
    /// Write the diagnosis as a page
    #[arg(long, value_name = "F", value_parser = paths::parser())]
    html: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: &DiagnoseArgs, ui: &Ui) -> anyhow::Result<Exit> {
    let loaded = args.config.load(ui)?;
    let mut config = loaded.config;
    if let Some(base) = &args.base {
        config.model_name_or_path = Some(base.clone());
    }
    if config.model_name_or_path.is_none() {
        return Err(
            Failure::usage("no base model is named", "give --base B, the model that was tuned").into()
        );
    }
    config.init = Init::Weights;
    let (base, none) = (Opened::of(&config, ui)?, Vocabulary::default());
    let tuned = match AdapterFolder::is_one(&args.tuned) {
        true => Opened::named(Some(&base.base), Some(&args.tuned), Init::Weights, &none, ui)?,
        false => Opened::named(Some(&args.tuned), None, Init::Weights, &none, ui)?,
    };
    let settings = DiagnoseSettings { rows: args.rows.max(1), ..DiagnoseSettings::default() };

    let files = rows::training(&config, ui)?;
    if let Some(html) = &args.html {
        let read = files.files.iter().map(PathBuf::as_path).chain(args.config.config.as_deref());
        kept::check_output(
            "--html",
            html,
            read,
            [base.base.as_path(), tuned.base.as_path(), args.tuned.as_path()],
        )?;
    }
    // The tuned model's template and stop tokens are those that it was trained with.
    let folder = if tuned.folder.tokenizer.is_some() { &tuned.folder } else { &base.folder };
    let policy = config.policy();
    let data = loading::load(ui, &files, folder, &policy, Mode::Prepare, &[])?;
    let rows = chosen(&data.samples, settings.rows)?;
    for arch in [&base.arch, &tuned.arch] {
        rows.iter().try_for_each(|row| check_row(arch, row))?;
    }
    let measured = |model: &Opened, name: &str| -> anyhow::Result<Measurement> {
        measured(
            ui,
            model.start(ui, &config),
            name,
            &rows,
            &settings,
            config.train.per_device_eval_batch_size,
        )
    };
    let before = measured(&base, "base")?;
    let after = measured(&tuned, "tuned")?;
    let names = Names {
        base: named(config.model_name_or_path.as_deref()),
        tuned: named(Some(&args.tuned)),
        data: named(Some(&files.name)),
    };
    let diagnosis = diagnose(&data.samples, &rows, before, after, &names);
    if let Some(html) = &args.html {
        let page = report::diagnosis::page(&diagnosis, &names);
        suasion_files::write_bytes(html, page.as_bytes()).map_err(suasion_data::Error::from)?;
    }
    if ui.json {
        ui.print_json(&diagnosis)?;
    } else {
        let mut out = ui.out();
        write!(out, "{}", text(&diagnosis, ui.width))?;
        out.flush()?;
    }
    if let Some(html) = &args.html {
        ui.note(format_args!("wrote {}", html.display()));
    }
    Ok(Exit::Done)
}

/// Measures the model in a folder, and frees it.
fn measured(
    ui: &Ui,
    mut start: Start<'_>,
    name: &str,
    rows: &[Sample],
    settings: &DiagnoseSettings,
    batch: usize,
) -> anyhow::Result<Measurement> {
    let mut model = start.build(budget(rows, batch)?)?;
    let what = format!("measuring the {name} model");
    let result = measure(&mut model, rows, settings, batch, interrupt::flag(), &mut |done| {
        ui.overwrite(&share_of(&what, done, rows.len() as u64, ui.columns()));
    });
    ui.overwrite("");
    Ok(result?)
}

/// A path, quoted for a shell.
fn named(path: Option<&Path>) -> String {
    shell_word(&path.map_or("MODEL".into(), |path| path.display().to_string()))
}

/// The diagnosis, in lines of at most `width` columns.
fn text(d: &Diagnosis, width: usize) -> String {
    let mut out = String::new();
    let mut line = |text: String| {
        let _ = writeln!(out, "{}", wrap(&visible(&text), width));
    };
    let sure =
        if d.confidence > 0.0 { format!(" (confidence {})", percent(d.confidence)) } else { String::new() };
    line(format!("{}{sure}", d.sentence));
    line(String::new());
    for reason in &d.reasons {
        line(format!("- {reason}"));
    }
    line(String::new());
    line(d.advice.clone());
    if let Some(command) = &d.command {
        line(format!("  {command}"));
    }
    line(String::new());
    line(format!("{:<16} {:>10} {:>10} {:>10} {:>10}", "loss by section", "tokens", "base", "tuned", "fall"));
    for (name, fall) in &d.sections {
        let values = [loss(fall.base), loss(fall.tuned), loss(fall.gain())];
        line(format!(
            "{name:<16} {:>10} {:>10} {:>10} {:>10}",
            thousands(fall.tokens),
            values[0],
            values[1],
            values[2]
        ));
    }
    line(format!("measured on {} with {}", count(d.rows, "row"), count(d.prompts, "distinct prompt")));
    out
}

//! `suasion compare`: both objectives from the same seed and budget, measured on held-out responses.

use super::ConfigArgs;
use crate::failure::{Exit, Failure};
use crate::inputs::rows;
use crate::job::{Begin, Job};
use crate::paths;
use crate::tables;
use crate::ui::Ui;
use std::io::Write;
use std::path::{Path, PathBuf};
use suasion_data::Objective;
use suasion_data::report::page::shell_line;
use suasion_train::repeats::{Repeats, repeats};
use suasion_train::report;

/// Flags of the command.
#[derive(clap::Args, Debug)]
pub struct CompareArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// The file for the result as JSON, with a page of the same name beside it (.html); comparison.json, or where
    /// there is one comparison-2.json and so on
    #[arg(short, long, value_name = "FILE", value_parser = paths::parser())]
    output: Option<PathBuf>,
    /// Train with N seeds, from the configured one on: what differs by chance becomes part of the interval
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=100))]
    seeds: u64,
}

/// The share of the rows that is held out where no evaluation rows are named: a comparison needs some.
const HELD_OUT: f64 = 0.1;

/// Runs the command.
pub fn run(args: &CompareArgs, ui: &Ui) -> anyhow::Result<Exit> {
    let mut loaded = args.config.load(ui)?;
    if loaded.config.data.objective == Objective::AllTokens {
        return Err(Failure::config(
            "completion_only_loss=false: compare trains both objectives",
            "leave completion_only_loss out",
        )
        .into());
    }
    if rows::evaluation(&loaded.config, ui)?.is_none() && loaded.config.eval_fraction == 0.0 {
        loaded.config.eval_fraction = HELD_OUT;
    }
    // Found to be impossible before the training, not after it.
    let output = args.output.clone().unwrap_or_else(free_name);
    if let Some(folder) = output.parent().filter(|folder| *folder != Path::new("") && !folder.is_dir()) {
        return Err(Failure::usage(
            format!("{}: there is no folder {}", output.display(), folder.display()),
            "make it first, or write elsewhere with -o FILE",
        )
        .into());
    }
    // The page is written beside the JSON.
    let page = output.with_extension("html");
    if page == output {
        return Err(Failure::usage(
            format!("-o {}: the page of the comparison has that name", output.display()),
            "name the file for the JSON: -o comparison.json",
        )
        .into());
    }
    // Both models are discarded, so output_dir is not checked.
    let job = Job::new(loaded.config, Begin::default(), ui)?;
    job.announce(ui);
    let subject = format!("{} on {}", job.folder.path.display(), job.card.data.join(", "));
    let again = |seeds: u64| {
        let seeds = format!("--seeds={seeds}");
        let words = args.config.words();
        shell_line(
            ["suasion", "compare"].into_iter().chain(words.iter().map(String::as_str)).chain([&*seeds]),
        )
    };
    let (json, text, html) = match args.seeds {
        1 => {
            let comparison = job.compare(ui)?;
            let html = report::comparison::page(&comparison, &subject, &again(5));
            (serde_json::to_value(&comparison)?, tables::comparison(&comparison, ui.width), html)
        }
        seeds => {
            let repeats = several(&job, seeds, ui)?;
            let html = report::comparison::page_of_repeats(&repeats, &subject, &again(2 * seeds));
            (serde_json::to_value(&repeats)?, tables::repeats(&repeats, ui.width), html)
        }
    };
    suasion_files::write_bytes(&output, &serde_json::to_vec_pretty(&json)?)
        .map_err(suasion_data::Error::from)?;
    suasion_files::write_bytes(&page, html.as_bytes()).map_err(suasion_data::Error::from)?;
    if ui.json {
        ui.print_json(&json)?;
    } else {
        let mut out = ui.out();
        write!(out, "{text}")?;
        out.flush()?;
    }
    ui.note(format_args!("wrote {} and {}", output.display(), page.display()));
    Ok(Exit::Done)
}

/// Compares from several seeds.
fn several(job: &Job, seeds: u64, ui: &Ui) -> anyhow::Result<Repeats> {
    let mut runs = Vec::new();
    for n in 0..seeds {
        let seed = job.settings.seed.wrapping_add(n);
        ui.log(format_args!("seed {seed} ({} of {seeds})", n + 1));
        runs.push(job.compare_from(seed, ui)?);
    }
    repeats(runs).ok_or_else(|| {
        Failure::run_time(
            "E-ROW",
            "the held-out rows have a single prompt: nothing can be said about others",
            "hold out more, with eval_fraction or eval_dataset_name",
        )
        .into()
    })
}

/// A name that no file has: an earlier comparison is not replaced.
fn free_name() -> PathBuf {
    let numbered = (2..).map(|n| PathBuf::from(format!("comparison-{n}.json")));
    let mut names = std::iter::once(PathBuf::from("comparison.json")).chain(numbered);
    names.find(|name| !name.exists() && !name.with_extension("html").exists()).unwrap_or_default()
}

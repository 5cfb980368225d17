//! `suasion train`: prints the plan, trains, and prints the result.

use super::ConfigArgs;
use crate::config::Loaded;
use crate::failure::{Exit, Failure};
use crate::job::{Job, SAVED_CONFIG, line};
use crate::paths;
use crate::ui::Ui;
use std::path::{Path, PathBuf};
use suasion_train::Resume;

/// Flags of the command.
#[derive(clap::Args, Debug)]
pub struct TrainArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Train on the embedded demo rows; needs no other files
    #[arg(long, conflicts_with_all = ["resume", "config", "model", "data"])]
    pub demo: bool,
    /// Continue from a checkpoint: a checkpoint-N folder, a run's folder, or the newest in output_dir
    #[arg(long, value_name = "DIR", num_args = 0..=1, value_parser = paths::parser())]
    pub resume: Option<Option<PathBuf>>,
    /// Print the plan and stop
    #[arg(long)]
    pub dry_run: bool,
}

/// Runs the command.
pub fn run(args: &TrainArgs, ui: &Ui) -> anyhow::Result<Exit> {
    let (loaded, resume) = load(args, ui)?;
    let (output_dir, overwrite) = (&loaded.config.output_dir, loaded.config.overwrite_output_dir);
    suasion_train::check_output_dir(output_dir, &resume, overwrite)?;
    let job = Job::new(loaded.config, resume, ui)?;
    job.announce(ui);
    line(ui, "output", job.config.output_dir.display());
    if args.dry_run {
        // A run that is not dry prints these itself.
        for warning in job.plan.warnings.iter().chain(&job.arch.not_applied) {
            ui.warn(warning);
        }
        if ui.json {
            ui.print_json(&job.to_json())?;
        }
        return Ok(Exit::Done);
    }
    let report = job.train(ui)?;
    job.farewell(&report, ui)?;
    Ok(Exit::Done)
}

/// The configuration, and where to continue. `--resume` without CONFIG uses the configuration that the run
/// saved.
fn load(args: &TrainArgs, ui: &Ui) -> anyhow::Result<(Loaded, Resume)> {
    let mut named = match &args.resume {
        None => {
            return Ok((args.config.load(ui)?, Resume::No));
        }
        Some(named) => named.clone(),
    };
    if let Some(path) = named.as_ref().filter(|path| !path.exists()) {
        return Err(Failure::usage(
            format!("--resume {}: no such folder", path.display()),
            "name a run's output folder or one of its checkpoint-N folders",
        )
        .into());
    }
    let mut config = args.config.config.clone();
    // `--resume run.yaml`: the parser took the CONFIG for the optional DIR.
    if config.is_none() && named.as_ref().is_some_and(|path| path.is_file()) {
        config = named.take();
    }
    let args = |config| ConfigArgs {
        config,
        set: args.config.set.clone(),
        model: args.config.model.clone(),
        data: args.config.data.clone(),
        keys: args.config.keys.clone(),
    };
    let run_dir = match &named {
        Some(dir) => Some(run_folder(dir)),
        None if config.is_none() => Some(args(None).load(ui)?.config.output_dir),
        None => None,
    };
    if config.is_none() {
        config = run_dir.as_ref().map(|dir| dir.join(SAVED_CONFIG)).filter(|path| path.is_file());
    }
    let mut loaded = args(config).load(ui)?;
    if let (Some(dir), None) = (&named, &loaded.config.model_name_or_path) {
        return Err(Failure::usage(
            format!("--resume {}: no run of suasion wrote this folder: it has no suasion.yaml", dir.display()),
            "name a run's output folder or one of its checkpoint-N folders; a new run starts without --resume",
        )
        .into());
    }
    if let Some(dir) = &run_dir
        && !loaded.places.contains_key("output_dir")
    {
        loaded.config.output_dir = dir.clone();
        loaded.places.insert("output_dir", "--resume".into());
    }
    Ok((loaded, named.map_or(Resume::Newest, Resume::From)))
}

/// The run that a `--resume DIR` belongs to: DIR, or the parent of a checkpoint-N.
fn run_folder(dir: &Path) -> PathBuf {
    let is_checkpoint = dir.file_name().is_some_and(|name| name.to_string_lossy().starts_with("checkpoint-"));
    match dir.parent().filter(|_| is_checkpoint) {
        Some(parent) if parent.as_os_str().is_empty() => PathBuf::from("."),
        Some(parent) => parent.to_path_buf(),
        None => dir.to_path_buf(),
    }
}

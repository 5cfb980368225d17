//! `suasion train`: prints the plan, trains, and prints the result.

use super::{ConfigArgs, launch};
use crate::config::Loaded;
use crate::failure::{Exit, Failure};
use crate::interrupt;
use crate::job::{Begin, Job};
use crate::paths;
use crate::ranks::{LAUNCHED, Role, Team};
use crate::ui::Ui;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use suasion_train::{Resume, SAVED_CONFIG};

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
    /// With --resume: go on under other settings (--set num_train_epochs=5), batch sizes or data, and say what is no longer
    /// an exact continuation
    #[arg(long, requires = "resume")]
    pub extend: bool,
    /// Share the work among N processes of this machine, each with its share of the threads; torchrun and srun start ranks
    /// on several machines (docs/ranks.md)
    #[arg(long, value_name = "N")]
    pub ranks: Option<NonZeroUsize>,
    /// Print the plan, with the disk and time that it needs, and stop; nothing is written
    #[arg(long)]
    pub dry_run: bool,
}

/// Runs the command.
pub fn run(args: &TrainArgs, role: &Role, ui: &Ui) -> anyhow::Result<Exit> {
    match role {
        Role::Launcher(ranks) if !args.dry_run => launch::run(*ranks),
        Role::Rank(place) if !args.dry_run => {
            // Of several, one tells what Ctrl-C does.
            if place.rank > 0 || std::env::var_os(LAUNCHED).is_some() {
                interrupt::silence();
            }
            let team = Team::meet(place, ui)?;
            let result = train(args, team.clone(), ui);
            team.leave(&result);
            result
        }
        // Of ranks that plan, one prints.
        Role::Rank(place) if place.rank > 0 => Ok(Exit::Done),
        role => train(args, Team::planned(role), ui),
    }
}

fn train(args: &TrainArgs, team: Team, ui: &Ui) -> anyhow::Result<Exit> {
    let (loaded, resume) = load(args, ui)?;
    loaded.config.device_of(&team, ui)?.agree(&team, ui)?;
    let (output_dir, overwrite) = (&loaded.config.output_dir, loaded.config.overwrite_output_dir);
    // Before anything is read: another process may be replacing the files there.
    team.writes_to(output_dir);
    let lock = match output_dir.is_dir() && !args.dry_run && team.is_first() {
        true => Some(suasion_train::lock(output_dir)?),
        false => None,
    };
    if team.is_first() {
        suasion_train::check_output_dir(output_dir, &resume, overwrite)?;
    }
    let first = team.is_first();
    let mut job = Job::new(loaded.config, Begin { resume, extend: args.extend, lock, team }, ui)?;
    job.check_inputs()?;
    if args.dry_run {
        job.print(ui)?;
        return Ok(Exit::Done);
    }
    job.announce(ui);
    let report = job.train(ui)?;
    if report.interrupted {
        // By another rank's Ctrl-C, it may be: all end alike.
        interrupt::stop();
    }
    if first {
        job.farewell(&report, ui)?;
    }
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
        // The saved configuration of a run means the run.
        let run = config.as_ref().filter(|path| path.ends_with(SAVED_CONFIG)).and_then(|path| path.parent());
        if let Some(run) = run {
            named = Some(if run.as_os_str().is_empty() { ".".into() } else { run.to_path_buf() });
            config = None;
        }
    }
    let args = |config| ConfigArgs {
        config,
        set: args.config.set.clone(),
        model: args.config.model.clone(),
        adapter: args.config.adapter.clone(),
        data: args.config.data.clone(),
        keys: args.config.keys.clone(),
    };
    let run_dir = match &named {
        Some(dir) => Some(run_folder(dir)),
        None if config.is_none() => Some(args(None).load(ui)?.config.output_dir),
        None => None,
    };
    let saved = config.is_none();
    if saved {
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
    if let Some(dir) = &run_dir {
        // The saved configuration names the folder in which the run was started, which may have been deleted or reused since.
        let place = loaded.places.get("output_dir").cloned();
        if place.as_ref().is_none_or(|place| !place.starts_with("--set") && !place.starts_with("--output")) {
            if let Some(place) = place.filter(|_| !saved && loaded.config.output_dir != *dir) {
                ui.log(format_args!("note: {place}: output_dir is that of --resume, {}", dir.display()));
            }
            loaded.config.output_dir = dir.clone();
            loaded.places.insert("output_dir", "--resume".into());
        }
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

//! This process's place among the ranks of a run: its connections, its threads, and what ends it.

use crate::failure::{Exit, Failure};
use crate::interrupt;
use crate::machine;
use crate::ui::Ui;
use std::io::Read;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;
use suasion_data::start_thread;
use suasion_engine::{Collective, SingleRank};
use suasion_train::checkpoint;
use suasion_train::error::after_loss;
use suasion_train::ranks::place::Numbered;
use suasion_train::ranks::{Mesh, Patience, Place};

/// Set if `suasion train --ranks` has started this process and holds its stdin open.
pub const LAUNCHED: &str = "SUASION_LAUNCHED";

/// Seconds to wait for all ranks at the start.
const TIMEOUT: &str = "SUASION_RANK_TIMEOUT";

/// How long after the loss of a rank this one may take to end on its own.
const GRACE: Duration = Duration::from_secs(5);

/// The role of a process in a run.
pub enum Role {
    /// The only process.
    Alone,
    /// It starts this many processes on this machine.
    Launcher(NonZeroUsize),
    /// One of several.
    Rank(Place),
}

impl Role {
    /// The role that `--ranks` and the environment give this process.
    ///
    /// # Errors
    /// If they contradict each other.
    pub fn of(ranks: Option<NonZeroUsize>, demo: bool) -> anyhow::Result<Role> {
        let variable = |name: &str| std::env::var(name).ok();
        let place = Place::of(&variable)?;
        if demo && (place.is_some() || ranks.is_some()) {
            let help = "unset RANK and WORLD_SIZE, or SLURM_PROCID and SLURM_NTASKS";
            return Err(Failure::usage("--demo runs in one process, not over ranks", help).into());
        }
        let launched = variable(LAUNCHED).is_some();
        match (place, ranks) {
            (Some(place), ranks) if ranks.is_none() || launched => Ok(Role::Rank(place)),
            (Some(place), _) => {
                let message =
                    format!("--ranks: this process is rank {} of {} already", place.rank, place.ranks);
                Err(Failure::usage(
                    message,
                    "leave --ranks out under torchrun and srun, which start the ranks",
                )
                .into())
            }
            (None, Some(ranks)) if ranks.get() > 1 => Ok(Role::Launcher(ranks)),
            (None, _) => Ok(Role::Alone),
        }
    }

    /// The default number of threads of this process: its share of the machine's.
    pub fn threads(&self) -> usize {
        let cores = machine::cores();
        match self {
            Role::Rank(Place { processors: Some(own), .. }) => (*own).clamp(1, cores),
            Role::Rank(Place { local: Some(local), .. }) => (cores / local.max(&1)).max(1),
            _ => cores,
        }
    }

    /// The number of this rank, where there are several.
    pub fn rank(&self) -> Option<usize> {
        match self {
            Role::Rank(place) => Some(place.rank),
            _ => None,
        }
    }
}

/// The ranks of a run, from the view of one of them.
#[derive(Clone)]
pub struct Team {
    /// How many there are.
    pub ranks: usize,
    /// How many of them are on this machine.
    pub local: usize,
    /// The number of this one among those on this machine, where that is known.
    pub local_rank: Option<usize>,
    /// Another kind of launcher has started them and may have assigned each a card.
    pub may_have_card: bool,
    mesh: Option<Arc<Mesh>>,
    /// The output folder, for the message that names the newest checkpoint.
    output: Arc<Mutex<Option<PathBuf>>>,
}

impl Default for Team {
    fn default() -> Team {
        Team {
            ranks: 1,
            local: 1,
            local_rank: None,
            may_have_card: false,
            mesh: None,
            output: Arc::default(),
        }
    }
}

impl Team {
    /// The ranks of a role that is only planned: no other rank is waited for.
    pub fn planned(role: &Role) -> Team {
        match role {
            Role::Alone => Team::default(),
            Role::Launcher(ranks) => {
                Team { ranks: ranks.get(), local: ranks.get(), local_rank: Some(0), ..Team::default() }
            }
            Role::Rank(place) => Team::at(place),
        }
    }

    fn at(place: &Place) -> Team {
        let may_have_card = std::env::var_os(LAUNCHED).is_none();
        let (ranks, local, local_rank) = (place.ranks, place.local.unwrap_or(1), place.local_rank);
        Team { ranks, local, local_rank, may_have_card, ..Team::default() }
    }

    /// Meets the other ranks.
    ///
    /// # Errors
    /// If they do not connect, or belong to another run.
    pub fn meet(place: &Place, ui: &Ui) -> anyhow::Result<Team> {
        if std::env::var_os(LAUNCHED).is_some() {
            end_with_launcher()?;
        }
        let mut patience = Patience::default();
        if let Ok(text) = std::env::var(TIMEOUT) {
            let Some(seconds) = text.trim().parse().ok().filter(|seconds| *seconds > 0) else {
                let message = format!("{TIMEOUT}: {text} is not a number of seconds");
                return Err(Failure::usage(message, "give a whole number: SUASION_RANK_TIMEOUT=600").into());
            };
            patience.start = Duration::from_secs(seconds);
        }
        let output: Arc<Mutex<Option<PathBuf>>> = Arc::default();
        let (of_thread, ui) = (Arc::clone(&output), ui.clone());
        // Started now: when a rank is lost, the system may refuse a thread.
        let (lost, losses) = mpsc::channel::<String>();
        start_thread(move || {
            let Ok(message) = losses.recv() else { return };
            // The main thread may be in a step of minutes. Files are always either complete or temporary.
            std::thread::sleep(GRACE);
            let newest = of_thread.lock().ok().and_then(|dir| checkpoint::newest(dir.as_deref()?));
            let help = after_loss(newest.as_deref());
            let exit = ui.report(&Failure::run_time("E-RANK", message, help).into());
            std::process::exit(exit as i32);
        })?;
        let on_loss = move |message: &str| drop(lost.send(message.to_string()));
        let mesh = Mesh::connect(place, patience, interrupt::flag(), Box::new(on_loss))?;
        Ok(Team { mesh: Some(Arc::new(mesh)), output, ..Team::at(place) })
    }

    /// The folder that the run writes to.
    pub fn writes_to(&self, dir: &Path) {
        if let Ok(mut output) = self.output.lock() {
            *output = Some(dir.to_path_buf());
        }
    }

    /// True on the rank that writes and prints.
    pub fn is_first(&self) -> bool {
        self.collective().rank() == 0
    }

    /// The ranks, for the run.
    pub fn collective(&self) -> &dyn Collective {
        match &self.mesh {
            Some(mesh) => &**mesh,
            None => &SingleRank,
        }
    }

    /// Leaves the other ranks: after its part is done, or with its error.
    pub fn leave(&self, result: &anyhow::Result<Exit>) {
        match (&self.mesh, result) {
            (None, _) => {}
            (Some(mesh), Ok(Exit::Done)) => mesh.finish(),
            (Some(mesh), Ok(_)) => mesh.fail("its checks failed"),
            (Some(mesh), Err(error)) => mesh.fail(&error.to_string()),
        }
    }
}

/// The note of a rank that does not run `command`, which does not share its work: only the first rank does. `None` if this process runs
/// it. Slurm tasks may have different work each, so they are refused.
///
/// # Errors
/// For another task of Slurm than the first.
pub fn leave_to_first(command: &str) -> anyhow::Result<Option<String>> {
    let variable = |name: &str| std::env::var(name).ok();
    // Contradictory variables are an error of `train` only.
    let Ok(Some(Numbered { rank: rank @ 1.., ranks, slurm })) = Numbered::of(&variable) else {
        return Ok(None);
    };
    if slurm {
        let message =
            format!("{command} runs in one process, and this is task {rank} of {ranks} (SLURM_PROCID)");
        let help = format!(
            "only train shares its work; `srun --ntasks 1 suasion {command}` starts one process, and where each task has work of \
             its own, `env -u SLURM_PROCID suasion {command}` does it"
        );
        return Err(Failure::usage(message, help).into());
    }
    Ok(Some(format!(
        "note: {command} runs in one process: rank {rank} of {ranks} leaves it to rank 0 (where each rank has work of its own, unset \
         RANK and WORLD_SIZE)"
    )))
}

/// Stops the run when its launcher closes this process's stdin: it was stopped, or has ended.
fn end_with_launcher() -> std::io::Result<()> {
    let wait = || {
        let mut rest = Vec::new();
        let _ = std::io::stdin().lock().read_to_end(&mut rest);
        interrupt::stop();
    };
    start_thread(wait).map(drop)
}

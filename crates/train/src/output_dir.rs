//! What a run writes to its output folder, and whether it may.

use crate::checkpoint::{self, METRICS, SAVED_CONFIG, STATE, TRAINER_STATE, is_begun};
use crate::model_files::ModelFiles;
use crate::report::{CARD, CARD_BESIDE, REPORT, is_card};
use crate::run::Resume;
use crate::{Error, Result, tensorboard};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use suasion_engine::{ADAPTER_CONFIG, ADAPTER_WEIGHTS};
use suasion_files::{LOCK, Lock, TEMPORARY, can_write, remove_folder, remove_leftovers};

/// The default folder of TensorBoard event files in an output folder; each run has its own folder in it.
pub const EVENTS: &str = "runs";

/// Locks the output folder for this process. The folder must exist.
///
/// # Errors
/// [`Error::Locked`] where another process has it.
pub fn lock(dir: &Path) -> Result<Lock> {
    Ok(Lock::folder(dir)?)
}

/// Refuses an output folder that cannot be written to; one that is not empty, unless the run resumes there or may
/// overwrite it; and one that holds files of a run's names that no run wrote.
pub fn check_output_dir(dir: &Path, resume: &Resume, overwrite: bool) -> Result<()> {
    can_write(dir)?;
    let resumes_here = match resume {
        Resume::No => false,
        Resume::Newest => true,
        // The folder itself, or a checkpoint in it.
        Resume::From(from) => match (from.canonicalize(), dir.canonicalize()) {
            (Ok(from), Ok(dir)) => from == dir || from.parent() == Some(&dir),
            _ => false,
        },
    };
    if resumes_here {
        return Ok(());
    }
    let names = names(dir)?;
    if !overwrite {
        return if names.is_empty() { Ok(()) } else { Err(Error::OutputNotEmpty { dir: dir.to_path_buf() }) };
    }
    let foreign = |name: &String| {
        // A checkpoint folder would be replaced entirely.
        let place = dir.join(name);
        let other =
            checkpoint::step_of(&place).is_some() && !place.join(STATE).is_file() && !is_empty(&place);
        other || is_written(name) && !is_begun(dir)
    };
    match names.into_iter().find(foreign) {
        Some(name) => Err(Error::Foreign { dir: dir.to_path_buf(), name }),
        None => Ok(()),
    }
}

/// The names in a folder, sorted, without locks and leftovers; none if there is no folder.
fn names(dir: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|error| Error::io(dir, error))?,
    };
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> =
        names.filter(|name| !name.starts_with(TEMPORARY) && !name.starts_with(LOCK)).collect();
    names.sort();
    Ok(names)
}

/// True for the names of files that a run writes, except the model card's, which other programs use too.
fn is_written(name: &str) -> bool {
    let shard = |name: &str| {
        let parts = name.strip_prefix("model-")?.strip_suffix(".safetensors")?.split_once("-of-")?;
        Some([parts.0, parts.1].iter().all(|part| part.bytes().all(|b| b.is_ascii_digit())))
    };
    [SAVED_CONFIG, METRICS, TRAINER_STATE, REPORT, CARD_BESIDE].contains(&name)
        || ["model.safetensors", "model.safetensors.index.json", "prompt_check.json"].contains(&name)
        || [ADAPTER_WEIGHTS, ADAPTER_CONFIG].contains(&name)
        || ModelFiles::NAMES.contains(&name)
        || shard(name).unwrap_or(false)
}

fn is_empty(dir: &Path) -> bool {
    fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none())
}

/// True if a run that writes to `dir` would replace or remove `file`.
pub fn replaces(dir: &Path, file: &Path) -> bool {
    let (Ok(dir), Ok(file)) = (dir.canonicalize(), file.canonicalize()) else { return false };
    let Ok(inside) = file.strip_prefix(&dir) else { return false };
    let mut parts = inside.components().map(|part| part.as_os_str().to_string_lossy().into_owned());
    match (parts.next(), parts.next()) {
        (Some(name), None) => is_written(&name) || name == CARD,
        (Some(folder), Some(_)) => checkpoint::step_of(Path::new(&folder)).is_some(),
        _ => false,
    }
}

/// Creates the folder, and removes what killed processes left in it.
pub(crate) fn prepare(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).map_err(|source| Error::io(dir, source))?;
    remove_leftovers(dir);
    Ok(())
}

/// Removes the files of an earlier run, so that none is mistaken for this run's. Other files stay.
pub(crate) fn clear(dir: &Path) -> Result<()> {
    if !is_begun(dir) {
        return Ok(());
    }
    let ours = |(_, path): &(u64, PathBuf)| path.join(STATE).exists();
    for (_, checkpoint) in checkpoint::list(dir).into_iter().filter(ours) {
        remove_folder(&checkpoint)?;
    }
    tensorboard::remove(&dir.join(EVENTS))?;
    // The configuration last: the folder counts as a run's until nothing else of it is left.
    let mut names: Vec<String> = names(dir)?.into_iter().filter(|name| is_written(name)).collect();
    names.sort_by_key(|name| name == SAVED_CONFIG);
    for name in names {
        let path = dir.join(name);
        fs::remove_file(&path).map_err(|error| Error::io(&path, error))?;
    }
    let card = dir.join(CARD);
    if is_card(&card) {
        fs::remove_file(&card).map_err(|error| Error::io(&card, error))?;
    }
    Ok(())
}

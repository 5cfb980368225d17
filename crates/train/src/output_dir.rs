//! Checks and prepares the output folder before a run writes to it.

use crate::checkpoint::{self, METRICS, STATE, TRAINER_STATE};
use crate::run::Resume;
use crate::{Error, Result};
use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use suasion_files::remove_leftovers;

/// Refuses an output folder that is not empty, unless the run resumes there or may overwrite it.
pub fn check_output_dir(dir: &Path, resume: &Resume, overwrite: bool) -> Result<()> {
    let resumes_here = match resume {
        Resume::No => false,
        Resume::Newest => true,
        // The folder itself, or a checkpoint in it.
        Resume::From(from) => match (from.canonicalize(), dir.canonicalize()) {
            (Ok(from), Ok(dir)) => from == dir || from.parent() == Some(&dir),
            _ => false,
        },
    };
    if overwrite || resumes_here {
        return Ok(());
    }
    match fs::read_dir(dir).map(|mut entries| entries.next().is_none()) {
        Ok(false) => Err(Error::OutputNotEmpty { dir: dir.to_path_buf() }),
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io(dir, error)),
        _ => Ok(()),
    }
}

/// Creates the folder and removes what killed processes left in it; with `clear` also the checkpoints,
/// metrics and reports of an earlier run, so that none of them is mistaken for this run's.
pub(crate) fn prepare(dir: &Path, clear: bool) -> Result<()> {
    fs::create_dir_all(dir).map_err(|source| Error::io(dir, source))?;
    remove_leftovers(dir);
    if !clear {
        return Ok(());
    }
    for (_, checkpoint) in checkpoint::list(dir) {
        if checkpoint.join(STATE).exists() {
            fs::remove_dir_all(&checkpoint).map_err(|source| Error::io(&checkpoint, source))?;
        }
    }
    for name in [METRICS, TRAINER_STATE, "report.html", "README.md"] {
        match fs::remove_file(dir.join(name)) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(Error::io(dir.join(name), error));
            }
            _ => {}
        }
    }
    Ok(())
}

//! `checkpoint-N/`: everything that an exact resume needs. The folder appears only when it is complete.

use crate::error::CheckpointFault;
use crate::json::pretty;
use crate::metrics::{self, Record};
use crate::model_files::ModelFiles;
use crate::run::Resume;
use crate::state::{FORMAT, RunState};
use crate::{Error, Result};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use suasion_engine::{Backend, Model, WeightType};
use suasion_files::{NewFolder, sizes};

/// File of the run's state.
pub const STATE: &str = "suasion_state.json";
/// File of AdamW's moments.
pub const OPTIMIZER: &str = "optimizer.safetensors";
/// File of the state in the Trainer's form.
pub const TRAINER_STATE: &str = "trainer_state.json";
/// File of the metrics so far.
pub const METRICS: &str = "metrics.jsonl";

/// The folder of the checkpoint of a step.
pub fn path_of(output_dir: &Path, step: u64) -> PathBuf {
    output_dir.join(format!("checkpoint-{step}"))
}

/// The `checkpoint-N` folders of an output folder, by step.
pub fn list(output_dir: &Path) -> Vec<(u64, PathBuf)> {
    let Ok(entries) = fs::read_dir(output_dir) else { return Vec::new() };
    let mut found: Vec<(u64, PathBuf)> = entries
        .flatten()
        .filter_map(|entry| {
            let step = entry.file_name().to_str()?.strip_prefix("checkpoint-")?.parse().ok()?;
            entry.path().is_dir().then(|| (step, entry.path()))
        })
        .collect();
    found.sort();
    found
}

/// Reads a checkpoint's state, and checks that each of its files exists with the size it was written with.
pub fn read(dir: &Path) -> Result<RunState> {
    let broken = |fault| Error::Checkpoint { dir: dir.to_path_buf(), fault };
    let text = match fs::read(dir.join(STATE)) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(broken(CheckpointFault::NoState(STATE)));
        }
        Err(source) => return Err(Error::io(dir.join(STATE), source)),
    };
    let unreadable = |source| broken(CheckpointFault::State { file: STATE, source });
    // The version first: another version's state may have other fields.
    let state: Value = serde_json::from_slice(&text).map_err(unreadable)?;
    let found = state.get("format").and_then(Value::as_u64);
    if found != Some(u64::from(FORMAT)) {
        return Err(broken(CheckpointFault::Format { file: STATE, found, expected: FORMAT }));
    }
    let state: RunState = serde_json::from_value(state).map_err(unreadable)?;
    for (name, size) in &state.files {
        let file = name.clone();
        match fs::metadata(dir.join(name)) {
            Ok(meta) if meta.len() == *size => {}
            Ok(meta) => {
                return Err(broken(CheckpointFault::Size { file, bytes: meta.len(), expected: *size }));
            }
            Err(_) => return Err(broken(CheckpointFault::Missing(file))),
        }
    }
    Ok(state)
}

/// The checkpoint that a resume continues, its state, and why newer ones are not usable.
pub(crate) fn find(resume: &Resume, output_dir: &Path) -> Result<Option<(PathBuf, RunState, Vec<Error>)>> {
    let within = match resume {
        Resume::No => return Ok(None),
        Resume::From(dir) if dir.join(STATE).exists() || list(dir).is_empty() && dir.is_dir() => {
            return read(dir).map(|state| Some((dir.clone(), state, Vec::new())));
        }
        Resume::From(dir) => dir,
        Resume::Newest => output_dir,
    };
    let mut skipped = Vec::new();
    for (_, dir) in list(within).into_iter().rev() {
        match read(&dir) {
            Ok(state) => return Ok(Some((dir, state, skipped))),
            Err(error) => skipped.push(error),
        }
    }
    Err(Error::NoCheckpoint { dir: within.to_path_buf(), skipped })
}

/// The checkpoint folder that a resume would continue; `None` for a new run.
pub fn locate(resume: &Resume, output_dir: &Path) -> Result<Option<PathBuf>> {
    Ok(find(resume, output_dir)?.map(|(dir, ..)| dir))
}

/// The metrics of the steps up to a checkpoint.
pub(crate) fn records(dir: &Path) -> Result<Vec<Record>> {
    metrics::read(&dir.join(METRICS))
}

/// The contents of a checkpoint beside the weights and the moments.
pub(crate) struct Contents<'a> {
    pub state: &'a mut RunState,
    pub files: &'a ModelFiles,
    pub metrics: &'a str,
    pub trainer_state: &'a Value,
}

/// Writes `checkpoint-N`, where N is the state's step.
pub(crate) fn write<B: Backend>(
    output_dir: &Path,
    model: &Model<B>,
    contents: Contents<'_>,
) -> Result<PathBuf> {
    let Contents { state, files: model_files, metrics, trainer_state } = contents;
    let place = path_of(output_dir, state.progress.step);
    let dir = NewFolder::create(&place)?;
    let put = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, bytes).map_err(|source| Error::io(path, source))
    };
    // In f32, so that a resume continues exactly.
    model.save_masters(dir.path())?;
    model.save_optimizer(&dir.path().join(OPTIMIZER))?;
    for file in &model_files.beside(WeightType::F32, model.architecture().head.tied).files {
        put(&file.name, &file.bytes)?;
    }
    put(METRICS, metrics.as_bytes())?;
    put(TRAINER_STATE, &pretty(trainer_state))?;
    state.files = sizes(dir.path())?.into_iter().collect();
    put(STATE, &pretty(state))?;
    dir.commit()?;
    Ok(place)
}

/// Removes the oldest checkpoints beyond `limit`, but never the newest and never that of step `best`. Only
/// folders that hold a run's state are counted or removed.
pub(crate) fn prune(output_dir: &Path, limit: usize, newest: u64, best: Option<u64>) -> Result<Vec<PathBuf>> {
    let ours: Vec<(u64, PathBuf)> =
        list(output_dir).into_iter().filter(|(_, dir)| dir.join(STATE).exists()).collect();
    let excess = ours.len().saturating_sub(limit);
    let removable = ours.into_iter().filter(|(step, _)| *step != newest && Some(*step) != best);
    let removed: Vec<PathBuf> = removable.take(excess).map(|(_, dir)| dir).collect();
    for dir in &removed {
        fs::remove_dir_all(dir).map_err(|source| Error::io(dir, source))?;
    }
    Ok(removed)
}

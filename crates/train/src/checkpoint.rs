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
use suasion_engine::{ADAPTER_WEIGHTS, Backend, Collective, Model, WeightType};
use suasion_files::{NewFolder, Written, remove_folder, sizes};

/// File of the run's state.
pub const STATE: &str = "suasion_state.json";
/// File of AdamW's moments.
pub const OPTIMIZER: &str = "optimizer.safetensors";

/// The average of the weights, of a run that keeps one.
pub const AVERAGE: &str = "average.safetensors";
/// File of the state in the Trainer's form.
pub const TRAINER_STATE: &str = "trainer_state.json";
/// File of the metrics so far.
pub const METRICS: &str = "metrics.jsonl";

/// Name of the resolved configuration in a run's folder. It is the first file that a run writes.
pub const SAVED_CONFIG: &str = "suasion.yaml";

/// The folder of the checkpoint of a step.
pub fn path_of(output_dir: &Path, step: u64) -> PathBuf {
    output_dir.join(format!("checkpoint-{step}"))
}

/// The step that a folder's name says it is the checkpoint of.
pub(crate) fn step_of(dir: &Path) -> Option<u64> {
    dir.file_name()?.to_str()?.strip_prefix("checkpoint-")?.parse().ok()
}

/// The `checkpoint-N` folders of an output folder, by step.
pub fn list(output_dir: &Path) -> Vec<(u64, PathBuf)> {
    let Ok(entries) = fs::read_dir(output_dir) else { return Vec::new() };
    let mut found: Vec<(u64, PathBuf)> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter_map(|path| Some((step_of(&path).filter(|_| path.is_dir())?, path)))
        .collect();
    found.sort();
    found
}

/// Reads a checkpoint's state, and checks that it and each of its files are as they were written.
pub fn read(dir: &Path) -> Result<RunState> {
    let broken = |fault| Error::Checkpoint { dir: dir.to_path_buf(), fault, older: None };
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
    if state.sum() != state.checksum {
        return Err(broken(CheckpointFault::Contents(STATE.into())));
    }
    if !state.resumable {
        return Err(broken(CheckpointFault::ModelOnly));
    }
    for (name, written) in &state.files {
        let (file, path) = (name.clone(), dir.join(name));
        if !suasion_files::is_plain_name(name) {
            return Err(broken(CheckpointFault::Outside(file)));
        }
        match fs::metadata(&path) {
            Ok(meta) if meta.len() == written.bytes => {}
            Ok(meta) => {
                return Err(broken(CheckpointFault::Size {
                    file,
                    bytes: meta.len(),
                    expected: written.bytes,
                }));
            }
            Err(_) => return Err(broken(CheckpointFault::Missing(file))),
        }
        if Written::of(&path)? != *written {
            return Err(broken(CheckpointFault::Contents(file)));
        }
    }
    Ok(state)
}

/// A checkpoint whose files are all as they were written.
#[derive(Debug)]
pub struct Located {
    /// Its folder.
    pub dir: PathBuf,
    pub(crate) state: RunState,
    /// Why newer ones are not usable.
    pub(crate) skipped: Vec<Error>,
}

/// The checkpoint that a resume continues, read and verified. `None` for a new run, and for
/// one that was begun and has no checkpoint yet: it starts again.
pub fn locate(resume: &Resume, output_dir: &Path) -> Result<Option<Located>> {
    let within = match resume {
        Resume::No => return Ok(None),
        Resume::From(dir) if dir.join(STATE).exists() || step_of(dir).is_some() => {
            let state = read(dir).map_err(|error| error.with_older(older(dir)))?;
            return Ok(Some(Located { dir: dir.clone(), state, skipped: Vec::new() }));
        }
        Resume::From(dir) => dir,
        Resume::Newest => output_dir,
    };
    let all = list(within);
    if all.is_empty() && is_begun(within) && !is_finished(within) {
        return Ok(None);
    }
    let mut skipped = Vec::new();
    for (_, dir) in all.into_iter().rev() {
        match read(&dir) {
            Ok(state) => return Ok(Some(Located { dir, state, skipped })),
            Err(error) => skipped.push(error),
        }
    }
    Err(Error::NoCheckpoint { dir: within.to_path_buf(), skipped })
}

/// True for a folder in which a run was begun and has left something.
pub(crate) fn is_begun(dir: &Path) -> bool {
    dir.join(SAVED_CONFIG).is_file()
        || metrics::read(&dir.join(METRICS)).is_ok()
        || list(dir).iter().any(|(_, path)| path.join(STATE).is_file())
}

/// True for a folder that holds the final model of a run.
pub(crate) fn is_finished(dir: &Path) -> bool {
    ["model.safetensors", "model.safetensors.index.json", ADAPTER_WEIGHTS]
        .iter()
        .any(|name| dir.join(name).is_file())
}

/// The newest checkpoint of an output folder that can be used.
pub fn newest(output_dir: &Path) -> Option<PathBuf> {
    newest_before(output_dir, u64::MAX)
}

fn newest_before(output_dir: &Path, step: u64) -> Option<PathBuf> {
    let before = list(output_dir).into_iter().filter(|(at, _)| *at < step);
    before.map(|(_, path)| path).rfind(|path| read(path).is_ok())
}

/// The newest usable checkpoint before this one.
fn older(dir: &Path) -> Option<PathBuf> {
    let run = dir.parent().filter(|run| !run.as_os_str().is_empty()).unwrap_or(Path::new("."));
    newest_before(run, step_of(dir).unwrap_or(u64::MAX))
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
    /// Without what a resume needs, and in the type of the final model (`save_only_model`).
    pub only_model: bool,
    /// The ranks that have shares of the optimizer's state.
    pub collective: &'a dyn Collective,
}

/// Writes `checkpoint-N`, where N is the state's step, on the first rank. `before` is called when it is complete, and has
/// not its name yet.
pub(crate) fn write<B: Backend>(
    output_dir: &Path,
    model: &Model<B>,
    contents: Contents<'_>,
    before: impl FnOnce() -> Result<()>,
) -> Result<PathBuf> {
    let place = path_of(output_dir, contents.state.progress.step);
    let dir = NewFolder::create(&place)?;
    let temporary = dir.path().to_path_buf();
    // An error names the checkpoint, not the temporary folder.
    fill(dir, model, contents, before).map_err(|error| error.renamed(&temporary, &place))?;
    Ok(place)
}

fn fill<B: Backend>(
    dir: NewFolder,
    model: &Model<B>,
    contents: Contents<'_>,
    before: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let Contents { state, files: model_files, metrics, trainer_state, only_model, collective } = contents;
    let put = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, bytes).map_err(|source| Error::io(path, source))
    };
    state.resumable = !only_model;
    let kind = if only_model { model.weight_type() } else { WeightType::F32 };
    if only_model {
        model.save_run(dir.path(), false)?;
    } else {
        // In f32, so that a resume continues exactly.
        model.save_run(dir.path(), true)?;
        model.gather_optimizer(&dir.path().join(OPTIMIZER), collective)?;
        model.save_average(&dir.path().join(AVERAGE))?;
    }
    for file in
        &model_files.beside(kind, model.architecture().head.tied, model.architecture().vocab_size).files
    {
        put(&file.name, &file.bytes)?;
    }
    put(METRICS, metrics.as_bytes())?;
    put(TRAINER_STATE, &pretty(trainer_state))?;
    let sum = |(name, _): (String, u64)| Ok((name.clone(), Written::of(&dir.path().join(name))?));
    state.files = sizes(dir.path())?.into_iter().map(sum).collect::<Result<_>>()?;
    state.checksum = state.sum();
    put(STATE, &pretty(state))?;
    before()?;
    Ok(dir.commit()?)
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
        remove_folder(dir)?;
    }
    Ok(removed)
}

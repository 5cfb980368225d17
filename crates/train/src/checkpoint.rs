//! `checkpoint-N/`: everything that an exact resume needs, whole or not there.

use crate::metrics::{self, Record};
use crate::sampler::Sampler;
use crate::trainer::Identity;
use crate::{Error, Evaluation, Plan, Result, Scheduler, Settings};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use suasion_data::policy::Objective;
use suasion_engine::{Backend, Model};
use suasion_files::{NewFolder, sizes, write_bytes};

/// The run's state beside the weights.
pub const STATE: &str = "suasion_state.json";
/// AdamW's moments.
pub const OPTIMIZER: &str = "optimizer.safetensors";
/// The Trainer's own summary.
pub const TRAINER_STATE: &str = "trainer_state.json";
/// The lines of metrics so far.
pub const METRICS: &str = "metrics.jsonl";
/// Version of [`RunState`]; a checkpoint of another one is refused.
pub const FORMAT: u32 = 1;

/// A file to be written beside the weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutputFile {
    /// Its name, without folders.
    pub name: String,
    /// Its contents.
    pub bytes: Vec<u8>,
}

/// The files of a model folder that are not weights: they accompany every checkpoint, so that each of them is a
/// model that others can load.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelFiles {
    /// The files, in the order in which they were added.
    pub files: Vec<OutputFile>,
}

impl ModelFiles {
    /// What is copied from a model's folder where it exists.
    pub const NAMES: [&'static str; 12] = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "tokenizer.model",
    ];

    /// Reads the files of a model folder; those that it does not have are left out.
    pub fn from_dir(dir: &Path) -> Result<ModelFiles> {
        let mut files = ModelFiles::default();
        for name in ModelFiles::NAMES {
            let path = dir.join(name);
            match fs::read(&path) {
                Ok(bytes) => files.push(name, bytes),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(source) => return Err(Error::io(path, source)),
            }
        }
        Ok(files)
    }

    /// Adds a file, or replaces the one of that name. In `config.json` the weights' type becomes `float32`, because
    /// that is what is written beside it.
    pub fn push(&mut self, name: &str, bytes: Vec<u8>) {
        let bytes = if name == "config.json" { with_f32(bytes) } else { bytes };
        self.files.retain(|file| file.name != name);
        self.files.push(OutputFile { name: name.to_string(), bytes });
    }

    /// Writes them into a folder.
    pub fn write(&self, dir: &Path) -> Result<()> {
        for file in &self.files {
            write_bytes(dir.join(&file.name), &file.bytes)?;
        }
        Ok(())
    }
}

/// A configuration whose weights' type is float32; the same bytes where it is already, or names none.
fn with_f32(bytes: Vec<u8>) -> Vec<u8> {
    let Ok(Value::Object(mut config)) = serde_json::from_slice(&bytes) else { return bytes };
    let mut changed = false;
    for key in ["dtype", "torch_dtype"] {
        if let Some(value) = config.get_mut(key)
            && *value != "float32"
        {
            *value = Value::from("float32");
            changed = true;
        }
    }
    if changed {
        serde_json::to_vec_pretty(&config).expect("it was JSON") // keys keep their order
    } else {
        bytes
    }
}

/// Whether a run continues another one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Resume {
    /// A new run.
    #[default]
    No,
    /// The newest usable checkpoint of the output folder.
    Newest,
    /// This `checkpoint-N` folder; or a run's output folder, whose newest usable checkpoint is taken.
    From(PathBuf),
}

/// Where a run stands; written as `suasion_state.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunState {
    /// [`FORMAT`].
    pub format: u32,
    /// Version of the program that wrote it.
    pub suasion: String,
    /// What is learned: recorded so that no other objective continues here.
    pub objective: Objective,
    /// The data's fingerprint.
    pub data_fingerprint: String,
    /// Version of the rules that made the labels.
    pub masking_version: u32,
    /// Steps finished.
    pub step: u64,
    /// Steps that changed the weights (AdamW counts these).
    pub updates: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Steps that warm up.
    pub warmup_steps: u64,
    /// What an epoch draws from: the training rows, or the packs that they lie in.
    pub rows: u64,
    /// The epoch (from 0) and the next micro-batch in it. For readers: both follow from `step`.
    pub position: (u64, u64),
    /// The seed of the rows' order, resolved.
    pub data_seed: u64,
    /// The settings.
    pub settings: Settings,
    /// Tokens computed in training.
    pub tokens: u64,
    /// Targets learned.
    pub targets: u64,
    /// Sum of the steps' losses.
    pub loss_sum: f64,
    /// Steps without a target.
    pub skipped_steps: u64,
    /// Time spent in steps.
    pub seconds: f64,
    /// The last step after which the rows were evaluated.
    pub evaluated: Option<u64>,
    /// The lowest evaluation loss after the first step, and its step.
    pub best: Option<(u64, f64)>,
    /// The evaluation before the first step.
    pub before: Option<Evaluation>,
    /// The latest evaluation.
    pub latest: Option<Evaluation>,
    /// The evaluation of `best`.
    pub best_evaluation: Option<Evaluation>,
    /// Every other file of the checkpoint with its size.
    pub files: BTreeMap<String, u64>,
}

impl RunState {
    /// The state before the first step.
    pub(crate) fn new(settings: &Settings, identity: &Identity, plan: &Plan) -> RunState {
        RunState {
            format: FORMAT,
            suasion: env!("CARGO_PKG_VERSION").to_string(),
            objective: identity.objective,
            data_fingerprint: identity.data_fingerprint.clone(),
            masking_version: identity.masking_version,
            step: 0,
            updates: 0,
            total_steps: plan.total_steps,
            warmup_steps: plan.warmup_steps,
            rows: plan.packs.unwrap_or(plan.rows),
            position: (0, 0),
            data_seed: settings.data_seed(),
            settings: settings.clone(),
            tokens: 0,
            targets: 0,
            loss_sum: 0.0,
            skipped_steps: 0,
            seconds: 0.0,
            evaluated: None,
            best: None,
            before: None,
            latest: None,
            best_evaluation: None,
            files: BTreeMap::new(),
        }
    }

    /// Refuses to continue under another objective, over other data, or under settings with which the steps already
    /// made would have been others.
    ///
    /// What only watches may change: evaluation, logging, saving, and recomputation (it does not change a bit). The
    /// total may change under a constant schedule, because there no step knows it; under the others it sets every
    /// learning rate.
    pub(crate) fn check(&self, dir: &Path, now: &RunState) -> Result<()> {
        let dir = dir.to_path_buf();
        if self.objective != now.objective {
            return Err(Error::ResumeObjective { dir, was: self.objective, now: now.objective });
        }
        let data = [
            (
                "the labelling rules' version",
                self.masking_version.to_string(),
                now.masking_version.to_string(),
            ),
            ("the data's fingerprint", self.data_fingerprint.clone(), now.data_fingerprint.clone()),
            ("the number of training rows", self.rows.to_string(), now.rows.to_string()),
        ];
        if let Some((what, was, now)) = data.into_iter().find(|(_, was, now)| was != now) {
            return Err(Error::ResumeData { dir, what, was, now });
        }

        let (a, b) = (&self.settings, &now.settings);
        let mut differences = Vec::new();
        let mut same = |key: &str, was: String, is: String| {
            if was != is {
                differences.push(format!("{key}: was {was}, is {is}"));
            }
        };
        macro_rules! settings { ($($key:ident),*) => { $( same(stringify!($key), format!("{:?}", a.$key), format!("{:?}", b.$key)); )* } }
        settings!(
            per_device_train_batch_size,
            gradient_accumulation_steps,
            learning_rate,
            weight_decay,
            decay_all,
            adam_beta1,
            adam_beta2,
            adam_epsilon,
            max_grad_norm,
            seed,
            shuffle_dataset
        );
        same("data_seed", self.data_seed.to_string(), now.data_seed.to_string());
        same("lr_scheduler_type", a.lr_scheduler_type.to_string(), b.lr_scheduler_type.to_string());
        if a.lr_scheduler_type != Scheduler::Constant {
            same("warm-up steps", self.warmup_steps.to_string(), now.warmup_steps.to_string());
        }
        if !matches!(a.lr_scheduler_type, Scheduler::Constant | Scheduler::ConstantWithWarmup) {
            same("steps in all", self.total_steps.to_string(), now.total_steps.to_string());
        }
        if now.total_steps < self.step {
            differences.push(format!("the run has {} steps, and {} are made", now.total_steps, self.step));
        }
        if differences.is_empty() { Ok(()) } else { Err(Error::ResumeSettings { dir, differences }) }
    }
}

/// The folder of a checkpoint.
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

/// Reads a checkpoint's state and checks that its files are there in full length.
pub fn read(dir: &Path) -> Result<RunState> {
    let broken = |message: String| Error::Checkpoint { dir: dir.to_path_buf(), message };
    let text = match fs::read(dir.join(STATE)) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(broken(format!("not a checkpoint of suasion: it has no {STATE}")));
        }
        Err(source) => return Err(Error::io(dir.join(STATE), source)),
    };
    // The version first: another version's state may have other fields.
    let state: Value = serde_json::from_slice(&text).map_err(|error| broken(format!("{STATE}: {error}")))?;
    match state.get("format").and_then(Value::as_u64) {
        Some(format) if format == u64::from(FORMAT) => {}
        format => {
            let format = format.map_or("none".to_string(), |format| format.to_string());
            return Err(broken(format!("{STATE}: format {format}; this program reads format {FORMAT}")));
        }
    }
    let state: RunState =
        serde_json::from_value(state).map_err(|error| broken(format!("{STATE}: {error}")))?;
    for (name, size) in &state.files {
        match fs::metadata(dir.join(name)) {
            Ok(meta) if meta.len() == *size => {}
            Ok(meta) => return Err(broken(format!("{name} has {} bytes instead of {size}", meta.len()))),
            Err(_) => return Err(broken(format!("{name} is missing"))),
        }
    }
    Ok(state)
}

/// The checkpoint that a resume takes, its state, and why newer ones were passed over.
pub(crate) fn find(resume: &Resume, output_dir: &Path) -> Result<Option<(PathBuf, RunState, Vec<String>)>> {
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
            Err(error) => skipped.push(error.to_string()),
        }
    }
    Err(Error::NoCheckpoint { dir: within.to_path_buf(), skipped })
}

/// The checkpoint folder that a resume would take; `None` for a new run.
pub fn locate(resume: &Resume, output_dir: &Path) -> Result<Option<PathBuf>> {
    Ok(find(resume, output_dir)?.map(|(dir, ..)| dir))
}

/// The lines of metrics that belong to a checkpoint.
pub(crate) fn records(dir: &Path) -> Result<Vec<Record>> {
    metrics::read(&dir.join(METRICS))
}

/// What goes into a checkpoint beside the weights and the moments.
pub(crate) struct Contents<'a> {
    pub state: &'a mut RunState,
    pub files: &'a ModelFiles,
    pub metrics: &'a str,
    pub trainer_state: &'a Value,
}

/// Writes `checkpoint-N` of the state's step.
pub(crate) fn write<B: Backend>(
    output_dir: &Path,
    model: &Model<B>,
    contents: Contents<'_>,
) -> Result<PathBuf> {
    let Contents { state, files: model_files, metrics, trainer_state } = contents;
    let place = path_of(output_dir, state.step);
    let dir = NewFolder::create(&place)?;
    let put = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, bytes).map_err(|source| Error::io(path, source))
    };
    model.save_weights(dir.path())?;
    model.save_optimizer(&dir.path().join(OPTIMIZER))?;
    for file in &model_files.files {
        put(&file.name, &file.bytes)?;
    }
    put(METRICS, metrics.as_bytes())?;
    put(TRAINER_STATE, &pretty(trainer_state))?;
    state.files = sizes(dir.path())?.into_iter().collect();
    put(STATE, &pretty(state))?;
    dir.commit()?;
    Ok(place)
}

pub(crate) fn pretty(value: &impl Serialize) -> Vec<u8> {
    let mut text = serde_json::to_vec_pretty(value).expect("plain data");
    text.push(b'\n');
    text
}

/// Removes the oldest checkpoints beyond `limit`: never the newest, and never the one of step `best`. Only folders
/// that hold a run's state are counted or touched.
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

/// The Trainer's `trainer_state.json` (transformers' `TrainerState`).
pub(crate) fn trainer_state(
    state: &RunState,
    records: &[Record],
    sampler: &Sampler,
    parameters: u64,
    best: Option<&Path>,
) -> Value {
    let settings = &state.settings;
    let entry = |record: &Record| match record {
        Record::Step(step) => serde_json::json!({
            "epoch": step.epoch, "grad_norm": step.grad_norm, "learning_rate": step.learning_rate,
            "loss": step.loss, "step": step.step,
        }),
        Record::Eval(eval) => serde_json::json!({
            "epoch": sampler.epoch(eval.step), "eval_loss": eval.eval_loss, "step": eval.step,
        }),
    };
    let epochs = match settings.max_steps {
        Some(steps) => steps.div_ceil(sampler.steps_per_epoch()),
        None => settings.num_train_epochs.ceil() as u64,
    };
    serde_json::json!({
        "best_global_step": state.best.map(|(step, _)| step),
        "best_metric": state.best.map(|(_, loss)| loss),
        "best_model_checkpoint": best,
        "epoch": sampler.epoch(state.step),
        "eval_steps": settings.eval_steps(),
        "global_step": state.step,
        "is_hyper_param_search": false,
        "is_local_process_zero": true,
        "is_world_process_zero": true,
        "log_history": records.iter().map(entry).collect::<Vec<_>>(),
        "logging_steps": settings.logging_steps,
        "max_steps": state.total_steps,
        "num_input_tokens_seen": state.tokens,
        "num_train_epochs": epochs,
        "save_steps": settings.save_steps,
        "stateful_callbacks": {},
        // The usual estimate: forward and backward cost 6 operations per parameter and token.
        "total_flos": 6.0 * parameters as f64 * state.tokens as f64,
        "train_batch_size": settings.per_device_train_batch_size,
        "trial_name": null,
        "trial_params": null,
    })
}

//! The crate's one error type.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use suasion_data::{Objective, RowId};

/// What can go wrong between samples and a trained model.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or folder could not be read or written (a full disk is one of these).
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The underlying I/O error.
        source: std::io::Error,
    },
    /// The system refused a thread.
    #[error("{0}")]
    Thread(#[source] std::io::Error),
    /// An error of the engine.
    #[error(transparent)]
    Engine(#[from] suasion_engine::Error),
    /// A setting whose value cannot work, alone or together with another one.
    #[error("{key}: {value} {problem}")]
    Setting {
        /// The configuration key.
        key: &'static str,
        /// Its value.
        value: String,
        /// Why it cannot work; follows the value.
        problem: String,
        /// What to do.
        help: String,
    },
    /// There is nothing to learn from or to measure on.
    #[error("{}", no_targets(*rows, what))]
    NoTargets {
        /// The rows that were looked at.
        rows: usize,
        /// What they are: `training rows`.
        what: &'static str,
    },
    /// A micro-batch has more tokens than a batch can index (2³² − 1).
    #[error("{key}: a batch of {tokens} tokens is larger than the engine's limit of {}", u32::MAX)]
    BatchTooLarge {
        /// The configuration key of the batch size.
        key: &'static str,
        /// Tokens of the largest batch.
        tokens: usize,
    },
    /// A row holds a token id that the model has no embedding for.
    #[error("{id}: token id {token} at position {position} is outside the model's vocabulary of {vocab}")]
    Vocabulary {
        /// The row.
        id: RowId,
        /// The token id.
        token: i64,
        /// Its position in the row.
        position: usize,
        /// The model's vocabulary.
        vocab: usize,
    },
    /// A row is longer than the model's learned positions.
    #[error("{id}: {tokens} tokens, but the model has {limit} learned positions")]
    TooLong {
        /// The row.
        id: RowId,
        /// Its tokens.
        tokens: usize,
        /// The model's positions.
        limit: usize,
    },
    /// The output folder is not empty, and the run neither resumes nor overwrites.
    #[error("{}: the output folder is not empty", dir.display())]
    OutputNotEmpty {
        /// The folder.
        dir: PathBuf,
    },
    /// The output folder holds a file that no run of suasion wrote and this run would replace.
    #[error("{}: {} would be replaced, and no run of suasion wrote it", dir.display(), name)]
    Foreign {
        /// The folder.
        dir: PathBuf,
        /// The file.
        name: String,
    },
    /// The run would replace what it reads.
    #[error("{}: the run reads it, and would replace it: output_dir is {}", input.display(), dir.display())]
    ReplacesInput {
        /// The file.
        input: PathBuf,
        /// The output folder.
        dir: PathBuf,
    },
    /// Another process writes to the output folder.
    #[error(transparent)]
    Locked(suasion_files::LockError),
    /// There is no checkpoint to resume from.
    #[error("{}: no checkpoint to resume from{}", dir.display(), unusable(skipped))]
    NoCheckpoint {
        /// The folder that was searched.
        dir: PathBuf,
        /// Why each checkpoint folder in it is not usable.
        skipped: Vec<Error>,
    },
    /// A checkpoint folder is incomplete, damaged or of another program.
    #[error("{}: {fault}", dir.display())]
    Checkpoint {
        /// The folder.
        dir: PathBuf,
        /// What is wrong with it.
        fault: CheckpointFault,
        /// The newest usable checkpoint before it.
        older: Option<PathBuf>,
    },
    /// The checkpoint is of a run with another objective.
    #[error("{}: trained on {}, but this run trains on {}", dir.display(), objective(*was), objective(*now))]
    ResumeObjective {
        /// The checkpoint.
        dir: PathBuf,
        /// The checkpoint's objective.
        was: Objective,
        /// This run's objective.
        now: Objective,
    },
    /// The checkpoint is of a run over other data, or over data labelled by other rules.
    #[error("{}: trained on other data: {what} was {was}, is {now}", dir.display())]
    ResumeData {
        /// The checkpoint.
        dir: PathBuf,
        /// What differs.
        what: &'static str,
        /// The checkpoint's value.
        was: String,
        /// This run's value.
        now: String,
    },
    /// The checkpoint is of a run whose settings lead to other weights.
    #[error("{}: settings that change the result differ: {}", dir.display(), differences.join("; "))]
    ResumeSettings {
        /// The checkpoint.
        dir: PathBuf,
        /// `key: was a, is b` for each.
        differences: Vec<String>,
    },
    /// A loss or gradient norm is not a finite number. The weights were not updated.
    #[error("{}{what} is {value}{}", at(*step, *evaluation), listed(rows))]
    NonFinite {
        /// The step (counted from 1) being computed, or the last one before the evaluation; `None` outside
        /// training.
        step: Option<u64>,
        /// True if an evaluation met it, not a step.
        evaluation: bool,
        /// What is not finite.
        what: &'static str,
        /// Its value (NaN or an infinity).
        value: f64,
        /// The rows that cause it: those whose own loss is not finite, or else all rows of the step.
        rows: Vec<RowId>,
        /// The newest checkpoint of the run, written before this step.
        checkpoint: Option<PathBuf>,
    },
    /// The ranks of a run did not find each other, or one of them was lost.
    #[error("{message}")]
    Rank {
        /// What happened, with the rank.
        message: String,
        /// What to do.
        help: String,
    },
    /// The ranks of a run do not have the same.
    #[error("rank {rank} and rank 0 differ in {what}: {theirs} and {first}")]
    RankMismatch {
        /// What differs.
        what: String,
        /// The rank.
        rank: usize,
        /// What it has.
        theirs: String,
        /// What rank 0 has.
        first: String,
    },
    /// A prompt without a token has no distribution of next tokens.
    #[error("the prompt is empty: there is no token to continue from")]
    EmptyPrompt,
    /// A prompt holds a token id that the model has no embedding for.
    #[error(
        "token id {token} at position {position} of the prompt is outside the model's vocabulary of {vocab}"
    )]
    PromptVocabulary {
        /// The token id.
        token: u32,
        /// Its position in the prompt.
        position: usize,
        /// The model's vocabulary.
        vocab: usize,
    },
    /// A prompt is longer than the model's learned positions.
    #[error("the prompt has {tokens} tokens, but the model has {limit} learned positions")]
    PromptTooLong {
        /// Its tokens.
        tokens: usize,
        /// The model's positions.
        limit: usize,
    },
    /// The stop flag was raised while measuring; there is no result.
    #[error("interrupted")]
    Interrupted,
}

/// What is wrong with a checkpoint folder.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointFault {
    /// Its state file is missing.
    #[error("not a checkpoint of suasion: it has no {0}")]
    NoState(&'static str),
    /// Its state file cannot be parsed.
    #[error("{file}: {source}")]
    State {
        /// The state file.
        file: &'static str,
        /// The parser's error.
        source: serde_json::Error,
    },
    /// Another version of the program wrote it.
    #[error("{file}: format {}; this program reads format {expected}", found.map_or("none".into(), |f| f.to_string()))]
    Format {
        /// The state file.
        file: &'static str,
        /// Its format.
        found: Option<u64>,
        /// The format of this program.
        expected: u32,
    },
    /// It was saved with `save_only_model`.
    #[error("it holds the model alone (save_only_model), and no run can be resumed from it")]
    ModelOnly,
    /// One of the files that its state names is not in the folder by its name.
    #[error("its state names {0:?}, which is not a file of the folder")]
    Outside(String),
    /// One of its files is missing.
    #[error("{0} is missing")]
    Missing(String),
    /// One of its files is damaged.
    #[error("{0} is damaged: its checksum is not that with which it was written")]
    Contents(String),
    /// One of its files was cut or has grown.
    #[error("{file} has {bytes} bytes instead of {expected}")]
    Size {
        /// The file.
        file: String,
        /// Its size.
        bytes: u64,
        /// Its size when the checkpoint was written.
        expected: u64,
    },
}

/// The most rows that an error names; more would hide the message.
const SHOWN: usize = 8;

fn listed(rows: &[RowId]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let shown: Vec<String> = rows.iter().take(SHOWN).map(RowId::to_string).collect();
    let more = if rows.len() > SHOWN { format!(" and {} more", rows.len() - SHOWN) } else { String::new() };
    format!("; rows: {}{more}", shown.join(", "))
}

fn no_targets(rows: usize, what: &str) -> String {
    match rows {
        0 => format!("there are no {what}"),
        _ => format!("none of the {rows} {what} has a supervised token"),
    }
}

fn at(step: Option<u64>, evaluation: bool) -> String {
    match (step, evaluation) {
        (None, _) => String::new(),
        (Some(0), true) => "before the first step: ".into(),
        (Some(step), true) => format!("after step {step}: "),
        (Some(step), false) => format!("step {step}: "),
    }
}

fn unusable(skipped: &[Error]) -> String {
    let reasons: Vec<String> = skipped.iter().map(Error::to_string).collect();
    if reasons.is_empty() { String::new() } else { format!("; unusable: {}", reasons.join(", ")) }
}

/// What to do after the loss of a rank, where this is the newest checkpoint.
pub fn after_loss(newest: Option<&Path>) -> String {
    let again = "start all ranks again, with --resume; the number of ranks may be another";
    match newest {
        Some(path) => format!("the newest checkpoint is whole: {}; {again}", path.display()),
        None => "no checkpoint had been written: start all ranks again".into(),
    }
}

fn objective(objective: Objective) -> &'static str {
    match objective {
        Objective::ResponseOnly => "responses only (response_only)",
        Objective::AllTokens => "all tokens (all_tokens)",
    }
}

impl Error {
    pub(crate) fn io(path: impl AsRef<Path>, source: std::io::Error) -> Error {
        Error::Io { path: path.as_ref().to_path_buf(), source }
    }

    pub(crate) fn setting(
        key: &'static str,
        value: impl Display,
        problem: impl Into<String>,
        help: impl Into<String>,
    ) -> Error {
        Error::Setting { key, value: value.to_string(), problem: problem.into(), help: help.into() }
    }

    /// A setting outside its bounds, which follow "must be".
    pub(crate) fn out_of_bounds(key: &'static str, value: impl Display, bounds: &str) -> Error {
        Error::setting(key, value, "is not possible", format!("{key} must be {bounds}"))
    }

    /// A quantity that is not finite, in a computation that no run is part of ([`Error::at_step`]).
    pub(crate) fn non_finite(what: &'static str, value: f64, rows: Vec<RowId>) -> Error {
        Error::NonFinite { step: None, evaluation: false, what, value, rows, checkpoint: None }
    }

    /// Adds to [`Error::NonFinite`] the step being computed, or the last one before the evaluation.
    pub(crate) fn at_step(mut self, at: u64) -> Error {
        if let Error::NonFinite { step, .. } = &mut self {
            *step = Some(at);
        }
        self
    }

    /// Adds to [`Error::NonFinite`] and to the loss of a rank the newest checkpoint of the run.
    pub(crate) fn after_checkpoint(mut self, newest: Option<&Path>) -> Error {
        match &mut self {
            Error::NonFinite { checkpoint, .. } => *checkpoint = newest.map(Path::to_path_buf),
            Error::Engine(suasion_engine::Error::Collective { message }) => {
                let help = after_loss(newest);
                return Error::Rank { message: std::mem::take(message), help };
            }
            _ => {}
        }
        self
    }

    /// The same of a file under another folder.
    pub(crate) fn renamed(mut self, from: &Path, to: &Path) -> Error {
        if let Error::Io { path, .. } | Error::Engine(suasion_engine::Error::Io { path, .. }) = &mut self
            && let Ok(rest) = path.strip_prefix(from)
        {
            *path = to.join(rest);
        }
        self
    }

    /// Adds to [`Error::Checkpoint`] the newest usable checkpoint before it.
    pub(crate) fn with_older(mut self, found: Option<PathBuf>) -> Error {
        if let Error::Checkpoint { older, .. } = &mut self {
            *older = found;
        }
        self
    }

    /// True if a file could not be written or read.
    pub(crate) fn is_io(&self) -> bool {
        matches!(self, Error::Io { .. } | Error::Engine(suasion_engine::Error::Io { .. }))
    }

    /// The tag printed in `error[..]`.
    pub fn tag(&self) -> &'static str {
        match self {
            Error::Io { .. } => "E-IO",
            Error::Thread(_) => "E-MEMORY",
            Error::Engine(error) => error.tag(),
            Error::Setting { .. } | Error::BatchTooLarge { .. } => "E-CONFIG",
            Error::NoTargets { .. } => "E-DATA",
            Error::Vocabulary { .. } => "E-VOCAB",
            Error::TooLong { .. } => "E-LENGTH",
            Error::OutputNotEmpty { .. } | Error::Foreign { .. } | Error::ReplacesInput { .. } => "E-OUTPUT",
            Error::Locked(suasion_files::LockError::Held { .. }) => "E-LOCKED",
            Error::Locked(_) => "E-IO",
            Error::NoCheckpoint { .. } | Error::Checkpoint { .. } => "E-CHECKPOINT",
            Error::ResumeObjective { .. } | Error::ResumeData { .. } | Error::ResumeSettings { .. } => {
                "E-RESUME"
            }
            Error::NonFinite { .. } => "E-NAN",
            Error::Rank { .. } | Error::RankMismatch { .. } => "E-RANK",
            Error::EmptyPrompt | Error::PromptVocabulary { .. } | Error::PromptTooLong { .. } => "E-GENERATE",
            Error::Interrupted => "E-INTERRUPTED",
        }
    }

    /// True for errors of usage (exit 2), false for errors while running (exit 3).
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            Error::Setting { .. }
                | Error::BatchTooLarge { .. }
                | Error::OutputNotEmpty { .. }
                | Error::Foreign { .. }
                | Error::ReplacesInput { .. }
                | Error::NoCheckpoint { .. }
                | Error::RankMismatch { .. }
                | Error::ResumeObjective { .. }
                | Error::ResumeData { .. }
                | Error::ResumeSettings { .. }
        )
    }

    /// What to do about it, where that is known.
    pub fn help(&self) -> Option<String> {
        let help = match self {
            Error::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
                "free some space; finished checkpoints are intact, and --resume continues from the newest"
            }
            Error::Io { .. } | Error::Interrupted => return None,
            Error::Engine(error) => return error.help().map(str::to_string),
            Error::Setting { help, .. } => help,
            Error::NoTargets { .. } => {
                "`suasion verify` shows for every row which tokens are supervised and why"
            }
            Error::BatchTooLarge { key, .. } => {
                return Some(format!("lower {key}; gradient_accumulation_steps keeps a step as large"));
            }
            Error::Vocabulary { .. } => {
                "the rows were tokenised with another model's tokenizer; prepare them with this model's"
            }
            Error::TooLong { limit, .. } => return Some(format!("set max_length to {limit} or less")),
            Error::OutputNotEmpty { .. } => {
                "continue the run there with --resume, choose another output_dir, or replace an earlier run with \
                 overwrite_output_dir=true"
            }
            Error::Foreign { .. } => "choose another output_dir, or move the file away",
            Error::ReplacesInput { .. } => "choose another output_dir",
            Error::Locked(suasion_files::LockError::Held { .. }) => {
                "one process at a time writes to an output folder: wait for it, stop it, or choose another output_dir"
            }
            Error::Locked(_) => return None,
            Error::NoCheckpoint { skipped, .. } if skipped.is_empty() => {
                "start without --resume, or name a checkpoint-N folder; a finished run is replaced with \
                 overwrite_output_dir=true"
            }
            Error::NoCheckpoint { .. } => "start again without --resume, with overwrite_output_dir=true",
            Error::Checkpoint { older: Some(older), .. } => {
                return Some(format!("the checkpoint before it is whole: --resume {}", older.display()));
            }
            Error::Checkpoint { fault: CheckpointFault::ModelOnly, .. } => {
                "generate and eval can use it as a model; for a run that can be resumed, leave save_only_model out"
            }
            Error::Checkpoint { .. } => "resume from another checkpoint-N folder, or start again",
            Error::ResumeObjective { was: Objective::AllTokens, .. } => {
                "a model trained on all tokens has learned its prompts, and training it further on responses does not \
                 unlearn them: retrain from the base model, into a new output_dir"
            }
            Error::ResumeObjective { .. } => {
                "a run has one objective from its first step to its last: start from the base model, into a new \
                 output_dir"
            }
            Error::ResumeData { .. } => {
                "resume with the data, tokenizer and labelling settings of the checkpoint's run, go on with others by \
                 --extend, or start a new run in a new output_dir"
            }
            Error::ResumeSettings { .. } => {
                "resume with the checkpoint's settings (they are in its suasion_state.json); with --extend the run goes \
                 on under these, and is no exact continuation (a learning rate depends on the total of steps, unless \
                 the schedule is constant)"
            }
            Error::NonFinite { step, evaluation, checkpoint, .. } => {
                let kept = match (step, checkpoint) {
                    (None, _) => String::new(),
                    (_, Some(path)) => format!("the last good checkpoint is {}; ", path.display()),
                    (_, None) => "no checkpoint had been written; ".into(),
                };
                let advice = match (step, evaluation) {
                    (None | Some(0), _) => {
                        "look at the rows named, and at the weights: a model that has diverged gives such losses"
                    }
                    (_, true) => {
                        "the weights after this step are not usable; lower learning_rate, or clip with max_grad_norm"
                    }
                    (_, false) => {
                        "the weights were not updated; look at the rows named, lower learning_rate, or clip with \
                         max_grad_norm"
                    }
                };
                return Some(format!("{kept}{advice}"));
            }
            Error::Thread(_) => "raise the limits of the process (ulimit -u, ulimit -v)",
            Error::Rank { help, .. } => help,
            Error::RankMismatch { .. } => {
                "start all ranks with the same program, configuration, data and model; each rank reads its own copies"
            }
            Error::EmptyPrompt => "give a prompt of at least one token, or a tokenizer that adds a BOS",
            Error::PromptVocabulary { .. } => "tokenise the prompt with this model's tokenizer",
            Error::PromptTooLong { .. } => "shorten the prompt",
        };
        Some(help.to_string())
    }
}

impl From<suasion_files::LockError> for Error {
    fn from(error: suasion_files::LockError) -> Error {
        match error {
            suasion_files::LockError::File(error) => error.into(),
            held => Error::Locked(held),
        }
    }
}

impl From<suasion_files::Error> for Error {
    fn from(error: suasion_files::Error) -> Error {
        Error::Io { path: error.path, source: error.source }
    }
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

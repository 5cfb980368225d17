//! The crate's one error type.

use std::path::{Path, PathBuf};
use suasion_data::RowId;
use suasion_data::policy::Objective;

/// What can go wrong between samples and a trained model.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or folder could not be read or written (a full disk is one of these).
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's word.
        source: std::io::Error,
    },
    /// The engine's own error.
    #[error(transparent)]
    Engine(#[from] suasion_engine::Error),
    /// A setting that cannot work, or two that contradict each other.
    #[error("{key}: {message}")]
    Setting {
        /// The configuration key.
        key: &'static str,
        /// What is wrong, with the value.
        message: String,
        /// What to do.
        help: String,
    },
    /// There is nothing to learn from or to measure on.
    #[error("{message}")]
    NoTargets {
        /// What has no target.
        message: String,
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
    /// A row longer than the model's learned positions.
    #[error("{id}: {tokens} tokens, and the model has {limit} learned positions")]
    TooLong {
        /// The row.
        id: RowId,
        /// Its tokens.
        tokens: usize,
        /// The model's positions.
        limit: usize,
    },
    /// The output folder holds something and the run neither resumes nor overwrites.
    #[error("{}: the output folder is not empty", dir.display())]
    OutputNotEmpty {
        /// The folder.
        dir: PathBuf,
    },
    /// A resume was asked for, and there is no checkpoint to resume from.
    #[error("{}: no checkpoint to resume from{}", dir.display(), listed("; unusable: ", skipped))]
    NoCheckpoint {
        /// Where it was looked for.
        dir: PathBuf,
        /// Folders that look like checkpoints and are not usable, with the reason.
        skipped: Vec<String>,
    },
    /// A checkpoint folder that is incomplete or damaged.
    #[error("{}: {message}", dir.display())]
    Checkpoint {
        /// The folder.
        dir: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A checkpoint of a run with another objective.
    #[error("{}: trained on {}, and this run trains on {}", dir.display(), objective(*was), objective(*now))]
    ResumeObjective {
        /// The checkpoint.
        dir: PathBuf,
        /// The checkpoint's objective.
        was: Objective,
        /// This run's.
        now: Objective,
    },
    /// A checkpoint of a run over other data, or of data labelled by other rules.
    #[error("{}: trained on other data: {what} was {was}, is {now}", dir.display())]
    ResumeData {
        /// The checkpoint.
        dir: PathBuf,
        /// What differs.
        what: &'static str,
        /// The checkpoint's.
        was: String,
        /// This run's.
        now: String,
    },
    /// A checkpoint of a run whose settings would have led elsewhere.
    #[error("{}: settings that change the result differ: {}", dir.display(), differences.join("; "))]
    ResumeSettings {
        /// The checkpoint.
        dir: PathBuf,
        /// `key: was a, is b` for each.
        differences: Vec<String>,
    },
    /// A loss or gradient norm that is not a finite number. The weights were not updated.
    #[error("{}{what} is {value}{}", at(*step, *evaluation), rows_text(rows))]
    NonFinite {
        /// The step (counted from 1) that was being computed, or after which was evaluated; `None` outside training.
        step: Option<u64>,
        /// It was met in an evaluation, not in a step.
        evaluation: bool,
        /// What is not finite.
        what: &'static str,
        /// Its value (NaN or an infinity).
        value: f64,
        /// The rows that it comes from: those whose own loss is not finite, or else all rows of the step.
        rows: Vec<RowId>,
        /// The newest checkpoint of the run; it was written before this step.
        checkpoint: Option<PathBuf>,
    },
    /// Generation was asked for something impossible.
    #[error("{message}")]
    Generate {
        /// What is wrong.
        message: String,
    },
    /// The stop flag was raised while measuring; there is no result.
    #[error("interrupted")]
    Interrupted,
}

/// The rows that an error names; more would hide the message.
const SHOWN: usize = 8;

fn rows_text(rows: &[RowId]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let shown: Vec<String> = rows.iter().take(SHOWN).map(RowId::to_string).collect();
    let more = if rows.len() > SHOWN { format!(" and {} more", rows.len() - SHOWN) } else { String::new() };
    format!("; rows: {}{more}", shown.join(", "))
}

fn at(step: Option<u64>, evaluation: bool) -> String {
    match (step, evaluation) {
        (None, _) => String::new(),
        (Some(0), true) => "before the first step: ".into(),
        (Some(step), true) => format!("after step {step}: "),
        (Some(step), false) => format!("step {step}: "),
    }
}

fn listed(before: &str, items: &[String]) -> String {
    if items.is_empty() { String::new() } else { format!("{before}{}", items.join(", ")) }
}

pub(crate) fn objective(objective: Objective) -> &'static str {
    match objective {
        Objective::ResponseOnly => "responses only (response_only)",
        Objective::AllTokens => "all tokens (all_tokens)",
    }
}

impl Error {
    pub(crate) fn io(path: impl AsRef<Path>, source: std::io::Error) -> Error {
        Error::Io { path: path.as_ref().to_path_buf(), source }
    }

    pub(crate) fn setting(key: &'static str, message: impl Into<String>, help: impl Into<String>) -> Error {
        Error::Setting { key, message: message.into(), help: help.into() }
    }

    /// A quantity that is not finite, in a computation that no run is part of ([`Error::at_step`]).
    pub(crate) fn non_finite(what: &'static str, value: f64, rows: Vec<RowId>) -> Error {
        Error::NonFinite { step: None, evaluation: false, what, value, rows, checkpoint: None }
    }

    /// Adds to [`Error::NonFinite`] the step in which it was met, or after which was evaluated.
    pub(crate) fn at_step(mut self, at: u64) -> Error {
        if let Error::NonFinite { step, .. } = &mut self {
            *step = Some(at);
        }
        self
    }

    /// Adds to [`Error::NonFinite`] the newest checkpoint of the run.
    pub(crate) fn after_checkpoint(mut self, newest: Option<&Path>) -> Error {
        if let Error::NonFinite { checkpoint, .. } = &mut self {
            *checkpoint = newest.map(Path::to_path_buf);
        }
        self
    }

    /// The tag printed in `error[..]`.
    pub fn tag(&self) -> &'static str {
        match self {
            Error::Io { .. } => "E-IO",
            Error::Engine(error) => error.tag(),
            Error::Setting { .. } => "E-CONFIG",
            Error::NoTargets { .. } => "E-DATA",
            Error::Vocabulary { .. } => "E-VOCAB",
            Error::TooLong { .. } => "E-LENGTH",
            Error::OutputNotEmpty { .. } => "E-OUTPUT",
            Error::NoCheckpoint { .. } | Error::Checkpoint { .. } => "E-CHECKPOINT",
            Error::ResumeObjective { .. } | Error::ResumeData { .. } | Error::ResumeSettings { .. } => {
                "E-RESUME"
            }
            Error::NonFinite { .. } => "E-NAN",
            Error::Generate { .. } => "E-GENERATE",
            Error::Interrupted => "E-INTERRUPTED",
        }
    }

    /// True for what the user asked for wrongly (exit 2), false for what went wrong while running (exit 3).
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            Error::Setting { .. }
                | Error::OutputNotEmpty { .. }
                | Error::NoCheckpoint { .. }
                | Error::ResumeObjective { .. }
                | Error::ResumeData { .. }
                | Error::ResumeSettings { .. }
        )
    }

    /// What to do about it, where that is known.
    pub fn help(&self) -> Option<String> {
        Some(match self {
            Error::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
                "free some space; finished checkpoints are intact, and --resume continues from the newest".into()
            }
            Error::Io { .. } | Error::Interrupted => return None,
            Error::Generate { .. } => {
                "give a prompt of at least one token, and no longer than the model has positions".into()
            }
            Error::Engine(error) => return error.help().map(str::to_string),
            Error::Setting { help, .. } => help.clone(),
            Error::NoTargets { .. } => "`suasion verify` shows for every row which tokens are supervised and why".into(),
            Error::Vocabulary { .. } => {
                "the rows were tokenised with another model's tokenizer; prepare them with this model's".into()
            }
            Error::TooLong { limit, .. } => format!("set max_length to {limit} or less"),
            Error::OutputNotEmpty { .. } => {
                "continue the run there with --resume, or choose another output_dir".into()
            }
            Error::NoCheckpoint { .. } => "start without --resume, or name a checkpoint-N folder".into(),
            Error::Checkpoint { .. } => "resume from another checkpoint-N folder, or start again".into(),
            Error::ResumeObjective { was: Objective::AllTokens, .. } => {
                "a model trained on all tokens has learned its prompts, and training on responses from here on does \
                 not unlearn them: retrain from the base model, into a new output_dir"
                    .into()
            }
            Error::ResumeObjective { .. } => {
                "a run has one objective from its first step to its last: start from the base model, into a new \
                 output_dir"
                    .into()
            }
            Error::ResumeData { .. } => {
                "resume with the data, tokenizer and labelling settings of the checkpoint's run, or start a new run \
                 in a new output_dir"
                    .into()
            }
            Error::ResumeSettings { .. } => {
                "resume with the checkpoint's settings (its suasion_state.json holds them), or start a new run; more \
                 steps can be added only under a constant schedule, because under the others the total decides every \
                 step's learning rate"
                    .into()
            }
            Error::NonFinite { step, evaluation, checkpoint, .. } => {
                let kept = match (step, checkpoint) {
                    (None, _) => String::new(),
                    (_, Some(path)) => format!("the last good checkpoint is {}; ", path.display()),
                    (_, None) => "no checkpoint had been written; ".into(),
                };
                let advice = match (step, evaluation) {
                    (None | Some(0), _) => "look at the rows named, and at the weights: a model that diverged gives this",
                    (_, true) => "the weights after this step are not usable; lower learning_rate, or clip with max_grad_norm",
                    (_, false) => {
                        "the weights were not updated; look at the rows named, lower learning_rate, or clip \
                         with max_grad_norm"
                    }
                };
                format!("{kept}{advice}")
            }
        })
    }
}

impl From<suasion_files::Error> for Error {
    fn from(error: suasion_files::Error) -> Error {
        Error::Io { path: error.path, source: error.source }
    }
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

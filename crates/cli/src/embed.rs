//! What a program that embeds the command line (the Python package) uses besides [`crate::main_from`]: the
//! same keys, model folders, rows and errors.

use crate::config::{Config, Loaded, Paths};
use crate::failure::{Failure, Failures, Outcome};
use crate::inputs::{loading, model, rows, vocabulary};
use crate::ui::{ColorChoice, Ui};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};
use suasion_data::prepared::Manifest;
use suasion_data::tokens::Changes;
use suasion_data::{Code, ModelFolder, Policy};

/// An error as the command line prints it.
#[derive(Clone, Debug)]
pub struct Problem {
    /// The code in `error[..]`.
    pub tag: &'static str,
    /// What is wrong, with the operands.
    pub message: String,
    /// What to do.
    pub help: Option<String>,
}

impl From<anyhow::Error> for Problem {
    fn from(error: anyhow::Error) -> Problem {
        if let Some(Failures(failures)) = error.downcast_ref::<Failures>() {
            let tag = failures.first().map_or("E-CONFIG", |failure| failure.tag);
            let help: Vec<&str> = failures.iter().filter_map(|failure| failure.help.as_deref()).collect();
            return Problem { tag, message: error.to_string(), help: Some(help.join("\n")) };
        }
        let Outcome { tag, help, .. } = Outcome::of(&error);
        Problem { tag, message: error.to_string(), help }
    }
}

impl From<suasion_data::Error> for Problem {
    fn from(error: suasion_data::Error) -> Problem {
        anyhow::Error::from(error).into()
    }
}

impl From<Failure> for Problem {
    fn from(failure: Failure) -> Problem {
        anyhow::Error::from(failure).into()
    }
}

/// Keys of a command, resolved.
#[derive(Clone, Debug)]
pub struct Choices {
    /// Every choice that decides labels.
    pub policy: Policy,
    /// The split to read, where rows are a folder of splits.
    pub split: String,
    /// Codes whose errors are allowed.
    pub allowed: Vec<Code>,
    /// Notes for the user: keys that were accepted and change nothing.
    pub notes: Vec<String>,
}

/// Resolves keys of `command`, with values as a configuration file has them. `place` names them in errors.
///
/// # Errors
/// Everything that is wrong with them, in one problem: a key that is unknown, with the nearest name, or that the
/// command does not use; a value of another type or out of range; keys that contradict each other.
pub fn choices(values: &Map<String, Value>, command: &str, place: &str) -> Result<Choices, Problem> {
    let loaded = Loaded::of_values(values, command, place).checked()?;
    let config = &loaded.config;
    // A model is opened before its keys are read.
    if let Some((key, _)) = config.changed().into_iter().find(|(name, _)| vocabulary::KEYS.contains(name)) {
        let message = format!("{place}: {key} is a key of the commands and of train()");
        let help = "for rows alone, add the tokens to the model's folder first: tokenizer.add_tokens(..), \
                    tokenizer.save_pretrained(..)";
        return Err(Failure::config(message, help).into());
    }
    Ok(Choices {
        policy: config.policy(),
        split: config.dataset_train_split.clone(),
        allowed: config.allow_findings.0.clone(),
        notes: loaded.notes,
    })
}

/// Reads and checks a configuration file as `suasion check` does, and prints nothing.
///
/// # Errors
/// Everything that is wrong with it, in one problem.
pub fn configuration(path: &Path) -> Result<(), Problem> {
    let loaded = Loaded::over(Config::default(), Some(path), &[], &[]).checked()?;
    loaded.config.settings().validate(true).map_err(|error| anyhow::Error::from(error).into())
}

/// The folder of a model, by its path or its hub id, without its weights. Nothing is printed, and the process survives
/// whatever the template does.
///
/// # Errors
/// As the command line has them: no such folder, no model, a tokenizer that cannot be read.
pub fn model(name: &Path) -> Result<ModelFolder, Problem> {
    Ok(model::read(&model::resolve(name, false, &ui())?, &Changes::default())?)
}

/// The differences between the manifest of prepared rows and their intended use, a clause for each.
pub fn differences(manifest: &Manifest, folder: &ModelFolder, policy: &Policy) -> Vec<String> {
    loading::differences(manifest, folder, policy)
}

/// Files of rows.
#[derive(Clone, Debug)]
pub struct Files {
    /// Their name in messages.
    pub name: PathBuf,
    /// The files, in order.
    pub files: Vec<PathBuf>,
    /// The manifest beside them, where they are prepared data.
    pub manifest: Option<Manifest>,
}

/// The rows that a name stands for: a file, a glob, the `split` of a folder, a hub id.
///
/// # Errors
/// As the command line has them.
pub fn rows(name: &Path, split: &str) -> Result<Files, Problem> {
    let found = rows::resolve(&Paths::from(name.to_path_buf()), split, &ui())?;
    let manifest = found.manifest()?;
    Ok(Files { name: found.name, files: found.files, manifest })
}

/// Warnings go to stderr, everything else is dropped.
fn ui() -> Ui {
    Ui::new(false, true, ColorChoice::Never)
}

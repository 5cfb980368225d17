//! The commands, one file each, thin over the libraries.

pub mod chat;
pub mod check;
pub mod compare;
pub mod completions;
pub mod convert;
pub mod demo;
pub mod diagnose;
pub mod env;
pub mod eval;
pub mod generate;
pub mod init;
pub mod launch;
pub mod man;
pub mod merge;
pub mod pairs;
pub mod prepare;
pub mod train;
pub mod verify;
mod verify_page;

use crate::config::flags::KeyFlags;
use crate::config::{Config, Loaded, Paths};
use crate::paths;
use crate::ui::Ui;
use clap::Args;
use std::path::PathBuf;

/// What every command that touches data or a model takes.
#[derive(Args, Debug)]
pub struct ConfigArgs {
    /// Configuration file (.yaml, .yml or .toml)
    #[arg(value_parser = paths::parser())]
    pub config: Option<PathBuf>,
    /// Set one key; overrides CONFIG (repeatable): --set learning_rate=1e-4. Every key is also a flag
    /// (--learning_rate 1e-4): --help lists them
    #[arg(long, value_name = "KEY=VALUE", allow_hyphen_values = true)]
    pub set: Vec<String>,
    /// Model: a folder in the Hugging Face layout, or a hub id [key: model_name_or_path]
    #[arg(short = 'M', long, value_name = "M", value_parser = paths::parser())]
    pub model: Option<PathBuf>,
    /// Adapter over the model: a folder in PEFT's layout [key: adapter_name_or_path]
    #[arg(long, value_name = "A", value_parser = paths::parser())]
    pub adapter: Option<PathBuf>,
    /// Rows: a file (.jsonl, .json, .csv, .tsv, also .gz, .zst; .parquet, .arrow), a quoted glob, a folder of
    /// splits, or a hub id; repeatable [key: dataset_name]
    #[arg(short = 'D', long, value_name = "D", value_parser = paths::parser())]
    pub data: Vec<PathBuf>,
    #[command(flatten)]
    pub keys: KeyFlags,
}

impl ConfigArgs {
    /// The resolved configuration: flags override `--set`, which overrides CONFIG.
    pub fn load(&self, ui: &Ui) -> anyhow::Result<Loaded> {
        let loaded = self.read().checked()?;
        print_notes(&loaded, ui);
        Ok(loaded)
    }

    /// These arguments as shell words, for a command that a page shows.
    pub fn words(&self) -> Vec<String> {
        let path = |path: &PathBuf| path.display().to_string();
        let mut words: Vec<String> = self.config.iter().map(path).collect();
        for data in &self.data {
            words.extend(["--data".to_string(), path(data)]);
        }
        if let Some(model) = &self.model {
            words.extend(["--model".to_string(), path(model)]);
        }
        if let Some(adapter) = &self.adapter {
            words.extend(["--adapter".to_string(), path(adapter)]);
        }
        words.extend(self.keys.0.iter().map(|key| format!("--{}={}", key.name, key.text)));
        words.extend(self.set.iter().map(|set| format!("--set={set}")));
        words
    }

    /// As [`ConfigArgs::load`], with what is wrong in the result.
    pub fn read(&self) -> Loaded {
        let mut loaded = Loaded::over(Config::default(), self.config.as_deref(), &self.set, &self.keys.0);
        if let Some(model) = &self.model {
            loaded.config.model_name_or_path = Some(model.clone());
            loaded.places.insert("model_name_or_path", "--model".into());
        }
        if let Some(adapter) = &self.adapter {
            loaded.config.adapter_name_or_path = Some(adapter.clone());
            loaded.places.insert("adapter_name_or_path", "--adapter".into());
        }
        let (model, adapter) = (&mut loaded.config.model_name_or_path, &loaded.config.adapter_name_or_path);
        if model.is_none() {
            // An adapter's folder means the adapter over its base.
            model.clone_from(adapter);
        }
        if !self.data.is_empty() {
            loaded.config.dataset_name = Some(Paths(self.data.clone()));
            loaded.places.insert("dataset_name", "--data".into());
        }
        loaded
    }
}

/// Prints the notes on keys that were accepted and change nothing.
pub fn print_notes(loaded: &Loaded, ui: &Ui) {
    for note in &loaded.notes {
        ui.log(format_args!("note: {note}"));
    }
}

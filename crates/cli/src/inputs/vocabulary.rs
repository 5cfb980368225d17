//! What a configuration changes in its model's vocabulary.

use super::hub::Access;
use super::model;
use crate::config::Config;
use crate::failure::Failure;
use crate::ui::Ui;
use std::path::Path;
use suasion_data::ModelFolder;
use suasion_data::tokens::Changes;
use suasion_engine::Architecture;

/// Tokens that are added, the chat template, and how many rows embedding and head get.
#[derive(Clone, Debug, Default)]
pub struct Vocabulary {
    pub changes: Changes,
    /// The folder's own tokenizer may have more tokens than the model has rows.
    resizes: bool,
    /// Rows are rounded up to a multiple of this.
    multiple: Option<usize>,
    /// What new rows are drawn from.
    seed: u64,
}

/// The keys that change a vocabulary.
pub const KEYS: [&str; 7] = [
    "chat_template_path",
    "add_tokens",
    "add_special_tokens",
    "eos_token",
    "pad_token",
    "resize_vocab",
    "resize_to_multiple_of",
];

impl Vocabulary {
    /// The keys of a configuration.
    ///
    /// # Errors
    /// A template that cannot be read.
    pub fn of<'a>(config: &Config, access: impl Into<Access<'a>>) -> anyhow::Result<Vocabulary> {
        let plain = config.add_tokens.iter().map(|text| (text.clone(), false));
        let special = config.add_special_tokens.iter().map(|text| (text.clone(), true));
        let mut changes =
            Changes { eos: config.eos_token.clone(), pad: config.pad_token.clone(), ..Changes::default() };
        changes.tokens = special.chain(plain).collect();
        if let Some(path) = &config.chat_template_path {
            let is_text = path.extension().is_some_and(|ending| ending == "jinja" || ending == "j2");
            match is_text && !path.is_dir() {
                true => changes.template = Some(template(path)?),
                false => changes.clone_template(&model::resolve(path, false, access)?)?,
            }
        }
        Ok(Vocabulary {
            changes,
            resizes: config.resize_vocab,
            multiple: config.resize_to_multiple_of,
            seed: config.settings().seed,
        })
    }

    /// Rows of embedding and head of a model that has `rows`, with a tokenizer of `tokens`. Never fewer.
    ///
    /// # Errors
    /// The number of tokens, if it is larger than the model and no key lets the model grow.
    fn rows(&self, rows: usize, tokens: usize) -> Result<usize, usize> {
        let may = self.resizes || !self.changes.tokens.is_empty() || !self.changes.cloned.is_empty();
        let wanted = match tokens > rows {
            true if !may => return Err(tokens),
            true => tokens,
            false => rows,
        };
        Ok(self.multiple.map_or(wanted, |multiple| wanted.next_multiple_of(multiple)))
    }

    /// Opens a folder without its architecture, with the changes and the number of embeddings after them.
    ///
    /// # Errors
    /// As [`model::open`].
    pub fn open(&self, dir: &Path, ui: &Ui) -> anyhow::Result<ModelFolder> {
        let mut folder = model::open(dir, &self.changes, ui)?;
        let tokens = folder.tokenizer.as_ref().map_or(0, |tokenizer| tokenizer.vocab_size());
        // Without permission ids beyond the rows are errors of theirs.
        folder.vocab_size = folder.vocab_size.map(|rows| self.rows(rows, tokens).unwrap_or(rows));
        Ok(folder)
    }

    /// Gives a model and its folder as many rows as the tokenizer needs.
    ///
    /// # Errors
    /// If it needs more rows than the model has, and no key lets the model grow.
    pub fn grow(&self, arch: &mut Architecture, folder: &mut ModelFolder) -> anyhow::Result<()> {
        let tokens = folder.tokenizer.as_ref().map_or(0, |tokenizer| tokenizer.vocab_size());
        let rows = self.rows(arch.vocab_size, tokens).map_err(|tokens| {
            Failure::run_time(
                "E-VOCAB",
                format!(
                    "{}: the tokenizer's ids go up to {}, and config.json has vocab_size {}",
                    folder.path.display(),
                    tokens - 1,
                    arch.vocab_size
                ),
                "use the tokenizer of this model; if tokens were added to it, resize_vocab=true gives the model rows for \
                 them",
            )
        })?;
        arch.grow(rows, self.seed);
        folder.vocab_size = Some(arch.vocab_size);
        Ok(())
    }
}

/// The text of a template.
fn template(path: &Path) -> anyhow::Result<String> {
    Ok(std::fs::read_to_string(path).map_err(|error| suasion_data::Error::io(path, error))?)
}

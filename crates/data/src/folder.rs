//! A model's folder without its weights.

use crate::render::Stops;
use crate::template::ChatTemplate;
use crate::tokens::{Changes, Special, Tokenizer};
use crate::{Error, Policy, Result};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The tokenizer, the chat template and the sizes of a model's folder in the Hugging Face layout.
///
/// A folder without any of them ([`ModelFolder::default`]) is enough for rows that came as tokens.
///
/// ```no_run
/// use suasion_data::{ModelFolder, Pipeline, Policy};
///
/// let folder = ModelFolder::open("models/Qwen2.5-0.5B-Instruct")?;
/// let pipeline = Pipeline::new(folder, Policy::default());
/// # Ok::<(), suasion_data::Error>(())
/// ```
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct ModelFolder {
    /// The path from which it was opened; empty for one that was built in memory.
    pub path: PathBuf,
    /// Files whose contents differ from those in the folder, by name: those of [`ModelFolder::open_with`].
    pub changed: Vec<(String, Vec<u8>)>,
    /// The tokenizer; `None` if the folder has no `tokenizer.json`.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// The chat template, if there is one that can be used.
    pub template: Option<Arc<ChatTemplate>>,
    /// Why an existing chat template cannot be used. Rows of plain text need none.
    pub template_error: Option<Error>,
    /// The number of embeddings: `vocab_size` of `config.json`. A row with a larger id is an error.
    pub vocab_size: Option<usize>,
    /// The model's number of positions, by `config.json`. Longer rows are a finding (T003).
    pub positions: Option<usize>,
}

impl ModelFolder {
    /// Opens a folder. Weights are not read and need not exist.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Tokenizer`] if the tokenizer exists but cannot be read.
    pub fn open(path: impl AsRef<Path>) -> Result<ModelFolder> {
        ModelFolder::open_with(path, &Changes::default())
    }

    /// As [`ModelFolder::open`], with changes to the tokenizer. Nothing is written to the folder.
    ///
    /// # Errors
    /// As [`ModelFolder::open`] and [`Changes::of`].
    pub fn open_with(path: impl AsRef<Path>, changes: &Changes) -> Result<ModelFolder> {
        let path = path.as_ref();
        let files = changes.of(path)?;
        let config = std::fs::read(path.join("config.json")).ok();
        let config: Value = config.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        // The configuration of a multimodal model contains that of its language model.
        let text = config.get("text_config").filter(|text| text.is_object()).unwrap_or(&config);
        let mut folder = ModelFolder {
            path: path.to_path_buf(),
            vocab_size: size(text, "vocab_size").or_else(|| size(&config, "vocab_size")),
            positions: positions(text),
            ..ModelFolder::default()
        };
        if path.join("tokenizer.json").exists() {
            let tokenizer = Tokenizer::of(&files)?;
            let text = |token: Option<&crate::tokens::SpecialToken>| token.map(|t| t.content.clone());
            let (bos, eos) = (text(tokenizer.bos()), text(tokenizer.eos()));
            let template = match &changes.template {
                Some(source) => ChatTemplate::new(source, bos.as_deref(), eos.as_deref()).map(Some),
                None => ChatTemplate::from_dir(path, bos.as_deref(), eos.as_deref()),
            };
            match template {
                Ok(template) => {
                    folder.template =
                        template.map(|template| Arc::new(template.with_tokens(tokenizer.named_tokens())));
                }
                Err(error) => folder.template_error = Some(error),
            }
            folder.tokenizer = Some(Arc::new(tokenizer));
        }
        folder.changed = files.changed().to_vec();
        Ok(folder)
    }

    /// The ids that end, begin and pad texts under a policy; none without a tokenizer.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if a stop token of the policy is not in the vocabulary.
    pub fn special(&self, policy: &Policy) -> Result<Special> {
        self.tokenizer.as_ref().map_or(Ok(Special::default()), |tokenizer| Special::of(tokenizer, policy))
    }

    /// The texts that end a response, by their ids.
    pub(crate) fn stops(&self, special: &Special) -> Stops {
        let Some(tokenizer) = &self.tokenizer else { return Stops::default() };
        let eos = tokenizer.eos().map(|token| token.content.clone());
        let mut all: Vec<String> = special.stops.iter().map(|&id| tokenizer.token_text(id)).collect();
        all.extend(eos.clone().filter(|eos| !all.contains(eos)));
        Stops { eos, all }
    }
}

impl From<Arc<Tokenizer>> for ModelFolder {
    /// A folder with only a tokenizer.
    fn from(tokenizer: Arc<Tokenizer>) -> ModelFolder {
        ModelFolder { tokenizer: Some(tokenizer), ..ModelFolder::default() }
    }
}

/// A size in `config.json`.
fn size(config: &Value, key: &str) -> Option<usize> {
    usize::try_from(config.get(key)?.as_u64()?).ok()
}

/// The model's number of positions by its `config.json`, for any family: those that it was made for, or the
/// original ones times the factor of scaled RoPE. `None` if the scaling has no factor.
fn positions(config: &Value) -> Option<usize> {
    let trained = size(config, "max_position_embeddings").or_else(|| size(config, "n_positions"))?;
    let is_full = |value: &&Value| value.as_object().is_some_and(|map| !map.is_empty());
    let scaling =
        ["rope_scaling", "rope_parameters"].into_iter().find_map(|key| config.get(key).filter(is_full));
    let Some(scaling) = scaling else { return Some(trained) };
    match scaling.get("rope_type").or_else(|| scaling.get("type")).and_then(Value::as_str) {
        Some("default") => Some(trained),
        None if scaling.get("factor").is_none() => Some(trained),
        _ => {
            let original = size(scaling, "original_max_position_embeddings").unwrap_or(trained);
            let scaled = original as f64 * scaling.get("factor")?.as_f64()?;
            Some(trained.max(scaled as usize))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_those_that_rope_reaches() {
        let of = |text: &str| positions(&serde_json::from_str(text).unwrap());
        assert_eq!(of(r#"{"n_positions": 1024}"#), Some(1024));
        assert_eq!(of("{}"), None);
        assert_eq!(of(r#"{"max_position_embeddings": 64, "rope_scaling": null}"#), Some(64));
        let plain = r#"{"max_position_embeddings": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}"#;
        assert_eq!(of(plain), Some(64));
        let linear = r#"{"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": 4.0},
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}"#;
        assert_eq!(of(linear), Some(256));
        // Llama 3.1: 131,072 positions, scaled from 8,192.
        let llama3 = r#"{"max_position_embeddings": 131072, "rope_scaling":
            {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}}"#;
        assert_eq!(of(llama3), Some(131_072));
        // A factor per frequency: the number of positions is unknown.
        let long =
            r#"{"max_position_embeddings": 64, "rope_scaling": {"type": "longrope", "long_factor": [1.0]}}"#;
        assert_eq!(of(long), None);
    }
}

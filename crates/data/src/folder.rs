//! A model's folder without its weights.

use crate::render::Stops;
use crate::template::ChatTemplate;
use crate::tokens::{Special, Tokenizer};
use crate::{Error, Policy, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The tokenizer, the chat template and the vocabulary size of a model's folder in the Hugging Face layout.
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
    /// Where it was opened; empty for one that was put together in memory.
    pub path: PathBuf,
    /// The tokenizer; `None` where the folder has no `tokenizer.json`.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// The chat template, where there is one that can be used.
    pub template: Option<Arc<ChatTemplate>>,
    /// Why a chat template that is there cannot be used. Rows of plain text need none.
    pub template_error: Option<Error>,
    /// The number of embeddings, which is `vocab_size` of `config.json`. Larger ids are an error of their row.
    pub vocab_size: Option<usize>,
}

impl ModelFolder {
    /// Opens a folder. Weights are not read and need not be there.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Tokenizer`] where the tokenizer is there and cannot be read.
    pub fn open(path: impl AsRef<Path>) -> Result<ModelFolder> {
        let path = path.as_ref();
        let mut folder =
            ModelFolder { path: path.to_path_buf(), vocab_size: vocab_size(path), ..ModelFolder::default() };
        if path.join("tokenizer.json").exists() {
            let tokenizer = Tokenizer::from_dir(path)?;
            let text = |token: Option<&crate::tokens::SpecialToken>| token.map(|t| t.content.clone());
            let (bos, eos) = (text(tokenizer.bos()), text(tokenizer.eos()));
            match ChatTemplate::from_dir(path, bos.as_deref(), eos.as_deref()) {
                Ok(template) => {
                    folder.template =
                        template.map(|template| Arc::new(template.with_tokens(tokenizer.named_tokens())));
                }
                Err(error) => folder.template_error = Some(error),
            }
            folder.tokenizer = Some(Arc::new(tokenizer));
        }
        Ok(folder)
    }

    /// The ids that end, begin and pad texts under a policy; none without a tokenizer.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] where a stop token of the policy is not in the vocabulary.
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
    /// A folder of a tokenizer alone.
    fn from(tokenizer: Arc<Tokenizer>) -> ModelFolder {
        ModelFolder { tokenizer: Some(tokenizer), ..ModelFolder::default() }
    }
}

/// The number of embeddings that `config.json` names, for a multimodal model in the configuration of its language model.
fn vocab_size(folder: &Path) -> Option<usize> {
    let text = std::fs::read_to_string(folder.join("config.json")).ok()?;
    let config: serde_json::Value = serde_json::from_str(&text).ok()?;
    let size = config["text_config"]["vocab_size"].as_u64().or(config["vocab_size"].as_u64())?;
    usize::try_from(size).ok()
}

//! Model families: `config.json` to an [`Architecture`]. Each family is one file.

mod config;
mod gemma;
mod gpt2;
mod gpt_neox;
mod granite;
mod llama;
mod mistral;
mod olmo2;
mod packed;
mod phi3;
mod qwen3;
mod rope;
mod smollm3;

use crate::arch::Architecture;
use crate::{Error, Result};
use config::Config;
use serde_json::Value;
use std::path::Path;

/// Reads the settings of one family.
type Read = fn(&Config) -> Result<Architecture>;

/// The families by `model_type`.
const FAMILIES: &[(&str, Read)] = &[
    ("llama", llama::llama),
    ("qwen2", llama::qwen2),
    ("qwen3", qwen3::qwen3),
    ("gpt2", gpt2::gpt2),
    ("qwen3_moe", qwen3::qwen3_moe),
    ("mistral", mistral::mistral),
    ("phi3", phi3::phi3),
    ("olmo2", olmo2::olmo2),
    ("granite", granite::granite),
    ("smollm3", smollm3::smollm3),
    ("gpt_neox", gpt_neox::gpt_neox),
    ("gemma2", gemma::gemma2),
    ("gemma3_text", gemma::gemma3),
];

/// What the engine lacks for an unknown family: the error, or the unused keys, of reading it as a Llama model, which
/// most families resemble.
fn missing(config: &Config) -> String {
    let as_llama = config.afresh();
    match llama::llama(&as_llama) {
        Ok(_) => match &as_llama.unread()[..] {
            [] => "its config.json has settings of Llama alone, but it may compute something else".into(),
            keys => format!("the engine has no field for {}", keys.join(", ")),
        },
        Err(Error::Config { message, .. }) => format!("read as a Llama model, {message}"),
        Err(error) => error.to_string(),
    }
}

impl Architecture {
    /// Reads `dir/config.json`.
    ///
    /// # Errors
    /// When the file is missing or broken, and when it requests something that this engine does not compute.
    pub fn from_dir(dir: &Path) -> Result<Architecture> {
        let path = dir.join("config.json");
        let text = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
        let config = serde_json::from_slice(&text).map_err(|e| Error::Config {
            path: path.clone(),
            message: format!("not valid JSON: {e}"),
            help: "copy config.json from the model's repository again".into(),
        })?;
        Architecture::from_json(&config, &path)
    }

    /// Reads a parsed `config.json`, in the style of transformers 4 or 5; `path` is for messages.
    ///
    /// # Errors
    /// As [`Architecture::from_dir`].
    pub fn from_json(config: &Value, path: &Path) -> Result<Architecture> {
        let config = Config::new(config, path);
        let family = config.text("model_type")?;
        let Some((_, read)) = FAMILIES.iter().find(|(name, _)| *name == family) else {
            let supported = FAMILIES.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
            return Err(config.refuse(
                format!("model_type \"{family}\" is not supported: {}", missing(&config)),
                format!("supported families: {supported}"),
            ));
        };
        let mut arch = read(&config)?;
        arch.packed = packed::packing(&config)?;
        arch.not_applied.extend(config.not_read());
        let help = "shapes in config.json contradict each other; copy it from the model's repository again";
        arch.check().map_err(|message| config.refuse(message, help.into()))?;
        Ok(arch)
    }
}

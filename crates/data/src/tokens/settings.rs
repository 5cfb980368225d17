//! The special tokens of a tokenizer, which several files of a model folder declare.

use super::model::Inner;
use crate::{Error, Result};
use serde::Deserialize;
use serde_json::Value;
use std::path::{Path, PathBuf};
use tokenizers::{AddedToken, Encoding, Token};

/// The declarations in the files other than `tokenizer.json`, not yet resolved to ids.
#[derive(Default)]
pub(super) struct Settings {
    pub bos: Option<String>,
    pub eos: Option<String>,
    pub pad: Option<String>,
    /// `eos_token_id` of `generation_config.json`, else of `config.json`.
    pub eos_ids: Vec<u32>,
    /// `added_tokens_decoder`: tokens that transformers registers in addition to those of `tokenizer.json`.
    pub added: Vec<(u32, DeclaredToken)>,
    /// The file of these declarations, for errors.
    pub path: PathBuf,
}

/// An entry of `added_tokens_decoder`.
#[derive(Deserialize)]
pub(super) struct DeclaredToken {
    pub content: String,
    #[serde(default)]
    pub single_word: bool,
    #[serde(default)]
    pub lstrip: bool,
    #[serde(default)]
    pub rstrip: bool,
    #[serde(default)]
    pub normalized: bool,
    #[serde(default)]
    pub special: bool,
}

impl Settings {
    /// Reads `tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json` and `config.json`
    /// of a folder. Each may be missing.
    pub fn from_dir(dir: &Path) -> Result<Settings> {
        let path = dir.join("tokenizer_config.json");
        let mut settings = match read_json(&path)? {
            Some(config) => Settings::from_config(&config, &path)?,
            None => Settings { path, ..Settings::default() },
        };
        if let Some(map) = read_json(&dir.join("special_tokens_map.json"))? {
            settings.bos = settings.bos.or_else(|| token_content(&map["bos_token"]));
            settings.eos = settings.eos.or_else(|| token_content(&map["eos_token"]));
            settings.pad = settings.pad.or_else(|| token_content(&map["pad_token"]));
        }
        for name in ["generation_config.json", "config.json"] {
            if let Some(config) = read_json(&dir.join(name))? {
                settings.eos_ids = token_ids(&config["eos_token_id"]);
                if !settings.eos_ids.is_empty() {
                    break;
                }
            }
        }
        Ok(settings)
    }

    /// Reads the text of a `tokenizer_config.json`.
    pub fn from_config_bytes(json: &[u8], path: &Path) -> Result<Settings> {
        let config = serde_json::from_slice(json).map_err(|error| not_json(path, &error))?;
        Settings::from_config(&config, path)
    }

    fn from_config(config: &Value, path: &Path) -> Result<Settings> {
        let mut added = Vec::new();
        if let Some(declared) = config["added_tokens_decoder"].as_object() {
            for (id, token) in declared {
                let wrong = |what: String| Error::Tokenizer {
                    path: path.to_path_buf(),
                    message: format!("\"added_tokens_decoder\" entry {id:?}: {what}"),
                };
                let number = id.parse().map_err(|_| wrong("the key is not a token id".to_string()))?;
                let token = DeclaredToken::deserialize(token).map_err(|error| wrong(error.to_string()))?;
                added.push((number, token));
            }
            added.sort_by_key(|(id, _)| *id);
        }
        Ok(Settings {
            bos: token_content(&config["bos_token"]),
            eos: token_content(&config["eos_token"]),
            pad: token_content(&config["pad_token"]),
            eos_ids: Vec::new(),
            added,
            path: path.to_path_buf(),
        })
    }
}

/// The text of a special token, which is a string or `{"content": string, ..}`.
fn token_content(value: &Value) -> Option<String> {
    let content = value.as_str().or_else(|| value["content"].as_str())?;
    (!content.is_empty()).then(|| content.to_string())
}

/// The ids of an `eos_token_id`, which is a number or a list of numbers.
fn token_ids(value: &Value) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(values) => values.iter().filter_map(id).collect(),
        value => id(value).into_iter().collect(),
    }
}

/// The JSON of a file; `None` if it does not exist.
fn read_json(path: &Path) -> Result<Option<Value>> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|error| not_json(path, &error)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(path, error)),
    }
}

fn not_json(path: &Path, error: &serde_json::Error) -> Error {
    Error::Tokenizer {
        path: path.to_path_buf(),
        message: format!("not valid JSON ({error}); copy the file again from where the model came"),
    }
}

/// Registers the tokens of `tokenizer_config.json` over those of `tokenizer.json`, as transformers does: the
/// flags of `added_tokens_decoder` win, and BOS, EOS and pad are special.
pub(super) fn declare_added_tokens(inner: &mut Inner, settings: &Settings) -> Result<()> {
    let wrong = |message: String| Error::Tokenizer { path: settings.path.clone(), message };
    let known = inner.get_added_tokens_decoder();
    let mut declared: Vec<AddedToken> = Vec::new();
    for (id, token) in &settings.added {
        let token_of = AddedToken::from(token.content.as_str(), token.special)
            .single_word(token.single_word)
            .lstrip(token.lstrip)
            .rstrip(token.rstrip)
            .normalized(token.normalized);
        if known.get(id) != Some(&token_of) {
            declared.push(token_of);
        }
    }
    for content in [&settings.bos, &settings.eos, &settings.pad].into_iter().flatten() {
        let is_known = known.values().chain(&declared).any(|token| token.content == *content);
        // A token that is not in the vocabulary would get a new id, for which the model has no embedding.
        if !is_known && inner.token_to_id(content).is_some() {
            declared.push(AddedToken::from(content.as_str(), true));
        }
    }
    if declared.is_empty() {
        return Ok(());
    }
    inner.add_tokens(declared).map_err(|error| wrong(error.to_string()))?;
    for (id, token) in &settings.added {
        let actual = inner.token_to_id(&token.content);
        if actual != Some(*id) {
            return Err(wrong(format!(
                "\"added_tokens_decoder\" gives {:?} the id {id}, but tokenizer.json leads to {}; take both files \
                 from the same model",
                token.content,
                actual.map_or("none".to_string(), |id| id.to_string()),
            )));
        }
    }
    Ok(())
}

/// The ids that the post-processor puts before and after a text. It runs once, on an id that no vocabulary
/// has: running it on every row would copy the string of every token for nothing.
pub(super) fn post_processor_ends(inner: &Inner) -> Result<(Vec<u32>, Vec<u32>), String> {
    const TEXT: u32 = u32::MAX;
    let text = Encoding::from_tokens(vec![Token::new(TEXT, "a".to_string(), (0, 1))], 0);
    let processed = inner.post_process(text, None, true).map_err(|error| error.to_string())?;
    let ids = processed.get_ids();
    match ids.iter().position(|id| *id == TEXT) {
        Some(at) if ids.iter().filter(|id| **id == TEXT).count() == 1 => {
            Ok((ids[..at].to_vec(), ids[at + 1..].to_vec()))
        }
        _ => Err("\"post_processor\" does not put the text exactly once into a row; it is not meant for \
                  language models"
            .to_string()),
    }
}

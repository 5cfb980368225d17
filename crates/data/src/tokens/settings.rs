//! The special tokens of a tokenizer, which several files of a model folder declare.

use super::files::{FolderFiles, not_json};
use super::model::Inner;
use crate::{Error, Result};
use serde::Deserialize;
use serde_json::Value;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use tokenizers::{AddedToken, Encoding, Token};

/// The declarations in the files other than `tokenizer.json`, not yet resolved to ids.
#[derive(Default)]
pub(super) struct Settings {
    pub bos: Option<String>,
    pub eos: Option<String>,
    pub pad: Option<String>,
    /// All special tokens by their names (`eos_token`, `image_token`), which are variables of chat templates.
    pub named: BTreeMap<String, String>,
    /// `eos_token_id` of `generation_config.json`, else of `config.json`.
    pub eos_ids: Vec<u32>,
    /// `added_tokens_decoder`, else `added_tokens.json`: tokens that transformers registers in addition to those of
    /// `tokenizer.json`.
    pub added: Vec<(u32, DeclaredToken)>,
    /// True if the configuration has an `added_tokens_decoder`.
    pub has_decoder: bool,
    /// Special tokens without names.
    pub extra: Vec<String>,
    /// The file of these declarations, for errors.
    pub path: PathBuf,
}

/// An entry of `added_tokens_decoder`, or of `added_tokens.json`, which only has the text.
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
    /// True for an entry of `added_tokens.json`, over which `tokenizer.json` takes precedence.
    #[serde(skip)]
    pub legacy: bool,
}

impl Settings {
    /// Reads `tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json` and `config.json`
    /// of a folder. Each may be missing.
    pub fn of(files: &FolderFiles) -> Result<Settings> {
        let path = files.path("tokenizer_config.json");
        let mut settings = match files.json("tokenizer_config.json")? {
            Some(config) => Settings::from_config(&config, &path)?,
            None => Settings { path, ..Settings::default() },
        };
        // As in transformers 5: without an `added_tokens_decoder` the older files apply, and the map takes precedence.
        let old = !settings.has_decoder;
        if let Some(map) = files.json("special_tokens_map.json")? {
            for (name, token) in special_tokens(&map) {
                match settings.named.entry(name) {
                    Entry::Vacant(free) => {
                        free.insert(token);
                    }
                    Entry::Occupied(mut taken) if old => {
                        taken.insert(token);
                    }
                    Entry::Occupied(_) => {}
                }
            }
            if old {
                settings.extra.extend(extra_tokens(&map));
            }
        }
        settings.resolve();
        let path = files.path("added_tokens.json");
        if let Some(Value::Object(tokens)) = files.json("added_tokens.json")?.filter(|_| old) {
            for (content, id) in tokens {
                let number = token_ids(&id).first().copied().ok_or_else(|| Error::Tokenizer {
                    path: path.clone(),
                    message: format!("the id of {content:?} is {id}, not a token id"),
                })?;
                let special = settings.extra.contains(&content)
                    || settings
                        .named
                        .iter()
                        .any(|(name, token)| STANDARD.contains(&&**name) && *token == content);
                settings.added.push((number, DeclaredToken::legacy(content, special)));
            }
            settings.added.sort_by_key(|(id, _)| *id);
            settings.path = path;
        }
        for name in ["generation_config.json", "config.json"] {
            if let Some(config) = files.json(name)? {
                // A multimodal configuration contains that of its language model.
                settings.eos_ids = [&config, &config["text_config"]]
                    .map(|config| token_ids(&config["eos_token_id"]))
                    .into_iter()
                    .find(|ids| !ids.is_empty())
                    .unwrap_or_default();
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
        let mut settings = Settings {
            named: special_tokens(config).collect(),
            extra: extra_tokens(config).collect(),
            has_decoder: !config["added_tokens_decoder"].is_null(),
            added,
            path: path.to_path_buf(),
            ..Settings::default()
        };
        settings.resolve();
        Ok(settings)
    }

    /// Sets BOS, EOS and pad to the tokens with these names.
    fn resolve(&mut self) {
        let named = |name: &str| self.named.get(name).cloned();
        (self.bos, self.eos, self.pad) = (named("bos_token"), named("eos_token"), named("pad_token"));
    }
}

impl DeclaredToken {
    /// A token of `added_tokens.json`.
    fn legacy(content: String, special: bool) -> DeclaredToken {
        let (single_word, lstrip, rstrip) = (false, false, false);
        DeclaredToken { content, single_word, lstrip, rstrip, normalized: !special, special, legacy: true }
    }
}

/// The names of special tokens that every tokenizer may have.
const STANDARD: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The special tokens of a file by name: `*_token`, and those in a mapping of further ones.
fn special_tokens(file: &Value) -> impl Iterator<Item = (String, String)> {
    let own = file.as_object().into_iter().flatten().filter(|(name, _)| name.ends_with("_token"));
    let extra = file["extra_special_tokens"].as_object().into_iter().flatten();
    own.chain(extra).filter_map(|(name, token)| Some((name.clone(), token_content(token)?)))
}

/// The special tokens of a file that have no names.
fn extra_tokens(file: &Value) -> impl Iterator<Item = String> {
    let lists = ["extra_special_tokens", "additional_special_tokens"].map(|key| file[key].as_array());
    lists.into_iter().flatten().flatten().filter_map(token_content)
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

/// Registers the tokens of `tokenizer_config.json` over those of `tokenizer.json`, as transformers does: the
/// flags of `added_tokens_decoder` win, and BOS, EOS and pad are special.
pub(super) fn declare_added_tokens(inner: &mut Inner, settings: &Settings) -> Result<()> {
    let wrong = |message: String| Error::Tokenizer { path: settings.path.clone(), message };
    let known = inner.get_added_tokens_decoder();
    let mut declared: Vec<AddedToken> = Vec::new();
    let texts: HashSet<&str> = known.values().map(|token| token.content.as_str()).collect();
    let declares = |(id, token): &&(u32, DeclaredToken)| {
        !token.legacy || !known.contains_key(id) && !texts.contains(token.content.as_str())
    };
    for (id, token) in settings.added.iter().filter(declares) {
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
    for (id, token) in settings.added.iter().filter(declares) {
        let actual = inner.token_to_id(&token.content);
        if actual != Some(*id) {
            return Err(wrong(format!(
                "{} gives {:?} the id {id}, but tokenizer.json leads to {}; take both files from the same model",
                if token.legacy { "it" } else { "\"added_tokens_decoder\"" },
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

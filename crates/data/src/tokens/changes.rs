//! Changes to a model's tokenizer: new tokens, other special tokens, another chat template.

use super::files::FolderFiles;
use super::model::{self, Inner};
use super::settings::{Settings, declare_added_tokens};
use crate::guard::guard;
use crate::template::Sources;
use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::path::Path;
use tokenizers::AddedToken;

/// A run's changes to its model's tokenizer. The folder itself is unchanged: the run's model gets the changed
/// files ([`FolderFiles::changed`]).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Tokens to add, in order: texts that are matched as one token anywhere. Those with `true` are special: they
    /// structure a text, are left out of decoded text, and are matched before normalisation.
    pub tokens: Vec<(String, bool)>,
    /// The token that ends a text (`eos_token`).
    pub eos: Option<String>,
    /// The padding token (`pad_token`). Nothing is padded here: it is for programs that use the model.
    pub pad: Option<String>,
    /// The chat template, in Jinja.
    pub template: Option<String>,
    /// Tokens that another model has added to its vocabulary; those that this vocabulary already has are not added.
    pub cloned: Vec<(String, bool)>,
}

impl Changes {
    /// The files of a folder with these changes. Applying them to files that already have them changes nothing.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] for a folder without a tokenizer, for a token without text, and for an EOS or padding token that
    /// is not in the vocabulary.
    pub fn of(&self, dir: &Path) -> Result<FolderFiles> {
        let mut files = FolderFiles::of(dir);
        if *self == Changes::default() {
            return Ok(files);
        }
        let path = files.path("tokenizer.json");
        let broken = |message: String| Error::Tokenizer { path: path.clone(), message };
        let json = files.read("tokenizer.json")?;
        let json = json.ok_or_else(|| broken("no such file, so that its tokens cannot be changed".into()))?;
        let mut inner =
            guard(|| model::load(&json)).map_err(|error| broken(format!("not a tokenizer ({error})")))?;
        declare_added_tokens(&mut inner, &Settings::of(&files)?)?;
        if self.add(&mut inner).map_err(broken)? {
            write_tokens(&mut files, &json, &inner)?;
        }
        for (name, token) in [("eos_token", &self.eos), ("pad_token", &self.pad)] {
            let Some(token) = token else { continue };
            let id = inner.token_to_id(token).ok_or_else(|| {
                broken(format!("{name} is {token:?}, which is not in its vocabulary: add_special_tokens: [{token:?}] adds it"))
            })?;
            name_token(&mut files, name, token, id)?;
        }
        if let Some(template) = &self.template {
            files.change("chat_template.jinja", template.clone().into_bytes())?;
        }
        Ok(files)
    }

    /// Takes over the chat template of another model's folder, its added tokens and its EOS, as TRL's
    /// `clone_chat_template` does.
    ///
    /// # Errors
    /// If the folder has no template, or a separate one for tools.
    pub fn clone_template(&mut self, dir: &Path) -> Result<()> {
        let fail = |message: &str| {
            Err(Error::Source {
                path: dir.to_path_buf(),
                message: message.into(),
                help: "name a template in Jinja: chat_template_path: chat_template.jinja".into(),
            })
        };
        let Some(Sources { default, tool_use, .. }) = Sources::of(dir)? else {
            return fail("chat_template_path: the folder has no chat template");
        };
        if tool_use.is_some() {
            return fail("chat_template_path: the folder has two templates, one of them for rows with tools");
        }
        let tokenizer = super::Tokenizer::from_dir(dir)?;
        self.template = Some(default);
        let known = |token: &str| self.tokens.iter().any(|(text, _)| text == token);
        let added: Vec<_> = tokenizer.added_tokens().into_iter().filter(|(text, _)| !known(text)).collect();
        self.cloned = added.into_iter().map(|(text, special)| (text.to_string(), special)).collect();
        self.eos = self.eos.take().or_else(|| tokenizer.eos().map(|eos| eos.content.clone()));
        Ok(())
    }

    /// Adds the tokens; false if all exist.
    fn add(&self, inner: &mut Inner) -> Result<bool, String> {
        let known = inner.get_added_tokens_decoder();
        let mut new: Vec<AddedToken> = Vec::new();
        let cloned = self.cloned.iter().filter(|(text, _)| inner.token_to_id(text).is_none());
        for (text, special) in self.tokens.iter().chain(cloned) {
            if text.is_empty() {
                return Err("a token to add has no text".into());
            }
            let is_known = |token: &AddedToken| token.content == *text && (token.special || !special);
            if !known.values().chain(&new).any(is_known) {
                new.push(AddedToken::from(text.as_str(), *special));
            }
        }
        let any = !new.is_empty();
        inner.add_tokens(new).map_err(|error| error.to_string())?;
        Ok(any)
    }
}

/// Writes the added tokens of a tokenizer into the files that list them.
fn write_tokens(files: &mut FolderFiles, json: &[u8], inner: &Inner) -> Result<()> {
    let known: Vec<(u32, AddedToken)> = {
        let mut all: Vec<_> = inner.get_added_tokens_decoder().into_iter().collect();
        all.sort_by_key(|(id, _)| *id);
        all
    };
    let fields = |token: &AddedToken| {
        json!({
            "content": token.content, "single_word": token.single_word, "lstrip": token.lstrip,
            "rstrip": token.rstrip, "normalized": token.normalized, "special": token.special,
        })
    };
    if let Ok(Value::Object(mut tokenizer)) = serde_json::from_slice(json) {
        let entry = |(id, token): &(u32, AddedToken)| {
            let mut entry = Map::from_iter([("id".to_string(), json!(id))]);
            entry.extend(fields(token).as_object().cloned().unwrap_or_default());
            Value::Object(entry)
        };
        tokenizer.insert("added_tokens".into(), known.iter().map(entry).collect());
        change(files, "tokenizer.json", tokenizer)?;
    }
    if let Some(Value::Object(mut config)) = files.json("tokenizer_config.json")?
        && let Some(Value::Object(decoder)) = config.get_mut("added_tokens_decoder")
    {
        decoder.extend(known.iter().map(|(id, token)| (id.to_string(), fields(token))));
        change(files, "tokenizer_config.json", config)?;
    }
    if let Some(Value::Object(mut tokens)) = files.json("added_tokens.json")? {
        tokens.extend(known.iter().map(|(id, token)| (token.content.clone(), json!(id))));
        change(files, "added_tokens.json", tokens)?;
    }
    Ok(())
}

/// Sets a special token in every file that names it, and its id in the files that give ids.
fn name_token(files: &mut FolderFiles, name: &str, token: &str, id: u32) -> Result<()> {
    let of = |file: Option<Value>| match file {
        Some(Value::Object(map)) => Some(map),
        _ => None,
    };
    let mut config = of(files.json("tokenizer_config.json")?).unwrap_or_default();
    if !is_token(config.get(name), token) {
        config.insert(name.into(), token.into());
        change(files, "tokenizer_config.json", config)?;
    }
    if let Some(mut map) = of(files.json("special_tokens_map.json")?)
        && !is_token(map.get(name), token)
    {
        map.insert(name.into(), token.into());
        change(files, "special_tokens_map.json", map)?;
    }
    let key = format!("{name}_id");
    for file in ["config.json", "generation_config.json"] {
        let Some(mut config) = of(files.json(file)?) else { continue };
        // A multimodal configuration contains that of its language model.
        let text = config.get("text_config").is_some_and(Value::is_object);
        let place = match config.get_mut("text_config").and_then(Value::as_object_mut).filter(|_| text) {
            Some(inside) => inside.entry(key.as_str()).or_insert(Value::Null),
            None => config.entry(key.as_str()).or_insert(Value::Null),
        };
        let id = json!(id);
        // Other ids end a generation too.
        let others = match &place {
            Value::Array(ids) if file == "generation_config.json" => ids.clone(),
            Value::Array(ids) if ids.contains(&id) => continue,
            other @ Value::Number(_) if file == "generation_config.json" => vec![(*other).clone()],
            _ => Vec::new(),
        };
        if *place == id || others.contains(&id) {
            continue;
        }
        *place = match (others.is_empty(), name) {
            (false, "eos_token") => std::iter::once(id).chain(others).collect(),
            _ => id,
        };
        change(files, file, config)?;
    }
    Ok(())
}

/// True for the text of a token, and for an object with that text.
fn is_token(value: Option<&Value>, token: &str) -> bool {
    value.is_some_and(|value| *value == *token || value["content"] == *token)
}

fn change(files: &mut FolderFiles, name: &str, map: Map<String, Value>) -> Result<()> {
    let text = serde_json::to_vec_pretty(&Value::Object(map)).unwrap_or_default();
    files.change(name, text)
}

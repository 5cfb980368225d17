//! The files of a model folder beside the weights.

use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::fs;
use std::path::Path;
use suasion_engine::WeightType;
use suasion_files::write_bytes;

/// The folder of a model's further chat templates, a file per name.
pub const TEMPLATES: &str = "additional_chat_templates";

/// A file to be written beside the weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutputFile {
    /// Its name, without folders.
    pub name: String,
    /// Its contents.
    pub bytes: Vec<u8>,
}

/// The files of a model folder that are not weights. Every checkpoint has them, so that it can be loaded as a
/// model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelFiles {
    /// The files, in the order they were added.
    pub files: Vec<OutputFile>,
}

impl ModelFiles {
    /// The files that a run copies from the base model and that are downloaded with a model, if they exist.
    pub const NAMES: [&'static str; 12] = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "tokenizer.model",
    ];

    /// Reads the files of a model folder; missing ones are left out.
    pub fn from_dir(dir: &Path) -> Result<ModelFiles> {
        ModelFiles::changed(dir, &[])
    }

    /// As [`ModelFiles::from_dir`], some of them with other contents, by their names.
    pub fn changed(dir: &Path, changed: &[(String, Vec<u8>)]) -> Result<ModelFiles> {
        let mut files = ModelFiles::default();
        for name in ModelFiles::NAMES {
            let path = dir.join(name);
            match fs::read(&path) {
                Ok(bytes) => files.push(name, bytes),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(source) => return Err(Error::io(path, source)),
            }
        }
        changed.iter().for_each(|(name, bytes)| files.push(name, bytes.clone()));
        // Another template than the folder's takes the place of all of them.
        if !changed.iter().any(|(name, _)| name == "chat_template.jinja") {
            files.take_templates(&dir.join(TEMPLATES))?;
        }
        Ok(files)
    }

    /// Puts the named templates of a folder into `tokenizer_config.json`, as transformers reads them too: what a run
    /// writes are files without folders.
    fn take_templates(&mut self, folder: &Path) -> Result<()> {
        let mut named: Vec<(String, String)> = Vec::new();
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            if let Some(name) = entry.file_name().to_string_lossy().strip_suffix(".jinja") {
                let text = fs::read_to_string(entry.path()).map_err(|e| Error::io(entry.path(), e))?;
                named.push((name.to_string(), text));
            }
        }
        if named.is_empty() {
            return Ok(());
        }
        named.sort();
        let text = |name: &str| self.files.iter().find(|file| file.name == name).map(|file| &file.bytes[..]);
        let mut config: Map<String, Value> = text("tokenizer_config.json")
            .and_then(|bytes| serde_json::from_slice(bytes).ok())
            .unwrap_or_default();
        let default = match text("chat_template.jinja") {
            Some(bytes) => Some(String::from_utf8_lossy(bytes).into_owned()),
            None => config.get("chat_template").and_then(Value::as_str).map(str::to_string),
        };
        if let Some(default) = default {
            named.retain(|(name, _)| name != "default");
            named.insert(0, ("default".into(), default));
        }
        let list = named.into_iter().map(|(name, template)| json!({"name": name, "template": template}));
        config.insert("chat_template".into(), list.collect());
        self.files.retain(|file| file.name != "chat_template.jinja");
        self.push("tokenizer_config.json", serde_json::to_vec_pretty(&config).unwrap_or_default());
        Ok(())
    }

    /// Adds a file, or replaces the one of that name.
    pub fn push(&mut self, name: &str, bytes: Vec<u8>) {
        self.files.retain(|file| file.name != name);
        self.files.push(OutputFile { name: name.to_string(), bytes });
    }

    /// The files as they are beside weights of this type: if `config.json` states another type, of a head that is
    /// not tied, of the rows of embedding and head, or of weights that were packed, it is corrected.
    pub fn beside(&self, kind: WeightType, tied: bool, rows: usize) -> ModelFiles {
        let mut files = self.clone();
        for file in files.files.iter_mut().filter(|file| file.name == "config.json") {
            if let Some(bytes) = corrected(&file.bytes, kind, tied, rows) {
                file.bytes = bytes;
            }
        }
        files
    }

    /// The files of a model that has learned to stop at these ids: they are appended to `eos_token_id` in `config.json` and
    /// `generation_config.json`. A file that names none gets them, and
    /// `generation_config.json` is added if it is missing and needed.
    pub fn stopping_at(&self, stops: &[u32]) -> ModelFiles {
        let mut files = self.clone();
        let of = |name: &str| self.files.iter().find(|file| file.name == name);
        for name in ["config.json", "generation_config.json"] {
            let bytes = match of(name) {
                Some(file) => &file.bytes[..],
                None if name == "generation_config.json" && !stops.is_empty() => b"{}",
                None => continue,
            };
            if let Some(bytes) = naming(bytes, stops) {
                files.push(name, bytes);
            }
        }
        files
    }

    /// The files beside an adapter of this model: without `config.json`, since the folder is not a model. Its stop ids
    /// move to `generation_config.json` if that names none: tokenizer and labels stay those of the base.
    pub fn of_adapter(&self) -> ModelFiles {
        let ids = |name: &str| {
            let file = self.files.iter().find(|file| file.name == name)?;
            let config: Value = serde_json::from_slice(&file.bytes).ok()?;
            let places = [&config["eos_token_id"], &config["text_config"]["eos_token_id"]];
            places
                .into_iter()
                .find(|ids| ids.is_number() || ids.as_array().is_some_and(|ids| !ids.is_empty()))
                .cloned()
        };
        let (own, stops) = (ids("generation_config.json"), ids("config.json"));
        let mut files = self.clone();
        files.files.retain(|file| file.name != "config.json");
        if let (None, Some(stops)) = (own, stops) {
            let file = files.files.iter().find(|file| file.name == "generation_config.json");
            let mut config: Map<String, Value> =
                file.and_then(|file| serde_json::from_slice(&file.bytes).ok()).unwrap_or_default();
            config.insert("eos_token_id".into(), stops);
            files.push("generation_config.json", serde_json::to_vec_pretty(&config).unwrap_or_default());
        }
        files
    }

    /// Writes the files into a folder.
    pub fn write(&self, dir: &Path) -> Result<()> {
        for file in &self.files {
            write_bytes(dir.join(&file.name), &file.bytes)?;
        }
        Ok(())
    }
}

/// A configuration that agrees with the weights; `None` if it already does.
fn corrected(bytes: &[u8], kind: WeightType, tied: bool, rows: usize) -> Option<Vec<u8>> {
    let Ok(Value::Object(mut config)) = serde_json::from_slice(bytes) else { return None };
    let mut changed = false;
    for key in ["dtype", "torch_dtype"] {
        if let Some(value) = config.get_mut(key)
            && *value != kind.name()
        {
            *value = Value::from(kind.name());
            changed = true;
        }
    }
    if let Some(value) = config.get_mut("vocab_size")
        && *value != rows
    {
        *value = rows.into();
        changed = true;
    }
    // Weights are never written packed.
    changed |= config.shift_remove("quantization_config").is_some();
    // Families differ in what a missing key means.
    let says_tied = config.get("tie_word_embeddings").is_none_or(|value| value == true);
    if !tied && says_tied {
        config.insert("tie_word_embeddings".into(), false.into());
        changed = true;
    }
    changed.then(|| serde_json::to_vec_pretty(&config).expect("it was JSON")) // keys keep their order
}

/// A configuration whose `eos_token_id` includes these ids; `None` if it already does.
fn naming(bytes: &[u8], stops: &[u32]) -> Option<Vec<u8>> {
    let Ok(Value::Object(mut config)) = serde_json::from_slice(bytes) else { return None };
    let mut ids: Vec<Value> = match config.get("eos_token_id") {
        Some(Value::Array(ids)) => ids.clone(),
        Some(id @ Value::Number(_)) => vec![id.clone()],
        _ => Vec::new(),
    };
    let known = ids.len();
    for stop in stops {
        if !ids.iter().any(|id| id == stop) {
            ids.push((*stop).into());
        }
    }
    if ids.len() == known {
        return None;
    }
    let value = if ids.len() == 1 { ids.remove(0) } else { Value::Array(ids) };
    config.insert("eos_token_id".into(), value);
    serde_json::to_vec_pretty(&config).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configurations_stop_where_the_run_learned_to() {
        let stopping = |generation: Option<&str>, stops: &[u32]| {
            let mut files = ModelFiles::default();
            files.push("config.json", br#"{"eos_token_id": [0, 7]}"#.to_vec());
            if let Some(text) = generation {
                files.push("generation_config.json", text.as_bytes().to_vec());
            }
            let files = files.stopping_at(stops).files;
            let read = |file: &OutputFile| serde_json::from_slice::<Value>(&file.bytes).unwrap();
            files.iter().map(|file| read(file)["eos_token_id"].clone()).collect::<Vec<_>>()
        };
        assert_eq!(stopping(Some(r#"{"eos_token_id": 0}"#), &[9]), [json!([0, 7, 9]), json!([0, 9])]);
        // Ids that are already named are not added again, and a file without a change is left alone.
        assert_eq!(stopping(Some(r#"{"eos_token_id": 7}"#), &[7]), [json!([0, 7]), json!(7)]);
        assert_eq!(stopping(None, &[7, 9]), [json!([0, 7, 9]), json!([7, 9])]);
        assert_eq!(stopping(Some("{}"), &[9]), [json!([0, 7, 9]), json!(9)]);
        assert_eq!(stopping(None, &[]), [json!([0, 7])]);
    }

    #[test]
    fn an_adapter_stops_where_its_base_does() {
        let of = |config: &str, generation: Option<&str>| {
            let mut files = ModelFiles::default();
            files.push("config.json", config.into());
            if let Some(text) = generation {
                files.push("generation_config.json", text.into());
            }
            let files = files.of_adapter().files;
            assert!(files.iter().all(|file| file.name != "config.json"));
            files.first().map(|file| serde_json::from_slice::<Value>(&file.bytes).unwrap())
        };
        assert_eq!(of(r#"{"eos_token_id": 7}"#, None), Some(json!({"eos_token_id": 7})));
        assert_eq!(
            of(r#"{"text_config": {"eos_token_id": [7, 8]}}"#, None),
            Some(json!({"eos_token_id": [7, 8]}))
        );
        let generation = Some(r#"{"top_k": 5}"#);
        assert_eq!(of(r#"{"eos_token_id": 7}"#, generation), Some(json!({"top_k": 5, "eos_token_id": 7})));
        // Its own go first, as they do in the base's folder.
        let own = json!({"eos_token_id": [0]});
        assert_eq!(of(r#"{"eos_token_id": 7}"#, Some(&own.to_string())), Some(own));
        assert_eq!(of(r#"{"eos_token_id": null}"#, None), None);
    }

    /// transformers 5.23 reads the list as it reads the folder.
    #[test]
    fn named_templates_are_a_list_of_the_configuration() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        let list = || {
            let files = ModelFiles::from_dir(dir.path()).unwrap().files;
            assert!(files.iter().all(|file| !file.name.contains(['/', '\\'])), "{files:?}");
            let file = files.iter().find(|file| file.name == "tokenizer_config.json").unwrap();
            serde_json::from_slice::<Value>(&file.bytes).unwrap()["chat_template"].clone()
        };
        write("tokenizer_config.json", r#"{"eos_token": "e", "chat_template": "C"}"#);
        assert_eq!(list(), "C");
        std::fs::create_dir(dir.path().join(TEMPLATES)).unwrap();
        assert_eq!(list(), "C");
        write("additional_chat_templates/tool_use.jinja", "T");
        write("additional_chat_templates/rag.jinja", "R");
        let named = |default: &str| {
            json!([{"name": "default", "template": default}, {"name": "rag", "template": "R"},
                {"name": "tool_use", "template": "T"}])
        };
        assert_eq!(list(), named("C"));
        write("chat_template.jinja", "M");
        assert_eq!(list(), named("M"));
        assert!(
            ModelFiles::from_dir(dir.path())
                .unwrap()
                .files
                .iter()
                .all(|file| file.name != "chat_template.jinja")
        );
    }

    #[test]
    fn the_configuration_agrees_with_the_weights() {
        let grown = |config: &str, kind, tied, rows| {
            let mut files = ModelFiles::default();
            files.push("config.json", config.as_bytes().to_vec());
            files.push("tokenizer.json", b"{\"dtype\": 1}".to_vec());
            let files = files.beside(kind, tied, rows).files;
            assert_eq!(files[1].bytes, b"{\"dtype\": 1}");
            String::from_utf8(files[0].bytes.clone()).unwrap()
        };
        let beside = |config: &str, kind, tied| grown(config, kind, tied, 8);
        let read = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        let tied = r#"{"torch_dtype": "bfloat16", "tie_word_embeddings": true}"#;
        // What agrees keeps its bytes.
        assert_eq!(beside(tied, WeightType::BF16, true), tied);
        assert_eq!(beside("{ }", WeightType::F16, true), "{ }");
        let own_head = r#"{"tie_word_embeddings":  false}"#;
        assert_eq!(beside(own_head, WeightType::F32, false), own_head);
        let expected = r#"{"torch_dtype": "float32", "tie_word_embeddings": false}"#;
        assert_eq!(read(&beside(tied, WeightType::F32, false)), read(expected));
        let rows = grown(r#"{"vocab_size": 8, "dtype": "float32"}"#, WeightType::F32, true, 11);
        assert_eq!(read(&rows), read(r#"{"vocab_size": 11, "dtype": "float32"}"#));
        // GPT-2's heads are tied where the key is missing.
        let named = beside(r#"{"dtype": "float32"}"#, WeightType::F16, false);
        assert_eq!(read(&named), read(r#"{"dtype": "float16", "tie_word_embeddings": false}"#));
    }
}

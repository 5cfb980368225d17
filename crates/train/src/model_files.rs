//! The files of a model folder beside the weights.

use crate::{Error, Result};
use serde_json::Value;
use std::fs;
use std::path::Path;
use suasion_files::write_bytes;

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
        let mut files = ModelFiles::default();
        for name in ModelFiles::NAMES {
            let path = dir.join(name);
            match fs::read(&path) {
                Ok(bytes) => files.push(name, bytes),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(source) => return Err(Error::io(path, source)),
            }
        }
        Ok(files)
    }

    /// Adds a file, or replaces the one of that name. In `config.json` the dtype becomes `float32`, the dtype
    /// of the weights that are written.
    pub fn push(&mut self, name: &str, bytes: Vec<u8>) {
        let bytes = if name == "config.json" { with_f32(bytes) } else { bytes };
        self.files.retain(|file| file.name != name);
        self.files.push(OutputFile { name: name.to_string(), bytes });
    }

    /// Writes the files into a folder.
    pub fn write(&self, dir: &Path) -> Result<()> {
        for file in &self.files {
            write_bytes(dir.join(&file.name), &file.bytes)?;
        }
        Ok(())
    }
}

/// A configuration with the dtype float32; the same bytes if it has that dtype already, or none.
fn with_f32(bytes: Vec<u8>) -> Vec<u8> {
    let Ok(Value::Object(mut config)) = serde_json::from_slice(&bytes) else { return bytes };
    let mut changed = false;
    for key in ["dtype", "torch_dtype"] {
        if let Some(value) = config.get_mut(key)
            && *value != "float32"
        {
            *value = Value::from("float32");
            changed = true;
        }
    }
    if changed {
        serde_json::to_vec_pretty(&config).expect("it was JSON") // keys keep their order
    } else {
        bytes
    }
}

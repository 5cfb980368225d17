//! From what the user calls a model to a folder: a path, or a hub id.

use crate::failure::Failure;
use crate::hub::{self, Access, Kind, Repo, ToDownload};
use std::path::{Path, PathBuf};

/// Files of a model beside its weights, as far as it has them.
const FILES: [&str; 8] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// The folder of a model, with its weights where `weights` says so.
///
/// # Errors
/// Where it is neither a folder nor a hub id that is cached or can be downloaded; the message says where it looked.
/// [`ToDownload`] where it could be and may not.
pub fn resolve<'a>(name: &Path, weights: bool, access: impl Into<Access<'a>>) -> anyhow::Result<PathBuf> {
    let access = access.into();
    if name.is_dir() {
        return Ok(name.to_path_buf());
    }
    if name.exists() {
        return Err(Failure::run_time(
            "E-MODEL",
            format!("{} is a file; a model is a folder", name.display()),
            "name the folder that holds config.json",
        )
        .into());
    }
    let Some(repo) = Repo::named(Kind::Model, name) else {
        return Err(Failure::run_time(
            "E-MODEL",
            format!("{}: no such folder", name.display()),
            "name a folder in the Hugging Face layout (config.json, *.safetensors, tokenizer.json), or a hub id",
        )
        .into());
    };
    let snapshot = match repo.snapshot() {
        // What an incomplete snapshot lacks is named by whoever needs it.
        Some(snapshot) if is_complete(&snapshot, weights) || !hub::downloads() => return Ok(snapshot),
        other => other,
    };
    let listing = repo.list(None, access);
    let fetched = listing.and_then(|l| repo.get(&l, &wanted(&l.names, weights), access.ui));
    match (fetched, snapshot) {
        (Ok(fetched), _) => Ok(fetched),
        (Err(error), Some(snapshot)) if !error.is::<ToDownload>() => {
            access.ui.warn(format_args!("{error}; going on with {}", snapshot.display()));
            Ok(snapshot)
        }
        (Err(error), _) => Err(error),
    }
}

/// True where a snapshot has what every model has: other tools download what they need only.
fn is_complete(snapshot: &Path, weights: bool) -> bool {
    let has = |name: &str| snapshot.join(name).exists();
    if !has("config.json") || !has("tokenizer.json") {
        return false;
    }
    let index = std::fs::read(snapshot.join("model.safetensors.index.json")).ok();
    match index.and_then(|bytes| serde_json::from_slice::<serde_json::Value>(&bytes).ok()) {
        _ if !weights => true,
        Some(index) => match index["weight_map"].as_object() {
            Some(map) => map.values().all(|file| file.as_str().is_some_and(has)),
            None => false,
        },
        None => std::fs::read_dir(snapshot).is_ok_and(|entries| {
            entries.flatten().any(|entry| is_safetensors(&entry.file_name().to_string_lossy()))
        }),
    }
}

fn is_safetensors(name: &str) -> bool {
    name.ends_with(".safetensors") && !name.contains('/')
}

/// The files of a repository that are needed. Some hold their weights twice: transformers' `model*` are taken before
/// others.
fn wanted(names: &[String], weights: bool) -> Vec<String> {
    let mut wanted: Vec<String> =
        names.iter().filter(|name| FILES.contains(&name.as_str())).cloned().collect();
    if weights {
        let tensors: Vec<&String> = names.iter().filter(|name| is_safetensors(name)).collect();
        let named = tensors.iter().any(|name| name.starts_with("model"));
        wanted.extend(tensors.into_iter().filter(|name| !named || name.starts_with("model")).cloned());
        wanted.extend(names.iter().filter(|name| *name == "model.safetensors.index.json").cloned());
    }
    wanted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_needed_is_wanted() {
        let names = [
            ".gitattributes",
            "README.md",
            "config.json",
            "consolidated.safetensors",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "onnx/model.safetensors",
            "pytorch_model.bin",
            "tokenizer.json",
        ]
        .map(String::from);
        assert_eq!(wanted(&names, false), ["config.json", "tokenizer.json"]);
        assert_eq!(
            wanted(&names, true),
            [
                "config.json",
                "tokenizer.json",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
            ]
        );
        assert_eq!(wanted(&names[..4], true), ["config.json", "consolidated.safetensors"]);
    }

    #[test]
    fn a_snapshot_is_complete_with_all_shards_of_its_index() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        let complete = |weights| is_complete(folder.path(), weights);
        write("config.json", "{}");
        assert!(!complete(false));
        write("tokenizer.json", "{}");
        assert!(complete(false) && !complete(true));
        write("model-1.safetensors", "");
        assert!(complete(true));
        let index = r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#;
        write("model.safetensors.index.json", index);
        assert!(complete(false) && !complete(true));
        write("model-2.safetensors", "");
        assert!(complete(true));
    }
}

//! From what the user calls a model to a folder: a path, or a hub id in the local cache. Nothing is downloaded.

use crate::failure::Failure;
use std::path::{Path, PathBuf};

/// The folder of a model.
///
/// # Errors
/// Where it is neither a folder nor a cached hub id; the message says where it looked.
pub fn resolve(name: &Path) -> anyhow::Result<PathBuf> {
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
    let Some(id) = name.to_str().filter(|text| is_hub_id(text)) else {
        return Err(Failure::run_time(
            "E-MODEL",
            format!("{}: no such folder", name.display()),
            "name a folder in the Hugging Face layout (config.json, *.safetensors, tokenizer.json), or a hub id in the local cache",
        )
        .into());
    };
    let cache = hub_cache();
    let folder = cache.join(format!("models--{}", id.replace('/', "--")));
    snapshot(&folder).ok_or_else(|| {
        Failure::run_time(
            "E-MODEL",
            format!("{id}: no such folder, and the hub cache has no {}", folder.display()),
            "download it with the Hugging Face tools first (nothing is downloaded here), or set HF_HUB_CACHE or HF_HOME to where it is",
        )
        .into()
    })
}

/// `name` or `owner/name`, of the characters that the hub allows.
fn is_hub_id(text: &str) -> bool {
    let parts: Vec<&str> = text.split('/').collect();
    let fits = |part: &&str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    (1..=2).contains(&parts.len()) && parts.iter().all(fits)
}

/// Where hub models are cached: the variables and the default of huggingface_hub.
pub fn hub_cache() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(cache) = set("HF_HUB_CACHE").or_else(|| set("HUGGINGFACE_HUB_CACHE")) {
        return cache;
    }
    let home = set("HF_HOME").unwrap_or_else(|| {
        let cache = set("XDG_CACHE_HOME")
            .unwrap_or_else(|| std::env::home_dir().unwrap_or_else(|| PathBuf::from(".")).join(".cache"));
        cache.join("huggingface")
    });
    home.join("hub")
}

/// The snapshot that `main` names, or the only one that there is.
fn snapshot(folder: &Path) -> Option<PathBuf> {
    let snapshots = folder.join("snapshots");
    if let Ok(commit) = std::fs::read_to_string(folder.join("refs/main")) {
        let path = snapshots.join(commit.trim());
        if !commit.trim().is_empty() && path.is_dir() {
            return Some(path);
        }
    }
    let mut found: Vec<PathBuf> = std::fs::read_dir(&snapshots)
        .ok()?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .collect();
    (found.len() == 1).then(|| found.remove(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_ids_are_told_from_paths() {
        for id in ["gpt2", "Qwen/Qwen2.5-0.5B", "a_b/c.d"] {
            assert!(is_hub_id(id), "{id}");
        }
        for path in ["./gpt2", "/models/gpt2", "a/b/c", "../x", "models/", "a b"] {
            assert!(!is_hub_id(path), "{path}");
        }
    }

    #[test]
    fn the_snapshot_of_main_wins() {
        let folder = tempfile::tempdir().unwrap();
        let base = folder.path();
        assert_eq!(snapshot(base), None);
        for commit in ["aaa", "bbb"] {
            std::fs::create_dir_all(base.join("snapshots").join(commit)).unwrap();
        }
        assert_eq!(snapshot(base), None);
        std::fs::create_dir_all(base.join("refs")).unwrap();
        std::fs::write(base.join("refs/main"), "bbb\n").unwrap();
        assert_eq!(snapshot(base), Some(base.join("snapshots/bbb")));
    }
}

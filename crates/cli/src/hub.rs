//! Repositories of the Hugging Face hub: found in the local cache, and downloaded into it where this program was
//! built with the feature `hub`.

#[cfg(feature = "hub")]
mod download;

use crate::failure::Failure;
use crate::ui::Ui;
use std::path::{Path, PathBuf};

/// What a repository holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A model.
    Model,
    /// A data set.
    Dataset,
}

impl Kind {
    /// The kind in plural, as in paths of the cache and of the API.
    fn plural(self) -> &'static str {
        match self {
            Kind::Model => "models",
            Kind::Dataset => "datasets",
        }
    }
}

/// A repository by its id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repo {
    /// What it holds.
    pub kind: Kind,
    /// `owner/name`, or `name`.
    pub id: String,
}

impl Repo {
    /// The repository that a name may mean; `None` where it can only be a path.
    pub fn named(kind: Kind, name: &Path) -> Option<Repo> {
        let id = name.to_str().filter(|text| is_id(text))?.to_string();
        Some(Repo { kind, id })
    }

    /// Its folder in the cache, there or not.
    pub fn folder(&self) -> PathBuf {
        cache().join(format!("{}--{}", self.kind.plural(), self.id.replace('/', "--")))
    }

    /// The cached snapshot that `main` names, or the only one that there is.
    pub fn snapshot(&self) -> Option<PathBuf> {
        snapshot(&self.folder())
    }

    /// Downloads those files of `main` that `want` chooses among all, as far as the cache lacks them. Returns the
    /// snapshot and the chosen names.
    ///
    /// # Errors
    /// With what to do: nothing may be downloaded here and now, or the download failed.
    #[cfg(feature = "hub")]
    pub fn fetch(
        &self,
        ui: &Ui,
        want: impl FnOnce(&[String]) -> anyhow::Result<Vec<String>>,
    ) -> anyhow::Result<(PathBuf, Vec<String>)> {
        download::fetch(self, ui, want)
    }

    /// Nothing is downloaded by this build.
    ///
    /// # Errors
    /// Always, with what to do.
    #[cfg(not(feature = "hub"))]
    pub fn fetch(
        &self,
        _ui: &Ui,
        _want: impl FnOnce(&[String]) -> anyhow::Result<Vec<String>>,
    ) -> anyhow::Result<(PathBuf, Vec<String>)> {
        Err(self.not_cached().into())
    }

    /// The error for what is not in the cache where nothing is downloaded.
    fn not_cached(&self) -> Failure {
        let help = match offline() {
            Some(why) => format!("unset {why}, or set HF_HUB_CACHE or HF_HOME to where it is"),
            None => {
                "download it with the Hugging Face tools first, set HF_HUB_CACHE or HF_HOME to where it is, \
                     or build suasion with --features hub, which downloads"
                    .into()
            }
        };
        let message = format!(
            "{}: there is no such path, and what is needed is not in the local cache ({})",
            self.id,
            self.folder().display()
        );
        let tag = if self.kind == Kind::Model { "E-MODEL" } else { "E-SOURCE" };
        Failure::run_time(tag, message, help)
    }
}

/// True where this program may download.
pub fn downloads() -> bool {
    cfg!(feature = "hub") && offline().is_none()
}

/// The variable that forbids the network, if one does.
fn offline() -> Option<&'static str> {
    let set = |name: &&str| {
        let value = std::env::var(name).unwrap_or_default().to_ascii_uppercase();
        matches!(value.as_str(), "1" | "ON" | "YES" | "TRUE")
    };
    ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"].into_iter().find(set)
}

/// `name` or `owner/name`, of the characters that the hub allows.
fn is_id(text: &str) -> bool {
    let parts: Vec<&str> = text.split('/').collect();
    let fits = |part: &&str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    (1..=2).contains(&parts.len()) && parts.iter().all(fits)
}

/// The value of an environment variable that names a path, where it is set and not empty.
fn path_variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from)
}

/// Where the Hugging Face tools keep their things: `HF_HOME` or its default.
fn home() -> PathBuf {
    path_variable("HF_HOME").unwrap_or_else(|| {
        let cache = path_variable("XDG_CACHE_HOME")
            .unwrap_or_else(|| std::env::home_dir().unwrap_or_else(|| PathBuf::from(".")).join(".cache"));
        cache.join("huggingface")
    })
}

/// Where repositories are cached: the variables and the default of huggingface_hub.
pub fn cache() -> PathBuf {
    path_variable("HF_HUB_CACHE")
        .or_else(|| path_variable("HUGGINGFACE_HUB_CACHE"))
        .unwrap_or_else(|| home().join("hub"))
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
            assert!(is_id(id), "{id}");
        }
        for path in ["./gpt2", "/models/gpt2", "a/b/c", "../x", "models/", "a b"] {
            assert!(!is_id(path), "{path}");
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

//! Repositories of the Hugging Face hub: found in the local cache, and downloaded into it where this program
//! was built with the feature `hub`.

#[cfg(feature = "hub")]
mod download;

/// This build downloads nothing.
#[cfg(not(feature = "hub"))]
mod download {
    use super::{Listing, Repo};
    use crate::ui::Ui;
    use std::path::PathBuf;

    pub fn list(repo: &Repo, _commit: Option<&str>) -> anyhow::Result<Listing> {
        Err(repo.not_cached().into())
    }

    pub fn get(repo: &Repo, _listing: &Listing, _names: &[String], _ui: &Ui) -> anyhow::Result<PathBuf> {
        Err(repo.not_cached().into())
    }
}

use crate::failure::Failure;
use crate::paths::expanded;
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

/// How far a look-up goes: to the hub, or to the cache only. A [`Ui`] converts to the former.
#[derive(Clone, Copy)]
pub struct Access<'a> {
    /// Prints warnings and progress.
    pub ui: &'a Ui,
    /// False: no request is sent to the hub; what would need one is the error [`ToDownload`].
    pub network: bool,
}

impl<'a> Access<'a> {
    /// Access to the cache only.
    pub fn cache(ui: &'a Ui) -> Access<'a> {
        Access { ui, network: false }
    }
}

impl<'a> From<&'a Ui> for Access<'a> {
    fn from(ui: &'a Ui) -> Access<'a> {
        Access { ui, network: true }
    }
}

/// The error for something that is not in the cache and would have to be downloaded.
#[derive(Debug)]
pub struct ToDownload(String);

impl std::fmt::Display for ToDownload {
    fn fmt(&self, out: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(out, "not all of {} is in the cache: a run downloads it", self.0)
    }
}

impl std::error::Error for ToDownload {}

/// A repository's files at a commit, as the hub lists them.
#[derive(Debug)]
#[cfg_attr(not(feature = "hub"), expect(dead_code, reason = "this build has no downloads"))]
pub struct Listing {
    /// The commit.
    pub commit: String,
    /// True if it is the commit of `main`.
    pub main: bool,
    /// The files at that commit, by their paths in the repository.
    pub names: Vec<String>,
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
    /// The repository that a name may mean; `None` if it can only be a path.
    pub fn named(kind: Kind, name: &Path) -> Option<Repo> {
        let id = name.to_str().filter(|text| is_id(text))?.to_string();
        Some(Repo { kind, id })
    }

    /// Its folder in the cache, whether it exists or not.
    pub fn folder(&self) -> PathBuf {
        cache().join(format!("{}--{}", self.kind.plural(), self.id.replace('/', "--")))
    }

    /// The cached snapshot that `main` names, or the only one that there is.
    pub fn snapshot(&self) -> Option<PathBuf> {
        snapshot(&self.folder())
    }

    /// Its files at a commit, or at `main`.
    ///
    /// # Errors
    /// If no request may be sent, and where the hub cannot be reached or refuses.
    pub fn list(&self, commit: Option<&str>, access: Access) -> anyhow::Result<Listing> {
        match (downloads(), access.network) {
            (false, _) => Err(self.not_cached().into()),
            (true, false) => Err(ToDownload(self.id.clone()).into()),
            (true, true) => download::list(self, commit),
        }
    }

    /// Downloads the files of a listing that the cache lacks. Returns their snapshot.
    ///
    /// # Errors
    /// If a download or a write fails.
    pub fn get(&self, listing: &Listing, names: &[String], ui: &Ui) -> anyhow::Result<PathBuf> {
        download::get(self, listing, names, ui)
    }

    /// The error for files that are not in the cache where downloads are impossible.
    fn not_cached(&self) -> Failure {
        let help = match offline() {
            Some(why) => format!("unset {why}, or set HF_HUB_CACHE or HF_HOME to where it is"),
            None => {
                "download it with the Hugging Face tools first, set HF_HUB_CACHE or HF_HOME to where it is, \
                     or use a suasion that was built with its default features, which downloads"
                    .into()
            }
        };
        let message =
            format!("{}: no such path, and not in the local cache ({})", self.id, self.folder().display());
        let tag = if self.kind == Kind::Model { "E-MODEL" } else { "E-SOURCE" };
        Failure::run_time(tag, message, help)
    }
}

/// True if this program may download.
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
    std::env::var_os(name).filter(|v| !v.is_empty()).map(expanded)
}

/// The folder of the Hugging Face tools: `HF_HOME` or its default.
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
    fn hub_ids_and_paths_are_distinguished() {
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

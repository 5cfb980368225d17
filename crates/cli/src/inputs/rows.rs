//! Data sets: found by path, glob, folder or hub id, as files of rows.
//!
//! | named | taken |
//! |---|---|
//! | a file | the file |
//! | a glob | the files that match, in the order of their names |
//! | a folder that `datasets.save_to_disk` wrote | its files, or the files of its split |
//! | any other folder, a hub id (`owner/name`, or `owner/name/folder`) | the split: see [`splits::pick`] |
//! | several of these | all of them, one after the other |

mod splits;

use super::hub::{self, Access, Kind, Repo, ToDownload};
use crate::config::{Config, Paths};
use crate::failure::Failure;
use splits::{BESIDE, first, is_rows, names};
use std::path::{Path, PathBuf};
use suasion_data::prepared::Manifest;
use suasion_data::source::Source;
use suasion_data::source::{Saved, saved_dataset};

/// Usual names of splits that are not trained on, in order of preference.
const HELD_OUT: [&str; 5] = ["test", "validation", "valid", "eval", "dev"];

/// Files that are one source of rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFiles {
    /// Name in messages: the file itself, or what the user named.
    pub name: PathBuf,
    /// The files, in order.
    pub files: Vec<PathBuf>,
}

impl DataFiles {
    fn one(file: PathBuf) -> DataFiles {
        DataFiles { name: file.clone(), files: vec![file] }
    }

    /// Opens the files as one source.
    ///
    /// # Errors
    /// As [`Source::of`].
    pub fn open(&self) -> suasion_data::Result<Source> {
        Source::of(&self.name, self.files.iter().cloned())
    }

    /// The manifest beside the files, where they are prepared data.
    ///
    /// # Errors
    /// As [`Manifest::beside`].
    pub fn manifest(&self) -> suasion_data::Result<Option<Manifest>> {
        Manifest::of_files(&self.files)
    }
}

/// The rows that a configuration names to train on, prepare or verify.
///
/// # Errors
/// If it names none, and as [`resolve`].
pub fn training<'a>(config: &Config, access: impl Into<Access<'a>>) -> anyhow::Result<DataFiles> {
    match &config.dataset_name {
        Some(data) => resolve(data, &config.dataset_train_split, access),
        None => Err(Failure::usage("no rows are named", "give --data D, or dataset_name in CONFIG").into()),
    }
}

/// The files of a name: itself, or the named split of a folder.
///
/// # Errors
/// If a folder has no such split, a glob matches nothing, or a hub id is neither cached nor can be
/// downloaded. A file that does not exist is the reader's error. [`ToDownload`] where it can be downloaded
/// and may not.
pub fn resolve<'a>(data: &Paths, split: &str, access: impl Into<Access<'a>>) -> anyhow::Result<DataFiles> {
    let access = access.into();
    let mut parts = Vec::new();
    for path in &data.0 {
        parts.push(match Place::of(path)? {
            Place::Files(files) => files,
            Place::Folder(folder) => folder.need(split, access)?,
        });
    }
    Ok(joined(parts, data))
}

/// The rows to evaluate on, where the configuration names some or the folder of the training rows has such a
/// split.
///
/// # Errors
/// As [`resolve`].
pub fn evaluation<'a>(config: &Config, access: impl Into<Access<'a>>) -> anyhow::Result<Option<DataFiles>> {
    let access = access.into();
    let split = config.dataset_test_split.as_deref();
    if let Some(data) = &config.eval_dataset_name {
        let mut parts = Vec::new();
        for path in &data.0 {
            parts.push(match (Place::of(path)?, split) {
                (Place::Files(files), _) => files,
                (Place::Folder(folder), Some(split)) => folder.need(split, access)?,
                (Place::Folder(folder), None) => match folder.find(&HELD_OUT, access)? {
                    Some(files) => files,
                    None => folder.need("test", access)?,
                },
            });
        }
        return Ok(Some(joined(parts, data)));
    }
    let Some(data) = &config.dataset_name else { return Ok(None) };
    let mut parts = Vec::new();
    for path in &data.0 {
        match (Place::of(path)?, split) {
            (Place::Folder(folder), Some(split)) => parts.push(folder.need(split, access)?),
            // eval_fraction holds out training rows; a split of the folder does not replace it.
            (Place::Folder(folder), None) if config.eval_fraction == 0.0 => {
                parts.extend(folder.find(&HELD_OUT, access)?);
            }
            (Place::Files(_), Some(split)) => {
                return Err(Failure::config(
                    format!(
                        "dataset_test_split={split}: {} is a file, not a folder of splits",
                        path.display()
                    ),
                    "name the file to evaluate on with eval_dataset_name",
                )
                .into());
            }
            _ => {}
        }
    }
    Ok(if parts.is_empty() { None } else { Some(joined(parts, data)) })
}

/// Concatenates the parts.
fn joined(mut parts: Vec<DataFiles>, data: &Paths) -> DataFiles {
    if parts.len() == 1 {
        return parts.remove(0);
    }
    let files = parts.into_iter().flat_map(|part| part.files).collect();
    DataFiles { name: data.to_string().into(), files }
}

/// What a path from the user means.
enum Place {
    Files(DataFiles),
    Folder(Folder),
}

impl Place {
    fn of(path: &Path) -> anyhow::Result<Place> {
        if path.is_dir() {
            if let Some(Saved::Files(files)) = saved_dataset(path)? {
                return Ok(Place::Files(DataFiles { name: path.to_path_buf(), files }));
            }
            return Ok(Place::Folder(Folder::Local(path.to_path_buf())));
        }
        let text = path.to_string_lossy();
        if path.exists() {
            return Ok(Place::Files(DataFiles::one(path.to_path_buf())));
        }
        if text.contains(['*', '?', '[']) {
            return Ok(Place::Files(DataFiles { name: path.to_path_buf(), files: matches(&text)? }));
        }
        // `rows.jsonl` and `data/rows.jsonl` could be hub ids: they are taken as files.
        if !is_rows(&text)
            && let Some((repo, base)) = hub_data_set(&text)
            && (text.contains('/') || repo.snapshot().is_some())
        {
            return Ok(Place::Folder(Folder::Hub { repo, base }));
        }
        Ok(Place::Files(DataFiles::one(path.to_path_buf())))
    }
}

/// A data set of the hub, and the folder in it that is meant.
fn hub_data_set(text: &str) -> Option<(Repo, String)> {
    let parts: Vec<&str> = text.splitn(3, '/').collect();
    let repo = Repo::named(Kind::Dataset, Path::new(&parts[..parts.len().min(2)].join("/")))?;
    let base = parts.get(2).map(|base| base.trim_end_matches('/')).filter(|base| !base.is_empty());
    Some((repo, base.map(|base| format!("{base}/")).unwrap_or_default()))
}

/// The files that match a glob.
fn matches(pattern: &str) -> anyhow::Result<Vec<PathBuf>> {
    let found = glob::glob(pattern).map_err(|e| {
        let message = format!("{pattern}: no file, and as a glob it is wrong: {}", e.msg);
        Failure::run_time("E-SOURCE", message, "*, ?, [a-z] and ** stand for parts of names")
    })?;
    let mut files = Vec::new();
    for path in found {
        let path = path.map_err(|e| {
            let at = e.path().to_path_buf();
            suasion_data::Error::io(at, e.into())
        })?;
        let name = path.to_string_lossy();
        if path.is_file() && !BESIDE.iter().any(|ending| name.ends_with(ending)) {
            files.push(path);
        }
    }
    files.sort();
    if files.is_empty() {
        let message = format!("{pattern}: no file matches");
        return Err(
            Failure::run_time("E-SOURCE", message, "check the pattern and the folder it starts in").into()
        );
    }
    Ok(files)
}

/// A folder of splits.
enum Folder {
    Local(PathBuf),
    Hub { repo: Repo, base: String },
}

impl Folder {
    fn name(&self) -> PathBuf {
        match self {
            Folder::Local(path) => path.clone(),
            Folder::Hub { repo, base } => Path::new(&repo.id).join(base.trim_end_matches('/')),
        }
    }

    /// The files of the first of these splits that exists.
    fn find(&self, splits: &[&str], access: Access) -> anyhow::Result<Option<DataFiles>> {
        match self {
            Folder::Local(path) => {
                for split in splits {
                    // A split of a `DatasetDict`, whose folder holds more than files of rows.
                    let name = path.join(split);
                    if let Some(Saved::Files(files)) = saved_dataset(&name)? {
                        return Ok(Some(DataFiles { name, files }));
                    }
                    if let Some(found) = self.files(path, first(&names(path), &[split]))? {
                        return Ok(Some(found));
                    }
                }
                Ok(None)
            }
            Folder::Hub { repo, base } => self.find_in_hub(repo, base, splits, access),
        }
    }

    /// Searches the cache, and where that lacks the first split, the hub: with one request, and at the commit
    /// that the cache has, so that splits of two commits do not mix.
    fn find_in_hub(
        &self,
        repo: &Repo,
        base: &str,
        splits: &[&str],
        access: Access,
    ) -> anyhow::Result<Option<DataFiles>> {
        let Some(snapshot) = repo.snapshot() else {
            let listing = repo.list(None, access)?;
            return self.download(repo, base, splits, &listing, access);
        };
        let folder = snapshot.join(base);
        // Other tools may have downloaded only some of the splits.
        let cached = first(&names(&folder), splits);
        if !hub::downloads() || matches!(&cached, Ok(Some((split, _))) if *split == splits[0]) {
            return self.files(&folder, cached);
        }
        let commit = snapshot.file_name().and_then(|name| name.to_str());
        match repo.list(commit, access) {
            Ok(listing) => self.download(repo, base, splits, &listing, access),
            Err(error) if error.is::<ToDownload>() => Err(error),
            Err(error) => {
                access.ui.warn(format_args!("{error}; going on with {}", snapshot.display()));
                self.files(&folder, cached)
            }
        }
    }

    /// Downloads the first of the splits that a listing has.
    fn download(
        &self,
        repo: &Repo,
        base: &str,
        splits: &[&str],
        listing: &hub::Listing,
        access: Access,
    ) -> anyhow::Result<Option<DataFiles>> {
        let inside = listing.names.iter().filter_map(|name| name.strip_prefix(base));
        let inside: Vec<String> = inside.map(String::from).collect();
        let found = first(&inside, splits).map_err(|message| self.error(&message))?;
        let Some((split, names)) = found else { return Ok(None) };
        let paths: Vec<String> = names.iter().map(|name| format!("{base}{name}")).collect();
        let snapshot = repo.get(listing, &paths, access.ui)?;
        self.files(&snapshot.join(base), Ok(Some((split, names))))
    }

    /// The files of a split from the result of [`first`].
    fn files(
        &self,
        folder: &Path,
        found: Result<Option<(&str, Vec<String>)>, String>,
    ) -> anyhow::Result<Option<DataFiles>> {
        let Some((split, names)) = found.map_err(|message| self.error(&message))? else { return Ok(None) };
        let files: Vec<PathBuf> = names.iter().map(|name| folder.join(name)).collect();
        Ok(match (self, files.as_slice()) {
            (Folder::Local(_), [file]) => Some(DataFiles::one(file.clone())),
            _ => Some(DataFiles { name: self.name().join(split), files }),
        })
    }

    /// The files of a split; its absence is an error that lists what there is.
    fn need(&self, split: &str, access: Access) -> anyhow::Result<DataFiles> {
        if let Some(files) = self.find(&[split], access)? {
            return Ok(files);
        }
        let has = match self {
            Folder::Local(path) => names(path),
            Folder::Hub { repo, base } => {
                repo.snapshot().map(|snapshot| names(&snapshot.join(base))).unwrap_or_default()
            }
        };
        let mut has: Vec<&str> = has.iter().map(String::as_str).filter(|name| is_rows(name)).collect();
        let more = if has.len() > 12 { ", .." } else { "" };
        has.truncate(12);
        let has = if has.is_empty() { "no files of rows".into() } else { has.join(", ") };
        Err(self
            .error(&format!(
                "the folder has no {split}.jsonl, and no {split} in another format, in shards or as a folder; it has {has}{more}"
            ))
            .into())
    }

    fn error(&self, message: &str) -> Failure {
        Failure::run_time(
            "E-SOURCE",
            format!("{}: {message}", self.name().display()),
            "name the file itself, a glob such as 'folder/*.jsonl', or the split with dataset_train_split or dataset_test_split",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ui::{ColorChoice, Ui};

    fn ui() -> Ui {
        Ui::new(false, true, ColorChoice::Never)
    }

    fn paths(path: &Path) -> Paths {
        Paths::from(path.to_path_buf())
    }

    #[test]
    fn splits_are_found_in_folders() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        assert!(resolve(&paths(path), "train", &ui()).is_err());
        std::fs::write(path.join("train.jsonl.zst"), "").unwrap();
        std::fs::write(path.join("valid.json"), "").unwrap();
        let one = |name: &str| DataFiles::one(path.join(name));
        assert_eq!(resolve(&paths(path), "train", &ui()).unwrap(), one("train.jsonl.zst"));
        let mut config = Config { dataset_name: Some(paths(path)), ..Config::default() };
        assert_eq!(evaluation(&config, &ui()).unwrap(), Some(one("valid.json")));
        config.dataset_test_split = Some("extra".into());
        assert!(evaluation(&config, &ui()).is_err());
        config.dataset_test_split = None;
        config.eval_fraction = 0.1;
        assert_eq!(evaluation(&config, &ui()).unwrap(), None);
    }

    #[test]
    fn what_a_path_means() {
        let hub = |text: &str| match Place::of(Path::new(text)).unwrap() {
            Place::Folder(Folder::Hub { repo, base }) => Some((repo.id, base)),
            _ => None,
        };
        assert_eq!(hub("nobody/nothing"), Some(("nobody/nothing".into(), String::new())));
        assert_eq!(hub("nobody/nothing/main"), Some(("nobody/nothing".into(), "main/".into())));
        for path in ["nobody/nothing.jsonl", "rows.csv.gz", "nothing", "./a/b", "/a/b"] {
            assert_eq!(hub(path), None, "{path}");
        }
    }
}

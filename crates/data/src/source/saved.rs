//! Folders written by `datasets.save_to_disk`.

use super::source_error;
use crate::{Error, Result};
use serde_json::Value;
use std::io;
use std::path::{Path, PathBuf};

/// The content of a folder written by `datasets.save_to_disk`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Saved {
    /// A `Dataset`: its Arrow files, in order.
    Files(Vec<PathBuf>),
    /// A `DatasetDict`: the names of its splits, each of which is a `Dataset` in the subfolder of that name.
    Splits(Vec<String>),
}

/// Inspects a folder; `None` if it was not written by `datasets.save_to_disk`.
///
/// # Errors
/// [`Error::Io`]; [`Error::Source`] if `state.json` or `dataset_dict.json` is malformed, names files that are
/// missing or outside of the folder, or selects its rows by indices stored in another file.
pub fn saved_dataset(folder: impl AsRef<Path>) -> Result<Option<Saved>> {
    let folder = folder.as_ref();
    let help = "save the dataset again with datasets' save_to_disk";
    if let Some((path, dict)) = json_file(folder.join("dataset_dict.json"))? {
        let splits = dict.get("splits").and_then(Value::as_array);
        let names = splits.and_then(|s| s.iter().map(|s| s.as_str().map(str::to_string)).collect());
        let names: Vec<String> =
            names.ok_or_else(|| source_error(&path, "has no list of \"splits\"", help))?;
        if let Some(bad) = names.iter().find(|name| !is_plain(name)) {
            return Err(source_error(&path, &format!("{bad:?} is not the name of a split"), help));
        }
        return Ok(Some(Saved::Splits(names)));
    }
    let Some((path, state)) = json_file(folder.join("state.json"))? else { return Ok(None) };
    let Some(listed) = state.get("_data_files").and_then(Value::as_array) else { return Ok(None) };
    let indices = state.as_object().into_iter().flatten().find(|(key, value)| {
        key.starts_with("_indices") && !value.is_null() && value.as_array().is_none_or(|a| !a.is_empty())
    });
    if let Some((key, _)) = indices {
        return Err(source_error(
            &path,
            &format!("its rows are selected by indices in another file ({key:?})"),
            "load it, call flatten_indices(), and save it again",
        ));
    }
    let mut files = Vec::with_capacity(listed.len());
    for entry in listed {
        let name = entry.get("filename").and_then(Value::as_str).filter(|name| is_plain(name));
        let Some(name) = name else {
            return Err(source_error(&path, &format!("{entry} is not a file of this folder"), help));
        };
        let file = folder.join(name);
        if !file.is_file() {
            return Err(source_error(&path, &format!("the file {name:?} is missing"), help));
        }
        files.push(file);
    }
    if files.is_empty() {
        return Err(source_error(&path, "the dataset has no files", help));
    }
    Ok(Some(Saved::Files(files)))
}

/// True for a plain name: one path component, which cannot lead out of the folder.
fn is_plain(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!(parts.next(), Some(std::path::Component::Normal(_))) && parts.next().is_none()
}

/// A small JSON file and its path; `None` if it does not exist.
fn json_file(path: PathBuf) -> Result<Option<(PathBuf, Value)>> {
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(e) => return Err(Error::io(path, e)),
    };
    match serde_json::from_slice(&bytes) {
        Ok(value) => Ok(Some((path, value))),
        Err(e) => {
            let message = format!("is not JSON: {e}");
            Err(source_error(&path, &message, "save the dataset again with datasets' save_to_disk"))
        }
    }
}

//! Folders that `datasets.save_to_disk` wrote.

use super::source_error;
use crate::{Error, Result};
use serde_json::Value;
use std::io;
use std::path::{Path, PathBuf};

/// What a folder of `datasets.save_to_disk` holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Saved {
    /// A `Dataset`: its Arrow files, in order.
    Files(Vec<PathBuf>),
    /// A `DatasetDict`: the names of its splits, each a `Dataset` in the folder of its name.
    Splits(Vec<String>),
}

/// Looks into a folder; `None` where `datasets.save_to_disk` did not write it.
///
/// # Errors
/// [`Error::Io`]; [`Error::Source`] where its `state.json` or `dataset_dict.json` is broken, names files outside
/// of the folder or that are not there, or has rows selected by indices that lie in another file.
pub fn saved_dataset(folder: impl AsRef<Path>) -> Result<Option<Saved>> {
    let folder = folder.as_ref();
    let help = "save the dataset again with datasets' save_to_disk";
    if let Some((path, dict)) = json_file(folder.join("dataset_dict.json"))? {
        let splits = dict.get("splits").and_then(Value::as_array);
        let names = splits.and_then(|s| s.iter().map(|s| s.as_str().map(str::to_string)).collect());
        let names: Vec<String> =
            names.ok_or_else(|| source_error(&path, "has no list of \"splits\"", help))?;
        if let Some(bad) = names.iter().find(|name| !is_plain(name)) {
            return Err(source_error(&path, &format!("{bad:?} is no name of a split"), help));
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
            return Err(source_error(&path, &format!("{entry} is no file of this folder"), help));
        };
        let file = folder.join(name);
        if !file.is_file() {
            return Err(source_error(&path, &format!("the file {name:?} is not there"), help));
        }
        files.push(file);
    }
    if files.is_empty() {
        return Err(source_error(&path, "the dataset has no files", help));
    }
    Ok(Some(Saved::Files(files)))
}

/// True for the name of something in a folder, and not of something elsewhere.
fn is_plain(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!(parts.next(), Some(std::path::Component::Normal(_))) && parts.next().is_none()
}

/// The JSON in a small file; `None` where there is no such file.
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

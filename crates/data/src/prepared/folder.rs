//! A folder for `datasets.load_from_disk`: Arrow streams with `state.json` and `dataset_info.json`.

use super::columnar::Columns;
use super::manifest::OutputFile;
use super::names::MANIFEST;
use crate::{Error, Result};
use serde::Serialize;
use serde_json::{Value, json};
use std::io;
use std::path::{Path, PathBuf};
use suasion_files::{Written, sync_folder, write_atomic};

/// The size of a file in such a folder, about that of `datasets`.
pub(super) const SHARD_BYTES: u64 = 500_000_000;

/// Names in the scratch folder: the new dataset until it is complete, and the one that it replaces.
const NEW: &str = "folder";
const FORMER: &str = "former";

/// The files of a dataset that describe its files of rows.
const ABOUT: [&str; 2] = ["dataset_info.json", "state.json"];

/// Makes a dataset of finished Arrow streams, which are moved, and renames it to `target`. It is assembled in
/// `scratch`, a folder beside `target`. `fingerprint` is the manifest's, and `manifest` gets the files that
/// describe the others.
///
/// # Errors
/// [`Error::Io`]; [`Error::Source`] as [`replaceable`].
pub fn publish<M: Serialize>(
    shards: &[PathBuf],
    target: &Path,
    columns: Columns,
    fingerprint: &str,
    manifest: impl FnOnce(Vec<OutputFile>) -> M,
    scratch: &Path,
) -> Result<()> {
    let folder = scratch.join(NEW);
    let io_error = |e| Error::io(&folder, e);
    if folder.exists() {
        std::fs::remove_dir_all(&folder).map_err(io_error)?;
    }
    std::fs::create_dir(&folder).map_err(io_error)?;
    let n = shards.len();
    let names: Vec<String> = (0..n).map(|i| file_name(i, n)).collect();
    for (shard, name) in shards.iter().zip(&names) {
        std::fs::rename(shard, folder.join(name)).map_err(|e| Error::io(shard, e))?;
    }
    let [info, state] = ABOUT.map(|name| folder.join(name));
    write_json(&info, &dataset_info(&columns))?;
    write_json(&state, &state_json(&names, fingerprint))?;
    let about = |name: &str| Ok(OutputFile { name: name.into(), written: Written::of(&folder.join(name))? });
    let about = ABOUT.into_iter().map(about).collect::<Result<_>>()?;
    // Last: a folder with a manifest is complete.
    write_json(&folder.join(MANIFEST), &manifest(about))?;
    replaceable(target)?;
    appear(&folder, target, &scratch.join(FORMER)).map_err(|e| Error::io(target, e))
}

/// Completes a replacement that was killed between two renames: the new dataset is renamed if it is complete, else
/// the former one gets its name back.
///
/// # Errors
/// [`Error::Io`].
pub(super) fn recover(target: &Path, scratch: &Path) -> Result<()> {
    let whole = |name: &str| scratch.join(name).join("state.json").is_file();
    let new = scratch.join(NEW);
    let left = if new.join(MANIFEST).is_file() { NEW } else { FORMER };
    if !target.exists() && whole(left) {
        std::fs::rename(scratch.join(left), target).map_err(|e| Error::io(target, e))?;
        sync_folder(target);
    }
    Ok(())
}

/// The name of one of the Arrow streams of a dataset.
pub(super) fn file_name(file: usize, of: usize) -> String {
    format!("data-{file:05}-of-{of:05}.arrow")
}

/// `state.json` of a dataset: its files in order, and the fingerprint that `datasets` caches under.
fn state_json(files: &[String], fingerprint: &str) -> Value {
    let files: Vec<Value> = files.iter().map(|name| json!({"filename": name})).collect();
    // `datasets` uses 16 hexadecimal digits.
    let fingerprint: String = fingerprint.chars().take(16).collect();
    json!({"_data_files": files, "_fingerprint": fingerprint, "_format_columns": null, "_format_kwargs": {},
        "_format_type": null, "_output_all_columns": false, "_split": null})
}

/// `dataset_info.json` of a dataset.
fn dataset_info(columns: &Columns) -> Value {
    json!({"citation": "", "description": "", "features": columns.features(), "homepage": "", "license": ""})
}

pub(super) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    Ok(write_atomic(path, |w| {
        serde_json::to_writer_pretty(&mut *w, value)?;
        w.write_all(b"\n")
    })?)
}

/// Checks that an output folder does not exist, is empty, or is a dataset that suasion prepared.
///
/// # Errors
/// [`Error::Source`] for a file, a folder with any other content, and a dataset without a manifest.
pub fn replaceable(target: &Path) -> Result<()> {
    let refuse = |message: String| {
        Err(Error::Source { path: target.to_path_buf(), message, help: "name another folder".into() })
    };
    let entries = match std::fs::read_dir(target) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => {
            return refuse("is a file; a dataset is a folder".into());
        }
        Err(e) => return Err(Error::io(target, e)),
    };
    let mut files = 0;
    for entry in entries {
        files += 1;
        let name = entry.map_err(|e| Error::io(target, e))?.file_name();
        let name = name.to_string_lossy();
        let arrow = name.ends_with(".arrow") && (name.starts_with("data-") || name.starts_with("cache-"));
        if !arrow && name != MANIFEST && !ABOUT.contains(&&*name) {
            return refuse(format!("is a folder that holds {name:?}, which is not part of a dataset"));
        }
    }
    if files > 0 && !target.join(MANIFEST).is_file() {
        return refuse("is a dataset that suasion did not prepare".into());
    }
    Ok(())
}

/// Renames a complete folder to `target`; the previous folder is renamed to `former`.
fn appear(folder: &Path, target: &Path, former: &Path) -> io::Result<()> {
    // Between the two renames there is no dataset with the name, but never an incomplete one.
    let replaces = target.exists();
    if replaces {
        std::fs::rename(target, former)?;
    }
    if let Err(e) = std::fs::rename(folder, target) {
        if replaces {
            let _ = std::fs::rename(former, target);
        }
        return Err(e);
    }
    sync_folder(target);
    Ok(())
}

//! The files of a model's folder, some of them with changed contents.

use crate::{Error, Result};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// The files of a folder. Files that a run changes for its model are not written to the folder, but kept in memory
/// and read from there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FolderFiles {
    dir: PathBuf,
    changed: Vec<(String, Vec<u8>)>,
}

impl FolderFiles {
    /// The files as they are in the folder.
    pub fn of(dir: &Path) -> FolderFiles {
        FolderFiles { dir: dir.to_path_buf(), changed: Vec::new() }
    }

    /// The changed files, by name.
    pub fn changed(&self) -> &[(String, Vec<u8>)] {
        &self.changed
    }

    /// The path of a file, whether or not it exists.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// A file's contents; `None` if it does not exist.
    pub(crate) fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        if let Some((_, bytes)) = self.changed.iter().find(|(changed, _)| changed == name) {
            return Ok(Some(bytes.clone()));
        }
        let path = self.path(name);
        match std::fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io(path, error)),
        }
    }

    /// A file's JSON; `None` if it does not exist.
    pub(super) fn json(&self, name: &str) -> Result<Option<Value>> {
        let Some(bytes) = self.read(name)? else { return Ok(None) };
        serde_json::from_slice(&bytes).map(Some).map_err(|error| not_json(&self.path(name), &error))
    }

    /// Changes the contents of a file; equal contents are not recorded.
    pub(super) fn change(&mut self, name: &str, bytes: Vec<u8>) -> Result<()> {
        if self.read(name)?.as_ref() != Some(&bytes) {
            self.changed.retain(|(changed, _)| changed != name);
            self.changed.push((name.to_string(), bytes));
        }
        Ok(())
    }
}

pub(super) fn not_json(path: &Path, error: &serde_json::Error) -> Error {
    Error::Tokenizer {
        path: path.to_path_buf(),
        message: format!("not valid JSON ({error}); copy the file again from where the model came"),
    }
}

//! Inputs are never replaced by outputs.

use crate::failure::Failure;
use std::path::Path;
use suasion_train::ModelFiles;

/// Refuses an output file that a command reads: one of `files`, or a model's file in one of the `folders`.
///
/// # Errors
/// If it is; the message names both.
pub fn check_output<'a>(
    flag: &str,
    output: &Path,
    files: impl IntoIterator<Item = &'a Path>,
    folders: impl IntoIterator<Item = &'a Path>,
) -> anyhow::Result<()> {
    // Only a file that exists can be read.
    let Ok(place) = output.canonicalize() else { return Ok(()) };
    let same = |file: &&Path| file.canonicalize().is_ok_and(|file| file == place);
    let name = place.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let of_model = ModelFiles::NAMES.contains(&name.as_str()) || name.contains(".safetensors");
    let inside = |folder: &&Path| {
        of_model && folder.canonicalize().is_ok_and(|folder| place.parent() == Some(&folder))
    };
    let read = files.into_iter().find(same).or_else(|| folders.into_iter().find(inside));
    match read {
        Some(read) => Err(Failure::usage(
            format!("{flag} {}: it would replace what is read: {}", output.display(), read.display()),
            "write to another name",
        )
        .into()),
        None => Ok(()),
    }
}

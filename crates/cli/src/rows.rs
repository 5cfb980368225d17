//! From what the user calls a data set to files of rows.

use crate::config::Config;
use crate::failure::Failure;
use std::path::{Path, PathBuf};

/// Endings of row files, in the order in which they are tried.
const ENDINGS: [&str; 3] = ["jsonl", "json", "ndjson"];
/// What may follow an ending.
const COMPRESSED: [&str; 3] = ["", ".gz", ".zst"];
/// Names that people give to the file that is not trained on.
const HELD_OUT: [&str; 5] = ["test", "validation", "valid", "eval", "dev"];

/// The file of a split in a folder.
fn split_in(folder: &Path, split: &str) -> Option<PathBuf> {
    ENDINGS
        .iter()
        .flat_map(|ending| COMPRESSED.map(|compressed| folder.join(format!("{split}.{ending}{compressed}"))))
        .find(|path| path.is_file())
}

/// The rows to train on, prepare or verify: a file, or the named split of a folder.
///
/// # Errors
/// Where a folder has no such split. A file that does not exist is the reader's error.
pub fn resolve(data: &Path, split: &str) -> anyhow::Result<PathBuf> {
    if !data.is_dir() {
        return Ok(data.to_path_buf());
    }
    split_in(data, split).ok_or_else(|| {
        Failure::run_time(
            "E-SOURCE",
            format!("{}: the folder has no {split}.jsonl or {split}.json (also .gz or .zst)", data.display()),
            "name the file itself, or the split with dataset_train_split or dataset_test_split",
        )
        .into()
    })
}

/// The rows to evaluate on, where the configuration or the folder has any.
pub fn evaluation(config: &Config) -> anyhow::Result<Option<PathBuf>> {
    let split = config.dataset_test_split.as_deref();
    if let Some(path) = &config.eval_dataset_name {
        if !path.is_dir() {
            return Ok(Some(path.clone()));
        }
        return match split {
            Some(split) => resolve(path, split).map(Some),
            None => match HELD_OUT.iter().find_map(|split| split_in(path, split)) {
                Some(file) => Ok(Some(file)),
                None => resolve(path, "test").map(Some),
            },
        };
    }
    match &config.dataset_name {
        Some(folder) if folder.is_dir() => match split {
            Some(split) => resolve(folder, split).map(Some),
            // A fraction that was asked for is what was asked for.
            None if config.eval_fraction > 0.0 => Ok(None),
            None => Ok(HELD_OUT.iter().find_map(|split| split_in(folder, split))),
        },
        Some(file) => match split {
            Some(split) => Err(Failure::config(
                format!("dataset_test_split={split}: {} is a file, not a folder of splits", file.display()),
                "name the file to evaluate on with eval_dataset_name",
            )
            .into()),
            None => Ok(None),
        },
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_are_found_in_folders() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        assert!(resolve(path, "train").is_err());
        std::fs::write(path.join("train.jsonl.zst"), "").unwrap();
        std::fs::write(path.join("valid.json"), "").unwrap();
        assert_eq!(resolve(path, "train").unwrap(), path.join("train.jsonl.zst"));
        let mut config = Config { dataset_name: Some(path.into()), ..Config::default() };
        assert_eq!(evaluation(&config).unwrap(), Some(path.join("valid.json")));
        config.dataset_test_split = Some("extra".into());
        assert!(evaluation(&config).is_err());
        config.dataset_test_split = None;
        config.eval_fraction = 0.1;
        assert_eq!(evaluation(&config).unwrap(), None);
    }
}

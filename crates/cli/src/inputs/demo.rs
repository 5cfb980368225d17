//! The embedded data set of `suasion train --demo`: rows, and a model folder without weights.

use crate::failure::{Exit, Failure};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

const ROWS: &str = include_str!("../../../../examples/persuasion/rows.jsonl");

/// The model folder: configuration and tokenizer, no weights.
const MODEL_FILES: [(&str, &[u8]); 3] = [
    ("config.json", include_bytes!("../../../../examples/persuasion/config.json")),
    ("tokenizer.json", include_bytes!("../../../../examples/persuasion/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../../../../examples/persuasion/tokenizer_config.json")),
];

/// One view in this many is held out, with all replies to it.
const HELD_OUT_ONE_IN: usize = 10;

/// The demo's working folder.
pub struct Files {
    /// The model folder.
    pub model: PathBuf,
    /// The folder of train.jsonl and test.jsonl.
    pub data: PathBuf,
    /// The output folder of the run.
    pub run: PathBuf,
    /// Rows that are trained on.
    pub train_rows: usize,
    /// Rows that are held out.
    pub held_out_rows: usize,
}

impl Files {
    /// Writes rows, tokenizer and configuration below `folder`.
    ///
    /// # Errors
    /// If the folder is neither empty nor that of an earlier demo, or cannot be written to.
    pub fn write(folder: &Path) -> anyhow::Result<Files> {
        let (train, test) = split(ROWS);
        let files = Files {
            model: folder.join("model"),
            data: folder.join("data"),
            run: folder.join("run"),
            train_rows: train.lines().count(),
            held_out_rows: test.lines().count(),
        };
        let filled = std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some());
        // Only the folder of an earlier demo is replaced.
        if filled && !files.data.join("train.jsonl").is_file() {
            return Err(Failure {
                tag: "E-OUTPUT",
                message: format!(
                    "{}: the output folder is not empty and not that of an earlier demo",
                    folder.display()
                ),
                help: Some("choose another: --set output_dir=FOLDER".into()),
                exit: Exit::Usage,
            }
            .into());
        }
        let put = |path: PathBuf, bytes: &[u8]| -> suasion_data::Result<()> {
            let parent = path.parent().unwrap_or(folder);
            std::fs::create_dir_all(parent).map_err(|e| suasion_data::Error::io(parent, e))?;
            std::fs::write(&path, bytes).map_err(|e| suasion_data::Error::io(&path, e))
        };
        for (name, bytes) in MODEL_FILES {
            put(files.model.join(name), bytes)?;
        }
        put(files.data.join("train.jsonl"), train.as_bytes())?;
        put(files.data.join("test.jsonl"), test.as_bytes())?;
        Ok(files)
    }
}

/// Training rows and held-out rows. All replies to a view are in one of the two; the hash of its name decides
/// in which.
fn split(rows: &str) -> (String, String) {
    let view = |line: &str| -> String {
        let row: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
        row["view"].as_str().unwrap_or_default().to_string()
    };
    let views: BTreeSet<String> = rows.lines().map(view).collect();
    let mut order: Vec<&String> = views.iter().collect();
    order.sort_by_cached_key(|view| *blake3::hash(view.as_bytes()).as_bytes());
    let held_out: BTreeSet<&String> =
        order[order.len() - order.len().div_ceil(HELD_OUT_ONE_IN)..].iter().copied().collect();
    let (mut train, mut test) = (String::new(), String::new());
    for line in rows.lines().filter(|line| !line.trim().is_empty()) {
        let file = if held_out.contains(&view(line)) { &mut test } else { &mut train };
        file.push_str(line);
        file.push('\n');
    }
    (train, test)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_views_are_held_out() {
        let (train, test) = split(ROWS);
        let views = |text: &str| -> BTreeSet<String> {
            text.lines()
                .map(|line| {
                    serde_json::from_str::<serde_json::Value>(line).unwrap()["view"]
                        .as_str()
                        .unwrap()
                        .to_string()
                })
                .collect()
        };
        let (train_views, test_views) = (views(&train), views(&test));
        assert!(train_views.is_disjoint(&test_views));
        assert!(test_views.len() >= 4 && test_views.len() * 5 < train_views.len());
        assert_eq!(train.lines().count() + test.lines().count(), ROWS.lines().count());
    }

    #[test]
    fn there_are_enough_rows_and_none_is_copied_from_another() {
        let mut texts = BTreeSet::new();
        let mut views = BTreeSet::new();
        for line in ROWS.lines() {
            let row: serde_json::Value = serde_json::from_str(line).unwrap();
            let (input, full) = (row["input_text"].as_str().unwrap(), row["full_text"].as_str().unwrap());
            let response = full.strip_prefix(input).expect("full_text starts with input_text");
            assert!(texts.insert(response.to_string()), "{response}");
            for marker in ["[SYSTEM]", "[CONTEXT]", "[TASK]", "[RESPONSE]"] {
                assert_eq!(input.matches(marker).count(), 1, "{input}");
            }
            views.insert(row["view"].as_str().unwrap().to_string());
        }
        assert!(texts.len() >= 160 && views.len() >= 40);
    }
}

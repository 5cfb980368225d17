//! The names of an output's files, and the options that affect their bytes apart from the labels.

use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The manifest's name in a folder for `datasets.load_from_disk`, which ignores other files.
pub(super) const MANIFEST: &str = "manifest.json";

/// A format of prepared data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// JSON Lines, possibly compressed.
    Lines,
    /// Parquet.
    Parquet,
    /// A folder for `datasets.load_from_disk`: Arrow streams, always in shards.
    Folder,
}

impl Form {
    /// The format of an output, by its name: a name without an extension means a folder, unless a file with that
    /// name exists. `None` for any other name.
    pub fn of(path: &Path) -> Option<Form> {
        let name = path.file_name()?.to_str()?.to_ascii_lowercase();
        let plain = name.strip_suffix(".gz").or(name.strip_suffix(".zst")).unwrap_or(&name);
        match plain {
            _ if path.is_dir() || (!plain.contains('.') && !path.exists()) => Some(Form::Folder),
            _ if plain.ends_with(".jsonl") => Some(Form::Lines),
            _ if name.ends_with(".parquet") => Some(Form::Parquet),
            _ => None,
        }
    }

    /// The extension of an output's files of records.
    pub(super) fn ending(self, output: &Path) -> String {
        match self {
            Form::Folder => ".arrow".into(),
            Form::Lines | Form::Parquet => ending(output),
        }
    }
}

/// The options that affect the bytes of prepared data apart from its labels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Add the rendered text to each record.
    #[serde(default)]
    pub with_text: bool,
    /// The approximate maximum size of a file in bytes, before compression; `None` for one file of any size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_shard_bytes: Option<u64>,
}

/// `x.jsonl`, `x.jsonl.gz`, `x-00001-of-00003.jsonl` or `x` → `x`.
pub(super) fn stem(path: &Path) -> PathBuf {
    let (name, _) = name_and_ending(path);
    path.with_file_name(without_shard(&name).unwrap_or(&name))
}

/// `.jsonl.gz` of `x.jsonl.gz` and of `x-00001-of-00003.jsonl.gz`.
pub(super) fn ending(path: &Path) -> String {
    name_and_ending(path).1
}

pub(super) fn name_and_ending(path: &Path) -> (String, String) {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let plain = name.strip_suffix(".gz").or(name.strip_suffix(".zst")).unwrap_or(&name);
    let plain = [".jsonl", ".json", ".parquet"].iter().find_map(|e| plain.strip_suffix(e)).unwrap_or(plain);
    (plain.to_string(), name[plain.len()..].to_string())
}

/// `x` of `x-00001-of-00003`.
pub(super) fn without_shard(name: &str) -> Option<&str> {
    let number = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
    let (rest, of) = name.rsplit_once("-of-").filter(|(_, of)| number(of))?;
    let (stem, at) = rest.rsplit_once('-').filter(|(_, at)| number(at))?;
    (at < of).then_some(stem)
}

/// `x-00001-of-00003.jsonl` for the second of three shards of `x.jsonl`, as on the Hugging Face hub.
pub fn shard_path(data: &Path, shard: usize, of: usize) -> PathBuf {
    beside(data, &format!("-{shard:05}-of-{of:05}{}", ending(data)))
}

/// `x.jsonl.findings.jsonl` beside `x.jsonl`, `x.findings.jsonl` beside the folder `x`.
pub fn findings_path(data: &Path) -> PathBuf {
    of_whole(data, ".findings.jsonl")
}

/// The manifest of an output: `x.jsonl.manifest.json` beside `x.jsonl`, `x/manifest.json` in the folder `x`.
pub fn manifest_path(output: &Path) -> PathBuf {
    match Form::of(output) {
        Some(Form::Folder) => output.join(MANIFEST),
        _ => of_whole(output, ".manifest.json"),
    }
}

/// The manifest and the findings of an output under the names that earlier versions gave them: `x.manifest.json` and
/// `x.findings.jsonl` beside `x.jsonl`. A folder's have not changed.
pub(super) fn former_names(output: &Path) -> Option<[PathBuf; 2]> {
    match Form::of(output) {
        Some(Form::Folder) => None,
        Some(Form::Parquet) => Some([manifest_path(output), beside(output, ".findings.jsonl")]),
        Some(Form::Lines) | None => {
            Some([beside(output, ".manifest.json"), beside(output, ".findings.jsonl")])
        }
    }
}

/// The folder of an unfinished run's finished shards.
pub(super) fn partial_path(output: &Path) -> PathBuf {
    match Form::of(output) {
        Some(Form::Folder) => beside(output, ".folder.partial"),
        _ => of_whole(output, ".partial"),
    }
}

/// A path made from the whole name of the output, `x.jsonl` followed by `ending`; for a shard, from that of its
/// output.
fn of_whole(output: &Path, ending: &str) -> PathBuf {
    match Form::of(output) {
        Some(Form::Folder) => beside(output, ending),
        _ => beside(output, &(self::ending(output) + ending)),
    }
}

fn beside(output: &Path, ending: &str) -> PathBuf {
    let mut name = stem(output).into_os_string();
    name.push(ending);
    name.into()
}

/// True if writing to `output`, in shards or not, could replace `file`.
pub fn replaces(output: &Path, file: &Path) -> bool {
    // The output need not exist; but if its folder does not exist either, nothing is replaced.
    let canonical = |path: &Path| {
        path.canonicalize().unwrap_or_else(|_| {
            let folder = match path.parent() {
                Some(folder) if !folder.as_os_str().is_empty() => folder,
                _ => Path::new("."),
            };
            let folder = folder.canonicalize().unwrap_or_else(|_| folder.to_path_buf());
            path.file_name().map_or(folder.clone(), |name| folder.join(name))
        })
    };
    let file = canonical(file);
    let is_shard_or_whole = || ending(&file) == ending(output) && stem(&file) == canonical(&stem(output));
    match Form::of(output) {
        Some(Form::Folder) if file.starts_with(canonical(output)) => return true,
        Some(Form::Lines | Form::Parquet) if is_shard_or_whole() || file == canonical(output) => return true,
        _ => {}
    }
    [findings_path(output), manifest_path(output)].iter().any(|path| canonical(path) == file)
}

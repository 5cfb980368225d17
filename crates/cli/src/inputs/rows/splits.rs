//! Finds the files of a split among the names in a folder.

use std::collections::BTreeMap;
use std::path::Path;

/// Endings of row files, in the order in which they are tried.
const ENDINGS: [&str; 7] = ["jsonl", "json", "ndjson", "csv", "tsv", "parquet", "arrow"];
/// What may follow an ending.
const COMPRESSED: [&str; 3] = ["", ".gz", ".zst"];
/// Endings of the files that `prepare` writes beside its rows.
pub const BESIDE: [&str; 2] = [".manifest.json", ".findings.jsonl"];
/// Folders of a data set in which splits are searched.
const BASES: [&str; 2] = ["", "data/"];

/// The files of a folder, at most two folders deep, by their sorted relative paths.
pub fn names(folder: &Path) -> Vec<String> {
    fn walk(folder: &Path, prefix: &str, depth: usize, out: &mut Vec<String>) {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let path = entry.path();
            if name.starts_with('.') {
                continue;
            }
            if path.is_file() {
                out.push(format!("{prefix}{name}"));
            } else if depth > 0 {
                walk(&path, &format!("{prefix}{name}/"), depth - 1, out);
            }
        }
    }
    let mut out = Vec::new();
    walk(folder, "", 2, &mut out);
    out.sort();
    out
}

/// A name without the ending of a file of rows; `None` for other files.
fn stem(name: &str) -> Option<&str> {
    let plain = COMPRESSED[1..].iter().find_map(|ending| name.strip_suffix(ending)).unwrap_or(name);
    let (stem, ending) = plain.rsplit_once('.')?;
    let rows = ENDINGS.contains(&ending) && !BESIDE.iter().any(|beside| plain.ends_with(beside));
    rows.then_some(stem)
}

pub fn is_rows(name: &str) -> bool {
    stem(name).is_some()
}

/// The first of these splits that has files among the names in a folder, and these files.
///
/// # Errors
/// As [`pick`].
pub fn first<'a>(names: &[String], splits: &[&'a str]) -> Result<Option<(&'a str, Vec<String>)>, String> {
    for split in splits {
        let picked = pick(names, split)?;
        if !picked.is_empty() {
            return Ok(Some((split, picked)));
        }
    }
    Ok(None)
}

/// The files of a split among the names in a folder: in the folder itself or in `data/`, the one file named
/// as the split, else its shards (`train-00000-of-00003`, as the hub names them, or `train-0`) in the order
/// of their numbers, else the files of rows in a folder named as the split. Empty where there are none.
///
/// # Errors
/// A message, where shards are missing by the count in the others' names, or are of more than one set (raw
/// and prepared rows, for example).
pub fn pick(names: &[String], split: &str) -> Result<Vec<String>, String> {
    for base in BASES {
        let inside: Vec<&str> = names.iter().filter_map(|name| name.strip_prefix(base)).collect();
        for ending in ENDINGS {
            for compressed in COMPRESSED {
                let whole = format!("{split}.{ending}{compressed}");
                if inside.contains(&whole.as_str()) {
                    return Ok(vec![format!("{base}{whole}")]);
                }
            }
        }
        let mut sets: BTreeMap<(Option<u64>, &str), Vec<(u64, &str)>> = BTreeMap::new();
        for name in &inside {
            if let Some(stem) = stem(name)
                && let Some((number, of)) = shard(stem, split)
            {
                sets.entry((of, &name[stem.len()..])).or_default().push((number, name));
            }
        }
        let mut sets = sets.into_iter();
        if let Some(((of, _), mut shards)) = sets.next() {
            shards.sort_unstable();
            if let Some((_, others)) = sets.next() {
                return Err(format!(
                    "it has {split} more than once, as {} and as {}",
                    shards[0].1, others[0].1
                ));
            }
            if let Some(twice) = shards.windows(2).find(|pair| pair[0].0 == pair[1].0) {
                return Err(format!("{} and {} are one shard of {split}", twice[0].1, twice[1].1));
            }
            // All numbers differ: as many as there must be, and none too large, are all of them.
            if let Some(of) = of {
                if let Some((_, name)) = shards.iter().find(|(number, _)| *number >= of) {
                    return Err(format!("{name}: shards are counted from 0"));
                }
                if (shards.len() as u64) < of {
                    return Err(format!("{} of {of} shards of {split} are there", shards.len()));
                }
            }
            return Ok(shards.into_iter().map(|(_, name)| format!("{base}{name}")).collect());
        }
        let folder = format!("{split}/");
        let below = |name: &&str| {
            name.strip_prefix(folder.as_str()).is_some_and(|rest| !rest.contains('/') && is_rows(rest))
        };
        let mut found: Vec<String> =
            inside.into_iter().filter(below).map(|name| format!("{base}{name}")).collect();
        if !found.is_empty() {
            found.sort();
            return Ok(found);
        }
    }
    Ok(Vec::new())
}

/// `train-00000-of-00003` (an export may append a hash), `train-0`, `train_0`, `train.0`: the shard's number,
/// and the count of shards where the name has it. `None` for other names.
fn shard(stem: &str, split: &str) -> Option<(u64, Option<u64>)> {
    let number = |text: &str| text.parse().ok().filter(|_: &u64| text.bytes().all(|b| b.is_ascii_digit()));
    let rest = stem.strip_prefix(split)?.strip_prefix(['-', '_', '.'])?;
    let Some((shard, rest)) = rest.split_once("-of-") else { return Some((number(rest)?, None)) };
    let (of, hash) = rest.split_once('-').unwrap_or((rest, "0"));
    let fits = hash.bytes().all(|b| b.is_ascii_hexdigit());
    fits.then_some(())?;
    Some((number(shard)?, Some(number(of)?)))
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_split_is_a_file_shards_or_a_folder() {
        let pick = |names: &[&str], split: &str| {
            let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
            super::pick(&names, split).map(|found| found.join(" "))
        };
        let ok = |text: &str| Ok(text.to_string());
        assert_eq!(
            pick(&["train.csv", "train.json", "train-0.jsonl", "test.csv"], "train"),
            ok("train.json")
        );
        let hub = [
            "README.md",
            "data/test-00000-of-00001.parquet",
            "data/train-00000-of-00002-a1b2c3d4e5f60718.parquet",
            "data/train-00001-of-00002-a1b2c3d4e5f60718.parquet",
        ];
        assert_eq!(pick(&hub, "train"), ok(&format!("{} {}", hub[2], hub[3])));
        assert_eq!(pick(&hub, "test"), ok(hub[1]));
        assert_eq!(pick(&hub[..3], "train"), Err("1 of 2 shards of train are there".into()));
        assert_eq!(pick(&hub, "validation"), ok(""));
        let two = |a: &str, b: &str| pick(&[a, b, "train-old.jsonl"], "train").unwrap_err();
        assert_eq!(
            two("train-00000-of-00002.jsonl", "train-00000-of-00002.json"),
            "it has train more than once, as train-00000-of-00002.json and as train-00000-of-00002.jsonl"
        );
        assert_eq!(
            two("train-00000-of-00001.parquet", "train-0.parquet"),
            "it has train more than once, as train-0.parquet and as train-00000-of-00001.parquet"
        );
        assert_eq!(
            two("train-00000-of-00002-aa.parquet", "train-00000-of-00002-bb.parquet"),
            "train-00000-of-00002-aa.parquet and train-00000-of-00002-bb.parquet are one shard of train"
        );
        assert_eq!(
            two("train-00001-of-00002.jsonl", "train-00002-of-00002.jsonl"),
            "train-00002-of-00002.jsonl: shards are counted from 0"
        );
        assert_eq!(
            pick(&["train-10.csv", "train-9.csv", "train-99999999999999999999.csv"], "train"),
            ok("train-9.csv train-10.csv")
        );
        let own = [
            "train-0.jsonl.gz",
            "train-1.jsonl.gz",
            "train-old.jsonl",
            "train.findings.jsonl",
            "train.manifest.json",
            "training.jsonl",
        ];
        assert_eq!(pick(&own, "train"), ok("train-0.jsonl.gz train-1.jsonl.gz"));
        let folders =
            ["train/b.jsonl", "train/a.csv", "train/notes.txt", "train/deep/c.jsonl", "dev/x.jsonl"];
        assert_eq!(pick(&folders, "train"), ok("train/a.csv train/b.jsonl"));
    }
}

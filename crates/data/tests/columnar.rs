//! Parquet and Arrow: files written by `datasets` and pyarrow are read as `datasets` reads them (the files in
//! `columnar/`, made by `python/columnar_fixtures.py`); our files round-trip; malformed files are refused.

mod common;

use arrow_array::RecordBatch;
use common::Scratch;
use serde_json::{Map, Value, json};
use std::ops::Range;
use std::path::{Path, PathBuf};
use suasion_data::prepared::columnar::{ColumnSink, Columns};
use suasion_data::prepared::folder;
use suasion_data::prepared::{Boundaries, Record, Rows};
use suasion_data::source::{ColumnarFile, Kind, Saved, fields, kind, saved_dataset};
use suasion_data::{Error, Origin};
use suasion_files::AtomicFile;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/columnar")
}

/// The rows of a file, and the result at its end.
fn read(path: &Path) -> Result<Vec<Map<String, Value>>, String> {
    let mut file = ColumnarFile::open(path).map_err(|e| e.to_string())?;
    let mut rows = Vec::new();
    while let Some(batch) = file.next_batch().map_err(|e| e.to_string())? {
        assert!((1..=512).contains(&batch.num_rows()));
        for row in 0..batch.num_rows() {
            rows.push(fields(&batch, row)?);
        }
    }
    Ok(rows)
}

fn json_lines(path: &Path) -> Vec<Map<String, Value>> {
    std::fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn saved_files(folder: &Path) -> Vec<PathBuf> {
    match saved_dataset(folder).unwrap() {
        Some(Saved::Files(files)) => files,
        other => panic!("{other:?}"),
    }
}

/// A row without the nulls in its objects, which `datasets` adds if a message or an argument lacks a field.
fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(object) => {
            let fields = object.into_iter().filter(|(_, value)| !value.is_null());
            fields.map(|(name, value)| (name, without_nulls(value))).collect::<Map<_, _>>().into()
        }
        Value::Array(list) => list.into_iter().map(without_nulls).collect(),
        other => other,
    }
}

#[test]
fn rows_are_those_that_datasets_writes_as_json() {
    let folder = fixtures();
    for (file, rows) in [
        ("conversations.parquet", "conversations"),
        ("structs.parquet", "structs"),
        ("tokens.parquet", "tokens"),
        ("types.parquet", "types"),
        ("types_gzip.parquet", "types"),
        ("types_plain.arrow", "types"),
        ("types_lz4.arrow", "types"),
        ("types_zstd.arrow", "types"),
        ("types_stream.arrow", "types"),
        ("conversations_saved/train/data-00000-of-00001.arrow", "conversations"),
    ] {
        let mut expected = json_lines(&folder.join(format!("{rows}.jsonl")));
        expected.iter_mut().flat_map(|row| row.values_mut()).for_each(|v| *v = without_nulls(v.take()));
        let mut found = read(&folder.join(file)).unwrap();
        if rows == "conversations" {
            // In JSON in a text column, a null was written by the author of the row.
            found.iter_mut().flat_map(|row| row.values_mut()).for_each(|v| *v = without_nulls(v.take()));
        }
        assert_eq!(found, expected, "{file}");
        let names = |rows: &[Map<String, Value>]| rows[0].keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&found), names(&expected), "{file}");
    }
}

#[test]
fn newer_layouts_are_read_too() {
    let rows = read(&fixtures().join("views.arrow")).unwrap();
    // 0.1 in 16 bits is 0x2e66: 1638 / 16384.
    assert_eq!(
        Value::from(rows.into_iter().map(Value::Object).collect::<Vec<_>>()),
        json!([
            {"view": "short", "bytes": "x", "map": {"k": 1, "l": null}, "half": 1.5},
            {"view": "longer than twelve bytes ☔", "bytes": "y", "map": {}, "half": 1638.0 / 16384.0},
        ])
    );
}

#[test]
fn what_has_no_json_form_is_refused_by_name() {
    let mut file = ColumnarFile::open(fixtures().join("refused.arrow")).unwrap();
    let batch = file.next_batch().unwrap().unwrap();
    let span = batch.project(&[2]).unwrap();
    assert_eq!(
        fields(&span, 0).unwrap_err(),
        "column \"span\": its type Interval(MonthDayNano) has no JSON form; leave the column out or cast it"
    );
    // An image is not text, but must be noticed; other bytes that are not text are left out.
    assert_eq!(Value::Object(fields(&batch.project(&[0]).unwrap(), 0).unwrap()), json!({"image": true}));
    let bytes = RecordBatch::try_from_iter([("thumb", batch.column(0).clone())]).unwrap();
    assert_eq!(fields(&bytes, 0).unwrap(), Map::new());
    // An infinite number in another column is no reason to refuse a row.
    assert_eq!(fields(&batch.project(&[1]).unwrap(), 0).unwrap().len(), 1);
}

#[test]
fn formats_are_known_by_their_first_bytes() {
    let folder = fixtures();
    for (file, expected) in [
        ("types.parquet", Some(Kind::Parquet)),
        ("types_lz4.arrow", Some(Kind::ArrowFile)),
        ("types_stream.arrow", Some(Kind::ArrowStream)),
        ("types.jsonl", None),
    ] {
        let bytes = std::fs::read(folder.join(file)).unwrap();
        assert_eq!(kind(&bytes[..8]), expected, "{file}");
        match expected {
            Some(_) => {
                let mut opened = ColumnarFile::open(folder.join(file)).unwrap();
                opened.next_batch().unwrap();
                // Also after half of the rows, the hash is that of the whole file.
                let hash = opened.finish().unwrap();
                assert_eq!(hash.blake3, blake3::hash(&bytes).to_hex().to_string());
                assert_eq!(hash.bytes, bytes.len() as u64);
            }
            None => {
                let message = ColumnarFile::open(folder.join(file)).err().unwrap().to_string();
                assert!(message.contains("is neither Parquet nor Arrow"), "{message}");
            }
        }
    }
}

#[test]
fn saved_datasets_name_their_files_and_splits() {
    let folder = fixtures();
    let tokens = folder.join("tokens_saved");
    let files = saved_files(&tokens);
    let names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"];
    assert_eq!(files, names.map(|name| tokens.join(name)));
    let rows: Vec<_> = files.iter().flat_map(|file| read(file).unwrap()).collect();
    assert_eq!(rows, json_lines(&folder.join("tokens.jsonl")));
    let splits = saved_dataset(folder.join("conversations_saved")).unwrap();
    assert_eq!(splits, Some(Saved::Splits(vec!["train".into(), "test".into()])));
    assert_eq!(saved_files(&folder.join("conversations_saved/test")).len(), 1);
    assert_eq!(saved_dataset(&folder).unwrap(), None);
    assert_eq!(saved_dataset(folder.join("types.jsonl")).unwrap(), None);
    assert_eq!(saved_dataset(folder.join("not there")).unwrap(), None);
}

#[test]
fn broken_dataset_folders_are_refused() {
    for (state, message) in [
        ("[", "is not JSON"),
        (r#"{"_data_files": []}"#, "has no files"),
        (r#"{"_data_files": [{"filename": "gone.arrow"}]}"#, "\"gone.arrow\" is missing"),
        (r#"{"_data_files": [{"filename": "../state.json"}]}"#, "is not a file of this folder"),
        (r#"{"_data_files": [{"filename": "/etc/passwd"}]}"#, "is not a file of this folder"),
        (r#"{"_data_files": [{"name": "state.json"}]}"#, "is not a file of this folder"),
        (
            r#"{"_data_files": [{"filename": "state.json"}], "_indices_data_files": [{"filename": "i.arrow"}]}"#,
            "selected by indices in another file (\"_indices_data_files\")",
        ),
    ] {
        let scratch = Scratch::new();
        scratch.file("state.json", state);
        let error = saved_dataset(scratch.dir.path()).unwrap_err();
        assert!(error.to_string().contains(message), "{error}");
        assert!(error.to_string().contains("state.json") && error.help().is_some());
    }
    let scratch = Scratch::new();
    scratch.file("dataset_dict.json", r#"{"splits": ["../x"]}"#);
    assert!(saved_dataset(scratch.dir.path()).is_err());
    // Older versions of datasets wrote the key even without indices.
    let scratch = Scratch::new();
    scratch
        .file("state.json", r#"{"_data_files": [{"filename": "state.json"}], "_indices_data_files": null}"#);
    assert_eq!(saved_files(scratch.dir.path()).len(), 1);
}

/// A deterministic generator (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

/// The owner of the data that a [`Record`] borrows.
struct Made {
    rows: Vec<u64>,
    seq_lengths: Vec<u32>,
    position_ids: Vec<u32>,
    ranges: Option<Vec<Range<u32>>>,
    input_ids: Vec<u32>,
    labels: Vec<i32>,
    origins: Vec<Origin>,
    weights: Option<Vec<f32>>,
    text: Option<String>,
}

impl Made {
    fn random(random: &mut Random, row: u64, columns: Columns) -> Made {
        let segments = if columns.packed { 1 + random.below(4) } else { 1 };
        let seq_lengths: Vec<u32> = (0..segments).map(|_| random.below(300) as u32).collect();
        let n = seq_lengths.iter().sum::<u32>() as usize;
        let position_ids = seq_lengths.iter().flat_map(|&n| 0..n).collect();
        let ranges = (columns.prefix_ranges && random.below(4) > 0)
            .then(|| (0..segments).map(|i| 0..random.below(i + 2) as u32).collect());
        let input_ids: Vec<u32> = (0..n)
            .map(|_| if random.below(100) == 0 { i32::MAX as u32 } else { random.below(150_000) as u32 })
            .collect();
        let labels =
            input_ids.iter().map(|&id| if random.below(2) == 0 { -100 } else { id as i32 }).collect();
        let origins =
            (0..n).map(|_| Origin::from_letter(b"BSCKUTORE-"[random.below(10) as usize] as char).unwrap());
        let weight = |random: &mut Random| f32::from_bits(random.below(0x7f7f_ffff) as u32);
        Made {
            rows: (row..row + segments).collect(),
            seq_lengths,
            position_ids,
            ranges,
            origins: origins.collect(),
            weights: (columns.weights && random.below(3) > 0)
                .then(|| (0..n).map(|_| weight(random)).collect()),
            text: columns.text.then(|| {
                let any = |random: &mut Random| char::from_u32(random.below(0x11_0000) as u32);
                (0..random.below(60)).filter_map(|_| any(random)).collect()
            }),
            input_ids,
            labels,
        }
    }

    fn record(&self, columns: Columns) -> Record<'_> {
        Record {
            rows: if columns.packed {
                Rows::Pack(Boundaries {
                    rows: self.rows.clone(),
                    seq_lengths: self.seq_lengths.clone(),
                    position_ids: self.position_ids.clone(),
                    prefix_ranges: self.ranges.clone(),
                })
            } else {
                Rows::One(self.rows[0])
            },
            input_ids: &self.input_ids,
            labels: &self.labels,
            origins: &self.origins,
            weights: self.weights.as_deref(),
            text: self.text.as_deref(),
        }
    }
}

fn all_columns() -> Vec<Columns> {
    let mut all = Vec::new();
    for bits in 0..16 {
        let bit = |i: u32| bits >> i & 1 == 1;
        let columns = Columns { packed: bit(0), prefix_ranges: bit(1), weights: bit(2), text: bit(3) };
        if columns.packed || !columns.prefix_ranges {
            all.push(columns);
        }
    }
    all
}

fn parquet(path: &Path, columns: Columns) -> ColumnSink<AtomicFile> {
    ColumnSink::parquet(path, AtomicFile::create(path).unwrap(), columns).unwrap()
}

fn write_parquet(path: &Path, made: &[Made], columns: Columns) {
    let mut sink = parquet(path, columns);
    made.iter().for_each(|made| sink.write(&made.record(columns)).unwrap());
    sink.finish().unwrap().commit().unwrap();
}

/// A dataset's folder with this many rows per file.
fn write_folder(target: &Path, made: &[Made], columns: Columns, rows: usize) {
    let scratch = tempfile::tempdir_in(target.parent().unwrap()).unwrap();
    let shards: Vec<PathBuf> =
        (0..made.chunks(rows).len()).map(|i| scratch.path().join(i.to_string())).collect();
    for (path, made) in shards.iter().zip(made.chunks(rows)) {
        let mut sink = ColumnSink::arrow(path, AtomicFile::create(path).unwrap(), columns).unwrap();
        made.iter().for_each(|made| sink.write(&made.record(columns)).unwrap());
        sink.finish().unwrap().commit().unwrap();
    }
    let fingerprint = "0123456789abcdef0123456789abcdef";
    folder::publish(&shards, target, columns, fingerprint, |_| json!({}), scratch.path()).unwrap();
}

/// A row without its null fields (the JSON form omits those), and its weights as f32 (the JSON form has the
/// shortest decimals for them).
fn dense(row: Map<String, Value>) -> (Map<String, Value>, Option<Vec<f32>>) {
    let mut row: Map<String, Value> = row.into_iter().filter(|(_, value)| !value.is_null()).collect();
    let weights = row.shift_remove("weights").map(|weights| serde_json::from_value(weights).unwrap());
    (row, weights)
}

#[test]
fn what_is_written_comes_back() {
    let scratch = Scratch::new();
    let mut random = Random(7);
    for (i, columns) in all_columns().into_iter().enumerate() {
        // More rows than a batch of the writer and of the reader, and more tokens.
        let made: Vec<Made> = (0..1500).map(|row| Made::random(&mut random, row, columns)).collect();
        let mut lines = Vec::new();
        for made in &made {
            made.record(columns).write_json(&mut lines);
        }
        let expected = json_lines(&scratch.file("rows.jsonl", &lines));
        let expected: Vec<_> = expected.into_iter().map(dense).collect();
        let (file, again) = (scratch.path(&format!("{i}.parquet")), scratch.path("again.parquet"));
        write_parquet(&file, &made, columns);
        let rows: Vec<_> = read(&file).unwrap().into_iter().map(dense).collect();
        assert!(rows == expected, "Parquet, {columns:?}");
        write_parquet(&again, &made, columns);
        assert!(std::fs::read(&file).unwrap() == std::fs::read(&again).unwrap(), "other bytes, {columns:?}");
        let folder = scratch.path("folder");
        write_folder(&folder, &made, columns, 1100);
        let files = saved_files(&folder);
        assert_eq!(files.len(), 2);
        let rows: Vec<_> = files.iter().flat_map(|f| read(f).unwrap()).map(dense).collect();
        assert!(rows == expected, "Arrow, {columns:?}");
    }
}

#[test]
fn a_folder_appears_whole_and_replaces_only_a_dataset() {
    let scratch = Scratch::new();
    let columns = Columns::default();
    let made = |n: u64| (0..n).map(|row| Made::random(&mut Random(row), row, columns)).collect::<Vec<_>>();
    let folder = scratch.path("out");
    for n in [2, 3] {
        write_folder(&folder, &made(n), columns, 10);
        let rows = read(&saved_files(&folder)[0]).unwrap();
        assert_eq!(
            rows.iter().map(|r| r["row"].as_u64().unwrap()).collect::<Vec<_>>(),
            (0..n).collect::<Vec<_>>()
        );
        let mut names: Vec<_> = std::fs::read_dir(&folder)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["data-00000-of-00001.arrow", "dataset_info.json", "manifest.json", "state.json"]);
        assert_eq!(scratch.names(), ["out"]);
    }
    let state: Value = serde_json::from_slice(&std::fs::read(folder.join("state.json")).unwrap()).unwrap();
    assert_eq!(state["_fingerprint"], "0123456789abcdef");
    std::fs::write(folder.join("thesis.docx"), "years of work").unwrap();
    let refused = |target: &Path| folder::replaceable(target).unwrap_err().to_string();
    assert!(refused(&folder).contains("holds \"thesis.docx\""), "{}", refused(&folder));
    assert!(refused(&scratch.file("file", "")).contains("is a file"));
    // A dataset from elsewhere must not be overwritten.
    let theirs = refused(&fixtures().join("conversations_saved/train"));
    assert!(theirs.contains("a dataset that suasion did not prepare"), "{theirs}");
}

#[test]
fn records_that_do_not_fit_the_columns_are_refused() {
    let scratch = Scratch::new();
    let refused = |columns: Columns, of: Columns, change: fn(&mut Made)| {
        let mut made = Made::random(&mut Random(1), 5, of);
        made.weights = made.weights.or(of.weights.then(Vec::new));
        made.ranges = made.ranges.or(of.prefix_ranges.then(Vec::new));
        change(&mut made);
        let mut sink = parquet(&scratch.path("x.parquet"), columns);
        match sink.write(&made.record(of)) {
            Err(Error::Source { message, .. }) => message,
            other => panic!("{other:?}"),
        }
    };
    let one = Columns::default();
    let pack = Columns { packed: true, ..one };
    let keep = |_: &mut Made| {};
    assert!(refused(one, Columns { weights: true, ..one }, keep).starts_with("row 5 has weights"));
    assert!(refused(one, pack, keep).starts_with("row 5 is a pack"));
    assert!(refused(pack, one, keep).starts_with("row 5 is a single row"));
    assert!(
        refused(pack, Columns { prefix_ranges: true, ..pack }, keep).starts_with("row 5 has prefix ranges")
    );
    let message = refused(one, one, |made| made.input_ids[0] = 1 << 31);
    assert!(message.starts_with("row 5 has the token id 2147483648"), "{message}");
    assert_eq!(scratch.names(), Vec::<String>::new());
}

/// Files of every kind, with a few rows each.
fn small_files(scratch: &Scratch) -> Vec<PathBuf> {
    let columns = Columns { packed: true, prefix_ranges: true, weights: true, text: true };
    let made: Vec<Made> = (0..3).map(|row| Made::random(&mut Random(row), row, columns)).collect();
    let ours = scratch.path("ours.parquet");
    write_parquet(&ours, &made, columns);
    let folder = scratch.path("ours");
    write_folder(&folder, &made, columns, 10);
    let mut files = saved_files(&folder);
    files.push(ours);
    let theirs =
        ["tokens.parquet", "types_gzip.parquet", "types_lz4.arrow", "types_zstd.arrow", "types_stream.arrow"];
    files.extend(theirs.map(|name| fixtures().join(name)));
    files
}

#[test]
fn a_cut_file_is_refused_wherever_it_is_cut() {
    let scratch = Scratch::new();
    for file in small_files(&scratch) {
        let bytes = std::fs::read(&file).unwrap();
        for length in (8..bytes.len()).step_by(1 + bytes.len() / 150).chain(bytes.len() - 12..bytes.len()) {
            let cut = scratch.file("cut", &bytes[..length]);
            let message = read(&cut).expect_err("a cut file was read to its end");
            assert!(
                message.contains("cut: the ") && message.contains("is truncated or malformed"),
                "{message}"
            );
        }
    }
}

#[test]
fn a_flipped_bit_is_an_error_or_another_value_and_nothing_worse() {
    let scratch = Scratch::new();
    let mut random = Random(99);
    for file in small_files(&scratch) {
        let bytes = std::fs::read(&file).unwrap();
        let mut refused = 0;
        let rounds = std::env::var("SUASION_FLIPS").map_or(200, |n| n.parse().unwrap());
        for _ in 0..rounds {
            let mut flipped = bytes.clone();
            for _ in 0..1 + random.below(2) {
                // The ends of a file describe the rest: half of the flips go there.
                let n = bytes.len() as u64;
                let at =
                    if random.below(2) == 0 { random.below(n) } else { n - 1 - random.below(n.min(1500)) };
                flipped[at as usize] ^= 1 << random.below(8);
            }
            refused += usize::from(read(&scratch.file("flipped", &flipped)).is_err());
        }
        assert!(refused > 0, "{}: no flip was noticed", file.display());
    }
}

/// `datasets` loads our output with the right types, and TRL trains on it unchanged (python/columnar_interop.py).
#[test]
fn datasets_and_trl_take_it_as_it_is() {
    let Some(python) = suasion_test_support::peers_python() else { return };
    let scratch = Scratch::new();
    let mut random = Random(3);
    for (name, columns) in [
        ("rows", Columns { weights: true, text: true, ..Columns::default() }),
        ("packs", Columns { packed: true, ..Columns::default() }),
    ] {
        let mut made: Vec<Made> = (0..1200).map(|row| Made::random(&mut random, row, columns)).collect();
        // Ids of a small model, without empty rows.
        made.retain(|made| made.seq_lengths.iter().all(|&n| n > 1));
        let mut lines = Vec::new();
        for made in &mut made {
            made.input_ids.iter_mut().for_each(|id| *id %= 300);
            let learned = |(&id, &label): (&u32, &i32)| if label == -100 { -100 } else { id as i32 };
            made.labels = made.input_ids.iter().zip(&made.labels).map(learned).collect();
            made.record(columns).write_json(&mut lines);
        }
        scratch.file(&format!("{name}.jsonl"), &lines);
        write_parquet(&scratch.path(&format!("{name}.parquet")), &made, columns);
        write_folder(&scratch.path(name), &made, columns, 1 + made.len() / 3);
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/columnar_interop.py");
    let run = std::process::Command::new(python).arg(script).arg(scratch.dir.path()).output().unwrap();
    let out = String::from_utf8_lossy(&run.stdout);
    let log = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success() && out.trim_end().ends_with("ok"), "{out}{log}");
}

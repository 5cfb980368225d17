//! Rows that a program passes: the outcomes are those of the same rows in a file, and their hash depends only on
//! their content.

use arrow_array::builder::{Int32Builder, Int64Builder, LargeListBuilder, ListBuilder};
use arrow_array::{ArrayRef, LargeStringArray, RecordBatch, StringArray, StringViewArray};
use std::path::Path;
use std::sync::Arc;
use suasion_data::prepared::{Job, Shape, prepare, prepare_rows};
use suasion_data::source::{Part, Source};
use suasion_data::{Error, ModelFolder, Pipeline, Policy};

const DEMO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/persuasion");

fn pipeline(policy: Policy) -> Pipeline {
    Pipeline::new(ModelFolder::open(DEMO).unwrap(), policy)
}

fn lines() -> Vec<Vec<u8>> {
    let text = std::fs::read(format!("{DEMO}/rows.jsonl")).unwrap();
    text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).map(<[u8]>::to_vec).collect()
}

/// JSON in parts of `size` rows.
fn json(size: usize) -> Source {
    let parts: Vec<_> = lines().chunks(size).map(|rows| Ok(Part::Json(rows.to_vec()))).collect();
    Source::given("given", parts.into_iter())
}

#[test]
fn rows_in_memory_are_those_of_a_file() {
    let policy = Policy { max_length: Some(200), ..Policy::default() };
    for policy in [policy.clone(), Policy { packing: true, ..policy }] {
        let pipeline = pipeline(policy);
        let made = prepare_rows(&pipeline, json(7), Path::new("given"), |_| true).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("out.parquet");
        let rows = Path::new(DEMO).join("rows.jsonl");
        let job = Job {
            pipeline: &pipeline,
            name: &rows,
            files: std::slice::from_ref(&rows),
            output: &output,
            shape: Shape::default(),
            rebuild: false,
            stop: &false.into(),
        };
        let written = prepare(&job, |_| (), |_| ()).unwrap();
        assert_eq!(made.manifest.counts, written.counts);
        assert_eq!(made.manifest.packs, written.packs);
        let mut file = suasion_data::source::ColumnarFile::open(&output).unwrap();
        let mut from_file = Vec::new();
        while let Some(batch) = file.next_batch().unwrap() {
            let rows = (0..batch.num_rows()).map(|i| suasion_data::source::fields(&batch, i).unwrap());
            from_file.extend(rows);
        }
        let fields = |batch: &RecordBatch| -> Vec<_> {
            (0..batch.num_rows()).map(|i| suasion_data::source::fields(batch, i).unwrap()).collect()
        };
        let in_memory: Vec<_> = made.batches.iter().flat_map(fields).collect();
        assert_eq!(in_memory, from_file);
        let findings = std::fs::read_to_string(suasion_data::prepared::findings_path(&output)).unwrap();
        let ours: String =
            made.findings.iter().map(|finding| serde_json::to_string(finding).unwrap() + "\n").collect();
        assert_eq!(ours, findings);
    }
}

/// A batch of rows 0 to 9 in three representations.
fn batch(kind: usize) -> RecordBatch {
    let texts: Vec<Option<String>> = (0..10).map(|i| (i != 4).then(|| "text ".repeat(i))).collect();
    let text: ArrayRef = match kind {
        0 => Arc::new(StringArray::from(texts)),
        1 => Arc::new(LargeStringArray::from(texts)),
        _ => Arc::new(StringViewArray::from_iter(texts)),
    };
    let ids: ArrayRef = if kind == 0 {
        let mut ids = ListBuilder::new(Int32Builder::new());
        (0..10).for_each(|i| ids.append_value((0..i).map(Some)));
        Arc::new(ids.finish())
    } else {
        let mut ids = LargeListBuilder::new(Int32Builder::new());
        (0..10).for_each(|i| ids.append_value((0..i).map(Some)));
        Arc::new(ids.finish())
    };
    RecordBatch::try_from_iter([("text", text), ("ids", ids)]).unwrap()
}

fn hash(parts: Vec<RecordBatch>) -> String {
    let mut source = Source::given("given", parts.into_iter().map(|batch| Ok(Part::Columns(batch))));
    while source.next_row().unwrap().is_some() {}
    source.finish().unwrap().blake3
}

#[test]
fn the_hash_is_of_what_rows_say() {
    let whole = hash(vec![batch(0)]);
    for kind in 0..3 {
        let batch = batch(kind);
        assert_eq!(hash(vec![batch.clone()]), whole, "{kind}");
        assert_eq!(hash(vec![batch.slice(0, 3), batch.slice(3, 0), batch.slice(3, 7)]), whole, "{kind}");
        assert_ne!(hash(vec![batch.slice(0, 9)]), whole);
        assert_ne!(hash(vec![batch.slice(3, 7), batch.slice(0, 3)]), whole);
    }
    // Consecutive batches with different columns: all of them count, in order.
    let (text, ids) = (batch(0).project(&[0]).unwrap(), batch(0).project(&[1]).unwrap());
    let divided = hash(vec![text.clone(), ids.slice(0, 4), ids.slice(4, 6)]);
    assert_eq!(hash(vec![text.slice(0, 1), text.slice(1, 9), ids.clone()]), divided);
    for other in [vec![ids.clone(), text.clone()], vec![text.slice(0, 9), ids.clone()], vec![ids]] {
        assert_ne!(hash(other), divided);
    }
    // Another name, and another null.
    let renamed = RecordBatch::try_from_iter([
        ("text", batch(0).column(0).clone()),
        ("id", batch(0).column(1).clone()),
    ]);
    assert_ne!(hash(vec![renamed.unwrap()]), whole);
    let mut numbers = Int64Builder::new();
    numbers.append_slice(&[0, 1]);
    let with = |numbers: ArrayRef| hash(vec![RecordBatch::try_from_iter([("n", numbers)]).unwrap()]);
    let two = with(Arc::new(numbers.finish()));
    numbers.append_null();
    numbers.append_value(1);
    assert_ne!(with(Arc::new(numbers.finish())), two);
}

#[test]
fn a_part_of_a_source_keeps_its_numbers() {
    let mut source = json(5).numbered_from(40);
    let id = source.next_row().unwrap().unwrap().id;
    assert_eq!((id.row, id.to_string()), (40, "given: row 40".into()));
}

#[test]
fn a_run_stops_where_it_is_told_or_its_rows_fail() {
    let pipeline = pipeline(Policy::default());
    let stopped = prepare_rows(&pipeline, json(5), Path::new("given"), |progress| progress.rows < 64);
    assert!(matches!(stopped, Err(Error::Interrupted { .. })));
    let none =
        prepare_rows(&pipeline, Source::given("none", std::iter::empty()), Path::new("none"), |_| true);
    assert_eq!(none.unwrap_err().to_string(), "none: there are no rows");
    let broken = || Error::row(suasion_data::RowId::new(Path::new("given"), 0, None), "broken", "");
    let parts = [Ok(Part::Json(lines()[..2].to_vec())), Err(broken())];
    let failed =
        prepare_rows(&pipeline, Source::given("given", parts.into_iter()), Path::new("given"), |_| true);
    assert_eq!(failed.unwrap_err().to_string(), "given: row 0: broken");
}

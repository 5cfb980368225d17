//! Preparing again, in shards, and after a kill.

mod common;

use common::{
    Scratch, byte_tokenizer, job, mixed_rows, pipeline_of, prepare, skipping, with_embeddings, with_template,
};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use suasion_data::prepared::{self, Job, Manifest, Shape, Start, findings_path};
use suasion_data::source::{ColumnarFile, column_names};
use suasion_data::template::ChatTemplate;
use suasion_data::{Error, Pipeline, Policy, Progress, Sample};

const SHARDS: Shape = Shape { with_text: false, max_shard_bytes: Some(60_000) };

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Prepares, and returns how it began.
fn start(job: &Job<'_>) -> (Start, Manifest) {
    let mut began = None;
    let manifest = prepared::prepare(job, |start| began = Some(start.clone()), |_| {}).unwrap();
    (began.unwrap(), manifest)
}

fn reasons(start: Start) -> Vec<String> {
    match start {
        Start::Rebuild(reasons) => reasons,
        other => panic!("{other:?}"),
    }
}

#[test]
fn data_that_is_still_right_is_not_prepared_again() {
    let s = Scratch::new();
    let source = s.file("data.jsonl", mixed_rows(300));
    let out = s.path("out.jsonl");
    let (tokenizer, other) = (byte_tokenizer(true), byte_tokenizer(false));
    let policy = skipping();
    let pipeline = pipeline_of(Some(&tokenizer), &policy);
    let plain = job(&pipeline, &source, &out, Shape::default());
    let (began, manifest) = start(&plain);
    assert_eq!(began, Start::Anew);
    let modified = |path: &Path| path.metadata().unwrap().modified().unwrap();
    let (bytes, time) = (read(&out), modified(&out));
    assert_eq!(start(&plain), (Start::UpToDate, manifest.clone()));
    assert_eq!((read(&out), modified(&out)), (bytes.clone(), time));
    assert_eq!(reasons(start(&Job { rebuild: true, ..plain }).0), ["a rebuild was requested"]);
    assert_eq!(read(&out), bytes, "the same bytes for the same inputs");

    // Each input that changed is named.
    let shorter = Policy { max_length: Some(100), stop_tokens: vec!["<|pad|>".into()], ..policy.clone() };
    let with = |tokenizer, policy| pipeline_of(Some(tokenizer), policy);
    let changed = with(&tokenizer, &shorter);
    assert_eq!(
        reasons(start(&job(&changed, &source, &out, Shape::default())).0),
        ["max_length was 200, is 100", "stop_tokens was [], is [\"<|pad|>\"]"]
    );
    let changed = with(&other, &shorter);
    let other_job = job(&changed, &source, &out, Shape::default());
    assert_eq!(reasons(start(&other_job).0), ["the tokenizer differs"]);
    let text = Shape { with_text: true, max_shard_bytes: None };
    let changed = with_embeddings(&changed, 300);
    assert_eq!(
        reasons(start(&job(&changed, &source, &out, text)).0),
        ["the number of embeddings differs", "with_text was false, is true"]
    );
    let job = job(&changed, &source, &out, text);
    // A byte of the source, a byte of the output, the findings.
    s.file("data.jsonl", mixed_rows(300).replacen("be kind", "be curt", 1));
    assert_eq!(reasons(start(&job).0), ["the source has changed"]);
    let mut bytes = read(&out);
    *bytes.last_mut().unwrap() = b' ';
    std::fs::write(&out, bytes).unwrap();
    assert_eq!(reasons(start(&job).0), ["out.jsonl is not as it was written"]);
    std::fs::remove_file(findings_path(&out)).unwrap();
    assert_eq!(reasons(start(&job).0), ["its findings are missing"]);
    assert_eq!(start(&job).0, Start::UpToDate);
}

/// Shards in order equal the single file, including findings and counts; files of an earlier preparation are removed.
#[test]
fn shards_are_the_one_file_in_pieces() {
    let s = Scratch::new();
    let source = s.file("data.jsonl", mixed_rows(1500));
    let (tokenizer, policy) = (byte_tokenizer(true), skipping());
    let pipeline = pipeline_of(Some(&tokenizer), &policy);
    let whole = prepare(&pipeline, &source, &s.path("whole.jsonl"), false);
    let out = s.path("out.jsonl");
    let (_, manifest) = start(&job(&pipeline, &source, &out, SHARDS));
    let paths = manifest.paths(&out);
    assert!(paths.len() > 5, "{paths:?}");
    let last = format!("out-{:05}-of-{:05}.jsonl", paths.len() - 1, paths.len());
    assert_eq!(paths.last().unwrap(), &s.path(&last));
    let joined: Vec<u8> = paths.iter().flat_map(|path| read(path)).collect();
    assert_eq!(joined, read(&s.path("whole.jsonl")));
    assert_eq!(read(&findings_path(&out)), read(&findings_path(&s.path("whole.jsonl"))));
    assert_eq!((&manifest.counts, &manifest.fingerprint), (&whole.counts, &whole.fingerprint));
    assert_eq!(Manifest::beside(&paths[2]).unwrap(), Some(manifest.clone()));
    assert_eq!(start(&job(&pipeline, &source, &out, SHARDS)).0, Start::UpToDate);
    // Fewer, larger shards: none of the former ones remains.
    let larger = Shape { max_shard_bytes: Some(200_000), ..SHARDS };
    let (_, fewer) = start(&job(&pipeline, &source, &out, larger));
    assert!(fewer.files.len() < paths.len());
    let names = s.names();
    let shards: Vec<&String> = names.iter().filter(|name| name.starts_with("out-")).collect();
    assert_eq!(shards, fewer.files.iter().map(|file| &file.name).collect::<Vec<_>>());
    assert!(!names.iter().any(|name| name.ends_with(".partial")), "{names:?}");
}

/// Stopped after any number of rows, and restarted until it is complete: the same files as without stops.
#[test]
fn a_stopped_run_goes_on_behind_its_finished_shards() {
    let s = Scratch::new();
    let source = s.file("data.jsonl", mixed_rows(750).repeat(2));
    let (tokenizer, policy) = (byte_tokenizer(true), skipping());
    let pipeline = pipeline_of(Some(&tokenizer), &policy);
    let through = s.path("through.jsonl");
    let (_, expected) = start(&job(&pipeline, &source, &through, SHARDS));

    let (out, stop) = (s.path("out.jsonl"), AtomicBool::new(false));
    let stopping = Job { stop: &stop, ..job(&pipeline, &source, &out, SHARDS) };
    let mut from = Vec::new();
    let manifest = loop {
        let mut first = None;
        let result = prepared::prepare(
            &stopping,
            |start| {
                from.push(match start {
                    Start::Resume { rows, .. } => *rows,
                    Start::Anew => 0,
                    other => panic!("{other:?}"),
                })
            },
            |Progress { rows, .. }| {
                let begun = *first.get_or_insert(rows);
                stop.store(rows > begun + 300, Ordering::Relaxed);
            },
        );
        match result {
            Ok(manifest) => break manifest,
            Err(Error::Interrupted { message, .. }) => {
                assert!(message.contains("the same command continues after them"), "{message}");
                assert!(!findings_path(&out).exists(), "nothing under its name before it is whole");
            }
            Err(other) => panic!("{other}"),
        }
    };
    assert!(from.len() > 3 && from.is_sorted_by(|a, b| a < b), "{from:?}");
    for (ours, theirs) in manifest.paths(&out).iter().zip(expected.paths(&through)) {
        assert_eq!(read(ours), read(&theirs));
    }
    assert_eq!((manifest.files.len(), &manifest.counts), (expected.files.len(), &expected.counts));
    assert_eq!(read(&findings_path(&out)), read(&findings_path(&through)));
    assert!(manifest.counts.findings["D001"] > 300, "duplicates across the stops");
    assert!(!s.names().iter().any(|name| name.ends_with(".partial")));

    // Another job in the same place does not take over the shards.
    let stop = AtomicBool::new(true);
    let larger = Policy { max_length: Some(150), ..policy.clone() };
    let begun = Pipeline { policy: larger.into(), ..pipeline.clone() };
    let at = s.path("third.jsonl");
    assert!(
        prepared::prepare(&Job { stop: &stop, ..job(&begun, &source, &at, SHARDS) }, |_| {}, |_| {}).is_err()
    );
    let (began, _) = start(&job(&pipeline, &source, &at, SHARDS));
    assert_eq!(reasons(began), ["removed a shard of another job"]);
    // Shards of plain lines and of compressed lines are not mixed.
    let stop = AtomicBool::new(true);
    let plain = s.path("fourth.jsonl");
    assert!(
        prepared::prepare(&Job { stop: &stop, ..job(&pipeline, &source, &plain, SHARDS) }, |_| {}, |_| {})
            .is_err()
    );
    let (began, _) = start(&job(&pipeline, &source, &s.path("fourth.jsonl.gz"), SHARDS));
    assert_eq!(began, Start::Anew);
    assert!(s.path("fourth.jsonl.partial").is_dir());
}

/// A failed run leaves no files.
#[test]
fn a_run_that_fails_leaves_nothing() {
    let s = Scratch::new();
    let source = s.file("data.jsonl", mixed_rows(100));
    let (tokenizer, policy) = (byte_tokenizer(true), Policy::default());
    let pipeline = pipeline_of(Some(&tokenizer), &policy);
    for shape in [Shape::default(), SHARDS] {
        let error = prepared::prepare(&job(&pipeline, &source, &s.path("x.jsonl"), shape), |_| {}, |_| {});
        assert!(matches!(error, Err(Error::BadRows { .. })), "{error:?}");
        assert_eq!(s.names(), ["data.jsonl"]);
    }
    let nowhere = s.path("no/such/x.jsonl");
    let error = prepared::prepare(&job(&pipeline, &source, &nowhere, Shape::default()), |_| {}, |_| {});
    assert!(error.unwrap_err().to_string().contains("no/such/"));
}

/// Columns are fixed before the first row: there is a column of weights if any row has weights, and only then.
#[test]
fn a_column_of_weights_stands_only_where_it_is_needed() {
    let s = Scratch::new();
    let plain = "{\"prompt\": \"a \", \"completion\": \"b\"}\n".repeat(200);
    let weighted = "{\"segments\": [{\"text\": \"c\", \"weight\": 0.5}, {\"text\": \"d\", \"weight\": 1}]}\n";
    let (tokenizer, policy) = (byte_tokenizer(true), Policy::default());
    let pipeline = pipeline_of(Some(&tokenizer), &policy);
    for (name, rows, columns) in [
        ("plain", plain.clone(), &["row", "input_ids", "labels", "origins"][..]),
        ("mixed", plain + weighted, &["row", "input_ids", "labels", "origins", "weights"]),
    ] {
        let source = s.file(&format!("{name}.jsonl"), rows);
        let lines = s.path(&format!("{name}-lines.jsonl"));
        prepare(&pipeline, &source, &lines, false);
        let expected = prepared::read(&lines, &policy).unwrap();
        for shape in [Shape::default(), Shape { max_shard_bytes: Some(500), ..Shape::default() }] {
            let out = s.path(&format!("{name}.parquet"));
            let (_, manifest) = start(&Job { rebuild: true, ..job(&pipeline, &source, &out, shape) });
            let mut samples = Vec::new();
            for path in manifest.paths(&out) {
                let mut file = ColumnarFile::open(&path).unwrap();
                let batch = file.next_batch().unwrap().unwrap();
                assert_eq!(column_names(&batch).collect::<Vec<_>>(), columns, "{}", path.display());
                samples.extend(prepared::read(&path, &policy).unwrap());
            }
            let content = |samples: &[Sample]| {
                samples.iter().map(|s| (s.input_ids.clone(), s.weights.clone())).collect::<Vec<_>>()
            };
            assert_eq!(content(&samples), content(&expected));
        }
    }
}

/// Formats beside one another, and files that a manifest only claims.
#[test]
fn files_of_others_stay() {
    let s = Scratch::new();
    let source = s.file("data.jsonl", mixed_rows(200));
    let (tokenizer, policy) = (byte_tokenizer(true), skipping());
    let pipeline = pipeline_of(Some(&tokenizer), &policy);
    let outs = ["x.jsonl", "x.parquet", "x"].map(|name| s.path(name));
    for out in &outs {
        assert_eq!(
            start(&job(&pipeline, &source, out, Shape::default())).0,
            Start::Anew,
            "{}",
            out.display()
        );
    }
    for out in &outs {
        let (began, manifest) = start(&job(&pipeline, &source, out, Shape::default()));
        assert_eq!(began, Start::UpToDate, "{}", out.display());
        assert_eq!(Manifest::beside(&manifest.paths(out)[0]).unwrap(), Some(manifest));
    }

    // A manifest that names other files does not belong to this output, and they are kept.
    let victim = s.file("victim.jsonl", "years of work");
    let manifest = prepared::manifest_path(&outs[0]);
    let text = String::from_utf8(read(&manifest))
        .unwrap()
        .replace("\"name\": \"x.jsonl\"", "\"name\": \"victim.jsonl\"");
    std::fs::write(&manifest, text).unwrap();
    assert_eq!(start(&job(&pipeline, &source, &outs[0], SHARDS)).0, Start::Anew);
    assert_eq!(read(&victim), b"years of work");

    // Shards that were modified since are not removed.
    let out = s.path("y.jsonl");
    let (_, former) =
        start(&job(&pipeline, &source, &out, Shape { max_shard_bytes: Some(20_000), ..SHARDS }));
    let edited = former.paths(&out)[0].clone();
    std::fs::write(&edited, "edited").unwrap();
    let (_, larger) =
        start(&job(&pipeline, &source, &out, Shape { max_shard_bytes: Some(1 << 20), ..SHARDS }));
    assert!(larger.files.len() < former.files.len());
    let left: Vec<bool> = former.paths(&out).iter().map(|path| path.exists()).collect();
    assert!(left[0] && left[1..].iter().all(|left| !left), "{left:?}");

    // A folder of unfinished shards with something else in it.
    std::fs::create_dir(s.path("z.jsonl.partial")).unwrap();
    s.file("z.jsonl.partial/mine.txt", "mine");
    let error =
        prepared::prepare(&job(&pipeline, &source, &s.path("z.jsonl"), SHARDS), |_| {}, |_| {}).unwrap_err();
    assert!(error.to_string().contains("holds \"mine.txt\""), "{error}");
    assert_eq!(read(&s.path("z.jsonl.partial/mine.txt")), b"mine");
}

/// Packs that end with a shard leave no empty shard after it.
#[test]
fn shards_of_packs_have_packs() {
    let s = Scratch::new();
    let bad_tail = "{\"prompt\": \"a\", \"completion\": \"\"}\n".repeat(64);
    let source = s.file("data.jsonl", mixed_rows(320) + &bad_tail);
    let tokenizer = byte_tokenizer(true);
    let policy = Policy { packing: true, ..skipping() };
    let pipeline = pipeline_of(Some(&tokenizer), &policy);
    let out = s.path("out.jsonl");
    let (_, manifest) = start(&job(&pipeline, &source, &out, Shape { max_shard_bytes: Some(1), ..SHARDS }));
    assert!(manifest.files.len() > 3);
    let rows: usize = manifest
        .paths(&out)
        .iter()
        .map(|path| prepared::read(path, &policy).unwrap().iter().map(Sample::rows).sum::<usize>())
        .sum();
    assert_eq!(rows as u64, manifest.counts.kept);
}

/// Instructions are plain text only without a template: a new template is a reason to prepare them again, and a
/// resumed run keeps this information.
#[test]
fn a_template_that_comes_later_changes_instructions() {
    let s = Scratch::new();
    let row = "{\"instruction\": \"Name a tree.\", \"input\": \"\", \"output\": \"An oak.\"}\n";
    let (source, out) = (s.file("data.jsonl", row), s.path("out.jsonl"));
    let (tokenizer, policy) = (byte_tokenizer(true), Policy::default());
    let plain = pipeline_of(Some(&tokenizer), &policy);
    assert_eq!(start(&job(&plain, &source, &out, Shape::default())).0, Start::Anew);
    let source_of = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}";
    let template = Arc::new(ChatTemplate::new(source_of, Some("<|bos|>"), Some("<|end|>")).unwrap());
    let with = with_template(&plain, &template);
    let job = job(&with, &source, &out, Shape::default());
    assert_eq!(reasons(start(&job).0), ["the chat template differs"]);
    assert_eq!(start(&job).0, Start::UpToDate);

    // Stopped after the last shard, the next run reads no row; its manifest equals that of an uninterrupted run.
    let rows = row.repeat(200);
    let source = s.file("many.jsonl", rows);
    let (out, stop) = (s.path("many-out.jsonl"), AtomicBool::new(true));
    let shards = Shape { max_shard_bytes: Some(1), ..SHARDS };
    let whole = start(&common::job(&with, &source, &s.path("whole.jsonl"), shards)).1;
    let mut stops = 0;
    let resumed = loop {
        match prepared::prepare(
            &Job { stop: &stop, ..common::job(&with, &source, &out, shards) },
            |_| {},
            |_| {},
        ) {
            Ok(manifest) => break manifest,
            Err(_) => stops += 1,
        }
    };
    assert!(stops > 2);
    assert_eq!((resumed.template, resumed.fingerprint), (whole.template, whole.fingerprint));
}

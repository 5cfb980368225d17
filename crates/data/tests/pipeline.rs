//! Whole sources: order, threads, bad rows, counts, files.

mod common;

use common::{
    EOS, Goldens, Scratch, byte_tokenizer, codes, goldens, kept, mixed_rows, outcomes, pipeline_of, prepare,
    skipping, with_embeddings,
};
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use suasion_data::prepared::{self, Manifest};
use suasion_data::source::Source;
use suasion_data::tokens::Tokenizer;
use suasion_data::{
    BAD_ROWS_LISTED, Error, IGNORE, Mode, Objective, OnBadRow, Outcome, Pipeline, Policy, Sample,
    TruncationMode, split,
};
use suasion_files::{AtomicFile, write_atomic};

#[test]
fn any_number_of_threads_gives_the_same_bytes() {
    let s = Scratch::new();
    let source = s.file("data.jsonl", mixed_rows(3000));
    let (tokenizer, policy) = (byte_tokenizer(true), skipping());
    let pipeline = pipeline_of(Some(&tokenizer), &policy);
    let mut results = Vec::new();
    for threads in [1, 2, 5] {
        let out = s.path(&format!("out{threads}.jsonl"));
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let manifest = pool.install(|| prepare(&pipeline, &source, &out, false));
        let read = |p: &Path| std::fs::read(p).unwrap();
        let Manifest { counts, fingerprint, .. } = manifest;
        results.push((read(&out), read(&prepared::findings_path(&out)), counts, fingerprint));
    }
    assert!(results[0].0.len() > 100_000);
    assert!(results[1..].iter().all(|r| *r == results[0]));
}

#[test]
fn compressed_sources_and_outputs_equal_plain_ones() {
    let s = Scratch::new();
    let rows = mixed_rows(300);
    let plain = s.file("data.jsonl", &rows);
    write_atomic(s.path("data.jsonl.gz"), |w| w.write_all(rows.as_bytes())).unwrap();
    write_atomic(s.path("data.jsonl.zst"), |w| w.write_all(rows.as_bytes())).unwrap();
    assert_eq!(std::fs::read(s.path("data.jsonl.gz")).unwrap()[..2], [0x1f, 0x8b]);
    let (tokenizer, policy) = (byte_tokenizer(true), skipping());
    let pipeline = pipeline_of(Some(&tokenizer), &policy);
    let samples = |path: &Path| {
        let (mut samples, _) = pipeline.samples(path).unwrap();
        samples.iter_mut().for_each(|s| s.id.file = Path::new("").into());
        samples
    };
    let expected = samples(&plain);
    assert!(expected.len() > 200);
    assert_eq!(samples(&s.path("data.jsonl.gz")), expected);
    assert_eq!(samples(&s.path("data.jsonl.zst")), expected);
    prepare(&pipeline, &plain, &s.path("out.jsonl"), false);
    prepare(&pipeline, &plain, &s.path("out2.jsonl.zst"), false);
    let unpacked = zstd::decode_all(std::fs::File::open(s.path("out2.jsonl.zst")).unwrap()).unwrap();
    assert_eq!(unpacked, std::fs::read(s.path("out.jsonl")).unwrap());
    assert!(s.path("out2.jsonl.zst.findings.jsonl").is_file());
    assert!(s.path("out2.jsonl.zst.manifest.json").is_file());
}

#[test]
fn prepared_rows_read_back_as_the_same_samples() {
    let s = Scratch::new();
    let source = s.file("data.jsonl", mixed_rows(500));
    let (tokenizer, policy) = (byte_tokenizer(true), skipping());
    let mut pipeline = pipeline_of(Some(&tokenizer), &policy);
    pipeline.keep_text = true;
    let out = s.path("out.jsonl");
    let manifest = prepare(&pipeline, &source, &out, true);
    let (expected, summary) = pipeline.samples(&source).unwrap();
    assert!(expected.iter().any(|s| s.weights.is_some()));
    let content = |samples: &[Sample]| -> Vec<_> {
        samples
            .iter()
            .map(|s| (s.input_ids.clone(), s.labels.clone(), s.origins.clone(), s.weights.clone()))
            .collect()
    };
    let back = prepared::read(&out, &policy).unwrap();
    assert_eq!(content(&back), content(&expected));
    // Prepared again, they are unchanged, and have no findings.
    let again = Pipeline { mode: Mode::Verify, ..pipeline.clone() };
    let (all, second) = outcomes(&again, &out);
    assert_eq!((second.kept, second.failed, second.cut), (summary.kept, 0, 0));
    assert!(!second.has_errors(), "{:?}", second.findings);
    assert_eq!(second.sections, summary.sections);
    assert!(all.iter().all(|o| matches!(o, Outcome::Kept(k) if k.text.is_some())));
    // The source's row numbers are in the lines.
    let lines = std::fs::read_to_string(&out).unwrap();
    let rows: Vec<u64> = lines
        .lines()
        .map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["row"].as_u64().unwrap())
        .collect();
    assert_eq!(rows, expected.iter().map(|s| s.id.row).collect::<Vec<_>>());
    // The manifest is beside it and distinguishes another policy or tokenizer.
    assert_eq!(Manifest::beside(&out).unwrap(), Some(manifest.clone()));
    assert_eq!(manifest.source.blake3, blake3::hash(mixed_rows(500).as_bytes()).to_hex().as_str());
    assert_eq!(manifest.mismatches(Some(tokenizer.fingerprint()), &policy), [""; 0]);
    assert_eq!(manifest.mismatches(Some("other"), &policy).len(), 1);
    let fp =
        |p: &Policy| prepared::fingerprint(&manifest.source.blake3, manifest.tokenizer.as_deref(), None, p);
    assert_eq!(fp(&policy), manifest.fingerprint);
    assert_ne!(fp(&Policy { max_length: Some(201), ..policy.clone() }), manifest.fingerprint);
}

#[test]
fn lines_are_as_the_contract_says() {
    let s = Scratch::new();
    let source = s.file("data.jsonl", "{\"prompt\": \"[TASK] a\", \"completion\": \"\\u00e9\\\"\"}\n");
    let tokenizer = byte_tokenizer(true);
    let policy = Policy::default();
    let mut pipeline = pipeline_of(Some(&tokenizer), &policy);
    pipeline.keep_text = true;
    prepare(&pipeline, &source, &s.path("x.jsonl"), true);
    assert_eq!(
        std::fs::read_to_string(s.path("x.jsonl")).unwrap(),
        "{\"row\": 0, \"input_ids\": [257, 91, 84, 65, 83, 75, 93, 32, 97, 195, 169, 34, 256], \"labels\": [-100, -100, -100, -100, -100, \
         -100, -100, -100, -100, 195, 169, 34, 256], \"origins\": \"BBBBBBBKKRRRE\", \"text\": \"[TASK] aé\\\"<|end|>\"}\n"
    );
    assert_eq!(s.names(), ["data.jsonl", "x.jsonl", "x.jsonl.findings.jsonl", "x.jsonl.manifest.json"]);
    let weighted = Policy { prompt_loss_weight: 0.1, ..Policy::default() };
    prepare(&pipeline_of(Some(&tokenizer), &weighted), &source, &s.path("y.jsonl"), true);
    let line: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(s.path("y.jsonl")).unwrap()).unwrap();
    assert_eq!(line["weights"].to_string(), "[0,0,0,0,0,0,0,0.1,0.1,1,1,1,1]");
    assert!(line.get("text").is_none(), "texts were not kept");
}

#[test]
fn bad_rows_stop_the_run_or_are_listed() {
    let s = Scratch::new();
    let good = "{\"prompt\": \"a\", \"completion\": \"b\"}\n";
    let cut = format!("{{\"prompt\": \"{}\", \"completion\": \"b\"}}\n", "a".repeat(300));
    let rows = format!(
        "{good}{{\"prompt\": \"a\", \"completion\": null}}\n{cut}\n{{\"prompt\": \"a\", \"completion\": \"\"}}\n{good}{{\n{good}"
    );
    let path = s.file("data.jsonl", rows);
    let tokenizer = byte_tokenizer(false);
    let policy =
        Policy { truncation_mode: TruncationMode::KeepStart, max_length: Some(100), ..Policy::default() };
    let pipeline = pipeline_of(Some(&tokenizer), &policy);
    let mut rows = pipeline.rows(Source::open(&path).unwrap()).unwrap();
    let mut seen = Vec::new();
    let error = loop {
        match rows.next().unwrap() {
            Ok(outcome) => seen.push(codes(&outcome)),
            Err(error) => break error,
        }
    };
    assert!(rows.next().is_none(), "nothing follows the error");
    let name = path.display();
    assert_eq!(
        error.to_string(),
        format!(
            "{name}:2: \"completion\" is null\n  also {name}:5: M001: the response is empty\n  also {name}:7: invalid JSON at byte 1 of the row: EOF while parsing an object"
        )
    );
    // Every row was yielded, bad ones too; the row lost to truncation is counted and stops nothing.
    let expected: [&[&str]; 7] = [
        &[],
        &["E-ROW:e"],
        &["M001:e", "T001:w", "T002:w"],
        &["M001:e"],
        &["D001:n"],
        &["E-ROW:e"],
        &["D001:n"],
    ];
    assert_eq!(seen, expected);

    let skip = Policy { on_bad_row: OnBadRow::Skip, ..policy.clone() };
    let (all, summary) = outcomes(&Pipeline { policy: skip.into(), ..pipeline.clone() }, &path);
    assert_eq!((summary.rows, summary.kept, summary.failed, summary.dropped_rows()), (7, 3, 3, 1));
    assert_eq!(all.iter().map(|o| o.id().row).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5, 6]);
    assert_eq!(all.iter().map(|o| o.id().line.unwrap()).collect::<Vec<_>>(), [1, 2, 3, 5, 6, 7, 8]);

    // Many bad rows: the search ends.
    let path = s.file("bad.jsonl", "{}\n".repeat(5000));
    let Err(Error::BadRows { others, stopped, .. }) = pipeline.samples(&path) else { panic!() };
    assert_eq!((others.len(), stopped), (BAD_ROWS_LISTED - 1, true));
    // Verification never stops.
    let (all, summary) = outcomes(&Pipeline { mode: Mode::Verify, ..pipeline }, &path);
    assert_eq!((all.len(), summary.failed), (5000, 5000));
}

/// If the consumer stops, the reader thread ends.
#[test]
fn an_iterator_that_is_dropped_ends_its_reader() {
    let s = Scratch::new();
    let path = s.file("data.jsonl", "{\"prompt\": \"a\", \"completion\": \"b\"}\n".repeat(200_000));
    let source = Source::open(&path).unwrap();
    let (bytes, size) = (source.bytes_read(), source.size());
    let mut rows = pipeline_of(Some(&byte_tokenizer(false)), &Policy::default()).rows(source).unwrap();
    assert_eq!(rows.next().unwrap().unwrap().id().row, 0);
    drop(rows);
    // The reader holds the counter until it ends.
    for _ in 0..1000 {
        if Arc::strong_count(&bytes) == 1 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert_eq!(Arc::strong_count(&bytes), 1);
    assert!(bytes.load(Ordering::Relaxed) < size);
}

#[test]
fn rows_in_brief_have_the_findings_of_all_and_the_tokens_of_some() {
    let s = Scratch::new();
    let path = s.file("mixed.jsonl", mixed_rows(400));
    let pipeline = Pipeline { keep_text: true, ..pipeline_of(Some(&byte_tokenizer(false)), &skipping()) };
    let whole = |row: u64| row % 7 == 3;
    let mut rows = pipeline.rows(Source::open(&path).unwrap()).unwrap();
    let mut brief = pipeline.rows_in_brief(Source::open(&path).unwrap(), whole).unwrap();
    let (mut with, mut without) = (0, 0);
    for row in rows.by_ref() {
        let (row, brief) = (row.unwrap(), brief.next().unwrap().unwrap());
        assert_eq!((row.id(), row.findings()), (brief.id(), brief.findings()));
        match (&row, &brief) {
            (Outcome::Kept(row), Outcome::Kept(brief)) if whole(row.sample.id.row) => {
                assert_eq!(row, brief);
                with += 1;
            }
            (Outcome::Kept(row), Outcome::Kept(brief)) => {
                assert!(!row.sample.is_empty() && brief.sample.is_empty() && brief.text.is_none());
                without += 1;
            }
            _ => assert_eq!(format!("{row:?}"), format!("{brief:?}")),
        }
    }
    assert!(brief.next().is_none() && with > 20 && without > 200, "{with} {without}");
    assert_eq!(rows.summary(), brief.summary());
}

/// Rows given one by one, as JSON objects or as pairs, have the same outcomes as in a file.
#[test]
fn single_rows_become_what_they_become_in_a_file() {
    let s = Scratch::new();
    let lines = mixed_rows(100);
    let path = s.file("data.jsonl", &lines);
    let pipeline = pipeline_of(Some(&byte_tokenizer(true)), &skipping());
    let (all, _) = outcomes(&pipeline, &path);
    let processor = pipeline.processor().unwrap();
    let mut compared = 0;
    for (line, outcome) in lines.lines().zip(&all) {
        let Ok(serde_json::Value::Object(fields)) = serde_json::from_str(line) else { continue };
        let pairs: Vec<(String, serde_json::Value)> = fields.clone().into_iter().collect();
        for single in [pipeline.row(fields).unwrap(), processor.row(pairs).unwrap()] {
            match (single, outcome) {
                (Outcome::Kept(single), Outcome::Kept(kept)) => {
                    assert_eq!(single.sample.input_ids, kept.sample.input_ids);
                    assert_eq!(single.sample.labels, kept.sample.labels);
                    assert_eq!(single.sample.weights, kept.sample.weights);
                    assert_eq!(single.cuts, kept.cuts);
                }
                (Outcome::Dropped { reason, .. }, Outcome::Dropped { reason: other, .. }) => {
                    assert_eq!(reason, *other);
                }
                (Outcome::Failed { error, .. }, Outcome::Failed { error: other, .. }) => {
                    assert_eq!(error.help(), other.help());
                }
                (single, other) => panic!("{single:?} is not {other:?}"),
            }
            compared += 1;
        }
    }
    assert!(compared > 150, "{compared}");
}

#[test]
fn text_without_a_tokenizer_and_ids_beyond_the_vocabulary() {
    let s = Scratch::new();
    let path = s.file("data.jsonl", "{\"prompt\": \"a\", \"completion\": \"b\"}\n");
    let policy = Policy::default();
    let error = pipeline_of(None, &policy).samples(&path).unwrap_err();
    assert!(error.to_string().contains("data.jsonl:1 is text, and there is no tokenizer"), "{error}");
    let tokenizer = byte_tokenizer(false);
    let pipeline = pipeline_of(Some(&tokenizer), &policy);
    let error = with_embeddings(&pipeline, 256).samples(&path).unwrap_err();
    let message = format!(
        "data.jsonl:1: token 2 has the id {EOS}, and the model has 256 embeddings and the tokenizer 259"
    );
    assert!(error.to_string().ends_with(&message), "{error}");
    assert_eq!(with_embeddings(&pipeline, 257).samples(&path).unwrap().0.len(), 1);
}

#[test]
fn shares_are_those_of_the_targets() {
    let s = Scratch::new();
    // BOS; [TASK] (6), " ab " (4), response "xy" (2), EOS. Without BOS the first marker byte is not a target.
    let path = s.file("data.jsonl", "{\"prompt\": \"[TASK] ab \", \"completion\": \"xy\"}\n");
    let policy = Policy::default();
    let tokenizer = byte_tokenizer(false);
    let (_, summary) = pipeline_of(Some(&tokenizer), &policy).samples(&path).unwrap();
    let shares: Vec<(&str, u64, f64, f64)> = summary
        .sections()
        .map(|(n, st)| (n, st.tokens, summary.share_before(n), summary.share_after(n)))
        .collect();
    assert_eq!(
        shares,
        [
            ("task", 4, 4.0 / 12.0, 0.0),
            ("scaffold", 6, 5.0 / 12.0, 0.0),
            ("response", 2, 2.0 / 12.0, 2.0 / 3.0),
            ("end_of_turn", 1, 1.0 / 12.0, 1.0 / 3.0)
        ]
    );
    assert_eq!(
        (summary.tokens, summary.supervised_tokens, summary.targets, summary.trainable_rows),
        (13, 3, 3, 1)
    );

    let path = s.file("mixed.jsonl", mixed_rows(400));
    let policy = skipping();
    let (samples, summary) = pipeline_of(Some(&tokenizer), &policy).samples(&path).unwrap();
    let sum = |f: &dyn Fn(&str) -> f64| summary.sections().map(|(name, _)| f(name)).sum::<f64>();
    assert!((sum(&|n| summary.share_before(n)) - 1.0).abs() < 1e-12);
    assert!((sum(&|n| summary.share_after(n)) - 1.0).abs() < 1e-12);
    assert_eq!(summary.rows, summary.kept + summary.failed + summary.dropped_rows());
    assert_eq!(summary.tokens, samples.iter().map(|s| s.len() as u64).sum::<u64>());
    assert_eq!(summary.targets, samples.iter().map(|s| s.targets().count() as u64).sum::<u64>());
    let learned = samples.iter().flat_map(|s| &s.labels).filter(|l| **l != IGNORE).count() as u64;
    assert_eq!(summary.supervised_tokens, learned);
    for sample in &samples {
        for i in 0..sample.len() {
            let weight = sample.weights.as_ref().map_or(1.0, |w| w[i]);
            // Prompt 0.125, scaffold never, response and stop token 1.
            let expected = match sample.origins[i].letter() {
                'R' | 'E' => 1.0,
                'B' => 0.0,
                _ => 0.125,
            };
            assert_eq!(if sample.labels[i] == IGNORE { 0.0 } else { weight }, expected);
            assert!(sample.labels[i] == IGNORE || sample.labels[i] as u32 == sample.input_ids[i]);
        }
    }
}

#[test]
fn splits_are_exact_and_depend_on_seed_and_row_alone() {
    let s = Scratch::new();
    let rows: String =
        (0..200).map(|i| format!("{{\"prompt\": \"{i}\", \"completion\": \"b\"}}\n")).collect();
    let path = s.file("data.jsonl", rows);
    let (tokenizer, policy) = (byte_tokenizer(false), Policy::default());
    let (samples, _) = pipeline_of(Some(&tokenizer), &policy).samples(&path).unwrap();
    let rows = |samples: &[Sample]| samples.iter().map(|s| s.id.row).collect::<Vec<_>>();
    let (train, held) = split(samples.clone(), 0.1, 7);
    assert_eq!((train.len(), held.len()), (180, 20));
    assert!(rows(&train).is_sorted() && rows(&held).is_sorted());
    let mut all = [rows(&train), rows(&held)].concat();
    all.sort_unstable();
    assert_eq!(all, (0..200).collect::<Vec<_>>());
    assert_ne!(rows(&split(samples.clone(), 0.1, 8).1), rows(&held));
    let mut reversed = samples.clone();
    reversed.reverse();
    let mut again = rows(&split(reversed, 0.1, 7).1);
    again.reverse();
    assert_eq!(again, rows(&held));
    assert_eq!(split(samples[..2].to_vec(), 0.01, 7).1.len(), 1, "at least one");
    assert_eq!(split(samples[..2].to_vec(), 0.99, 7).0.len(), 1, "never all");
    assert_eq!(split(samples.clone(), 0.0, 7).1.len(), 0);
    // Not the ends, not a stride: the gaps between held-out rows differ.
    let gaps: std::collections::BTreeSet<u64> = rows(&held).windows(2).map(|w| w[1] - w[0]).collect();
    assert!(gaps.len() > 5, "{gaps:?}");
}

#[test]
fn files_are_whole_or_not_there() {
    let s = Scratch::new();
    let path = s.file("x.jsonl", "old");
    let error = write_atomic(&path, |w| {
        w.write_all(&vec![b'x'; 1 << 20])?;
        Err(io::Error::from(io::ErrorKind::StorageFull))
    })
    .unwrap_err();
    assert!(error.to_string().contains("x.jsonl: no storage space"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    let mut dropped = AtomicFile::create(&path).unwrap();
    dropped.write_all(b"half").unwrap();
    drop(dropped);
    assert_eq!((s.names(), std::fs::read(&path).unwrap()), (vec!["x.jsonl".to_string()], b"old".to_vec()));
    write_atomic(&path, |w| w.write_all(b"new")).unwrap();
    assert_eq!((s.names(), std::fs::read(&path).unwrap()), (vec!["x.jsonl".to_string()], b"new".to_vec()));
    assert!(AtomicFile::create(s.dir.path()).is_err());
}

#[test]
fn progress_ends_at_the_whole() {
    let s = Scratch::new();
    let rows = mixed_rows(2000);
    let path = s.file("data.jsonl", &rows);
    let (tokenizer, policy) = (byte_tokenizer(false), skipping());
    let mut outcomes = pipeline_of(Some(&tokenizer), &policy).rows(Source::open(&path).unwrap()).unwrap();
    let mut seen = Vec::new();
    while let Some(outcome) = outcomes.next() {
        outcome.unwrap();
        seen.push(outcomes.progress());
    }
    let (last, summary) = (*seen.last().unwrap(), outcomes.into_summary());
    assert_eq!(
        (last.rows, last.bytes, last.size, last.tokens),
        (summary.rows, rows.len() as u64, rows.len() as u64, summary.tokens)
    );
    seen.dedup_by_key(|p| p.rows);
    assert!(seen.len() > 3 && seen.is_sorted_by_key(|p| (p.rows, p.bytes)));
}

/// Real rows and a real tokenizer: supervised tokens decode to the response, and no prompt token is supervised.
#[test]
fn real_rows() {
    goldens().iter().for_each(real_rows_of);
}

fn real_rows_of(folder: &Goldens) {
    let tokenizer = Arc::new(Tokenizer::from_dir(&folder.dir.join("tokenizers/qwen2_5")).unwrap());
    let policy = Policy { max_length: None, ..Policy::default() };
    let path = folder.dir.join(folder.prompt_completion());
    let (all, summary) = outcomes(&pipeline_of(Some(&tokenizer), &policy), &path);
    let n = folder.expect(22, 123);
    assert_eq!((summary.rows, summary.kept, summary.failed), (n, n, 0));
    for (i, row) in folder.lines(folder.prompt_completion()).iter().enumerate() {
        let sample = &kept(&all, i).sample;
        let learned: Vec<u32> =
            (0..sample.len()).filter(|&i| sample.labels[i] != IGNORE).map(|i| sample.input_ids[i]).collect();
        let (stop, response) = learned.split_last().unwrap();
        assert_eq!(Some(*stop), tokenizer.eos().map(|t| t.id));
        assert_eq!(tokenizer.decode(response, false), row["completion"].as_str().unwrap(), "row {i}");
        let prompt = tokenizer.encode_prompt(row["prompt"].as_str().unwrap()).unwrap();
        assert_eq!(sample.input_ids[..prompt.len()], prompt);
        assert!(sample.labels[..prompt.len()].iter().all(|l| *l == IGNORE));
        assert_eq!(prompt.len() + learned.len(), sample.len());
    }
}

#[test]
fn replies_to_one_prompt_are_held_out_together() {
    let s = Scratch::new();
    // 40 prompts with 1 to 5 replies each, scattered over the file.
    let mut rows = Vec::new();
    for reply in 0..5 {
        for prompt in 0..40 {
            if reply <= prompt % 5 {
                rows.push(format!("{{\"prompt\": \"p{prompt}\", \"completion\": \"reply {reply}\"}}\n"));
            }
        }
    }
    let path = s.file("data.jsonl", rows.concat());
    let (tokenizer, policy) = (byte_tokenizer(false), Policy::default());
    let (samples, _) = pipeline_of(Some(&tokenizer), &policy).samples(&path).unwrap();
    let prompt = |sample: &Sample| {
        let end = sample.origins.iter().position(|o| o.supervised()).unwrap();
        sample.input_ids[..end].to_vec()
    };
    for seed in 0..20 {
        let (train, held) = split(samples.clone(), 0.2, seed);
        assert_eq!(train.len() + held.len(), 120);
        assert_eq!(held.len(), 24, "prompts of one reply fill up what larger ones leave");
        let trained: std::collections::BTreeSet<_> = train.iter().map(prompt).collect();
        assert!(held.iter().all(|s| !trained.contains(&prompt(s))), "a held-out prompt was trained on");
    }
    // With one prompt for all rows, rows are drawn singly.
    let same: Vec<Sample> = samples.iter().filter(|s| prompt(s) == prompt(&samples[4])).cloned().collect();
    assert_eq!((same.len(), split(same, 0.4, 1).1.len()), (5, 2));
}

#[test]
fn a_row_is_never_longer_than_asked_for() {
    let s = Scratch::new();
    let long = "x".repeat(40);
    let rows = [
        format!("{{\"prompt\": \"[TASK] {long}\", \"completion\": \"yes\"}}"),
        "{\"prompt\": \"[TASK] x\", \"completion\": \"yes\"}".to_string(),
    ];
    let path = s.file("data.jsonl", rows.join("\n"));
    let tokenizer = byte_tokenizer(false);
    // With a weight on the prompt the first row keeps targets, though its response does not fit at all.
    for (prompt_loss_weight, objective) in
        [(0.0, Objective::ResponseOnly), (0.5, Objective::ResponseOnly), (0.0, Objective::AllTokens)]
    {
        let policy = Policy { max_length: Some(20), prompt_loss_weight, objective, ..Policy::default() };
        let (samples, summary) = pipeline_of(Some(&tokenizer), &policy).samples(&path).unwrap();
        assert_eq!((samples.len(), summary.dropped_rows()), (1, 1));
        assert!(samples.iter().all(|s| s.len() <= 20));
    }
}

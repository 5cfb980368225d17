//! `suasion prepare`: its outputs, when they are reused, and what it refuses.

use crate::util::{Dir, row, runs};
use serde_json::Value;

fn prepare(dir: &Dir) -> crate::util::TestCommand {
    dir.prepare("rows.jsonl", "out.jsonl")
}

fn numbers(value: &Value) -> Vec<i64> {
    value.as_array().expect("a list").iter().map(|v| v.as_i64().expect("a number")).collect()
}

#[test]
fn a_line_per_row_in_input_order() {
    let dir = Dir::new().with_model().with_rows(5);
    let ran = prepare(&dir).ok();
    assert!(ran.stdout.starts_with("5 rows: 5 kept, 0 dropped, 0 failed\n"), "{}", ran.stdout);
    assert!(ran.stderr.is_empty(), "{}", ran.stderr);
    let lines = dir.lines("out.jsonl");
    assert_eq!(lines.len(), 5);
    for (index, line) in lines.iter().enumerate() {
        let keys: Vec<&str> = line.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(keys, ["row", "input_ids", "labels", "origins"]);
        assert_eq!(line["row"], index);
        let (ids, labels) = (numbers(&line["input_ids"]), numbers(&line["labels"]));
        let origins: Vec<char> = line["origins"].as_str().unwrap().chars().collect();
        assert_eq!((ids.len(), ids.len()), (labels.len(), origins.len()));
        for i in 0..ids.len() {
            let supervised = matches!(origins[i], 'R' | 'E');
            assert_eq!(labels[i], if supervised { ids[i] } else { -100 }, "row {index}, token {i}");
        }
        // The four sections in order, each marker as scaffold, and one stop token at the end.
        assert_eq!(runs(line), "BSBCBKBRE", "row {index}");
        assert_eq!(origins.iter().filter(|o| **o == 'E').count(), 1);
    }
    let manifest = dir.json("out.jsonl.manifest.json");
    assert_eq!(manifest["counts"]["kept"], 5);
    assert_eq!(dir.text("out.jsonl.findings.jsonl"), "");
}

#[test]
fn with_text_adds_the_rendered_text() {
    let dir = Dir::new().with_model().with_rows(1);
    prepare(&dir).arg("--with-text").ok();
    let text = dir.lines("out.jsonl")[0]["text"].as_str().unwrap().to_string();
    assert!(
        text.starts_with("[SYSTEM] Be honest.\n") && text.contains("[RESPONSE] They are, at rush hour."),
        "{text}"
    );
}

#[test]
fn prompt_and_completion_are_rows_too() {
    let dir = Dir::new().with_model();
    dir.write("rows.jsonl", "{\"prompt\": \"Why? \", \"completion\": \"Because.\"}\n");
    prepare(&dir).ok();
    let line = &dir.lines("out.jsonl")[0];
    let origins = line["origins"].as_str().unwrap();
    assert!(origins.starts_with('O') && origins.ends_with("RE"), "{origins}");
}

#[test]
fn weights_stand_only_where_they_are_needed() {
    let dir = Dir::new().with_model().with_rows(1);
    prepare(&dir).set(&["loss_weights.task=0.25"]).ok();
    let line = &dir.lines("out.jsonl")[0];
    let weights: Vec<f64> = line["weights"].as_array().unwrap().iter().map(|w| w.as_f64().unwrap()).collect();
    for (origin, weight) in line["origins"].as_str().unwrap().chars().zip(weights) {
        let expected = match origin {
            'R' | 'E' => 1.0,
            'K' => 0.25,
            _ => 0.0,
        };
        assert_eq!(weight, expected, "{origin}");
    }
}

#[test]
fn markers_may_have_other_names() {
    let dir = Dir::new().with_model();
    dir.write("rows.jsonl", row(0).replace("[TASK]", "[ASK]"));
    prepare(&dir).ok();
    assert_eq!(runs(&dir.lines("out.jsonl")[0]), "BSBCBRE");
    prepare(&dir).set(&["section_markers.TASK=[ASK]"]).ok();
    assert_eq!(runs(&dir.lines("out.jsonl")[0]), "BSBCBKBRE");
}

#[test]
fn dropped_rows_are_findings() {
    let dir = Dir::new().with_model();
    let long = row(1).replace("Maps are boring.", &"Maps are boring. ".repeat(30));
    dir.write("rows.jsonl", format!("{}\n{long}\n{}\n", row(0), row(2)));
    prepare(&dir)
        .set(&["truncation_mode=drop", "max_length=100"])
        .ok()
        .prints("1 dropped (1 longer than max_length)");
    let rows: Vec<_> = dir.lines("out.jsonl").iter().map(|l| l["row"].as_u64().unwrap()).collect();
    assert_eq!(rows, [0, 2]);
    let finding = &dir.lines("out.jsonl.findings.jsonl")[0];
    assert_eq!(
        (&finding["row"], &finding["code"], &finding["level"]),
        (&1.into(), &"T001".into(), &"warning".into())
    );
    let keys: Vec<&str> = finding.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, ["row", "code", "level", "message"]);
}

#[test]
fn compressed_sources_and_outputs() {
    let dir = Dir::new().with_model().with_rows(3);
    prepare(&dir).ok();
    dir.prepare("rows.jsonl", "out2.jsonl.gz").ok();
    // Prepared data is a source of rows, compressed or not, and preparing it again leaves it unchanged.
    for (source, output) in [("out2.jsonl.gz", "out3.jsonl"), ("out.jsonl", "out4.jsonl")] {
        dir.prepare(source, output).ok();
        assert_eq!(dir.lines(output), dir.lines("out.jsonl"));
    }
}

/// Each output format read back gives the lines of the JSON Lines output.
#[test]
fn every_output_format_holds_the_same_rows() {
    let dir = Dir::new().with_model().with_rows(200);
    let arguments = ["--set", "loss_weights.task=0.25"];
    prepare(&dir).args(&arguments).ok();
    let again = |source: &str, output: &str| {
        dir.prepare(source, output).args(&arguments).ok();
        dir.lines(output)
    };
    // Rows that are read back are renumbered; nothing else changes.
    let expected = again("out.jsonl", "back.jsonl");
    for output in ["rows.parquet", "folder", "deep.jsonl.zst"] {
        dir.prepare("rows.jsonl", output).args(&arguments).ok();
        assert_eq!(again(output, &format!("{output}-back.jsonl")), expected, "{output}");
    }
    let mut names: Vec<String> = std::fs::read_dir(dir.path("folder"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["data-00000-of-00001.arrow", "dataset_info.json", "manifest.json", "state.json"]);
    // With the manifest, verify knows which weights were configured, and does not report them.
    for source in ["rows.parquet", "folder", "out.jsonl"] {
        dir.verify(source).ok();
    }
    // The same with shards.
    for (output, shards) in [("s.jsonl", "s-*.jsonl"), ("s2.parquet", "s2-*.parquet"), ("s3", "s3")] {
        let job = || dir.prepare("rows.jsonl", output).args(&["--max-shard-size", "2KB"]).args(&arguments);
        let ran = job().ok();
        assert!(ran.stdout.contains(" files, "), "{}", ran.stdout);
        assert_eq!(again(shards, &format!("{output}-back.jsonl")), expected, "{output}");
        dir.verify(shards).ok();
        let ran = job().ok();
        assert!(ran.stderr.contains("up to date"), "{}", ran.stderr);
    }
}

#[test]
fn prepared_data_is_reused_or_prepared_again_with_the_reason() {
    let dir = Dir::new().with_model().with_rows(3);
    prepare(&dir).ok();
    let ran = prepare(&dir).ok();
    assert!(ran.stderr.starts_with("up to date"), "{}", ran.stderr);
    let ran = prepare(&dir).set(&["max_length=64"]).ok();
    assert!(ran.stderr.starts_with("preparing again: max_length was 1024, is 64\n"), "{}", ran.stderr);
    let ran = prepare(&dir).set(&["max_length=64"]).arg("--rebuild").ok();
    assert!(ran.stderr.starts_with("preparing again: a rebuild was requested\n"), "{}", ran.stderr);
}

#[test]
fn outputs_that_cannot_be_written_are_refused() {
    let dir = Dir::new().with_model().with_rows(1);
    dir.prepare("rows.jsonl", "x.csv").run().error(2, "E-USAGE", "unknown output format");
    dir.prepare("rows.jsonl", "x.jsonl").args(&["--max-shard-size", "5 miles"]).run().error(
        2,
        "E-USAGE",
        "a size is a number",
    );
    dir.prepare("rows.jsonl", "rows.jsonl").run().error(2, "E-USAGE", "both the source and the output");
    // The source must not be replaced either: as a shard of the output, as its findings, or in its folder.
    dir.prepare("rows.jsonl", "mine").ok();
    for (source, output) in [
        ("rows.jsonl", "rows.jsonl.findings.jsonl"),
        ("x-00000-of-00001.jsonl", "x.jsonl"),
        ("y.jsonl.findings.jsonl", "y.jsonl"),
        ("mine", "mine"),
    ] {
        if source != "mine" && source != "rows.jsonl" {
            dir.write(source, dir.text("rows.jsonl"));
        }
        let job = dir.prepare(source, output);
        if source == "rows.jsonl" {
            job.ok();
        } else {
            job.run().error(2, "E-USAGE", "is both the source and the output");
        }
    }
    dir.prepare("rows.jsonl", "z-00000-of-00002.jsonl").run().error(
        3,
        "E-SOURCE",
        "is the name of a single shard",
    );
    std::fs::remove_dir_all(dir.path("mine")).unwrap();
    // A folder with other files is not replaced.
    std::fs::create_dir(dir.path("mine")).unwrap();
    dir.write("mine/notes.txt", "keep");
    dir.prepare("rows.jsonl", "mine").run().error(3, "E-SOURCE", "holds \"notes.txt\"");
    assert_eq!((dir.lines("rows.jsonl").len(), dir.text("mine/notes.txt")), (1, "keep".into()));
}

#[test]
fn json_summary() {
    let dir = Dir::new().with_model().with_rows(2);
    let json = prepare(&dir).args(&["--json", "--quiet"]).ok().json();
    assert_eq!(json["counts"]["rows"], 2);
    assert_eq!(json["policy"]["objective"], "response_only");
}

#[test]
fn a_model_refuses_data_that_was_prepared_for_another() {
    let dir = Dir::new().with_model().with_rows(3);
    prepare(&dir).ok();
    let train = || dir.train("out.jsonl").set(&["init=random"]).arg("--dry-run");
    train().ok();
    train().set(&["completion_only_loss=false"]).run().error(3, "E-FINGERPRINT", "objective");
    let tokenizer = dir.text("model/tokenizer.json").replace("\"id\": 0,", "\"id\": 0, \"x\": 0,");
    dir.write("model/tokenizer.json", tokenizer);
    train().run().error(3, "E-FINGERPRINT", "tokenizer");
}

//! `suasion prepare`: the lines of CLI.md.

use crate::util::{Dir, row};
use serde_json::Value;

fn prepare(dir: &Dir) -> crate::util::TestCommand {
    dir.suasion(&["prepare", "-M", "model", "-D", "rows.jsonl", "-o", "out.jsonl"])
}

fn numbers(value: &Value) -> Vec<i64> {
    value.as_array().expect("a list").iter().map(|v| v.as_i64().expect("a number")).collect()
}

#[test]
fn a_line_per_row_in_input_order() {
    let dir = Dir::new().with_model().with_rows(5);
    let ran = prepare(&dir).ok();
    assert!(ran.stdout.is_empty(), "results are in the file");
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
        // The four sections in their order, each marker scaffold, and one stop token at the end.
        let mut runs = origins.clone();
        runs.dedup();
        assert_eq!(runs.iter().collect::<String>(), "BSBCBKBRE", "row {index}");
        assert_eq!(origins.iter().filter(|o| **o == 'E').count(), 1);
    }
    let manifest: Value = serde_json::from_str(&dir.text("out.manifest.json")).unwrap();
    assert_eq!(manifest["counts"]["kept"], 5);
    assert_eq!(dir.text("out.findings.jsonl"), "");
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
    let letters = |dir: &Dir| {
        let mut runs: Vec<char> = dir.lines("out.jsonl")[0]["origins"].as_str().unwrap().chars().collect();
        runs.dedup();
        runs.into_iter().collect::<String>()
    };
    prepare(&dir).ok();
    assert_eq!(letters(&dir), "BSBCBRE");
    prepare(&dir).set(&["section_markers.TASK=[ASK]"]).ok();
    assert_eq!(letters(&dir), "BSBCBKBRE");
}

#[test]
fn dropped_rows_are_findings() {
    let dir = Dir::new().with_model();
    let long = row(1).replace("Maps are boring.", &"Maps are boring. ".repeat(30));
    dir.write("rows.jsonl", format!("{}\n{long}\n{}\n", row(0), row(2)));
    prepare(&dir)
        .set(&["truncation_mode=drop", "max_length=100"])
        .ok()
        .says("1 dropped (1 longer than max_length)");
    let rows: Vec<_> = dir.lines("out.jsonl").iter().map(|l| l["row"].as_u64().unwrap()).collect();
    assert_eq!(rows, [0, 2]);
    let finding = &dir.lines("out.findings.jsonl")[0];
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
    dir.suasion(&["prepare", "-M", "model", "-D", "rows.jsonl", "-o", "out2.jsonl.gz"]).ok();
    // What was prepared is a source of rows again, compressed or not, and stays what it was.
    for (source, output) in [("out2.jsonl.gz", "out3.jsonl"), ("out.jsonl", "out4.jsonl")] {
        dir.suasion(&["prepare", "-M", "model", "-D", source, "-o", output]).ok();
        assert_eq!(dir.lines(output), dir.lines("out.jsonl"));
    }
}

/// What each form of output is read back as, as the lines of JSON that it would have been.
#[test]
fn every_form_of_output_holds_the_same_rows() {
    let dir = Dir::new().with_model().with_rows(200);
    let arguments = ["--set", "loss_weights.task=0.25"];
    prepare(&dir).args(&arguments).ok();
    let again = |source: &str, output: &str| {
        dir.suasion(&["prepare", "-M", "model", "-D", source, "-o", output]).args(&arguments).ok();
        dir.lines(output)
    };
    // As a source of rows, the lines themselves have new numbers; nothing else changes.
    let expected = again("out.jsonl", "back.jsonl");
    for output in ["rows.parquet", "folder", "deep.jsonl.zst"] {
        dir.suasion(&["prepare", "-M", "model", "-D", "rows.jsonl", "-o", output]).args(&arguments).ok();
        assert_eq!(again(output, &format!("{output}-back.jsonl")), expected, "{output}");
    }
    let mut names: Vec<String> = std::fs::read_dir(dir.path("folder"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["data-00000-of-00001.arrow", "dataset_info.json", "manifest.json", "state.json"]);
    // The manifest beside a form knows its rows: what was asked for is no finding.
    for source in ["rows.parquet", "folder", "out.jsonl"] {
        dir.suasion(&["verify", "-M", "model", "-D", source]).ok();
    }
    // In shards, whatever the form.
    for (output, shards) in [("s.jsonl", "s-*.jsonl"), ("s2.parquet", "s2-*.parquet"), ("s3", "s3")] {
        let job = ["prepare", "-M", "model", "-D", "rows.jsonl", "-o", output, "--max-shard-size", "2KB"];
        let ran = dir.suasion(&job).args(&arguments).ok();
        assert!(ran.stderr.contains(" files, "), "{}", ran.stderr);
        assert_eq!(again(shards, &format!("{output}-back.jsonl")), expected, "{output}");
        dir.suasion(&["verify", "-M", "model", "-D", shards]).ok();
        let ran = dir.suasion(&job).args(&arguments).ok();
        assert!(ran.stderr.contains("up to date"), "{}", ran.stderr);
    }
}

#[test]
fn what_is_there_is_reused_or_prepared_again_and_says_why() {
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
    dir.suasion(&["prepare", "-M", "model", "-D", "rows.jsonl", "-o", "x.csv"]).run().error(
        2,
        "E-USAGE",
        "the output's form is told by its name",
    );
    dir.suasion(&[
        "prepare",
        "-M",
        "model",
        "-D",
        "rows.jsonl",
        "-o",
        "x.jsonl",
        "--max-shard-size",
        "5 miles",
    ])
    .run()
    .error(2, "E-USAGE", "a size is a number");
    dir.suasion(&["prepare", "-M", "model", "-D", "rows.jsonl", "-o", "rows.jsonl"]).run().error(
        2,
        "E-USAGE",
        "both the source and the output",
    );
    // Nor what is read: as a shard of the output, as its findings, in its folder.
    dir.suasion(&["prepare", "-M", "model", "-D", "rows.jsonl", "-o", "mine"]).ok();
    for (source, output) in [
        ("rows.jsonl", "rows.findings.jsonl"),
        ("x-00000-of-00001.jsonl", "x.jsonl"),
        ("y.findings.jsonl", "y.jsonl"),
        ("mine", "mine"),
    ] {
        if source != "mine" && source != "rows.jsonl" {
            dir.write(source, dir.text("rows.jsonl"));
        }
        let job = ["prepare", "-M", "model", "-D", source, "-o", output];
        if source == "rows.jsonl" {
            dir.suasion(&job).ok();
        } else {
            dir.suasion(&job).run().error(2, "E-USAGE", "is both the source and the output");
        }
    }
    let shard = ["prepare", "-M", "model", "-D", "rows.jsonl", "-o", "z-00000-of-00002.jsonl"];
    dir.suasion(&shard).run().error(3, "E-SOURCE", "is the name of one shard");
    std::fs::remove_dir_all(dir.path("mine")).unwrap();
    // Somebody's folder is not replaced.
    std::fs::create_dir(dir.path("mine")).unwrap();
    dir.write("mine/notes.txt", "keep");
    dir.suasion(&["prepare", "-M", "model", "-D", "rows.jsonl", "-o", "mine"]).run().error(
        3,
        "E-SOURCE",
        "holds \"notes.txt\"",
    );
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
    let train = ["train", "-M", "model", "-D", "out.jsonl", "--set", "init=random", "--dry-run"];
    dir.suasion(&train).ok();
    dir.suasion(&train).set(&["completion_only_loss=false"]).run().error(3, "E-FINGERPRINT", "objective");
    let tokenizer = dir.text("model/tokenizer.json").replace("\"id\": 0,", "\"id\": 0, \"x\": 0,");
    dir.write("model/tokenizer.json", tokenizer);
    dir.suasion(&train).run().error(3, "E-FINGERPRINT", "tokenizer");
}

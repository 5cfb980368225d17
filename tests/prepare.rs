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

#[test]
fn outputs_of_later_versions_are_refused_by_name() {
    let dir = Dir::new().with_model().with_rows(1);
    std::fs::create_dir(dir.path("folder")).unwrap();
    for (output, word) in
        [("x.parquet", "parquet"), ("x", "load_from_disk"), ("folder", "load_from_disk"), ("x.csv", "none")]
    {
        dir.suasion(&["prepare", "-M", "model", "-D", "rows.jsonl", "-o", output])
            .run()
            .error(2, "E-USAGE", word);
    }
    dir.suasion(&["prepare", "-M", "model", "-D", "rows.jsonl", "-o", "rows.jsonl"]).run().error(
        2,
        "E-USAGE",
        "both the source and the output",
    );
    assert_eq!(dir.lines("rows.jsonl").len(), 1);
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

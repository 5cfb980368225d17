//! `suasion train --demo`: needs only the binary, and reports its measurements.

use crate::util::Dir;

#[test]
fn the_demo_runs_from_the_binary_alone() {
    let dir = Dir::new();
    let ran = dir.suasion(&["train", "--demo", "--set", "max_steps=2", "--set", "learning_rate=1e-3"]).ok();
    let ran = ran.says("176 rows (156 to train on, 20 held out)");
    // Each objective is trained once.
    assert_eq!(ran.stderr.matches("step 2/2").count(), 2, "{}", ran.stderr);
    for text in
        ["share of", "response only", "all tokens", "[RESPONSE]", "report: suasion-demo/run/report.html"]
    {
        assert!(ran.stdout.contains(text), "{text}\n{}", ran.stdout);
    }
    assert!(dir.exists("suasion-demo/run/report.html") && dir.exists("suasion-demo/run/model.safetensors"));
    // All replies to a view are in the same split.
    let views = |name: &str| -> std::collections::BTreeSet<String> {
        dir.lines(name).iter().map(|row| row["view"].as_str().unwrap().to_string()).collect()
    };
    assert!(views("suasion-demo/data/train.jsonl").is_disjoint(&views("suasion-demo/data/test.jsonl")));
    // A second demo replaces the first, but no other folder.
    dir.suasion(&["train", "--demo", "--set", "max_steps=1", "--quiet"]).ok();
    dir.write("mine/notes.txt", "keep me");
    dir.suasion(&["train", "--demo", "--set", "output_dir=mine"]).run().error(2, "E-OUTPUT", "not empty");
}

#[test]
fn the_demos_figures_are_those_of_eval() {
    let dir = Dir::new();
    let ran = dir.suasion(&["train", "--demo", "--json", "--quiet", "--set", "max_steps=3"]).ok();
    let json = ran.json();
    let rows = dir.suasion(&[
        "eval",
        "-M",
        "suasion-demo/run",
        "-D",
        "suasion-demo/data/test.jsonl",
        "--json",
        "--quiet",
    ]);
    let measured = rows.ok().json()["loss"].as_f64().unwrap();
    let reported = json["report"]["after"]["loss"].as_f64().unwrap();
    assert!((measured - reported).abs() < 1e-9, "{measured} {reported}");
    // The comparison's response-only arm is the same training run.
    let arm = json["comparison"]["response_only"]["evaluation"]["loss"].as_f64().unwrap();
    assert!((arm - reported).abs() < 1e-9, "{arm} {reported}");
    assert_eq!(json["verify"]["sections"]["context"]["share_after"], 0.0);
}

#[test]
fn a_dry_run_of_the_demo_trains_nothing() {
    let dir = Dir::new();
    dir.suasion(&["train", "--demo", "--dry-run"]).ok().prints("supervised: ");
    assert!(!dir.exists("suasion-demo"));
    dir.suasion(&["train", "--demo", "--resume"]).run().code(2);
    dir.suasion(&["train", "--demo", "--set", "dataset_name=mine.jsonl"]).run().error(
        2,
        "E-USAGE",
        "dataset_name",
    );
}

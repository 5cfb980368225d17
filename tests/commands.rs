//! `train`, `eval`, `generate`, `compare`, `env`, `completions`: their output and the files they write.

use crate::util::Dir;

const TRAIN: [&str; 9] = [
    "train",
    "-M",
    "model",
    "-D",
    "rows.jsonl",
    "--set",
    "init=random",
    "--set",
    "per_device_train_batch_size=2",
];

#[test]
fn a_dry_run_prints_the_plan_and_writes_nothing() {
    let dir = Dir::new().with_model().with_rows(6);
    let ran = dir.suasion(&TRAIN).set(&["max_length=40"]).arg("--dry-run").ok();
    let ran = ran.prints("parameters").prints("rows.jsonl: 6 rows: 6 kept").prints("supervised: ");
    ran.prints("planned: ").prints("9 (3.00 epochs of 3; 2 rows a step)").says("T002");
    assert!(!dir.exists("trainer_output"), "a dry run leaves nothing");
    let json = dir.suasion(&TRAIN).args(&["--dry-run", "--json", "--quiet"]).ok();
    assert!(json.stderr.is_empty(), "{}", json.stderr);
    let json = json.json();
    assert_eq!((&json["steps"], &json["rows"]["kept"]), (&9.into(), &6.into()));
    assert!(json["memory_bytes"]["total"].as_u64().unwrap() > 1000);
    assert!(json["supervised_tokens"].as_u64() < json["tokens"].as_u64());
}

#[test]
fn a_run_writes_the_files_of_the_contract() {
    let dir = Dir::new().with_model().with_rows(8);
    let ran = dir
        .suasion(&TRAIN)
        .set(&["eval_fraction=0.25", "max_steps=6", "save_steps=3", "learning_rate=1e-2", "output_dir=out"])
        .set(&["logging_steps=1"])
        .ok();
    assert!(ran.stdout.is_empty(), "progress is on stderr");
    ran.says("step 6/6").says("held-out loss: ").says("out (report.html");
    for name in [
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
        "report.html",
        "metrics.jsonl",
        "trainer_state.json",
        "suasion.yaml",
        "checkpoint-3/model.safetensors",
        "checkpoint-6",
    ] {
        assert!(dir.exists(&format!("out/{name}")), "{name}");
    }
    let metrics = dir.lines("out/metrics.jsonl");
    let steps: Vec<_> = metrics.iter().filter(|line| line.get("loss").is_some()).collect();
    assert_eq!(steps.len(), 6);
    for (index, line) in steps.iter().enumerate() {
        assert_eq!(line["step"], index + 1);
        let fields: Vec<&str> = line.as_object().unwrap().keys().map(String::as_str).collect();
        let expected = "step epoch loss learning_rate grad_norm targets tokens tokens_per_second peak_memory_bytes \
             mean_token_accuracy entropy";
        assert_eq!(fields.join(" "), expected);
        assert!(fields.iter().all(|name| line[name].is_number()), "{line}");
    }
    let evals: Vec<f64> = metrics.iter().filter_map(|line| line["eval_loss"].as_f64()).collect();
    assert!(evals.len() >= 2 && evals.last() < evals.first(), "{evals:?}");
    // The output folder is a model that can be loaded.
    let eval = dir.suasion(&["eval", "-M", "out", "-D", "rows.jsonl", "--json"]).ok().json();
    assert_eq!(eval["rows"], 8);
    dir.suasion(&["generate", "-M", "out", "--prompt", "Tea", "--max-new-tokens", "3"]).ok();
}

#[test]
fn quiet_prints_nothing_on_stderr_and_json_is_one_document() {
    let dir = Dir::new().with_model().with_rows(4);
    let ran = dir.suasion(&TRAIN).set(&["max_steps=2"]).args(&["--quiet", "--json"]).ok();
    assert!(ran.stderr.is_empty(), "{}", ran.stderr);
    let json = ran.json();
    assert_eq!((&json["step"], &json["interrupted"]), (&2.into(), &false.into()));
}

#[test]
fn quiet_keeps_findings_that_are_warnings_or_errors() {
    let dir = Dir::new().with_model().with_rows(1);
    for quiet in [true, false] {
        let flags: &[&str] = if quiet { &["-q"] } else { &[] };
        let prepared = dir.prepare("rows.jsonl", "out.jsonl").args(flags).arg("--rebuild");
        let planned = dir.train("rows.jsonl").set(&["init=random"]).args(flags).arg("--dry-run");
        for command in [prepared, planned] {
            let ran = command.args(&["--max_length", "40"]).ok();
            let lines: Vec<&str> = ran.stderr.lines().filter(|line| line.contains("T002 1 ×")).collect();
            assert_eq!(lines.len(), 1, "{}", ran.stderr);
            assert!(lines[0].trim_start().starts_with("warning: T002"), "{}", ran.stderr);
            let findings = |line: &str| line.starts_with("warning: T00");
            assert_eq!(ran.stderr.lines().all(findings), quiet, "{}", ran.stderr);
        }
    }
}

#[test]
fn plain_progress_has_no_control_characters_and_few_lines() {
    let dir = Dir::new().with_model().with_rows(4);
    let ran = dir.suasion(&TRAIN).set(&["max_steps=200"]).ok();
    assert!(!ran.stderr.contains(['\r', '\x1b']), "{:?}", ran.stderr);
    let lines = ran.stderr.lines().filter(|line| line.starts_with("step ")).count();
    assert!((10..=40).contains(&lines), "{lines}\n{}", ran.stderr);
}

#[test]
fn completion_only_loss_false_trains_all_tokens() {
    let dir = Dir::new().with_model().with_rows(4);
    let plan = |value: &str| {
        let set = format!("completion_only_loss={value}");
        dir.suasion(&TRAIN).set(&[&set]).args(&["--dry-run", "--json"]).ok().json()
    };
    let (response, all) = (plan("true"), plan("false"));
    assert_eq!((&response["objective"], &all["objective"]), (&"response_only".into(), &"all_tokens".into()));
    // Every token but each row's first, which no position predicts.
    assert_eq!(all["supervised_tokens"].as_u64().unwrap(), all["tokens"].as_u64().unwrap() - 4);
    assert!(response["supervised_tokens"].as_u64() < all["supervised_tokens"].as_u64());
}

#[test]
fn eval_prints_the_contracts_object() {
    let dir = Dir::new().with_weights();
    let json = dir.suasion(&["eval", "-M", "model", "-D", "rows.jsonl", "--json", "--quiet"]).ok().json();
    for key in ["rows", "targets", "loss", "perplexity"] {
        assert!(json[key].is_number(), "{key}");
    }
    let loss = json["loss"].as_f64().unwrap();
    assert!((json["perplexity"].as_f64().unwrap() - loss.exp()).abs() < 1e-6 * loss.exp());
    let sections = json["sections"].as_object().unwrap();
    let part = |name: &str| {
        let section = &sections[name];
        (section["targets"].as_f64().unwrap(), section["loss"].as_f64().unwrap())
    };
    // The loss is the mean over the targets: responses and stop tokens.
    let ((n, response), (m, stop)) = (part("response"), part("end_of_turn"));
    assert_eq!((n + m) as u64, json["targets"].as_u64().unwrap());
    assert!(((n * response + m * stop) / (n + m) - loss).abs() < 1e-9);
    let text = dir.suasion(&["eval", "-M", "model", "-D", "rows.jsonl"]).ok();
    text.prints("perplexity").prints("first token").prints("stop");
}

#[test]
fn generation_is_reproducible() {
    let dir = Dir::new().with_weights();
    let generate = |args: &[&str]| {
        let base =
            ["generate", "-M", "model", "--prompt", "[TASK] Reply.\n[RESPONSE]", "--max-new-tokens", "12"];
        dir.suasion(&base).args(args).ok().stdout
    };
    assert_eq!(generate(&[]), generate(&["--greedy"]));
    let sampled =
        ["--temperature", "1.5", "--top-k", "50", "--top-p", "0.99", "--min-p", "0.001", "--seed", "7"];
    assert_eq!(generate(&sampled), generate(&sampled));
    assert_ne!(generate(&sampled), generate(&["--temperature", "1.5", "--seed", "8"]));
    dir.suasion(&["generate", "-M", "model", "--prompt", "x", "--temperature", "1", "--greedy"])
        .run()
        .code(2);
    dir.suasion(&["generate", "-M", "model", "--prompt", "x", "--top-p", "2"])
        .run()
        .error(2, "E-CONFIG", "top_p");
    dir.suasion(&["generate", "-M", "model"]).run().error(2, "E-USAGE", "--prompt P or --data D");
}

#[test]
fn generation_reads_stdin_and_rows() {
    let dir = Dir::new().with_weights().with_rows(3);
    let base = ["generate", "-M", "model", "--max-new-tokens", "5", "--json", "--quiet"];
    let piped = dir.suasion(&base).args(&["--prompt", "-"]).stdin("Tea is").code(0);
    assert_eq!(piped.json()["prompt"], "Tea is");
    let rows = dir.suasion(&base).args(&["--data", "rows.jsonl", "--rows", "2"]).ok();
    let lines: Vec<serde_json::Value> =
        rows.stdout.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[1]["row"], 1);
    assert!(
        lines[1]["prompt"].as_str().unwrap().ends_with("[RESPONSE]"),
        "the prompt ends where the response starts"
    );
    assert!(lines[1]["reference"].as_str().unwrap().contains("Perhaps the ones in school."));
}

#[test]
fn compare_measures_both_objectives() {
    let dir = Dir::new().with_model().with_rows(12);
    let compare =
        ["compare", "-M", "model", "-D", "rows.jsonl", "--set", "init=random", "--set", "max_steps=4"];
    let json = dir.suasion(&compare).args(&["--json", "--quiet"]).ok().json();
    assert_eq!(json["steps"], 4);
    assert!(
        json["response_only"]["targets_trained"].as_u64() < json["all_tokens"]["targets_trained"].as_u64()
    );
    assert_eq!(json["held_out_rows"], 1);
    let ran = dir.suasion(&compare).ok();
    ran.prints("held-out loss: response").prints("all tokens");
    assert!(!dir.exists("trainer_output"), "a comparison leaves no model behind");
    // The first result is kept, and the second is written beside it.
    for name in ["comparison.json", "comparison-2.json"] {
        let kept = dir.json(name);
        assert_eq!((&kept["steps"], &kept["verdict"][0]), (&json["steps"], &json["verdict"][0]));
    }
    dir.suasion(&compare).args(&["-o", "none/c.json"]).run().error(2, "E-USAGE", "there is no folder none");
    dir.suasion(&compare).set(&["completion_only_loss=false"]).run().error(
        2,
        "E-CONFIG",
        "completion_only_loss",
    );
}

#[test]
fn env_and_completions() {
    let dir = Dir::new();
    let json = dir.suasion(&["env", "--json"]).env("HF_HOME", "hf").ok().json();
    assert!(json["cores"].as_u64().unwrap() >= 1);
    assert_eq!(json["hub_cache"], "hf/hub");
    dir.suasion(&["env"]).ok().prints("cores").prints("memory");
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        dir.suasion(&["completions", shell]).ok().prints("suasion");
    }
}

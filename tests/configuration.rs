//! CONFIG, `--set` and flags: precedence, refusals, printed and saved configurations.

use crate::util::Dir;

#[test]
fn flags_override_assignments_which_override_the_file() {
    let dir = Dir::new();
    dir.write("run.yaml", "model_name_or_path: from-file\nseed: 1\nlearning_rate: 1e-3\n");
    let ran = dir
        .suasion(&["check", "run.yaml", "--json", "-M", "from-flag"])
        .set(&["model_name_or_path=from-set", "seed=2"])
        .env("HF_HUB_OFFLINE", "1")
        .run()
        .code(1);
    let json = ran.json();
    assert_eq!(json["config"]["model_name_or_path"], "from-flag");
    assert_eq!(json["config"]["seed"], 2);
    assert_eq!(json["config"]["learning_rate"], 1e-3);
    assert_eq!(json["set_by"]["learning_rate"], "run.yaml:3");
    assert_eq!(json["set_by"]["model_name_or_path"], "--model");
    assert!(json["problems"][0].as_str().unwrap().contains("from-flag"));
}

#[test]
fn check_prints_every_key_and_reads_it_back() {
    let dir = Dir::new();
    let first = dir.suasion(&["check", "--set", "max_length=None", "--set", "stop_tokens=<|im_end|>"]).ok();
    assert!(first.stdout.lines().count() > 40);
    dir.write("all.yaml", &first.stdout);
    let second = dir.suasion(&["check", "all.yaml", "--json"]).ok().json();
    assert_eq!(second["config"]["max_length"], serde_json::Value::Null);
    assert_eq!(second["config"]["stop_tokens"][0], "<|im_end|>");
}

#[test]
fn toml_is_read_like_yaml() {
    let dir = Dir::new();
    dir.write("run.toml", "seed = 3\n[section_markers]\nTASK = \"[ASK]\"\n");
    let json = dir.suasion(&["check", "run.toml", "--json"]).ok().json();
    assert_eq!(json["config"]["seed"], 3);
    assert_eq!(json["config"]["section_markers"]["TASK"], "[ASK]");
    assert_eq!(json["config"]["section_markers"]["SYSTEM"], "[SYSTEM]");
}

#[test]
fn unsupported_keys_of_trl_are_refused_by_name() {
    let dir = Dir::new();
    for (assignment, name) in [
        ("bnb_4bit_quant_type=fp4", "bnb_4bit_quant_type"),
        ("bf16=true", "bf16"),
        ("loss_type=dft", "loss_type"),
        ("deepspeed=ds.json", "deepspeed"),
    ] {
        dir.suasion(&["check", "--set", assignment]).run().error(
            2,
            "E-CONFIG",
            &format!("{name} is not supported"),
        );
    }
    for assignment in ["packing=false", "report_to=none", "bf16=false", "optim=adamw_torch", "supervise=all"]
    {
        let ran = dir.suasion(&["check", "--set", assignment]).ok();
        assert!(!ran.stderr.contains("note:"), "{}", ran.stderr);
    }
    dir.suasion(&["check", "--set", "report_to=[wandb, mlflow]"])
        .ok()
        .says("report_to: wandb is not contacted")
        .says("report_to: mlflow is not contacted");
    dir.suasion(&["check", "--set", "dataset_num_proc=4"]).ok().says("dataset_num_proc changes nothing here");
}

#[test]
fn choices_and_bounds_are_listed() {
    let dir = Dir::new();
    dir.suasion(&["check", "--set", "lr_scheduler_type=eager"]).run().error(
        2,
        "E-CONFIG",
        "expected one of: linear, cosine, constant, constant_with_warmup, cosine_with_restarts",
    );
    dir.suasion(&["check", "--set", "eval_fraction=1"]).run().error(2, "E-CONFIG", "at least 0 and below 1");
    dir.suasion(&["check", "--set", "eval_strategy=best"]).run().error(2, "E-CONFIG", "eval_strategy");
    dir.suasion(&["check", "--set", "seed"]).run().error(2, "E-USAGE", "expected key=value");
}

#[test]
fn usage_errors_have_the_contracts_form() {
    let dir = Dir::new();
    dir.suasion(&["train", "--no-such-flag"]).run().error(2, "E-USAGE", "--no-such-flag");
    dir.suasion(&["verify", "--learning_rate", "1", "-D", "x"]).run().error(
        2,
        "E-USAGE",
        "does not use learning_rate",
    );
    dir.suasion(&["diagnose"]).run().error(2, "E-USAGE", "diagnose");
    dir.suasion(&["train"]).run().error(2, "E-USAGE", "no model is named");
    dir.suasion(&["verify"]).run().error(2, "E-USAGE", "no rows are named");
    dir.suasion(&["verify", "rows.jsonl"]).run().error(2, "E-USAGE", "rows are given with --data");
    dir.suasion(&["generate", "-M", "m", "--prompt", "a", "--data", "b"]).run().error(
        2,
        "E-USAGE",
        "cannot be used",
    );
    dir.suasion(&["--help"]).ok().prints("train").prints("verify");
    dir.suasion(&["--version"]).ok().prints("suasion ");
}

#[test]
fn a_missing_model_is_an_error_that_names_the_places_searched() {
    let dir = Dir::new().with_rows(1);
    let train =
        |model: &str| dir.suasion(&["train", "-D", "rows.jsonl", "-M", model]).env("HF_HUB_OFFLINE", "1");
    train("./nowhere").run().error(3, "E-MODEL", "./nowhere: no such folder");
    train("rows.jsonl").run().error(3, "E-MODEL", "is a file");
    train("some/model").env("HF_HUB_CACHE", "cache").run().error(3, "E-MODEL", "cache/models--some--model");
    train("some/model").env("HF_HOME", "home").run().error(3, "E-MODEL", "home/hub/models--some--model");
}

#[test]
fn a_hub_id_is_found_in_the_local_cache() {
    let dir = Dir::new().with_model().with_rows(2);
    std::fs::create_dir_all(dir.path("cache/models--some--model/snapshots")).unwrap();
    dir.write("cache/models--some--model/refs/main", "abc123");
    std::fs::rename(dir.path("model"), dir.path("cache/models--some--model/snapshots/abc123")).unwrap();
    dir.suasion(&["prepare", "-M", "some/model", "-D", "rows.jsonl", "-o", "out.jsonl"])
        .env("HF_HUB_CACHE", "cache")
        .ok();
    assert_eq!(dir.lines("out.jsonl").len(), 2);
}

#[test]
fn the_resolved_configuration_is_saved_and_runs_again() {
    let dir = Dir::new().with_model().with_rows(3);
    dir.train("rows.jsonl")
        .set(&["init=random", "max_steps=2", "learning_rate=1e-3", "output_dir=one"])
        .ok()
        .says("learning_rate=0.001");
    dir.suasion(&["train", "one/suasion.yaml", "--set", "output_dir=two"]).ok();
    assert_eq!(dir.read("one/model.safetensors"), dir.read("two/model.safetensors"));
}

#[test]
fn splits_of_a_folder() {
    let dir = Dir::new().with_model().with_rows(6);
    dir.write("data/train.jsonl", dir.read("rows.jsonl"));
    dir.write("data/valid.jsonl", crate::util::row(9) + "\n");
    let ran = dir.train("data").set(&["init=random"]).arg("--dry-run").ok();
    ran.prints("data/train.jsonl: 6 rows").prints("data/valid.jsonl: 1 row:");
    dir.train("data").arg("--dry-run").set(&["init=random", "dataset_test_split=test"]).run().error(
        3,
        "E-SOURCE",
        "no test.jsonl",
    );
    dir.train("rows.jsonl")
        .arg("--dry-run")
        .set(&["init=random", "eval_fraction=0.34"])
        .ok()
        .prints("2 rows held out of the training rows, 4 left");
}

#[test]
fn a_tilde_is_the_home_folder_in_files_assignments_and_flags() {
    // HOME of the tests' commands is the test's folder.
    let dir = Dir::new().with_model().with_rows(3);
    dir.write("home/rows.jsonl", dir.read("rows.jsonl"));
    std::fs::rename(dir.path("model"), dir.path("home/model")).unwrap();
    dir.write(
        "home/run.yaml",
        "model_name_or_path: ~/home/model\ndataset_name: [~/home/rows.jsonl]\noutput_dir: ~/home/out\n\
         init: random\nmax_steps: 1\n",
    );
    dir.suasion(&["train", "~/home/run.yaml", "-q"]).ok();
    assert!(dir.exists("home/out/model.safetensors"));
    dir.suasion(&["train", "--resume=~/home/none"]).run().error(2, "E-USAGE", "/home/none: no such folder");
    dir.suasion(&["train", "home/run.yaml", "--set", "output_dir=~/home/set", "-q"]).ok();
    assert!(dir.exists("home/set/model.safetensors"));
    dir.suasion(&["prepare", "--model=~/home/model", "--data=~/home/*.jsonl", "-o", "~/home/two.jsonl"]).ok();
    assert_eq!(dir.lines("home/two.jsonl").len(), 3);
    dir.suasion(&["verify", "-M", "~/home/model", "-D", "~/home/rows.jsonl", "--html=~/home/page.html"]).ok();
    assert!(dir.exists("home/page.html"));
    assert!(!dir.exists("~"));
}

#[test]
fn every_key_is_a_flag_of_the_commands_that_use_it() {
    let dir = Dir::new().with_model().with_rows(3);
    dir.write("run.yaml", "learning_rate: 1e-3\nseed: 1\npacking: false\n");
    let args =
        ["check", "run.yaml", "--learning_rate", "1e-4", "--max-length=64", "--packing", "--max_steps", "-1"];
    let json = dir
        .suasion(&args)
        .args(&[
            "--loss_weights.system",
            "0.1",
            "--section-markers.TASK=[ASK]",
            "--template_kwargs.a=x",
            "--json",
        ])
        .set(&["learning_rate=5", "seed=2"])
        .ok()
        .json();
    let config = &json["config"];
    assert_eq!((&config["learning_rate"], &config["seed"]), (&1e-4.into(), &2.into()));
    assert_eq!((&config["max_length"], &config["packing"]), (&64.into(), &true.into()));
    assert_eq!((&config["max_steps"], &config["loss_weights"]["system"]), (&(-1).into(), &0.1.into()));
    assert_eq!(config["section_markers"]["TASK"], "[ASK]");
    assert_eq!(config["section_markers"]["SYSTEM"], "[SYSTEM]");
    assert_eq!(config["template_kwargs"]["a"], "x");
    assert_eq!(json["set_by"]["learning_rate"], "--learning_rate 1e-4");

    dir.train("rows.jsonl").args(&["--init", "random", "--max_steps", "1", "-o", "out", "-q"]).ok();
    assert!(dir.exists("out/model.safetensors"));
    dir.prepare("rows.jsonl", "short.jsonl").args(&["--truncation-mode", "drop", "--max_length", "4"]).ok();
    assert_eq!(dir.lines("short.jsonl").len(), 0);
    dir.suasion(&["check", "--learning_rate", "fast"]).run().error(
        2,
        "E-CONFIG",
        "--learning_rate fast: learning_rate: expected a number, at least 0; found \"fast\"",
    );
    // Flags that are not keys give the same error as in a file.
    dir.suasion(&["train", "--lr", "1e-4"]).run().error(2, "E-CONFIG", "lr is learning_rate here");
    dir.suasion(&["train", "--micro-batch-size=4"]).run().error(
        2,
        "E-CONFIG",
        "axolotl's micro_batch_size is",
    );
    dir.suasion(&["check", "--bf16", "--report_to", "none"]).run().error(
        2,
        "E-CONFIG",
        "bf16 is not supported",
    );
    dir.suasion(&["check", "--report_to", "none", "--optim=adamw_torch"]).ok();
    dir.suasion(&["train", "--learning_rat", "1"]).run().error(2, "E-USAGE", "--learning_rate");
    dir.suasion(&["train", "--help"]).ok().prints("--learning_rate <VALUE>").prints("-o, --output_dir");
}

#[test]
fn check_reports_every_error_at_once() {
    let dir = Dir::new();
    dir.write(
        "run.yaml",
        "lr: 1e-4\nseed: -1\nbf16: true\nlogging_first_step: true\ndataset_name: none.jsonl\n",
    );
    let ran = dir.suasion(&["check", "run.yaml", "--set", "eval_strategy=best"]).run().code(2);
    let ran = ran.says("run.yaml:1: lr is").says("run.yaml:2: seed: expected").says("run.yaml:3: bf16");
    let ran = ran.says("eval_strategy: ").says("none.jsonl");
    assert_eq!(ran.stderr.matches("error[E-CONFIG]: ").count(), 4, "{}", ran.stderr);
    assert!(ran.stdout.is_empty());
    let json = dir.suasion(&["check", "run.yaml", "--json"]).run().code(2).json();
    assert_eq!(json["errors"].as_array().unwrap().len(), 3);
}

#[test]
fn keys_are_explained() {
    let dir = Dir::new();
    dir.suasion(&["check", "--explain", "learning_rate"])
        .ok()
        .prints("values    a number, at least 0\n")
        .prints("default   2e-5\n")
        .prints("example   learning_rate: 1e-4\n");
    dir.suasion(&["check", "--explain", "cutoff_len"]).ok().prints("is max_length here").prints("at least 2");
    dir.suasion(&["check", "--explain", "bf16"]).ok().prints("matmul_precision");
    dir.suasion(&["check", "--explain", "max_lenght"]).run().error(2, "E-USAGE", "is not a key");
    let all = dir.suasion(&["check", "--explain", "--json"]).ok().json();
    let checked = dir.suasion(&["check", "--json"]).ok().json();
    assert_eq!(all.as_array().unwrap().len(), checked["config"].as_object().unwrap().len());
    let schema = dir.suasion(&["check", "--schema"]).ok().json();
    assert_eq!(schema["properties"]["learning_rate"]["minimum"], 0.0);
}

#[test]
fn docs_configuration_md_is_what_the_table_of_keys_says() {
    let page = Dir::new().suasion(&["check", "--explain", "--markdown"]).ok().stdout;
    let written = std::fs::read_to_string(crate::util::root().join("docs/configuration.md")).unwrap();
    assert!(page == written, "run: suasion check --explain --markdown > docs/configuration.md");
}

#[test]
fn help_has_examples_and_lists_global_flags_last() {
    let dir = Dir::new();
    for command in ["train", "prepare", "verify", "eval", "compare", "generate", "check"] {
        for help in ["-h", "--help"] {
            let text = dir.suasion(&[command, help]).ok().stdout;
            let at =
                |part: &str| text.find(part).unwrap_or_else(|| panic!("{command} {help}: {part}\n{text}"));
            assert!(at("\nOptions:") < at("\nGlobal options:") && at("--set") < at("\nGlobal options:"));
            assert!(at("--quiet") > at("\nGlobal options:") && at("\nExamples:\n  suasion") > at("--quiet"));
        }
    }
}

#[test]
fn more_threads_than_cores_are_capped_with_a_note() {
    let dir = Dir::new();
    dir.suasion(&["check", "--threads", "1000000"]).ok().says("note: --threads=1000000: this machine has");
    dir.suasion(&["check"])
        .env("RAYON_NUM_THREADS", "1000000")
        .ok()
        .says("note: RAYON_NUM_THREADS=1000000: ");
    dir.suasion(&["check"])
        .env("RAYON_NUM_THREADS", "many")
        .ok()
        .says("warning: RAYON_NUM_THREADS=many is not");
    assert!(!dir.suasion(&["check", "--threads=1"]).ok().stderr.contains("note:"));
    dir.suasion(&["check", "--threads=0"]).run().error(2, "E-USAGE", "--threads");
}

//! Runs: what stops them, where they write and read, and how they are resumed.

use crate::util::{Dir, row};
use serde_json::json;
use std::time::{Duration, Instant};

const QUICK: [&str; 3] = ["init=random", "max_steps=2", "output_dir=out"];

fn names(dir: &Dir, folder: &str) -> Vec<String> {
    let entries = std::fs::read_dir(dir.path(folder)).unwrap();
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// `cut.jsonl`: tokenised rows whose answers end without a stop token.
fn without_stop() -> Dir {
    let dir = Dir::new().with_model().with_rows(4);
    let line = json!({"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}).to_string() + "\n";
    dir.write("cut.jsonl", line.repeat(3));
    dir
}

#[test]
fn what_verify_calls_an_error_stops_training() {
    let dir = without_stop();
    dir.verify("cut.jsonl").run().code(1).prints("M002");
    for flags in [vec![], vec!["--quiet"], vec!["--dry-run"], vec!["--quiet", "--dry-run"]] {
        dir.train("cut.jsonl")
            .set(&QUICK)
            .args(&flags)
            .run()
            .error(1, "E-FINDINGS", "M002 3 × a response without a supervised stop token")
            .says("allow_findings=M002");
    }
    assert!(!dir.exists("out"));
    // Held-out rows are checked too.
    dir.train("rows.jsonl").set(&QUICK).set(&["eval_dataset_name=cut.jsonl"]).run().error(
        1,
        "E-FINDINGS",
        "cut.jsonl: rows with errors: M002",
    );
    // Allowing another code does not allow this one.
    dir.train("cut.jsonl").set(&QUICK).set(&["allow_findings=M001"]).run().code(1);
    dir.train("cut.jsonl").set(&QUICK).set(&["allow_findings=M02"]).run().error(
        2,
        "E-CONFIG",
        "allow_findings",
    );
    // Allowed by its code it is trained on, but still reported, even with --quiet.
    let ran = dir.train("cut.jsonl").set(&QUICK).set(&["allow_findings=[M002]"]).arg("--quiet").ok();
    assert!(ran.stderr.contains("M002"), "{}", ran.stderr);
    assert!(dir.text("out/README.md").contains("M002"));
}

#[test]
fn errors_that_refuse_a_row_can_be_allowed() {
    let dir = Dir::new().with_model();
    // All tokens are supervised (M008).
    dir.write("all.jsonl", json!({"input_ids": [5, 6, 0], "labels": [5, 6, 0]}).to_string());
    dir.train("all.jsonl").set(&QUICK).run().code(3).says("M008");
    dir.train("all.jsonl").set(&QUICK).set(&["allow_findings=[M008, M004]"]).ok().says("M008");
}

#[test]
fn a_dry_run_writes_nothing_and_prints_its_plan() {
    let dir = Dir::new().with_model().with_rows(6);
    for flags in [vec![], vec!["--quiet"]] {
        let ran = dir.train("rows.jsonl").set(&QUICK).args(&flags).arg("--dry-run").ok();
        for name in ["model ", "data ", "steps ", "memory ", "output ", "disk ", "time "] {
            assert!(ran.stdout.lines().any(|line| line.starts_with(name)), "{name}: {}", ran.stdout);
        }
    }
    let plan = dir.train("rows.jsonl").set(&QUICK).args(&["--dry-run", "--json"]).ok().json();
    // Weights and two moments in f32, and a final model in the configuration's type.
    let parameters = plan["parameters"].as_u64().unwrap();
    assert_eq!(plan["disk_bytes"]["checkpoint"], 12 * parameters);
    assert!(plan["seconds"].as_f64().unwrap() > 0.0);
    assert_eq!(names(&dir, "."), ["model", "rows.jsonl"]);
    // An output path that cannot be written to is detected.
    dir.train("rows.jsonl").set(&["init=random", "output_dir=rows.jsonl/out"]).arg("--dry-run").run().error(
        3,
        "E-IO",
        "rows.jsonl/out",
    );
}

#[test]
fn a_run_is_continued_where_it_is_named() {
    let dir = Dir::new().with_weights().with_rows(6);
    let train = || dir.train("rows.jsonl").set(&["max_steps=4", "save_steps=2"]).arg("--quiet");
    train().set(&["output_dir=run"]).ok();
    let whole = dir.read("run/model.safetensors");
    let cut = |run: &str| {
        std::fs::remove_dir_all(dir.path(run).join("checkpoint-4")).unwrap();
        std::fs::remove_file(dir.path(run).join("model.safetensors")).unwrap();
    };
    // Moved, started from another folder, and with the base model deleted.
    cut("run");
    std::fs::rename(dir.path("run"), dir.path("moved")).unwrap();
    std::fs::create_dir(dir.path("elsewhere")).unwrap();
    std::fs::rename(dir.path("model"), dir.path("gone")).unwrap();
    dir.sh("cd elsewhere && \"$SUASION\" train --resume ../moved -q").ok();
    assert!(dir.read("moved/model.safetensors") == whole);
    assert!(!dir.exists("run") && !dir.exists("elsewhere/run"));
    // A copy does not affect the original.
    dir.sh("cp -r moved copy && echo mine > moved/checkpoint-4/note").ok();
    cut("copy");
    dir.suasion(&["train", "--resume", "copy", "-q"]).ok();
    assert!(dir.read("copy/model.safetensors") == whole && dir.exists("moved/checkpoint-4/note"));
    // The same holds for its saved configuration.
    cut("copy");
    dir.suasion(&["train", "--resume", "copy/suasion.yaml", "-q"]).ok();
    assert!(dir.read("copy/model.safetensors") == whole && dir.exists("moved/checkpoint-4/note"));
}

#[test]
fn a_run_is_extended() {
    let dir = Dir::new().with_model().with_rows(6);
    let settings = ["init=random", "num_train_epochs=2", "per_device_train_batch_size=3", "output_dir=out"];
    dir.train("rows.jsonl").set(&settings).ok();
    let more = ["train", "--resume", "out", "--set", "num_train_epochs=4"];
    dir.suasion(&more).run().error(2, "E-RESUME", "total steps: was 4, is 8").says("--extend");
    dir.suasion(&more).arg("--extend").ok().says("not an exact continuation: total steps: was 4, is 8");
    assert_eq!(dir.json("out/trainer_state.json")["global_step"], 8);
    // Other data is refused, too.
    let rows: String = (0..9).map(|i| row(i) + "\n").collect();
    dir.write("rows.jsonl", rows);
    dir.suasion(&["train", "--resume", "out", "--extend", "--set", "num_train_epochs=5"])
        .ok()
        .says("the data's fingerprint")
        .says("the number of training rows: was 6, is 9");
    // 4 epochs of 2 steps, and one of 3.
    assert_eq!(dir.json("out/trainer_state.json")["global_step"], 11);
    dir.suasion(&["train", "--extend"]).run().error(2, "E-USAGE", "--resume");
}

#[test]
#[cfg(unix)]
fn one_process_at_a_time_writes_to_a_folder() {
    let dir = Dir::new().with_weights().with_rows(6);
    let settings = ["max_steps=100000", "save_strategy=no", "output_dir=out"];
    let mut child = dir.train("rows.jsonl").set(&settings).arg("--quiet").spawn();
    let started = Instant::now();
    while !dir.exists("out/metrics.jsonl") {
        assert!(child.try_wait().unwrap().is_none() && started.elapsed() < Duration::from_secs(120));
        std::thread::sleep(Duration::from_millis(5));
    }
    let holder = format!("in use by process {}", child.id());
    dir.suasion(&["train", "--resume", "out"]).run().error(3, "E-LOCKED", &holder);
    let overwrite = ["overwrite_output_dir=true", "output_dir=out", "max_steps=1"];
    dir.train("rows.jsonl").set(&overwrite).run().error(3, "E-LOCKED", &holder);
    child.kill().unwrap();
    child.wait().unwrap();
    // The lock was released with the process. The run had no checkpoint yet, so a resume starts again.
    dir.train("rows.jsonl").set(&["output_dir=out", "max_steps=1"]).run().error(2, "E-OUTPUT", "--resume");
    dir.suasion(&["train", "--resume", "out", "--set", "max_steps=2"]).ok().says("it starts again");
    assert!(dir.exists("out/model.safetensors") && !names(&dir, "out").iter().any(|n| n.starts_with('.')));
}

#[test]
fn what_a_run_reads_is_not_replaced() {
    let dir = Dir::new().with_weights().with_rows(6);
    let over = ["overwrite_output_dir=true", "max_steps=2", "save_steps=1"];
    dir.train("rows.jsonl").set(&["output_dir=model"]).set(&over).run().error(2, "E-OUTPUT", "model");
    dir.train("rows.jsonl").set(&["output_dir=out"]).set(&over).ok();
    let before = dir.read("out/checkpoint-1/model.safetensors");
    let from = ["train", "-M", "out/checkpoint-1", "-D", "rows.jsonl", "--set", "output_dir=out"];
    dir.suasion(&from).set(&over).run().error(2, "E-OUTPUT", "the run reads it");
    assert!(dir.read("out/checkpoint-1/model.safetensors") == before);
    // Pages and prepared data must not replace their sources either.
    let rows = dir.read("rows.jsonl");
    for target in ["rows.jsonl", "./rows.jsonl", "model/config.json"] {
        dir.verify("rows.jsonl").args(&["--html", target]).run().error(2, "E-USAGE", "replace what is read");
    }
    assert_eq!(dir.read("rows.jsonl"), rows);
    // A page beside the model's files is replaced by the next page.
    for _ in 0..2 {
        dir.verify("rows.jsonl").args(&["--html", "model/page.html"]).ok();
    }
}

#[test]
fn the_model_stops_where_it_learned_to() {
    let dir = Dir::new().with_model();
    dir.write("model/generation_config.json", r#"{"eos_token_id": 0, "top_p": 0.9}"#);
    dir.write("rows.jsonl", json!({"input_ids": [5, 6, 7, 9], "labels": [-100, -100, 7, 9]}).to_string());
    let tokenizer: serde_json::Value = dir.json("model/tokenizer.json");
    let vocab = tokenizer["model"]["vocab"].as_object().unwrap();
    let token = vocab.iter().find(|(_, id)| **id == 9).unwrap().0;
    dir.train("rows.jsonl").set(&QUICK).set(&[&format!("stop_tokens={}", json!([token]))]).ok();
    let generation = dir.json("out/generation_config.json");
    assert_eq!((&generation["eos_token_id"], &generation["top_p"]), (&json!([0, 9]), &json!(0.9)));
    let stops = dir.json("out/config.json")["eos_token_id"].clone();
    assert!(stops.as_array().is_some_and(|stops| stops.contains(&json!(9))), "{stops}");
}

#[test]
fn a_model_card_is_for_others() {
    let dir = Dir::new().with_weights().with_rows(6);
    let (model, rows, out) = (dir.path("model"), dir.path("rows.jsonl"), dir.path("out"));
    let path = |path: &std::path::Path| path.to_str().unwrap().to_string();
    dir.suasion(&["train", "-M", &path(&model), "-D", &path(&rows)])
        .set(&["max_steps=1", &format!("output_dir={}", path(&out)), "eval_fraction=0.3"])
        .ok();
    let card = dir.text("out/README.md");
    assert!(!card.contains(model.parent().unwrap().to_str().unwrap()), "{card}");
    let front = card.split("---\n").nth(1).unwrap();
    for line in ["library_name: transformers", "base_model: model", "datasets:\n- rows.jsonl"] {
        assert!(front.contains(line), "{front}");
    }
    assert!(
        card.contains("AutoModelForCausalLM.from_pretrained") && card.contains("suasion generate --model")
    );
}

#[test]
fn a_run_that_ends_with_a_high_loss_says_so() {
    let dir = Dir::new().with_weights().with_rows(6);
    let wild = [
        "max_steps=12",
        "learning_rate=3",
        "lr_scheduler_type=constant",
        "output_dir=out",
        "eval_fraction=0.2",
    ];
    let ran = dir.train("rows.jsonl").set(&wild).ok().says("the run has diverged");
    assert!(!ran.stderr.lines().any(|line| line.contains("00000000000000")), "{}", ran.stderr);
    for name in ["README.md", "report.html"] {
        assert!(dir.text(&format!("out/{name}")).to_lowercase().contains("the run has diverged"), "{name}");
    }
    // A run with more steps is stopped.
    let more = ["max_steps=400", "output_dir=more"];
    dir.train("rows.jsonl").set(&wild).set(&more).run().error(3, "E-DIVERGED", "for 20 steps in a row");
    assert!(!dir.exists("more/model.safetensors") && dir.exists("more/report.html"));
}

#[test]
#[cfg(unix)]
fn limits_of_the_system_are_errors() {
    let dir = Dir::new().with_weights().with_rows(6);
    let train = "\"$SUASION\" train -q -M model -D rows.jsonl --set max_steps=1 --set output_dir=out";
    let ran = dir.sh(&format!("ulimit -f 16; {train}")).run().error(3, "E-IO", "out/checkpoint-1");
    assert!(!ran.stderr.contains(".suasion-tmp"), "{}", ran.stderr);
    // Devices and pipes are neither rows nor model files; a pipe that is already open may contain rows.
    dir.verify("/dev/zero").run().error(3, "E-SOURCE", "is a device");
    dir.sh("mkfifo pipe.jsonl").ok();
    dir.verify("pipe.jsonl").run().error(3, "E-SOURCE", "is a named pipe");
    dir.sh("cat rows.jsonl | \"$SUASION\" verify -q -M model -D /dev/stdin").ok().prints("6: 6 kept");
    dir.sh("cp rows.jsonl rows && \"$SUASION\" verify -q -M model -D rows").ok().prints("6: 6 kept");
    dir.sh("mkdir odd && cp model/* odd && rm odd/tokenizer.json && mkfifo odd/tokenizer.json").ok();
    dir.sh("\"$SUASION\" verify -q -M odd -D rows.jsonl").run().error(3, "E-MODEL", "odd/tokenizer.json");
}

/// Whichever allocation is refused, of a tokenizer, a model or a line of text: the error ends with help.
#[test]
#[cfg(target_os = "linux")]
fn memory_refused_is_an_error_with_help() {
    let dir = Dir::new().with_weights().with_rows(200);
    let mut refused = 0;
    for limit in (50_000..150_000).step_by(10_000) {
        let train = "\"$SUASION\" train -q -M model -D rows.jsonl --threads 2 --set max_steps=1";
        let ran = dir.sh(&format!("ulimit -v {limit}; {train} --set output_dir=out{limit}")).run();
        if ran.code != Some(0) {
            let lines: Vec<&str> = ran.stderr.lines().collect();
            assert_eq!(ran.code, Some(3), "{limit}: {}", ran.stderr);
            assert!(
                lines.iter().any(|line| line.starts_with("error[E-MEMORY]: ")),
                "{limit}: {}",
                ran.stderr
            );
            assert!(lines.iter().any(|line| line.starts_with("help: ")), "{limit}: {}", ran.stderr);
            refused += 1;
        }
    }
    assert!(refused > 0, "no limit is low enough");
}

#[test]
fn a_prepared_folder_is_checked_file_by_file() {
    let dir = Dir::new().with_model().with_rows(6);
    dir.prepare("rows.jsonl", "set").ok();
    dir.prepare("rows.jsonl", "set").ok().says("up to date");
    for name in ["state.json", "dataset_info.json"] {
        let whole = dir.read(&format!("set/{name}"));
        dir.write(&format!("set/{name}"), "{}");
        dir.prepare("rows.jsonl", "set").ok().says(&format!("{name} is not as it was written"));
        assert!(dir.read(&format!("set/{name}")) == whole);
    }
    // Names are those on disk.
    dir.prepare("rows.jsonl", "x.jsonl")
        .args(&["--max-shard-size", "1GB"])
        .ok()
        .prints("wrote x-00000-of-00001.jsonl, ");
    dir.prepare("rows.jsonl", "x.jsonl.gz")
        .ok()
        .prints("x.jsonl.gz.findings.jsonl and x.jsonl.gz.manifest.json");
    dir.prepare("rows.jsonl", "nowhere/x").run().error(3, "E-IO", "nowhere/x: ");
}

//! A resumed run ends with the same bytes as an uninterrupted one.

use crate::util::Dir;
use std::time::{Duration, Instant};

const SETTINGS: [&str; 7] = [
    "init=random",
    "logging_steps=1",
    "per_device_train_batch_size=3",
    "learning_rate=1e-2",
    "lr_scheduler_type=cosine",
    "warmup_steps=2",
    "eval_fraction=0.2",
];

/// Metrics without values that depend on the clock and the machine.
fn metrics(dir: &Dir, run: &str) -> Vec<serde_json::Value> {
    let mut lines = dir.lines(&format!("{run}/metrics.jsonl"));
    for line in &mut lines {
        let line = line.as_object_mut().unwrap();
        line.remove("tokens_per_second");
        line.remove("peak_memory_bytes");
    }
    lines
}

#[test]
fn resumed_equals_uninterrupted() {
    let dir = Dir::new().with_model().with_rows(10);
    // 8 rows, 3 per step: the checkpoint is in the middle of the second epoch.
    let settings = ["max_steps=8", "save_steps=4", "output_dir=whole"];
    dir.train("rows.jsonl").set(&SETTINGS).set(&settings).ok();
    // As if the second run had been killed after its first checkpoint: everything newer is deleted.
    dir.train("rows.jsonl").set(&SETTINGS).set(&settings).set(&["output_dir=killed"]).ok();
    std::fs::remove_dir_all(dir.path("killed/checkpoint-8")).unwrap();
    for name in ["model.safetensors", "trainer_state.json", "report.html", "README.md"] {
        std::fs::remove_file(dir.path("killed").join(name)).unwrap();
    }
    dir.train("rows.jsonl")
        .set(&SETTINGS)
        .set(&settings)
        .set(&["output_dir=killed"])
        .arg("--resume")
        .ok()
        .says("step 4 of 8 is done");
    assert_eq!(dir.read("whole/model.safetensors"), dir.read("killed/model.safetensors"));
    assert_eq!(metrics(&dir, "whole"), metrics(&dir, "killed"));
    for name in ["model.safetensors", "optimizer.safetensors"] {
        let name = format!("checkpoint-8/{name}");
        assert_eq!(dir.read(&format!("whole/{name}")), dir.read(&format!("killed/{name}")), "{name}");
    }
}

#[test]
fn the_saved_configuration_is_enough_to_resume() {
    let dir = Dir::new().with_model().with_rows(10);
    dir.train("rows.jsonl").set(&SETTINGS).set(&["max_steps=6", "save_steps=3", "output_dir=out"]).ok();
    let whole = dir.read("out/model.safetensors");
    std::fs::remove_dir_all(dir.path("out/checkpoint-6")).unwrap();
    std::fs::remove_file(dir.path("out/model.safetensors")).unwrap();
    for resume in ["out", "out/checkpoint-3"] {
        dir.suasion(&["train", "--resume", resume]).ok().says("step 3 of 6 is done");
        assert_eq!(dir.read("out/model.safetensors"), whole, "{resume}");
        std::fs::remove_dir_all(dir.path("out/checkpoint-6")).unwrap();
    }
    // `--resume` takes an optional folder; a configuration file after it is still the CONFIG.
    dir.suasion(&["train", "--resume", "out/suasion.yaml"]).ok().says("step 3 of 6 is done");
    assert_eq!(dir.read("out/model.safetensors"), whole);
}

#[test]
fn another_objective_is_refused() {
    let dir = Dir::new().with_model().with_rows(6);
    dir.train("rows.jsonl").set(&SETTINGS).set(&["max_steps=4", "save_steps=2", "output_dir=out"]).ok();
    dir.suasion(&["train", "--resume", "out", "--set", "completion_only_loss=false"]).run().error(
        2,
        "E-RESUME",
        "trained on responses only",
    );
    dir.suasion(&["train", "--resume", "out", "--set", "learning_rate=1"]).run().error(
        2,
        "E-RESUME",
        "learning_rate",
    );
    // The other way round, the error advises retraining from the base model.
    dir.train("rows.jsonl")
        .set(&SETTINGS)
        .set(&["max_steps=4", "save_steps=2", "output_dir=all", "completion_only_loss=false"])
        .ok();
    dir.suasion(&["train", "--resume", "all", "--set", "completion_only_loss=true"])
        .run()
        .error(2, "E-RESUME", "all tokens")
        .says("retrain from the base model");
}

#[test]
fn nothing_to_resume() {
    let dir = Dir::new().with_model().with_rows(4);
    dir.train("rows.jsonl").set(&SETTINGS).arg("--resume").run().error(2, "E-CHECKPOINT", "no checkpoint");
    dir.suasion(&["train", "--resume", "nowhere"]).run().error(2, "E-USAGE", "nowhere: no such folder");
}

#[test]
#[cfg(unix)]
fn ctrl_c_leaves_a_checkpoint_that_resumes_to_the_same_bytes() {
    let dir = Dir::new().with_model().with_rows(10);
    let steps = ["max_steps=1200", "save_strategy=no"];
    dir.train("rows.jsonl").set(&SETTINGS).set(&steps).set(&["output_dir=whole"]).arg("--quiet").ok();

    let mut child =
        dir.train("rows.jsonl").set(&SETTINGS).set(&steps).set(&["output_dir=out"]).arg("--quiet").spawn();
    let started = Instant::now();
    while !std::fs::read_to_string(dir.path("out/metrics.jsonl")).is_ok_and(|text| text.lines().count() > 20)
    {
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        assert!(started.elapsed() < Duration::from_secs(120), "no step was taken");
        std::thread::sleep(Duration::from_millis(5));
    }
    let id = child.id().to_string();
    assert!(std::process::Command::new("kill").args(["-INT", &id]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    assert!(stderr.contains("stopping at the next point that can be resumed"), "{stderr}");
    assert!(!dir.exists("out/model.safetensors"), "an interrupted run is not a finished one");

    dir.suasion(&["train", "--resume", "out", "--quiet"]).ok();
    assert_eq!(dir.read("whole/model.safetensors"), dir.read("out/model.safetensors"));
    assert_eq!(metrics(&dir, "whole"), metrics(&dir, "out"));
}

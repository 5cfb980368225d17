//! What a run leaves in its folder, which checkpoints it keeps there, and what it refuses before it writes.

use crate::common::*;
use suasion_train::{Error, Settings, Strategy};

#[test]
fn the_loss_falls_and_the_run_leaves_all_its_files() {
    let (train, held_out) = (rows(48, 1), rows(12, 77));
    let (_dir, out) = folder();
    let settings = Settings {
        num_train_epochs: 10.0,
        logging_steps: 7,
        eval_strategy: Strategy::Epoch,
        save_strategy: Strategy::Epoch,
        save_total_limit: Some(2),
        ..quick()
    };
    let mut job = Job::new(&train, settings, &out).eval(&held_out);
    let report = job.run().unwrap();
    let (before, after) = (report.before.as_ref().unwrap(), report.after.as_ref().unwrap());
    assert!(after.loss < 0.7 * before.loss, "{} to {}", before.loss, after.loss);
    assert!(after.sections["task"].loss > after.sections["response"].loss, "prompts were not learned");

    let lines = metrics(&out);
    let steps: Vec<u64> =
        lines.iter().filter(|l| l.get("loss").is_some()).map(|l| l["step"].as_u64().unwrap()).collect();
    let mut expected: Vec<u64> = (1..=240).filter(|s| *s == 1 || s % 7 == 0 || *s == 240).collect();
    assert_eq!(steps, expected);
    let evals: Vec<u64> =
        lines.iter().filter(|l| l.get("eval_loss").is_some()).map(|l| l["step"].as_u64().unwrap()).collect();
    expected = (0..=10).map(|epoch| epoch * 24).collect();
    assert_eq!(evals, expected);
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let keys = |line: &str| {
        let value: serde_json::Value = serde_json::from_str(line).unwrap();
        value.as_object().unwrap().keys().cloned().collect::<Vec<_>>()
    };
    assert_eq!(keys(text.lines().next().unwrap()), ["step", "eval_loss", "eval_sections"]);
    assert_eq!(
        keys(text.lines().nth(1).unwrap()),
        [
            "step",
            "epoch",
            "loss",
            "learning_rate",
            "grad_norm",
            "targets",
            "tokens",
            "tokens_per_second",
            "peak_memory_bytes"
        ]
    );

    let state = json(out.join("trainer_state.json"));
    assert_eq!((state["global_step"].as_u64(), state["max_steps"].as_u64()), (Some(240), Some(240)));
    assert_eq!(state["epoch"], 10.0);
    assert_eq!(state["num_train_epochs"], 10);
    assert_eq!(state["log_history"].as_array().unwrap().len(), lines.len());
    assert_eq!(state["total_flos"].as_f64().unwrap(), 6.0 * report.parameters as f64 * report.tokens as f64);

    // The saved model is the trained one, and its configuration says what its weights are.
    let config = json(out.join("config.json"));
    assert_eq!((&config["dtype"], &config["hidden_size"]), (&"float32".into(), &32.into()));
    let mut saved = model(suasion_train::plan::eval_budget(&held_out, 3));
    saved.load_weights(&out).unwrap();
    let again = suasion_train::evaluate(&mut saved, &held_out, 3, None, &mut |_| {}).unwrap();
    assert_eq!(again.loss, after.loss);
    for name in ["README.md", "report.html", "checkpoint-240/model.safetensors", "checkpoint-240/config.json"]
    {
        assert!(out.join(name).is_file(), "{name}");
    }
    let leftovers: Vec<_> = std::fs::read_dir(&out)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .filter(|n| n.to_string_lossy().starts_with('.'))
        .collect();
    assert!(leftovers.is_empty(), "{leftovers:?}");
}

#[test]
fn old_checkpoints_are_removed_and_the_best_is_kept() {
    let train = rows(4, 1);
    // The held-out rows contradict the training rows, so that the first evaluation stays the best.
    let mut held_out = rows(4, 1);
    for row in &mut held_out {
        for i in 1..row.len() {
            if row.labels[i] >= 0 {
                row.input_ids[i] = 90;
                row.labels[i] = 90;
            }
        }
    }
    let (_dir, out) = folder();
    let settings = Settings {
        max_steps: Some(12),
        eval_strategy: Strategy::Steps,
        eval_steps: Some(2),
        save_strategy: Strategy::Steps,
        save_steps: 2,
        save_total_limit: Some(2),
        load_best_model_at_end: true,
        ..quick()
    };
    let mut job = Job::new(&train, settings, &out).eval(&held_out);
    let report = job.run().unwrap();
    assert_eq!(checkpoints(&out), [2, 12]);
    let best = report.best.unwrap();
    assert_eq!((best.step, report.final_step), (2, 2));
    assert_eq!(report.after.unwrap().loss, best.loss);
    assert_eq!(bytes(out.join("model.safetensors")), bytes(out.join("checkpoint-2/model.safetensors")));
    assert_ne!(bytes(out.join("model.safetensors")), bytes(out.join("checkpoint-12/model.safetensors")));
    let state = json(out.join("trainer_state.json"));
    assert_eq!(state["best_global_step"], 2);
    assert!(state["best_model_checkpoint"].as_str().unwrap().ends_with("checkpoint-2"));
}

#[test]
fn saving_the_best_saves_only_what_is_better() {
    let (train, held_out) = (rows(48, 1), rows(12, 77));
    let (_dir, out) = folder();
    let settings = Settings {
        max_steps: Some(120),
        eval_strategy: Strategy::Steps,
        eval_steps: Some(10),
        save_strategy: Strategy::Best,
        load_best_model_at_end: true,
        ..quick()
    };
    let mut job = Job::new(&train, settings, &out).eval(&held_out);
    let report = job.run().unwrap();
    let mut lowest = f64::INFINITY;
    let mut improved = Vec::new();
    for eval in report.evals.iter().filter(|eval| eval.step > 0) {
        if eval.eval_loss < lowest {
            lowest = eval.eval_loss;
            improved.push(eval.step);
        }
    }
    let saved: Vec<u64> = job.listener.checkpoints.iter().map(|(step, _)| *step).collect();
    assert_eq!(saved, improved);
    assert_eq!(report.final_step, *improved.last().unwrap());
    assert_eq!(report.after.unwrap().loss, lowest);
}

#[test]
fn rows_that_the_model_cannot_read_are_refused_by_name() {
    let (_dir, out) = folder();
    let mut train = rows(3, 1);
    train[1].input_ids[4] = VOCAB;
    let error = Job::new(&train, quick(), &out).run().unwrap_err();
    assert!(matches!(error, Error::Vocabulary { token: 96, position: 4, vocab: 96, .. }), "{error}");
    assert!(error.to_string().contains("rows.jsonl:2"), "{error}");
    assert!(!out.exists(), "nothing was written");
    for row in &mut train {
        row.labels.fill(-100);
    }
    assert!(matches!(Job::new(&train, quick(), &out).run().unwrap_err(), Error::NoTargets { .. }));
    assert!(matches!(Job::new(&[], quick(), &out).run().unwrap_err(), Error::NoTargets { .. }));
}

#[test]
fn an_output_folder_that_is_not_empty_is_refused() {
    let train = rows(3, 1);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("notes.txt"), "mine").unwrap();
    let mut job = Job::new(&train, Settings { max_steps: Some(1), ..quick() }, dir.path());
    let error = job.run().unwrap_err();
    assert!(matches!(error, Error::OutputNotEmpty { .. }) && error.is_usage(), "{error}");
    job.overwrite = true;
    job.run().unwrap();
    assert_eq!(std::fs::read_to_string(dir.path().join("notes.txt")).unwrap(), "mine");
}

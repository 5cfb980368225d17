//! What a run leaves in its folder, which checkpoints it keeps there, and what it refuses before it writes.

use crate::common::*;
use suasion_train::{Error, Settings, Strategy};

#[test]
fn the_loss_falls_and_the_run_leaves_all_its_files() {
    let (train, held_out) = (rows(48, 1), rows(12, 77));
    let (_dir, out) = folder();
    let settings = Settings {
        num_train_epochs: 10.0,
        logging_steps: 7.into(),
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
    assert_eq!(
        keys(text.lines().next().unwrap()),
        ["step", "eval_loss", "eval_sections", "eval_mean_token_accuracy", "eval_entropy"]
    );
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
            "peak_memory_bytes",
            "mean_token_accuracy",
            "entropy"
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
    // The held-out rows contradict the training rows, so that the first evaluation in training stays the best.
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
        eval_steps: Some(2.into()),
        save_strategy: Strategy::Steps,
        save_steps: 2.into(),
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

/// Training that only does harm ends with the weights that it began with.
#[test]
fn the_evaluation_before_the_first_step_can_be_the_best() {
    let (train, held_out) = (rows(48, 1), rows(12, 77));
    let (_dir, out) = folder();
    let settings = Settings {
        max_steps: Some(8),
        learning_rate: 1.0,
        eval_strategy: Strategy::Steps,
        eval_steps: Some(2.into()),
        save_strategy: Strategy::Steps,
        save_steps: 4.into(),
        save_total_limit: Some(1),
        load_best_model_at_end: true,
        ..quick()
    };
    let mut job = Job::new(&train, settings, &out).eval(&held_out);
    let mut start = job.model().unwrap();
    let before = bits(&start);
    let report = job.run_with(&mut start).unwrap();
    let best = report.best.unwrap();
    assert_eq!((best.step, report.final_step), (0, 0));
    assert_eq!(
        (best.loss, report.after.unwrap().loss),
        (report.evals[0].eval_loss, report.evals[0].eval_loss)
    );
    assert_eq!(checkpoints(&out), [0, 8]);
    assert_eq!(bits(&start), before);
    assert_eq!(bytes(out.join("model.safetensors")), bytes(out.join("checkpoint-0/model.safetensors")));
    assert_eq!(json(out.join("trainer_state.json"))["best_global_step"], 0);
}

#[test]
fn saving_the_best_saves_only_what_is_better() {
    let (train, held_out) = (rows(48, 1), rows(12, 77));
    let (_dir, out) = folder();
    let settings = Settings {
        max_steps: Some(120),
        eval_strategy: Strategy::Steps,
        eval_steps: Some(10.into()),
        save_strategy: Strategy::Best,
        load_best_model_at_end: true,
        ..quick()
    };
    let mut job = Job::new(&train, settings, &out).eval(&held_out);
    let report = job.run().unwrap();
    let mut lowest = f64::INFINITY;
    let mut improved = Vec::new();
    for eval in &report.evals {
        if eval.eval_loss < lowest {
            lowest = eval.eval_loss;
            improved.push(eval.step);
        }
    }
    let saved: Vec<u64> = job.listener.checkpoints.iter().map(|(step, _)| *step).collect();
    assert!(improved.len() > 2, "{improved:?}");
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

fn one_step() -> Settings {
    Settings { max_steps: Some(1), ..quick() }
}

#[test]
fn an_earlier_run_stays_until_there_is_something_to_put_in_its_place() {
    let train = rows(3, 1);
    let (_dir, out) = folder();
    let mut first = Job::new(&train, one_step(), &out);
    first.more_files = vec![("generation_config.json", b"{}".to_vec())];
    first.run().unwrap();
    std::fs::write(out.join("notes.txt"), "mine").unwrap();
    let names = || {
        let mut names: Vec<String> = std::fs::read_dir(&out)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names.into_iter().map(|name| (bytes_of(&out, &name), name)).collect::<Vec<_>>()
    };
    let before = names();

    // A run that fails before its first checkpoint leaves everything as it was.
    let wild = Settings { max_steps: Some(9), learning_rate: 1e30, max_grad_norm: 0.0, ..quick() };
    let mut job = Job::new(&train, wild, &out);
    job.overwrite = true;
    assert!(matches!(job.run().unwrap_err(), Error::NonFinite { .. }));
    assert_eq!(names(), before);

    // One that ends leaves its own files only, beside those that no run wrote.
    let two = Settings { max_steps: Some(2), save_strategy: Strategy::Steps, ..quick() };
    let mut job = Job::new(&train, two, &out);
    job.overwrite = true;
    job.run().unwrap();
    assert_eq!(checkpoints(&out), [2]);
    assert!(!out.join("generation_config.json").exists());
    assert_eq!(std::fs::read_to_string(out.join("notes.txt")).unwrap(), "mine");
}

fn bytes_of(dir: &std::path::Path, name: &str) -> Vec<u8> {
    let path = dir.join(name);
    if path.is_dir() { Vec::new() } else { bytes(path) }
}

#[test]
fn what_no_run_wrote_is_not_replaced() {
    let train = rows(3, 1);
    let refused = |name: &str| {
        let (_dir, out) = folder();
        let place = out.join(name);
        std::fs::create_dir_all(place.parent().unwrap()).unwrap();
        std::fs::write(&place, "mine").unwrap();
        let mut job = Job::new(&train, one_step(), &out);
        job.overwrite = true;
        let error = job.run().unwrap_err();
        assert!(matches!(error, Error::Foreign { .. }) && error.is_usage(), "{name}: {error}");
        assert_eq!(std::fs::read_to_string(place).unwrap(), "mine");
    };
    for name in ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "report.html"] {
        refused(name);
    }
    refused("checkpoint-1/pytorch_model.bin");

    // A README.md is often there, and stays: the card gets another name, and is known by it later.
    let (_dir, out) = folder();
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("README.md"), "mine").unwrap();
    for _ in 0..2 {
        let mut job = Job::new(&train, one_step(), &out);
        job.overwrite = true;
        job.run().unwrap();
        assert_eq!(std::fs::read_to_string(out.join("README.md")).unwrap(), "mine");
        assert!(
            std::fs::read_to_string(out.join("MODEL_CARD.md"))
                .unwrap()
                .contains("library_name: transformers")
        );
    }
}

#[test]
fn a_second_process_is_refused() {
    let train = rows(3, 1);
    let (_dir, out) = folder();
    Job::new(&train, one_step(), &out).run().unwrap();
    let lock = suasion_train::lock(&out).unwrap();
    let mut job = Job::new(&train, one_step(), &out);
    job.overwrite = true;
    let error = job.run().unwrap_err();
    assert!(matches!(error, Error::Locked(_)) && error.tag() == "E-LOCKED", "{error}");
    assert!(error.to_string().contains(&format!("process {}", std::process::id())), "{error}");
    drop(lock);
    job.run().unwrap();
}

#[test]
fn inputs_among_the_files_of_a_run_are_found() {
    let (_dir, out) = folder();
    std::fs::create_dir_all(out.join("checkpoint-2")).unwrap();
    for name in ["config.json", "checkpoint-2/config.json", "metrics.jsonl", "rows.jsonl"] {
        std::fs::write(out.join(name), "").unwrap();
    }
    let replaces = |name: &str| suasion_train::replaces(&out, &out.join(name));
    assert!(replaces("config.json") && replaces("checkpoint-2/config.json") && replaces("metrics.jsonl"));
    assert!(!replaces("rows.jsonl") && !replaces("nothing"));
    assert!(!suasion_train::replaces(&out.join("checkpoint-2"), &out.join("config.json")));
}

#[test]
fn a_run_that_diverges_ends_and_says_so() {
    let (train, held_out) = (rows(48, 1), rows(12, 77));
    let (_dir, out) = folder();
    // Steps so long that the loss is high, and weights that do not overflow.
    let wild = Settings {
        max_steps: Some(200),
        learning_rate: 3.0,
        lr_scheduler_type: suasion_train::Scheduler::Constant,
        save_strategy: Strategy::Steps,
        save_steps: 10.into(),
        ..quick()
    };
    let report = Job::new(&train, wild.clone(), &out).eval(&held_out).run().unwrap();
    let divergence = report.diverged.unwrap();
    assert!(divergence.stopped && divergence.steps == 20 && report.step < 200, "{divergence:?}");
    let high = report.steps.iter().rev().take(20).all(|step| step.loss.unwrap() > divergence.limit);
    assert!(high && divergence.limit == 2.0 * report.steps[0].loss.unwrap(), "{divergence:?}");
    assert!(!out.join("model.safetensors").exists());
    for name in ["README.md", "report.html"] {
        let text = std::fs::read_to_string(out.join(name)).unwrap();
        assert!(text.to_lowercase().contains("the run has diverged: its loss was above"), "{name}");
    }

    // Asked to go on, it does, and still says so.
    let (_dir, out) = folder();
    let on = Settings { stop_on_divergence: false, max_steps: Some(40), ..wild };
    let report = Job::new(&train, on, &out).eval(&held_out).run().unwrap();
    assert!(report.step == 40 && report.diverged.is_some_and(|divergence| !divergence.stopped));
    assert!(report.warnings.iter().any(|warning| warning.contains("has diverged")));
    assert!(out.join("model.safetensors").exists());
}

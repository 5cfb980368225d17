//! The loop's promises: accumulation, recomputation, threads, what is logged, what stops it.

use crate::common::*;
use suasion_train::{Error, Plan, Report, Settings, Strategy};

fn train(settings: Settings) -> (Report, Vec<Vec<u32>>) {
    let rows = rows(11, 3);
    let dir = tempfile::tempdir().unwrap();
    let mut model = model(Plan::new(&rows, &[], &settings).unwrap().budget);
    let out = dir.path().join("run");
    let report = Job::new(&rows, settings, &out).run_with(&mut model).unwrap();
    (report, bits(&model))
}

#[test]
fn accumulation_does_not_change_the_step() {
    let run = |batch, accumulation| {
        let (report, bits) = train(Settings {
            per_device_train_batch_size: batch,
            gradient_accumulation_steps: accumulation,
            num_train_epochs: 2.0,
            ..quick()
        });
        assert_eq!(report.step, 4, "an epoch of 11 rows has a step of 8 and one of 3");
        let numbers: Vec<f64> = report.steps.iter().flat_map(|s| [s.loss.unwrap(), s.grad_norm]).collect();
        let weights: Vec<f32> = bits.into_iter().flatten().map(f32::from_bits).collect();
        (numbers, weights)
    };
    let (numbers, weights) = run(8, 1);
    for (batch, accumulation) in [(1, 8), (2, 4), (4, 2)] {
        let (others, their_weights) = run(batch, accumulation);
        for (a, b) in numbers.iter().zip(&others) {
            assert!((a - b).abs() < 1e-6 * a.abs().max(1.0), "{batch}×{accumulation}: {a} and {b}");
        }
        // Adam divides by the gradient's own size, so rounding shows in full where a gradient is nearly zero: most
        // weights agree to 1e-6, and none may be further off than a fraction of a step's 3e-3.
        let off =
            |limit: f32| weights.iter().zip(&their_weights).filter(|(a, b)| (*a - *b).abs() > limit).count();
        assert_eq!(off(3e-4), 0, "{batch}×{accumulation}");
        assert!(
            off(1e-6) < weights.len() / 100,
            "{batch}×{accumulation}: {} of {}",
            off(1e-6),
            weights.len()
        );
    }
}

#[test]
fn recomputation_changes_no_bit() {
    let (kept, a) = train(Settings { max_steps: Some(6), ..quick() });
    let (again, b) = train(Settings { max_steps: Some(6), gradient_checkpointing: true, ..quick() });
    assert_eq!(kept.steps[5].loss, again.steps[5].loss);
    assert_eq!(kept.steps[5].grad_norm, again.steps[5].grad_norm);
    assert!(a == b, "weights differ");
}

#[test]
fn threads_change_no_bit() {
    let with = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| train(Settings { max_steps: Some(6), ..quick() }))
    };
    let ((one, a), (two, b)) = (with(1), with(2));
    assert_eq!(one.steps[5].loss, two.steps[5].loss);
    assert_eq!(one.steps[5].grad_norm, two.steps[5].grad_norm);
    assert!(a == b, "weights differ");
}

/// The loss of a step is over all its targets together, by weight: not a mean of means.
#[test]
fn the_loss_is_over_all_targets_of_the_step() {
    let mut train = rows(4, 9);
    let n = train[0].len();
    // One row counts threefold, one only in part.
    train[0].weights = Some(vec![3.0; n]);
    train[1].weights = Some((0..train[1].len()).map(|i| if i % 2 == 0 { 0.5 } else { 0.0 }).collect());
    let settings = Settings {
        per_device_train_batch_size: 1,
        gradient_accumulation_steps: 4,
        max_steps: Some(1),
        ..quick()
    };
    let plan = Plan::new(&train, &[], &settings).unwrap();
    let mut fresh = model(plan.budget);
    let (mut sum, mut weight, mut targets) = (0.0, 0.0, 0);
    for row in &train {
        let batch = suasion_train::batches::train_batch([row]);
        for (outcome, target) in fresh.forward(&batch).unwrap().iter().zip(&batch.targets) {
            sum += f64::from(outcome.nll) * f64::from(target.weight);
            weight += f64::from(target.weight);
            targets += 1;
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let report = Job::new(&train, settings, &dir.path().join("run")).run().unwrap();
    assert!((report.steps[0].loss.unwrap() - sum / weight).abs() < 1e-6);
    assert_eq!(report.steps[0].targets, targets);
    let all: usize = train.iter().map(|row| row.labels.iter().filter(|l| **l >= 0).count()).sum();
    assert!((targets as usize) < all, "the half-weighted row lost the targets of weight 0");
}

#[test]
fn a_step_without_targets_changes_nothing_and_says_so() {
    let mut train = rows(4, 2);
    // In file order the second step has no target.
    for row in &mut train[2..] {
        row.labels.fill(suasion_data::IGNORE);
    }
    let run = |steps| {
        let settings = Settings {
            max_steps: Some(steps),
            shuffle_dataset: false,
            lr_scheduler_type: suasion_train::Scheduler::Constant,
            ..quick()
        };
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("run");
        let mut model = model(Plan::new(&train, &[], &settings).unwrap().budget);
        let mut job = Job::new(&train, settings, &out);
        let report = job.run_with(&mut model).unwrap();
        (bits(&model), report, job.listener.warnings.clone(), metrics(&out))
    };
    let (one, ..) = run(1);
    let (two, report, warnings, lines) = run(2);
    assert!(one == two, "weights changed in a step without targets");
    assert_eq!(report.skipped_steps, 1);
    assert!(warnings.iter().any(|w| w.contains("step 2 changed nothing")), "{warnings:?}");
    assert!(lines[1]["loss"].is_null() && lines[1]["targets"] == 0, "{}", lines[1]);
    // AdamW's bias correction counts updates: the third step is its second.
    let (three, ..) = run(3);
    let settings = Settings {
        max_steps: Some(2),
        shuffle_dataset: false,
        lr_scheduler_type: suasion_train::Scheduler::Constant,
        ..quick()
    };
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let mut twice = model(Plan::new(&train[..2], &[], &settings).unwrap().budget);
    Job::new(&train[..2], settings, &out).run_with(&mut twice).unwrap();
    assert!(three == bits(&twice), "two updates on the same rows");
}

#[test]
fn the_loss_falls_and_everything_is_left_behind() {
    let (train, held_out) = (rows(48, 1), rows(12, 77));
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let settings = Settings {
        num_train_epochs: 10.0,
        logging_steps: 7,
        eval_strategy: Strategy::Epoch,
        save_strategy: Strategy::Epoch,
        save_total_limit: Some(2),
        ..quick()
    };
    let mut job = Job::new(&train, settings, &out);
    job.eval = &held_out;
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

    let state: serde_json::Value =
        serde_json::from_slice(&std::fs::read(out.join("trainer_state.json")).unwrap()).unwrap();
    assert_eq!((state["global_step"].as_u64(), state["max_steps"].as_u64()), (Some(240), Some(240)));
    assert_eq!(state["epoch"], 10.0);
    assert_eq!(state["num_train_epochs"], 10);
    assert_eq!(state["log_history"].as_array().unwrap().len(), lines.len());
    assert_eq!(state["total_flos"].as_f64().unwrap(), 6.0 * report.parameters as f64 * report.tokens as f64);

    // The saved model is the trained one, and its configuration says what its weights are.
    let config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
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
fn old_checkpoints_go_and_the_best_stays() {
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
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
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
    let mut job = Job::new(&train, settings, &out);
    job.eval = &held_out;
    let report = job.run().unwrap();
    let left: Vec<u64> = suasion_train::checkpoint::list(&out).into_iter().map(|(step, _)| step).collect();
    assert_eq!(left, [2, 12]);
    let best = report.best.unwrap();
    assert_eq!((best.step, report.final_step), (2, 2));
    assert_eq!(report.after.unwrap().loss, best.loss);
    let bytes = |path: &str| std::fs::read(out.join(path)).unwrap();
    assert_eq!(bytes("model.safetensors"), bytes("checkpoint-2/model.safetensors"));
    assert_ne!(bytes("model.safetensors"), bytes("checkpoint-12/model.safetensors"));
    let state: serde_json::Value = serde_json::from_slice(&bytes("trainer_state.json")).unwrap();
    assert_eq!(state["best_global_step"], 2);
    assert!(state["best_model_checkpoint"].as_str().unwrap().ends_with("checkpoint-2"));
}

#[test]
fn a_loss_that_is_not_finite_stops_before_the_weights_change() {
    let train = rows(6, 5);
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    // An absurd rate sends the weights off in the first step; the checkpoint before it is the last good one.
    let settings = Settings {
        learning_rate: 1e38,
        max_steps: Some(9),
        max_grad_norm: 0.0,
        lr_scheduler_type: suasion_train::Scheduler::ConstantWithWarmup,
        warmup_steps: 1.0,
        save_strategy: Strategy::Steps,
        save_steps: 1,
        shuffle_dataset: false,
        ..quick()
    };
    let mut model = model(Plan::new(&train, &[], &settings).unwrap().budget);
    let error = Job::new(&train, settings, &out).run_with(&mut model).unwrap_err();
    let Error::NonFinite { step: Some(step), rows, checkpoint: Some(checkpoint), .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(*step, 3, "rate 0, then 1e38, then the loss of what that left");
    let named: Vec<u64> = rows.iter().map(|row| row.line.unwrap()).collect();
    assert_eq!(named, [5, 6]);
    assert_eq!(*checkpoint, out.join("checkpoint-2"));
    let text = format!("{error} {}", error.help().unwrap());
    for part in ["step 3", "rows.jsonl:5, rows.jsonl:6", "checkpoint-2", "weights were not updated"] {
        assert!(text.contains(part), "{text}");
    }
    assert!(checkpoint.join("model.safetensors").is_file());
    // What is in memory is what the checkpoint of step 2 holds.
    let of_memory = bits(&model);
    let mut saved = crate::common::model(model.budget());
    if saved.load_weights(checkpoint).is_ok() {
        assert!(bits(&saved) == of_memory);
    }
}

/// One row with a broken weight path: only the rows whose own loss is not finite are named.
#[test]
fn nan_weights_name_the_rows_that_meet_them() {
    let mut train = rows(4, 5);
    for row in &mut train {
        row.input_ids.iter_mut().for_each(|id| *id = (*id).min(80));
        row.labels.iter_mut().for_each(|label| *label = (*label).min(80));
    }
    train[2].input_ids[8] = 95;
    let settings =
        Settings { per_device_train_batch_size: 4, max_steps: Some(2), shuffle_dataset: false, ..quick() };
    let mut model = model(Plan::new(&train, &[], &settings).unwrap().budget);
    let name = "model.embed_tokens.weight";
    let mut embedding = model.parameter(name).unwrap();
    embedding.data[95 * 32] = f32::NAN;
    model.set_parameter(name, &embedding).unwrap();
    let untouched = bits(&model);
    let dir = tempfile::tempdir().unwrap();
    let error = Job::new(&train, settings, &dir.path().join("run")).run_with(&mut model).unwrap_err();
    let Error::NonFinite { step: Some(1), rows, checkpoint: None, .. } = &error else { panic!("{error}") };
    assert_eq!(rows.iter().map(|row| row.line.unwrap()).collect::<Vec<_>>(), [3]);
    assert_eq!(error.tag(), "E-NAN");
    assert!(bits(&model) == untouched);
}

#[test]
fn rows_that_the_model_cannot_read_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
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
fn a_full_output_folder_is_refused() {
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

#[test]
fn settings_that_cannot_work_are_refused_by_key() {
    let d = Settings::default;
    let cases: Vec<(&str, Settings)> = vec![
        ("learning_rate", Settings { learning_rate: f64::NAN, ..d() }),
        ("learning_rate", Settings { learning_rate: -1.0, ..d() }),
        ("adam_beta2", Settings { adam_beta2: 1.0, ..d() }),
        ("per_device_train_batch_size", Settings { per_device_train_batch_size: 0, ..d() }),
        ("gradient_accumulation_steps", Settings { gradient_accumulation_steps: 0, ..d() }),
        ("num_train_epochs", Settings { num_train_epochs: 0.0, ..d() }),
        ("max_steps", Settings { max_steps: Some(0), ..d() }),
        ("warmup_ratio", Settings { warmup_ratio: 1.5, ..d() }),
        ("warmup_steps", Settings { warmup_steps: 2.5, ..d() }),
        ("logging_steps", Settings { logging_steps: 0, ..d() }),
        ("save_total_limit", Settings { save_total_limit: Some(0), ..d() }),
        ("eval_strategy", Settings { eval_strategy: Strategy::Steps, ..d() }),
        ("save_strategy", Settings { save_strategy: Strategy::Best, ..d() }),
        ("load_best_model_at_end", Settings { load_best_model_at_end: true, ..d() }),
    ];
    for (key, settings) in cases {
        match settings.validate(false) {
            Err(Error::Setting { key: named, .. }) => assert_eq!(named, key),
            other => panic!("{key}: {other:?}"),
        }
    }
    d().validate(false).unwrap();
    let best = Settings {
        eval_strategy: Strategy::Steps,
        eval_steps: Some(50),
        save_steps: 120,
        load_best_model_at_end: true,
        ..d()
    };
    assert!(best.validate(true).is_err(), "120 is not a multiple of 50");
    Settings { save_steps: 100, ..best }.validate(true).unwrap();
}

#[test]
fn a_constant_schedule_warns_of_a_warm_up() {
    let settings =
        Settings { lr_scheduler_type: suasion_train::Scheduler::Constant, warmup_ratio: 0.1, ..quick() };
    let plan = Plan::new(&rows(5, 1), &[], &settings).unwrap();
    assert!(plan.warnings.iter().any(|w| w.contains("constant_with_warmup")), "{:?}", plan.warnings);
}

#[test]
fn saving_the_best_saves_only_what_is_better() {
    let (train, held_out) = (rows(48, 1), rows(12, 77));
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let settings = Settings {
        max_steps: Some(120),
        eval_strategy: Strategy::Steps,
        eval_steps: Some(10),
        save_strategy: Strategy::Best,
        load_best_model_at_end: true,
        ..quick()
    };
    let mut job = Job::new(&train, settings, &out);
    job.eval = &held_out;
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

/// The losses are finite here, the gradient is not: 1 / Σw is more than an f32 holds.
#[test]
fn a_gradient_that_is_not_finite_stops_too() {
    let mut train = rows(4, 5);
    for row in &mut train[2..] {
        row.weights = Some(vec![1e-45; row.len()]);
    }
    let settings = Settings { max_steps: Some(3), shuffle_dataset: false, ..quick() };
    let mut model = model(Plan::new(&train, &[], &settings).unwrap().budget);
    let dir = tempfile::tempdir().unwrap();
    let error = Job::new(&train, settings, &dir.path().join("run")).run_with(&mut model).unwrap_err();
    let Error::NonFinite { step: Some(2), what: "the gradient norm", rows, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(rows.iter().map(|row| row.line.unwrap()).collect::<Vec<_>>(), [3, 4]);
    let finite = |name: &String| model.parameter(name).unwrap().data.iter().all(|value| value.is_finite());
    assert!(model.parameter_names().iter().all(finite));
}

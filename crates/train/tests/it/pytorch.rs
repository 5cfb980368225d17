//! Runs of PyTorch and of transformers' Trainer, taken by this crate's loop.

use crate::common::*;
use serde_json::Value;
use std::path::Path;
use suasion_data::{Origin, Sample};
use suasion_engine::{Architecture, Device, Model, SingleRank};
use suasion_train::{DataCard, ModelFiles, Plan, Resume, Run, Scheduler, Settings, Silent, Strategy};

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

/// A batch of the goldens as rows. Padding stays in them, as a foreign data set would have it.
fn samples(batch: &Value) -> Vec<Sample> {
    let rows = |key: &str| batch[key].as_array().unwrap().iter().map(numbers).collect::<Vec<_>>();
    let (ids, labels, mask) = (rows("input_ids"), rows("labels"), rows("attention_mask"));
    (0..ids.len())
        .map(|row| Sample {
            id: id(row),
            input_ids: ids[row].iter().map(|v| *v as u32).collect(),
            labels: labels[row].iter().map(|v| *v as i32).collect(),
            origins: (labels[row].iter().zip(&mask[row]))
                .map(|(&label, &mask)| match (label == -100.0, mask == 0.0) {
                    (_, true) => Origin::Padding,
                    (true, _) => Origin::Scaffold,
                    (false, _) => Origin::Response { turn: 0 },
                })
                .collect(),
            weights: None,
            pack: None,
        })
        .collect()
}

/// Trains on the rows in file order and compares every logged number. One loss more than steps is the final
/// evaluation's.
fn compare(dir: &Path, rows: &[Sample], settings: Settings, losses: &[f64], norms: &[f64], rates: &[f64]) {
    let out = tempfile::tempdir().unwrap();
    let plan = Plan::new(rows, rows, &settings).unwrap();
    let mut model = Model::new(Architecture::from_dir(dir).unwrap(), Device::cpu(), plan.budget).unwrap();
    model.load_weights(dir).unwrap();
    let run = Run {
        model: &mut model,
        train: rows,
        eval: rows,
        settings: &settings,
        identity: &identity(),
        card: &DataCard::default(),
        files: &ModelFiles::from_dir(dir).unwrap(),
        extra: &[],
        stops: &[],
        decode: None,
        tensorboard: None,
        collective: &SingleRank,
        output_dir: &out.path().join("run"),
        resume: Resume::No,
        extend: false,
        overwrite: false,
        lock: None,
    };
    let report = suasion_train::train(run, &mut Silent, &NEVER).unwrap();
    assert_eq!(report.steps.len(), norms.len());
    let name = dir.file_name().unwrap().to_string_lossy();
    for (step, record) in report.steps.iter().enumerate() {
        let loss = record.loss.unwrap();
        assert!(
            (loss - losses[step]).abs() < 5e-4,
            "{name} step {step}: loss {loss}, PyTorch {}",
            losses[step]
        );
        // The first norm is of the same weights; later ones are along the trajectory.
        let tolerance = if step == 0 { 1e-4 } else { 5e-4 };
        let off = (record.grad_norm / norms[step] - 1.0).abs();
        assert!(off < tolerance, "{name} step {step}: norm {}, PyTorch {}", record.grad_norm, norms[step]);
        assert_eq!(record.learning_rate, rates[step], "{name} step {step}");
    }
    let last = report.after.unwrap().loss;
    let want = losses[norms.len()];
    assert!((last - want).abs() < 5e-4, "{name} after: loss {last}, PyTorch {want}");
}

#[test]
fn five_steps_of_adamw_are_those_of_pytorch() {
    for dir in golden_models() {
        let golden = golden(&dir, "golden.json");
        let rows = samples(&golden["batches"]["a"]);
        let settings = Settings {
            per_device_train_batch_size: rows.len(),
            learning_rate: 1e-3,
            weight_decay: 0.01,
            decay_all: true,
            max_grad_norm: 0.0,
            max_steps: Some(5),
            lr_scheduler_type: Scheduler::Constant,
            shuffle_dataset: false,
            logging_steps: 1.into(),
            save_strategy: Strategy::No,
            ..Settings::default()
        };
        let golden = &golden["adamw_5"];
        compare(
            &dir,
            &rows,
            settings,
            &numbers(&golden["losses"]),
            &numbers(&golden["grad_norms"]),
            &[1e-3; 5],
        );
    }
}

#[test]
fn five_steps_with_accumulation_clipping_and_warm_up_are_those_of_pytorch() {
    for dir in golden_models() {
        let golden = golden(&dir, "golden.json");
        let mut rows = samples(&golden["batches"]["a"]);
        rows.extend(samples(&golden["batches"]["padded"]));
        let like = &golden["hf_like_5"];
        let settings = Settings {
            // PyTorch's micro-batches were of 2 and 3 rows, ours are of 3 and 2: the step is the same.
            per_device_train_batch_size: 3,
            gradient_accumulation_steps: 2,
            learning_rate: like["lr"].as_f64().unwrap(),
            weight_decay: like["weight_decay"].as_f64().unwrap(),
            max_grad_norm: 1.0,
            max_steps: Some(5),
            lr_scheduler_type: Scheduler::Linear,
            warmup_steps: 2.0,
            shuffle_dataset: false,
            logging_steps: 1.into(),
            save_strategy: Strategy::No,
            ..Settings::default()
        };
        let targets: usize = rows.iter().map(|row| row.targets().count()).sum();
        assert_eq!(targets as u64, like["total_supervised"].as_u64().unwrap());
        let norms = numbers(&like["grad_norms_before_clip"]);
        compare(&dir, &rows, settings, &numbers(&like["losses"]), &norms, &numbers(&like["lrs"]));
    }
}

/// The Trainer's own runs over five rows: two micro-batches of two rows per step, and an epoch that ends with one
/// micro-batch of one row.
#[test]
fn runs_are_those_of_the_trainer() {
    for dir in golden_models().iter().filter(|dir| dir.join("trainer.json").exists()) {
        let all = golden(dir, "trainer.json");
        let rows = samples(&all["rows"]);
        let mut runs = 0;
        for (kind, run) in all.as_object().unwrap().iter().filter(|(kind, _)| *kind != "rows") {
            let mut settings = run["settings"].clone();
            for (key, value) in [
                ("shuffle_dataset", false.into()),
                ("logging_steps", 1.into()),
                ("save_strategy", "no".into()),
            ] {
                settings[key] = value;
            }
            println!("{kind}");
            let mut losses = numbers(&run["losses"]);
            losses.push(run["loss_after"].as_f64().unwrap());
            let settings: Settings = serde_json::from_value(settings).unwrap();
            compare(dir, &rows, settings, &losses, &numbers(&run["grad_norms"]), &numbers(&run["lrs"]));
            runs += 1;
        }
        assert_eq!(runs, 5);
    }
}

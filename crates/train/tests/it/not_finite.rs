//! Losses and gradients that are not finite: what stops, what is named, and what stays.

use crate::common::*;
use suasion_train::{Error, Settings, Strategy};

#[test]
fn a_loss_that_is_not_finite_stops_before_the_weights_change() {
    let train = rows(6, 5);
    let (_dir, out) = folder();
    // The second step diverges under an extreme rate; its checkpoint is the last one before the error.
    let settings = Settings {
        learning_rate: 1e25,
        max_steps: Some(9),
        max_grad_norm: 0.0,
        lr_scheduler_type: suasion_train::Scheduler::ConstantWithWarmup,
        warmup_steps: 1.0,
        save_strategy: Strategy::Steps,
        save_steps: 1.into(),
        shuffle_dataset: false,
        ..quick()
    };
    let mut job = Job::new(&train, settings, &out);
    let mut model = job.model().unwrap();
    let error = job.run_with(&mut model).unwrap_err();
    let Error::NonFinite { step: Some(step), rows, checkpoint: Some(checkpoint), .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(*step, 3, "the rates are 0 and 1e25; the third step meets the loss of the result");
    assert_eq!(lines(rows), [5, 6]);
    assert_eq!(*checkpoint, out.join("checkpoint-2"));
    let text = format!("{error} {}", error.help().unwrap());
    for part in ["step 3", "rows.jsonl:5, rows.jsonl:6", "checkpoint-2", "weights were not updated"] {
        assert!(text.contains(part), "{text}");
    }
    assert!(checkpoint.join("model.safetensors").is_file());
    // The weights in memory are those of the checkpoint of step 2.
    let of_memory = bits(&model);
    let mut saved = crate::common::model(model.budget());
    saved.load_weights(checkpoint).unwrap();
    assert!(bits(&saved) == of_memory);
}

/// Only the rows whose own loss is not finite are named.
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
    let (_dir, out) = folder();
    let mut job = Job::new(&train, settings, &out);
    let mut model = job.model().unwrap();
    let name = "model.embed_tokens.weight";
    let mut embedding = model.parameter(name).unwrap();
    embedding.data[95 * 32] = f32::NAN;
    model.set_parameter(name, &embedding).unwrap();
    let untouched = bits(&model);
    let error = job.run_with(&mut model).unwrap_err();
    let Error::NonFinite { step: Some(1), rows, checkpoint: None, .. } = &error else { panic!("{error}") };
    assert_eq!(lines(rows), [3]);
    assert_eq!(error.tag(), "E-NAN");
    assert!(bits(&model) == untouched);
}

/// The losses are finite here, the gradient is not: 1 / Σw is more than an f32 holds.
#[test]
fn a_gradient_that_is_not_finite_stops_too() {
    let mut train = rows(4, 5);
    for row in &mut train[2..] {
        row.weights = Some(vec![1e-45; row.len()]);
    }
    let settings = Settings { max_steps: Some(3), shuffle_dataset: false, ..quick() };
    let (_dir, out) = folder();
    let mut job = Job::new(&train, settings, &out);
    let mut model = job.model().unwrap();
    let error = job.run_with(&mut model).unwrap_err();
    let Error::NonFinite { step: Some(2), what: "the gradient norm", rows, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(lines(rows), [3, 4]);
    let finite = |name: &String| model.parameter(name).unwrap().data.iter().all(|value| value.is_finite());
    assert!(model.parameter_names().iter().all(finite));
}

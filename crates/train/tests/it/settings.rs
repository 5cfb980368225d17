//! Settings that cannot work, and settings that work otherwise than expected.

use crate::common::*;
use serde::de::DeserializeOwned;
use std::fmt::Display;
use suasion_train::{Error, Plan, Scheduler, Settings, Strategy};

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
        ("warmup_steps", Settings { warmup_steps: -1.0, ..d() }),
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

/// Messages print the names of the configuration.
#[test]
fn choices_are_printed_under_their_names_in_a_configuration() {
    fn check<T: DeserializeOwned + Display>(names: &[&str]) {
        for name in names {
            assert_eq!(serde_json::from_value::<T>((*name).into()).unwrap().to_string(), *name);
        }
    }
    check::<Strategy>(&["no", "steps", "epoch", "best"]);
    check::<Scheduler>(&["linear", "cosine", "constant", "constant_with_warmup"]);
}

#[test]
fn a_constant_schedule_warns_of_a_warm_up() {
    let settings = Settings { lr_scheduler_type: Scheduler::Constant, warmup_ratio: 0.1, ..quick() };
    let plan = Plan::new(&rows(5, 1), &[], &settings).unwrap();
    assert!(plan.warnings.iter().any(|w| w.contains("constant_with_warmup")), "{:?}", plan.warnings);
}

//! Settings that cannot work, and settings that work otherwise than expected.

use crate::common::*;
use serde::de::DeserializeOwned;
use std::fmt::Display;
use suasion_train::{Error, Interval, Plan, Scheduler, Settings, Strategy};

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
        ("logging_steps", Settings { logging_steps: 0.into(), ..d() }),
        ("save_total_limit", Settings { save_total_limit: Some(0), ..d() }),
        ("eval_strategy", Settings { eval_strategy: Strategy::Steps, ..d() }),
        ("save_strategy", Settings { save_strategy: Strategy::Best, ..d() }),
        ("load_best_model_at_end", Settings { load_best_model_at_end: true, ..d() }),
        ("logging_steps", Settings { logging_steps: Interval(2.5), ..d() }),
        ("save_steps", Settings { save_steps: Interval(-0.5), ..d() }),
        ("eval_steps", Settings { eval_steps: Some(Interval(0.0)), ..d() }),
        ("metric_for_best_model", Settings { metric_for_best_model: Some("bleu".into()), ..d() }),
        ("early_stopping_patience", Settings { early_stopping_patience: Some(2), ..d() }),
        ("lr_scheduler_type", Settings { lr_scheduler_type: Scheduler::ReduceLrOnPlateau, ..d() }),
    ];
    for (key, settings) in cases {
        match settings.validate(false) {
            Err(Error::Setting { key: named, .. }) => assert_eq!(named, key),
            other => panic!("{key}: {other:?}"),
        }
    }
    d().validate(false).unwrap();
    // The best weights get a checkpoint in any case, but not where there are none at all.
    let best = Settings {
        eval_strategy: Strategy::Steps,
        eval_steps: Some(50.into()),
        save_steps: 120.into(),
        load_best_model_at_end: true,
        ..d()
    };
    best.validate(true).unwrap();
    assert!(Settings { save_strategy: Strategy::No, ..best.clone() }.validate(true).is_err());
    Settings { metric_for_best_model: Some("eval_response_loss".into()), ..best }.validate(true).unwrap();
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
    check::<Scheduler>(&[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
    ]);
    check::<Scheduler>(&["inverse_sqrt", "reduce_lr_on_plateau", "cosine_with_min_lr", "greedy"]);
    check::<Scheduler>(&["cosine_warmup_with_min_lr", "warmup_stable_decay"]);
}

#[test]
fn a_constant_schedule_warns_of_a_warm_up() {
    let settings = Settings { lr_scheduler_type: Scheduler::Constant, warmup_ratio: 0.1, ..quick() };
    let plan = Plan::new(&rows(5, 1), &[], &settings).unwrap();
    assert!(plan.warnings.iter().any(|w| w.contains("constant_with_warmup")), "{:?}", plan.warnings);
}

/// As in the Trainer what ends in `loss` should be low and everything else high; but a perplexity is no merit.
#[test]
fn what_is_better_follows_the_name_of_the_metric() {
    let lower = |metric: &str, greater_is_better| {
        let metric_for_best_model = Some(metric.to_string());
        Settings { metric_for_best_model, greater_is_better, ..Settings::default() }.is_better(1.0, 2.0)
    };
    assert!(lower("loss", None) && lower("eval_loss", None) && lower("eval_response_loss", None));
    assert!(lower("perplexity", None) && !lower("mean_token_accuracy", None) && !lower("entropy", None));
    assert!(lower("entropy", Some(false)) && !lower("loss", Some(true)));
}

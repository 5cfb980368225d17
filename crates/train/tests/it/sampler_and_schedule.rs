//! Learning-rate schedules, clipping, and the rows of each step.

use crate::common::{json, rows};
use std::path::Path;
use suasion_train::sampler::Sampler;
use suasion_train::schedule::PlateauState;
use suasion_train::state::Patience;
use suasion_train::step::clip_coefficient;
use suasion_train::{Interval, Plan, Settings};

fn schedules() -> serde_json::Value {
    json(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/goldens/schedules.json"))
}

fn numbers(value: &serde_json::Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

/// A schedule as the goldens have it.
fn settings_of(kind: &serde_json::Value, kwargs: &serde_json::Value) -> Settings {
    Settings {
        lr_scheduler_type: serde_json::from_value(kind.clone()).unwrap(),
        lr_scheduler_kwargs: serde_json::from_value(kwargs.clone()).unwrap(),
        learning_rate: 3e-4,
        ..Settings::default()
    }
}

/// transformers' own schedulers, step by step.
#[test]
fn schedules_are_those_of_transformers() {
    let golden = schedules();
    assert_eq!(golden["learning_rate"], 3e-4);
    let mut kinds = std::collections::BTreeSet::new();
    for case in golden["schedules"].as_array().unwrap() {
        let lrs = numbers(&case["lrs"]);
        let settings = Settings {
            warmup_steps: case["warmup"].as_f64().unwrap(),
            ..settings_of(&case["type"], &case["kwargs"])
        };
        let schedule = settings.schedule(lrs.len() as u64).unwrap();
        for (step, lr) in lrs.iter().enumerate() {
            // A cosine or a power may differ in its last bits between C libraries.
            let ours = schedule.rate(step as u64);
            assert!((ours - lr).abs() <= 1e-15 * lr.abs() + 1e-19, "{case}: step {step}: {ours}");
        }
        kinds.insert(settings.lr_scheduler_type.to_string());
    }
    assert_eq!(kinds.len(), 10, "all but those that follow evaluations");
}

/// PyTorch's `ReduceLROnPlateau` and transformers' `GreedyLR` on the same metrics. The state goes through JSON after each,
/// as it does in a checkpoint.
#[test]
fn evaluations_change_the_rate_where_those_of_the_peers_do() {
    for case in schedules()["plateaus"].as_array().unwrap() {
        let schedule = settings_of(&case["type"], &case["kwargs"]).schedule(99).unwrap();
        let mut state = PlateauState::default();
        let metrics = numbers(&case["metrics"]);
        let mut see = |metric: &f64| {
            let rate = schedule.evaluated(&mut state, *metric).unwrap();
            state = serde_json::from_str(&serde_json::to_string(&state).unwrap()).unwrap();
            rate
        };
        let ours: Vec<f64> = metrics.iter().map(&mut see).collect();
        assert_eq!(ours, numbers(&case["lrs"]), "{}", case["kwargs"]);
        assert_eq!(schedule.rate(0), 3e-4);
    }
}

/// transformers' `EarlyStoppingCallback` on the same metrics.
#[test]
fn patience_ends_where_that_of_transformers_does() {
    for case in schedules()["early_stopping"].as_array().unwrap() {
        let settings = Settings {
            early_stopping_patience: case["patience"].as_u64(),
            early_stopping_threshold: case["threshold"].as_f64().unwrap(),
            metric_for_best_model: case["metric"].as_str().map(str::to_string),
            greater_is_better: case["greater_is_better"].as_bool(),
            ..Settings::default()
        };
        let mut patience = Patience::default();
        let ends = numbers(&case["values"]).iter().position(|value| {
            patience.see(*value, &settings);
            Some(patience.bad) >= settings.early_stopping_patience
        });
        assert_eq!(ends.map(|at| at as u64), case["ends"].as_u64(), "{case}");
    }
}

#[test]
fn arguments_that_a_schedule_does_not_have_are_refused() {
    let refused = |kind: &str, kwargs: &str| {
        let settings = settings_of(&kind.into(), &serde_json::from_str(kwargs).unwrap());
        let error = settings.validate(true).unwrap_err();
        assert!(error.is_usage() && error.to_string().starts_with("lr_scheduler_kwargs: "), "{error}");
        error.to_string()
    };
    assert!(refused("linear", r#"{"num_cycles": 2}"#).contains("unknown field `num_cycles`"));
    assert!(refused("cosine", r#"{"cycles": 2}"#).contains("expected `num_cycles`"));
    assert!(refused("cosine_with_restarts", r#"{"num_cycles": 1.5}"#).contains("1.5"));
    assert!(
        refused("warmup_stable_decay", "{}").contains("num_decay_steps of warmup_stable_decay is missing")
    );
    assert!(refused("cosine_with_min_lr", "{}").contains("min_lr of cosine_with_min_lr is missing"));
    refused("cosine_with_min_lr", r#"{"min_lr": 1e-6, "min_lr_rate": 0.1}"#);
    refused("cosine_with_min_lr", r#"{"min_lr": -1e-6}"#);
    refused("polynomial", r#"{"lr_end": 3e-4}"#);
    refused("reduce_lr_on_plateau", r#"{"factor": 1.0}"#);
    refused("warmup_stable_decay", r#"{"num_decay_steps": 3, "decay_type": "steep"}"#);
    // As text, in the way in which PyYAML reads numbers without a dot.
    settings_of(&"polynomial".into(), &serde_json::json!({"lr_end": "1e-6", "power": 2}))
        .validate(false)
        .unwrap();
}

#[test]
fn intervals_below_one_are_shares_of_the_steps() {
    // math.ceil(max_steps * share) in transformers' `compute_steps`.
    for (interval, total, steps) in [(0.1, 95, 10), (0.5, 7, 4), (0.001, 10, 1), (1.0, 10, 1), (20.0, 10, 20)]
    {
        assert_eq!(Interval(interval).of(total), steps);
    }
    assert_eq!(serde_json::to_string(&[Interval(0.25), Interval(500.0)]).unwrap(), "[0.25,500]");
}

#[test]
fn warmup_is_the_ceiling_of_the_share() {
    // math.ceil(total * ratio) in Python: 100 * 0.07 is a little more than 7.
    for (total, ratio, steps) in [(100, 0.07, 8), (10, 0.1, 1), (7, 0.5, 4), (33, 0.03, 1), (1000, 0.1, 100)]
    {
        assert_eq!(Settings { warmup_ratio: ratio, ..Settings::default() }.warmup(total), steps);
        assert_eq!(Settings { warmup_steps: ratio, ..Settings::default() }.warmup(total), steps);
    }
    let both = Settings { warmup_ratio: 0.5, warmup_steps: 3.0, ..Settings::default() };
    assert_eq!(both.warmup(100), 3);
}

#[test]
fn clipping_is_that_of_torch() {
    assert_eq!(clip_coefficient(1.0, 0.5), 1.0);
    assert_eq!(clip_coefficient(1.0, 4.0), 1.0 / (4.0 + 1e-6));
    // Just below the limit the 1e-6 still counts.
    assert!(clip_coefficient(1.0, 1.0) < 1.0);
    assert_eq!(clip_coefficient(0.0, 1e9), 1.0);
}

fn sampler(rows: usize, batch: usize, accumulation: usize, shuffle: bool, data_seed: u64) -> Sampler {
    let settings = Settings {
        per_device_train_batch_size: batch,
        gradient_accumulation_steps: accumulation,
        shuffle_dataset: shuffle,
        data_seed: Some(data_seed),
        ..Settings::default()
    };
    Sampler::new(rows, &settings)
}

#[test]
fn a_step_larger_than_the_data_is_an_epoch() {
    for (batch, accumulation) in
        [(usize::MAX, usize::MAX), (1 << 32, 1 << 32), (1, usize::MAX), (usize::MAX, 1)]
    {
        let mut sampler = sampler(5, batch, accumulation, false, 0);
        for done in 0..3 {
            assert_eq!(sampler.step(done).concat(), [0, 1, 2, 3, 4], "{batch} × {accumulation}");
        }
    }
}

/// The values come from a separate implementation of ChaCha8 and of the shuffle, in Python: a seed means the
/// same order in every release.
#[test]
fn a_seed_gives_one_order() {
    assert_eq!(sampler(12, 1, 1, true, 42).order(0), [8, 7, 9, 6, 2, 11, 1, 0, 10, 4, 3, 5]);
    assert_eq!(sampler(12, 1, 1, true, 42).order(1), [8, 9, 6, 2, 4, 10, 1, 11, 5, 7, 0, 3]);
    assert_eq!(sampler(12, 1, 1, true, 7).order(3), [8, 11, 2, 4, 5, 7, 0, 9, 6, 1, 3, 10]);
}

#[test]
fn every_permutation_is_equally_likely() {
    let mut counts = std::collections::HashMap::new();
    let sampler = sampler(4, 1, 1, true, 5);
    (0..24_000).for_each(|epoch| *counts.entry(sampler.order(epoch)).or_insert(0u32) += 1);
    assert_eq!(counts.len(), 24);
    // A thousand each; six standard deviations are 186.
    assert!(counts.values().all(|n| (814..1186).contains(n)), "{counts:?}");
}

#[test]
fn batches_and_steps_do_not_cross_an_epoch() {
    // 7 rows, batches of 2, 3 batches a step: 4 batches and 2 steps an epoch, the second step of one batch.
    let mut order = sampler(7, 2, 3, false, 0);
    assert_eq!((order.micro_batches_per_epoch(), order.steps_per_epoch()), (4, 2));
    assert_eq!(order.step(0), [vec![0, 1], vec![2, 3], vec![4, 5]]);
    assert_eq!(order.step(1), [vec![6]]);
    assert_eq!(order.step(2), order.step(0), "file order starts over");
    assert_eq!([0, 1, 2, 3].map(|done| order.epoch(done)), [0.0, 0.75, 1.0, 1.75]);

    let mut shuffled = sampler(7, 2, 3, true, 0);
    for epoch in 0..3 {
        let steps = [shuffled.step(2 * epoch), shuffled.step(2 * epoch + 1)];
        let mut seen: Vec<usize> = steps.into_iter().flatten().flatten().collect();
        assert_eq!(seen, shuffled.order(epoch));
        seen.sort_unstable();
        assert_eq!(seen, [0, 1, 2, 3, 4, 5, 6]);
    }
}

#[test]
fn totals_follow_from_epochs_or_steps() {
    let total = |settings: Settings| {
        let settings =
            Settings { per_device_train_batch_size: 2, gradient_accumulation_steps: 3, ..settings };
        Plan::new(&rows(7, 1), &[], &settings).unwrap().total_steps
    };
    assert_eq!(total(Settings::default()), 6);
    assert_eq!(total(Settings { num_train_epochs: 1.2, ..Settings::default() }), 3); // ceil(1.2 · 2)
    assert_eq!(total(Settings { max_steps: Some(17), ..Settings::default() }), 17);
}

#[test]
fn the_plan_holds_the_largest_batch_and_no_more() {
    let train = rows(23, 4);
    let settings = Settings { per_device_train_batch_size: 4, ..Settings::default() };
    let plan = Plan::new(&train, &[], &settings).unwrap();
    let mut sampler = Sampler::new(train.len(), &settings);
    let tokens = |rows: &[usize]| rows.iter().map(|&row| train[row].len()).sum::<usize>();
    let largest = (0..plan.total_steps).flat_map(|step| sampler.step(step)).map(|rows| tokens(&rows)).max();
    assert_eq!(Some(plan.budget.tokens), largest);
    assert_eq!(plan.targets_per_epoch, train.iter().map(|row| row.targets().count() as u64).sum::<u64>());
    assert_eq!(plan.tokens_per_epoch, train.iter().map(|row| row.len() as u64).sum::<u64>());
}

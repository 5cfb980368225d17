//! Learning-rate schedules, clipping, and the rows of each step.

use crate::common::rows;
use suasion_train::sampler::Sampler;
use suasion_train::schedule::{Schedule, warmup_steps};
use suasion_train::step::clip_coefficient;
use suasion_train::{Plan, Scheduler, Settings};

/// Computed in Python by the formulas of transformers' `optimization.py` (3e-4, 3 warm-up steps of 10).
#[test]
fn schedules_are_those_of_transformers() {
    let linear = [
        0.0,
        9.999999999999999e-05,
        0.00019999999999999998,
        0.0003,
        0.0002571428571428571,
        0.00021428571428571427,
        0.0001714285714285714,
        0.00012857142857142855,
        8.57142857142857e-05,
        4.285714285714285e-05,
        0.0,
    ];
    let cosine = [
        0.0,
        9.999999999999999e-05,
        0.00019999999999999998,
        0.0003,
        0.0002851453301853628,
        0.00024352347027881003,
        0.00018337814009344714,
        0.00011662185990655284,
        5.6476529721189974e-05,
        1.4854669814637143e-05,
        0.0,
    ];
    let with_warmup = [0.0, 9.999999999999999e-05, 0.00019999999999999998, 0.0003, 0.0003, 0.0003];
    let schedule = |kind, warmup_steps| Schedule { kind, learning_rate: 3e-4, warmup_steps, total_steps: 10 };
    for (kind, rates) in [
        (Scheduler::Linear, &linear[..]),
        (Scheduler::Cosine, &cosine[..]),
        (Scheduler::ConstantWithWarmup, &with_warmup[..]),
        (Scheduler::Constant, &[3e-4; 4]),
    ] {
        for (step, rate) in rates.iter().enumerate() {
            let ours = schedule(kind, 3).rate(step as u64);
            // Linear and constant are exact; a cosine may differ in its last bit between C libraries.
            let tolerance = if kind == Scheduler::Cosine { 1e-19 } else { 0.0 };
            assert!((ours - rate).abs() <= tolerance, "{kind} at {step}: {ours} instead of {rate}");
        }
    }
    let without: Vec<f64> =
        (0..5).map(|s| Schedule { total_steps: 4, ..schedule(Scheduler::Linear, 0) }.rate(s)).collect();
    assert_eq!(without, [0.0003, 0.000225, 0.00015, 7.5e-05, 0.0]);
}

#[test]
fn warmup_is_the_ceiling_of_the_share() {
    // math.ceil(total * ratio) in Python: 100 * 0.07 is a little more than 7.
    for (total, ratio, steps) in [(100, 0.07, 8), (10, 0.1, 1), (7, 0.5, 4), (33, 0.03, 1), (1000, 0.1, 100)]
    {
        assert_eq!(warmup_steps(&Settings { warmup_ratio: ratio, ..Settings::default() }, total), steps);
        assert_eq!(warmup_steps(&Settings { warmup_steps: ratio, ..Settings::default() }, total), steps);
    }
    let both = Settings { warmup_ratio: 0.5, warmup_steps: 3.0, ..Settings::default() };
    assert_eq!(warmup_steps(&both, 100), 3);
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

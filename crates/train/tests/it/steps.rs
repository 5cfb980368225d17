//! What a step computes: accumulation, recomputation, threads, the loss, and steps without targets.

use crate::common::*;
use suasion_data::Sample;
use suasion_train::{Plan, Report, Scheduler, Settings};

fn train(settings: Settings) -> (Report, Vec<Vec<u32>>) {
    let (rows, (_dir, out)) = (rows(11, 3), folder());
    Job::new(&rows, settings, &out).run_to_bits()
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
        // Adam divides by the gradient's own size, so rounding shows in full where a gradient is nearly zero:
        // most weights agree to 1e-6, and none may be further off than a fraction of a step's 3e-3.
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
    let (_dir, out) = folder();
    let report = Job::new(&train, settings, &out).run().unwrap();
    assert!((report.steps[0].loss.unwrap() - sum / weight).abs() < 1e-6);
    assert_eq!(report.steps[0].targets, targets);
    let all: usize = train.iter().map(|row| row.labels.iter().filter(|l| **l >= 0).count()).sum();
    assert!((targets as usize) < all, "the half-weighted row lost the targets of weight 0");
}

#[test]
fn a_step_without_targets_changes_nothing_and_warns() {
    let mut train = rows(4, 2);
    // In file order the second step has no target.
    for row in &mut train[2..] {
        row.labels.fill(suasion_data::IGNORE);
    }
    let run = |train: &[Sample], steps| {
        let settings = Settings {
            max_steps: Some(steps),
            shuffle_dataset: false,
            lr_scheduler_type: Scheduler::Constant,
            ..quick()
        };
        let (_dir, out) = folder();
        let mut job = Job::new(train, settings, &out);
        let (report, bits) = job.run_to_bits();
        (bits, report, std::mem::take(&mut job.listener.warnings), metrics(&out))
    };
    let (one, ..) = run(&train, 1);
    let (two, report, warnings, lines) = run(&train, 2);
    assert!(one == two, "weights changed in a step without targets");
    assert_eq!(report.skipped_steps, 1);
    assert!(warnings.iter().any(|w| w.contains("step 2 changed nothing")), "{warnings:?}");
    assert!(lines[1]["loss"].is_null() && lines[1]["targets"] == 0, "{}", lines[1]);
    // AdamW's bias correction counts updates: the third step is its second.
    let (three, ..) = run(&train, 3);
    let (twice, ..) = run(&train[..2], 2);
    assert!(three == twice, "two updates on the same rows");
}

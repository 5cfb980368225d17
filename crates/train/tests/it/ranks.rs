//! Ranks of a data-parallel run, as threads of one process.

#[path = "../../../engine/tests/common/threads.rs"]
mod threads;

use crate::common::*;
use std::sync::{Barrier, Mutex};
use suasion_data::Sample;
use suasion_engine::{Collective, Model, SingleRank};
use suasion_train::step::{StepOutcome, step};
use suasion_train::{Error, Plan, Settings};
use threads::Threads;

fn settings() -> Settings {
    Settings { per_device_train_batch_size: 4, gradient_accumulation_steps: 2, ..quick() }
}

/// Steps over the same rows, by each rank's share of the micro-batches of a step.
fn steps(
    rows: &[Sample],
    share: impl Fn(usize) -> std::ops::Range<usize>,
    collective: &dyn Collective,
) -> (Vec<StepOutcome>, Model) {
    let settings = settings();
    let mut model = model(Plan::new(rows, &[], &settings).unwrap().budget);
    let outcomes = (0..3).map(|t| {
        let micro_batches: Vec<Vec<&Sample>> =
            rows[8 * t..8 * t + 8].chunks(4).map(|c| c.iter().collect()).collect();
        let own = &micro_batches[share(t)];
        step(&mut model, own, &settings, 3e-3, t as u64, collective).unwrap()
    });
    (outcomes.collect(), model)
}

fn ranks<T: Send>(run: impl Fn(usize, &dyn Collective) -> T + Sync) -> [T; 2] {
    let (barrier, values) = (Barrier::new(2), Mutex::new(vec![Vec::new(); 2]));
    std::thread::scope(|scope| {
        let spawn = |rank| {
            let (barrier, values, run) = (&barrier, &values, &run);
            scope.spawn(move || run(rank, &Threads { rank, barrier, values }))
        };
        [0, 1].map(spawn).map(|handle| handle.join().unwrap())
    })
}

#[test]
fn two_ranks_equal_one_that_accumulates_twice() {
    let rows = rows(24, 5);
    let (one, model) = steps(&rows, |_| 0..2, &SingleRank);
    // The second step gives everything to one rank: the other takes part without a target.
    let share =
        |rank: usize| move |t: usize| if t == 1 { [0..2, 2..2][rank].clone() } else { rank..rank + 1 };
    let [first, second] = ranks(|rank, collective| steps(&rows, share(rank), collective));
    assert_eq!(first.0, second.0, "all ranks have the same outcome");
    assert!(bits(&first.1) == bits(&second.1), "all ranks end with the same weights");
    for (a, b) in first.0.iter().zip(&one) {
        assert_eq!((a.targets, a.tokens), (b.targets, b.tokens));
        let ((loss, want), (norm, want_norm)) =
            ((a.loss.unwrap(), b.loss.unwrap()), (a.grad_norm, b.grad_norm));
        assert!((loss - want).abs() < 1e-6 * want, "loss {loss} and {want}");
        assert!((norm - want_norm).abs() < 1e-6 * want_norm, "norm {norm} and {want_norm}");
    }
    let weights = |model: &Model| bits(model).into_iter().flatten().map(f32::from_bits).collect::<Vec<_>>();
    let (ours, theirs) = (weights(&first.1), weights(&model));
    // As for accumulation: Adam shows rounding in full where a gradient is nearly zero.
    let off = |limit: f32| ours.iter().zip(&theirs).filter(|(a, b)| (*a - *b).abs() > limit).count();
    assert_eq!(off(3e-4), 0);
    assert!(off(1e-6) < ours.len() / 100, "{} of {}", off(1e-6), ours.len());
}

#[test]
fn a_loss_that_is_not_finite_on_one_rank_ends_all_ranks() {
    let rows = rows(8, 5);
    let errors = ranks(|rank, collective| {
        let settings = settings();
        let mut model = model(Plan::new(&rows, &[], &settings).unwrap().budget);
        let before = bits(&model);
        let name = "model.norm.weight";
        let mut broken = model.parameter(name).unwrap();
        if rank == 1 {
            broken.data[0] = f32::NAN;
            model.set_parameter(name, &broken).unwrap();
        }
        let own: Vec<&Sample> = rows[4 * rank..4 * rank + 4].iter().collect();
        let error = step(&mut model, &[own], &settings, 3e-3, 0, collective).unwrap_err();
        assert!(rank == 1 || bits(&model) == before, "nothing has changed");
        error
    });
    for error in errors {
        assert!(matches!(error, Error::NonFinite { .. }), "{error}");
    }
}

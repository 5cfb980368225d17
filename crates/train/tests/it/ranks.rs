//! Ranks of a data-parallel run, as threads of one process.

#[path = "../../../engine/tests/common/threads.rs"]
mod threads;

use crate::common::*;
use serde_json::Value;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use suasion_data::Sample;
use suasion_engine::{Collective, Model, SingleRank};
use suasion_train::step::{StepOutcome, step};
use suasion_train::{Error, Plan, Resume, Settings, Strategy};
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
    model.share_optimizer(collective).unwrap();
    let outcomes = (0..3).map(|t| {
        let micro_batches: Vec<Vec<&Sample>> =
            rows[8 * t..8 * t + 8].chunks(4).map(|c| c.iter().collect()).collect();
        let own = &micro_batches[share(t)];
        step(&mut model, own, &settings, 3e-3, t as u64, collective).unwrap()
    });
    (outcomes.collect(), model)
}

#[test]
fn two_ranks_equal_one_that_accumulates_twice() {
    let rows = rows(24, 5);
    let (one, model) = steps(&rows, |_| 0..2, &SingleRank);
    // The second step gives everything to one rank: the other takes part without a target.
    let share =
        |rank: usize| move |t: usize| if t == 1 { [0..2, 2..2][rank].clone() } else { rank..rank + 1 };
    let ranks = Threads::run(2, |rank, collective| steps(&rows, share(rank), collective));
    let [first, second] = &ranks[..] else { panic!() };
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
    let errors = Threads::run(2, |rank, collective| {
        let settings = settings();
        let mut model = model(Plan::new(&rows, &[], &settings).unwrap().budget);
        model.share_optimizer(collective).unwrap();
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

/// A run of three epochs, whose steps have 12 rows on any number of ranks.
fn job<'a>(
    train: &'a [Sample],
    eval: &'a [Sample],
    collective: &'a dyn Collective,
    dir: &'a Path,
) -> Job<'a> {
    let settings = Settings {
        per_device_train_batch_size: 2,
        gradient_accumulation_steps: 6 / collective.ranks(),
        num_train_epochs: 3.0,
        warmup_steps: 2.0,
        eval_strategy: Strategy::Steps,
        eval_steps: Some(2.into()),
        save_strategy: Strategy::Steps,
        save_steps: 2.into(),
        num_samples: 1,
        // AdamW does not divide what is nearly zero by what is nearly zero.
        adam_epsilon: 1e-4,
        sample_max_new_tokens: 3,
        ..quick()
    };
    Job { collective, ..Job::new(train, settings, dir).eval(eval) }
}

/// Runs over so many ranks; the reports in their order, with the final weights.
fn over(
    ranks: usize,
    dir: &Path,
    change: &(dyn Fn(&mut Job<'_>) + Sync),
) -> Vec<Result<(suasion_train::Report, Vec<Vec<u32>>), Error>> {
    // The last step of an epoch has 5 rows: of its 3 micro-batches of 2, 2 and 1 some ranks have none.
    let (train, eval) = (rows(29, 5), rows(11, 8));
    Threads::run(ranks, |_, collective| {
        let mut job = job(&train, &eval, collective, dir);
        change(&mut job);
        let mut model = job.model()?;
        let report = job.run_with(&mut model)?;
        Ok((report, bits(&model)))
    })
}

fn stop_after(job: &mut Job<'_>, step: u64) {
    job.stop = Box::leak(Box::new(AtomicBool::new(false)));
    job.listener.stop_after = Some((step, job.stop));
}

/// Numbers that are equal to within 1e-6 of their size, and everything else as it is.
fn near(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(key, a)| b.get(key).is_some_and(|b| near(a, b)))
        }
        (Value::Number(a), Value::Number(b)) => {
            let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
            (a - b).abs() <= 2e-6 * a.abs().max(b.abs())
        }
        (a, b) => a == b,
    }
}

#[test]
fn runs_over_ranks_equal_a_run_that_accumulates() {
    let dir = tempfile::tempdir().unwrap();
    let one = dir.path().join("one");
    over(1, &one, &|_| {}).pop().unwrap().unwrap();
    for ranks in [2, 3] {
        let path = dir.path().join(format!("{ranks}"));
        let reports = over(ranks, &path, &|_| {});
        let reports: Vec<_> = reports.into_iter().map(|report| report.unwrap()).collect();
        assert!(reports.iter().all(|(_, bits)| *bits == reports[0].1), "all ranks end with the same weights");
        let (ours, theirs) = (metrics(&path), metrics(&one));
        assert_eq!(ours.len(), theirs.len());
        // Before the first step the figures are the same to the bit.
        assert_eq!(ours[0], theirs[0]);
        for (ours, theirs) in ours.iter().zip(&theirs) {
            assert!(near(ours, theirs), "{ranks} ranks: {ours}\n{theirs}");
        }
        assert_eq!(checkpoints(&path), checkpoints(&one));
        let files = |dir: &Path| {
            let entries =
                std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
            entries.collect::<std::collections::BTreeSet<_>>()
        };
        assert_eq!(files(&path), files(&one));
        assert_eq!(files(&path.join("checkpoint-4")), files(&one.join("checkpoint-4")));
        // Again, and to the bit.
        let again = dir.path().join(format!("{ranks} again"));
        let second: Vec<_> = over(ranks, &again, &|_| {}).into_iter().map(|report| report.unwrap()).collect();
        assert!(second[0].1 == reports[0].1);
        assert_eq!(metrics(&again), metrics(&path));
    }
}

#[test]
fn a_run_goes_on_with_another_number_of_ranks() {
    let dir = tempfile::tempdir().unwrap();
    let [whole, parts] = ["whole", "parts"].map(|name| dir.path().join(name));
    over(2, &whole, &|_| {});
    // Two ranks begin, and are stopped by the flag of the second.
    let stopped = over(2, &parts, &|job| {
        if job.collective.rank() == 1 {
            stop_after(job, 3);
        }
    });
    for report in stopped {
        assert!(report.unwrap().0.interrupted, "all ranks are stopped");
    }
    assert_eq!(checkpoints(&parts), [2, 3]);
    for (ranks, to) in [(3, 5), (1, 7), (2, 9)] {
        let reports = over(ranks, &parts, &|job| {
            job.resume = Resume::Newest;
            if to < 9 {
                stop_after(job, to);
            }
        });
        for report in reports {
            let report = report.unwrap().0;
            assert_eq!((report.step, report.interrupted), (to, to < 9));
        }
    }
    for (ours, theirs) in metrics(&parts).iter().zip(&metrics(&whole)) {
        assert!(near(ours, theirs), "{ours}\n{theirs}");
    }
    // The step must stay as large.
    let wrong = over(3, &parts, &|job| {
        job.resume = Resume::From(parts.join("checkpoint-5"));
        job.settings.gradient_accumulation_steps = 4;
    });
    for error in wrong {
        let text = error.unwrap_err().to_string();
        let want = "gradient_accumulation_steps: was 2 on each of 3 ranks, is 4 on each of 3 ranks";
        assert!(text.contains(want), "{text}");
    }
}

/// Dropout and noise belong to a micro-batch, not to the rank that computes it; the average of the weights, the best
/// checkpoint and the early end are those of one rank.
#[test]
fn what_is_drawn_and_what_is_decided_do_not_depend_on_ranks() {
    let dir = tempfile::tempdir().unwrap();
    let change = |job: &mut Job<'_>| {
        job.settings.neftune_noise_alpha = Some(5.0);
        job.settings.ema_decay = Some(0.8);
        job.settings.load_best_model_at_end = true;
        job.settings.early_stopping_patience = Some(1);
        job.settings.early_stopping_threshold = 0.05;
        job.settings.optim = suasion_train::Optim::Adafactor;
        job.settings.learning_rate = 3e-2;
        job.settings.save_total_limit = Some(1);
    };
    let [one, three] = ["one", "three"].map(|name| dir.path().join(name));
    let (alone, _) = over(1, &one, &change).pop().unwrap().unwrap();
    for report in over(3, &three, &change) {
        let (report, _) = report.unwrap();
        assert_eq!((report.step, report.stopped_early), (alone.step, alone.stopped_early));
    }
    for (ours, theirs) in metrics(&three).iter().zip(&metrics(&one)) {
        assert!(near(ours, theirs), "{ours}\n{theirs}");
    }
    assert_eq!(checkpoints(&three), checkpoints(&one));
}

#[test]
fn ranks_that_differ_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |name: &str, text: &str, change: &(dyn Fn(&mut Job<'_>) + Sync)| {
        let path = dir.path().join(name);
        for error in over(2, &path, &|job| {
            if job.collective.rank() == 1 {
                change(job)
            }
        }) {
            let error = error.map(|_| ()).unwrap_err();
            assert!(
                error.is_usage() && error.tag() == "E-RANK" && error.to_string().contains(text),
                "{error}"
            );
        }
        // Nothing was written beside the lock.
        assert!(checkpoints(&path).is_empty() && !path.join("metrics.jsonl").exists());
    };
    refused("rate", "rank 1 and rank 0 differ in learning_rate: 0.001 and 0.003", &|job| {
        job.settings.learning_rate = 1e-3;
    });
    refused("seed", "differ in seed: 7 and 42", &|job| job.settings.seed = 7);
    refused("data", "differ in the data's fingerprint: f2 and f1", &|job| {
        job.identity.data_fingerprint = "f2".into();
    });
    refused("rows", "differ in the training rows: 28 (", &|job| job.train = &job.train[1..]);
}

#[test]
fn a_checkpoint_that_cannot_be_written_does_not_part_the_ranks() {
    let dir = tempfile::tempdir().unwrap();
    // A file of the temporary folder's name.
    let name = format!(".suasion-tmp-checkpoint-4.{}.new", std::process::id());
    let block = |path: &Path| Some((3, path.join(&name)));
    let path = dir.path().join("goes on");
    for report in over(2, &path, &|job| {
        if job.collective.rank() == 0 {
            job.listener.block_at = block(&path);
        }
    }) {
        assert_eq!(report.unwrap().0.step, 9);
    }
    assert_eq!(checkpoints(&path), [2, 6, 8, 9]);
    let path = dir.path().join("ends");
    let errors: Vec<String> = over(2, &path, &|job| {
        job.settings.on_save_error = suasion_train::OnSaveError::Stop;
        if job.collective.rank() == 0 {
            job.listener.block_at = block(&path);
        }
    })
    .into_iter()
    .map(|report| report.map(|_| ()).unwrap_err().to_string())
    .collect();
    assert!(errors[0].contains("checkpoint-4"), "{errors:?}");
    assert!(errors[1].contains("rank 0 was lost"), "{errors:?}");
}

/// `DistributedDataParallel` over two processes (gloo), whose losses PyTorch computed (`generate/make_ranks.py`).
#[test]
fn two_ranks_have_the_losses_of_pytorchs_distributed_data_parallel() {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models");
    let golden = json(models.join("ranks.json"));
    let row = |(n, row): (usize, &Value)| {
        let list = |key: &str| row[key].as_array().unwrap().iter().map(|v| v.as_i64().unwrap());
        let labels: Vec<i32> = list("labels").map(|label| label as i32).collect();
        let origin = |label: &i32| match *label {
            suasion_data::IGNORE => suasion_data::Origin::Scaffold,
            _ => suasion_data::Origin::Response { turn: 0 },
        };
        let origins = labels.iter().map(origin).collect();
        let input_ids = list("input_ids").map(|id| id as u32).collect();
        Sample { id: id(n), input_ids, labels, origins, weights: None, pack: None }
    };
    let rows: Vec<Sample> = golden["rows"].as_array().unwrap().iter().enumerate().map(row).collect();
    let sgd = Settings {
        optim: suasion_train::Optim::Sgd,
        optim_args: Some("momentum=0.9".into()),
        learning_rate: 0.1,
        ..Settings::default()
    };
    let adamw = Settings { learning_rate: 1e-3, weight_decay: 0.01, decay_all: true, ..Settings::default() };
    // AdamW divides by roots of second moments: where a gradient is nearly zero, rounding shows in full.
    for (name, settings, tolerance) in [("sgd", sgd, 1e-6), ("adamw", adamw, 1e-5)] {
        let want = &golden["runs"][name];
        let settings = Settings {
            per_device_train_batch_size: 2,
            lr_scheduler_type: suasion_train::Scheduler::Constant,
            num_train_epochs: 1.0,
            shuffle_dataset: false,
            save_strategy: Strategy::No,
            ..settings
        };
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("run");
        let reports = Threads::run(2, |_, collective| {
            let mut job = Job { collective, ..Job::new(&rows, settings.clone(), &out).eval(&rows) };
            let plan = Plan::of_ranks(&rows, &rows, &settings, 2).unwrap();
            let arch = suasion_engine::Architecture::from_dir(&models.join("llama")).unwrap();
            let mut model = Model::new(arch, suasion_engine::Device::cpu(), plan.budget).unwrap();
            model.load_weights(&models.join("llama")).unwrap();
            job.run_with(&mut model).unwrap()
        });
        let near = |what: &str, got: f64, want: f64, tolerance: f64| {
            assert!((got / want - 1.0).abs() < tolerance, "{name}, {what}: {got} and PyTorch's {want}");
        };
        for report in &reports {
            assert_eq!(report.steps.len(), 6);
            for (n, step) in report.steps.iter().enumerate() {
                near(
                    &format!("loss {n}"),
                    step.loss.unwrap(),
                    want["losses"][n].as_f64().unwrap(),
                    tolerance,
                );
                let norm = want["grad_norms"][n].as_f64().unwrap();
                near(&format!("norm {n}"), step.grad_norm, norm, 10.0 * tolerance);
            }
            let after = report.after.as_ref().unwrap();
            near("the final loss", after.loss, want["final"].as_f64().unwrap(), tolerance);
        }
    }
}

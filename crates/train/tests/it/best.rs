//! The best evaluation, the end of a run that no longer improves, and what evaluations record.

use crate::common::*;
use suasion_train::{Interval, OnSaveError, Resume, Scheduler, Settings, Strategy};

/// A run that overfits: its evaluation loss falls, then rises.
fn overfitting() -> Settings {
    Settings {
        max_steps: Some(60),
        learning_rate: 2e-2,
        eval_strategy: Strategy::Steps,
        eval_steps: Some(5.into()),
        save_steps: 20.into(),
        save_strategy: Strategy::Steps,
        ..quick()
    }
}

#[test]
fn the_best_weights_are_kept_between_saves_and_restored() {
    let (train, held_out, (_dir, out)) = (rows(6, 1), rows(12, 77), folder());
    let settings = Settings { load_best_model_at_end: true, ..overfitting() };
    let report = Job::new(&train, settings, &out).eval(&held_out).run().unwrap();
    let best = report.evals.iter().min_by(|a, b| a.eval_loss.total_cmp(&b.eval_loss)).unwrap();
    assert!(best.step > 0 && best.step < 60 && best.step % 20 != 0, "step {}", best.step);
    assert_eq!((report.final_step, report.best.as_ref().map(|best| best.step)), (best.step, Some(best.step)));
    assert_eq!(report.after.as_ref().unwrap().loss, best.eval_loss);
    // Of the checkpoints that only an evaluation asked for, the last is kept.
    assert_eq!(checkpoints(&out), {
        let mut all = vec![0, 20, 40, 60, best.step];
        all.sort_unstable();
        all
    });
}

#[test]
fn a_run_ends_when_its_evaluations_no_longer_improve() {
    let (train, held_out, (_dir, out)) = (rows(6, 1), rows(12, 77), folder());
    let settings =
        Settings { early_stopping_patience: Some(2), load_best_model_at_end: true, ..overfitting() };
    let mut job = Job::new(&train, settings.clone(), &out).eval(&held_out);
    let (report, whole) = job.run_to_bits();
    assert!(report.stopped_early && report.step < 60, "step {}", report.step);
    let losses: Vec<f64> = report.evals.iter().skip(1).map(|eval| eval.eval_loss).collect();
    let (last, before) = losses.split_at(losses.len() - 2);
    let lowest = last.iter().copied().fold(f64::INFINITY, f64::min);
    assert!(before.iter().all(|loss| *loss >= lowest), "{losses:?}");
    assert_eq!(checkpoints(&out).last(), Some(&report.step), "the last step has a checkpoint");

    // What was counted is in the checkpoint: a run that resumes in between ends at the same step.
    let (_dir, parts) = folder();
    let flag = std::sync::atomic::AtomicBool::new(false);
    let stop = report.step - 3;
    Job::new(&train, settings.clone(), &parts).eval(&held_out).stop_after(stop, &flag).run().unwrap();
    let mut job = Job::new(&train, settings, &parts).eval(&held_out).resume(Resume::Newest);
    let (resumed, bits) = job.run_to_bits();
    assert_eq!(
        (resumed.step, resumed.final_step, resumed.stopped_early),
        (report.step, report.final_step, true)
    );
    assert!(bits == whole);
}

#[test]
fn another_metric_can_be_the_best() {
    let (train, held_out, (_dir, out)) = (rows(6, 1), rows(12, 77), folder());
    let settings = Settings {
        metric_for_best_model: Some("eval_mean_token_accuracy".into()),
        load_best_model_at_end: true,
        ..overfitting()
    };
    let report = Job::new(&train, settings, &out).eval(&held_out).run().unwrap();
    let highest = report.evals.iter().map(|eval| eval.eval_mean_token_accuracy).fold(0.0, f64::max);
    let first = report.evals.iter().find(|eval| eval.eval_mean_token_accuracy == highest).unwrap();
    assert_eq!((report.final_step, report.best.unwrap().metric), (first.step, highest));
    assert_eq!(json(out.join("trainer_state.json"))["best_metric"], highest);
}

#[test]
fn a_plateau_lowers_the_rate_of_a_run_and_of_its_resume() {
    let (train, held_out, (_dir, out)) = (rows(6, 1), rows(12, 77), folder());
    let settings = Settings {
        lr_scheduler_type: Scheduler::ReduceLrOnPlateau,
        lr_scheduler_kwargs: [("patience".into(), 0.into()), ("factor".into(), 0.5.into())].into(),
        ..overfitting()
    };
    let (report, whole) = Job::new(&train, settings.clone(), &out).eval(&held_out).run_to_bits();
    let last = report.steps.last().unwrap().learning_rate;
    assert!(report.steps[0].learning_rate == 2e-2 && last < 2e-2, "{last}");
    std::fs::remove_dir_all(out.join("checkpoint-60")).unwrap();
    let mut job = Job::new(&train, settings, &out).eval(&held_out).resume(Resume::Newest);
    let (resumed, bits) = job.run_to_bits();
    assert_eq!(resumed.steps.last().unwrap().learning_rate, last);
    assert!(bits == whole);
}

#[test]
fn evaluations_wait_and_shares_count_steps() {
    let (train, held_out, (_dir, out)) = (rows(6, 1), rows(4, 77), folder());
    let settings = Settings {
        max_steps: Some(20),
        eval_steps: Some(Interval(0.25)),
        eval_delay: 7.0,
        save_steps: Interval(0.3),
        logging_steps: Interval(0.5),
        ..overfitting()
    };
    let report = Job::new(&train, settings, &out).eval(&held_out).run().unwrap();
    assert_eq!(report.evals.iter().map(|eval| eval.step).collect::<Vec<_>>(), [0, 10, 15, 20]);
    assert_eq!(report.steps.iter().map(|step| step.step).collect::<Vec<_>>(), [1, 10, 20]);
    assert_eq!(checkpoints(&out), [6, 12, 18, 20]);
}

#[test]
fn a_checkpoint_of_the_model_alone_cannot_be_resumed() {
    let (train, (_dir, out)) = (rows(6, 1), folder());
    let settings =
        Settings { max_steps: Some(4), save_steps: 2.into(), save_only_model: true, ..overfitting() };
    let settings = Settings { eval_strategy: Strategy::No, ..settings };
    let mut job = Job::new(&train, settings.clone(), &out);
    let mut model = job.model().unwrap();
    model.set_weight_type(suasion_engine::WeightType::BF16);
    job.run_with(&mut model).unwrap();
    assert_eq!(checkpoints(&out), [2, 4]);
    assert!(!out.join("checkpoint-4/optimizer.safetensors").exists());
    // In the type of the final model, and equal to it.
    assert!(bytes(out.join("checkpoint-4/model.safetensors")) == bytes(out.join("model.safetensors")));
    assert_eq!(json(out.join("checkpoint-4/config.json"))["dtype"], "bfloat16");
    for resume in [Resume::Newest, Resume::From(out.join("checkpoint-4"))] {
        let error = Job::new(&train, settings.clone(), &out).resume(resume).run().unwrap_err();
        assert!(error.to_string().contains("save_only_model"), "{error}");
    }
    // A run that is interrupted writes one that can.
    let (_dir, out) = folder();
    let flag = std::sync::atomic::AtomicBool::new(false);
    let report = Job::new(&train, settings.clone(), &out).stop_after(2, &flag).run().unwrap();
    assert!(report.interrupted && out.join("checkpoint-2/optimizer.safetensors").exists());
    Job::new(&train, settings, &out).resume(Resume::Newest).run().unwrap();
}

/// The accuracy and the entropy of a step and of an evaluation over the same rows, from the same weights.
#[test]
fn accuracy_and_entropy_are_those_of_the_targets() {
    let (train, (_dir, out)) = (rows(2, 1), folder());
    let settings = Settings { max_steps: Some(1), num_samples: 2, sample_max_new_tokens: 5, ..overfitting() };
    let report = Job::new(&train, settings, &out).eval(&train).run().unwrap();
    let (step, eval) = (&report.steps[0], &report.evals[0]);
    assert_eq!(step.mean_token_accuracy, Some(eval.eval_mean_token_accuracy));
    assert!((step.entropy.unwrap() - eval.eval_entropy).abs() < 1e-6);
    // Nearly uniform over 96 tokens.
    assert!((eval.eval_entropy - 96f64.ln()).abs() < 0.05, "{}", eval.eval_entropy);
    assert_eq!(eval.eval_samples.len(), 2);
    let sample = &eval.eval_samples[0];
    assert_eq!(sample.prompt, format!("{:?}", suasion_train::prompt_ids(&train[0])));
    assert_eq!(sample.reply.split(',').count(), 5);
    assert!(!sample.reference.contains("2]"), "the stop token is not the reply's: {}", sample.reference);
}

/// A checkpoint that cannot be written (its name is taken by a file that cannot be replaced) does not end the run.
#[test]
fn a_checkpoint_that_cannot_be_written_does_not_end_the_run() {
    let (train, (_dir, out)) = (rows(6, 1), folder());
    let settings =
        Settings { max_steps: Some(6), save_steps: 2.into(), eval_strategy: Strategy::No, ..overfitting() };
    let whole = Job::new(&train, settings.clone(), &out).run_to_bits().1;
    for (on_save_error, ends) in [(OnSaveError::Continue, false), (OnSaveError::Stop, true)] {
        let (_dir, out) = folder();
        // The temporary folder's name is a file's.
        std::fs::create_dir_all(&out).unwrap();
        let blocked = out.join(format!(".suasion-tmp-checkpoint-4.{}.new", std::process::id()));
        let mut job = Job::new(&train, Settings { on_save_error, ..settings.clone() }, &out);
        job.listener.block_at = Some((3, blocked));
        let mut model = job.model().unwrap();
        match job.run_with(&mut model) {
            Err(error) => assert!(ends && error.tag() == "E-IO", "{error}"),
            Ok(report) => {
                assert!(!ends && report.warnings.iter().any(|w| w.contains("the run goes on")), "{report:?}");
                assert_eq!(checkpoints(&out), [2, 6]);
                assert!(bits(&model) == whole);
            }
        }
    }
}

/// A folder that is removed during a run is made again by the next checkpoint, with what belongs into it.
#[test]
fn a_folder_that_vanishes_is_made_again() {
    let (train, (_dir, out)) = (rows(6, 1), folder());
    let settings =
        Settings { max_steps: Some(6), save_steps: 2.into(), eval_strategy: Strategy::No, ..overfitting() };
    let mut job = Job::new(&train, settings, &out);
    job.listener.remove_at = Some((3, out.clone()));
    let report = job.run().unwrap();
    assert!(
        report.warnings.iter().any(|w| w.contains("was removed during the run")),
        "{:?}",
        report.warnings
    );
    assert_eq!(checkpoints(&out), [4, 6]);
    assert_eq!(metrics(&out).len(), 6, "all lines, those from before too");
}

/// A comparison has no evaluations during training: what depends on them is refused, not ignored.
#[test]
fn a_comparison_refuses_what_needs_evaluations() {
    let (train, held_out) = (rows(4, 1), rows(4, 77));
    for settings in [
        Settings { early_stopping_patience: Some(2), ..overfitting() },
        Settings { lr_scheduler_type: Scheduler::ReduceLrOnPlateau, ..overfitting() },
    ] {
        let settings = suasion_train::CompareSettings { train: settings, ..Default::default() };
        let mut make = |budget| Ok(model(budget));
        let mut silent = suasion_train::Silent;
        let error =
            suasion_train::compare(&mut make, None, &train, &held_out, &settings, &mut silent, &NEVER)
                .unwrap_err();
        assert!(error.is_usage() && error.to_string().contains("a comparison has none"), "{error}");
    }
}

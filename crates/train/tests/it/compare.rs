//! The comparison of the two objectives, on rows for which the outcome is known.

use crate::common::*;
use std::sync::atomic::AtomicBool;
use suasion_train::compare::{Finished, all_tokens, compare};
use suasion_train::{CompareSettings, Error, ProbeSettings, Settings, Silent};

fn settings() -> CompareSettings {
    CompareSettings {
        train: Settings { num_train_epochs: 8.0, ..quick() },
        probe: ProbeSettings { rows: 4, given: 2, new: 8, ngram: 2 },
    }
}

#[test]
fn training_on_all_tokens_learns_the_prompt_and_on_responses_only_does_not() {
    let (train, held_out) = (rows(32, 1), rows(10, 99));
    let mut starts = Vec::new();
    let mut make = |budget| {
        let model = model(budget);
        starts.push(bits(&model));
        Ok(model)
    };
    let c = compare(&mut make, None, &train, &held_out, &settings(), &mut Silent, &NEVER).unwrap();
    assert!(starts.len() == 2 && starts[0] == starts[1]);
    assert_eq!((c.train_rows, c.held_out_rows, c.steps), (32, 10, 128));

    // The system prompt is the same in every row: training on all tokens memorises it, training on responses
    // only has no label on it.
    let system = |arm: &suasion_train::compare::Arm| arm.evaluation.sections["system"].loss;
    assert!(system(&c.all_tokens) < 0.3, "{}", system(&c.all_tokens));
    assert!(system(&c.response_only) > 2.0, "{}", system(&c.response_only));
    let reproduced = |arm: &suasion_train::compare::Arm| arm.reproduction.sections["system"];
    let (theirs, ours) = (reproduced(&c.all_tokens), reproduced(&c.response_only));
    // Two of six tokens are given: three bigrams are left in each of four rows with different prompts.
    assert_eq!((theirs.probes, theirs.tokens, theirs.ngrams), (4, 16, 12));
    assert_eq!((theirs.ngrams_reproduced, theirs.exact_tokens), (12, 16));
    assert!(ours.ngrams_reproduced < 6, "{ours:?}");

    // Both read the same rows; each learned its own targets.
    let per_epoch: u64 = train.iter().map(|row| row.targets().count() as u64).sum();
    assert_eq!(c.response_only.targets_trained, 8 * per_epoch);
    let all: u64 = train.iter().map(|row| row.len() as u64 - 1).sum();
    assert_eq!(c.all_tokens.targets_trained, 8 * all);
    assert!(c.response_only.evaluation.loss < c.before.evaluation.loss);

    // The difference is that of the two evaluations, whatever its sign, and the verdict states it.
    let d = c.response_difference;
    assert!((d.mean - (c.all_tokens.evaluation.loss - c.response_only.evaluation.loss)).abs() < 1e-9);
    assert_eq!((d.rows, d.prompts), (10, 10));
    assert!(d.standard_error.unwrap() > 0.0);
    // Ten prompts: Student's t with nine degrees of freedom.
    let sure = d.mean.abs() > 2.262 * d.standard_error.unwrap();
    let expected = match (sure, d.mean > 0.0) {
        (false, _) => "do not show which is better",
        (true, true) => "Training on responses only predicts them better",
        (true, false) => "Training on all tokens predicts them better",
    };
    assert!(c.verdict[0].contains(expected), "{}", c.verdict[0]);
    assert!(
        c.verdict.iter().any(|line| line.contains("learned more of the prompts' text")),
        "{:?}",
        c.verdict
    );
    serde_json::to_string(&c).unwrap();
}

/// With the same labels for both objectives the two models are the same, and the verdict prefers neither.
#[test]
fn equal_models_give_no_verdict() {
    let fully_supervised: Vec<_> = rows(8, 1).iter().map(all_tokens).collect();
    let held_out = rows(5, 99);
    let short = CompareSettings { train: Settings { max_steps: Some(3), ..quick() }, ..settings() };
    let mut make = |budget| Ok(model(budget));
    let c = compare(&mut make, None, &fully_supervised, &held_out, &short, &mut Silent, &NEVER).unwrap();
    assert_eq!(c.response_difference.mean, 0.0);
    assert!(c.verdict[0].contains("do not show which is better"), "{}", c.verdict[0]);
}

#[test]
fn a_few_prompts_give_no_verdict() {
    let (train, held_out) = (rows(32, 1), rows(4, 99));
    let short = CompareSettings { train: Settings { max_steps: Some(16), ..quick() }, ..settings() };
    let mut make = |budget| Ok(model(budget));
    let c = compare(&mut make, None, &train, &held_out, &short, &mut Silent, &NEVER).unwrap();
    assert_eq!(c.response_difference.prompts, 4);
    assert!(c.verdict[0].contains("4 prompts do not show which is better"), "{}", c.verdict[0]);
    // The interval is the difference ± t(3) standard errors.
    let d = c.response_difference;
    let low = d.mean - 3.182 * d.standard_error.unwrap();
    assert!(c.verdict[0].contains(&format!("interval from {low:+.4} to ")), "{}", c.verdict[0]);
}

/// A model that was trained before is measured: nothing is trained twice, and the result is the same.
#[test]
fn a_finished_model_is_not_trained_again() {
    let (train, held_out) = (rows(16, 1), rows(8, 99));
    let short = CompareSettings { train: Settings { max_steps: Some(6), ..quick() }, ..settings() };
    let mut make = |budget| Ok(model(budget));
    let whole = compare(&mut make, None, &train, &held_out, &short, &mut Silent, &NEVER).unwrap();
    // Train the responses' model apart, by the run's own loop.
    let (_keep, folder) = folder();
    let report = Job::new(&train, short.train.clone(), &folder).run().unwrap();
    let mut read = |budget| {
        let mut model = model(budget);
        model.load_weights(&folder)?;
        Ok(model)
    };
    let finished = Finished {
        make: &mut read,
        targets: report.targets,
        last_train_loss: report.steps.last().and_then(|step| step.loss),
        seconds: report.seconds,
    };
    let mut listener = Listener::default();
    let c = compare(&mut make, Some(finished), &train, &held_out, &short, &mut listener, &NEVER).unwrap();
    assert_eq!(listener.names.iter().filter(|name| name.starts_with("step")).count(), 6);
    assert_eq!(c.response_only.evaluation, whole.response_only.evaluation);
    assert_eq!(c.response_only.targets_trained, whole.response_only.targets_trained);
    assert_eq!(c.response_only.last_train_loss, whole.response_only.last_train_loss);
    assert_eq!(c.all_tokens.evaluation, whole.all_tokens.evaluation);
    assert_eq!(c.verdict, whole.verdict);
}

#[test]
fn all_tokens_labels_everything_but_padding() {
    let mut row = rows(1, 1).remove(0);
    row.origins[2] = suasion_data::Origin::Padding;
    row.weights = Some(vec![0.5; row.len()]);
    let twin = all_tokens(&row);
    assert_eq!(twin.labels[2], -100);
    assert!((0..row.len()).filter(|i| *i != 2).all(|i| twin.labels[i] == row.input_ids[i] as i32));
    assert_eq!(twin.weights, None);
}

#[test]
fn the_stop_flag_ends_a_comparison() {
    let (train, held_out) = (rows(8, 1), rows(4, 99));
    let flag = AtomicBool::new(false);
    let mut listener = Listener { stop_after: Some((2, &flag)), ..Listener::default() };
    let mut make = |budget| Ok(model(budget));
    let result = compare(&mut make, None, &train, &held_out, &settings(), &mut listener, &flag);
    assert!(matches!(result, Err(Error::Interrupted)));
    assert_eq!(listener.names.iter().filter(|name| name.starts_with("step")).count(), 2);
}

//! The comparison of both objectives, on rows where the outcome is known.

use crate::common::*;
use std::sync::atomic::AtomicBool;
use suasion_train::compare::{all_tokens, compare};
use suasion_train::{CompareSettings, Error, ProbeSettings, Settings, Silent};

fn settings() -> CompareSettings {
    CompareSettings {
        train: Settings { num_train_epochs: 8.0, ..quick() },
        probe: ProbeSettings { rows: 4, given: 2, new: 8, ngram: 2 },
    }
}

#[test]
fn all_tokens_learn_the_prompt_and_responses_only_do_not() {
    let (train, held_out) = (rows(32, 1), rows(10, 99));
    let mut starts = Vec::new();
    let mut make = |budget| {
        let model = model(budget);
        starts.push(bits(&model));
        Ok(model)
    };
    let c = compare(&mut make, &train, &held_out, &settings(), &mut Silent, &NEVER).unwrap();
    assert!(starts.len() == 2 && starts[0] == starts[1]);
    assert_eq!((c.train_rows, c.held_out_rows, c.steps), (32, 10, 128));

    // The system part is the same in every row: all tokens learn it by heart, responses only never see its labels.
    let system = |arm: &suasion_train::compare::Arm| arm.evaluation.sections["system"].loss;
    assert!(system(&c.all_tokens) < 0.3, "{}", system(&c.all_tokens));
    assert!(system(&c.response_only) > 2.0, "{}", system(&c.response_only));
    let reproduced = |arm: &suasion_train::compare::Arm| arm.reproduction.sections["system"];
    let (theirs, ours) = (reproduced(&c.all_tokens), reproduced(&c.response_only));
    // Two of six tokens are given: three bigrams are left in each of four rows with different prompts.
    assert_eq!((theirs.probes, theirs.tokens, theirs.ngrams), (4, 16, 12));
    assert_eq!((theirs.ngrams_reproduced, theirs.exact_tokens), (12, 16));
    assert!(ours.ngrams_reproduced < 6, "{ours:?}");

    // Both read the same rows; each learned from its own targets.
    let per_epoch: u64 = train.iter().map(|row| row.targets().count() as u64).sum();
    assert_eq!(c.response_only.targets_trained, 8 * per_epoch);
    let all: u64 = train.iter().map(|row| row.len() as u64 - 1).sum();
    assert_eq!(c.all_tokens.targets_trained, 8 * all);
    assert!(c.response_only.evaluation.loss < c.before.evaluation.loss);

    // The difference is that of the two evaluations, whichever way it falls, and the verdict quotes it.
    let d = c.response_difference;
    assert!((d.mean - (c.all_tokens.evaluation.loss - c.response_only.evaluation.loss)).abs() < 1e-9);
    assert_eq!((d.rows, d.prompts), (10, 10));
    assert!(d.standard_error.unwrap() > 0.0);
    let sure = d.mean.abs() > 2.0 * d.standard_error.unwrap();
    let expected = match (sure, d.mean > 0.0) {
        (false, _) => "cannot tell which is better",
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

/// With every row trained on the same labels there is nothing to tell apart, and the verdict says so.
#[test]
fn no_difference_is_called_none() {
    let fully_supervised: Vec<_> = rows(8, 1).iter().map(all_tokens).collect();
    let held_out = rows(5, 99);
    let short = CompareSettings { train: Settings { max_steps: Some(3), ..quick() }, ..settings() };
    let mut make = |budget| Ok(model(budget));
    let c = compare(&mut make, &fully_supervised, &held_out, &short, &mut Silent, &NEVER).unwrap();
    assert_eq!(c.response_difference.mean, 0.0);
    assert!(c.verdict[0].contains("cannot tell which is better"), "{}", c.verdict[0]);
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
fn it_can_be_stopped() {
    let (train, held_out) = (rows(8, 1), rows(4, 99));
    let flag = AtomicBool::new(false);
    let mut listener = Listener { stop_after: Some((2, &flag)), ..Listener::default() };
    let mut make = |budget| Ok(model(budget));
    let result = compare(&mut make, &train, &held_out, &settings(), &mut listener, &flag);
    assert!(matches!(result, Err(Error::Interrupted)));
    assert_eq!(listener.names.iter().filter(|name| name.starts_with("step")).count(), 2);
}

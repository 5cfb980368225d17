//! A diagnosis of models that are trained here in each way, from weights that know nothing.

use crate::common::*;
use suasion_data::{IGNORE, Origin, Sample, Section};
use suasion_engine::{Device, Model};
use suasion_train::compare::all_tokens;
use suasion_train::diagnose::{
    Cause, DiagnoseSettings, Diagnosis, Measurement, Names, Verdict, budget, chosen, diagnose, measure,
};
use suasion_train::{Settings, Strategy};

/// A constant system part, a task of random tokens, a header, and a response that counts on from the task's first token.
/// No id of a prompt occurs in a response.
fn rows(n: usize, seed: u64) -> Vec<Sample> {
    let mut numbers = Numbers(seed);
    let row = |row: usize| {
        let mut tokens = vec![(1, Origin::Scaffold)];
        let prompt = |section| Origin::Prompt { turn: 0, section };
        tokens.extend((0..10).map(|i| (10 + i, prompt(Section::System))));
        let first = numbers.below(12);
        tokens.push((20 + first, prompt(Section::Task)));
        tokens.extend((0..14).map(|_| (20 + numbers.below(12), prompt(Section::Task))));
        tokens.extend((0..4).map(|i| (4 + i, Origin::Scaffold)));
        tokens.extend(
            (0..10 + numbers.below(8)).map(|i| (40 + (first + i) % 40, Origin::Response { turn: 1 })),
        );
        tokens.push((STOP, Origin::EndOfTurn { turn: 1 }));
        let label = |&(id, origin): &(u32, Origin)| if origin.supervised() { id as i32 } else { IGNORE };
        Sample {
            id: id(row),
            labels: tokens.iter().map(label).collect(),
            input_ids: tokens.iter().map(|(id, _)| *id).collect(),
            origins: tokens.iter().map(|(_, origin)| *origin).collect(),
            weights: None,
            pack: None,
        }
    };
    (0..n).map(row).collect()
}

/// The rows with other labels: `change` gets a token's position, its offset from the start of the response, and its label.
fn relabelled(rows: &[Sample], change: impl Fn(&Sample, usize, i64) -> i32) -> Vec<Sample> {
    let one = |sample: &Sample| {
        let start = sample.origins.iter().position(|o| matches!(o, Origin::Response { .. })).unwrap() as i64;
        let labels = (0..sample.len()).map(|i| change(sample, i, i as i64 - start)).collect();
        Sample { labels, ..sample.clone() }
    };
    rows.iter().map(one).collect()
}

fn measured(rows: &[Sample], weights: Option<&std::path::Path>) -> Measurement {
    let budget = budget(rows, 8).unwrap();
    let mut measured = match weights {
        None => model(budget),
        Some(dir) => {
            let mut model = Model::new(architecture(), Device::cpu(), budget).unwrap();
            model.load_weights(dir).unwrap();
            model
        }
    };
    measure(&mut measured, rows, &DiagnoseSettings::default(), 8, &NEVER, &mut |_| {}).unwrap()
}

/// The diagnosis of a model that was trained on these rows, judged on others like them.
fn of(train: &[Sample], learning_rate: f64) -> Diagnosis {
    let (_dir, run) = folder();
    let settings = Settings {
        max_steps: Some(80),
        per_device_train_batch_size: 8,
        learning_rate,
        save_strategy: Strategy::No,
        ..quick()
    };
    Job::new(train, settings, &run).run().unwrap();
    let like = rows(40, 5);
    let like = chosen(&like, 32).unwrap();
    let names = Names { base: "B".into(), tuned: "T".into(), data: "D".into() };
    diagnose(&like, &like, measured(&like, None), measured(&like, Some(&run)), &names)
}

#[test]
fn each_way_of_training_is_told() {
    let train = rows(64, 3);
    let kept = |sample: &Sample, i: usize| sample.labels[i];
    let all = of(&train.iter().map(all_tokens).collect::<Vec<_>>(), 1e-2);
    assert_eq!(all.verdict, Verdict::AllTokens, "{all:#?}");
    assert!(all.advice.contains("Retrain from the base model"), "{}", all.advice);
    assert_eq!(all.command.as_deref(), Some("suasion train --model B --data D -o retrained"));
    assert!(all.confidence > 0.9 && all.sections["system"].tuned < 0.3 * all.sections["system"].base);

    let response = of(&train, 1e-2);
    assert_eq!(response.verdict, Verdict::Response, "{response:#?}");
    assert!(response.advice.contains("No retraining"));
    assert!(response.stop.tuned.at_end > Some(0.1) && response.stop.tuned.ends == 32);
    // The numbers are those of the models: the response's loss fell, that of the system part did not.
    let fell = |name: &str| response.sections[name].gain();
    assert!(fell("response") > 1.0 && fell("system") < 0.3, "{:?}", response.sections);

    let masked = relabelled(&train, |s, i, _| match s.origins[i] {
        Origin::EndOfTurn { .. } => IGNORE,
        _ => kept(s, i),
    });
    let stopless = of(&masked, 1e-2);
    assert_eq!(stopless.verdict, Verdict::StopNeverLearned, "{stopless:#?}");
    let command = stopless.command.as_deref().unwrap_or_default();
    assert!(command.contains("suasion train --model T") && stopless.ends.tuned.stopped_at_once == 0);

    let early = of(
        &relabelled(&train, |s, i, offset| match (-6..0).contains(&offset) {
            true => s.input_ids[i] as i32,
            false => kept(s, i),
        }),
        1e-2,
    );
    assert_eq!(early.verdict, Verdict::StartsEarly, "{early:#?}");
    let late = of(
        &relabelled(&train, |s, i, offset| if (0..8).contains(&offset) { IGNORE } else { kept(s, i) }),
        1e-2,
    );
    // A base of random weights is none of those that the scores were fitted on: the evidence may be too weak for a
    // verdict, but it points the right way.
    assert!(matches!(late.verdict, Verdict::StartsLate | Verdict::Undecided), "{late:#?}");
    assert!(late.answers.starts_late > response.answers.starts_late, "{:?}", late.answers);
}

#[test]
fn too_little_is_undecided() {
    let same = rows(20, 5);
    let names = Names { base: "B".into(), tuned: "T".into(), data: "D".into() };
    let cause = |rows: &[Sample]| {
        let found = diagnose(rows, rows, measured(rows, None), measured(rows, None), &names);
        assert_eq!((found.verdict, found.confidence), (Verdict::Undecided, 0.0));
        found.answers.cause
    };
    assert_eq!(cause(&same), Some(Cause::SameModel));
    let little = of(&rows(64, 3), 1e-6);
    assert_eq!((little.verdict, little.answers.cause), (Verdict::Undecided, Some(Cause::LittleLearned)));
    // Rows that are all prompt or all response are refused.
    let bare = relabelled(&same, |_, _, _| IGNORE);
    let bare: Vec<Sample> =
        bare.into_iter().map(|s| Sample { origins: vec![Origin::Scaffold; s.len()], ..s }).collect();
    assert!(chosen(&bare, 8).is_err());
}

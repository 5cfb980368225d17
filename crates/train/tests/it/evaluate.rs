//! Evaluation against sums computed here from single rows.

use crate::common::*;
use suasion_data::{Origin, Sample};
use suasion_engine::Batch;
use suasion_train::{Error, evaluate, plan::eval_budget};

/// The nll of every token from position 1, one row at a time.
fn by_hand(model: &mut suasion_engine::Model, row: &Sample) -> Vec<(f64, bool)> {
    let mut batch = Batch::default();
    batch.push(&row.input_ids, (1..row.len()).map(|i| (i as u32 - 1, row.input_ids[i], 1.0)));
    model.forward(&batch).unwrap().iter().map(|o| (f64::from(o.nll), o.top1)).collect()
}

#[test]
fn sections_are_sums_over_their_tokens() {
    let rows = rows(7, 21);
    let mut model = model(eval_budget(&rows, 3));
    let evaluation = evaluate(&mut model, &rows, 3, None, &mut |_| {}).unwrap();

    let mut sums: std::collections::BTreeMap<&str, (u64, f64)> = Default::default();
    let (mut targets, mut total, mut first, mut stop) = (0, 0.0, Vec::new(), Vec::new());
    for row in &rows {
        for (i, (nll, top1)) in (1..).zip(by_hand(&mut model, row)) {
            let sum = sums.entry(row.origins[i].name()).or_default();
            sum.0 += 1;
            sum.1 += nll;
            if row.labels[i] >= 0 {
                targets += 1;
                total += nll;
            }
            if matches!(row.origins[i], Origin::Response { .. })
                && !matches!(row.origins[i - 1], Origin::Response { .. })
            {
                first.push((nll, top1));
            }
            if row.origins[i] == (Origin::EndOfTurn { turn: 1 }) {
                stop.push((nll, top1));
            }
        }
    }
    assert_eq!((evaluation.rows, evaluation.targets), (7, targets));
    assert!((evaluation.loss - total / targets as f64).abs() < 1e-6);
    assert!((evaluation.perplexity - evaluation.loss.exp()).abs() < 1e-9);
    assert_eq!(evaluation.sections.keys().collect::<Vec<_>>(), ["system", "task", "response", "end_of_turn"]);
    for (name, (n, sum)) in &sums {
        let section = evaluation.sections[*name];
        assert_eq!(section.targets, *n, "{name}");
        assert!((section.loss - sum / *n as f64).abs() < 1e-6, "{name}");
    }
    // BOS is at position 0 and is not a target; everything else is attributed exactly once.
    let attributed: u64 = evaluation.sections.values().map(|s| s.targets).sum();
    assert_eq!(attributed, rows.iter().map(|row| row.len() as u64 - 1).sum::<u64>());

    for (kind, ours) in [(&first, evaluation.first_token), (&stop, evaluation.stop)] {
        let n = kind.len() as f64;
        assert_eq!(ours.targets, 7);
        assert!((ours.loss.unwrap() - kind.iter().map(|(nll, _)| nll).sum::<f64>() / n).abs() < 1e-6);
        assert!(
            (ours.probability.unwrap() - kind.iter().map(|(nll, _)| (-nll).exp()).sum::<f64>() / n).abs()
                < 1e-6
        );
        assert_eq!(ours.top1.unwrap(), kind.iter().filter(|(_, top1)| *top1).count() as f64 / n);
    }
    // Places: the first bucket is the first token; all buckets together are the response.
    assert_eq!((evaluation.positions[0].from, evaluation.positions[0].to), (0, Some(1)));
    assert_eq!(evaluation.positions[0].calibration, evaluation.first_token);
    let placed: u64 = evaluation.positions.iter().map(|p| p.calibration.targets).sum();
    assert_eq!(placed, evaluation.sections["response"].targets);
    let third = evaluation.positions.iter().find(|p| p.from == 2).unwrap();
    let long =
        rows.iter().map(|row| row.origins.iter().filter(|o| matches!(o, Origin::Response { .. })).count());
    assert_eq!(third.calibration.targets, long.map(|n| n.saturating_sub(2).min(2) as u64).sum::<u64>());
}

#[test]
fn the_batch_size_does_not_change_an_evaluation_and_its_json_reads_back() {
    let rows = rows(7, 21);
    let mut model = model(eval_budget(&rows, 7));
    let one = evaluate(&mut model, &rows, 1, None, &mut |_| {}).unwrap();
    let mut heard = Vec::new();
    let three = evaluate(&mut model, &rows, 3, None, &mut |done| heard.push(done)).unwrap();
    assert_eq!(heard, [3, 6, 7]);
    assert!((one.loss - three.loss).abs() < 1e-7);
    let json = serde_json::to_value(&three).unwrap();
    let keys: Vec<&String> = json.as_object().unwrap().keys().collect();
    assert_eq!(keys[..5], ["rows", "targets", "loss", "perplexity", "sections"]);
    assert!(json["sections"]["response"]["loss"].is_f64() && json["first_token"]["probability"].is_f64());
    let back: suasion_train::Evaluation = serde_json::from_value(json).unwrap();
    assert_eq!(back.loss, three.loss);
    assert_eq!(back.sections, three.sections);
}

/// Weights do not scale an evaluation; a weight of 0 only decides what is a target. Padding is not measured.
#[test]
fn loss_weights_and_padding_do_not_change_an_evaluation() {
    let plain = rows(3, 4);
    let mut model = model(eval_budget(&plain, 3));
    let reference = evaluate(&mut model, &plain, 3, None, &mut |_| {}).unwrap();
    let mut weighted = plain.clone();
    for row in &mut weighted {
        row.weights = Some(vec![5.0; row.len()]);
        row.input_ids.extend([0; 4]);
        row.labels.extend([-100; 4]);
        row.origins.extend([Origin::Padding; 4]);
        row.weights.as_mut().unwrap().extend([0.0; 4]);
    }
    let measured = evaluate(&mut model, &weighted, 3, None, &mut |_| {}).unwrap();
    assert_eq!(measured, reference);
    weighted.iter_mut().for_each(|row| row.weights.as_mut().unwrap().fill(0.0));
    assert!(matches!(evaluate(&mut model, &weighted, 3, None, &mut |_| {}), Err(Error::NoTargets { .. })));
}

#[test]
fn rows_whose_loss_is_not_finite_are_named() {
    let mut rows = rows(4, 4);
    rows.iter_mut().for_each(|row| row.input_ids.iter_mut().for_each(|id| *id = (*id).min(90)));
    rows.iter_mut().for_each(|row| row.labels.iter_mut().for_each(|id| *id = (*id).min(90)));
    rows[3].input_ids[5] = 94;
    let mut model = model(eval_budget(&rows, 4));
    let mut embedding = model.parameter("model.embed_tokens.weight").unwrap();
    embedding.data[94 * 32 + 3] = f32::INFINITY;
    model.set_parameter("model.embed_tokens.weight", &embedding).unwrap();
    match evaluate(&mut model, &rows, 4, None, &mut |_| {}) {
        Err(Error::NonFinite { step: None, rows, .. }) => assert_eq!(rows, [id(3)]),
        other => panic!("{other:?}"),
    }
}

//! Packs train and evaluate as their rows do.

use crate::common::*;
use suasion_data::pack::Packer;
use suasion_data::{IGNORE, Origin, Policy, Sample, Section, prepared};
use suasion_engine::{Batch, Model, SingleRank};
use suasion_train::batches::train_batch;
use suasion_train::{Error, Evaluation, Plan, Resume, Settings, evaluate};

/// [`rows`] of which every three have one prompt; prompt tokens weigh `weight`.
fn replies(n: usize, weight: f32) -> Vec<Sample> {
    let mut rows = rows(n, 5);
    for i in 0..n {
        let prompt = |sample: &Sample| sample.origins.iter().position(|o| o.supervised()).unwrap();
        let (from, own) = (prompt(&rows[i - i % 3]), prompt(&rows[i]));
        let head = rows[i - i % 3].clone();
        let row = &mut rows[i];
        row.input_ids.splice(..own, head.input_ids[..from].iter().copied());
        row.origins.splice(..own, head.origins[..from].iter().copied());
        let asked = |o: &Origin| match o {
            Origin::Prompt { section: Section::Task, .. } => weight,
            o => f32::from(u8::from(o.supervised())),
        };
        let weights: Vec<f32> = row.origins.iter().map(asked).collect();
        let label = |(&id, &w): (&u32, &f32)| if w == 0.0 { IGNORE } else { id as i32 };
        row.labels = row.input_ids.iter().zip(&weights).map(label).collect();
        row.weights = Some(weights).filter(|w| w.iter().any(|w| *w != 0.0 && *w != 1.0));
    }
    rows
}

fn packed(rows: &[Sample], capacity: usize, share: bool) -> Vec<Sample> {
    Packer::new(capacity, share).pack(rows.iter().cloned()).0
}

/// The loss over micro-batches and its gradient, by parameter.
fn gradients(model: &mut Model, batches: &[Batch]) -> (f64, Vec<Vec<f32>>) {
    let weight: f64 = batches.iter().map(Batch::weight).sum();
    model.zero_gradients();
    let mut loss = 0.0;
    for batch in batches {
        let losses = model.accumulate(batch, (1.0 / weight) as f32).unwrap();
        for (outcome, target) in model.read_losses(&losses).unwrap().iter().zip(&batch.targets) {
            loss += f64::from(target.weight) * f64::from(outcome.nll) / weight;
        }
    }
    let gradient = |name: &String| model.gradient(name).unwrap().data.to_vec();
    (loss, model.parameter_names().iter().map(gradient).collect())
}

#[test]
fn a_packs_gradient_is_that_of_its_rows() {
    for (share, weight) in [(false, 0.0), (false, 0.5), (true, 0.0), (true, 0.5), (true, 1.0)] {
        let rows = replies(12, weight);
        let packs = packed(&rows, 100, share);
        assert!(packs.len() < rows.len() / 2);
        if share {
            let trunks = |pack: &Sample| {
                pack.pack.as_ref().unwrap().segments.iter().filter(|s| s.branches > 1).count()
            };
            assert!(packs.iter().map(trunks).sum::<usize>() >= 3);
        }
        let separate: Vec<Batch> = rows.iter().map(|row| train_batch([row])).collect();
        let together: Vec<Batch> = packs.iter().map(|pack| train_batch([pack])).collect();
        let weights = |batches: &[Batch]| batches.iter().map(Batch::weight).sum::<f64>();
        assert!((weights(&separate) - weights(&together)).abs() < 1e-9);
        let tokens = |batches: &[Batch]| batches.iter().map(Batch::tokens).sum::<usize>();
        assert_eq!(tokens(&together) < tokens(&separate), share);
        let mut model = model(Plan::new(&rows, &rows, &quick()).unwrap().budget.max_with(&packs));
        let (loss, ours) = gradients(&mut model, &together);
        let (expected, theirs) = gradients(&mut model, &separate);
        assert!((loss - expected).abs() < 1e-6, "{loss} and {expected}");
        for (a, b) in ours.iter().zip(&theirs) {
            let norm = |v: &mut dyn Iterator<Item = f32>| v.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            let off = norm(&mut a.iter().zip(b).map(|(a, b)| a - b));
            assert!(
                off <= 3e-6 * norm(&mut b.iter().copied()).max(1e-3),
                "share {share}, weight {weight}: {off:e}"
            );
        }
    }
}

trait MaxWith {
    fn max_with(self, packs: &[Sample]) -> Self;
}

impl MaxWith for suasion_engine::Budget {
    /// Room for each of these packs, too.
    fn max_with(mut self, packs: &[Sample]) -> Self {
        for pack in packs {
            self.tokens = self.tokens.max(pack.len());
            self.targets = self.targets.max(pack.len() * 2);
        }
        self
    }
}

/// One pack a step against the rows of that pack as the step's micro-batches: the same losses, step by step.
#[test]
fn steps_on_packs_are_steps_on_their_rows() {
    for (share, weight) in [(false, 0.0), (true, 0.0), (true, 0.5)] {
        let packs = packed(&replies(24, weight), 120, share);
        let settings = Settings { learning_rate: 1e-3, ..quick() };
        let budget = Plan::new(&packs, &[], &settings).unwrap().budget.max_with(&packs);
        let (mut ours, mut theirs) = (model(budget), model(budget));
        for (t, pack) in packs.iter().enumerate() {
            let rows = pack.unpack();
            let separate: Vec<Vec<&Sample>> = rows.iter().map(|row| vec![row]).collect();
            let step = |model: &mut Model, batches: &[Vec<&Sample>]| {
                suasion_train::step::step(model, batches, &settings, 1e-3, t as u64, &SingleRank).unwrap()
            };
            let (a, b) = (step(&mut ours, &[vec![pack]]), step(&mut theirs, &separate));
            assert!((a.loss.unwrap() - b.loss.unwrap()).abs() < 1e-6, "step {t}: {a:?} and {b:?}");
            assert!((a.grad_norm - b.grad_norm).abs() < 1e-5 * b.grad_norm, "step {t}: {a:?} and {b:?}");
            if !share {
                assert_eq!((a.targets, a.tokens), (b.targets, b.tokens));
            }
        }
    }
}

#[test]
fn a_run_counts_packs() {
    let rows = replies(24, 0.0);
    let packs = packed(&rows, 100, false);
    let settings = Settings { num_train_epochs: 2.0, per_device_eval_batch_size: 1, ..quick() };
    let plan = Plan::new(&packs, &packs, &settings).unwrap();
    assert_eq!((plan.rows, plan.eval_rows, plan.packs), (24, 24, Some(packs.len() as u64)));
    assert_eq!(plan.steps_per_epoch, packs.len().div_ceil(2) as u64);
    let tokens: usize = rows.iter().map(Sample::len).sum();
    assert_eq!(plan.tokens_per_epoch, tokens as u64);
    assert_eq!(plan.longest_row, rows.iter().map(Sample::len).max().unwrap() as u64);
    // Two packs are the largest micro-batch, and what the memory is planned for.
    let pair = |i: usize| packs[i].len() + packs.get(i + 1).map_or(0, Sample::len);
    assert!(plan.budget.tokens <= 200 && plan.budget.tokens > (0..1).map(pair).max().unwrap() / 2);
    let (_dir, out) = folder();
    let report = Job::new(&packs, settings, &out).run().unwrap();
    let targets: usize = rows.iter().map(|row| row.targets().count()).sum();
    assert_eq!((report.tokens, report.targets), (2 * tokens as u64, 2 * targets as u64));
    assert_eq!(report.steps.last().unwrap().epoch, 2.0);
    let learned = report.steps.last().unwrap().loss.unwrap() < report.steps[0].loss.unwrap();
    assert!(learned, "the loss falls");
}

#[test]
fn packs_from_a_file_train_to_the_same_bits() {
    for share in [false, true] {
        let packs = packed(&replies(18, 0.5), 100, share);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("packs.jsonl");
        let mut lines = Vec::new();
        packs.iter().for_each(|pack| prepared::Record::of(pack, None).write_json(&mut lines));
        std::fs::write(&path, lines).unwrap();
        let read = prepared::read(&path, &Policy { prompt_loss_weight: 0.5, ..Policy::default() }).unwrap();
        let run = |rows: &[Sample], name: &str| {
            let settings = Settings { max_steps: Some(4), ..quick() };
            let (report, bits) = Job::new(rows, settings, &dir.path().join(name)).eval(rows).run_to_bits();
            (bits, report.after.unwrap().loss)
        };
        assert!(run(&packs, "a") == run(&read, "b"), "share {share}");
    }
}

#[test]
fn a_packed_run_resumes_to_the_same_bits() {
    let packs = packed(&replies(24, 0.5), 100, true);
    let settings = Settings {
        num_train_epochs: 3.0,
        save_strategy: suasion_train::Strategy::Steps,
        save_steps: 1.into(),
        ..quick()
    };
    let plan = Plan::new(&packs, &[], &settings).unwrap();
    assert!(plan.steps_per_epoch >= 2, "it resumes within an epoch too");
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    let (_, straight) = Job::new(&packs, settings.clone(), &whole).run_to_bits();
    for at in 1..plan.total_steps {
        let out = dir.path().join(format!("from-{at}"));
        let from = Resume::From(whole.join(format!("checkpoint-{at}")));
        let (_, resumed) = Job::new(&packs, settings.clone(), &out).resume(from).run_to_bits();
        assert!(resumed == straight, "from step {at}");
    }
    // The same rows without packs are other data.
    let rows: Vec<Sample> = packs.iter().flat_map(Sample::unpack).collect();
    let out = dir.path().join("other");
    let mut job = Job::new(&rows, settings, &out).resume(Resume::From(whole.join("checkpoint-1")));
    assert!(matches!(job.run().unwrap_err(), Error::ResumeData { .. }));
}

#[test]
fn packs_evaluate_as_their_rows() {
    for (share, weight) in [(false, 0.0), (true, 0.0), (true, 0.5)] {
        let rows = replies(21, weight);
        let packs = packed(&rows, 100, share);
        let run = |samples: &[Sample]| -> Evaluation {
            let mut model = model(suasion_train::plan::eval_budget(samples, 2));
            evaluate(&mut model, samples, 2, None, &mut |_| {}).unwrap()
        };
        let (ours, theirs) = (run(&packs), run(&rows));
        assert_eq!((ours.rows, ours.targets), (theirs.rows, theirs.targets));
        assert!((ours.loss - theirs.loss).abs() < 1e-6, "{} and {}", ours.loss, theirs.loss);
        assert_eq!(ours.sections.len(), theirs.sections.len());
        for (name, section) in &theirs.sections {
            let ours = ours.sections[name];
            assert_eq!((ours.targets, ours.top1), (section.targets, section.top1), "{name}");
            assert!((ours.loss - section.loss).abs() < 1e-5, "{name}");
        }
        assert_eq!(ours.first_token.targets, theirs.first_token.targets);
        assert_eq!(ours.stop.targets, theirs.stop.targets);
        let places =
            |e: &Evaluation| e.positions.iter().map(|p| (p.from, p.calibration.targets)).collect::<Vec<_>>();
        assert_eq!(places(&ours), places(&theirs));
        // Row by row, in the order of the packs.
        let order: Vec<usize> =
            packs.iter().flat_map(|p| &p.pack.as_ref().unwrap().rows).map(|id| id.row as usize).collect();
        for (i, row) in ours.per_row.iter().enumerate() {
            let same = theirs.per_row.iter().find(|r| r.row == order[i]).unwrap();
            assert_eq!((row.row, row.targets), (i, same.targets));
            assert!((row.nll - same.nll).abs() < 1e-4, "row {}: {} and {}", order[i], row.nll, same.nll);
        }
    }
}

#[test]
fn a_broken_row_of_a_pack_is_named() {
    let packs = packed(&replies(6, 0.0), 200, false);
    let plan = Plan::new(&packs, &[], &quick()).unwrap();
    let mut broken = model(plan.budget);
    // The embedding of one token is NaN: the rows that hold it are named, not the pack.
    let rows = packs[0].unpack();
    let some =
        |id: &u32| (1..rows.len()).contains(&rows.iter().filter(|row| row.input_ids.contains(id)).count());
    let token = *rows[3].input_ids.iter().find(|id| some(id)).unwrap();
    let name = broken.parameter_names().into_iter().find(|n| n.contains("embed_tokens")).unwrap();
    let mut tensor = broken.parameter(&name).unwrap();
    tensor.data[token as usize * 32] = f32::NAN;
    broken.set_parameter(&name, &tensor).unwrap();
    let holds: Vec<u64> = rows
        .iter()
        .filter(|row| row.input_ids[..row.len() - 1].contains(&token))
        .map(|row| row.id.row)
        .collect();
    let error = suasion_train::step::step(&mut broken, &[vec![&packs[0]]], &quick(), 1e-3, 0, &SingleRank)
        .unwrap_err();
    let Error::NonFinite { rows, .. } = error else { panic!("{error}") };
    assert!(holds.len() < packs[0].rows());
    assert_eq!(rows.iter().map(|id| id.row).collect::<Vec<_>>(), holds);
}

/// The comparison of objectives over packs trains all tokens within each row's boundaries.
#[test]
fn all_tokens_stay_within_their_rows() {
    let rows = replies(6, 0.0);
    for share in [false, true] {
        for pack in packed(&rows, 90, share) {
            let all = suasion_train::compare::all_tokens(&pack);
            let weight: f32 = all.targets().map(|(.., w)| w).sum();
            let separate: usize = pack.unpack().iter().map(|row| row.len() - 1).sum();
            assert_eq!(weight, separate as f32);
        }
    }
}

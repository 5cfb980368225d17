//! Optimizers compared with PyTorch's, transformers' and bitsandbytes', and their state; smoothed labels; noise.

mod common;

use common::card::card;
use common::{
    OPTIMIZERS, Random, accumulate, architecture, golden_batch, gradients, json, mean_loss, model_of,
};
use serde_json::Value;
use std::path::{Path, PathBuf};
use suasion_engine::kernels::{Adafactor, Sgd, View};
use suasion_engine::{
    AdamW, Architecture, Backend, Batch, Budget, Cpu, MemoryPlan, Model, Optimizer, Precision, Rates,
    Reference, Regularisation, Trainable, Update,
};

fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models")
}

fn golden() -> Value {
    json(&models().join("training.json"))
}

fn batch_of(name: &str, batch: &str) -> Batch {
    golden_batch(&json(&models().join(name).join("golden.json"))["batches"][batch])
}

fn load(name: &str, batch: &Batch) -> Model<Cpu> {
    let dir = models().join(name);
    let budget =
        Budget { tokens: batch.tokens(), targets: batch.targets.len(), train: true, recompute: false };
    let mut model = Model::new(Architecture::from_dir(&dir).unwrap(), Cpu::new(), budget).unwrap();
    model.load_weights(&dir).unwrap();
    model
}

fn update(t: u64) -> Update {
    Update { t, beta1: 0.9, beta2: 0.999, eps: 1e-8, momentum: 0.9, gradient_scale: 1.0 }
}

/// Follows a golden trajectory and compares its losses and final parameters.
fn follow(name: &str, expected: &Value, kind: Optimizer, rates: &dyn Fn(&str, bool) -> Rates) {
    let batch = batch_of(name, "a");
    let mut model = load(name, &batch);
    model.choose_optimizer(kind).unwrap();
    let losses: Vec<f64> = common::floats(&expected["losses"]);
    for (step, want) in losses.iter().enumerate() {
        model.zero_gradients();
        let outcomes = accumulate(&mut model, &batch, 1.0 / batch.weight() as f32);
        let loss = mean_loss(&batch, &outcomes);
        assert!((loss - want).abs() < 2e-5 * want, "{name}, step {step}: {loss} and {want}");
        model.update(&update(step as u64 + 1), &|p| rates(&p.name, p.kind.decays())).unwrap();
    }
    // A key's bias shifts all scores of a query equally, so its gradient is rounding error, which Adafactor divides by
    // its own magnitude: the biases of fused projections cannot be compared.
    let compared = |name: &&String| {
        let fused = name.ends_with("attn.c_attn.bias") || name.ends_with("query_key_value.bias");
        kind != Optimizer::Adafactor || !fused
    };
    let last = expected["final"].as_object().unwrap();
    for (parameter, want) in last.iter().filter(|(name, _)| compared(name)) {
        let data = model.parameter(parameter).unwrap().data;
        let norm = data.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let want = want.as_f64().unwrap();
        assert!((norm - want).abs() < 2e-5 * want.max(0.1), "{name} {parameter}: {norm} and {want}");
    }
}

fn decayed(lr: f64) -> impl Fn(&str, bool) -> Rates {
    move |_, decays| Rates { lr, weight_decay: if decays { 0.1 } else { 0.0 } }
}

#[test]
fn adafactor_takes_the_steps_of_transformers() {
    for (name, expected) in golden()["adafactor"].as_object().unwrap() {
        follow(name, expected, Optimizer::Adafactor, &decayed(2e-3));
    }
}

#[test]
fn gradient_descent_takes_the_steps_of_pytorch() {
    for (name, expected) in golden()["sgd"].as_object().unwrap() {
        follow(name, expected, Optimizer::Sgd { momentum: true }, &decayed(2e-2));
    }
}

#[test]
fn parameters_may_have_rates_of_their_own() {
    let rates = |name: &str, decays: bool| {
        let (lr, decay) = match name {
            name if name.contains("embed_tokens") => (Some(1e-4), None),
            name if name.contains("mlp.") || name == "model.norm.weight" => (Some(4e-3), Some(0.3)),
            name if name.contains("layers.1.self_attn") => (None, Some(0.0)),
            _ => (None, None),
        };
        let usual = if decays { 0.1 } else { 0.0 };
        Rates { lr: lr.unwrap_or(1e-3), weight_decay: decay.unwrap_or(usual) }
    };
    follow("llama", &golden()["param_groups"]["llama"], Optimizer::AdamW, &rates);
}

/// The tensors of a file, by name.
fn tensors(path: &Path) -> std::collections::HashMap<String, Vec<f32>> {
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    file.iter()
        .map(|(name, tensor)| {
            let values = tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            (name.to_string(), values)
        })
        .collect()
}

#[test]
fn eight_bit_states_are_those_of_bitsandbytes() {
    fn run<B: Backend>(mut b: B) {
        let golden = tensors(&models().join("adamw_8bit.safetensors"));
        let n = golden["start"].len();
        let blocks = n.div_ceil(256);
        let (p, g) = (b.allocate(n).unwrap(), b.allocate(n).unwrap());
        let scales = [b.allocate(blocks).unwrap(), b.allocate(blocks).unwrap()];
        let codes = [b.allocate_bytes(n).unwrap(), b.allocate_bytes(n).unwrap()];
        b.write(p.view(), &golden["start"]).unwrap();
        for step in 0..4 {
            b.write(g.view(), &golden[&format!("gradient_{step}")]).unwrap();
            let adamw = AdamW { t: step + 1, lr: 0.01, beta2: 0.95, weight_decay: 0.1, ..AdamW::default() };
            b.adamw_8bit(
                adamw,
                p.view(),
                g.view(),
                codes.each_ref().map(|c| c.view()),
                scales.each_ref().map(|s| s.view()),
            )
            .unwrap();
            let mut after = vec![0.0; n];
            b.read(p.view(), &mut after).unwrap();
            // Where a value is half-way between two codes, the last bit decides: at most a few elements differ, by one
            // step of the code.
            let want = &golden[&format!("after_{step}")];
            let off =
                after.iter().zip(want).filter(|(a, b)| (*a - *b).abs() > 2e-6 * b.abs().max(1.0)).count();
            assert!(off <= step as usize, "step {step}: {off} of {n} differ");
        }
        for (i, name) in ["1", "2"].into_iter().enumerate() {
            let mut found = vec![0; n];
            b.read_bytes(codes[i].view(), &mut found).unwrap();
            let want = &golden[&format!("codes{name}")];
            let off = found.iter().zip(want).filter(|(a, b)| f32::from(**a) != **b).count();
            assert!(off <= 3, "moment {name}: {off} of {n} codes differ");
            let mut found = vec![0.0; blocks];
            b.read(scales[i].view(), &mut found).unwrap();
            for (a, b) in found.iter().zip(&golden[&format!("absmax{name}")]) {
                assert!((a - b).abs() < 2e-6 * b, "{a} and {b}");
            }
        }
    }
    run(Cpu::new());
    run(Reference::<f32>::new());
    card(Precision::F32, 1).into_iter().for_each(run);
}

#[test]
fn optimizers_equal_the_references() {
    fn run<B: Backend>(b: &mut B, rows: usize, width: usize) -> Vec<Vec<f32>> {
        let mut random = Random(7);
        let mut put = |b: &mut B, n: usize| {
            let buffer = b.allocate(n).unwrap();
            let values: Vec<f32> = (0..n).map(|_| random.normal() as f32).collect();
            b.write(buffer.view(), &values).unwrap();
            buffer
        };
        let n = rows * width;
        let (p, q, s, m, g) = (put(b, n), put(b, n), put(b, n), put(b, n), put(b, n));
        let (w, x) = (put(b, n), put(b, n));
        let (row, column, v) =
            (b.allocate(rows).unwrap(), b.allocate(width).unwrap(), b.allocate(n).unwrap());
        for t in 1..4 {
            let step = Adafactor { t, lr: 0.1, weight_decay: 0.1, gradient_scale: 0.5 };
            b.adafactor(step, p.matrix(rows, width), g.view(), row.view(), Some(column.view())).unwrap();
            b.adafactor(step, q.view(), g.view(), v.view(), None).unwrap();
            let step = Sgd { lr: 0.1, momentum: 0.9, weight_decay: 0.1, gradient_scale: 0.5 };
            b.sgd(step, s.view(), g.view(), (t > 1).then_some(m.view())).unwrap();
            b.blend(w.view(), p.view(), 0.25).unwrap();
            b.swap(w.view(), x.view()).unwrap();
        }
        [p, q, s, m, row, column, v, w, x].iter().map(|x| get(b, x.view())).collect()
    }
    fn get<B: Backend>(b: &B, view: View) -> Vec<f32> {
        let mut values = vec![0.0; view.len()];
        b.read(view, &mut values).unwrap();
        values
    }
    for (rows, width) in [(1, 1), (3, 65), (64, 33), (65, 5), (200, 31)] {
        let plain = run(&mut Reference::<f32>::new(), rows, width);
        let mut all = vec![("cpu", run(&mut Cpu::new(), rows, width))];
        all.extend(card(Precision::F32, 1).map(|mut card| ("card", run(&mut card, rows, width))));
        for (backend, results) in all {
            for (i, (got, plain)) in results.iter().zip(&plain).enumerate() {
                let error = common::relative(got, plain);
                assert!(error < 5e-6, "{rows} × {width}, result {i} on the {backend}: {error:e}");
            }
        }
    }
}

/// Each optimizer keeps the state that its plan counts, continues bit for bit from its file, and refuses another's.
#[test]
fn states_are_planned_and_go_through_files() {
    // Matrices large enough for 8-bit states.
    let wide = || {
        let mut arch = architecture("qwen2");
        arch.blocks.iter_mut().for_each(|block| block.mlp.intermediate = 300);
        arch
    };
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = Vec::new();
    for kind in OPTIMIZERS {
        let make = || {
            let mut model = model_of(wide(), Cpu::new(), false, &Trainable::All);
            let before = model.allocated();
            model.choose_optimizer(kind).unwrap();
            (model, before)
        };
        let step = |model: &mut Model<Cpu>, t: u64| {
            let mut random = Random(t);
            let mut batch = Batch::default();
            batch.push(&random.ids(12), [(3, 5, 1.0), (9, 9, 1.0)]);
            model.zero_gradients();
            accumulate(model, &batch, 0.5);
            model.update(&update(t), &|_| Rates { lr: 1e-2, weight_decay: 0.1 }).unwrap();
        };
        let (mut whole, _) = make();
        let planned =
            MemoryPlan::of(&wide(), whole.budget()).under(kind, 1, &wide(), &Trainable::All).unwrap();
        assert_eq!(whole.plan(), &planned, "{kind:?}");
        bytes.push(planned.optimizer);
        (1..=4).for_each(|t| step(&mut whole, t));
        let (mut first, _) = make();
        (1..=2).for_each(|t| step(&mut first, t));
        let path = dir.path().join("optimizer.safetensors");
        first.save_optimizer(&path).unwrap();
        let (mut second, _) = make();
        for name in first.parameter_names() {
            second.set_parameter(&name, &first.parameter(&name).unwrap()).unwrap();
        }
        second.load_optimizer(&path).unwrap();
        (3..=4).for_each(|t| step(&mut second, t));
        for name in whole.parameter_names() {
            assert_eq!(whole.parameter(&name).unwrap(), second.parameter(&name).unwrap(), "{kind:?} {name}");
        }
        for other in OPTIMIZERS.into_iter().filter(|other| *other != kind) {
            second.choose_optimizer(other).unwrap();
            // Without momentum there is no state, and none is accepted from a file.
            assert!(second.load_optimizer(&path).is_err(), "{kind:?} as {other:?}");
        }
    }
    let parameters = 4 * wide().parameter_count();
    assert_eq!(bytes[0], 2 * parameters);
    assert!(bytes[1] < bytes[0] / 2, "8 bits: {bytes:?}");
    assert!(bytes[2] < bytes[0] / 20, "rows and columns: {bytes:?}");
    assert_eq!((bytes[3], bytes[4]), (parameters, 0));
}

#[test]
fn smoothed_labels_equal_the_trainers() {
    for (name, expected) in golden()["label_smoothing"].as_object().unwrap() {
        let batch = batch_of(name, "padded");
        let mut model = load(name, &batch);
        let epsilon = expected["epsilon"].as_f64().unwrap();
        model.regularise(Regularisation { label_smoothing: epsilon as f32, ..Regularisation::default() });
        let outcomes = accumulate(&mut model, &batch, 1.0 / batch.weight() as f32);
        let loss = outcomes.iter().map(|loss| loss.smoothed(epsilon)).sum::<f64>() / outcomes.len() as f64;
        let want = expected["loss"].as_f64().unwrap();
        assert!((loss - want).abs() < 2e-5, "{name}: {loss} and {want}");
        for (parameter, want) in expected["grad_norms"].as_object().unwrap() {
            let data = model.gradient(parameter).unwrap().data;
            let norm = data.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
            let want = want.as_f64().unwrap();
            assert!((norm - want).abs() < 1e-4 * want.max(1e-3), "{name} {parameter}: {norm} and {want}");
        }
        // Evaluation is not smoothed.
        assert!(model.forward(&batch).unwrap().iter().all(|loss| loss.uniform == 0.0));
    }
}

/// Mean and standard deviation of the loss under NEFTune's noise match transformers.
#[test]
fn noise_on_embeddings_is_distributed_as_in_transformers() {
    for (name, expected) in golden()["neftune"].as_object().unwrap() {
        let all = batch_of(name, "a");
        let end = all.segments[0].own.end;
        let targets: Vec<_> =
            all.targets.iter().filter(|t| t.row < end).map(|t| (t.row, t.id, t.weight)).collect();
        let mut many = Batch::default();
        (0..50).for_each(|_| many.push(&all.ids[..end as usize], targets.iter().copied()));
        let mut model = load(name, &many);
        let of = |field: &str| expected[field].as_f64().unwrap();
        let mut losses = Vec::new();
        for seed in 0..30 {
            model.regularise(Regularisation {
                seed: Some(seed),
                noise_alpha: of("alpha") as f32,
                ..Regularisation::default()
            });
            let each = accumulate(&mut model, &many, 1.0);
            losses.extend(
                each.chunks(targets.len())
                    .map(|row| row.iter().map(|loss| f64::from(loss.nll)).sum::<f64>() / row.len() as f64),
            );
        }
        let n = losses.len() as f64;
        let mean = losses.iter().sum::<f64>() / n;
        let std = (losses.iter().map(|l| (l - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt();
        let deviation = of("std") * (1.0 / n + 1.0 / of("draws")).sqrt();
        let what = format!("{name}: {mean} ± {std}, expected {expected}");
        assert!((mean - of("mean")).abs() < 4.0 * deviation, "{what}");
        assert!((std / of("std") - 1.0).abs() < 0.08, "{what}");
    }
}

/// The noise of a token depends on the length of its own row, also in a pack; that of a shared prompt on the longest
/// row that contains it.
#[test]
fn noise_has_the_size_of_its_row() {
    let mut random = Random(2);
    let (prompt, long, short) = (random.ids(6), random.ids(20), random.ids(3));
    let run = |batch: &Batch, alpha: f32| {
        let mut model = model_of(architecture("llama"), Cpu::new(), false, &Trainable::All);
        model.regularise(Regularisation { seed: Some(3), noise_alpha: alpha, ..Regularisation::default() });
        (accumulate(&mut model, batch, 1.0), gradients(&model))
    };
    let mut alone = Batch::default();
    alone.push(&prompt, [(5, 1, 1.0)]);
    let mut pack = alone.clone();
    pack.push(&long, [(4, 1, 1.0)]);
    let (lone, packed) = (run(&alone, 5.0).0[0].nll, run(&pack, 5.0).0[0].nll);
    assert!((lone - packed).abs() < 1e-6, "another row changes nothing: {lone} and {packed}");
    let mut shared = alone.clone();
    shared.push_after(0..6, &long, [(4, 1, 1.0)]);
    shared.push_after(0..6, &short, [(1, 1, 1.0)]);
    // The prompt belongs to a row of 26 tokens: on its own, with 6 tokens, noise reduced by this factor gives the same
    // result.
    let smaller = 5.0 * (6.0f32 / 26.0).sqrt();
    let (with, without) = (run(&shared, 5.0).0[0].nll, run(&alone, smaller).0[0].nll);
    assert!((with - without).abs() < 1e-5, "{with} and {without}");
    assert_eq!(run(&pack, 0.0), {
        let mut model = model_of(architecture("llama"), Cpu::new(), false, &Trainable::All);
        (accumulate(&mut model, &pack, 1.0), gradients(&model))
    });
}

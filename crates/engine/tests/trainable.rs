//! Training some of the parameters, layers that differ, and ranks.

mod common;

use common::threads::Threads;
use common::{
    FAMILIES, Random, STEP, accumulate, architecture, model, model_of, relative, slope, trained_gradients,
};
use std::collections::BTreeSet;
use suasion_engine::rope::Rope;
use suasion_engine::{
    AdamW, Architecture, Backend, Batch, Budget, Cpu, Device, MemoryPlan, Model, Reference, Trainable,
};

fn batch(seed: u64) -> Batch {
    let mut random = Random(seed);
    let mut batch = Batch::default();
    for length in [13, 5, 29] {
        let ids = random.ids(length);
        let targets = (length * 2 / 3..length).map(|j| (j as u32 - 1, ids[j], 0.5 + (j % 3) as f32));
        batch.push(&ids, targets.collect::<Vec<_>>());
    }
    batch
}

fn weights<B: Backend>(model: &Model<B>) -> Vec<(String, Vec<f32>)> {
    model.parameter_names().into_iter().map(|n| (n.clone(), model.parameter(&n).unwrap().data)).collect()
}

fn chosen(arch: &Architecture, pick: impl Fn(&str) -> bool) -> BTreeSet<String> {
    arch.parameter_names().into_iter().filter(|name| pick(name)).collect()
}

/// Choices of parameters: whole kinds, parts of fused layers, single biases, and the first and last layers of the
/// model.
type Pick = fn(&str) -> bool;
const CHOICES: [(&str, Pick); 9] = [
    ("norms", |n| n.contains("norm") || n.contains("ln_")),
    ("keys", |n| {
        ["k_proj.weight", "c_attn.weight", "qkv_proj.weight", "value.weight"].iter().any(|k| n.contains(k))
    }),
    ("values and their biases", |n| {
        ["v_proj", "c_attn.bias", "qkv_proj", "value.bias"].iter().any(|k| n.contains(k))
    }),
    ("gates of the last layer", |n| {
        ["2.mlp.gate_proj", "2.mlp.c_fc", "2.mlp.gate_up", "2.mlp.dense_h"].iter().any(|k| n.contains(k))
    }),
    ("biases", |n| n.ends_with("bias")),
    ("embeddings", |n| ["embed_tokens", "embed_in", "wte", "wpe"].iter().any(|k| n.contains(k))),
    ("the head", |n| n == "lm_head.weight" || n == "embed_out.weight"),
    ("the last norm", |n| {
        ["model.norm.weight", "ln_f.weight", "final_layer_norm.weight"].iter().any(|end| n.ends_with(end))
    }),
    ("one middle layer", |n| n.contains(".1.")),
];

#[test]
fn a_choice_of_parameters_trains_them_alone() {
    for family in FAMILIES {
        let arch = architecture(family);
        let data = batch(1);
        let scale = 1.0 / data.weight() as f32;
        let mut full = model(family, Cpu::new(), false);
        accumulate(&mut full, &data, scale);
        for (what, pick) in CHOICES {
            let names = chosen(&arch, pick);
            if names.is_empty() {
                continue;
            }
            let what = format!("{family}, {what}");
            for recompute in [false, true] {
                let trainable = Trainable::Named(names.clone());
                let mut model = model_of(arch.clone(), Cpu::new(), recompute, &trainable);
                assert_eq!(model.trained_names().into_iter().collect::<BTreeSet<_>>(), names, "{what}");
                accumulate(&mut model, &data, scale);
                let before = weights(&model);
                let mut squares = 0.0;
                for (name, _) in &before {
                    let Ok(gradient) = model.gradient(name) else {
                        assert!(!names.contains(name), "{what}: {name} has no gradient");
                        continue;
                    };
                    assert!(names.contains(name), "{what}: {name} has a gradient");
                    let want = full.gradient(name).unwrap();
                    let size = want.data.iter().map(|x| (*x as f64).powi(2)).sum::<f64>();
                    // The gradient of key biases under a softmax is only rounding error.
                    let same = size < 1e-10 || relative(&gradient.data, &want.data) < 1e-6;
                    assert!(same, "{what}: the gradient of {name} differs from that of training everything");
                    squares += gradient.data.iter().map(|x| (*x as f64).powi(2)).sum::<f64>();
                }
                let norm = model.gradient_norm().unwrap();
                assert!((norm / squares.sqrt() - 1.0).abs() < 1e-6, "{what}: norm {norm}");
                // A second micro-batch adds to the gradients.
                accumulate(&mut model, &data, scale);
                let twice = model.gradient_norm().unwrap();
                assert!((twice / (2.0 * norm) - 1.0).abs() < 1e-5, "{what}: {norm}, twice {twice}");
                model.adamw(&STEP).unwrap();
                for ((name, before), (_, after)) in before.iter().zip(weights(&model)) {
                    assert_eq!(*before != after, names.contains(name), "{what}: {name}");
                }
            }
        }
    }
}

#[test]
fn frozen_parameters_have_no_gradients_moments_or_state() {
    for family in FAMILIES {
        let arch = architecture(family);
        let names = chosen(&arch, CHOICES[0].1);
        let trainable = Trainable::Named(names.clone());
        let budget = Budget { tokens: 64, targets: 64, train: true, recompute: false };
        let all = MemoryPlan::of(&arch, budget);
        let plan = MemoryPlan::with(&arch, budget, &trainable).unwrap();
        let mut norms = model_of(arch.clone(), Device::cpu(), false, &trainable);
        let elements: usize = names.iter().map(|n| norms.parameter(n).unwrap().data.len()).sum();
        assert_eq!((plan.gradients, plan.optimizer), (4 * elements as u64, 8 * elements as u64), "{family}");
        assert_eq!((plan.parameters, plan.activations), (all.parameters, all.activations), "{family}");

        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("optimizer.safetensors");
        let step = |model: &mut Model, t: u64| {
            model.zero_gradients();
            accumulate(model, &batch(t), 0.1);
            model.adamw(&AdamW { t, ..STEP }).unwrap();
        };
        step(&mut norms, 1);
        norms.save_optimizer(&file).unwrap();
        norms.save_weights(dir.path()).unwrap();
        let bytes = std::fs::read(&file).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let kinds = ["exp_avg", "exp_avg_sq"];
        let want: BTreeSet<String> =
            kinds.iter().flat_map(|kind| names.iter().map(move |n| format!("{kind}.{n}"))).collect();
        assert_eq!(tensors.names().into_iter().map(String::from).collect::<BTreeSet<_>>(), want, "{family}");

        // A resumed run is bit-identical to an uninterrupted one; another choice of parameters cannot load the state.
        let mut resumed = model_of(arch.clone(), Device::cpu(), false, &trainable);
        resumed.load_weights(dir.path()).unwrap();
        resumed.load_optimizer(&file).unwrap();
        step(&mut norms, 2);
        step(&mut resumed, 2);
        assert_eq!(weights(&norms), weights(&resumed), "{family}");
        let mut other = model_of(arch, Device::cpu(), false, &Trainable::All);
        let error = other.load_optimizer(&file).unwrap_err().to_string();
        assert!(error.contains("and the parameters that it trains"), "{error}");
        let mut everything = model(family, Device::cpu(), false);
        step(&mut everything, 1);
        everything.save_optimizer(&file).unwrap();
        assert!(norms.load_optimizer(&file).is_err(), "{family}: moments of frozen parameters");
    }
}

#[test]
fn a_choice_that_names_no_parameter_is_refused() {
    let arch = architecture("llama");
    let budget = Budget { tokens: 8, targets: 8, train: true, recompute: false };
    let refuse = |names: &[&str], part: &str| {
        let names = Trainable::Named(names.iter().map(|n| n.to_string()).collect());
        let error = Model::with_trainable(arch.clone(), Cpu::new(), budget, &names).unwrap_err();
        assert_eq!(error.tag(), "E-MODEL");
        assert!(error.to_string().contains(part), "{error}");
    };
    refuse(&["model.norm.weight", "model.norm.wieght"], "\"model.norm.wieght\" is not a parameter");
    refuse(&[], "no parameter is chosen");
}

/// A Qwen3 whose layers each have different heads, head sizes, widths, biases and rotations.
fn uneven() -> Architecture {
    let mut arch = architecture("qwen3");
    let [first, second, third] = &mut arch.blocks[..] else { unreachable!() };
    // Partial rotary positions: 4 of 10 columns.
    first.attention.rope = Some(Rope::of(vec![1.0, 0.02]));
    second.attention.heads.heads = 3;
    second.attention.heads.kv_heads = 1;
    second.attention.heads.head_dim = 7;
    second.attention.qk_norm = None;
    second.attention.rope = None;
    second.attention.qkv_bias = true;
    second.mlp.intermediate = 11;
    third.attention.out_bias = true;
    third.mlp.bias = true;
    third.attention.heads.scale = 0.9;
    arch
}

#[test]
fn layers_may_differ() {
    let data = batch(2);
    let scale = 1.0 / data.weight() as f32;
    let run = |recompute| {
        let mut model = model_of(uneven(), Cpu::new(), recompute, &Trainable::All);
        let losses = accumulate(&mut model, &data, scale);
        (losses, common::gradients(&model))
    };
    let (losses, gradients) = run(false);
    assert!((losses.clone(), gradients.clone()) == run(true), "recomputing changes no bit");

    let mut exact = model_of(uneven(), Reference::<f64>::new(), false, &Trainable::All);
    accumulate(&mut exact, &data, scale);
    let mut random = Random(31);
    for (name, fast) in &gradients {
        let truth = exact.gradient(name).unwrap().data;
        for i in [0, 1].map(|_| random.below(truth.len())) {
            let slope = slope(&mut exact, &data, name, i);
            for (what, g) in [("f64 reference", truth[i]), ("cpu", fast[i])] {
                let close = (g as f64 - slope).abs() < 2e-4 + 2e-3 * slope.abs();
                assert!(close, "{name}[{i}], {what}: {g}, slope {slope}");
            }
        }
    }
    // Generation agrees with the forward pass.
    let mut model = model_of(uneven(), Cpu::new(), false, &Trainable::All);
    let ids = Random(5).ids(9);
    let mut cache = model.cache(9).unwrap();
    let mut logits = model.decode(&mut cache, &ids[..4]).unwrap();
    for i in 4..9 {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
        let sum: f64 = logits.iter().map(|x| (*x as f64 - largest).exp()).sum();
        let nll = largest + sum.ln() - logits[ids[i] as usize] as f64;
        let mut one = Batch::default();
        one.push(&ids[..i], [(i as u32 - 1, ids[i], 1.0)]);
        let want = model.forward(&one).unwrap()[0].nll as f64;
        assert!((nll - want).abs() < 1e-5, "token {i}: {nll} from the cache, {want}");
        logits = model.decode(&mut cache, &ids[i..i + 1]).unwrap();
    }
}

#[test]
fn a_device_is_the_backend_that_it_names() {
    let data = batch(3);
    for family in FAMILIES {
        let mut cpu = model(family, Cpu::new(), false);
        let mut same = model(family, Device::cpu(), false);
        let mut plain = model(family, Device::Reference(Reference::new()), false);
        let losses = accumulate(&mut cpu, &data, 0.1);
        assert_eq!(losses, accumulate(&mut same, &data, 0.1), "{family}");
        assert!(common::gradients(&cpu) == common::gradients(&same), "{family}");
        for (a, b) in losses.iter().zip(accumulate(&mut plain, &data, 0.1)) {
            assert!((a.nll - b.nll).abs() < 3e-6 * b.nll.max(1.0), "{family}: {a:?} and {b:?}");
        }
    }
}

#[test]
fn the_gradients_of_ranks_are_summed() {
    // Three ranks, one of them without targets, equal one process that accumulates their batches.
    let mut none = Batch::default();
    none.push(&[1, 2, 3], []);
    let batches = [batch(1), none, batch(2)];
    let scale = 1.0 / batches.iter().map(Batch::weight).sum::<f64>() as f32;
    let names = chosen(&architecture("qwen3"), CHOICES[0].1);
    for trainable in [Trainable::All, Trainable::Named(names)] {
        let new = || model_of(architecture("qwen3"), Cpu::new(), false, &trainable);
        let mut one = new();
        batches.iter().for_each(|batch| drop(accumulate(&mut one, batch, scale)));
        let ranks = Threads::run(3, |rank, collective| {
            let mut model = new();
            accumulate(&mut model, &batches[rank], scale);
            model.all_reduce(collective).unwrap();
            let (norm, gradients) = (model.gradient_norm().unwrap(), trained_gradients(&model));
            model.adamw(&STEP).unwrap();
            (norm, gradients, weights(&model))
        });
        let norm = one.gradient_norm().unwrap();
        assert!(ranks.iter().all(|rank| *rank == ranks[0]), "all ranks end with the same bits");
        assert!((ranks[0].0 / norm - 1.0).abs() < 1e-6, "norm {} and {norm}", ranks[0].0);
        for ((name, got), (_, want)) in ranks[0].1.iter().zip(trained_gradients(&one)) {
            let size = want.iter().map(|x| (*x as f64).powi(2)).sum::<f64>();
            assert!(size < 1e-10 || relative(got, &want) < 1e-6, "{name}: {:e}", relative(got, &want));
        }
    }
}

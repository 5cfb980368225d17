//! Losses, logits, gradients and AdamW trajectories that PyTorch computed.

mod common;

use common::{floats, golden_batch, goldens, json};
use serde_json::Value;
use std::path::Path;
use suasion_engine::{
    ADAPTER_WEIGHTS, AdamW, AdapterFolder, Architecture, Backend, Base, Batch, Budget, Cpu, Model, Reference,
    Trainable, WeightType,
};

/// Tolerances of ENGINE.md.
const LOSS: f64 = 2e-5;
const LOGITS: f64 = 2e-4;
const NORM: f64 = 1e-4;
const TRAJECTORY: f64 = 5e-4;

const BATCHES: [&str; 4] = ["a", "padded", "long_multiturn", "edge_first_last"];

/// Calls `f` for each golden of a model that the engine runs, under both styles of configuration.
fn for_each(mut f: impl FnMut(&str, &Path, Architecture, Value)) {
    for source in goldens() {
        for name in source.models {
            let dir = source.dir.join(name);
            for style in ["config.json", "config_v4_style.json"] {
                let path = dir.join(style);
                let arch = Architecture::from_json(&json(&path), &path).unwrap();
                f(name, &dir, arch, json(&dir.join("golden.json")));
            }
        }
    }
}

fn load<B: Backend>(arch: Architecture, dir: &Path, backend: B, batch: &[&Batch], train: bool) -> Model<B> {
    let tokens = batch.iter().map(|b| b.tokens()).max().unwrap();
    let mut model =
        Model::new(arch, backend, Budget { tokens, targets: tokens, train, recompute: false }).unwrap();
    assert_eq!(model.load_weights(dir).unwrap(), Vec::<String>::new());
    model
}

/// Norm and some elements of each gradient; the model has no others.
fn check_each_gradient<B: Backend>(model: &Model<B>, golden: &Value, what: &str) {
    let grads = golden["grads"].as_object().unwrap();
    assert_eq!(grads.len(), model.trained_names().len(), "{what}");
    for (name, g) in grads {
        let got = model.gradient(name).unwrap_or_else(|e| panic!("{what}: {e}"));
        let shape: Vec<usize> = floats(&g["shape"]).iter().map(|x| *x as usize).collect();
        assert_eq!(got.shape, shape, "{what} {name}");
        let norm = got.data.iter().map(|x| (*x as f64).powi(2)).sum::<f64>().sqrt();
        let want = g["norm"].as_f64().unwrap();
        // A key's bias moves all scores of a query alike: its true gradient is 0 and PyTorch's is rounding.
        assert!((norm - want).abs() < NORM * want.max(1e-3), "{what} {name}: norm {norm}, PyTorch {want}");
        for (i, v) in floats(&g["idx"]).iter().zip(floats(&g["val"])) {
            let got = got.data[*i as usize] as f64;
            assert!((got - v).abs() < NORM * want.max(1e-3), "{what} {name}[{i}]: {got}, PyTorch {v}");
        }
    }
}

/// Five steps of AdamW on one batch: losses, norms of gradients, and the parameters at the end.
fn check_trajectory(model: &mut Model<Cpu>, batch: &Batch, golden: &Value, what: &str) {
    let (losses, norms) = (floats(&golden["losses"]), floats(&golden["grad_norms"]));
    let lr = golden["optimizer"].as_str().unwrap().split_once("lr=").unwrap().1;
    let lr: f64 = lr.split_whitespace().next().unwrap().parse().unwrap();
    for (t, want_loss) in losses.iter().enumerate() {
        model.zero_gradients();
        let outcomes = common::accumulate(model, batch, 1.0 / batch.weight() as f32);
        let loss = common::mean_loss(batch, &outcomes);
        assert!((loss - want_loss).abs() < TRAJECTORY, "{what} step {t}: {loss}, PyTorch {want_loss}");
        if let Some(want) = norms.get(t) {
            let norm = model.gradient_norm().unwrap();
            assert!((norm / want - 1.0).abs() < TRAJECTORY, "{what} step {t}: norm {norm}, PyTorch {want}");
            model.adamw(&adamw(t + 1, lr, 0.01, true, 1.0)).unwrap();
        }
    }
    // The internal material has no values of single parameters.
    for (name, want) in golden["final"].as_object().into_iter().flatten() {
        // The gradient of a key's bias is rounding alone, which AdamW turns into steps of full size.
        if ["k_proj.bias", "c_attn.bias", "query_key_value.bias"].iter().any(|end| name.ends_with(end)) {
            continue;
        }
        let data = model.parameter(name).unwrap().data;
        let norm = data.iter().map(|x| (*x as f64).powi(2)).sum::<f64>().sqrt();
        let sum: f64 = data.iter().map(|x| *x as f64).sum();
        let [want_norm, want_sum] = ["norm", "sum"].map(|k| want[k].as_f64().unwrap());
        assert!((norm / want_norm - 1.0).abs() < 1e-5, "{what} {name}: {norm}, PyTorch {want_norm}");
        assert!((sum - want_sum).abs() < 1e-5 * want_norm, "{what} {name}: {sum}, PyTorch {want_sum}");
    }
}

fn check_gradients<B: Backend>(mut model: Model<B>, batch: &Batch, golden: &Value, what: &str) {
    let outcomes = common::accumulate(&mut model, batch, 1.0 / batch.weight() as f32);
    let (loss, want) = (common::mean_loss(batch, &outcomes), golden["loss"].as_f64().unwrap());
    assert!((loss - want).abs() < LOSS, "{what}: loss {loss}, PyTorch {want}");
    assert_eq!(outcomes.len() as u64, golden["n_supervised"].as_u64().unwrap(), "{what}");
    let (norm, want) = (model.gradient_norm().unwrap(), golden["grad_norm_total"].as_f64().unwrap());
    assert!((norm / want - 1.0).abs() < NORM, "{what}: gradient norm {norm}, PyTorch {want}");
    check_each_gradient(&model, golden, what);
}

#[test]
fn losses_and_gradients_equal_pytorch() {
    for_each(|family, dir, arch, golden| {
        for name in BATCHES {
            let (batch, want) = (golden_batch(&golden["batches"][name]), &golden["fp32"][name]);
            let what = format!("{family}/{name}");
            check_gradients(load(arch.clone(), dir, Cpu::new(), &[&batch], true), &batch, want, &what);
        }
    });
}

#[test]
fn the_reference_equals_pytorch_too() {
    for_each(|family, dir, arch, golden| {
        let (batch, want) = (golden_batch(&golden["batches"]["a"]), &golden["fp32"]["a"]);
        let what = format!("{family}/a on the reference");
        check_gradients(load(arch, dir, Reference::<f32>::new(), &[&batch], true), &batch, want, &what);
    });
}

#[test]
fn logits_equal_pytorch_through_the_cache() {
    for_each(|family, dir, arch, golden| {
        let bytes = std::fs::read(dir.join("golden_logits.safetensors")).unwrap();
        let logits = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let mut seen = 0;
        for (name, tensor) in logits.iter() {
            let batch_name = BATCHES.iter().find(|b| name.ends_with(**b)).unwrap_or_else(|| panic!("{name}"));
            let batch = golden_batch(&golden["batches"][*batch_name]);
            let want: Vec<f32> =
                tensor.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
            let (length, vocab) = (tensor.shape()[1], tensor.shape()[2]);
            let mut model = load(arch.clone(), dir, Cpu::new(), &[&batch], false);
            let mut cache = model.cache(length).unwrap();
            for (row, segment) in batch.segments.iter().enumerate() {
                let ids = &batch.ids[segment.own.start as usize..segment.own.end as usize];
                cache.truncate(0);
                // A prompt of three tokens at once, then one by one, then the rest in one piece.
                let mut at = 0;
                for step in [3, 1, 1, ids.len() - 5] {
                    let got = model.decode(&mut cache, &ids[at..at + step]).unwrap();
                    at += step;
                    // PyTorch's rows are those of the whole sequence, under the rotation of its length.
                    let ropes = arch.blocks.iter().filter_map(|block| block.attention.rope.as_ref());
                    if ropes.into_iter().any(|rope| rope.variant(at) != rope.variant(ids.len())) {
                        continue;
                    }
                    let want = &want[(row * length + at - 1) * vocab..][..vocab];
                    for (i, (got, want)) in got.iter().zip(want).enumerate() {
                        let diff = (got - want).abs() as f64;
                        assert!(
                            diff < LOGITS,
                            "{family}/{name} row {row} position {at} id {i}: {got}, PyTorch {want}"
                        );
                    }
                    seen += 1;
                }
            }
        }
        assert!(seen >= 8, "{family}: only {seen} rows of logits compared");
    });
}

fn adamw(t: usize, lr: f64, weight_decay: f64, decay_all: bool, gradient_scale: f32) -> AdamW {
    AdamW { t: t as u64, lr, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay, decay_all, gradient_scale }
}

#[test]
fn five_steps_of_adamw_equal_pytorch() {
    for_each(|family, dir, arch, golden| {
        let batch = golden_batch(&golden["batches"]["a"]);
        let mut model = load(arch, dir, Cpu::new(), &[&batch], true);
        let want = &golden["adamw_5"];
        check_trajectory(&mut model, &batch, want, family);
        let squares =
            |n: &String| model.parameter(n).unwrap().data.iter().map(|x| (*x as f64).powi(2)).sum::<f64>();
        let length = model.parameter_names().iter().map(squares).sum::<f64>().sqrt();
        let want = want["final_param_l2"].as_f64().unwrap();
        assert!(
            (length / want - 1.0).abs() < 1e-5,
            "{family}: parameters of length {length}, PyTorch {want}"
        );
    });
}

#[test]
fn training_a_choice_of_parameters_equals_pytorch() {
    let mut seen = 0;
    for_each(|family, dir, arch, golden| {
        let batch = golden_batch(&golden["batches"]["a"]);
        for (text, want) in golden["frozen"].as_object().into_iter().flatten() {
            let what = format!("{family}, {text} alone");
            let names = want["trainable"].as_array().unwrap().iter().map(|n| n.as_str().unwrap().to_string());
            let trainable = Trainable::Named(names.collect());
            let budget =
                Budget { tokens: batch.tokens(), targets: batch.tokens(), train: true, recompute: false };
            let mut model = Model::with_trainable(arch.clone(), Cpu::new(), budget, &trainable).unwrap();
            model.load_weights(dir).unwrap();
            common::accumulate(&mut model, &batch, 1.0 / batch.weight() as f32);
            let (norm, total) = (model.gradient_norm().unwrap(), want["grad_norm_total"].as_f64().unwrap());
            assert!((norm / total - 1.0).abs() < NORM, "{what}: gradient norm {norm}, PyTorch {total}");
            check_each_gradient(&model, want, &what);
            check_trajectory(&mut model, &batch, &want["adamw_5"], &what);
            seen += 1;
        }
    });
    assert_eq!(seen, 2 * 8, "eight choices, under both styles of configuration");
}

/// A golden of PEFT: names in memory have `.default` and the names of wrappers, which files leave out.
fn peft_golden(dir: &Path) -> Value {
    let mut text = std::fs::read_to_string(dir.join("golden_lora.json")).unwrap();
    for (memory, file) in [
        (".modules_to_save.default.", "."),
        ("lora_magnitude_vector.default.weight", "lora_magnitude_vector"),
        (".default.weight", ".weight"),
    ] {
        text = text.replace(memory, file);
    }
    serde_json::from_str(&text).unwrap()
}

/// The adapters over a model.
fn adapters(dir: &Path) -> Vec<AdapterFolder> {
    let folders = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut folders: Vec<_> = folders.filter(|path| AdapterFolder::is_one(path)).collect();
    folders.sort();
    folders.iter().map(|path| AdapterFolder::open(path).unwrap()).collect()
}

#[test]
fn low_rank_adapters_equal_peft() {
    let mut seen = 0;
    for_each(|family, dir, arch, golden| {
        let batch = golden_batch(&golden["batches"]["a"]);
        for (adapter, base) in adapters(dir)
            .iter()
            .flat_map(|adapter| [Base::Resident, Base::Mapped].map(|base| (adapter, base)))
        {
            let want = peft_golden(&adapter.path);
            let lora = Trainable::Adapter(adapter.lora_for(&arch).unwrap());
            let new = || {
                let tokens = batch.tokens();
                let budget = Budget { tokens, targets: tokens, train: true, recompute: false };
                let mut model = Model::with_base(arch.clone(), Cpu::new(), budget, &lora, base).unwrap();
                assert_eq!(model.load_weights(dir).unwrap(), Vec::<String>::new());
                model.load_adapter(&adapter.path.join(ADAPTER_WEIGHTS)).unwrap();
                model
            };
            let what = format!("{family}/{}, {base:?}", adapter.path.file_name().unwrap().display());
            check_gradients(new(), &batch, &want["fp32"]["a"], &what);
            check_trajectory(&mut new(), &batch, &want["adamw_5"], &what);
            let copied = !adapter.lora.save.is_empty();
            if !copied && !adapter.lora.dora {
                let mut zero = new();
                for name in zero.trained_names().iter().filter(|n| n.contains("lora_B")) {
                    let mut tensor = zero.parameter(name).unwrap();
                    tensor.data.fill(0.0);
                    zero.set_parameter(name, &tensor).unwrap();
                }
                check_trajectory(
                    &mut zero,
                    &batch,
                    &want["adamw_5_from_B_zero"],
                    &format!("{what} from zero"),
                );
            }
            // As PEFT begins: copies are the base, magnitudes its rows' lengths.
            if copied || adapter.lora.dora {
                let mut begun = new();
                let values = |model: &Model<Cpu>, name: &String| model.parameter(name).unwrap();
                let a: Vec<_> = begun.trained_names().into_iter().filter(|n| n.contains("lora_A")).collect();
                let a: Vec<_> = a.into_iter().map(|name| (values(&begun, &name), name)).collect();
                begun.init_adapter(1).unwrap();
                a.iter().for_each(|(tensor, name)| begun.set_parameter(name, tensor).unwrap());
                check_trajectory(
                    &mut begun,
                    &batch,
                    &want["adamw_5_from_B_zero"],
                    &format!("{what} from the start"),
                );
            }
            let merged_dir = tempfile::tempdir().unwrap();
            let untied = new().save_merged(merged_dir.path(), WeightType::F32).unwrap();
            let mut merged_arch = arch.clone();
            merged_arch.head.tied &= !untied;
            let mut plain = load(merged_arch, merged_dir.path(), Cpu::new(), &[&batch], false);
            let loss = common::mean_loss(&batch, &plain.forward(&batch).unwrap());
            let want = want["merged_loss_a"].as_f64().unwrap();
            assert!((loss - want).abs() < LOSS, "{what}, merged: loss {loss}, PEFT {want}");
            seen += 1;
        }
    });
    assert!(seen >= 2 * 2 * 20, "20 adapters of the repository, under both styles of configuration: {seen}");
}

#[test]
fn five_steps_as_the_trainer_does_them_equal_pytorch() {
    for_each(|family, dir, arch, golden| {
        let batches = ["a", "padded"].map(|b| golden_batch(&golden["batches"][b]));
        let mut model = load(arch, dir, Cpu::new(), &[&batches[0], &batches[1]], true);
        let want = &golden["hf_like_5"];
        let [losses, norms, lrs] = ["losses", "grad_norms_before_clip", "lrs"].map(|k| floats(&want[k]));
        let total: f64 = batches.iter().map(Batch::weight).sum();
        assert_eq!(total, want["total_supervised"].as_f64().unwrap());
        for (t, want_loss) in losses.iter().enumerate() {
            model.zero_gradients();
            let loss: f64 = batches
                .iter()
                .map(|b| {
                    let outcomes = common::accumulate(&mut model, b, 1.0 / total as f32);
                    common::mean_loss(b, &outcomes) * b.weight() / total
                })
                .sum();
            assert!((loss - want_loss).abs() < TRAJECTORY, "{family} step {t}: {loss}, PyTorch {want_loss}");
            if let Some(want) = norms.get(t) {
                let norm = model.gradient_norm().unwrap();
                assert!(
                    (norm / want - 1.0).abs() < TRAJECTORY,
                    "{family} step {t}: norm {norm}, PyTorch {want}"
                );
                let clip = (1.0 / (norm + 1e-6)).min(1.0) as f32;
                model.adamw(&adamw(t + 1, lrs[t], 0.1, false, clip)).unwrap();
            }
        }
    });
}

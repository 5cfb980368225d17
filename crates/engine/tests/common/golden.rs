//! Comparisons of a model with values from PyTorch, on any backend.

use super::{floats, golden_batch, goldens, json};
use serde_json::Value;
use std::path::Path;
use suasion_engine::{AdamW, AdapterFolder, Architecture, Backend, Batch, Budget, Model};

/// Tolerances of ENGINE.md.
pub const LOSS: f64 = 2e-5;
pub const LOGITS: f64 = 2e-4;
pub const NORM: f64 = 1e-4;
pub const TRAJECTORY: f64 = 5e-4;

pub const BATCHES: [&str; 4] = ["a", "padded", "long_multiturn", "edge_first_last"];

/// Calls `f` for each golden of a model that the engine supports, with both styles of configuration.
pub fn for_each(mut f: impl FnMut(&str, &Path, Architecture, Value)) {
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

pub fn load<B: Backend>(
    arch: Architecture,
    dir: &Path,
    backend: B,
    batch: &[&Batch],
    train: bool,
) -> Model<B> {
    let tokens = batch.iter().map(|b| b.tokens()).max().unwrap();
    let mut model =
        Model::new(arch, backend, Budget { tokens, targets: tokens, train, recompute: false }).unwrap();
    assert_eq!(model.load_weights(dir).unwrap(), Vec::<String>::new());
    model
}

/// Compares norm and some elements of each gradient; the model must have no other gradients.
pub fn check_each_gradient<B: Backend>(model: &Model<B>, golden: &Value, what: &str) {
    let grads = golden["grads"].as_object().unwrap();
    assert_eq!(grads.len(), model.trained_names().len(), "{what}");
    for (name, g) in grads {
        let got = model.gradient(name).unwrap_or_else(|e| panic!("{what}: {e}"));
        let shape: Vec<usize> = floats(&g["shape"]).iter().map(|x| *x as usize).collect();
        assert_eq!(got.shape, shape, "{what} {name}");
        let norm = got.data.iter().map(|x| (*x as f64).powi(2)).sum::<f64>().sqrt();
        let want = g["norm"].as_f64().unwrap();
        // A key's bias shifts all scores of a query equally: its true gradient is 0 and PyTorch's is rounding error.
        assert!((norm - want).abs() < NORM * want.max(1e-3), "{what} {name}: norm {norm}, PyTorch {want}");
        for (i, v) in floats(&g["idx"]).iter().zip(floats(&g["val"])) {
            let got = got.data[*i as usize] as f64;
            assert!((got - v).abs() < NORM * want.max(1e-3), "{what} {name}[{i}]: {got}, PyTorch {v}");
        }
    }
}

/// Five steps of AdamW on one batch: losses, gradient norms, and the final parameters.
pub fn check_trajectory<B: Backend>(model: &mut Model<B>, batch: &Batch, golden: &Value, what: &str) {
    let (losses, norms) = (floats(&golden["losses"]), floats(&golden["grad_norms"]));
    let lr = golden["optimizer"].as_str().unwrap().split_once("lr=").unwrap().1;
    let lr: f64 = lr.split_whitespace().next().unwrap().parse().unwrap();
    for (t, want_loss) in losses.iter().enumerate() {
        model.zero_gradients();
        let outcomes = super::accumulate(model, batch, 1.0 / batch.weight() as f32);
        let loss = super::mean_loss(batch, &outcomes);
        assert!((loss - want_loss).abs() < TRAJECTORY, "{what} step {t}: {loss}, PyTorch {want_loss}");
        if let Some(want) = norms.get(t) {
            let norm = model.gradient_norm().unwrap();
            assert!((norm / want - 1.0).abs() < TRAJECTORY, "{what} step {t}: norm {norm}, PyTorch {want}");
            model.adamw(&adamw(t + 1, lr, 0.01, true, 1.0)).unwrap();
        }
    }
    // The internal material has no values of single parameters.
    for (name, want) in golden["final"].as_object().into_iter().flatten() {
        // The gradient of a key's bias is only rounding error, which AdamW turns into full-size steps.
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

pub fn check_gradients<B: Backend>(mut model: Model<B>, batch: &Batch, golden: &Value, what: &str) {
    let outcomes = super::accumulate(&mut model, batch, 1.0 / batch.weight() as f32);
    let (loss, want) = (super::mean_loss(batch, &outcomes), golden["loss"].as_f64().unwrap());
    assert!((loss - want).abs() < LOSS, "{what}: loss {loss}, PyTorch {want}");
    assert_eq!(outcomes.len() as u64, golden["n_supervised"].as_u64().unwrap(), "{what}");
    let (norm, want) = (model.gradient_norm().unwrap(), golden["grad_norm_total"].as_f64().unwrap());
    assert!((norm / want - 1.0).abs() < NORM, "{what}: gradient norm {norm}, PyTorch {want}");
    check_each_gradient(&model, golden, what);
}

pub fn adamw(t: usize, lr: f64, weight_decay: f64, decay_all: bool, gradient_scale: f32) -> AdamW {
    AdamW { t: t as u64, lr, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay, decay_all, gradient_scale }
}

/// A golden of PEFT: its in-memory names contain `.default` and the names of wrappers, which files omit.
pub fn peft_golden(dir: &Path) -> Value {
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

/// The adapters of a model.
pub fn adapters(dir: &Path) -> Vec<AdapterFolder> {
    let folders = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut folders: Vec<_> = folders.filter(|path| AdapterFolder::is_one(path)).collect();
    folders.sort();
    folders.iter().map(|path| AdapterFolder::open(path).unwrap()).collect()
}

/// Logits of prompts that are appended to the cache in pieces.
pub fn check_logits<B: Backend>(
    family: &str,
    dir: &Path,
    arch: &Architecture,
    golden: &Value,
    backend: impl Fn() -> B,
) {
    let bytes = std::fs::read(dir.join("golden_logits.safetensors")).unwrap();
    let logits = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut seen = 0;
    for (name, tensor) in logits.iter() {
        let batch_name = BATCHES.iter().find(|b| name.ends_with(**b)).unwrap_or_else(|| panic!("{name}"));
        let batch = golden_batch(&golden["batches"][*batch_name]);
        let want: Vec<f32> =
            tensor.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        let (length, vocab) = (tensor.shape()[1], tensor.shape()[2]);
        let mut model = load(arch.clone(), dir, backend(), &[&batch], false);
        let mut cache = model.cache(length).unwrap();
        for (row, segment) in batch.segments.iter().enumerate() {
            let ids = &batch.ids[segment.own.start as usize..segment.own.end as usize];
            cache.truncate(0);
            // Three tokens of the prompt at once, then one by one, then the rest in one piece.
            let mut at = 0;
            for step in [3, 1, 1, ids.len() - 5] {
                let got = model.decode(&mut cache, &ids[at..at + step]).unwrap();
                at += step;
                // PyTorch's rows are from one pass over the sequence, with the rotation for its full length.
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
}

//! Rows of embedding and head for new tokens: initialised as in transformers, and in adapters.

mod common;

use common::{floats, golden_batch, json, mean_loss};
use serde_json::Value;
use std::path::{Path, PathBuf};
use suasion_engine::{
    ADAPTER_WEIGHTS, Architecture, Base, Batch, Budget, Cpu, Error, Lora, Model, Targets, Trainable,
    WeightType,
};

const MODELS: [&str; 3] = ["llama", "llama_tied", "gpt2"];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models").join(name)
}

fn golden() -> Value {
    json(&folder("training.json"))["resized"].clone()
}

fn architecture(name: &str, more: usize, seed: u64) -> Architecture {
    let mut arch = Architecture::from_dir(&folder(name)).unwrap();
    arch.grow(arch.vocab_size + more, seed);
    arch
}

fn budget(batch: &Batch) -> Budget {
    Budget { tokens: batch.tokens(), targets: batch.tokens(), train: true, recompute: false }
}

fn batch(name: &str) -> Batch {
    golden_batch(&json(&folder(name).join("golden.json"))["batches"]["a"])
}

fn loaded(name: &str, more: usize, seed: u64, batch: &Batch) -> Model<Cpu> {
    let mut model = Model::new(architecture(name, more, seed), Cpu::new(), budget(batch)).unwrap();
    assert_eq!(model.load_weights(&folder(name)).unwrap(), Vec::<String>::new());
    model
}

/// The names of embedding and head; only one if the head is tied.
fn tables(model: &Model<Cpu>) -> Vec<(&'static str, String)> {
    let arch = model.architecture();
    let names = [("embedding", arch.names.embedding), ("head", arch.names.head)];
    let own = names.into_iter().filter(|(key, _)| *key == "embedding" || !arch.head.tied);
    own.map(|(key, name)| (key, format!("{name}.weight"))).collect()
}

#[test]
fn loss_and_gradients_of_a_resized_model_are_those_of_transformers() {
    for name in MODELS {
        let (want, batch) = (golden()[name].clone(), batch(name));
        let mut model = loaded(name, want["rows"].as_u64().unwrap() as usize, 1, &batch);
        let losses = common::accumulate(&mut model, &batch, 1.0 / batch.weight() as f32);
        let (loss, theirs) = (mean_loss(&batch, &losses), want["loss"].as_f64().unwrap());
        assert!((loss - theirs).abs() < 2e-5, "{name}: {loss}, transformers {theirs}");
        let norms = want["grad_norms"].as_object().unwrap();
        assert_eq!(norms.len(), model.trained_names().len());
        for (parameter, norm) in norms {
            let data = model.gradient(parameter).unwrap().data;
            let (ours, theirs) =
                (data.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt(), norm.as_f64().unwrap());
            // The gradient of a key's bias is only rounding error.
            assert!(
                (ours - theirs).abs() < 1e-4 * theirs.max(1e-3),
                "{name} {parameter}: {ours}, PyTorch {theirs}"
            );
        }
    }
}

#[test]
fn new_rows_have_mean_and_covariance_of_the_others() {
    const NEW: usize = 4000;
    for name in MODELS {
        let golden = golden()[name].clone();
        let batch = batch(name);
        let (plain, model) = (loaded(name, 0, 0, &batch), loaded(name, NEW, 5, &batch));
        let (hidden, rows) = (model.architecture().hidden, plain.architecture().vocab_size);
        for (key, table) in tables(&model) {
            let (old, all) = (plain.parameter(&table).unwrap(), model.parameter(&table).unwrap());
            assert_eq!(all.shape, [rows + NEW, hidden]);
            let (kept, new) = all.data.split_at(rows * hidden);
            assert_eq!(kept, old.data, "{name} {table}: the rows of the base");
            let (mean, covariance) = moments(&old.data, hidden);
            let (new_mean, new_covariance) = moments(new, hidden);
            let [want_mean, want_std] = ["mean", "std"].map(|moment| floats(&golden[key][moment]));
            for i in 0..hidden {
                let deviation = (1e-9 * covariance[i * hidden + i]).sqrt();
                let what = format!("{name} {table} column {i}");
                // Five standard deviations of the mean over this many draws, plus f32 rounding.
                let near = 5.0 * deviation / (NEW as f64).sqrt() + 1e-7 * mean[i].abs();
                assert!((new_mean[i] - mean[i]).abs() < near, "{what}: {} {}", new_mean[i], mean[i]);
                assert!((want_mean[i] - mean[i]).abs() < 1e-6, "{what}: PyTorch's mean {}", want_mean[i]);
                // PyTorch's value is from 4,000 draws too: each has an error of 1.1 %.
                let ours = new_covariance[i * hidden + i].sqrt();
                assert!((ours / deviation - 1.0).abs() < 0.06, "{what}: {ours}, formula {deviation}");
                assert!((ours / want_std[i] - 1.0).abs() < 0.08, "{what}: {ours}, PyTorch {}", want_std[i]);
            }
            let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
            let off = norm(&mut new_covariance.iter().zip(&covariance).map(|(new, old)| new - 1e-9 * old));
            let whole = norm(&mut covariance.iter().map(|old| 1e-9 * old));
            // About 0.09 with 4,000 draws of 32 columns; 0.8 if columns were independent.
            assert!(off < 0.2 * whole, "{name} {table}: covariance {off} of {whole} off");
        }
    }
}

/// Mean and covariance over the rows.
fn moments(rows: &[f32], hidden: usize) -> (Vec<f64>, Vec<f64>) {
    let count = (rows.len() / hidden) as f64;
    let mut mean = vec![0.0; hidden];
    rows.chunks(hidden)
        .for_each(|row| mean.iter_mut().zip(row).for_each(|(m, x)| *m += f64::from(*x) / count));
    let mut covariance = vec![0.0; hidden * hidden];
    for row in rows.chunks(hidden) {
        for i in 0..hidden {
            for j in 0..hidden {
                covariance[i * hidden + j] +=
                    (f64::from(row[i]) - mean[i]) * (f64::from(row[j]) - mean[j]) / count;
            }
        }
    }
    (mean, covariance)
}

#[test]
fn new_rows_follow_from_the_seed_alone() {
    let batch = batch("llama");
    let rows = |seed, threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let model = pool.install(|| loaded("llama", 9, seed, &batch));
        tables(&model).into_iter().map(|(_, name)| model.parameter(&name).unwrap().data).collect::<Vec<_>>()
    };
    assert_eq!(rows(3, 1), rows(3, 2));
    assert_ne!(rows(3, 1), rows(4, 1));
    // With no more rows than columns the covariance is singular: the mean is used, as in transformers.
    let dir = tempfile::tempdir().unwrap();
    let arch = |vocabulary: usize| {
        let mut config = json(&folder("llama").join("config.json"));
        config["vocab_size"] = vocabulary.into();
        Architecture::from_json(&config, Path::new("config.json")).unwrap()
    };
    let whole = Budget { tokens: 4, targets: 4, train: false, recompute: false };
    let mut small = Model::new(arch(20), Cpu::new(), whole).unwrap();
    small.init_random(1).unwrap();
    small.save_weights(dir.path()).unwrap();
    let mut grown = arch(20);
    grown.grow(22, 1);
    let mut model = Model::new(grown, Cpu::new(), whole).unwrap();
    model.load_weights(dir.path()).unwrap();
    let table = model.parameter("model.embed_tokens.weight").unwrap().data;
    let (mean, _) = moments(&table[..20 * 32], 32);
    for row in table[20 * 32..].chunks(32) {
        row.iter().zip(&mean).for_each(|(x, mean)| assert!((f64::from(*x) - mean).abs() < 1e-8));
    }
}

#[test]
fn a_resized_model_is_saved_and_loaded_as_it_is() {
    for name in MODELS {
        let (batch, dir) = (batch(name), tempfile::tempdir().unwrap());
        let mut model = loaded(name, 3, 1, &batch);
        let losses = model.forward(&batch).unwrap();
        model.save_masters(dir.path()).unwrap();
        // Loaded as it is, and into an architecture with added rows.
        for seed in [1, 2] {
            let mut arch = architecture(name, 3, seed);
            if seed == 1 {
                arch.added = None;
            }
            let mut again = Model::new(arch, Cpu::new(), budget(&batch)).unwrap();
            again.load_weights(dir.path()).unwrap();
            assert_eq!(again.forward(&batch).unwrap(), losses, "{name}");
        }
        // A base with another number of rows is another model.
        let mut arch = architecture(name, 9, 1);
        arch.added = arch.added.map(|added| suasion_engine::AddedRows { base: added.base + 1, ..added });
        let error =
            Model::new(arch, Cpu::new(), budget(&batch)).unwrap().load_weights(&folder(name)).unwrap_err();
        assert!(error.to_string().contains("has shape [128, 32], config.json asks for [137, 32]"), "{error}");
    }
}

#[test]
fn an_adapter_holds_the_new_rows() {
    let adapter = |save: &[&str]| {
        Trainable::Adapter(Lora {
            rank: 2,
            targets: Targets::Names(vec!["q_proj".into()]),
            save: save.iter().map(|name| name.to_string()).collect(),
            ..Lora::default()
        })
    };
    for name in ["llama", "llama_tied"] {
        let batch = batch(name);
        let model = |base: Base, arch: Architecture, save: &[&str]| {
            let mut model = Model::with_base(arch, Cpu::new(), budget(&batch), &adapter(save), base)?;
            model.load_weights(&folder(name))?;
            model.init_adapter(3)?;
            Ok::<_, Error>(model)
        };
        for save in [&["lm_head"][..], &["embed_tokens"], &[]] {
            let error = model(Base::Mapped, architecture(name, 3, 1), save).unwrap_err().to_string();
            assert!(
                error.contains("lora_modules_to_save: [embed_tokens, lm_head]"),
                "{name} {save:?}: {error}"
            );
        }
        let save = ["embed_tokens", "lm_head"];
        let mut whole = loaded(name, 3, 1, &batch);
        let want = whole.forward(&batch).unwrap();
        let dir = tempfile::tempdir().unwrap();
        for base in [Base::Resident, Base::Mapped] {
            let mut model = model(base, architecture(name, 3, 1), &save).unwrap();
            let losses = model.forward(&batch).unwrap();
            for (ours, want) in losses.iter().zip(&want) {
                assert!((ours.nll - want.nll).abs() < 1e-5, "{name} {base:?}: {} {}", ours.nll, want.nll);
            }
            common::accumulate(&mut model, &batch, 0.1);
            model.adamw(&common::STEP).unwrap();
            model.save_adapter(&dir.path().join(ADAPTER_WEIGHTS), true).unwrap();
            let trained = model.forward(&batch).unwrap();
            // With another seed: the rows come from the adapter's file.
            let mut again = self::loaded_adapter(name, base, &adapter(&save), &batch);
            again.load_adapter(&dir.path().join(ADAPTER_WEIGHTS)).unwrap();
            assert_eq!(again.forward(&batch).unwrap(), trained, "{name} {base:?}");
            let merged = tempfile::tempdir().unwrap();
            let untied = again.save_merged(merged.path(), WeightType::F32).unwrap();
            let mut arch = architecture(name, 3, 9);
            (arch.added, arch.head.tied) = (None, arch.head.tied && !untied);
            let mut plain = Model::new(arch, Cpu::new(), budget(&batch)).unwrap();
            plain.load_weights(merged.path()).unwrap();
            for (ours, want) in plain.forward(&batch).unwrap().iter().zip(&trained) {
                assert!(
                    (ours.nll - want.nll).abs() < 1e-5,
                    "{name} {base:?} merged: {} {}",
                    ours.nll,
                    want.nll
                );
            }
        }
    }
}

fn loaded_adapter(name: &str, base: Base, adapter: &Trainable, batch: &Batch) -> Model<Cpu> {
    let mut model =
        Model::with_base(architecture(name, 3, 9), Cpu::new(), budget(batch), adapter, base).unwrap();
    model.load_weights(&folder(name)).unwrap();
    model
}

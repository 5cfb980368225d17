//! Damaged configurations, weights and indices: errors are fine, panics are not.

use std::path::{Path, PathBuf};
use suasion_engine::{Architecture, Budget, Device, MemoryPlan, Model};
use suasion_test_support::fuzz::run;

fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models").join(name)
}

const BUDGET: Budget = Budget { tokens: 8, targets: 4, train: true, recompute: false };

/// `config.json` of every family, in both styles. A plan of what is understood never panics either.
#[test]
fn configurations() {
    let files = ["config.json", "config_v4_style.json"];
    let read = |name: &&str| files.map(|file| std::fs::read(model(name).join(file)).unwrap());
    let inputs: Vec<Vec<u8>> = suasion_test_support::MODELS.iter().flat_map(read).collect();
    run("configurations", &inputs, |bytes| {
        let Ok(json) = serde_json::from_slice(bytes) else { return };
        if let Ok(arch) = Architecture::from_json(&json, Path::new("config.json")) {
            let _ = MemoryPlan::of(&arch, BUDGET).total();
            let _ = arch.parameter_count();
        }
    });
}

/// Weights and the index of shards beside a good configuration.
#[test]
fn weights() {
    let dir = tempfile::tempdir().unwrap();
    let arch = Architecture::from_dir(&model("llama_tied")).unwrap();
    let file = std::fs::read(model("llama_tied").join("model.safetensors")).unwrap();
    let index =
        br#"{"metadata": {}, "weight_map": {"model.norm.weight": "a.safetensors", "x": "../b"}}"#.to_vec();
    let mut made = Model::new(arch, Device::cpu(), BUDGET).unwrap();
    let header = file.len().min(6000);
    run("weights", &[file.clone(), file[..header].to_vec(), index.clone()], |bytes| {
        let name = if bytes.starts_with(b"{") { "model.safetensors.index.json" } else { "model.safetensors" };
        std::fs::write(dir.path().join(name), bytes).unwrap();
        let _ = made.load_weights(dir.path());
        let _ = made.load_optimizer(&dir.path().join(name));
        std::fs::remove_file(dir.path().join(name)).unwrap();
    });
}

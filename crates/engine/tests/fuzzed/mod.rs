//! The parsers of untrusted bytes in this crate, with valid inputs: damaged in `fuzz.rs`, and fuzzed by the targets in
//! the repository's `fuzz/`.

use std::path::{Path, PathBuf};
use suasion_engine::{
    ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterFolder, Architecture, Budget, Device, MemoryPlan, Model,
    Trainable,
};
use suasion_test_support::fuzz::{Parser, reached};
use suasion_test_support::repository;
use tempfile::TempDir;

fn model(name: &str) -> PathBuf {
    repository().join("tests/goldens/models").join(name)
}

const BUDGET: Budget = Budget { tokens: 8, targets: 4, train: true, recompute: false };

/// `config.json` of every family, in both styles, and adapters' configurations. Planning the memory of a valid one must
/// not panic either.
pub struct Configurations {
    dir: TempDir,
    arch: Architecture,
}

impl Parser for Configurations {
    const NAME: &'static str = "configurations";
    const KINDS: usize = 2;

    fn seeds() -> Vec<(usize, Vec<u8>)> {
        let mut seeds = Vec::new();
        for name in suasion_test_support::MODELS {
            for file in ["config.json", "config_v4_style.json"] {
                seeds.push((0, std::fs::read(model(name).join(file)).unwrap()));
            }
        }
        for adapter in ["lora", "lora_all_linear", "lora_head", "lora_patterns", "dora"] {
            seeds.push((1, std::fs::read(model("llama").join(adapter).join(ADAPTER_CONFIG)).unwrap()));
        }
        let words = br#"{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ".*layers\\.(0|1)\\..*(q|v)_proj", "layers_to_transform": [0],
            "layers_pattern": "layers", "rank_pattern": {"q_proj$": 3}, "modules_to_save": ["norm"], "use_rslora": true, "exclude_modules": ["v_proj"]}"#;
        seeds.push((1, words.to_vec()));
        seeds
    }

    fn new() -> Configurations {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(model("llama/lora").join(ADAPTER_WEIGHTS), dir.path().join(ADAPTER_WEIGHTS)).unwrap();
        Configurations { dir, arch: Architecture::from_dir(&model("llama")).unwrap() }
    }

    fn parse(&mut self, kind: usize, bytes: &[u8]) {
        if kind == 1 {
            std::fs::write(self.dir.path().join(ADAPTER_CONFIG), bytes).unwrap();
            let Ok(adapter) = AdapterFolder::open(self.dir.path()) else { return };
            if let Ok(lora) = adapter.lora_for(&self.arch) {
                reached(MemoryPlan::with(&self.arch, BUDGET, &Trainable::Adapter(lora)));
            }
            return;
        }
        let Ok(json) = serde_json::from_slice(bytes) else { return };
        if let Ok(arch) = Architecture::from_json(&json, Path::new("config.json")) {
            let _ = MemoryPlan::of(&arch, BUDGET).total();
            let _ = arch.parameter_count();
        }
    }
}

/// Weights, the index of shards, an optimizer's moments and an adapter's weights, with a valid configuration.
pub struct Weights {
    dir: TempDir,
    whole: Model,
    adapted: Model,
}

impl Parser for Weights {
    const NAME: &'static str = "weights";
    const KINDS: usize = 4;

    fn seeds() -> Vec<(usize, Vec<u8>)> {
        let file = std::fs::read(model("llama_tied").join("model.safetensors")).unwrap();
        let head = file[..file.len().min(6000)].to_vec();
        let index = br#"{"metadata": {}, "weight_map": {"model.norm.weight": "a.safetensors", "x": "../b"}}"#;
        let adapter = std::fs::read(model("llama/lora").join(ADAPTER_WEIGHTS)).unwrap();
        let small = br#"{"a": {"dtype": "BF16", "shape": [2, 1], "data_offsets": [0, 4]}, "__metadata__": {"format": "pt"}}"#;
        let small = [&(small.len() as u64).to_le_bytes()[..], small, &[0; 4]].concat();
        vec![
            (0, file.clone()),
            (0, head),
            (0, small.clone()),
            (1, index.to_vec()),
            (2, small.clone()),
            (3, adapter),
            (3, small),
        ]
    }

    fn new() -> Weights {
        let arch = |name: &str| Architecture::from_dir(&model(name)).unwrap();
        let lora = AdapterFolder::open(&model("llama/lora")).unwrap().lora;
        let trainable = Trainable::Adapter(lora);
        Weights {
            dir: tempfile::tempdir().unwrap(),
            whole: Model::new(arch("llama_tied"), Device::cpu(), BUDGET).unwrap(),
            adapted: Model::with_trainable(arch("llama"), Device::cpu(), BUDGET, &trainable).unwrap(),
        }
    }

    fn parse(&mut self, kind: usize, bytes: &[u8]) {
        let names =
            ["model.safetensors", "model.safetensors.index.json", "optimizer.safetensors", ADAPTER_WEIGHTS];
        let path = self.dir.path().join(names[kind]);
        std::fs::write(&path, bytes).unwrap();
        match kind {
            0 | 1 => reached(self.whole.load_weights(self.dir.path())),
            2 => reached(self.whole.load_optimizer(&path)),
            _ => reached(self.adapted.load_adapter(&path)),
        }
        std::fs::remove_file(&path).unwrap();
    }
}

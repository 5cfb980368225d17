//! Code shared by the engine's tests: goldens, small models, random numbers.
#![allow(dead_code, reason = "each test binary uses its part")]

pub mod card;
pub mod emulation;
pub mod golden;
pub mod threads;

use serde_json::Value;
use std::path::{Path, PathBuf};
use suasion_engine::{
    AdamW, Architecture, Backend, Batch, Budget, Model, Optimizer, TargetLoss, Trainable, WeightType,
};

/// A folder of values from PyTorch, and its models that the engine supports.
pub struct Goldens {
    pub dir: PathBuf,
    pub models: &'static [&'static str],
}

/// The goldens of the repository, then the internal material if this machine has it.
pub fn goldens() -> Vec<Goldens> {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir = crate_dir.join("../../tests/goldens/models");
    assert!(dir.is_dir(), "{} is missing", dir.display());
    let mut all = vec![Goldens { dir, models: &suasion_test_support::MODELS }];
    if let Some(material) = suasion_test_support::material_folder() {
        all.push(Goldens { dir: material.join("models"), models: &MATERIAL_FAMILIES });
    }
    all
}

pub fn json(path: &Path) -> Value {
    // Python writes NaN where a padded row sees no key; no compared value is NaN.
    let text = std::fs::read_to_string(path).unwrap().replace("NaN", "null");
    serde_json::from_str(&text).unwrap()
}

pub fn floats(v: &Value) -> Vec<f64> {
    v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn ints(v: &Value) -> Vec<i64> {
    v.as_array().unwrap().iter().map(|x| x.as_i64().unwrap()).collect()
}

/// A golden batch as packs: padding removed by its mask, labels shifted.
pub fn golden_batch(v: &Value) -> Batch {
    let mut batch = Batch::default();
    for row in 0..v["input_ids"].as_array().unwrap().len() {
        let [ids, labels, mask] = ["input_ids", "labels", "attention_mask"].map(|k| ints(&v[k][row]));
        let len = mask.iter().filter(|m| **m == 1).count();
        assert!(mask[..len].iter().all(|m| *m == 1), "right padding");
        let ids: Vec<u32> = ids[..len].iter().map(|i| *i as u32).collect();
        let targets = (1..len).filter(|&i| labels[i] != -100).map(|i| (i as u32 - 1, labels[i] as u32, 1.0));
        batch.push(&ids, targets);
    }
    batch
}

/// A small configuration of a family, with all its distinguishing settings.
pub fn config(family: &str) -> Value {
    let mut config = base(family);
    let own = match family {
        "mistral" => serde_json::json!({"sliding_window": 5}),
        "phi3" => serde_json::json!({
            "sliding_window": 9, "partial_rotary_factor": 0.67, "original_max_position_embeddings": 128
        }),
        "qwen3_moe" => serde_json::json!({
            "head_dim": 10, "num_experts": 7, "num_experts_per_tok": 2, "moe_intermediate_size": 9,
            "norm_topk_prob": true, "mlp_only_layers": [1]
        }),
        "granite" => serde_json::json!({
            "embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.6,
            "logits_scaling": 1.7
        }),
        "smollm3" => serde_json::json!({"no_rope_layers": [1, 0, 1]}),
        "gpt_neox" => {
            serde_json::json!({"num_key_value_heads": null, "hidden_act": "gelu", "rotary_pct": 0.67})
        }
        "gemma2" => serde_json::json!({
            "query_pre_attn_scalar": 9, "sliding_window": 5, "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 2.0, "hidden_act": "gelu_pytorch_tanh"
        }),
        "gemma3_text" => serde_json::json!({
            "query_pre_attn_scalar": 9, "sliding_window": 5, "rope_local_base_freq": 100.0,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "hidden_act": "gelu_pytorch_tanh"
        }),
        _ => serde_json::json!({}),
    };
    for (key, value) in own.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn base(family: &str) -> Value {
    let tied = ["qwen2", "smollm3", "gemma2", "gemma3_text"].contains(&family);
    match family {
        "gpt2" => serde_json::json!({
            "model_type": "gpt2", "vocab_size": 97, "n_embd": 24, "n_layer": 3, "n_head": 3, "n_positions": 128,
            "initializer_range": 0.3
        }),
        family => serde_json::json!({
            "model_type": family, "vocab_size": 97, "hidden_size": 24, "intermediate_size": 40,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            // Qwen3's head size does not follow from the other sizes.
            "head_dim": if family == "qwen3" { 10 } else { 6 },
            "max_position_embeddings": 128, "hidden_act": "silu", "rms_norm_eps": 1e-5,
            "tie_word_embeddings": tied,
            "initializer_range": 0.3
        }),
    }
}

pub const FAMILIES: [&str; 13] = [
    "llama",
    "qwen2",
    "gpt2",
    "qwen3",
    "mistral",
    "phi3",
    "olmo2",
    "granite",
    "smollm3",
    "gpt_neox",
    "gemma2",
    "gemma3_text",
    "qwen3_moe",
];

/// The families of the internal test material.
pub const MATERIAL_FAMILIES: [&str; 5] = ["llama", "qwen2", "gpt2", "phi3", "gemma2"];

pub fn architecture(family: &str) -> Architecture {
    Architecture::from_json(&config(family), Path::new("config.json")).unwrap()
}

/// As [`architecture`], but each row takes all experts: the loss jumps where a row's choice changes, and has no slope
/// there.
pub fn smooth(family: &str) -> Architecture {
    let mut arch = architecture(family);
    for experts in arch.blocks.iter_mut().filter_map(|block| block.mlp.experts.as_mut()) {
        experts.routing.per_row = experts.count;
    }
    arch
}

pub fn model<B: Backend>(family: &str, backend: B, recompute: bool) -> Model<B> {
    model_of(architecture(family), backend, recompute, &Trainable::All)
}

/// A model with random weights, norms and biases; the same for every choice of trained parameters.
pub fn model_of<B: Backend>(
    arch: Architecture,
    backend: B,
    recompute: bool,
    trainable: &Trainable,
) -> Model<B> {
    let budget = Budget { tokens: 256, targets: 256, train: true, recompute };
    let mut model = Model::with_trainable(arch, backend, budget, trainable).unwrap();
    model.init_random(7).unwrap();
    // Biases and norms differ from 0 and 1, so that each of them matters.
    let mut random = Random(3);
    for name in model.parameter_names() {
        let mut tensor = model.parameter(&name).unwrap();
        if tensor.shape.len() == 1 {
            tensor.data.iter_mut().for_each(|x| *x += 0.3 * random.normal() as f32);
            model.set_parameter(&name, &tensor).unwrap();
        }
    }
    model
}

/// A small generator (SplitMix64): tests need reproducible numbers, not statistical quality.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Approximately normal: the sum of twelve uniforms.
    pub fn normal(&mut self) -> f64 {
        (0..12).map(|_| (self.next() >> 11) as f64 / (1u64 << 53) as f64).sum::<f64>() - 6.0
    }

    pub fn ids(&mut self, n: usize) -> Vec<u32> {
        (0..n).map(|_| self.below(97) as u32).collect()
    }
}

/// All gradients, by name.
pub fn gradients<B: Backend>(model: &Model<B>) -> Vec<(String, Vec<f32>)> {
    model.parameter_names().into_iter().map(|n| (n.clone(), model.gradient(&n).unwrap().data)).collect()
}

/// Accumulates a batch's gradients and reads its losses.
pub fn accumulate<B: Backend>(model: &mut Model<B>, batch: &Batch, scale: f32) -> Vec<TargetLoss> {
    let losses = model.accumulate(batch, scale).unwrap();
    model.read_losses(&losses).unwrap()
}

/// Σ w·nll over Σ w.
pub fn mean_loss(batch: &Batch, outcomes: &[TargetLoss]) -> f64 {
    let sum: f64 = batch.targets.iter().zip(outcomes).map(|(t, o)| t.weight as f64 * o.nll as f64).sum();
    sum / batch.weight()
}

/// The slope of the mean loss along element `i` of a parameter, from differences at two step sizes.
pub fn slope<B: Backend>(model: &mut Model<B>, batch: &Batch, name: &str, i: usize) -> f64 {
    let mut at = |change: f32| {
        let mut tensor = model.parameter(name).unwrap();
        let old = tensor.data[i];
        tensor.data[i] += change;
        let moved = (tensor.data[i] - old) as f64;
        model.set_parameter(name, &tensor).unwrap();
        let losses = model.forward(batch).unwrap();
        tensor.data[i] = old;
        model.set_parameter(name, &tensor).unwrap();
        (mean_loss(batch, &losses), moved)
    };
    // Losses are f32: the steps are wide, and their third-order error is removed by extrapolation.
    let [narrow, wide] = [4e-3, 8e-3].map(|step| {
        let ((up, a), (down, b)) = (at(step), at(-step));
        (up - down) / (a - b)
    });
    (4.0 * narrow - wide) / 3.0
}

/// Largest difference, relative to the norm of the expected values.
pub fn relative(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let diff: f64 = got.iter().zip(want).map(|(a, b)| (*a as f64 - *b as f64).powi(2)).sum();
    let norm: f64 = want.iter().map(|b| (*b as f64).powi(2)).sum();
    (diff / norm.max(1e-30)).sqrt()
}

/// A step of the optimizer.
pub const STEP: AdamW = AdamW {
    t: 1,
    lr: 1e-2,
    beta1: 0.9,
    beta2: 0.99,
    eps: 1e-8,
    weight_decay: 0.1,
    decay_all: false,
    gradient_scale: 1.0,
};

/// The gradients of the trained parameters, by name.
pub fn trained_gradients<B: Backend>(model: &Model<B>) -> Vec<(String, Vec<f32>)> {
    let gradient = |name: String| (name.clone(), model.gradient(&name).unwrap().data);
    model.trained_names().into_iter().map(gradient).collect()
}

/// Every optimizer.
pub const OPTIMIZERS: [Optimizer; 5] = [
    Optimizer::AdamW,
    Optimizer::AdamW8bit,
    Optimizer::Adafactor,
    Optimizer::Sgd { momentum: true },
    Optimizer::Sgd { momentum: false },
];

/// A folder with a model's weights in this type.
pub fn saved_as<B: Backend>(model: &mut Model<B>, kind: WeightType) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    model.set_weight_type(kind);
    model.save_weights(dir.path()).unwrap();
    dir
}

/// Gives values to the second matrices of a new adapter, which are initially zero.
pub fn move_adapter<B: Backend>(model: &mut Model<B>) {
    for name in model.trained_names().into_iter().filter(|n| n.contains("lora_B")) {
        let mut tensor = model.parameter(&name).unwrap();
        let mut random = Random(6);
        tensor.data.iter_mut().for_each(|x| *x = 0.1 * random.normal() as f32);
        model.set_parameter(&name, &tensor).unwrap();
    }
}

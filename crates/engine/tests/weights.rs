//! Reading and writing weights and configurations: what is refused, and what survives a round trip.

mod common;

use common::{FAMILIES, architecture, config, json, model};
use serde_json::{Value, json};
use std::path::Path;
use suasion_engine::{Architecture, Backend, Budget, Device, Model};

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// A saved small model, and its folder.
fn saved(family: &str) -> (tempfile::TempDir, Model) {
    let dir = folder();
    let model = model(family, Device::cpu(), false);
    model.save_weights(dir.path()).unwrap();
    std::fs::write(dir.path().join("config.json"), config(family).to_string()).unwrap();
    (dir, model)
}

fn fresh(arch: Architecture) -> Model {
    Model::new(arch, Device::cpu(), Budget { tokens: 8, targets: 8, train: true, recompute: false }).unwrap()
}

fn load(dir: &Path) -> Result<Model, String> {
    let with_help = |e: suasion_engine::Error| format!("{} {e} {}", e.tag(), e.help().unwrap_or(""));
    let mut model = fresh(Architecture::from_dir(dir).map_err(with_help)?);
    model.load_weights(dir).map_err(with_help)?;
    Ok(model)
}

#[track_caller]
fn refused(dir: &Path, parts: &[&str]) {
    let message = load(dir).map(|_| ()).expect_err("must be refused");
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in: {message}");
    }
}

fn same(a: &Model, b: &Model) {
    for name in a.parameter_names() {
        assert_eq!(a.parameter(&name).unwrap(), b.parameter(&name).unwrap(), "{name}");
    }
}

#[test]
fn weights_survive_a_round_trip() {
    for family in FAMILIES {
        let (dir, model) = saved(family);
        same(&load(dir.path()).unwrap(), &model);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "no temporary file is left");
    }
}

/// Loading and saving a model of transformers gives the same names, shapes and values.
#[test]
fn saved_weights_are_those_that_transformers_wrote() {
    for goldens in common::goldens() {
        for name in goldens.models {
            let dir = goldens.dir.join(name);
            let (model, copy) = (load(&dir).unwrap(), folder());
            model.save_weights(copy.path()).unwrap();
            let [theirs, ours] =
                [&dir, copy.path()].map(|d| std::fs::read(d.join("model.safetensors")).unwrap());
            let theirs = safetensors::SafeTensors::deserialize(&theirs).unwrap();
            let ours = safetensors::SafeTensors::deserialize(&ours).unwrap();
            assert_eq!(theirs.len(), ours.len(), "{name}");
            for (tensor, view) in theirs.iter() {
                assert_eq!(ours.tensor(tensor).unwrap(), view, "{name}: {tensor}");
            }
        }
    }
}

#[test]
fn the_optimizer_survives_a_round_trip() {
    for family in FAMILIES {
        let mut a = model(family, Device::cpu(), false);
        let mut batch = suasion_engine::Batch::default();
        batch.push(&[1, 2, 3, 4], [(1, 3, 1.0), (2, 4, 1.0)]);
        let step = suasion_engine::AdamW { weight_decay: 0.0, ..common::STEP };
        common::accumulate(&mut a, &batch, 0.5);
        a.adamw(&step).unwrap();
        let dir = folder();
        let path = dir.path().join("optimizer.safetensors");
        a.save_optimizer(&path).unwrap();
        a.save_weights(dir.path()).unwrap();
        let mut b = fresh(a.architecture().clone());
        b.load_weights(dir.path()).unwrap();
        b.load_optimizer(&path).unwrap();
        for model in [&mut a, &mut b] {
            model.zero_gradients();
            common::accumulate(model, &batch, 0.5);
            model.adamw(&suasion_engine::AdamW { t: 2, ..step }).unwrap();
        }
        same(&a, &b);
        let other = FAMILIES.iter().find(|f| {
            let names = architecture(f).parameter_names();
            names.iter().any(|name| !a.parameter_names().contains(name))
        });
        let other = other.unwrap();
        let error = model(other, Device::cpu(), false).load_optimizer(&path).unwrap_err().to_string();
        assert!(error.contains("optimizer tensors fit this model"), "{error}");
    }
}

/// A safetensors file by hand: header, then data.
fn file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

#[test]
fn half_precision_is_widened_exactly() {
    let (dir, model) = saved("llama");
    type Narrow = fn(f32) -> (u16, f32);
    let kinds: [(&str, Narrow); 2] = [
        ("F16", |x| (half::f16::from_f32(x).to_bits(), half::f16::from_f32(x).to_f32())),
        ("BF16", |x| (half::bf16::from_f32(x).to_bits(), half::bf16::from_f32(x).to_f32())),
    ];
    for (dtype, narrow) in kinds {
        let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
        for name in model.parameter_names() {
            let tensor = model.parameter(&name).unwrap();
            let start = data.len();
            data.extend(tensor.data.iter().flat_map(|x| narrow(*x).0.to_le_bytes()));
            header.insert(
                name,
                json!({ "dtype": dtype, "shape": tensor.shape, "data_offsets": [start, data.len()] }),
            );
        }
        std::fs::write(dir.path().join("model.safetensors"), file(&Value::from(header).to_string(), &data))
            .unwrap();
        let read = load(dir.path()).unwrap();
        for name in model.parameter_names() {
            let want: Vec<f32> = model.parameter(&name).unwrap().data.iter().map(|x| narrow(*x).1).collect();
            assert_eq!(read.parameter(&name).unwrap().data, want, "{dtype} {name}");
        }
    }
}

/// Splits a saved model into two shards with an index.
fn shard(dir: &Path, model: &Model) {
    std::fs::remove_file(dir.join("model.safetensors")).unwrap();
    let names = model.parameter_names();
    let mut map = serde_json::Map::new();
    for (i, names) in names.chunks(names.len().div_ceil(2)).enumerate() {
        let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
        for name in names {
            let tensor = model.parameter(name).unwrap();
            let start = data.len();
            data.extend(tensor.data.iter().flat_map(|x| x.to_le_bytes()));
            header.insert(
                name.clone(),
                json!({"dtype": "F32", "shape": tensor.shape, "data_offsets": [start, data.len()]}),
            );
            map.insert(name.clone(), json!(format!("part-{i}.safetensors")));
        }
        std::fs::write(
            dir.join(format!("part-{i}.safetensors")),
            file(&Value::from(header).to_string(), &data),
        )
        .unwrap();
    }
    std::fs::write(dir.join("model.safetensors.index.json"), json!({ "weight_map": map }).to_string())
        .unwrap();
}

#[test]
fn shards_are_read_through_their_index() {
    for family in FAMILIES {
        let (dir, model) = saved(family);
        shard(dir.path(), &model);
        same(&load(dir.path()).unwrap(), &model);
        std::fs::remove_file(dir.path().join("part-1.safetensors")).unwrap();
        refused(dir.path(), &["E-IO", "part-1.safetensors"]);
    }
}

#[test]
fn an_index_cannot_reach_outside_its_folder() {
    let (dir, model) = saved("llama");
    shard(dir.path(), &model);
    for name in ["../part-0.safetensors", "/etc/passwd", "a/b", ".."] {
        let index = json!({ "weight_map": { "x": name } }).to_string();
        std::fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
        refused(dir.path(), &["model.safetensors.index.json", "not a plain file name"]);
    }
}

#[test]
fn damaged_files_are_refused_with_their_name() {
    let (dir, _) = saved("llama");
    let path = dir.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    let header_len = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let one = |shape: &str, offsets: &str| {
        file(
            &format!(r#"{{"model.norm.weight":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#),
            &[0; 8],
        )
    };
    let hostile = [
        ("empty", Vec::new()),
        ("seven bytes", whole[..7].to_vec()),
        ("cut in the header", whole[..header_len / 2].to_vec()),
        ("cut in the data", whole[..whole.len() - 1].to_vec()),
        ("a header of 2^63 bytes", [&(1u64 << 63).to_le_bytes()[..], b"{}"].concat()),
        ("a header that is not JSON", file("nonsense", &[])),
        ("a header that is not UTF-8", [&2u64.to_le_bytes()[..], &[0xff, 0xfe]].concat()),
        ("offsets beyond the file", one("[2]", "[0,800]")),
        ("offsets backwards", one("[2]", "[8,0]")),
        ("offsets that do not fit the shape", one("[3]", "[0,8]")),
        ("a shape that overflows", one("[9223372036854775807,9223372036854775807]", "[0,8]")),
        ("data that no tensor owns", one("[1]", "[0,4]")),
    ];
    for (what, bytes) in hostile {
        std::fs::write(&path, bytes).unwrap();
        let message = load(dir.path()).err().unwrap_or_else(|| panic!("{what} was accepted"));
        assert!(message.contains("model.safetensors"), "{what}: {message}");
        assert!(message.contains("truncated or damaged") || message.contains("E-IO"), "{what}: {message}");
    }
}

#[test]
fn weights_that_do_not_fit_are_refused() {
    let (dir, _) = saved("llama");
    let config_path = dir.path().join("config.json");
    let with = |key: &str, value: Value| {
        let mut config = config("llama");
        config[key] = value;
        std::fs::write(&config_path, config.to_string()).unwrap();
    };
    with("intermediate_size", json!(41));
    refused(dir.path(), &["E-WEIGHTS", "mlp", "has shape [", "config.json asks for [", "different models"]);
    with("num_hidden_layers", json!(4));
    refused(dir.path(), &["parameters are missing", "model.layers.3."]);
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    refused(dir.path(), &["no model.safetensors", "init=random"]);
}

#[test]
fn weights_that_are_not_numbers_are_refused() {
    for bad in [f32::NAN, f32::INFINITY] {
        let (dir, mut model) = saved("qwen2");
        let name = "model.layers.1.mlp.down_proj.weight";
        let mut tensor = model.parameter(name).unwrap();
        tensor.data[5] = bad;
        model.set_parameter(name, &tensor).unwrap();
        model.save_weights(dir.path()).unwrap();
        refused(dir.path(), &["model.safetensors", name, "at element 5"]);
    }
}

#[test]
fn integers_are_not_weights() {
    let (dir, _) = saved("llama");
    let header = r#"{"model.norm.weight":{"dtype":"I64","shape":[24],"data_offsets":[0,192]}}"#;
    std::fs::write(dir.path().join("model.safetensors"), file(header, &[0; 192])).unwrap();
    refused(dir.path(), &["model.norm.weight", "I64", "quantised"]);
}

#[test]
fn base_models_without_their_prefix_are_read() {
    let (dir, model) = saved("gpt2");
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for name in model.parameter_names() {
        let tensor = model.parameter(&name).unwrap();
        let start = data.len();
        data.extend(tensor.data.iter().flat_map(|x| x.to_le_bytes()));
        let name = name.strip_prefix("transformer.").unwrap().to_string();
        header.insert(
            name,
            json!({"dtype": "F32", "shape": tensor.shape, "data_offsets": [start, data.len()]}),
        );
    }
    std::fs::write(dir.path().join("model.safetensors"), file(&Value::from(header).to_string(), &data))
        .unwrap();
    same(&load(dir.path()).unwrap(), &model);
}

#[test]
fn configurations_that_are_not_computed_are_refused_by_name() {
    let refuse = |family: &str, key: &str, value: Value, parts: &[&str]| {
        let mut config = config(family);
        config[key] = value;
        let error = Architecture::from_json(&config, Path::new("m/config.json")).unwrap_err();
        let message = format!("{error} {}", error.help().unwrap());
        assert!(message.starts_with("m/config.json: "), "{message}");
        parts.iter().for_each(|part| assert!(message.contains(part), "{part:?} is not in: {message}"));
    };
    refuse(
        "llama",
        "model_type",
        json!("mamba"),
        &["\"mamba\" is not supported", "llama, qwen2, qwen3, gpt2"],
    );
    // An unknown family: the error says what the engine lacks for it.
    let other = json!({
        "model_type": "cohere", "vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
        "num_attention_heads": 4, "layer_norm_eps": 1e-5, "logit_scale": 0.0625, "use_qk_norm": true, "use_cache": true,
    });
    let error = Architecture::from_json(&other, Path::new("c")).unwrap_err().to_string();
    let fields =
        "\"cohere\" is not supported: the engine has no field for layer_norm_eps, logit_scale, use_qk_norm";
    assert!(error.ends_with(fields), "{error}");
    refuse("llama", "model_type", json!("bloom"), &["it may compute something else"]);
    refuse("llama", "model_type", json!(null), &["\"model_type\" must be a string", "null"]);
    refuse(
        "llama",
        "hidden_size",
        json!("big"),
        &["\"hidden_size\" must be a positive whole number of at most 2^31; it is \"big\""],
    );
    refuse("llama", "hidden_size", json!(0), &["it is 0"]);
    refuse("llama", "vocab_size", json!(1e18), &["vocab_size"]);
    refuse("llama", "num_key_value_heads", json!(3), &["4 attention heads", "3 key/value heads"]);
    refuse("llama", "head_dim", json!(5), &["4 heads of 5"]);
    refuse("llama", "hidden_act", json!("relu"), &["relu", "silu"]);
    refuse("llama", "rope_scaling", json!({"rope_type": "ntk", "factor": 2.0}), &["ntk", "llama3"]);
    let windows = json!(["full_attention", "sliding_attention"]);
    refuse("qwen3", "layer_types", windows, &["layer_types", "3 times full_attention or sliding_attention"]);
    refuse("qwen3", "head_dim", json!(9), &["4 heads of 9"]);
    refuse("gpt2", "activation_function", json!("relu"), &["relu", "gelu_new"]);
    refuse("gpt2", "n_head", json!(5), &["5 heads of 4 in a width of 24"]);
    refuse("llama", "hidden_size", json!(2_000_000_000u64), &["not plausible"]);
    refuse("llama", "num_hidden_layers", json!(1_000_000_000), &["1000000000 layers", "not plausible"]);
    refuse("mistral", "sliding_window", json!(0), &["sliding_window"]);
    let full = json!(["full_attention", "full_attention", "full_attention"]);
    refuse("mistral", "layer_types", full, &["layer_types[0] is full_attention", "sliding_window is 5"]);
    refuse("gemma3_text", "layer_types", json!(["chunked_attention"]), &["\"layer_types\" must be"]);
    refuse("gemma2", "sliding_window", json!(null), &["layer_types", "sliding_window"]);
    refuse("gemma2", "hidden_activation", json!("relu"), &["hidden_activation", "relu"]);
    refuse("gemma2", "use_bidirectional_attention", json!(true), &["use_bidirectional_attention"]);
    refuse("gemma2", "query_pre_attn_scalar", json!(0), &["query_pre_attn_scalar"]);
    refuse("phi3", "attention_bias", json!(true), &["attention_bias"]);
    refuse("phi3", "partial_rotary_factor", json!(0.5), &["3 of 6 columns", "partial_rotary_factor"]);
    refuse("olmo2", "partial_rotary_factor", json!(0.5), &["partial_rotary_factor"]);
    refuse("smollm3", "no_rope_layers", json!([1, 2, 0]), &["no_rope_layers"]);
    refuse("granite", "logits_scaling", json!(0), &["logits_scaling"]);
    refuse("gpt_neox", "hidden_act", json!("silu"), &["hidden_act", "silu", "gelu"]);
    refuse("qwen3_moe", "num_experts_per_tok", json!(8), &["8 of 7 experts"]);
    refuse("qwen3_moe", "output_router_logits", json!("on"), &["output_router_logits", "true or false"]);
    refuse("qwen3_moe", "mlp_only_layers", json!("none"), &["mlp_only_layers"]);
    refuse("llama", "quantization_config", json!({"bits": 4}), &["quantization_config"]);
    // Settings that a family does not have are named, except those without effect here.
    let mut other = config("llama");
    other["residual_multiplier"] = json!(0.5);
    other["rope_scaling"] = json!({"rope_type": "linear", "factor": 2.0, "mrope_section": [1, 2]});
    other["architectures"] = json!(["LlamaForCausalLM"]);
    let notes = Architecture::from_json(&other, Path::new("c")).unwrap().not_applied.join("\n");
    assert!(notes.contains("\"residual_multiplier\" is not a setting of this family"), "{notes}");
    assert!(notes.contains("\"rope_scaling.mrope_section\""), "{notes}");
    assert_eq!(notes.lines().count(), 2, "{notes}");
    refuse("gpt2", "resid_pdrop", json!(1.5), &["resid_pdrop", "from 0 to 1"]);
}

/// Inverse frequencies computed by transformers 5.23.0 (`ROPE_INIT_FUNCTIONS["llama3"]`) for the settings of Llama 3.2
/// 1B: head 64, theta 500000, factor 32, low 1, high 4, original 8192.
const LLAMA3: [(usize, f64); 6] = [
    (0, 1.000000000e+00),
    (10, 1.656044088e-02),
    (14, 3.211446106e-03),
    (16, 4.295567051e-04),
    (18, 1.946163866e-05),
    (31, 9.418306490e-08),
];

#[test]
fn llama3_scaling_equals_transformers() {
    let mut c = config("llama");
    c["head_dim"] = json!(64);
    let scaling = json!({"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 500000.0});
    let mut v5 = c.clone();
    v5["rope_parameters"] = scaling.clone();
    let mut v4 = c.clone();
    v4["rope_theta"] = json!(500000.0);
    v4["rope_scaling"] = scaling;
    for config in [v4, v5] {
        let arch = Architecture::from_json(&config, Path::new("c")).unwrap();
        let f = &arch.blocks[0].attention.rope.as_ref().unwrap().frequencies;
        assert_eq!(f.len(), 32);
        for (i, want) in LLAMA3 {
            assert!((f[i] as f64 / want - 1.0).abs() < 2e-6, "{i}: {} and {want}", f[i]);
        }
    }
}

#[test]
fn random_weights_are_distributed_as_transformers_does() {
    let std_of = |x: &[f32]| (x.iter().map(|x| (*x as f64).powi(2)).sum::<f64>() / x.len() as f64).sqrt();
    for family in FAMILIES {
        let mut c = config(family);
        c["initializer_range"] = json!(0.02);
        c["vocab_size"] = json!(5000);
        c["pad_token_id"] = json!(3);
        let mut model = fresh(Architecture::from_json(&c, Path::new("c")).unwrap());
        model.init_random(1).unwrap();
        for name in model.parameter_names() {
            let tensor = model.parameter(&name).unwrap();
            let residual = family == "gpt2" && name.ends_with("c_proj.weight");
            let want = if residual { 0.02 / 6f64.sqrt() } else { 0.02 };
            if tensor.shape.len() == 1 {
                // Gemma's norms multiply by 1 + weight.
                let zero = name.ends_with("bias") || family.starts_with("gemma");
                let value = if zero { 0.0 } else { 1.0 };
                assert!(tensor.data.iter().all(|x| *x == value), "{name}");
            } else {
                let (n, got) = (tensor.data.len() as f64, std_of(&tensor.data));
                assert!((got / want - 1.0).abs() < 4.0 / (2.0 * n).sqrt(), "{name}: deviation {got}");
                let mean = tensor.data.iter().map(|x| *x as f64).sum::<f64>() / n;
                assert!(mean.abs() < 4.0 * want / n.sqrt(), "{name}: mean {mean}");
            }
            if name.ends_with("embed_tokens.weight") {
                let width = tensor.shape[1];
                assert!(tensor.data[3 * width..4 * width].iter().all(|x| *x == 0.0), "{name}: padding row");
            }
        }
        let mut again = fresh(model.architecture().clone());
        again.init_random(1).unwrap();
        same(&model, &again);
        again.init_random(2).unwrap();
        let name = &model.parameter_names()[0];
        assert_ne!(
            model.parameter(name).unwrap(),
            again.parameter(name).unwrap(),
            "another seed, other weights"
        );
    }
}

#[test]
fn goldens_have_the_parameters_that_we_lay_out() {
    for source in common::goldens() {
        for name in source.models {
            let dir = source.dir.join(name);
            let bytes = std::fs::read(dir.join("model.safetensors")).unwrap();
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let arch = Architecture::from_json(&json(&dir.join("config.json")), Path::new("c")).unwrap();
            let total: usize = file.tensors().iter().map(|(_, t)| t.shape().iter().product::<usize>()).sum();
            assert_eq!(arch.parameter_count(), total as u64, "{name}");
        }
    }
}

#[test]
fn the_plan_is_what_is_allocated() {
    // Parameters, gradients and moments take four times the count; recomputation reduces activations.
    let arch = common::architecture("llama");
    let plan = |train, recompute| {
        suasion_engine::MemoryPlan::of(&arch, Budget { tokens: 64, targets: 16, train, recompute })
    };
    let bytes = 4 * arch.parameter_count();
    assert_eq!((plan(true, false).gradients, plan(true, false).optimizer), (bytes, 2 * bytes));
    assert_eq!((plan(false, false).gradients, plan(false, false).optimizer), (0, 0));
    assert!(plan(true, true).activations < plan(true, false).activations);
    // Computed by hand, with saved layers: inputs 3×64×24; two layers of 64 query rows and one of 16, all with 64 keys.
    let (h, q, kv, up) = (24, 24, 24, 80);
    let layer = |queries: usize| {
        let each = q + 4 + q + h + 1 + up;
        64 + 64 * kv + queries * each
    };
    // The statistics of the norms follow the rows to which they belong.
    let want = 3 * 64 * h + 2 * layer(64) + layer(16);
    assert_eq!(plan(true, false).activations, 4 * want as u64);
}

#[test]
fn memory_that_is_not_there_is_an_error() {
    let error = Device::cpu().allocate(1 << 50).unwrap_err();
    assert_eq!((error.tag(), error.to_string().contains("4503599627370")), ("E-MEMORY", true), "{error}");
    let mut c = config("llama");
    c["vocab_size"] = json!(2_000_000);
    c["hidden_size"] = json!(1_000_000);
    let arch = Architecture::from_json(&c, Path::new("c")).unwrap();
    let budget = Budget { tokens: 8, targets: 8, train: true, recompute: false };
    assert_eq!(Model::new(arch, Device::cpu(), budget).unwrap_err().tag(), "E-MEMORY");
}

#[cfg(unix)]
#[test]
fn weight_files_have_the_mode_of_other_files() {
    use std::os::unix::fs::PermissionsExt;
    let (dir, _) = saved("llama");
    let mode = |name: &str| std::fs::metadata(dir.path().join(name)).unwrap().permissions().mode();
    assert_eq!(mode("model.safetensors"), mode("config.json"));
}

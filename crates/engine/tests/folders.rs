//! Unusual model folders: what transformers loads from them, and what is refused.

mod common;

use common::{config, golden_batch, json, mean_loss};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use suasion_engine::{Architecture, Batch, Budget, Device, Model, WeightType};

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models")
}

/// The cases of `folders.json` selected by `wanted`, each with its name.
fn cases(wanted: impl Fn(&Value) -> bool) -> Vec<(String, Value)> {
    let Value::Object(all) = json(&goldens().join("folders.json")) else { panic!("folders.json") };
    all.into_iter().filter(|(_, case)| case.get("loss").is_some() && wanted(case)).collect()
}

/// The configuration of a case.
fn configuration(case: &Value) -> Value {
    let mut config = json(&goldens().join(case["model"].as_str().unwrap()).join("config.json"));
    let keys = config.as_object_mut().unwrap();
    for key in case["remove"].as_array().into_iter().flatten() {
        keys.remove(key.as_str().unwrap());
    }
    keys.extend(case["config"].as_object().cloned().unwrap_or_default());
    config
}

/// Batch `a` of a case's model.
fn batch(case: &Value) -> Batch {
    let golden = json(&goldens().join(case["model"].as_str().unwrap()).join("golden.json"));
    golden_batch(&golden["batches"]["a"])
}

fn fresh(arch: Architecture, batch: &Batch) -> Model {
    let budget = Budget { tokens: batch.tokens(), targets: batch.tokens(), train: false, recompute: false };
    Model::new(arch, Device::cpu(), budget).unwrap()
}

#[test]
fn configurations_mean_what_they_mean_to_transformers() {
    let cases = cases(|case| case.get("head").is_none() && case.get("split").is_none());
    assert!(cases.len() >= 17, "{}", cases.len());
    for (name, case) in cases {
        let dir = tempfile::tempdir().unwrap();
        let weights = goldens().join(case["model"].as_str().unwrap()).join("model.safetensors");
        std::fs::copy(weights, dir.path().join("model.safetensors")).unwrap();
        std::fs::write(dir.path().join("config.json"), configuration(&case).to_string()).unwrap();
        let (batch, arch) = (batch(&case), Architecture::from_dir(dir.path()).unwrap());
        let not_applied = arch.not_applied.clone();
        let mut model = fresh(arch, &batch);
        assert_eq!(model.load_weights(dir.path()).unwrap(), Vec::<String>::new());
        let loss = mean_loss(&batch, &model.forward(&batch).unwrap());
        let want = case["loss"].as_f64().unwrap();
        assert!((loss - want).abs() < 2e-6, "{name}: {loss}, transformers {want}");
        let overridden = not_applied.iter().any(|line| line.starts_with("rope_parameters is not applied"));
        let is_full = |key: &str| configuration(&case)[key].as_object().is_some_and(|map| !map.is_empty());
        let both = is_full("rope_scaling") && is_full("rope_parameters");
        assert_eq!(overridden, both, "{name}: {not_applied:?}");
    }
}

#[test]
fn implausible_numbers_are_refused_by_name() {
    let two_to_63 = json!(9_223_372_036_854_775_808u64);
    let scaling = |kind: &str, key: &str, value: Value| {
        let mut scaling =
            json!({ "rope_type": kind, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0 });
        match value {
            Value::Null => drop(scaling.as_object_mut().unwrap().remove(key)),
            value => scaling[key] = value,
        }
        scaling
    };
    let cases = [
        ("gpt2", "layer_norm_epsilon", two_to_63.clone(), "\"layer_norm_epsilon\""),
        ("gpt2", "layer_norm_epsilon", json!(-1e-5), "\"layer_norm_epsilon\""),
        ("gpt2", "layer_norm_epsilon", json!("1e-5"), "\"layer_norm_epsilon\""),
        ("gpt2", "initializer_range", json!(1e30), "\"initializer_range\""),
        ("gpt2", "resid_pdrop", json!(-3), "\"resid_pdrop\""),
        ("gpt2", "n_positions", two_to_63.clone(), "\"n_positions\""),
        ("gpt2", "n_inner", json!(-1), "\"n_inner\""),
        ("llama", "rms_norm_eps", two_to_63.clone(), "\"rms_norm_eps\""),
        ("llama", "initializer_range", json!(-0.02), "\"initializer_range\""),
        ("llama", "rope_theta", two_to_63.clone(), "\"rope_theta\""),
        ("llama", "rope_theta", json!(0), "\"rope_theta\""),
        ("llama", "rope_theta", json!(-10000.0), "\"rope_theta\""),
        ("llama", "max_position_embeddings", json!(1e30), "\"max_position_embeddings\""),
        ("llama", "pad_token_id", json!("<pad>"), "\"pad_token_id\""),
        ("llama", "rope_scaling", json!("linear"), "\"rope_scaling\" must be an object"),
        ("llama", "rope_parameters", json!([1, 2]), "\"rope_parameters\" must be an object"),
        ("llama", "rope_scaling", json!({"rope_type": 3}), "\"rope_type\" must be a string"),
        ("llama", "rope_scaling", scaling("linear", "factor", Value::Null), "\"factor\" must be"),
        ("llama", "rope_scaling", scaling("linear", "factor", json!(0)), "\"factor\" must be"),
        ("llama", "rope_parameters", scaling("linear", "rope_theta", json!(1e300)), "\"rope_theta\" must be"),
        ("llama", "rope_scaling", scaling("llama3", "low_freq_factor", Value::Null), "\"low_freq_factor\""),
        (
            "llama",
            "rope_scaling",
            scaling("llama3", "high_freq_factor", json!(1)),
            "1 is not below high_freq_factor 1",
        ),
        ("qwen2", "rope_scaling", scaling("ntk", "factor", json!(4)), "rope_type \"ntk\" is not supported"),
        ("qwen2", "rope_parameters", json!({"type": "dynamic"}), "\"factor\" must be"),
        ("qwen2", "rope_scaling", scaling("yarn", "beta_fast", json!("32")), "\"beta_fast\" must be"),
        (
            "phi3",
            "rope_scaling",
            json!({"type": "su", "short_factor": [1, 1]}),
            "\"long_factor\" must be a list of 2",
        ),
        ("qwen3", "num_key_value_heads", json!(0), "\"num_key_value_heads\""),
    ];
    for (family, key, value, want) in cases {
        let mut config = config(family);
        config[key] = value.clone();
        let error = Architecture::from_json(&config, Path::new("m/config.json")).unwrap_err();
        let message = error.to_string();
        assert!(message.starts_with("m/config.json: "), "{message}");
        assert!(message.contains(want), "{family}, {key} = {value}: {want} is not in: {message}");
        assert_eq!((error.tag(), error.help().is_some()), ("E-MODEL", true));
    }
    // An unsupported type is refused beside rope_parameters, too.
    let mut both = config("llama");
    both["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 10000.0});
    both["rope_scaling"] = json!({"type": "ntk", "factor": 4.0});
    let error = Architecture::from_json(&both, Path::new("c")).unwrap_err().to_string();
    assert!(error.contains("rope_type \"ntk\" is not supported"), "{error}");
}

#[test]
fn sizes_that_no_default_can_replace_are_required_by_name() {
    let required =
        ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"];
    for key in required {
        let mut config = config("llama");
        config.as_object_mut().unwrap().remove(key);
        let error = Architecture::from_json(&config, Path::new("c")).unwrap_err().to_string();
        assert!(error.contains(&format!("\"{key}\" must be")) && error.contains("it is missing"), "{error}");
    }
}

/// A safetensors file of some tensors: name, type, shape, bytes.
fn file(tensors: &[Stored]) -> Vec<u8> {
    let (mut header, mut data) = (Map::new(), Vec::new());
    for tensor in tensors {
        let start = data.len();
        data.extend(&tensor.bytes);
        let offsets = [start, data.len()];
        header.insert(
            tensor.name.clone(),
            json!({ "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets }),
        );
    }
    let header = Value::from(header).to_string();
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
}

#[derive(Clone, Debug, PartialEq)]
struct Stored {
    name: String,
    dtype: String,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// The tensors of a file, by name.
fn stored(path: &Path) -> Vec<Stored> {
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut all: Vec<Stored> = file
        .iter()
        .map(|(name, t)| Stored {
            name: name.to_string(),
            dtype: format!("{:?}", t.dtype()),
            shape: t.shape().to_vec(),
            bytes: t.data().to_vec(),
        })
        .collect();
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all
}

/// The tensors of a case, with the case's change of the head.
fn weights(case: &Value) -> Vec<Stored> {
    let mut all = stored(&goldens().join(case["model"].as_str().unwrap()).join("model.safetensors"));
    let is_embedding = |t: &Stored| t.name.ends_with("embed_tokens.weight") || t.name.ends_with("wte.weight");
    let at = all.iter().position(is_embedding).unwrap();
    let mut head = Stored { name: "lm_head.weight".into(), ..all[at].clone() };
    match case["head"].as_str() {
        Some("reversed") => {
            let row = 4 * head.shape[1];
            head.bytes = all[at].bytes.chunks(row).rev().flatten().copied().collect();
            all.push(head);
        }
        Some("copy") => all.push(head),
        Some("only") => all[at] = head,
        _ => {}
    }
    all
}

#[test]
fn heads_in_the_file_are_what_transformers_takes() {
    let cases = cases(|case| case.get("head").is_some());
    assert_eq!(cases.len(), 6);
    for (name, case) in cases {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("model.safetensors"), file(&weights(&case))).unwrap();
        std::fs::write(dir.path().join("config.json"), configuration(&case).to_string()).unwrap();
        let batch = batch(&case);
        let by_config = Architecture::from_dir(dir.path()).unwrap();
        assert!(by_config.head.tied, "{name}");
        let (arch, warning) = by_config.clone().with_head_of(dir.path()).unwrap();
        assert_eq!(arch.head.tied, case["tied"].as_bool().unwrap(), "{name}");
        assert_eq!(warning.is_some(), case["warned"].as_bool().unwrap(), "{name}: {warning:?}");
        if let Some(warning) = warning {
            assert!(
                warning.contains("\"lm_head.weight\"") && warning.contains("tie_word_embeddings"),
                "{warning}"
            );
            let error = fresh(by_config, &batch).load_weights(dir.path()).unwrap_err().to_string();
            assert!(error.contains("\"lm_head.weight\" differs from the embedding"), "{error}");
        }
        let mut model = fresh(arch, &batch);
        assert_eq!(model.load_weights(dir.path()).unwrap(), Vec::<String>::new());
        let want = case["loss"].as_f64().unwrap();
        let loss = mean_loss(&batch, &model.forward(&batch).unwrap());
        assert!((loss - want).abs() < 2e-6, "{name}: {loss}, transformers {want}");
        // The saved files have a head if the loaded model has its own, and only then.
        let out = tempfile::tempdir().unwrap();
        model.save_weights(out.path()).unwrap();
        let saved = stored(&out.path().join("model.safetensors"));
        let head = saved.iter().find(|t| t.name == "lm_head.weight");
        assert_eq!(head.is_some(), !case["tied"].as_bool().unwrap(), "{name}");
        if let Some(head) = head {
            assert_eq!(head, weights(&case).last().unwrap(), "{name}");
        }
    }
}

/// Writes tensors in two shards; `index` may list further tensors of the second.
fn shards(dir: &Path, first: &[Stored], second: &[Stored], index: &[(&str, &[Stored])]) {
    std::fs::write(dir.join("one.safetensors"), file(first)).unwrap();
    std::fs::write(dir.join("two.safetensors"), file(second)).unwrap();
    let mut map = Map::new();
    for (file, tensors) in index {
        map.extend(tensors.iter().map(|t| (t.name.clone(), json!(file))));
    }
    std::fs::write(dir.join("model.safetensors.index.json"), json!({ "weight_map": map }).to_string())
        .unwrap();
}

#[test]
fn the_index_decides_which_file_holds_a_tensor() {
    let case = cases(|case| case["split"] == "named").remove(0).1;
    let all = weights(&case);
    let (a, b) = all.split_at(all.len() / 2);
    let load = |dir: &Path| {
        std::fs::write(dir.join("config.json"), configuration(&case).to_string()).unwrap();
        let batch = batch(&case);
        let mut model = fresh(Architecture::from_dir(dir).unwrap(), &batch);
        let unused = model.load_weights(dir).map_err(|error| error.to_string())?;
        Ok::<_, String>((mean_loss(&batch, &model.forward(&batch).unwrap()), unused))
    };
    let index: [(&str, &[Stored]); 2] = [("one.safetensors", a), ("two.safetensors", b)];
    let want = case["loss"].as_f64().unwrap();
    let right = |loaded: Result<(f64, Vec<String>), String>| {
        let (loss, unused) = loaded.unwrap();
        assert!((loss - want).abs() < 2e-6, "{loss}, transformers {want}");
        assert_eq!(unused, Vec::<String>::new());
    };

    let dir = tempfile::tempdir().unwrap();
    shards(dir.path(), a, b, &index);
    right(load(dir.path()));

    // A shard that the index does not list is not read, whatever it contains.
    std::fs::write(dir.path().join("model-00003-of-00003.safetensors"), b"not safetensors").unwrap();
    std::fs::write(dir.path().join("zero.safetensors"), file(b)).unwrap();
    right(load(dir.path()));

    // A model.safetensors beside the index that does not list it: the error names both.
    std::fs::write(dir.path().join("model.safetensors"), file(&all)).unwrap();
    let error = load(dir.path()).unwrap_err();
    assert!(
        error.contains("model.safetensors.index.json") && error.contains("model.safetensors stands"),
        "{error}"
    );

    // An index with one file.
    let dir = tempfile::tempdir().unwrap();
    shards(dir.path(), a, b, &[("model.safetensors", &all)]);
    std::fs::write(dir.path().join("model.safetensors"), file(&all)).unwrap();
    right(load(dir.path()));

    // A tensor in another shard than listed, and nowhere else.
    let mut stale = a[0].clone();
    shards(dir.path(), &a[1..], &[&a[..1], b].concat(), &index);
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    let error = load(dir.path()).unwrap_err();
    for part in [a[0].name.as_str(), "one.safetensors", "two.safetensors"] {
        assert!(error.contains(part), "{part} is not in: {error}");
    }
    // A stale copy beside the right one is not read, but reported.
    stale.bytes.fill(0);
    shards(dir.path(), a, &[&[stale], b].concat(), &index);
    let (loss, unused) = load(dir.path()).unwrap();
    assert!((loss - want).abs() < 2e-6, "{loss}, transformers {want}");
    assert!(unused.len() == 1 && unused[0].contains(&a[0].name) && unused[0].contains("two.safetensors"));
    // In two shards, and not in the index.
    let second = [&a[..1], b].concat();
    shards(dir.path(), a, &second, &[("one.safetensors", &a[1..]), ("two.safetensors", b)]);
    let error = load(dir.path()).unwrap_err();
    assert!(error.contains("both hold a tensor") && error.contains(&a[0].name), "{error}");
    // Listed, but in no file.
    shards(dir.path(), &a[1..], b, &index);
    let error = load(dir.path()).unwrap_err();
    assert!(error.contains(&a[0].name) && error.contains("the index says is in one.safetensors"), "{error}");
}

#[test]
fn weights_are_written_in_the_type_in_which_they_were_read() {
    let case = cases(|case| case["split"] == "named").remove(0).1;
    let batch = batch(&case);
    let narrow = |t: &Stored, dtype: &str| {
        let values = t.bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
        let bytes: Vec<u8> = match dtype {
            "BF16" => values.flat_map(|x| half::bf16::from_f32(x).to_le_bytes()).collect(),
            "F16" => values.flat_map(|x| half::f16::from_f32(x).to_le_bytes()).collect(),
            "F64" => values.flat_map(|x| f64::from(x).to_le_bytes()).collect(),
            _ => t.bytes.clone(),
        };
        Stored { dtype: dtype.into(), bytes, ..t.clone() }
    };
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("model.safetensors");
    std::fs::write(dir.path().join("config.json"), configuration(&case).to_string()).unwrap();
    let arch = Architecture::from_dir(dir.path()).unwrap();
    let all = weights(&case);
    for (dtype, name) in [("F32", "float32"), ("BF16", "bfloat16"), ("F16", "float16")] {
        let narrowed: Vec<Stored> = all.iter().map(|t| narrow(t, dtype)).collect();
        std::fs::write(&place, file(&narrowed)).unwrap();
        let mut model = fresh(arch.clone(), &batch);
        model.load_weights(dir.path()).unwrap();
        assert_eq!(model.weight_type().name(), name);
        let out = tempfile::tempdir().unwrap();
        model.save_weights(out.path()).unwrap();
        assert_eq!(stored(&out.path().join("model.safetensors")), narrowed, "{dtype}");
        // The master weights are f32, and move by less than the narrow type resolves.
        let parameter = "model.norm.weight";
        let mut tensor = model.parameter(parameter).unwrap();
        tensor.data[0] += 1e-6;
        model.set_parameter(parameter, &tensor).unwrap();
        model.save_masters(out.path()).unwrap();
        let masters = stored(&out.path().join("model.safetensors"));
        assert!(masters.iter().all(|t| t.dtype == "F32"), "{dtype}");
        let norm = masters.iter().find(|t| t.name == parameter).unwrap();
        assert_eq!(norm.bytes[..4], tensor.data[0].to_le_bytes());
    }
    // Mixed types: only f32 represents all exactly.
    let mixed: Vec<Stored> =
        all.iter().enumerate().map(|(i, t)| narrow(t, if i == 3 { "F32" } else { "BF16" })).collect();
    std::fs::write(&place, file(&mixed)).unwrap();
    let mut model = fresh(arch.clone(), &batch);
    model.load_weights(dir.path()).unwrap();
    assert_eq!(model.weight_type(), WeightType::F32);
    // A value too large for float16 is not written as infinity.
    let mut tensor = model.parameter("model.norm.weight").unwrap();
    tensor.data[2] = 70_000.0;
    model.set_parameter("model.norm.weight", &tensor).unwrap();
    model.set_weight_type(WeightType::F16);
    let out = tempfile::tempdir().unwrap();
    let error = model.save_weights(out.path()).unwrap_err().to_string();
    assert!(
        error.contains("element 2 of \"model.norm.weight\" is 70000, which float16 cannot hold"),
        "{error}"
    );
    assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 0, "nothing is left of it");
    // f64 is not a quantised type.
    let wide: Vec<Stored> = all.iter().map(|t| narrow(t, "F64")).collect();
    std::fs::write(&place, file(&wide)).unwrap();
    let error = fresh(arch, &batch).load_weights(dir.path()).unwrap_err();
    let help = error.help().unwrap();
    assert!(error.to_string().contains("is of type F64") && help.contains("float32"), "{error} {help}");
    assert!(!help.contains("quantised"), "{help}");
}

#[test]
fn the_row_of_the_pad_token_is_trained() {
    let golden = json(&goldens().join("folders.json"))["the row of the pad token"].clone();
    let (batch, mut config) = (batch(&golden), configuration(&golden));
    config["pad_token_id"] = golden["pad_token_id"].clone();
    let budget = Budget { tokens: batch.tokens(), targets: batch.tokens(), train: true, recompute: false };
    let arch = Architecture::from_json(&config, Path::new("c")).unwrap();
    let mut model = Model::new(arch, Device::cpu(), budget).unwrap();
    model.load_weights(&goldens().join(golden["model"].as_str().unwrap())).unwrap();
    common::accumulate(&mut model, &batch, 1.0 / batch.weight() as f32);
    let gradient = model.gradient("model.embed_tokens.weight").unwrap();
    let row = gradient.data.chunks(gradient.shape[1]).nth(golden["pad_token_id"].as_u64().unwrap() as usize);
    let norm = row.unwrap().iter().map(|x| (*x as f64).powi(2)).sum::<f64>().sqrt();
    // PyTorch's gradient without padding_idx; with it the gradient is zero.
    let want = golden["without"].as_f64().unwrap();
    assert!((norm / want - 1.0).abs() < 1e-4, "{norm}, PyTorch {want}");
    assert_eq!(golden["with_padding_idx"], 0.0);
}

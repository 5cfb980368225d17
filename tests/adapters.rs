//! Adapters through the binary: trained, resumed, applied, merged; and compared with PEFT.

use crate::util::{Dir, root};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use suasion_engine::{ADAPTER_WEIGHTS, AdapterFolder, Architecture, Base, Budget, Cpu, Model, Trainable};

pub fn model(name: &str) -> PathBuf {
    root().join("tests/goldens/models").join(name)
}

pub fn golden(name: &str, file: &str) -> Value {
    serde_json::from_slice(&std::fs::read(model(name).join(file)).unwrap()).unwrap()
}

/// The rows of a golden batch without their padding.
pub fn write_rows(dir: &Dir, name: &str, batches: &[&str]) {
    let golden = golden(name, "golden.json");
    let mut text = String::new();
    for batch in batches.iter().map(|batch| &golden["batches"][batch]) {
        let list = |key: &str, row: usize| batch[key][row].as_array().unwrap().clone();
        for row in 0..batch["input_ids"].as_array().unwrap().len() {
            let length = list("attention_mask", row).iter().filter(|mask| **mask == 1).count();
            let cut = |key: &str| list(key, row)[..length].to_vec();
            text += &(json!({"input_ids": cut("input_ids"), "labels": cut("labels")}).to_string() + "\n");
        }
    }
    dir.write("rows.jsonl", text);
}

pub const RUN: [&str; 8] = [
    "shuffle_dataset=false",
    "max_length=null",
    "learning_rate=1e-2",
    "per_device_train_batch_size=2",
    "save_strategy=no",
    "logging_steps=1",
    "use_peft=true",
    "lora_dropout=0",
];

/// The loss of a model on the rows.
pub fn loss(dir: &Dir, args: &[&str], base: Option<&Path>) -> f64 {
    let mut command = dir.suasion(&["eval", "-D", "rows.jsonl", "--json", "--quiet"]);
    if let Some(base) = base {
        command = command.arg("-M").arg(base);
    }
    command.args(args).set(&["max_length=null"]).ok().json()["loss"].as_f64().unwrap()
}

#[test]
fn every_family_trains_an_adapter_and_merges_it() {
    for name in suasion_test_support::MODELS {
        let (dir, base) = (Dir::new(), model(name));
        write_rows(&dir, name, &["a"]);
        let weights = std::fs::read(base.join("model.safetensors")).unwrap();
        // Experts cannot have adapters.
        let targets = if name == "qwen3_moe" { "[q_proj, v_proj, o_proj]" } else { "all-linear" };
        dir.suasion(&["train", "-D", "rows.jsonl", "--quiet", "-M"])
            .arg(&base)
            .set(&RUN)
            .set(&["max_steps=3", "output_dir=out", &format!("lora_target_modules={targets}")])
            .ok();
        dir.suasion(&["merge", "--adapter", "out", "-o", "merged", "--quiet", "-M"]).arg(&base).ok();
        let [plain, adapted, merged] = [
            loss(&dir, &[], Some(&base)),
            loss(&dir, &["--adapter", "out"], Some(&base)),
            loss(&dir, &["-M", "merged"], None),
        ];
        assert!(adapted < plain - 1e-3, "{name}: {plain} → {adapted}");
        assert!((merged - adapted).abs() < 1e-5, "{name}: merged {merged}, adapter over base {adapted}");
        // The adapter names its base.
        assert_eq!(loss(&dir, &["-M", "out"], None), adapted, "{name}");
        assert_eq!(std::fs::read(base.join("model.safetensors")).unwrap(), weights, "{name}");
    }
}

#[test]
fn adapters_of_peft_are_read() {
    for (name, adapter) in [
        ("llama", "dora"),
        ("llama", "lora_head"),
        ("llama_tied", "lora_saved"),
        ("gpt2", "lora"),
        ("phi3", "dora"),
    ] {
        let (dir, folder) = (Dir::new(), model(name).join(adapter));
        write_rows(&dir, name, &["a"]);
        let peft = golden(name, &format!("{adapter}/golden_lora.json"));
        let path = folder.to_str().unwrap();
        let ours = loss(&dir, &["-M", path], None);
        let theirs = peft["fp32"]["a"]["loss"].as_f64().unwrap();
        assert!((ours - theirs).abs() < 2e-5, "{name}/{adapter}: {ours}, PEFT {theirs}");
        // Merged through its own base, found beside it.
        dir.suasion(&["merge", "--adapter", path, "-o", "merged", "--quiet"]).ok();
        let (merged, theirs) = (loss(&dir, &["-M", "merged"], None), peft["merged_loss_a"].as_f64().unwrap());
        assert!((merged - theirs).abs() < 2e-5, "{name}/{adapter}: merged {merged}, PEFT {theirs}");
        // Training continues it: five steps of AdamW without clipping, decay on all parameters, as in PyTorch.
        let steps = &peft["adamw_5"];
        dir.suasion(&["train", "-D", "rows.jsonl", "--quiet", "-M", path])
            .set(&RUN[..6])
            .set(&["max_steps=5", "max_grad_norm=0", "lr_scheduler_type=constant", "output_dir=out"])
            .set(&["learning_rate=5e-3", "weight_decay=0"])
            .ok();
        let first = dir.lines("out/metrics.jsonl")[0].clone();
        let want = steps["losses"][0].as_f64().unwrap();
        assert!((first["loss"].as_f64().unwrap() - want).abs() < 2e-5, "{name}/{adapter}: {first}");
        let want = steps["grad_norms"][0].as_f64().unwrap();
        assert!(
            (first["grad_norm"].as_f64().unwrap() / want - 1.0).abs() < 1e-4,
            "{name}/{adapter}: {first}"
        );
    }
}

#[test]
fn a_resumed_adapter_ends_with_the_same_bytes() {
    let dir = Dir::new();
    write_rows(&dir, "llama", &["a", "padded"]);
    for file in ["config.json", "model.safetensors"] {
        dir.write(&format!("model/{file}"), std::fs::read(model("llama").join(file)).unwrap());
    }
    let run = |output: &str| {
        let output = format!("output_dir={output}");
        dir.train("rows.jsonl").set(&RUN[..4]).set(&[
            "max_steps=6",
            "save_steps=3",
            "use_peft=true",
            "use_dora=true",
            "lora_dropout=0.2",
            "lora_target_modules=[q_proj, down_proj]",
            "lora_modules_to_save=[norm]",
            &output,
        ])
    };
    run("whole").args(&["--threads", "1"]).ok();
    run("killed").args(&["--threads", "2"]).ok();
    std::fs::remove_dir_all(dir.path("killed/checkpoint-6")).unwrap();
    std::fs::remove_file(dir.path("killed/adapter_model.safetensors")).unwrap();
    dir.suasion(&["train", "--resume", "killed", "--threads", "1"]).ok();
    for name in ["adapter_model.safetensors", "adapter_config.json", "checkpoint-6/optimizer.safetensors"] {
        assert_eq!(dir.read(&format!("whole/{name}")), dir.read(&format!("killed/{name}")), "{name}");
    }
    assert!(!dir.exists("whole/model.safetensors") && !dir.exists("whole/config.json"));
    assert!(!dir.exists("whole/checkpoint-3/model.safetensors"));
    let card = dir.text("whole/README.md");
    assert!(card.contains("library_name: peft") && card.contains("base_model: model"), "{card}");

    // Another base under the same name is refused, and so are other settings.
    std::fs::remove_dir_all(dir.path("killed/checkpoint-6")).unwrap();
    std::fs::remove_file(dir.path("killed/adapter_model.safetensors")).unwrap();
    let rank = dir.suasion(&["train", "--resume", "killed", "--lora_r", "8"]).run().code(2);
    rank.says("r of its adapter was 16, is 8");
    let mut weights = dir.read("model/model.safetensors");
    *weights.last_mut().unwrap() ^= 1;
    dir.write("model/model.safetensors", weights);
    let changed = dir.suasion(&["train", "--resume", "killed"]).run();
    assert_ne!(changed.code, Some(0));
    changed.says("the fingerprint of the adapter's base model");
}

#[test]
fn an_adapter_stands_for_its_model_everywhere() {
    let dir = Dir::new().with_weights().with_rows(6);
    let train =
        ["use_peft=true", "lora_target_modules=all-linear", "max_steps=2", "save_steps=1", "output_dir=out"];
    dir.train("rows.jsonl").set(&train).ok();
    for command in ["verify", "prepare", "eval"] {
        let output: &[&str] = if command == "prepare" { &["-o", "prepared.jsonl"] } else { &[] };
        dir.suasion(&[command, "-D", "rows.jsonl", "--adapter", "out"]).args(output).ok();
    }
    let reply = |args: &[&str]| {
        dir.suasion(&["generate", "-p", "[TASK] Reply.", "--json"]).args(args).ok().json()["ids"].clone()
    };
    let merge = dir.suasion(&["merge", "--adapter", "out", "-o", "merged"]);
    merge.ok();
    let over_base = reply(&["--adapter", "out", "-M", "model"]);
    assert_eq!(reply(&["-M", "out"]), over_base);
    assert_eq!(reply(&["-M", "merged"]), over_base);
    // Training continues from its own folder, and is resumed there.
    let more = ["max_steps=2", "save_steps=1", "output_dir=more"];
    dir.suasion(&["train", "-D", "rows.jsonl", "--adapter", "out"]).set(&more).ok();
    std::fs::remove_dir_all(dir.path("more/checkpoint-2")).unwrap();
    let whole = dir.read("more/adapter_model.safetensors");
    std::fs::remove_file(dir.path("more/adapter_model.safetensors")).unwrap();
    dir.suasion(&["train", "--resume", "more"]).ok();
    assert_eq!(dir.read("more/adapter_model.safetensors"), whole);
}

/// The base's stop tokens come only from its config.json. A checkpoint of the adapter has no config.json, but must use
/// the same stop tokens: they are part of the data's fingerprint.
#[test]
fn an_adapter_is_resumed_whose_base_stops_by_its_configuration() {
    let dir = Dir::new().with_weights().with_rows(6);
    let mut config = dir.json("model/config.json");
    config["eos_token_id"] = json!([2, 5]);
    dir.write("model/config.json", config.to_string());
    let _ = std::fs::remove_file(dir.path("model/generation_config.json"));
    let train =
        ["use_peft=true", "lora_target_modules=all-linear", "max_steps=2", "save_steps=1", "output_dir=out"];
    dir.train("rows.jsonl").set(&train).ok();
    let whole = dir.read("out/adapter_model.safetensors");
    std::fs::remove_dir_all(dir.path("out/checkpoint-2")).unwrap();
    std::fs::remove_file(dir.path("out/adapter_model.safetensors")).unwrap();
    dir.suasion(&["train", "--resume", "out"]).ok();
    assert_eq!(dir.read("out/adapter_model.safetensors"), whole);
}

#[test]
fn what_cannot_be_adapted_is_refused_by_name() {
    let dir = Dir::new();
    write_rows(&dir, "llama", &["a"]);
    let refuse = |name: &str, settings: &[&str], says: &str| {
        let command = dir.suasion(&["train", "-D", "rows.jsonl", "--dry-run", "-M"]).arg(model(name));
        let ran = command.set(&["max_length=null", "max_steps=1"]).set(settings).run();
        assert_ne!(ran.code, Some(0));
        ran.says(says);
    };
    refuse("llama", &["lora_r=4"], "lora_r has no effect without use_peft=true");
    refuse("llama", &["use_peft=true", "lora_target_modules=[q_proj, w_proj]"], "named \"w_proj\"");
    refuse(
        "llama",
        &["use_peft=true", "lora_target_modules=[embed_tokens]"],
        "modules_to_save to train it whole",
    );
    refuse("llama", &["use_peft=true", "lora_target_modules=(q"], "not a regular expression");
    refuse(
        "llama",
        &["use_peft=true", "lora_init=pissa"],
        "lora_init: expected one of: true, gaussian, false",
    );
    refuse("llama", &["use_peft=true", "lora_bias=all"], "lora_bias is not supported");
    refuse(
        "llama",
        &["use_peft=true", "lora_modules_to_save=[tail]"],
        "no module of this model is named \"tail\"",
    );
    refuse("phi3", &["use_peft=true"], "PEFT has no default for phi3");
    refuse("qwen3_moe", &["use_peft=true", "lora_target_modules=all-linear"], "target_parameters");

    let adapter = |change: &dyn Fn(&mut Value)| {
        let mut config = golden("llama", "lora/adapter_config.json");
        change(&mut config);
        dir.write("adapter/adapter_config.json", config.to_string());
        let weights = std::fs::read(model("llama").join("lora/adapter_model.safetensors")).unwrap();
        dir.write("adapter/adapter_model.safetensors", weights);
        dir.suasion(&["eval", "-D", "rows.jsonl", "--adapter", "adapter", "-M"]).arg(model("llama")).run()
    };
    adapter(&|_| ()).code(0);
    adapter(&|config| config["init_lora_weights"] = "pissa".into()).says("init_lora_weights = \"pissa\"");
    adapter(&|config| config["target_parameters"] = json!(["experts"])).says("target_parameters");
    adapter(&|config| config["peft_type"] = "IA3".into()).says("peft_type is \"IA3\"");
    adapter(&|config| config["brand_new"] = 3.into())
        .says("brand_new = 3: a field that suasion does not know");
    adapter(&|config| config["r"] = 8.into()).says("adapter tensors fit this model");
    std::fs::create_dir(dir.path("full")).unwrap();
    dir.write("full/keep", "x");
    let merge = dir.suasion(&["merge", "--adapter", "adapter", "-o", "full", "-M"]).arg(model("llama")).run();
    merge.code(2).says("merge replaces nothing");
}

/// Runs a task of `adapters.py`.
fn peer(python: &Path, args: &[&str]) -> Value {
    let script = root().join("tests/adapters.py");
    let out = std::process::Command::new(python).arg(script).args(args).output().unwrap();
    let stdout = String::from_utf8_lossy(&out.stdout);
    match stdout.lines().find_map(|line| line.strip_prefix("RESULT ")) {
        Some(json) => serde_json::from_str(json).unwrap(),
        None => panic!("{}", String::from_utf8_lossy(&out.stderr)),
    }
}

/// Logits at every position of the first two rows.
fn logits(dir: &Dir, base: &Path, adapter: Option<&Path>) -> Vec<Vec<f32>> {
    let (arch, _) = Architecture::from_dir(base).unwrap().with_head_of(base).unwrap();
    let budget = Budget { tokens: 64, targets: 1, train: false, recompute: false };
    let mut model = match adapter {
        None => Model::new(arch, Cpu::new(), budget).unwrap(),
        Some(adapter) => {
            let lora = AdapterFolder::open(adapter).unwrap().lora_for(&arch).unwrap();
            Model::with_base(arch, Cpu::new(), budget, &Trainable::Adapter(lora), Base::Mapped).unwrap()
        }
    };
    model.load_weights(base).unwrap();
    if let Some(adapter) = adapter {
        model.load_adapter(&adapter.join(ADAPTER_WEIGHTS)).unwrap();
    }
    let mut cache = model.cache(64).unwrap();
    let mut all = Vec::new();
    for row in &dir.lines("rows.jsonl")[..2] {
        cache.truncate(0);
        for id in row["input_ids"].as_array().unwrap() {
            all.push(model.decode(&mut cache, &[id.as_u64().unwrap() as u32]).unwrap());
        }
    }
    all
}

/// Asserts that logits match those of a peer, which returns a list for each row.
fn assert_logits(ours: &[Vec<f32>], theirs: &Value, what: &str) {
    let theirs: Vec<&Value> =
        theirs.as_array().unwrap().iter().flat_map(|row| row.as_array().unwrap()).collect();
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for (position, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
        for (id, (ours, theirs)) in ours.iter().zip(theirs.as_array().unwrap()).enumerate() {
            let theirs = theirs.as_f64().unwrap();
            assert!(
                (f64::from(*ours) - theirs).abs() < 1e-4,
                "{what}, position {position}, id {id}: {ours}, {theirs}"
            );
        }
    }
}

#[test]
fn logits_are_those_of_peft_in_both_directions() {
    let Some(python) = suasion_test_support::peers_python() else { return };
    for (name, adapter, settings) in [
        ("llama", "dora", &["lora_target_modules=all-linear", "use_rslora=true"][..]),
        (
            "llama_tied",
            "lora_saved",
            &["lora_target_modules=[v_proj]", "lora_modules_to_save=[lm_head, embed_tokens]"],
        ),
        ("gpt2", "dora", &["lora_target_modules=[c_attn]"]),
        ("phi3", "lora_all_linear", &["lora_target_modules=all-linear", "use_dora=true"]),
        ("gpt_neox", "lora_saved", &["lora_target_modules=[query_key_value]"]),
    ] {
        let (dir, base) = (Dir::new(), model(name));
        write_rows(&dir, name, &["a", "padded"]);
        let train = dir.suasion(&["train", "-D", "rows.jsonl", "--quiet", "-M"]).arg(&base).set(&RUN);
        train.set(&["max_steps=4", "output_dir=out"]).set(settings).ok();
        // Our own adapter, and one saved by PEFT.
        for adapter in [dir.path("out"), base.join(adapter)] {
            let what = format!("{name}, {}", adapter.display());
            let path = |path: &Path| path.to_str().unwrap().to_string();
            let rows = path(&dir.path("rows.jsonl"));
            let theirs = peer(&python, &["logits", &path(&base), &path(&adapter), &rows]);
            let ours = logits(&dir, &base, Some(&adapter));
            assert_logits(&ours, &theirs["adapter"], &what);
            let _ = std::fs::remove_dir_all(dir.path("merged"));
            let merge =
                dir.suasion(&["merge", "-o", "merged", "--quiet", "--adapter", &path(&adapter), "-M"]);
            merge.arg(&base).ok();
            let merged = logits(&dir, &dir.path("merged"), None);
            assert_logits(&merged, &theirs["merged"], &format!("{what}, merged"));
            for (merged, ours) in merged.iter().flatten().zip(ours.iter().flatten()) {
                assert!((merged - ours).abs() < 1e-4, "{what}: merged {merged}, adapter over base {ours}");
            }
            let plain = peer(&python, &["logits", &path(&dir.path("merged")), "", &rows]);
            assert_logits(&merged, &plain["model"], &format!("{what}, merged, in transformers"));
        }
    }
}

/// As in PEFT, the first matching pattern applies, in the order in which they are written.
#[test]
fn the_first_pattern_that_matches_gives_the_rank() {
    let (dir, base) = (Dir::new(), model("llama"));
    write_rows(&dir, "llama", &["a"]);
    let ranks = |pattern: &str| {
        let train = dir.suasion(&["train", "-D", "rows.jsonl", "--quiet", "-M"]).arg(&base).set(&RUN);
        let settings = ["max_steps=1", "output_dir=out", "lora_r=4", "lora_target_modules=[q_proj, v_proj]"];
        train
            .set(&settings)
            .set(&[&format!("lora_rank_pattern={pattern}"), "overwrite_output_dir=true"])
            .ok();
        let header = suasion_test_support::tensors(&dir.path("out/adapter_model.safetensors"));
        ["0.self_attn.q_proj", "1.self_attn.q_proj", "1.self_attn.v_proj"].map(|module| {
            header[&format!("base_model.model.model.layers.{module}.lora_A.weight")]["shape"][0]
                .as_u64()
                .unwrap()
        })
    };
    assert_eq!(ranks("{q_proj: 2, '.*layers.1.*': 3}"), [2, 2, 3]);
    assert_eq!(ranks("{'.*layers.1.*': 3, q_proj: 2}"), [2, 3, 3]);
}

#[test]
fn peft_reads_our_adapters_and_transformers_our_merged_models() {
    let Some(python) = suasion_test_support::peers_python() else { return };
    for (name, settings) in [
        (
            "llama",
            &["lora_target_modules=all-linear", "use_rslora=true", "lora_rank_pattern={q_proj: 2}"][..],
        ),
        ("llama_tied", &["lora_target_modules=[q_proj]", "lora_modules_to_save=[lm_head, embed_tokens]"]),
        ("gpt2", &["use_dora=true", "lora_target_modules=[c_attn, mlp.c_proj]"]),
        ("phi3", &["lora_target_modules=[qkv_proj, gate_up_proj]", "use_dora=true"]),
        ("gpt_neox", &["lora_target_modules=.*(query_key_value|dense)"]),
    ] {
        let (dir, base) = (Dir::new(), model(name));
        write_rows(&dir, name, &["a", "padded"]);
        dir.suasion(&["train", "-D", "rows.jsonl", "--quiet", "-M"])
            .arg(&base)
            .set(&RUN)
            .set(&["max_steps=4", "output_dir=out"])
            .set(settings)
            .ok();
        dir.suasion(&["merge", "--adapter", "out", "-o", "merged", "--quiet", "-M"]).arg(&base).ok();
        let path = |name: &str| dir.path(name).to_str().unwrap().to_string();
        let base_path = base.to_str().unwrap();
        let theirs = peer(&python, &["read", base_path, &path("out"), &path("merged"), &path("rows.jsonl")]);
        let ours = loss(&dir, &["--adapter", "out"], Some(&base));
        for kind in ["adapter", "merged"] {
            let theirs = theirs[kind].as_f64().unwrap();
            assert!((ours - theirs).abs() < 1e-5, "{name}, {kind}: {ours}, PEFT {theirs}");
        }
    }
}

#[test]
fn fifty_steps_are_those_of_the_trainer_and_of_trl() {
    let Some(python) = suasion_test_support::peers_python() else { return };
    let run = json!({
        "max_steps": 50, "per_device_train_batch_size": 2, "learning_rate": 2e-3, "lr_scheduler_type": "cosine",
        "warmup_steps": 5, "weight_decay": 0.01, "max_grad_norm": 1.0,
    });
    for (name, trainer, lora) in [
        (
            "llama",
            "trl",
            json!({"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "use_rslora": true}),
        ),
        (
            "qwen2",
            "hf",
            json!({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "use_dora": true}),
        ),
        (
            "gpt2",
            "trl",
            json!({"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"], "fan_in_fan_out": true}),
        ),
        (
            "phi3",
            "hf",
            json!({"r": 4, "lora_alpha": 8, "target_modules": ["qkv_proj"], "modules_to_save": ["lm_head"]}),
        ),
    ] {
        let (dir, base) = (Dir::new(), model(name));
        write_rows(&dir, name, &["a", "padded"]);
        let path = |name: &str| dir.path(name).to_str().unwrap().to_string();
        let base_path = base.to_str().unwrap();
        peer(&python, &["begin", base_path, &path("adapter"), &lora.to_string()]);
        let (rows, run) = (path("rows.jsonl"), run.to_string());
        let theirs =
            peer(&python, &["train", base_path, &path("adapter"), &rows, trainer, &run, &path("hf")]);
        let settings: Value = serde_json::from_str(&run).unwrap();
        let settings: Vec<String> = settings
            .as_object()
            .unwrap()
            .iter()
            .map(|(key, value)| format!("{key}={}", value.to_string().trim_matches('"')))
            .collect();
        let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
        dir.suasion(&["train", "-D", "rows.jsonl", "--quiet", "--adapter", "adapter", "-M"])
            .arg(&base)
            .set(&["shuffle_dataset=false", "max_length=null", "save_strategy=no", "logging_steps=1"])
            .set(&settings)
            .set(&["output_dir=out"])
            .ok();
        let ours = dir.lines("out/metrics.jsonl");
        for (key, theirs) in [("loss", &theirs["losses"]), ("grad_norm", &theirs["grad_norms"])] {
            let theirs = theirs.as_array().unwrap();
            assert_eq!((theirs.len(), ours.len()), (50, 50), "{name}");
            let mut worst = 0.0f64;
            for (step, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
                let (ours, theirs) = (ours[key].as_f64().unwrap(), theirs.as_f64().unwrap());
                worst = worst.max((ours / theirs - 1.0).abs());
                assert!(
                    (ours / theirs - 1.0).abs() < 1e-5,
                    "{name} step {step}: {key} {ours}, {trainer} {theirs}"
                );
            }
            eprintln!("{name} by {trainer}: {key} within {worst:.1e} over 50 steps");
        }
        let (after, theirs) =
            (loss(&dir, &["--adapter", "out"], Some(&base)), theirs["after"].as_f64().unwrap());
        assert!((after / theirs - 1.0).abs() < 1e-5, "{name}: {after} afterwards, {theirs}");
    }
}

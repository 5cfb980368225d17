//! Bases in 4 and 8 bits: codes and scales as in bitsandbytes, products with them, and PEFT's adapters.

mod common;

use common::card::card;
use common::golden::{LOSS, NORM, check_trajectory};
use common::{
    Random, accumulate, architecture, floats, golden_batch, json, mean_loss, model_of, move_adapter,
    relative, saved_as, trained_gradients,
};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use suasion_engine::{
    ADAPTER_WEIGHTS, AdapterFolder, Architecture, Backend, Base, Batch, Budget, CardRun, Cpu, Device, Lora,
    MemoryPlan, Model, Packing, Precision, Reference, Targets, Trainable, WeightType,
};

const KINDS: [(&str, Packing); 3] = [
    ("nf4", Packing::Nf4 { nested: false }),
    ("nf4_nested", Packing::Nf4 { nested: true }),
    ("int8", Packing::Int8),
];

fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models")
}

fn arch_of(dir: &Path) -> Architecture {
    Architecture::from_dir(dir).unwrap()
}

/// The name of a gradient in PEFT's files, from its name in transformers.
fn in_file(name: &str) -> String {
    let name = name.replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector");
    name.replace(".default.weight", ".weight").replace(".modules_to_save.default.", ".")
}

/// Losses, gradients and five steps of an adapter over a base that is packed on loading.
fn check<B: Backend>(backend: impl Fn() -> B, name: &str, kind: &str, packing: Packing, golden: &Value) {
    let (family, adapter) = name.split_once('/').unwrap();
    let (dir, what) = (models().join(family), format!("{name}, {kind}"));
    let (arch, want) = (arch_of(&dir), &golden[format!("{name}/{kind}").as_str()]);
    let adapter = AdapterFolder::open(&dir.join(adapter)).unwrap();
    let batch = golden_batch(&json(&dir.join("golden.json"))["batches"]["a"]);
    let budget = Budget { tokens: batch.tokens(), targets: batch.tokens(), train: true, recompute: false };
    // Without an adapter, as in an evaluation.
    let without = Budget { train: false, ..budget };
    let mut base =
        Model::with_base(arch.clone(), backend(), without, &Trainable::All, Base::Packed(packing)).unwrap();
    base.load_weights(&dir).unwrap();
    let (loss, exact) =
        (mean_loss(&batch, &base.forward(&batch).unwrap()), want["base_loss"].as_f64().unwrap());
    assert!((loss - exact).abs() < LOSS, "{what}: loss of the base {loss}, transformers {exact}");
    let lora = Trainable::Adapter(adapter.lora_for(&arch).unwrap());
    let new = || {
        let mut model =
            Model::with_base(arch.clone(), backend(), budget, &lora, Base::Packed(packing)).unwrap();
        assert_eq!(model.load_weights(&dir).unwrap(), Vec::<String>::new());
        model.load_adapter(&adapter.path.join(ADAPTER_WEIGHTS)).unwrap();
        model
    };
    let mut model = new();
    let losses = accumulate(&mut model, &batch, 1.0 / batch.weight() as f32);
    let (loss, exact) = (mean_loss(&batch, &losses), want["fp32"]["a"]["loss"].as_f64().unwrap());
    assert!((loss - exact).abs() < LOSS, "{what}: loss {loss}, PEFT {exact}");
    let grads = want["fp32"]["a"]["grads"].as_object().unwrap();
    assert_eq!(grads.len(), model.trained_names().len(), "{what}");
    for (name, want) in grads {
        let got = model.gradient(&in_file(name)).unwrap().data;
        let norm = got.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let want_norm = want["norm"].as_f64().unwrap();
        assert!((norm - want_norm).abs() < NORM * want_norm.max(1e-3), "{what} {name}: {norm}, {want_norm}");
        for (i, v) in floats(&want["idx"]).iter().zip(floats(&want["val"])) {
            let got = f64::from(got[*i as usize]);
            assert!((got - v).abs() < NORM * want_norm.max(1e-3), "{what} {name}[{i}]: {got}, PEFT {v}");
        }
    }
    check_trajectory(&mut new(), &batch, &want["adamw_5"], &what);
}

fn cases(golden: &Value) -> impl Iterator<Item = &str> {
    golden.as_object().unwrap().keys().filter_map(|key| key.strip_suffix("/nf4"))
}

#[test]
fn adapters_over_packed_bases_equal_peft_with_bitsandbytes() {
    let golden = json(&models().join("quantised.json"));
    for name in cases(&golden) {
        for (kind, packing) in KINDS {
            check(Cpu::new, name, kind, packing, &golden);
        }
    }
    assert_eq!(cases(&golden).count(), 6);
}

#[test]
fn the_reference_and_a_card_compute_them_too() {
    let golden = json(&models().join("quantised.json"));
    for (kind, packing) in KINDS {
        check(Reference::<f32>::new, "llama/dora", kind, packing, &golden);
    }
    for name in cases(&golden) {
        // Nested scales cover the code of plain ones.
        for (kind, packing) in KINDS.into_iter().filter(|(kind, _)| *kind != "nf4") {
            if !name.contains("dora") && card(Precision::F32, 1).is_some() {
                check(|| card(Precision::F32, 2).unwrap(), name, kind, packing, &golden);
            }
        }
    }
}

/// Folders that transformers saved packed: the same numbers as from the unpacked folder.
#[test]
fn folders_that_transformers_has_packed_are_read() {
    let golden = json(&models().join("quantised.json"));
    for (family, adapter) in [("llama", "lora_all_linear"), ("gpt2", "lora")] {
        for (kind, packing) in &KINDS[1..] {
            let (what, dir) = (format!("{family}/{kind}"), models().join(family).join(kind));
            let arch = arch_of(&dir);
            assert_eq!((arch.packed, &arch.not_applied[..]), (Some(*packing), &[][..]), "{what}");
            let batch = golden_batch(&json(&models().join(family).join("golden.json"))["batches"]["a"]);
            let budget =
                Budget { tokens: batch.tokens(), targets: batch.tokens(), train: true, recompute: false };
            let want = &golden[format!("{family}/{adapter}/{kind}").as_str()];
            for base in [Base::Resident, Base::Mapped] {
                let without = Budget { train: false, ..budget };
                let mut model =
                    Model::with_base(arch.clone(), Cpu::new(), without, &Trainable::All, base).unwrap();
                assert_eq!(model.load_weights(&dir).unwrap(), Vec::<String>::new(), "{what}");
                let (loss, exact) =
                    (mean_loss(&batch, &model.forward(&batch).unwrap()), want["base_loss"].as_f64().unwrap());
                assert!((loss - exact).abs() < LOSS, "{what}: loss {loss}, transformers {exact}");
            }
            let adapter = AdapterFolder::open(&models().join(family).join(adapter)).unwrap();
            let lora = Trainable::Adapter(adapter.lora_for(&arch).unwrap());
            let mut model = Model::with_base(arch.clone(), Cpu::new(), budget, &lora, Base::Mapped).unwrap();
            model.load_weights(&dir).unwrap();
            model.load_adapter(&adapter.path.join(ADAPTER_WEIGHTS)).unwrap();
            check_trajectory(&mut model, &batch, &want["adamw_5"], &what);
            // The values read back are those that products read, whatever the layout of the file.
            let matrix = if family == "gpt2" {
                "transformer.h.0.attn.c_attn.weight"
            } else {
                "model.layers.0.mlp.up_proj.weight"
            };
            let of_packed = model.parameter(matrix).unwrap();
            let plain = models().join(family);
            let mut model = Model::new(arch_of(&plain), Cpu::new(), budget).unwrap();
            model.load_weights(&plain).unwrap();
            let error = relative(&of_packed.data, &model.parameter(matrix).unwrap().data);
            let most = if *packing == Packing::Int8 { 0.01 } else { 0.15 };
            assert!(error > 0.0 && error < most, "{what}: {error}");
        }
    }
    // LLM.int8 also quantises activations to 8 bits.
    for family in ["llama", "gpt2"] {
        let key = |key: &str| format!("{family}/{key}");
        let adapter = if family == "llama" { "lora_all_linear" } else { "lora" };
        let ours = golden[key(&format!("{adapter}/int8")).as_str()]["base_loss"].as_f64().unwrap();
        let theirs = golden[key("llm_int8_loss").as_str()].as_f64().unwrap();
        assert!((ours / theirs - 1.0).abs() < 0.02 && ours != theirs, "{family}: {ours} and {theirs}");
    }
}

#[test]
fn damaged_and_other_packed_folders_are_refused_by_name() {
    let from = models().join("llama/nf4_nested");
    let config = json(&from.join("config.json"));
    let read = |change: &dyn Fn(&mut Value)| {
        let mut config = config.clone();
        change(&mut config["quantization_config"]);
        Architecture::from_json(&config, Path::new("config.json"))
    };
    assert!(read(&|_| ()).is_ok());
    for (change, words) in [
        (json!({"quant_method": "gptq", "bits": 4}), ["gptq", "load_in_4bit"]),
        (json!({"quant_method": "fp8"}), ["fp8", "original checkpoint"]),
        (json!({"bits": 4}), ["quant_method", "original checkpoint"]),
        (json!({"quant_method": "bitsandbytes"}), ["neither 4 bits nor 8", "original"]),
        (
            json!({"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "fp4"}),
            ["fp4", "nf4"],
        ),
    ] {
        let error = read(&|settings| *settings = change.clone()).unwrap_err();
        let all = format!("{error} {}", error.help().unwrap_or_default());
        assert!(all.contains("quantization_config") && words.iter().all(|word| all.contains(word)), "{all}");
    }

    let bytes = std::fs::read(from.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let name = "model.layers.0.self_attn.q_proj.weight";
    let load = |change: &dyn Fn(&str, safetensors::tensor::TensorView) -> Option<(Vec<u8>, Vec<usize>)>| {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(from.join("config.json"), dir.path().join("config.json")).unwrap();
        let kept: Vec<_> = tensors
            .iter()
            .filter_map(|(name, tensor)| {
                Some((name.to_string(), change(name, tensor.clone())?, tensor.dtype()))
            })
            .collect();
        let views = kept.iter().map(|(name, (data, shape), dtype)| {
            (name, safetensors::tensor::TensorView::new(*dtype, shape.clone(), data).unwrap())
        });
        let bytes = safetensors::serialize(views, None).unwrap();
        std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
        let budget = Budget { tokens: 4, targets: 4, train: false, recompute: false };
        let mut model = Model::new(arch_of(dir.path()), Cpu::new(), budget).unwrap();
        model.load_weights(dir.path()).map(|_| ()).map_err(|e| e.to_string())
    };
    let same =
        |tensor: safetensors::tensor::TensorView| Some((tensor.data().to_vec(), tensor.shape().to_vec()));
    load(&|_, tensor| same(tensor)).unwrap();
    for missing in ["absmax", "quant_state.bitsandbytes__nf4"] {
        let gone = format!("{name}.{missing}");
        let error = load(&|name, tensor| if name == gone { None } else { same(tensor) }).unwrap_err();
        assert!(error.contains(missing) && error.contains(name), "{error}");
    }
    for (what, words) in [("", "codes and scales"), (".nested_absmax", "finite"), (".quant_map", "quant_map")]
    {
        let damaged = format!("{name}{what}");
        let error = load(&|name, tensor| {
            let (mut data, mut shape) = same(tensor)?;
            match (name == damaged, what) {
                (false, _) => {}
                (true, "") => {
                    data.truncate(8);
                    shape[0] = 8;
                }
                (true, _) => data[..4].copy_from_slice(&f32::NAN.to_le_bytes()),
            }
            Some((data, shape))
        })
        .unwrap_err();
        assert!(error.contains(words) && error.contains(name), "{error}");
    }
    // Codes that config.json does not mention.
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(from.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    let budget = Budget { tokens: 4, targets: 4, train: false, recompute: false };
    let mut model = Model::new(arch_of(&models().join("llama")), Cpu::new(), budget).unwrap();
    let error = model.load_weights(dir.path()).unwrap_err();
    let all = format!("{error} {}", error.help().unwrap_or_default());
    assert!(all.contains("U8") && all.contains("quantised"), "{all}");
}

fn lora(family: &str) -> Lora {
    let modules: &[&str] = match family {
        "gpt2" => &["c_attn", "mlp.c_proj"],
        "phi3" => &["qkv_proj", "down_proj"],
        "gpt_neox" => &["query_key_value", "mlp.dense_4h_to_h"],
        _ => &["q_proj", "v_proj", "o_proj"],
    };
    let targets = Targets::Names(modules.iter().map(|name| name.to_string()).collect());
    Lora { targets, rank: 3, alpha: 6.0, ..Lora::default() }
}

fn batch() -> Batch {
    let mut random = Random(5);
    let mut batch = Batch::default();
    for length in [7, 2, 30] {
        let ids = random.ids(length);
        batch.push(&ids, (1..length).map(|j| (j as u32 - 1, ids[j], 1.0)));
    }
    batch
}

/// Loss and gradients of a model over a base packed from bf16 files.
fn pass<B: Backend>(
    dir: &Path,
    family: &str,
    backend: B,
    packing: Packing,
    dora: bool,
) -> (f64, Vec<(String, Vec<f32>)>, Model<B>) {
    let budget = Budget { tokens: 64, targets: 64, train: true, recompute: false };
    let trainable = Trainable::Adapter(Lora { dora, ..lora(family) });
    let base = Base::Packed(packing);
    let mut model = Model::with_base(architecture(family), backend, budget, &trainable, base).unwrap();
    model.load_weights(dir).unwrap();
    model.init_adapter(4).unwrap();
    move_adapter(&mut model);
    let losses = accumulate(&mut model, &batch(), 0.1);
    (mean_loss(&batch(), &losses), trained_gradients(&model), model)
}

fn in_bf16(family: &str) -> tempfile::TempDir {
    saved_as(&mut model_of(architecture(family), Cpu::new(), false, &Trainable::All), WeightType::BF16)
}

/// Every layout of layers in files, experts that are not packed, and sizes that are not multiples of a block.
#[test]
fn every_family_computes_the_same_on_every_device() {
    for family in ["llama", "gpt2", "phi3", "gpt_neox", "qwen3_moe"] {
        let dir = in_bf16(family);
        for (kind, packing) in KINDS.into_iter().filter(|(kind, _)| *kind != "nf4" || family == "phi3") {
            let dora = packing != Packing::Int8;
            let (want, exact, oracle) = pass(dir.path(), family, Reference::<f32>::new(), packing, dora);
            let mut others = vec![Device::cpu()];
            others.extend(card(Precision::F32, 3).map(Device::from));
            for device in others {
                let (got, found, model) = pass(dir.path(), family, device, packing, dora);
                assert!((got - want).abs() < 5e-6 * want, "{family} {kind}: {got} and {want}");
                for ((name, exact), (_, found)) in exact.iter().zip(&found) {
                    let error = relative(found, exact);
                    assert!(error < 2e-4, "{family} {kind} {name}: {error:e}");
                }
                let plan = model.plan();
                let budget = Budget { tokens: 64, targets: 64, train: true, recompute: false };
                let lora = Trainable::Adapter(Lora { dora, ..lora(family) });
                let planned =
                    MemoryPlan::over(&architecture(family), budget, &lora, Base::Packed(packing)).unwrap();
                assert_eq!((plan.packed, plan.mapped), (planned.packed, planned.mapped), "{family} {kind}");
                assert!(plan.packed > 0 && plan.own() > plan.packed);
            }
            assert!(oracle.plan().packed > 0);
        }
    }
}

/// Buffers and packed matrices match the plan, and a 4-bit matrix takes an eighth of its f32 values plus its scales.
#[test]
fn memory_is_that_of_the_plan() {
    let arch = architecture("llama");
    let dir = in_bf16("llama");
    for (kind, packing) in KINDS {
        for device in [Some(Device::cpu()), card(Precision::Bf16, 4).map(Device::from)].into_iter().flatten()
        {
            let budget = Budget { tokens: 64, targets: 64, train: true, recompute: false };
            let trainable = Trainable::Adapter(lora("llama"));
            let on_card = matches!(device, Device::Cuda(_));
            let mut model =
                Model::with_base(arch.clone(), device, budget, &trainable, Base::Packed(packing)).unwrap();
            let before = model.allocated();
            model.load_weights(dir.path()).unwrap();
            assert_eq!(model.allocated() - before, model.plan().packed, "{kind}");
            if on_card {
                assert_eq!(model.allocated(), model.plan().own(), "{kind}");
            }
        }
    }
    // Computed by hand: a layer of 4096 × 4096 in blocks of 64, with nested scales in groups of 256 blocks.
    let layer = |packing: Packing| {
        let mut arch = architecture("llama");
        arch.blocks.truncate(1);
        let budget = Budget { tokens: 1, targets: 1, train: true, recompute: false };
        let plan = |base| MemoryPlan::over(&arch, budget, &Trainable::Adapter(lora("llama")), base).unwrap();
        let (packed, mapped) = (plan(Base::Packed(packing)), plan(Base::Mapped));
        let elements = (mapped.mapped - packed.mapped) / 2;
        packed.packed as f64 / elements as f64
    };
    assert!((layer(KINDS[0].1) - (0.5 + 4.0 / 64.0)).abs() < 5e-3, "{}", layer(KINDS[0].1));
    assert!((layer(KINDS[1].1) - (0.5 + 1.0 / 64.0)).abs() < 2e-2, "{}", layer(KINDS[1].1));
}

/// Qwen3-8B with rank 16 on all linear layers and 1,024 tokens a step fits into a 16 GB card, and into less CPU memory
/// than its bf16 weights would need.
#[test]
fn an_8b_model_fits_into_16_gb() {
    let config = json!({
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 12288, "max_position_embeddings": 40960,
        "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000, "tie_word_embeddings": false, "vocab_size": 151936, "torch_dtype": "bfloat16",
    });
    let arch = Architecture::from_json(&config, Path::new("config.json")).unwrap();
    assert_eq!(arch.parameter_count(), 8_190_735_360);
    let lora = Trainable::Adapter(Lora { targets: Targets::AllLinear, rank: 16, ..Lora::default() });
    let budget = Budget { tokens: 1024, targets: 1024, train: true, recompute: true };
    let plan = MemoryPlan::over(&arch, budget, &lora, Base::Packed(KINDS[1].1)).unwrap();
    let linears = 36 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 12288) as u64;
    assert_eq!(plan.packed, linears / 2 + linears / 64 + linears / 64 / 256 * 4);
    assert_eq!(plan.mapped, 2 * 2 * 151936 * 4096);
    let on_card = |base| CardRun::new(&lora, base, Precision::Bf16).needed(&arch, budget).unwrap();
    let [four, eight, plain] =
        [Base::Packed(KINDS[1].1), Base::Packed(Packing::Int8), Base::Mapped].map(on_card);
    println!("on a card: {four} bytes in 4 bits, {eight} in 8 bits, {plain} in bf16");
    assert!(four < eight && eight < 16_000_000_000 && plain > 16_000_000_000);
}

#[test]
fn bytes_do_not_depend_on_the_number_of_threads() {
    for family in ["phi3", "gpt2"] {
        let dir = in_bf16(family);
        for (kind, packing) in KINDS {
            let run = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
                pool.install(|| {
                    let (loss, gradients, _) = pass(dir.path(), family, Cpu::new(), packing, true);
                    (loss.to_bits(), gradients.into_iter().map(|(_, g)| bits(g)).collect::<Vec<_>>())
                })
            };
            assert!(run(1) == run(3), "{family} {kind}");
        }
    }
}

/// A merge uses the weights as stored in the base's files.
#[test]
fn merging_takes_the_weights_of_the_files() {
    let dir = in_bf16("llama");
    let (_, _, packed) = pass(dir.path(), "llama", Cpu::new(), KINDS[0].1, false);
    let budget = Budget { tokens: 64, targets: 64, train: true, recompute: false };
    let trainable = Trainable::Adapter(lora("llama"));
    let mut plain =
        Model::with_base(architecture("llama"), Cpu::new(), budget, &trainable, Base::Mapped).unwrap();
    plain.load_weights(dir.path()).unwrap();
    for name in packed.trained_names() {
        plain.set_parameter(&name, &packed.parameter(&name).unwrap()).unwrap();
    }
    let merged = |model: &Model<Cpu>| {
        let out = tempfile::tempdir().unwrap();
        model.save_merged(out.path(), WeightType::F32).unwrap();
        std::fs::read(out.path().join("model.safetensors")).unwrap()
    };
    assert!(merged(&packed) == merged(&plain));
}

#[test]
fn what_cannot_be_trained_is_refused_by_name() {
    let budget = Budget { tokens: 4, targets: 4, train: true, recompute: false };
    let refuse = |trainable: &Trainable, words: &str| {
        let base = Base::Packed(KINDS[0].1);
        let error = Model::with_base(architecture("llama"), Cpu::new(), budget, trainable, base).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    };
    refuse(&Trainable::All, "cannot be trained; train an adapter over it");
    let saved = Lora { save: vec!["down_proj".into()], ..lora("llama") };
    refuse(&Trainable::Adapter(saved), "is in 4 bits and cannot be trained whole");
    // Head and embedding are not packed, and can be trained.
    let saved = Lora { save: vec!["lm_head".into(), "embed_tokens".into()], ..lora("llama") };
    let base = Base::Packed(KINDS[0].1);
    Model::with_base(architecture("llama"), Cpu::new(), budget, &Trainable::Adapter(saved), base).unwrap();

    // 8-bit packing goes through f16.
    let dir = tempfile::tempdir().unwrap();
    let mut plain = model_of(architecture("llama"), Cpu::new(), false, &Trainable::All);
    let name = "model.layers.1.self_attn.k_proj.weight";
    let mut tensor = plain.parameter(name).unwrap();
    tensor.data[9] = 1e5;
    plain.set_parameter(name, &tensor).unwrap();
    plain.save_weights(dir.path()).unwrap();
    let load = |packing| {
        let trainable = Trainable::Adapter(lora("llama"));
        let mut model =
            Model::with_base(architecture("llama"), Cpu::new(), budget, &trainable, Base::Packed(packing))
                .unwrap();
        model.load_weights(dir.path())
    };
    load(Packing::Nf4 { nested: true }).unwrap();
    let error = load(Packing::Int8).unwrap_err();
    assert!(error.to_string().contains("element 9") && error.to_string().contains(name), "{error}");
    assert!(error.help().unwrap().contains("load_in_4bit"));
}

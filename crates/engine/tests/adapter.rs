//! Low-rank adapters: gradients, memory, files.

mod common;

use common::{
    FAMILIES, Random, STEP, accumulate, architecture, mean_loss, model_of, move_adapter, relative, saved_as,
    slope, smooth, trained_gradients,
};
use std::collections::BTreeSet;
use suasion_engine::{
    AdamW, Architecture, Backend, Base, Batch, Budget, Cpu, Device, Error, Lora, MemoryPlan, Model,
    Reference, Regularisation, Targets, Trainable, WeightType,
};

/// An adapter of odd rank on every kind of linear layer: a part of a fused layer, a whole layer, both matrices of the
/// MLP.
fn lora(family: &str) -> Lora {
    let targets: &[&str] = match family {
        "gpt2" => &["c_attn", "mlp.c_proj"],
        "phi3" => &["qkv_proj", "o_proj", "gate_up_proj", "model.layers.1.mlp.down_proj"],
        "gpt_neox" => &["query_key_value", "attention.dense", "mlp.dense_4h_to_h"],
        // Experts cannot have adapters.
        "qwen3_moe" => &["q_proj", "v_proj", "o_proj"],
        _ => &["q_proj", "v_proj", "o_proj", "up_proj", "model.layers.1.mlp.down_proj"],
    };
    Lora { rank: 3, alpha: 5.0, targets: names(targets), ..Lora::default() }
}

fn names(targets: &[&str]) -> Targets {
    Targets::Names(targets.iter().map(|t| t.to_string()).collect())
}

/// A model whose adapter has moved from its initial values, so that each of its matrices matters.
fn adapted<B: Backend>(family: &str, backend: B, recompute: bool) -> Model<B> {
    adapted_of(architecture(family), family, backend, recompute)
}

fn adapted_of<B: Backend>(arch: Architecture, family: &str, backend: B, recompute: bool) -> Model<B> {
    let trainable = Trainable::Adapter(lora(family));
    let mut model = model_of(arch, backend, recompute, &trainable);
    let mut random = Random(41);
    for name in model.trained_names() {
        let mut tensor = model.parameter(&name).unwrap();
        tensor.data.iter_mut().for_each(|x| *x = 0.4 * random.normal() as f32);
        model.set_parameter(&name, &tensor).unwrap();
    }
    model
}

fn batch(seed: u64) -> Batch {
    let mut random = Random(seed);
    let mut batch = Batch::default();
    for length in [7, 1, 18] {
        let ids = random.ids(length);
        batch.push(&ids, (length / 2..length).filter(|j| *j > 0).map(|j| (j as u32 - 1, ids[j], 1.0)));
    }
    batch
}

#[test]
fn gradients_of_an_adapter_are_the_slopes_of_the_loss() {
    for family in FAMILIES {
        let data = batch(1);
        let scale = 1.0 / data.weight() as f32;
        let run = |recompute| {
            let mut model = adapted_of(smooth(family), family, Cpu::new(), recompute);
            accumulate(&mut model, &data, scale);
            trained_gradients(&model)
        };
        let fast = run(false);
        assert!(fast == run(true), "{family}: recomputing changes no bit");
        let mut exact = adapted_of(smooth(family), family, Reference::<f64>::new(), false);
        accumulate(&mut exact, &data, scale);
        let mut random = Random(19);
        for ((name, truth), (_, fast)) in trained_gradients(&exact).iter().zip(&fast) {
            for i in [0, 1].map(|_| random.below(truth.len())) {
                let slope = slope(&mut exact, &data, name, i);
                for (what, g) in [("f64 reference", truth[i]), ("cpu", fast[i])] {
                    let close = (g as f64 - slope).abs() < 2e-4 + 2e-3 * slope.abs();
                    assert!(close, "{family} {name}[{i}], {what}: {g}, slope {slope}");
                }
            }
        }
    }
}

#[test]
fn an_adapter_alone_has_gradients_moments_and_state() {
    for family in FAMILIES {
        let arch = architecture(family);
        let base: BTreeSet<String> = arch.parameter_names().into_iter().collect();
        let budget = Budget { tokens: 64, targets: 64, train: true, recompute: false };
        let trainable = Trainable::Adapter(lora(family));
        let plan = MemoryPlan::with(&arch, budget, &trainable).unwrap();
        let mut model = adapted(family, Device::cpu(), false);
        let names = model.trained_names();
        assert!(names.iter().all(|n| n.starts_with("base_model.model.") && !base.contains(n)), "{names:?}");
        assert_eq!(names.len() + base.len(), model.parameter_names().len(), "{family}");
        let elements: usize = names.iter().map(|n| model.parameter(n).unwrap().data.len()).sum();
        assert_eq!(plan.gradients, 4 * elements as u64, "{family}");
        assert_eq!(plan.optimizer, 8 * elements as u64, "{family}");
        assert_eq!(plan.parameters, 4 * (arch.parameter_count() + elements as u64), "{family}");

        let step = |model: &mut Model, t: u64| {
            model.zero_gradients();
            accumulate(model, &batch(t), 0.1);
            model.adamw(&AdamW { t, ..STEP }).unwrap();
        };
        let values = |model: &Model, names: &mut dyn Iterator<Item = &String>| -> Vec<Vec<f32>> {
            names.map(|name| model.parameter(name).unwrap().data).collect()
        };
        let (own, adapter) = (values(&model, &mut base.iter()), values(&model, &mut names.iter()));
        step(&mut model, 1);
        assert_eq!(values(&model, &mut base.iter()), own, "{family}: the base is frozen");
        for ((name, before), after) in names.iter().zip(adapter).zip(values(&model, &mut names.iter())) {
            assert_ne!(before, after, "{family}: {name} is trained");
        }

        // Its files hold the adapter and nothing else, and a resumed run is bit-identical to an uninterrupted one.
        let dir = tempfile::tempdir().unwrap();
        let [weights, moments] =
            ["adapter_model.safetensors", "optimizer.safetensors"].map(|f| dir.path().join(f));
        model.save_adapter(&weights, true).unwrap();
        model.save_optimizer(&moments).unwrap();
        model.save_weights(dir.path()).unwrap();
        let held = |path: &std::path::Path| -> BTreeSet<String> {
            let bytes = std::fs::read(path).unwrap();
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            file.names().into_iter().map(String::from).collect()
        };
        assert_eq!(held(&weights), names.iter().cloned().collect(), "{family}");
        assert_eq!(held(&dir.path().join("model.safetensors")), base, "{family}");
        assert_eq!(held(&moments).len(), 2 * names.len(), "{family}");
        let mut resumed = model_of(arch.clone(), Device::cpu(), false, &trainable);
        resumed.load_weights(dir.path()).unwrap();
        resumed.load_adapter(&weights).unwrap();
        resumed.load_optimizer(&moments).unwrap();
        step(&mut model, 2);
        step(&mut resumed, 2);
        let all = model.parameter_names();
        assert_eq!(values(&model, &mut all.iter()), values(&resumed, &mut all.iter()), "{family}");

        let other = Lora { rank: 2, ..lora(family) };
        let mut other = model_of(arch, Device::cpu(), false, &Trainable::Adapter(other));
        let error = other.load_adapter(&weights).unwrap_err();
        assert!(error.to_string().contains("adapter tensors fit this model"), "{error}");
    }
}

#[test]
fn a_new_adapter_changes_nothing_until_it_is_trained() {
    for family in FAMILIES {
        let data = batch(3);
        let mut plain = model_of(architecture(family), Cpu::new(), false, &Trainable::All);
        let mut model = model_of(architecture(family), Cpu::new(), false, &Trainable::Adapter(lora(family)));
        model.init_adapter(9).unwrap();
        let [a, b] = ["lora_A", "lora_B"].map(|part| {
            let names = model.trained_names().into_iter().filter(|n| n.contains(part));
            names.map(|n| model.parameter(&n).unwrap()).collect::<Vec<_>>()
        });
        assert!(b.iter().all(|t| t.data.iter().all(|x| *x == 0.0)));
        for tensor in a {
            let bound = 1.0 / (tensor.shape[1] as f32).sqrt();
            let largest = tensor.data.iter().fold(0f32, |m, x| m.max(x.abs()));
            assert!(largest <= bound && largest > 0.7 * bound, "{family}: {largest} of ±{bound}");
        }
        assert_eq!(model.forward(&data).unwrap(), plain.forward(&data).unwrap(), "{family}");
    }
}

#[test]
fn merging_keeps_what_the_model_computes() {
    for family in FAMILIES {
        let data = batch(4);
        let mut model = adapted(family, Cpu::new(), false);
        let before = model.forward(&data).unwrap();
        let dir = tempfile::tempdir().unwrap();
        assert!(!model.save_merged(dir.path(), WeightType::F32).unwrap());
        let mut merged = model_of(architecture(family), Cpu::new(), false, &Trainable::All);
        merged.load_weights(dir.path()).unwrap();
        for (a, b) in before.iter().zip(merged.forward(&data).unwrap()) {
            assert!((a.nll - b.nll).abs() < 2e-5 * a.nll.abs().max(1.0), "{family}: {} and {}", a.nll, b.nll);
        }
    }
}

#[test]
fn adapters_that_fit_nothing_are_refused() {
    let arch: Architecture = architecture("llama");
    let budget = Budget { tokens: 8, targets: 8, train: true, recompute: false };
    let refuse = |lora: Lora, part: &str| {
        let lora = Trainable::Adapter(lora);
        let error = Model::with_trainable(arch.clone(), Cpu::new(), budget, &lora).unwrap_err();
        assert!(matches!(error, Error::Parameter { .. }) && error.to_string().contains(part), "{error}");
    };
    let base = lora("llama");
    refuse(Lora { targets: names(&["q_proj", "w_proj"]), ..base.clone() }, "named \"w_proj\"");
    refuse(Lora { targets: names(&["proj"]), ..base.clone() }, "named \"proj\"");
    refuse(Lora { targets: names(&[]), ..base.clone() }, "no parameter is chosen");
    refuse(Lora { rank: 0, ..base.clone() }, "rank 0");
    refuse(Lora { alpha: f64::NAN, ..base }, "alpha NaN");
    let mut plain = Model::new(arch.clone(), Cpu::new(), budget).unwrap();
    assert!(plain.init_adapter(1).unwrap_err().to_string().contains("without an adapter"));
}

/// A base in its file gives the same results as the same values in memory, whatever their type and alignment.
#[test]
fn a_base_in_its_file_computes_what_one_in_memory_does() {
    for family in FAMILIES {
        let arch = architecture(family);
        let mut plain = model_of(arch.clone(), Cpu::new(), false, &Trainable::All);
        for kind in [WeightType::F32, WeightType::BF16, WeightType::F16] {
            let dir = saved_as(&mut plain, kind);
            // Elements need not be aligned: the header of this file ends at an odd offset.
            let path = dir.path().join("model.safetensors");
            let bytes = std::fs::read(&path).unwrap();
            let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let mut moved = (header as u64 + 3).to_le_bytes().to_vec();
            moved.extend(&bytes[8..8 + header]);
            moved.extend(b"   ");
            moved.extend(&bytes[8 + header..]);
            std::fs::write(&path, moved).unwrap();

            let budget = Budget { tokens: 64, targets: 64, train: true, recompute: false };
            for dora in [false, true] {
                let trainable = Trainable::Adapter(Lora { dora, ..lora(family) });
                let data = batch(5);
                let run = |base| {
                    let mut model =
                        Model::with_base(arch.clone(), Device::cpu(), budget, &trainable, base).unwrap();
                    model.load_weights(dir.path()).unwrap();
                    model.init_adapter(4).unwrap();
                    move_adapter(&mut model);
                    let losses = accumulate(&mut model, &data, 1.0 / data.weight() as f32);
                    (mean_loss(&data, &losses), trained_gradients(&model), model)
                };
                let (want, gradients, _) = run(Base::Resident);
                let (got, mapped, model) = run(Base::Mapped);
                assert!((got - want).abs() < 2e-6 * want, "{family} {kind:?}: {got} and {want}");
                for ((name, want), (_, got)) in gradients.iter().zip(&mapped) {
                    let error = relative(got, want);
                    assert!(error < 2e-4, "{family} {kind:?} {name}: {error:e}");
                }
                let plan = MemoryPlan::over(&arch, budget, &trainable, Base::Mapped).unwrap();
                let whole = MemoryPlan::over(&arch, budget, &trainable, Base::Resident).unwrap();
                assert!(
                    plan.parameters < whole.parameters / 3,
                    "{family}: {} of {}",
                    plan.parameters,
                    whole.parameters
                );
                assert!(model.allocated() < whole.own(), "{family}: {} are held", model.allocated());
            }
        }
    }
}

/// With a fixed mask the gradient is the slope of the loss.
#[test]
#[allow(clippy::needless_update, reason = "what training adds to a pass will grow")]
fn gradients_under_dropout_are_the_slopes_of_the_loss() {
    for dora in [false, true] {
        for family in ["llama", "gpt2", "phi3"] {
            let data = batch(8);
            let trainable = Trainable::Adapter(Lora { dora, dropout: 0.4, ..lora(family) });
            let mut model = model_of(architecture(family), Reference::<f64>::new(), false, &trainable);
            let mut random = Random(23);
            for name in model.trained_names().iter().filter(|name| !name.contains("magnitude")) {
                let mut tensor = model.parameter(name).unwrap();
                tensor.data.iter_mut().for_each(|x| *x = 0.4 * random.normal() as f32);
                model.set_parameter(name, &tensor).unwrap();
            }
            let loss = |model: &mut Model<Reference<f64>>, seed| {
                model.regularise(Regularisation {
                    seed: Some(seed),
                    dropout: true,
                    ..Regularisation::default()
                });
                model.zero_gradients();
                let losses = accumulate(model, &data, 1.0 / data.weight() as f32);
                mean_loss(&data, &losses)
            };
            let first = loss(&mut model, 1);
            assert!((loss(&mut model, 2) - first).abs() > 1e-4, "{family}: another seed drops others");
            assert_eq!(loss(&mut model, 1), first);
            let gradients = trained_gradients(&model);
            for (name, gradient) in gradients.iter().filter(|(name, _)| !(dora && name.contains("lora"))) {
                let i = random.below(gradient.len());
                let mut at = |change: f32| {
                    let mut tensor = model.parameter(name).unwrap();
                    let old = tensor.data[i];
                    tensor.data[i] += change;
                    model.set_parameter(name, &tensor).unwrap();
                    let value = loss(&mut model, 1);
                    tensor.data[i] = old;
                    model.set_parameter(name, &tensor).unwrap();
                    value
                };
                let [narrow, wide] =
                    [4e-3, 8e-3].map(|step| (at(step) - at(-step)) / (2.0 * f64::from(step)));
                let (slope, got) = ((4.0 * narrow - wide) / 3.0, f64::from(gradient[i]));
                assert!(
                    (got - slope).abs() < 3e-4 + 3e-3 * slope.abs(),
                    "{family} {name}[{i}]: {got}, slope {slope}"
                );
            }
        }
    }
}

/// A base in f32 takes twice the bytes of one in bf16.
#[test]
fn the_plan_counts_a_mapped_base_by_the_type_of_its_files() {
    let (dir, budget) =
        (tempfile::tempdir().unwrap(), Budget { tokens: 4, targets: 4, train: true, recompute: false });
    let mut base = common::model("llama", Cpu::new(), false);
    let targets = Targets::Names(vec!["q_proj".into()]);
    let lora = Trainable::Adapter(Lora { rank: 2, targets, ..Lora::default() });
    let arch = common::architecture("llama");
    let planned = MemoryPlan::over(&arch, budget, &lora, Base::Mapped).unwrap();
    for (kind, bytes) in [(WeightType::F32, 4), (WeightType::BF16, 2)] {
        base.set_weight_type(kind);
        base.save_weights(dir.path()).unwrap();
        let plan = planned.over_files(dir.path());
        assert_eq!(plan.mapped, planned.mapped / 2 * bytes, "{kind:?}");
        let mut model = Model::with_base(arch.clone(), Cpu::new(), budget, &lora, Base::Mapped).unwrap();
        model.load_weights(dir.path()).unwrap();
        assert_eq!(model.plan().mapped, plan.mapped, "{kind:?}");
    }
}

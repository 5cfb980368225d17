//! Losses, logits, gradients and AdamW trajectories compared with PyTorch.

mod common;

use common::golden::{
    BATCHES, LOSS, NORM, TRAJECTORY, adamw, adapters, check_each_gradient, check_gradients, check_logits,
    check_trajectory, for_each, load, peft_golden,
};
use common::{floats, golden_batch};
use suasion_engine::{ADAPTER_WEIGHTS, Base, Batch, Budget, Cpu, Model, Reference, Trainable, WeightType};

#[test]
fn losses_and_gradients_equal_pytorch() {
    for_each(|family, dir, arch, golden| {
        for name in BATCHES {
            let (batch, want) = (golden_batch(&golden["batches"][name]), &golden["fp32"][name]);
            let what = format!("{family}/{name}");
            check_gradients(load(arch.clone(), dir, Cpu::new(), &[&batch], true), &batch, want, &what);
        }
    });
}

#[test]
fn the_reference_equals_pytorch_too() {
    for_each(|family, dir, arch, golden| {
        let (batch, want) = (golden_batch(&golden["batches"]["a"]), &golden["fp32"]["a"]);
        let what = format!("{family}/a on the reference");
        check_gradients(load(arch, dir, Reference::<f32>::new(), &[&batch], true), &batch, want, &what);
    });
}

#[test]
fn logits_equal_pytorch_through_the_cache() {
    for_each(|family, dir, arch, golden| check_logits(family, dir, &arch, &golden, Cpu::new));
}

#[test]
fn five_steps_of_adamw_equal_pytorch() {
    for_each(|family, dir, arch, golden| {
        let batch = golden_batch(&golden["batches"]["a"]);
        let mut model = load(arch, dir, Cpu::new(), &[&batch], true);
        let want = &golden["adamw_5"];
        check_trajectory(&mut model, &batch, want, family);
        let squares =
            |n: &String| model.parameter(n).unwrap().data.iter().map(|x| (*x as f64).powi(2)).sum::<f64>();
        let length = model.parameter_names().iter().map(squares).sum::<f64>().sqrt();
        let want = want["final_param_l2"].as_f64().unwrap();
        assert!(
            (length / want - 1.0).abs() < 1e-5,
            "{family}: parameters of length {length}, PyTorch {want}"
        );
    });
}

#[test]
fn training_a_choice_of_parameters_equals_pytorch() {
    let mut seen = 0;
    for_each(|family, dir, arch, golden| {
        let batch = golden_batch(&golden["batches"]["a"]);
        for (text, want) in golden["frozen"].as_object().into_iter().flatten() {
            let what = format!("{family}, {text} alone");
            let names = want["trainable"].as_array().unwrap().iter().map(|n| n.as_str().unwrap().to_string());
            let trainable = Trainable::Named(names.collect());
            let budget =
                Budget { tokens: batch.tokens(), targets: batch.tokens(), train: true, recompute: false };
            let mut model = Model::with_trainable(arch.clone(), Cpu::new(), budget, &trainable).unwrap();
            model.load_weights(dir).unwrap();
            common::accumulate(&mut model, &batch, 1.0 / batch.weight() as f32);
            let (norm, total) = (model.gradient_norm().unwrap(), want["grad_norm_total"].as_f64().unwrap());
            assert!((norm / total - 1.0).abs() < NORM, "{what}: gradient norm {norm}, PyTorch {total}");
            check_each_gradient(&model, want, &what);
            check_trajectory(&mut model, &batch, &want["adamw_5"], &what);
            seen += 1;
        }
    });
    assert_eq!(seen, 2 * 8, "eight choices, under both styles of configuration");
}

#[test]
fn low_rank_adapters_equal_peft() {
    let mut seen = 0;
    for_each(|family, dir, arch, golden| {
        let batch = golden_batch(&golden["batches"]["a"]);
        for (adapter, base) in adapters(dir)
            .iter()
            .flat_map(|adapter| [Base::Resident, Base::Mapped].map(|base| (adapter, base)))
        {
            let want = peft_golden(&adapter.path);
            let lora = Trainable::Adapter(adapter.lora_for(&arch).unwrap());
            let new = || {
                let tokens = batch.tokens();
                let budget = Budget { tokens, targets: tokens, train: true, recompute: false };
                let mut model = Model::with_base(arch.clone(), Cpu::new(), budget, &lora, base).unwrap();
                assert_eq!(model.load_weights(dir).unwrap(), Vec::<String>::new());
                model.load_adapter(&adapter.path.join(ADAPTER_WEIGHTS)).unwrap();
                model
            };
            let what = format!("{family}/{}, {base:?}", adapter.path.file_name().unwrap().display());
            check_gradients(new(), &batch, &want["fp32"]["a"], &what);
            check_trajectory(&mut new(), &batch, &want["adamw_5"], &what);
            let copied = !adapter.lora.save.is_empty();
            if !copied && !adapter.lora.dora {
                let mut zero = new();
                for name in zero.trained_names().iter().filter(|n| n.contains("lora_B")) {
                    let mut tensor = zero.parameter(name).unwrap();
                    tensor.data.fill(0.0);
                    zero.set_parameter(name, &tensor).unwrap();
                }
                check_trajectory(
                    &mut zero,
                    &batch,
                    &want["adamw_5_from_B_zero"],
                    &format!("{what} from zero"),
                );
            }
            // Initialised as in PEFT: copies equal the base, magnitudes equal the norms of its rows.
            if copied || adapter.lora.dora {
                let mut begun = new();
                let values = |model: &Model<Cpu>, name: &String| model.parameter(name).unwrap();
                let a: Vec<_> = begun.trained_names().into_iter().filter(|n| n.contains("lora_A")).collect();
                let a: Vec<_> = a.into_iter().map(|name| (values(&begun, &name), name)).collect();
                begun.init_adapter(1).unwrap();
                a.iter().for_each(|(tensor, name)| begun.set_parameter(name, tensor).unwrap());
                check_trajectory(
                    &mut begun,
                    &batch,
                    &want["adamw_5_from_B_zero"],
                    &format!("{what} from the start"),
                );
            }
            let merged_dir = tempfile::tempdir().unwrap();
            let untied = new().save_merged(merged_dir.path(), WeightType::F32).unwrap();
            let mut merged_arch = arch.clone();
            merged_arch.head.tied &= !untied;
            let mut plain = load(merged_arch, merged_dir.path(), Cpu::new(), &[&batch], false);
            let loss = common::mean_loss(&batch, &plain.forward(&batch).unwrap());
            let want = want["merged_loss_a"].as_f64().unwrap();
            assert!((loss - want).abs() < LOSS, "{what}, merged: loss {loss}, PEFT {want}");
            seen += 1;
        }
    });
    assert!(seen >= 2 * 2 * 20, "20 adapters of the repository, under both styles of configuration: {seen}");
}

#[test]
fn five_steps_as_the_trainer_does_them_equal_pytorch() {
    for_each(|family, dir, arch, golden| {
        let batches = ["a", "padded"].map(|b| golden_batch(&golden["batches"][b]));
        let mut model = load(arch, dir, Cpu::new(), &[&batches[0], &batches[1]], true);
        let want = &golden["hf_like_5"];
        let [losses, norms, lrs] = ["losses", "grad_norms_before_clip", "lrs"].map(|k| floats(&want[k]));
        let total: f64 = batches.iter().map(Batch::weight).sum();
        assert_eq!(total, want["total_supervised"].as_f64().unwrap());
        for (t, want_loss) in losses.iter().enumerate() {
            model.zero_gradients();
            let loss: f64 = batches
                .iter()
                .map(|b| {
                    let outcomes = common::accumulate(&mut model, b, 1.0 / total as f32);
                    common::mean_loss(b, &outcomes) * b.weight() / total
                })
                .sum();
            assert!((loss - want_loss).abs() < TRAJECTORY, "{family} step {t}: {loss}, PyTorch {want_loss}");
            if let Some(want) = norms.get(t) {
                let norm = model.gradient_norm().unwrap();
                assert!(
                    (norm / want - 1.0).abs() < TRAJECTORY,
                    "{family} step {t}: norm {norm}, PyTorch {want}"
                );
                let clip = (1.0 / (norm + 1e-6)).min(1.0) as f32;
                model.adamw(&adamw(t + 1, lrs[t], 0.1, false, clip)).unwrap();
            }
        }
    });
}

//! The whole CUDA backend, on an emulation of the card: the kernels' own source runs on the CPU, matrix products are
//! plain loops. The calls of NVIDIA's driver and of cuBLASLt, which only a real card has, are tested by
//! `benches/gpu.sh`. Single operations are tested in `kernels.rs`, refusals in `soundness.rs`, optimizers in
//! `optimizers.rs`.

mod common;

use common::card::{card, emulated};
use common::golden::{
    adapters, check_gradients, check_logits, check_trajectory, for_each, load, peft_golden,
};
use common::{
    accumulate, architecture, floats, golden_batch, mean_loss, model_of, relative, saved_as,
    trained_gradients,
};
use std::path::Path;
use suasion_engine::{
    ADAPTER_WEIGHTS, Architecture, Backend, Base, Batch, Budget, Cpu, Cuda, Device, Lora, Model, Precision,
    Reference, Regularisation, Targets, Trainable, WeightType,
};

/// Calls `f` for each golden of a model, with one style of configuration: the other gives the same architecture.
fn for_each_once(mut f: impl FnMut(&str, &Path, Architecture, serde_json::Value)) {
    let mut last = None;
    for_each(|family, dir, arch, golden| {
        if last.replace(dir.to_path_buf()).is_none_or(|last| last != dir) {
            f(family, dir, arch, golden);
        }
    });
}

#[test]
fn losses_and_gradients_equal_pytorch() {
    for_each_once(|family, dir, arch, golden| {
        for name in ["a", "edge_first_last"] {
            let Some(card) = card(Precision::F32, 1) else { return };
            let (batch, want) = (golden_batch(&golden["batches"][name]), &golden["fp32"][name]);
            let what = format!("{family}/{name} on the card");
            check_gradients(load(arch.clone(), dir, card, &[&batch], true), &batch, want, &what);
        }
    });
}

#[test]
fn logits_equal_pytorch_through_the_cache() {
    for_each_once(|family, dir, arch, golden| {
        if card(Precision::F32, 1).is_some() {
            check_logits(family, dir, &arch, &golden, || card(Precision::F32, 2).unwrap());
        }
    });
}

#[test]
fn five_steps_of_adamw_equal_pytorch() {
    for_each_once(|family, dir, arch, golden| {
        let Some(card) = card(Precision::F32, 3) else { return };
        let batch = golden_batch(&golden["batches"]["a"]);
        let mut model = load(arch, dir, card, &[&batch], true);
        check_trajectory(&mut model, &batch, &golden["adamw_5"], family);
    });
}

#[test]
fn low_rank_adapters_equal_peft() {
    for_each_once(|family, dir, arch, golden| {
        let batch = golden_batch(&golden["batches"]["a"]);
        for adapter in adapters(dir) {
            let want = peft_golden(&adapter.path);
            let lora = Trainable::Adapter(adapter.lora_for(&arch).unwrap());
            let Some(card) = card(Precision::F32, 4) else { return };
            let tokens = batch.tokens();
            let budget = Budget { tokens, targets: tokens, train: true, recompute: false };
            let mut model = Model::with_base(arch.clone(), card, budget, &lora, Base::Mapped).unwrap();
            assert_eq!(model.load_weights(dir).unwrap(), Vec::<String>::new());
            model.load_adapter(&adapter.path.join(ADAPTER_WEIGHTS)).unwrap();
            let what = format!("{family}/{} on the card", adapter.path.file_name().unwrap().display());
            check_trajectory(&mut model, &batch, &want["adamw_5"], &what);
        }
    });
}

/// bf16 factors have 8 significant bits: losses are within 1 %, and gradients within 5 % in norm, of those in f32.
#[test]
fn bf16_is_near_f32() {
    for_each_once(|family, dir, arch, golden| {
        let Some(card) = card(Precision::Bf16, 5) else { return };
        let (batch, want) = (golden_batch(&golden["batches"]["a"]), &golden["fp32"]["a"]);
        let mut model = load(arch, dir, card, &[&batch], true);
        let losses = accumulate(&mut model, &batch, 1.0 / batch.weight() as f32);
        let (loss, exact) = (mean_loss(&batch, &losses), want["loss"].as_f64().unwrap());
        assert!((loss / exact - 1.0).abs() < 1e-2, "{family}: loss {loss}, PyTorch {exact}");
        assert_ne!(loss, exact, "{family}: nothing was rounded");
        let (norm, exact) = (model.gradient_norm().unwrap(), want["grad_norm_total"].as_f64().unwrap());
        assert!((norm / exact - 1.0).abs() < 5e-2, "{family}: gradient norm {norm}, PyTorch {exact}");
        let losses = floats(&golden["adamw_5"]["losses"]);
        assert!(losses[0] > losses[losses.len() - 1]);
    });
}

fn rows(count: usize) -> Batch {
    let mut random = common::Random(11);
    let mut batch = Batch::default();
    for _ in 0..count {
        let len = 3 + random.below(20);
        let ids = random.ids(len);
        batch.push(&ids, (1..len as u32).map(|i| (i - 1, ids[i as usize], 1.0)));
    }
    batch
}

/// The bytes of losses and gradients of a pass.
fn pass<B: Backend>(model: &mut Model<B>, batch: &Batch) -> (f64, Vec<(String, Vec<u32>)>) {
    model.zero_gradients();
    let losses = accumulate(model, batch, 1.0 / batch.weight() as f32);
    let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect();
    let gradients = trained_gradients(model).into_iter().map(|(name, values)| (name, bits(values)));
    (mean_loss(batch, &losses), gradients.collect())
}

/// Threads of a block run in any order between barriers, and blocks in any order: the bytes must not change.
#[test]
fn bytes_do_not_depend_on_the_order_of_threads() {
    for family in ["llama", "gemma2", "qwen3_moe"] {
        let run = |precision, seed, recompute| {
            let card = card(precision, seed)?;
            let mut model = model_of(architecture(family), card, recompute, &Trainable::All);
            let first = pass(&mut model, &rows(4));
            model.adamw(&common::STEP).unwrap();
            Some((first, pass(&mut model, &rows(4))))
        };
        for precision in [Precision::F32, Precision::Bf16] {
            let Some(one) = run(precision, 0, false) else { return };
            assert!(
                Some(&one) == run(precision, 12345, false).as_ref(),
                "{family}: another order of threads"
            );
            assert!(Some(&one) == run(precision, 7, true).as_ref(), "{family}: layers computed again");
        }
    }
}

/// Rows in several packs, and a base in its file in each type, as on the CPU.
#[test]
fn a_base_in_its_file_computes_what_the_cpu_does() {
    for family in ["llama", "gpt2", "phi3", "gemma2", "qwen3_moe"] {
        let arch = architecture(family);
        let mut plain = model_of(arch.clone(), Cpu::new(), false, &Trainable::All);
        for kind in [WeightType::F32, WeightType::BF16, WeightType::F16] {
            let dir = saved_as(&mut plain, kind);
            let trainable = Trainable::Adapter(Lora { dora: kind == WeightType::BF16, ..lora(family) });
            let budget = Budget { tokens: 128, targets: 128, train: true, recompute: false };
            let run = |device: Device| {
                let mut model =
                    Model::with_base(arch.clone(), device, budget, &trainable, Base::Mapped).unwrap();
                model.load_weights(dir.path()).unwrap();
                model.init_adapter(4).unwrap();
                model.regularise(Regularisation {
                    seed: Some(3),
                    dropout: true,
                    ..Regularisation::default()
                });
                let data = rows(5);
                let losses = accumulate(&mut model, &data, 1.0 / data.weight() as f32);
                (mean_loss(&data, &losses), trained_gradients(&model))
            };
            let Some(card) = card(Precision::F32, 6) else { return };
            let ((want, exact), (got, found)) = (run(Device::cpu()), run(card.into()));
            assert!((got - want).abs() < 5e-6 * want, "{family} {kind:?}: {got} and {want}");
            for ((name, exact), (_, found)) in exact.iter().zip(&found) {
                let error = relative(found, exact);
                assert!(error < 2e-4, "{family} {kind:?} {name}: {error:e}");
            }
        }
    }
}

fn lora(family: &str) -> Lora {
    let modules: &[&str] = match family {
        "gpt2" => &["c_attn", "mlp.c_proj"],
        "phi3" => &["qkv_proj", "o_proj"],
        "gpt_neox" => &["query_key_value", "attention.dense"],
        _ => &["q_proj", "v_proj", "o_proj"],
    };
    let names = modules.iter().map(|name| name.to_string());
    Lora { targets: Targets::Names(names.collect()), rank: 3, alpha: 6.0, dropout: 0.2, ..Lora::default() }
}

/// Random numbers depend on element positions: every device drops the same elements and adds the same noise.
#[test]
fn dropout_and_noise_are_those_of_the_cpu() {
    for family in ["gpt2", "gemma2", "qwen3_moe"] {
        let mut arch = architecture(family);
        arch.embedding.dropout = 0.2;
        for block in &mut arch.blocks {
            (block.attention.dropout, block.residual_dropout) = (0.2, 0.2);
        }
        let random =
            Regularisation { seed: Some(9), dropout: true, noise_alpha: 5.0, ..Regularisation::default() };
        let run = |device: Device, random| {
            let mut model = model_of(arch.clone(), device, false, &Trainable::All);
            model.regularise(random);
            let data = rows(4);
            let losses = accumulate(&mut model, &data, 1.0 / data.weight() as f32);
            (mean_loss(&data, &losses), trained_gradients(&model))
        };
        let Some(card) = card(Precision::F32, 6) else { return };
        let ((want, exact), (got, found)) = (run(Device::cpu(), random), run(card.into(), random));
        let (plain, _) = run(Device::cpu(), Regularisation::default());
        assert!((want - plain).abs() > 1e-3, "{family}: nothing was dropped");
        assert!((got - want).abs() < 5e-6 * want, "{family}: {got} and {want}");
        for ((name, exact), (_, found)) in exact.iter().zip(&found) {
            let error = relative(found, exact);
            assert!(error < 2e-4, "{family} {name}: {error:e}");
        }
    }
}

/// A card's memory matches the plan, a run that does not fit is refused by name, and freed memory is available again.
#[test]
fn memory_is_planned_and_given_back() {
    let Some(cuda) = card(Precision::Bf16, 1) else { return };
    let budget = Budget { tokens: 64, targets: 64, train: true, recompute: false };
    let arch = architecture("llama");
    let model: Model<Cuda> = Model::new(arch.clone(), cuda, budget).unwrap();
    assert_eq!(model.allocated(), model.plan().own(), "the buffers are those of the plan");

    let Some(small) = emulated(Precision::Bf16, 1, 1 << 16) else { return };
    let error = Model::new(arch.clone(), small, budget).unwrap_err();
    assert_eq!(error.tag(), "E-MEMORY");
    let (message, help) = (error.to_string(), error.help().unwrap_or_default().to_string());
    assert!(message.contains("of the memory of emulation are needed"), "{message}");
    assert!(help.contains("device=cpu"), "{help}");

    // Allocating as much repeatedly works only if freed memory is reused.
    let mut card = emulated(Precision::Bf16, 1, 1 << 20).unwrap();
    for _ in 0..10 {
        let buffer = card.allocate(200_000).unwrap();
        card.fill(buffer.view(), 1.0).unwrap();
        drop(buffer);
    }
    card.sync().unwrap();
    assert_eq!(card.allocated(), 0);
}

/// Products of every layout: sizes around the card's tile sizes, columns of wider rows at odd offsets, accumulation,
/// with and without bias. Inputs have 8 bits, so all precisions give the same result.
#[test]
fn products_of_every_layout_are_exact_in_every_precision() {
    fn run<B: Backend>(
        b: &mut B,
        [rows, inputs, outputs]: [usize; 3],
        gaps: [usize; 2],
        plain: bool,
    ) -> Vec<Vec<f32>> {
        let mut random = common::Random((rows * 31 + inputs * 7 + outputs) as u64);
        let mut held = Vec::new();
        let [before, after] = gaps;
        let mut put = |b: &mut B, rows: usize, width: usize, gaps: bool| {
            let (before, after) = if gaps { (before, after) } else { (0, 0) };
            let all = before + width + after;
            let buffer = b.allocate(rows * all).unwrap();
            let round = |x: f64| f32::from_bits((x as f32).to_bits() & 0xffff_0000);
            let values: Vec<f32> = (0..rows * all).map(|_| round(random.normal())).collect();
            b.write(buffer.view(), &values).unwrap();
            let view = buffer.matrix(rows, all).columns(before..before + width);
            held.push(buffer);
            view
        };
        let (x, w) = (put(b, rows, inputs, true), put(b, outputs, inputs, false));
        let (y, dy) = (put(b, rows, outputs, true), put(b, rows, outputs, true));
        let (dx, dw, bias) =
            (put(b, rows, inputs, true), put(b, outputs, inputs, false), put(b, 1, outputs, false));
        b.linear(y, !plain, x, w, (!plain).then_some(bias)).unwrap();
        b.linear_dx(dx, !plain, dy, w).unwrap();
        b.linear_dw(dw, !plain, dy, x).unwrap();
        let mut dense = |view: suasion_engine::kernels::View| {
            let to = b.allocate(view.len()).unwrap();
            b.copy(to.matrix(view.rows(), view.width()), view).unwrap();
            let mut values = vec![0.0; view.len()];
            b.read(to.view(), &mut values).unwrap();
            values
        };
        [y, dx, dw].map(&mut dense).into()
    }
    let sizes =
        [[1, 1, 1], [1, 64, 48], [3, 17, 65], [64, 64, 64], [129, 96, 40], [130, 33, 127], [16, 256, 7]];
    for precision in [Precision::Bf16, Precision::Tf32, Precision::F32] {
        for size in sizes {
            for gaps in [[0, 0], [5, 3], [8, 8]] {
                for plain in [true, false] {
                    let Some(mut card) = card(precision, 8) else { return };
                    let want = run(&mut Reference::<f32>::new(), size, gaps, plain);
                    let got = run(&mut card, size, gaps, plain);
                    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                        let error = relative(got, want);
                        assert!(
                            error < 2e-6,
                            "{precision:?} {size:?} {gaps:?} plain {plain}, result {i}: {error:e}"
                        );
                    }
                }
            }
        }
    }
}

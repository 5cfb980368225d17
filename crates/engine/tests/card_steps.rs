//! Steps on a card without the host, on the emulation: memory follows the plan, and passes do not wait. The emulated
//! card runs operations later than they are issued, at times chosen by its seed.

mod common;

use common::card::{MEMORY, card, faulty};
use common::golden::for_each;
use common::{Random, model_of};
use std::path::Path;
use suasion_engine::kernels::cuda::{Fault, Usage};
use suasion_engine::{
    Architecture, Backend, Base, Batch, Budget, CardRun, Cuda, Lora, Model, Optimizer, Precision, Rates,
    Regularisation, TargetLoss, Targets, Trainable, Update,
};

/// Rows of these lengths, whose last tokens are targets.
fn rows(lengths: &[usize], targets: usize, seed: u64) -> Batch {
    let mut random = Random(seed);
    let mut batch = Batch::default();
    for len in lengths {
        let (ids, first) = (random.ids(*len), len.saturating_sub(targets).max(1));
        batch.push(&ids, (first..*len).map(|i| (i as u32 - 1, ids[i], 1.0 + (i % 3) as f32)));
    }
    batch
}

/// A step as the trainer takes it; to return the losses it waits for the card.
fn step(model: &mut Model<Cuda>, batches: &[Batch], t: u64) -> Vec<TargetLoss> {
    model.zero_gradients();
    let weight: f64 = batches.iter().map(Batch::weight).sum();
    let pass = |(n, batch)| {
        let seed = Some(100 * t + n as u64);
        model.regularise(Regularisation {
            seed,
            dropout: true,
            noise_alpha: 2.0,
            ..Regularisation::default()
        });
        model.accumulate(batch, (1.0 / weight) as f32).unwrap()
    };
    let pending: Vec<_> = batches.iter().enumerate().map(pass).collect();
    let mut outcomes = Vec::new();
    for losses in &pending {
        model.read_balance(losses).unwrap();
        outcomes.extend(model.read_losses(losses).unwrap());
    }
    let norm = model.gradient_norm().unwrap();
    let update = Update {
        t,
        beta1: 0.9,
        beta2: 0.99,
        eps: 1e-8,
        momentum: 0.9,
        gradient_scale: (1.0 / (norm + 1e-6)).min(1.0) as f32,
    };
    let rate = 1e-3 * t as f64;
    model.update(&update, &|p| Rates { lr: rate, weight_decay: f64::from(p.kind.decays()) }).unwrap();
    outcomes
}

/// The peak allocation of steps over full batches is at most the plan, and at least 95 % of it.
fn check_peak(arch: &Architecture, batches: &[Batch], run: CardRun, recompute: bool, what: &str) {
    let most = |of: fn(&Batch) -> usize| batches.iter().map(of).max().unwrap();
    let (tokens, targets) = (most(Batch::tokens), most(|batch| batch.targets.len()));
    let budget = Budget { tokens, targets, train: true, recompute };
    let Some(device) = card(run.precision, 1) else { return };
    let card = device.with_graphs(run.graphs);
    let mut model = Model::with_base(arch.clone(), card, budget, run.trainable, run.base).unwrap();
    model.choose_optimizer(run.optimizer).unwrap();
    let dir = tempfile::tempdir().unwrap();
    if run.base == Base::Mapped && matches!(run.trainable, Trainable::Adapter(_)) {
        model_of(arch.clone(), suasion_engine::Cpu::new(), false, &Trainable::All)
            .save_weights(dir.path())
            .unwrap();
        model.load_weights(dir.path()).unwrap();
    }
    for t in 1..=2 {
        step(&mut model, batches, t);
    }
    let usage = model.backend().usage();
    let run = CardRun { passes: batches.len(), files: dir.path(), ..run };
    let planned = run.memory(arch, budget).unwrap();
    eprintln!("{what}: {} of {planned}", usage.peak);
    assert!(usage.peak <= planned, "{what}: {} bytes, and {planned} were planned", usage.peak);
    assert!(usage.peak * 20 >= planned * 19, "{what}: {} bytes, and {planned} were planned", usage.peak);
    assert!(usage.peak > model.plan().own(), "{what}: nothing beside the buffers");
}

fn lora() -> Trainable {
    let names = ["q_proj", "v_proj"].map(String::from);
    let targets = Targets::Names(names.into());
    Trainable::Adapter(Lora { rank: 4, alpha: 8.0, dropout: 0.1, targets, ..Lora::default() })
}

/// Sizes large enough that fixed overheads do not dominate.
fn wide(family: &str) -> Architecture {
    let mut config = common::config(family);
    for (key, value) in
        [("hidden_size", 64), ("intermediate_size", 160), ("head_dim", 16), ("vocab_size", 400)]
    {
        config[key] = value.into();
    }
    Architecture::from_json(&config, Path::new("config.json")).unwrap()
}

fn config_with_dropout(family: &str) -> Architecture {
    let mut arch = common::architecture(family);
    // The first two layers cover every kind of layer that the family has.
    arch.blocks.truncate(2);
    arch.embedding.dropout = 0.1;
    for block in &mut arch.blocks {
        (block.attention.dropout, block.residual_dropout) = (0.1, 0.1);
    }
    arch
}

/// From a step's begin until its losses are read nothing waits for the card, and nothing is allocated once passes of
/// these sizes have been seen.
#[test]
fn nothing_waits_and_nothing_is_allocated() {
    for family in common::FAMILIES {
        let Some(card) = card(Precision::Bf16, 2) else { return };
        let mut model = model_of(config_with_dropout(family), card, false, &Trainable::All);
        let batches = [rows(&[5, 3], 2, 1), rows(&[5, 3], 2, 2)];
        let mut before = model.backend().usage();
        for t in 1..=3 {
            model.zero_gradients();
            let pending: Vec<_> = batches.iter().map(|b| model.accumulate(b, 0.1).unwrap()).collect();
            let after = model.backend().usage();
            assert_eq!(after.waits, before.waits, "{family}: a pass waits");
            for losses in &pending {
                model.read_losses(losses).unwrap();
            }
            drop(pending);
            model.gradient_norm().unwrap();
            model.adamw(&common::STEP).unwrap();
            let usage = model.backend().usage();
            assert!(usage.waits > after.waits, "{family}: losses were read without waiting");
            if t == 3 {
                assert_eq!(usage.allocations, before.allocations, "{family}: the third step allocates");
                assert_eq!(usage.replays - before.replays, 2, "{family}: passes that are no graphs");
            }
            before = usage;
        }
    }
}

/// Losses and weights after steps over batches of changing sizes, with changing rates, seeds and data.
fn bits(card: Cuda, family: &str, recompute: bool) -> (Vec<u32>, Vec<Vec<u32>>, Usage) {
    let mut model = model_of(config_with_dropout(family), card, recompute, &Trainable::All);
    let sizes: [&[usize]; 2] = [&[5, 3], &[7]];
    let mut losses = Vec::new();
    for (t, sizes_of_step) in [[0, 1], [0, 1], [1, 0], [0, 0]].into_iter().enumerate() {
        let batches = sizes_of_step.map(|n| rows(sizes[n], 2, (7 * t + n) as u64));
        losses.extend(step(&mut model, &batches, t as u64 + 1).iter().map(|loss| loss.nll.to_bits()));
    }
    let weights = |name: String| model.parameter(&name).unwrap().data.into_iter().map(f32::to_bits).collect();
    let weights = model.parameter_names().into_iter().map(weights).collect();
    (losses, weights, model.backend().usage())
}

/// A replayed graph gives the same bytes as its operations one by one, whatever has changed since it was made.
#[test]
fn graphs_compute_the_same_bytes() {
    for (family, precision, recompute) in
        [("gemma2", Precision::F32, false), ("qwen3_moe", Precision::Bf16, true)]
    {
        let run = |graphs: bool, seed: u32| {
            Some(bits(card(precision, seed)?.with_graphs(graphs), family, recompute))
        };
        let Some((losses, weights, usage)) = run(false, 3) else { return };
        assert_eq!((usage.replays, usage.changes), (0, 0));
        let (of_graphs, graph_weights, usage) = run(true, 4).unwrap();
        assert!(losses == of_graphs && weights == graph_weights, "{family}: graphs compute something else");
        assert!(usage.replays >= 3 && usage.changes > 0, "{family}: {usage:?}");
    }
}

/// A graph that keeps its first arguments is detected.
#[test]
fn a_graph_that_is_not_changed_computes_something_else() {
    let run = |fault| Some(bits(faulty(Precision::F32, 3, MEMORY, fault)?, "llama", false));
    let (Some(right), Some(wrong)) = (run(Fault::None), run(Fault::ChangesNoGraph)) else { return };
    assert_ne!(right.0, wrong.0);
}

/// The host reuses page-locked memory only after the card has read it.
#[test]
fn memory_of_an_upload_that_waits_is_not_overwritten() {
    let run = |fault| {
        let mut card = faulty(Precision::Bf16, 5, MEMORY, fault)?;
        let before = card.usage().waits;
        let buffers: Vec<_> = (0..20).map(|_| card.allocate(200_000).unwrap()).collect();
        for (n, buffer) in buffers.iter().enumerate() {
            let values: Vec<f32> = (0..200_000).map(|i| (n * 1000 + i % 1000) as f32).collect();
            card.write(buffer.view(), &values).unwrap();
        }
        assert_eq!(card.usage().waits, before, "an upload waits for the card");
        let mut wrong = 0;
        for (n, buffer) in buffers.iter().enumerate() {
            let mut values = vec![0.0; 200_000];
            card.read(buffer.view(), &mut values).unwrap();
            wrong += values.iter().enumerate().filter(|(i, x)| **x != (n * 1000 + i % 1000) as f32).count();
        }
        Some(wrong)
    };
    let (Some(right), Some(wrong)) = (run(Fault::None), run(Fault::WaitsForNoEvent)) else { return };
    assert_eq!(right, 0);
    assert!(wrong > 0, "a fault that nobody notices");
}

#[test]
fn the_plan_is_the_peak() {
    let (whole, adapter) = (Trainable::All, lora());
    let bf16 = CardRun::new(&whole, Base::Mapped, Precision::Bf16);
    let f32 = CardRun { precision: Precision::F32, graphs: false, ..bf16 };
    for (family, run, recompute, passes) in [
        ("llama", bf16, true, 1),
        ("llama", CardRun { trainable: &adapter, ..f32 }, false, 4),
        ("qwen3_moe", CardRun { trainable: &adapter, ..bf16 }, true, 1),
        ("qwen3_moe", f32, false, 2),
    ] {
        let batches: Vec<Batch> = (0..passes).map(|seed| rows(&[12, 9, 3], 3, seed)).collect();
        check_peak(&wide(family), &batches, run, recompute, &format!("{family} {run:?}"));
    }
}

#[test]
fn the_plan_is_the_peak_of_golden_models_and_every_optimizer() {
    let mut seen = None;
    for_each(|family, _, arch, _| {
        if !["gpt2", "gemma2"].contains(&family)
            || seen.replace(family.to_string()).is_some_and(|seen| seen == family)
        {
            return;
        }
        let batches = [rows(&[9, 7], 3, 4)];
        check_peak(
            &arch,
            &batches,
            CardRun::new(&Trainable::All, Base::Mapped, Precision::Bf16),
            false,
            family,
        );
    });
    let arch = wide("qwen2");
    for optimizer in [Optimizer::AdamW8bit, Optimizer::Adafactor, Optimizer::Sgd { momentum: true }] {
        let run = CardRun { optimizer, ..CardRun::new(&Trainable::All, Base::Mapped, Precision::Bf16) };
        check_peak(&arch, &[rows(&[9, 7], 3, 4)], run, false, &format!("{optimizer:?}"));
    }
}

//! Optimizers whose state is divided among ranks (ZeRO stage 1): the same updates, and the memory of each rank.

mod common;

use common::threads::Threads;
use common::{Random, accumulate, architecture, model_of};
use std::path::Path;
use suasion_engine::{
    Architecture, Batch, Collective, Cpu, MemoryPlan, Model, Optimizer, Rates, Reference, SingleRank,
    Trainable, Update,
};

const KINDS: [Optimizer; 5] = [
    Optimizer::AdamW,
    Optimizer::AdamW8bit,
    Optimizer::Adafactor,
    Optimizer::Sgd { momentum: true },
    Optimizer::Sgd { momentum: false },
];

/// Matrices large enough for 8-bit states.
fn wide() -> Architecture {
    let mut arch = architecture("qwen2");
    arch.blocks.iter_mut().for_each(|block| block.mlp.intermediate = 300);
    arch
}

fn rank_of(kind: Optimizer, collective: &dyn Collective) -> Model<Cpu> {
    let mut model = model_of(wide(), Cpu::new(), false, &Trainable::All);
    model.choose_optimizer(kind).unwrap();
    model.share_optimizer(collective).unwrap();
    model
}

/// A step whose gradient is that of the first rank's batch: a sum with zeros is exact.
fn step(model: &mut Model<Cpu>, t: u64, collective: &dyn Collective) -> f64 {
    let mut batch = Batch::default();
    if collective.rank() == 0 {
        batch.push(&Random(t).ids(12), [(3, 5, 1.0), (9, 9, 1.0)]);
    }
    model.zero_gradients();
    accumulate(model, &batch, 0.5);
    let norm = model.reduce_gradients(collective).unwrap();
    let update = Update { t, beta1: 0.9, beta2: 0.999, eps: 1e-8, momentum: 0.9, gradient_scale: 0.5 };
    // Different settings for different parameters.
    let rates = |p: &suasion_engine::params::Parameter| {
        let biased = p.name.ends_with("bias");
        Rates { lr: if biased { 3e-2 } else { 1e-2 }, weight_decay: if biased { 0.0 } else { 0.1 } }
    };
    model.update(&update, &rates).unwrap();
    model.exchange_parameters(collective).unwrap();
    norm
}

fn weights(model: &Model<Cpu>) -> Vec<Vec<f32>> {
    model.parameter_names().iter().map(|name| model.parameter(name).unwrap().data).collect()
}

/// Writes the state from the first rank, while the others serve it.
fn save(model: &Model<Cpu>, path: &Path, collective: &dyn Collective) {
    if collective.rank() > 0 {
        assert_eq!(model.serve_optimizer(0, collective).unwrap(), b"done");
        return;
    }
    model.gather_optimizer(path, collective).unwrap();
    (1..collective.ranks()).for_each(|rank| collective.send(rank, b"done").unwrap());
}

#[test]
fn ranks_that_share_an_optimizer_take_the_steps_of_one() {
    let dir = tempfile::tempdir().unwrap();
    for kind in KINDS {
        let (alone, half) = (dir.path().join("alone"), dir.path().join("half"));
        let mut one = rank_of(kind, &SingleRank);
        let mut norms: Vec<f64> = (1..=2).map(|t| step(&mut one, t, &SingleRank)).collect();
        one.save_optimizer(&half).unwrap();
        let halfway = weights(&one);
        norms.extend((3..=4).map(|t| step(&mut one, t, &SingleRank)));
        one.save_optimizer(&alone).unwrap();
        let want = (weights(&one), std::fs::read(&alone).unwrap());
        for ranks in [2, 3, 5] {
            let path = dir.path().join(format!("{ranks}"));
            let got = Threads::run(ranks, |_, collective| {
                // For the last two steps the state is loaded from a file that one process wrote.
                let mut model = rank_of(kind, collective);
                let mut got: Vec<f64> = (1..=2).map(|t| step(&mut model, t, collective)).collect();
                assert!(weights(&model) == halfway, "{kind:?} on {ranks} ranks");
                let mut model = rank_of(kind, collective);
                for (name, values) in one.parameter_names().iter().zip(&halfway) {
                    let mut tensor = model.parameter(name).unwrap();
                    tensor.data.clone_from(values);
                    model.set_parameter(name, &tensor).unwrap();
                }
                model.load_optimizer(&half).unwrap();
                got.extend((3..=4).map(|t| step(&mut model, t, collective)));
                save(&model, &path, collective);
                (got, weights(&model))
            });
            for (got, weights) in got {
                assert!(weights == want.0, "{kind:?} on {ranks} ranks");
                let near = |(got, want): (&f64, &f64)| (got / want - 1.0).abs() < 1e-12;
                assert!(got.iter().zip(&norms).all(near), "{kind:?} on {ranks} ranks: {got:?} and {norms:?}");
            }
            assert!(std::fs::read(&path).unwrap() == want.1, "{kind:?}: the file of {ranks} ranks");
        }
    }
}

/// The figures of the papers and of `docs/ranks.md`: AdamW keeps 8 bytes for each of the T trained elements, SGD with
/// momentum 4, and each of R ranks 1/R of that, up to a block of 256 elements.
#[test]
fn a_rank_keeps_its_share_of_the_state() {
    let arch = wide();
    let elements = arch.parameter_count();
    let budget = model_of(arch.clone(), Cpu::new(), false, &Trainable::All).budget();
    let plan = |kind, ranks| {
        MemoryPlan::of(&arch, budget).under(kind, ranks, &arch, &Trainable::All).unwrap().optimizer
    };
    for (kind, each) in [(Optimizer::AdamW, 8), (Optimizer::Sgd { momentum: true }, 4)] {
        assert_eq!(plan(kind, 1), each * elements);
        for ranks in [2, 3, 4, 7] {
            let (got, even) = (plan(kind, ranks), (each * elements).div_ceil(ranks as u64));
            assert!(got >= even && got <= even + each * 256, "{kind:?}, {ranks} ranks: {got} for {even}");
        }
    }
    assert_eq!(plan(Optimizer::Sgd { momentum: false }, 3), 0);
    for kind in [Optimizer::AdamW8bit, Optimizer::Adafactor] {
        assert!(plan(kind, 2) < plan(kind, 1) && plan(kind, 3) < plan(kind, 2), "{kind:?}");
    }
    // More ranks than parameters: some have no state.
    assert!(plan(Optimizer::Adafactor, 10_000) > 0 && plan(Optimizer::AdamW, 1_000_000) <= 8 * 256);
    // The plan is an upper bound of the allocation, and all shares together are the whole.
    for kind in KINDS {
        let kept = Threads::run(3, |_, collective| {
            let mut model = model_of(arch.clone(), Cpu::new(), false, &Trainable::All);
            model.choose_optimizer(Optimizer::Sgd { momentum: false }).unwrap();
            model.share_optimizer(collective).unwrap();
            // SGD without momentum has no state, and the previous state has been freed.
            let before = model.allocated();
            model.choose_optimizer(kind).unwrap();
            assert_eq!(model.plan().optimizer, plan(kind, 3), "{kind:?}");
            model.allocated() - before
        });
        assert_eq!(kept.iter().max(), Some(&plan(kind, 3)), "{kind:?}");
        assert_eq!(kept.iter().sum::<u64>(), plan(kind, 1), "{kind:?}");
    }
}

#[test]
fn sums_over_ranks_are_in_their_order() {
    // Longer than a block, with shares of every kind; these sums depend on their order.
    let len = 3_000_001;
    let values = |rank: usize| -> Vec<f32> {
        let size = [1e8, 1.0, -1e8, 0.3][rank];
        (0..len).map(|i| size * (1.0 + (i % 7) as f32)).collect()
    };
    let want: Vec<f32> = (0..len).map(|i| (0..4).fold(-0.0, |sum, rank| sum + values_at(rank, i))).collect();
    fn values_at(rank: usize, i: usize) -> f32 {
        [1e8, 1.0, -1e8, 0.3][rank] * (1.0 + (i % 7) as f32)
    }
    let cuts = [0, 17, 17, 1_500_000, len];
    let got = Threads::run(4, |rank, collective| {
        let mut own = values(rank);
        collective.reduce_scatter(&mut own, &cuts).unwrap();
        let share = cuts[rank]..cuts[rank + 1];
        assert!(own[share.clone()] == want[share], "the share of rank {rank}");
        let mut sums = [rank as f64, 0.5];
        collective.sum(&mut sums).unwrap();
        assert_eq!(sums, [6.0, 2.0]);
        let mut all = own.clone();
        collective.all_gather(&mut all, &cuts).unwrap();
        let mut reduced = values(rank);
        collective.all_reduce(&mut reduced).unwrap();
        (all, reduced, collective.exchange(&[rank as u8; 3]).unwrap())
    });
    for (all, reduced, messages) in got {
        assert!(all == want && reduced == want);
        assert_eq!(messages, [[0; 3], [1; 3], [2; 3], [3; 3]]);
    }
}

#[test]
fn shares_that_do_not_fit_are_refused() {
    use suasion_engine::Backend;
    let mut reference = Reference::<f32>::new();
    let mut cpu = Cpu::new();
    let (a, b) = (reference.allocate(6).unwrap(), cpu.allocate(6).unwrap());
    for cuts in [&[0, 7][..], &[0], &[0, 3, 6], &[1, 6], &[]] {
        assert!(reference.reduce_scatter(a.view(), cuts, &SingleRank).is_err(), "{cuts:?}");
        assert!(cpu.all_gather(b.view(), cuts, &SingleRank).is_err(), "{cuts:?}");
    }
    cpu.reduce_scatter(b.view(), &[0, 6], &SingleRank).unwrap();
}

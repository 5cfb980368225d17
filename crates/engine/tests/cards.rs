//! Ranks on cards: several emulated cards, connected by an emulation of NCCL (`emulation/nccl.cpp`), which has the
//! interface of the real one and runs everything later. With `SUASION_CARDS=0,1` the tests use these cards of this
//! machine and the real NCCL (`benches/gpu.sh`).

mod common;

use common::card::MEMORY;
use common::threads::Threads;
use common::{Random, accumulate, architecture, mean_loss, model_of, relative};
use std::sync::{Arc, Mutex};
use suasion_engine::kernels::cuda::found::Found;
use suasion_engine::kernels::{Buffer, View};
use suasion_engine::{
    Backend, Batch, Collective, Cpu, Cuda, Device, Model, Optimizer, Precision, Rates, Result, SingleRank,
    Trainable, Update, Watch,
};

/// The cards listed in `SUASION_CARDS`.
fn real() -> Option<Vec<usize>> {
    let numbers = std::env::var("SUASION_CARDS").ok()?;
    Some(numbers.split(',').map(|number| number.parse().expect("SUASION_CARDS=0,1")).collect())
}

/// A function that opens the card of a rank, for this many ranks. `None` without g++, or with too few cards.
fn cards(ranks: usize) -> Option<impl Fn(usize, u32) -> Cuda + Sync> {
    cards_in(Precision::F32, ranks)
}

fn cards_in(precision: Precision, ranks: usize) -> Option<impl Fn(usize, u32) -> Cuda + Sync> {
    let numbers = real();
    match &numbers {
        Some(numbers) if numbers.len() < ranks => {
            suasion_test_support::skipped(format!("{ranks} cards are needed"));
            return None;
        }
        Some(_) => {}
        None => drop(common::card::emulated(precision, 0, MEMORY)?),
    }
    Some(move |rank: usize, seed: u32| match &numbers {
        Some(numbers) => {
            let found = Found::look();
            Cuda::open(found.card(Some(numbers[rank])).unwrap(), precision).unwrap()
        }
        None => common::card::emulated(precision, seed + rank as u32, MEMORY).unwrap(),
    })
}

fn put(card: &mut Cuda, values: &[f32]) -> Buffer {
    let buffer = card.allocate(values.len()).unwrap();
    card.write(buffer.view(), values).unwrap();
    buffer
}

fn get(card: &Cuda, view: View) -> Vec<f32> {
    let mut values = vec![0.0; view.len()];
    card.read(view, &mut values).unwrap();
    values
}

/// Integers, whose sums are exact in any order.
fn whole(rank: usize, i: usize) -> f32 {
    ((i * 7 + rank * 31) % 1000) as f32
}

#[test]
fn shares_are_summed_and_exchanged_over_cards() {
    for ranks in [2, 3] {
        let Some(card) = cards(ranks) else { return };
        for len in [ranks, 1000, 70_001] {
            // Shares of odd sizes, one of them empty.
            let mut cuts: Vec<usize> = (0..=ranks).map(|rank| len * rank / ranks).collect();
            cuts[1] = if len == 1000 { 0 } else { cuts[1] / 3 * 2 };
            let run = |seed: u32, value: &(dyn Fn(usize, usize) -> f32 + Sync)| {
                Threads::run(ranks, |rank, collective| {
                    let mut card = card(rank, seed);
                    card.join(collective).unwrap();
                    let own: Vec<f32> = (0..len).map(|i| value(rank, i)).collect();
                    // Guard values before and after it.
                    let buffer = put(&mut card, &[&[-1.0; 3], &own[..], &[-2.0; 2]].concat());
                    let x = buffer.view().part(3, len);
                    card.reduce_scatter(x, &cuts, collective).unwrap();
                    let summed = get(&card, x);
                    // Later operations in the stream see the sums.
                    card.scale(x.part(cuts[rank], cuts[rank + 1] - cuts[rank]), 2.0).unwrap();
                    card.all_gather(x, &cuts, collective).unwrap();
                    let gathered = get(&card, x);
                    card.all_reduce(x, collective).unwrap();
                    let all = get(&card, buffer.view());
                    assert!(all[..3] == [-1.0; 3] && all[3 + len..] == [-2.0; 2]);
                    (summed, gathered, all)
                })
            };
            let got = run(1, &whole);
            let sum = |i: usize| (0..ranks).map(|rank| whole(rank, i)).sum::<f32>();
            for (rank, (summed, gathered, all)) in got.iter().enumerate() {
                for i in 0..len {
                    let own = (cuts[rank]..cuts[rank + 1]).contains(&i);
                    assert_eq!(summed[i], if own { sum(i) } else { whole(rank, i) }, "rank {rank}, {i}");
                    assert_eq!(gathered[i], 2.0 * sum(i));
                    assert_eq!(all[3 + i], 2.0 * ranks as f32 * sum(i));
                }
            }
            // Numbers whose sums depend on the order: all ranks must get the same bytes, whatever the timing.
            let rough = |rank: usize, i: usize| (whole(rank, i) + 0.1) / 7.0;
            let (one, other) = (run(2, &rough), run(77, &rough));
            assert!(one == other && one.iter().all(|rank| rank.1 == one[0].1 && rank.2 == one[0].2));
        }
    }
}

fn rank_of<B: Backend>(backend: B, kind: Optimizer, collective: &dyn Collective) -> Model<B> {
    let mut model = model_of(architecture("qwen2"), backend, false, &Trainable::All);
    model.choose_optimizer(kind).unwrap();
    model.share_optimizer(collective).unwrap();
    model
}

/// A step over micro-batches; its loss and its gradient norm.
fn step<B: Backend>(
    model: &mut Model<B>,
    t: u64,
    batches: &[Batch],
    collective: &dyn Collective,
) -> [f64; 2] {
    model.zero_gradients();
    let mut sums = [0.0; 2];
    for batch in batches {
        let losses = accumulate(model, batch, 0.1);
        sums[0] += if batch.targets.is_empty() { 0.0 } else { mean_loss(batch, &losses) };
        sums[1] += 1.0;
    }
    collective.sum(&mut sums).unwrap();
    let norm = model.reduce_gradients(collective).unwrap();
    let update = Update { t, beta1: 0.9, beta2: 0.999, eps: 1e-4, momentum: 0.9, gradient_scale: 0.5 };
    model.update(&update, &|_| Rates { lr: 1e-2, weight_decay: 0.1 }).unwrap();
    model.exchange_parameters(collective).unwrap();
    [sums[0] / sums[1], norm]
}

fn weights<B: Backend>(model: &Model<B>) -> Vec<f32> {
    model.parameter_names().iter().flat_map(|name| model.parameter(name).unwrap().data).collect()
}

fn batch(seed: u64) -> Batch {
    let mut batch = Batch::default();
    batch.push(&Random(seed).ids(12), [(3, 5, 1.0), (9, 9, 1.0)]);
    batch
}

/// If one rank has all targets, every sum has one term and zeros. Ranks on cards must then take the steps of one card
/// bit for bit, keep the same optimizer state, and resume from the state of another number of ranks. In bf16 the weight
/// copies that products read must include the updates of the other ranks.
#[test]
fn ranks_on_cards_take_the_steps_of_one_card() {
    let dir = tempfile::tempdir().unwrap();
    for (kind, precision) in [
        (Optimizer::AdamW, Precision::F32),
        (Optimizer::AdamW, Precision::Bf16),
        (Optimizer::Adafactor, Precision::F32),
    ] {
        let Some(first) = cards_in(precision, 2) else { return };
        let own = |rank: usize, t: u64| if rank == 0 { vec![batch(t)] } else { vec![Batch::default()] };
        let (half, whole) = (dir.path().join("half"), dir.path().join("whole"));
        let mut one = rank_of(first(0, 5), kind, &SingleRank);
        step(&mut one, 1, &own(0, 1), &SingleRank);
        one.save_optimizer(&half).unwrap();
        let halfway = weights(&one);
        step(&mut one, 2, &own(0, 2), &SingleRank);
        one.save_optimizer(&whole).unwrap();
        let want = weights(&one);
        for ranks in [2, 3] {
            let Some(card) = cards_in(precision, ranks) else { continue };
            let path = dir.path().join(format!("of {ranks}"));
            let got = Threads::run(ranks, |rank, collective| {
                let mut model = rank_of(card(rank, 9), kind, collective);
                step(&mut model, 1, &own(rank, 1), collective);
                assert!(weights(&model) == halfway, "{kind:?} on {ranks} cards");
                model.load_optimizer(&half).unwrap();
                step(&mut model, 2, &own(rank, 2), collective);
                if rank > 0 {
                    model.serve_optimizer(0, collective).unwrap();
                } else {
                    model.gather_optimizer(&path, collective).unwrap();
                    (1..ranks).for_each(|rank| collective.send(rank, b"done").unwrap());
                }
                weights(&model)
            });
            assert!(got.iter().all(|weights| *weights == want), "{kind:?} on {ranks} cards");
            assert!(std::fs::read(&path).unwrap() == std::fs::read(&whole).unwrap(), "{kind:?}: the file");
        }
    }
}

/// Compares two cards, one card that accumulates two micro-batches, and two ranks on the CPU.
#[test]
fn ranks_on_cards_equal_one_that_accumulates_and_ranks_on_cpus() {
    let Some(card) = cards(2) else { return };
    let batches = |t: u64| [batch(10 * t), batch(10 * t + 1)];
    let steps = |device: Device, collective: &dyn Collective| {
        let mut model = rank_of(device, Optimizer::AdamW, collective);
        let own = |t| match collective.ranks() {
            1 => batches(t).to_vec(),
            _ => vec![batches(t)[collective.rank()].clone()],
        };
        let figures: Vec<[f64; 2]> = (1..=3).map(|t| step(&mut model, t, &own(t), collective)).collect();
        (figures, weights(&model))
    };
    let one = steps(card(0, 3).into(), &SingleRank);
    let on_cpus = Threads::run(2, |_, collective| steps(Cpu::new().into(), collective)).remove(0);
    let run = |seed| Threads::run(2, |rank, collective| steps(card(rank, seed).into(), collective));
    let ranks = run(3);
    assert!(ranks[0] == ranks[1], "all ranks have the same figures and weights");
    assert!(ranks == run(1234), "and whenever they come");
    for (want, of) in [(one, "one card"), (on_cpus, "the CPUs")] {
        for (got, want) in ranks[0].0.iter().flatten().zip(want.0.iter().flatten()) {
            assert!((got / want - 1.0).abs() < 1e-5, "{got} and {want} of {of}");
        }
        let error = relative(&ranks[0].1, &want.1);
        assert!(error < 1e-5, "weights, {of}: {error:e}");
    }
}

/// The error that has ended the run, shared by all threads of a rank.
#[derive(Default)]
struct Board(Mutex<Option<String>>);

impl Watch for Board {
    fn failure(&self) -> Option<String> {
        self.0.lock().unwrap().clone()
    }

    fn fail(&self, message: &str) {
        self.0.lock().unwrap().get_or_insert(message.to_string());
    }
}

/// Ranks that notice when another is lost.
struct Watched<'a>(&'a dyn Collective, Arc<Board>);

impl Collective for Watched<'_> {
    fn ranks(&self) -> usize {
        self.0.ranks()
    }

    fn rank(&self) -> usize {
        self.0.rank()
    }

    fn send(&self, to: usize, message: &[u8]) -> Result<()> {
        self.0.send(to, message)
    }

    fn receive(&self, from: usize) -> Result<Vec<u8>> {
        self.0.receive(from)
    }

    fn watch(&self) -> Option<Arc<dyn Watch>> {
        Some(self.1.clone())
    }
}

/// Two ranks, each with its own board.
fn watched<T: Send>(run: impl Fn(usize, &Watched<'_>) -> T + Sync) -> Vec<T> {
    Threads::run(2, |rank, collective| run(rank, &Watched(collective, Arc::default())))
}

/// A card would wait forever for a lost rank. Whoever waits for the card gets the error and no data from its memory,
/// and every later call fails too.
#[test]
fn a_rank_that_is_lost_in_the_middle_of_a_sum_ends_the_others() {
    let Some(card) = cards(2) else { return };
    watched(|rank, collective| {
        let mut card = card(rank, 4);
        card.join(collective).unwrap();
        let buffer = put(&mut card, &[1.0; 100]);
        card.all_reduce(buffer.view(), collective).unwrap();
        card.sync().unwrap();
        collective.sum(&mut [0.0]).unwrap();
        if rank == 1 {
            // This rank leaves while the other's card waits for it.
            collective.receive(0).unwrap();
            return;
        }
        card.all_reduce(buffer.view(), collective).unwrap();
        collective.send(1, &[]).unwrap();
        let board = Arc::clone(&collective.1);
        let notice = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(100));
            board.fail("rank 1 was lost");
        });
        let mut values = vec![7.0; 100];
        let error = card.read(buffer.view(), &mut values).unwrap_err();
        assert_eq!((error.tag(), error.to_string().as_str()), ("E-RANK", "rank 1 was lost"));
        for error in [card.sync().unwrap_err(), card.all_reduce(buffer.view(), collective).unwrap_err()] {
            assert_eq!(error.to_string(), "rank 1 was lost");
        }
        notice.join().unwrap();
    });
    // A rank that is alone from the start does not wait forever either.
    watched(|rank, collective| {
        if rank == 1 {
            // Replies with the same version.
            let hello = collective.receive(0).unwrap();
            collective.send(0, &hello[..12]).unwrap();
            collective.receive(0).unwrap();
            return;
        }
        let board = Arc::clone(&collective.1);
        let notice = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(100));
            board.fail("rank 1 was lost");
        });
        let error = card(0, 4).join(collective).unwrap_err();
        assert_eq!((error.tag(), error.to_string().as_str()), ("E-RANK", "rank 1 was lost"));
        notice.join().unwrap();
        collective.send(1, &[]).unwrap();
    });
}

#[test]
fn ranks_with_different_versions_of_nccl_are_refused() {
    let Some(card) = cards(2) else { return };
    let errors = Threads::run(2, |rank, collective| {
        if rank == 1 {
            collective.receive(0).unwrap();
            collective.send(0, &2u32.to_le_bytes().repeat(3)).unwrap();
            return String::new();
        }
        let error = card(0, 4).join(collective).unwrap_err();
        assert_eq!(
            (error.tag(), error.help()),
            ("E-DEVICE", Some("install the same version of NCCL for all ranks"))
        );
        error.to_string()
    });
    assert!(errors[0].starts_with("rank 1 has NCCL 2.2.2, and rank 0 2."), "{errors:?}");
}

/// NCCL hangs, or sums unrelated values, if ranks issue different calls. Its emulation reports it.
#[test]
fn ranks_that_ask_for_different_things_are_caught() {
    if real().is_some() {
        return suasion_test_support::skipped("NCCL does not look for it");
    }
    let Some(card) = cards(2) else { return };
    let caught = |ask: &(dyn Fn(&mut Cuda, usize, View, &dyn Collective) -> Result<()> + Sync),
                  text: &str| {
        let errors = watched(|rank, collective| {
            let mut card = card(rank, 6);
            card.join(collective).unwrap();
            let buffer = put(&mut card, &[1.0; 64]);
            let asked = ask(&mut card, rank, buffer.view(), collective);
            let error = asked.and_then(|()| card.read(buffer.view(), &mut [0.0; 64])).unwrap_err();
            assert_eq!(error.tag(), "E-RANK");
            // The whole rank has failed, not only the card.
            assert_eq!(collective.1.failure(), Some(error.to_string()));
            error.to_string()
        });
        for (rank, error) in errors.iter().enumerate() {
            assert!(error.starts_with(&format!("rank {rank}: NCCL's ")) && error.contains(text), "{error}");
        }
    };
    caught(
        &|card, rank, x, collective| card.reduce_scatter(x, &[[0, 32, 64], [0, 40, 64]][rank], collective),
        "invalid usage: rank 1 asks for ncclReduce of 40 values, root 0, and rank 0 for ncclReduce of 32 values, root 0",
    );
    caught(
        &|card, rank, x, collective| match rank {
            0 => card.reduce_scatter(x, &[0, 32, 64], collective),
            _ => card.all_gather(x, &[0, 32, 64], collective),
        },
        "rank 1 asks for ncclBroadcast of 32 values, root 0, and rank 0 for ncclReduce",
    );
    caught(
        &|card, rank, x, collective| card.all_gather(x, &[[0, 0, 64], [0, 32, 64]][rank], collective),
        "rank 1 has a group of 2 calls, and rank 0 of 1",
    );
}

/// A rank whose number NCCL rejects.
struct Misplaced(Arc<Board>);

impl Collective for Misplaced {
    fn ranks(&self) -> usize {
        2
    }

    fn rank(&self) -> usize {
        7
    }

    fn send(&self, _: usize, _: &[u8]) -> Result<()> {
        Ok(())
    }

    fn receive(&self, _: usize) -> Result<Vec<u8>> {
        let version = [2u32, 20, 5].map(u32::to_le_bytes).concat();
        Ok([version, vec![1; 128]].concat())
    }

    fn watch(&self) -> Option<Arc<dyn Watch>> {
        Some(self.0.clone())
    }
}

#[test]
fn what_nccl_says_of_cards_that_do_not_meet_is_said() {
    if real().is_some() {
        return suasion_test_support::skipped("its version is not NCCL's");
    }
    let Some(card) = cards(2) else { return };
    let board = Arc::new(Board::default());
    let error = card(0, 4).join(&Misplaced(board.clone())).unwrap_err();
    let text =
        "rank 7: NCCL's ncclCommInitRankConfig failed: invalid usage: rank 7 of 2 does not belong to this id";
    assert_eq!(error.to_string(), format!("the cards of the ranks do not find each other: {text}"));
    assert!(error.tag() == "E-DEVICE" && error.help().unwrap().contains("NCCL_DEBUG=INFO"));
    // The others get the message when this rank leaves.
    assert_eq!(board.failure().as_deref(), Some(text));
}

/// Three ranks that never communicate.
struct Three;

impl Collective for Three {
    fn ranks(&self) -> usize {
        3
    }

    fn rank(&self) -> usize {
        2
    }

    fn send(&self, _: usize, _: &[u8]) -> Result<()> {
        unreachable!("nothing is sent")
    }

    fn receive(&self, _: usize) -> Result<Vec<u8>> {
        unreachable!("nothing is received")
    }
}

#[test]
fn a_card_joins_once() {
    let Some(card) = cards(2) else { return };
    Threads::run(2, |rank, collective| {
        let mut card = card(rank, 8);
        card.join(collective).unwrap();
        // A second join has no effect; a single process needs no other card; and the card does not accept other ranks.
        card.join(collective).unwrap();
        card.join(&SingleRank).unwrap();
        let error = card.join(&Three).unwrap_err().to_string();
        assert_eq!(error, format!("the card is that of rank {rank} of 2, not of rank 2 of 3"));
    });
}

//! Ranks on cards: whole runs over emulated cards, whose sums go through an emulation of NCCL; everything else goes over TCP.

#[path = "../../../engine/tests/common/card.rs"]
#[allow(dead_code)]
mod card;
#[path = "../../../engine/tests/common/emulation.rs"]
#[allow(dead_code)]
mod emulation;

use crate::common::*;
use crate::mesh::team;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use suasion_data::Sample;
use suasion_engine::{Collective, Device, Model, Precision, Watch};
use suasion_train::ranks::Mesh;
use suasion_train::{Error, Plan, Resume, Settings, Strategy, checkpoint};

fn job<'a>(rows: &'a [Sample], collective: &'a dyn Collective, dir: &'a Path) -> Job<'a> {
    let settings = Settings {
        per_device_train_batch_size: 1,
        gradient_accumulation_steps: 2 / collective.ranks(),
        max_steps: Some(4),
        save_strategy: Strategy::Steps,
        save_steps: 2.into(),
        logging_steps: 1.into(),
        adam_epsilon: 1e-4,
        ..quick()
    };
    Job { collective, ..Job::new(rows, settings, dir) }
}

/// The model of a run on a device, with the weights of [`model`].
fn on(device: Device, job: &Job<'_>) -> Model {
    let budget = Plan::of_ranks(job.train, job.eval, &job.settings, job.collective.ranks()).unwrap().budget;
    let mut model = Model::new(architecture(), device, budget).unwrap();
    model.init_random(7).unwrap();
    model
}

fn emulated(seed: u32) -> Option<Device> {
    Some(card::emulated(Precision::F32, seed, 64 << 20)?.into())
}

/// Losses and norms of the steps.
fn figures(dir: &Path) -> Vec<[f64; 2]> {
    let of = |line: &serde_json::Value| {
        Some(["loss", "grad_norm"].map(|key| line[key].as_f64().unwrap_or(f64::NAN)))
    };
    metrics(dir).iter().filter(|line| line.get("grad_norm").is_some()).filter_map(of).collect()
}

#[test]
fn a_run_over_cards_is_that_over_cpus_and_goes_on_there() {
    let (rows, dir) = (rows(8, 5), tempfile::tempdir().unwrap());
    let path = |name: &str| dir.path().join(name);
    if emulated(0).is_none() {
        return;
    }
    let over = |name: &str, device: &(dyn Fn(usize) -> Device + Sync), resume: Resume| {
        let dir = path(name);
        let got = team(2, |mesh| {
            let mut job = job(&rows, &mesh, &dir).resume(resume.clone());
            let mut model = on(device(mesh.rank()), &job);
            job.run_with(&mut model).unwrap();
            drop(model);
            mesh.finish();
        });
        assert_eq!((got.len(), checkpoints(&dir)), (2, vec![2, 4]));
        figures(&dir)
    };
    let on_cards = over("cards", &|rank| emulated(rank as u32).unwrap(), Resume::No);
    let on_cpus = over("CPUs", &|_| Device::cpu(), Resume::No);
    let near = |got: &[[f64; 2]], want: &[[f64; 2]], what: &str| {
        assert_eq!((got.len(), want.len()), (4, 4), "{what}");
        for (got, want) in got.iter().flatten().zip(want.iter().flatten()) {
            assert!((got / want - 1.0).abs() < 1e-5, "{what}: {got} and {want}");
        }
    };
    near(&on_cards, &on_cpus, "two ranks on CPUs");
    // The same bytes again, whenever the cards come.
    over("again", &|rank| emulated(100 + rank as u32).unwrap(), Resume::No);
    let file = |run: &str, name: &str| bytes(path(run).join("checkpoint-4").join(name));
    for name in ["model.safetensors", checkpoint::OPTIMIZER] {
        assert!(file("cards", name) == file("again", name), "{name}");
    }
    // From the middle: on CPUs, in one process, and on cards from what these wrote.
    std::fs::remove_dir_all(path("cards/checkpoint-4")).unwrap();
    near(&over("cards", &|_| Device::cpu(), Resume::Newest), &on_cards, "continued on CPUs");
    for (run, device) in [("again", Device::cpu()), ("CPUs", emulated(3).unwrap())] {
        std::fs::remove_dir_all(path(run).join("checkpoint-4")).unwrap();
        let dir = path(run);
        let mut job = job(&rows, &suasion_engine::SingleRank, &dir).resume(Resume::Newest);
        let mut model = on(device, &job);
        job.run_with(&mut model).unwrap();
        near(&figures(&dir), &on_cards, "continued in one process");
    }
}

/// A rank that stops working after the losses of a step were summed: the other's card is then waiting for its gradients.
struct Dies<'a> {
    mesh: &'a Mesh,
    sums: AtomicUsize,
}

impl Collective for Dies<'_> {
    fn ranks(&self) -> usize {
        self.mesh.ranks()
    }

    fn rank(&self) -> usize {
        self.mesh.rank()
    }

    fn send(&self, to: usize, message: &[u8]) -> suasion_engine::Result<()> {
        self.mesh.send(to, message)
    }

    fn receive(&self, from: usize) -> suasion_engine::Result<Vec<u8>> {
        self.mesh.receive(from)
    }

    fn watch(&self) -> Option<Arc<dyn Watch>> {
        self.mesh.watch()
    }

    fn sum(&self, values: &mut [f64]) -> suasion_engine::Result<()> {
        self.mesh.sum(values)?;
        // A step has two sums of four: of its targets, and of its losses.
        let died = values.len() == 4 && self.sums.fetch_add(1, Ordering::Relaxed) == 5;
        assert!(!died || self.rank() == 0, "this rank dies here");
        Ok(())
    }
}

#[test]
fn a_rank_that_dies_while_a_card_waits_for_it_ends_the_run_and_a_checkpoint_is_left() {
    let (rows, dir) = (rows(8, 5), tempfile::tempdir().unwrap());
    let path = dir.path().join("run");
    if emulated(0).is_none() {
        return;
    }
    let errors = team(2, |mesh| {
        let dies = Dies { mesh: &mesh, sums: AtomicUsize::new(0) };
        let mut job = job(&rows, &dies, &path);
        let ran = catch_unwind(AssertUnwindSafe(|| {
            let mut model = on(emulated(mesh.rank() as u32).unwrap(), &job);
            job.run_with(&mut model).map(|_| ())
        }));
        // A rank whose thread panics drops its mesh, as a process that crashes closes its connections.
        ran.ok()
    });
    assert!(errors[1].is_none(), "the second rank has died");
    let Some(Err(error)) = &errors[0] else { panic!("{errors:?}") };
    let Error::Rank { message, help } = error else { panic!("{error}") };
    assert_eq!(message, "rank 1 has ended the run: it has stopped unexpectedly");
    assert!(help.contains("the newest checkpoint is whole: ") && help.contains("checkpoint-2"), "{help}");
    assert_eq!((checkpoints(&path), checkpoint::newest(&path)), (vec![2], Some(path.join("checkpoint-2"))));
    // What it left is the run up to there.
    let mut job = job(&rows, &suasion_engine::SingleRank, &path).resume(Resume::Newest);
    let mut model = job.model().unwrap();
    assert_eq!(job.run_with(&mut model).unwrap().step, 4);
}

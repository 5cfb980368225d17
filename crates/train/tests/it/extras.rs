//! What training adds to passes and steps: it is the same after a resume and with any number of threads.

use crate::common::*;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use suasion_data::Sample;
use suasion_engine::{Architecture, Device, Model};
use suasion_train::{Plan, Report, Resume, Settings, Strategy};

/// A run of a model of its own.
struct Extra<'a> {
    settings: Settings,
    build: &'a (dyn Fn(Architecture) -> Architecture + Sync),
}

impl Extra<'_> {
    fn run(&self, rows: &[Sample], dir: &Path, resume: Resume, stop: Option<u64>) -> (Report, Vec<Vec<u32>>) {
        let flag = AtomicBool::new(false);
        let mut job = Job::new(rows, self.settings.clone(), dir).resume(resume);
        if let Some(step) = stop {
            job = job.stop_after(step, &flag);
        }
        let budget = Plan::new(rows, &[], &self.settings).unwrap().budget;
        let mut model = Model::new((self.build)(architecture()), Device::cpu(), budget).unwrap();
        model.init_random(7).unwrap();
        let report = job.run_with(&mut model).unwrap();
        (report, bits(&model))
    }

    /// The weights after a run; the same with two threads, with layers computed again, and after a resume.
    fn check(&self, what: &str) -> Vec<Vec<u32>> {
        let rows = rows(9, 3);
        let (_dir, out) = folder();
        let whole = self.run(&rows, &out, Resume::No, None);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        let (_dir, other) = folder();
        let two = pool.install(|| self.run(&rows, &other, Resume::No, None));
        assert!(two.1 == whole.1, "{what}: two threads");
        let again =
            Extra { settings: Settings { gradient_checkpointing: true, ..self.settings.clone() }, ..*self };
        let (_dir, other) = folder();
        assert!(again.run(&rows, &other, Resume::No, None).1 == whole.1, "{what}: computed again");
        let (_dir, parts) = folder();
        assert!(self.run(&rows, &parts, Resume::No, Some(3)).0.interrupted);
        assert!(self.run(&rows, &parts, Resume::Newest, None).1 == whole.1, "{what}: resumed");
        assert_eq!(metrics(&out), metrics(&parts), "{what}");
        let last = format!("checkpoint-{}/optimizer.safetensors", whole.0.step);
        assert!(bytes(out.join(&last)) == bytes(parts.join(&last)), "{what}: {last}");
        whole.1
    }
}

fn settings() -> Settings {
    Settings { gradient_accumulation_steps: 2, max_steps: Some(7), save_strategy: Strategy::Steps, ..quick() }
}

#[test]
fn dropout_draws_the_same_after_a_resume() {
    let rate = |rate: f32| {
        move |mut arch: Architecture| {
            arch.embedding.dropout = rate;
            for block in &mut arch.blocks {
                (block.attention.dropout, block.residual_dropout) = (rate, rate);
            }
            arch
        }
    };
    let plain = Extra { settings: settings(), build: &rate(0.0) }.check("no dropout");
    let dropped = Extra { settings: settings(), build: &rate(0.2) }.check("dropout");
    assert!(dropped != plain);
    let other =
        Extra { settings: Settings { seed: 43, data_seed: Some(42), ..settings() }, build: &rate(0.2) };
    assert!(other.check("another seed") != dropped);
    let off = Extra { settings: Settings { disable_dropout: true, ..settings() }, build: &rate(0.2) };
    assert!(off.check("disabled") == plain);
}

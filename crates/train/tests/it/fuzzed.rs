//! The files of a run, with good inputs: damaged in `fuzz.rs`, and fuzzed by the targets in the repository's `fuzz/`.

use crate::common::{Job, bytes, folder, quick, rows};
use std::path::PathBuf;
use suasion_test_support::fuzz::{Parser, reached};
use suasion_train::{Settings, Strategy, checkpoint, metrics};
use tempfile::TempDir;

/// The state of a checkpoint, and metrics.
pub struct RunFiles {
    _dir: TempDir,
    place: PathBuf,
}

const FILES: [&str; 2] = [checkpoint::STATE, checkpoint::METRICS];

impl Parser for RunFiles {
    const NAME: &'static str = "runs";
    const KINDS: usize = 2;

    fn seeds() -> Vec<(usize, Vec<u8>)> {
        let run = RunFiles::new();
        FILES.iter().map(|name| bytes(run.place.join(name))).enumerate().collect()
    }

    fn new() -> RunFiles {
        let (train, (dir, out)) = (rows(4, 1), folder());
        let settings =
            Settings { max_steps: Some(2), save_steps: 2.into(), save_strategy: Strategy::Steps, ..quick() };
        Job::new(&train, settings, &out).run().unwrap();
        RunFiles { _dir: dir, place: out.join("checkpoint-2") }
    }

    fn parse(&mut self, kind: usize, bytes: &[u8]) {
        let path = self.place.join(FILES[kind]);
        let good = std::fs::read(&path).unwrap();
        std::fs::write(&path, bytes).unwrap();
        match kind {
            0 => reached(checkpoint::read(&self.place)),
            _ => reached(metrics::read(&path)),
        }
        std::fs::write(&path, good).unwrap();
    }
}

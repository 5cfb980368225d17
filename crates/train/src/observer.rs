//! What a run says while it goes on. The library prints nothing; the command line listens.

use crate::{Evaluation, Plan, Report};
use std::path::{Path, PathBuf};
use suasion_data::Objective;
use suasion_engine::MemoryPlan;

/// Something that happened.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A run begins.
    Plan {
        /// What it will do.
        plan: &'a Plan,
        /// The model's parameters.
        parameters: u64,
        /// The memory that the model has planned.
        memory: &'a MemoryPlan,
        /// The checkpoint that it continues.
        resumed_from: Option<&'a Path>,
        /// Steps finished before.
        step: u64,
    },
    /// [`crate::compare()`]: the following events belong to the training of this objective.
    Arm {
        /// The objective.
        objective: Objective,
    },
    /// A step was taken (every step, logged or not).
    Step(&'a StepEvent),
    /// An evaluation begins.
    EvalStart {
        /// Steps finished before.
        step: u64,
        /// Rows to measure.
        rows: u64,
    },
    /// An evaluation goes on.
    EvalProgress {
        /// Rows measured.
        done: u64,
        /// Rows to measure.
        rows: u64,
    },
    /// An evaluation is done.
    Eval {
        /// Steps finished before.
        step: u64,
        /// What it found.
        evaluation: &'a Evaluation,
        /// True where it has the lowest loss of the evaluations after the first step.
        best: bool,
    },
    /// A checkpoint was written.
    Checkpoint {
        /// Steps finished before.
        step: u64,
        /// Its folder.
        path: &'a Path,
        /// Older checkpoints that `save_total_limit` removed.
        removed: &'a [PathBuf],
    },
    /// Something the user should know; also in [`Report::warnings`].
    Warning(&'a str),
    /// The stop flag was raised and the run ends; it can be resumed.
    Interrupted {
        /// Steps finished.
        step: u64,
        /// Where they are kept.
        checkpoint: &'a Path,
    },
    /// The run is complete and everything is written.
    Done(&'a Report),
}

/// A step that was taken.
#[derive(Clone, Debug, PartialEq)]
pub struct StepEvent {
    /// Its number, counted from 1.
    pub step: u64,
    /// Steps in all.
    pub total_steps: u64,
    /// Passes over the rows after it.
    pub epoch: f64,
    /// Its loss before the update; `None` where it had no target.
    pub loss: Option<f64>,
    /// The learning rate that it used.
    pub learning_rate: f64,
    /// The gradient's norm before clipping.
    pub grad_norm: f64,
    /// Its targets.
    pub targets: u64,
    /// Its tokens.
    pub tokens: u64,
    /// Its time.
    pub seconds: f64,
    /// Targets per second of this step.
    pub targets_per_second: f64,
    /// Tokens per second of this step.
    pub tokens_per_second: f64,
    /// Time that the remaining steps take at the mean pace so far (without evaluations and checkpoints).
    pub eta_seconds: f64,
    /// The process's peak so far.
    pub peak_memory_bytes: Option<u64>,
    /// True where `metrics.jsonl` got a line.
    pub logged: bool,
}

/// Receives a run's events.
pub trait Observer {
    /// Called on the training thread; training waits.
    fn event(&mut self, event: &Event<'_>);
}

/// Ignores everything.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {
    fn event(&mut self, _: &Event<'_>) {}
}

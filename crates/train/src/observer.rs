//! The events of a run. The library prints nothing; the command line observes.

use crate::{Evaluation, Plan, Report};
use std::path::{Path, PathBuf};
use suasion_data::Objective;
use suasion_engine::MemoryPlan;

/// An event of a run.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The run begins.
    Plan {
        /// Its plan.
        plan: &'a Plan,
        /// Number of the model's parameters.
        parameters: u64,
        /// Memory planned for the model.
        memory: &'a MemoryPlan,
        /// The checkpoint that the run continues.
        resumed_from: Option<&'a Path>,
        /// Steps finished before.
        step: u64,
    },
    /// In [`crate::compare()`]: the following events belong to the training on this objective.
    Arm {
        /// The objective.
        objective: Objective,
    },
    /// A step is finished (every step, logged or not).
    Step(&'a StepEvent),
    /// An evaluation begins.
    EvalStart {
        /// Steps finished before.
        step: u64,
        /// Rows, or packs of them, to measure.
        rows: u64,
    },
    /// A batch of an evaluation is finished.
    EvalProgress {
        /// Rows, or packs of them, measured so far.
        done: u64,
        /// Rows, or packs of them, to measure.
        rows: u64,
    },
    /// An evaluation is finished.
    Eval {
        /// Steps finished before.
        step: u64,
        /// Its result.
        evaluation: &'a Evaluation,
        /// True if it has the lowest loss of all evaluations so far.
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
    /// A warning for the user; also in [`Report::warnings`].
    Warning(&'a str),
    /// The stop flag was raised and the run ends; it can be resumed.
    Interrupted {
        /// Steps finished.
        step: u64,
        /// Their checkpoint.
        checkpoint: &'a Path,
    },
    /// The run is complete and all its files are written.
    Done(&'a Report),
}

/// A finished step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepEvent {
    /// Its number, counted from 1.
    pub step: u64,
    /// Steps of the run.
    pub total_steps: u64,
    /// Passes over the rows after this step.
    pub epoch: f64,
    /// `Σ w·nll / Σ w` over the step's targets, before the update; `None` if their weights sum to zero.
    pub loss: Option<f64>,
    /// The learning rate of the update.
    pub learning_rate: f64,
    /// L2 norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Share of the step's targets that the model predicts as the likeliest token; `None` without a target.
    pub mean_token_accuracy: Option<f64>,
    /// Mean entropy in nats of the distributions that they are predicted from.
    pub entropy: Option<f64>,
    /// Load-balancing loss of experts, which `loss` includes with its factor.
    pub aux_loss: Option<f64>,
    /// Targets of the step.
    pub targets: u64,
    /// Tokens of the step.
    pub tokens: u64,
    /// Time of the step.
    pub seconds: f64,
    /// Targets per second of this step.
    pub targets_per_second: f64,
    /// Tokens per second of this step.
    pub tokens_per_second: f64,
    /// Time for the remaining steps at this process's mean pace, without evaluations and checkpoints.
    pub eta_seconds: f64,
    /// Peak memory of the process so far.
    pub peak_memory_bytes: Option<u64>,
    /// True if the step has a line in `metrics.jsonl`.
    pub logged: bool,
}

/// Receives the events of a run.
pub trait Observer {
    /// Called on the training thread, which waits for it to return.
    fn event(&mut self, event: &Event<'_>);
}

/// Ignores all events.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {
    fn event(&mut self, _: &Event<'_>) {}
}

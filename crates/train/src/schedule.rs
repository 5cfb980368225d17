//! The learning rate of each step, as computed by transformers' `optimization.py`.

use crate::{Scheduler, Settings};

/// A learning-rate schedule with its warm-up and total in steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// The kind of schedule.
    pub kind: Scheduler,
    /// The peak of the learning rate.
    pub learning_rate: f64,
    /// Warm-up steps (ignored by [`Scheduler::Constant`]).
    pub warmup_steps: u64,
    /// Steps of the run.
    pub total_steps: u64,
}

/// The warm-up in steps: `warmup_steps` if it is not 0 (below 1 it is a share), else `ceil(total ·
/// warmup_ratio)` (transformers' `get_warmup_steps`).
pub fn warmup_steps(settings: &Settings, total_steps: u64) -> u64 {
    let share = |ratio: f64| (total_steps as f64 * ratio).ceil() as u64;
    match settings.warmup_steps {
        steps if steps >= 1.0 => steps as u64,
        ratio if ratio > 0.0 => share(ratio),
        _ => share(settings.warmup_ratio),
    }
}

impl Schedule {
    /// The schedule of a run of `total_steps`.
    pub fn new(settings: &Settings, total_steps: u64) -> Schedule {
        Schedule {
            kind: settings.lr_scheduler_type,
            learning_rate: settings.learning_rate,
            warmup_steps: warmup_steps(settings, total_steps),
            total_steps,
        }
    }

    /// The learning rate of the step after `done` finished ones. The first step's is `rate(0)`, which is 0
    /// with a warm-up, as in the Trainer.
    pub fn rate(&self, done: u64) -> f64 {
        self.learning_rate * self.multiplier(done)
    }

    fn multiplier(&self, done: u64) -> f64 {
        let (step, warmup, total) = (done as f64, self.warmup_steps as f64, self.total_steps as f64);
        if self.kind == Scheduler::Constant {
            return 1.0;
        }
        if done < self.warmup_steps {
            return step / warmup.max(1.0);
        }
        match self.kind {
            Scheduler::Constant | Scheduler::ConstantWithWarmup => 1.0,
            Scheduler::Linear => ((total - step) / (total - warmup).max(1.0)).max(0.0),
            Scheduler::Cosine => {
                let progress = (step - warmup) / (total - warmup).max(1.0);
                (0.5 * (1.0 + (std::f64::consts::PI * 0.5 * 2.0 * progress).cos())).max(0.0)
            }
        }
    }
}

//! The learning rate of each step, as computed by transformers' `optimization.py` (5.23).

mod curve;
mod evaluated;

use crate::Result;
use curve::{Curve, Ramp};
pub use evaluated::PlateauState;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::f64::consts::PI;
use std::fmt;

/// Structs of arguments with their defaults; serde refuses other names.
macro_rules! arguments {
    ($($(#[$doc:meta])* struct $name:ident {
        $($(#[$of_field:meta])* $field:ident: $type:ty = $default:expr),* $(,)?
    })*) => { $(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub(super) struct $name {
            $($(#[$of_field])* pub(super) $field: $type,)*
        }

        impl Default for $name {
            fn default() -> $name {
                $name { $($field: $default),* }
            }
        }
    )* };
}
use arguments;

/// Arguments by name, as `lr_scheduler_kwargs` has them.
pub type Kwargs = BTreeMap<String, Value>;

/// How the learning rate changes over the steps (transformers' `SchedulerType`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scheduler {
    /// Linear warm-up, then linear decay to zero.
    #[default]
    Linear,
    /// Linear warm-up, then half a cosine to zero.
    Cosine,
    /// The same rate at every step. As in transformers, warm-up does not apply to it.
    Constant,
    /// Linear warm-up, then constant.
    ConstantWithWarmup,
    /// Linear warm-up, then half cosines from the highest rate to zero, again and again.
    CosineWithRestarts,
    /// Linear warm-up, then a polynomial decay.
    Polynomial,
    /// Linear warm-up, then as the inverse square root of the step.
    InverseSqrt,
    /// The same rate until evaluations stop to improve, then less of it (PyTorch's `ReduceLROnPlateau`).
    ReduceLrOnPlateau,
    /// Linear warm-up, then half a cosine to a lowest rate.
    CosineWithMinLr,
    /// As [`Scheduler::CosineWithMinLr`], with a warm-up that begins above zero.
    CosineWarmupWithMinLr,
    /// Warm-up, a constant rate, and a decay.
    WarmupStableDecay,
    /// More after evaluations that improve one after the other, less after those that do not (transformers' `GreedyLR`).
    Greedy,
}

impl Scheduler {
    /// True if the learning rates depend on the steps of the whole run.
    pub fn depends_on_total(self) -> bool {
        let free = [Scheduler::Constant, Scheduler::ConstantWithWarmup, Scheduler::InverseSqrt];
        !free.contains(&self) && !self.follows_evaluations()
    }

    /// True if evaluations decide the learning rates.
    pub fn follows_evaluations(self) -> bool {
        matches!(self, Scheduler::ReduceLrOnPlateau | Scheduler::Greedy)
    }

    /// True if there is a warm-up. As in transformers, the others ignore its settings.
    pub fn warms_up(self) -> bool {
        self != Scheduler::Constant && !self.follows_evaluations()
    }
}

// Serde writes a unit variant's name to a formatter, so each name is written only once.
impl fmt::Display for Scheduler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// A learning-rate schedule with its warm-up and total in steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    curve: Curve,
    learning_rate: f64,
    warmup_steps: u64,
    total_steps: u64,
}

impl Schedule {
    /// The schedule of a run of `total_steps`, with a highest rate and a warm-up.
    ///
    /// # Errors
    /// If the arguments (`lr_scheduler_kwargs`) do not fit the kind.
    pub fn new(
        kind: Scheduler,
        kwargs: &Kwargs,
        learning_rate: f64,
        warmup_steps: u64,
        total_steps: u64,
    ) -> Result<Schedule> {
        Ok(Schedule {
            curve: Curve::new(kind, kwargs, learning_rate)?,
            learning_rate,
            warmup_steps,
            total_steps,
        })
    }

    /// The learning rate of the step after `done` finished ones. The first step's is `rate(0)`, which is 0
    /// with most kinds of warm-up, as in the Trainer. Where evaluations decide it is the one to begin with.
    pub fn rate(&self, done: u64) -> f64 {
        self.learning_rate * self.multiplier(done)
    }

    /// The learning rate after an evaluation, where the schedule depends on them (`reduce_lr_on_plateau`, `greedy`).
    pub fn evaluated(&self, state: &mut PlateauState, metric: f64) -> Option<f64> {
        match self.curve {
            Curve::Plateau(plateau) => Some(plateau.evaluated(state, metric, self.learning_rate)),
            Curve::Greedy(greedy) => Some(greedy.evaluated(state, metric, self.learning_rate)),
            _ => None,
        }
    }

    fn multiplier(&self, done: u64) -> f64 {
        let (step, warmup, total) = (done as f64, self.warmup_steps as f64, self.total_steps as f64);
        let warming = done < self.warmup_steps;
        let rest = (total - warmup).max(1.0);
        match self.curve {
            Curve::Constant | Curve::Plateau(_) | Curve::Greedy(_) => 1.0,
            Curve::CosineWarmup { warmup_from: None, .. } if warming => (step + 1.0) / warmup.max(1.0),
            Curve::CosineWarmup { warmup_from: Some(from), .. } if warming => {
                from + (1.0 - from) * step / (warmup - 1.0).max(1.0)
            }
            Curve::Stable { warmup: ramp, floor, .. } if warming => {
                let progress = step / warmup.max(1.0);
                let factor = match ramp {
                    Ramp::Linear => progress,
                    Ramp::Cosine => 0.5 * (1.0 - (PI * progress).cos()),
                    Ramp::Sqrt => 1.0 - (1.0 - progress).sqrt(),
                };
                (factor * (1.0 - floor) + floor).max(0.0)
            }
            _ if warming => step / warmup.max(1.0),
            Curve::ConstantWithWarmup => 1.0,
            Curve::Linear => ((total - step) / rest).max(0.0),
            Curve::Cosine { cycles, floor } => lowered(cycles, (step - warmup) / rest, floor),
            Curve::CosineWarmup { cycles, floor, .. } => lowered(cycles, (step - warmup + 1.0) / rest, floor),
            Curve::Restarts { cycles } => {
                let progress = (step - warmup) / rest;
                if progress >= 1.0 {
                    0.0
                } else {
                    (0.5 * (1.0 + (PI * (cycles * progress % 1.0)).cos())).max(0.0)
                }
            }
            Curve::Polynomial { power, end } => {
                let decay_steps = total - warmup;
                if step > total || decay_steps == 0.0 {
                    return end / self.learning_rate;
                }
                let remaining = 1.0 - (step - warmup) / decay_steps;
                ((self.learning_rate - end) * remaining.powf(power) + end) / self.learning_rate
            }
            Curve::InverseSqrt { timescale } => {
                let timescale = match (timescale, self.warmup_steps) {
                    (0.0, 0) => 10_000.0,
                    (0.0, _) => warmup,
                    _ => timescale,
                };
                1.0 / ((step + (timescale - warmup)) / timescale).sqrt()
            }
            Curve::Stable { decay_steps, stable_steps, decay, floor, cycles, .. } => {
                // Without a stable phase of its own, all that warm-up and decay leave.
                let stable = stable_steps.map_or(total - warmup - decay_steps as f64, |steps| steps as f64);
                if step < warmup + stable {
                    return 1.0;
                }
                let decay_steps = decay_steps as f64;
                if step >= warmup + stable + decay_steps {
                    return floor;
                }
                let progress = (step - warmup - stable) / decay_steps.max(1.0);
                let factor = match decay {
                    Ramp::Linear => 1.0 - progress,
                    Ramp::Cosine => 0.5 * (1.0 + (PI * cycles * 2.0 * progress).cos()),
                    Ramp::Sqrt => 1.0 - progress.sqrt(),
                };
                (factor * (1.0 - floor) + floor).max(0.0)
            }
        }
    }
}

/// Half a cosine for each half of a cycle, raised to end at `floor`.
fn lowered(cycles: f64, progress: f64, floor: f64) -> f64 {
    let factor = 0.5 * (1.0 + (PI * cycles * 2.0 * progress).cos());
    (factor * (1.0 - floor) + floor).max(0.0)
}

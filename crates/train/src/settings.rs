//! The settings of a run, under TRL's and transformers' names.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

macro_rules! named {
    ($type:ident { $($variant:ident $name:literal),* $(,)? }) => {
        impl $type {
            /// Every value's name, as it is written in a configuration.
            pub const NAMES: &'static [&'static str] = &[$($name),*];
            /// The name in a configuration.
            pub fn as_str(self) -> &'static str { match self { $($type::$variant => $name),* } }
        }
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { f.write_str(self.as_str()) }
        }
        impl FromStr for $type {
            type Err = String;
            fn from_str(text: &str) -> Result<Self, String> {
                match text {
                    $($name => Ok($type::$variant),)*
                    _ => Err(format!("{text:?} is none of {}", Self::NAMES.join(", "))),
                }
            }
        }
    };
}

/// How the learning rate runs over the steps (transformers' `SchedulerType`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scheduler {
    /// The same rate at every step. As in transformers, warm-up does not apply to it.
    Constant,
    /// Linear warm-up, then constant.
    ConstantWithWarmup,
    /// Linear warm-up, then linear to zero.
    #[default]
    Linear,
    /// Linear warm-up, then half a cosine to zero.
    Cosine,
}
named!(Scheduler { Constant "constant", ConstantWithWarmup "constant_with_warmup", Linear "linear", Cosine "cosine" });

/// When something recurring happens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// Never.
    #[default]
    No,
    /// Every so many steps.
    Steps,
    /// At the end of every epoch.
    Epoch,
    /// `save_strategy` only: after each evaluation that is the best so far.
    Best,
}
named!(Strategy { No "no", Steps "steps", Epoch "epoch", Best "best" });

/// The settings of a run. The defaults are the ones that [`Settings::default`] gives.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Rows in a micro-batch (8).
    pub per_device_train_batch_size: usize,
    /// Rows in an evaluation batch (8).
    pub per_device_eval_batch_size: usize,
    /// Micro-batches in a step (1).
    pub gradient_accumulation_steps: usize,
    /// The schedule's peak (2e-5).
    pub learning_rate: f64,
    /// AdamW's decoupled weight decay (0).
    pub weight_decay: f64,
    /// Decay biases and norms too (false; not a key of TRL's).
    pub decay_all: bool,
    /// AdamW's first decay rate (0.9).
    pub adam_beta1: f64,
    /// AdamW's second decay rate (0.999).
    pub adam_beta2: f64,
    /// AdamW's epsilon (1e-8).
    pub adam_epsilon: f64,
    /// Gradients of a larger norm are scaled down to it (1.0); 0 = off.
    pub max_grad_norm: f64,
    /// Passes over the rows (3); a fraction ends within a pass.
    pub num_train_epochs: f64,
    /// Steps; over `num_train_epochs` where given.
    pub max_steps: Option<u64>,
    /// The learning rate's course (linear).
    pub lr_scheduler_type: Scheduler,
    /// Share of all steps that warm up (0); rounded up.
    pub warmup_ratio: f64,
    /// Steps that warm up (0), over `warmup_ratio` where not 0; below 1 it is a share, as in transformers 5.
    pub warmup_steps: f64,
    /// A line of metrics every so many steps (10); the first and the last step always have one.
    pub logging_steps: u64,
    /// When to evaluate, besides before and after training (no).
    pub eval_strategy: Strategy,
    /// Steps between evaluations; `None` = `logging_steps`.
    pub eval_steps: Option<u64>,
    /// When to write a checkpoint (steps).
    pub save_strategy: Strategy,
    /// Steps between checkpoints (500).
    pub save_steps: u64,
    /// Checkpoints kept: the oldest go first, the best never. `None` = all.
    pub save_total_limit: Option<usize>,
    /// End with the weights of the lowest evaluation loss (false).
    pub load_best_model_at_end: bool,
    /// The seed of everything random (42).
    pub seed: u64,
    /// The seed of the rows' order; `None` = `seed`.
    pub data_seed: Option<u64>,
    /// Shuffle the rows anew for each epoch (true); otherwise file order.
    pub shuffle_dataset: bool,
    /// Recompute activations in the backward pass instead of keeping them (false). Does not change a bit of the
    /// result.
    pub gradient_checkpointing: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            per_device_train_batch_size: 8,
            per_device_eval_batch_size: 8,
            gradient_accumulation_steps: 1,
            learning_rate: 2e-5,
            weight_decay: 0.0,
            decay_all: false,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            max_grad_norm: 1.0,
            num_train_epochs: 3.0,
            max_steps: None,
            lr_scheduler_type: Scheduler::Linear,
            warmup_ratio: 0.0,
            warmup_steps: 0.0,
            logging_steps: 10,
            eval_strategy: Strategy::No,
            eval_steps: None,
            save_strategy: Strategy::Steps,
            save_steps: 500,
            save_total_limit: None,
            load_best_model_at_end: false,
            seed: 42,
            data_seed: None,
            shuffle_dataset: true,
            gradient_checkpointing: false,
        }
    }
}

impl Settings {
    /// The seed of the rows' order.
    pub fn data_seed(&self) -> u64 {
        self.data_seed.unwrap_or(self.seed)
    }

    /// Steps between evaluations under `eval_strategy = steps`.
    pub fn eval_steps(&self) -> u64 {
        self.eval_steps.unwrap_or(self.logging_steps)
    }

    /// Refuses what cannot work. `has_eval`: the run has rows to evaluate on.
    pub fn validate(&self, has_eval: bool) -> Result<()> {
        let positive = |key, value: u64| match value {
            0 => Err(Error::setting(key, "0 is not possible", "use at least 1")),
            _ => Ok(()),
        };
        positive("per_device_train_batch_size", self.per_device_train_batch_size as u64)?;
        positive("per_device_eval_batch_size", self.per_device_eval_batch_size as u64)?;
        positive("gradient_accumulation_steps", self.gradient_accumulation_steps as u64)?;
        positive("logging_steps", self.logging_steps)?;
        positive("save_steps", self.save_steps)?;
        positive("eval_steps", self.eval_steps())?;
        positive("save_total_limit", self.save_total_limit.unwrap_or(1) as u64)?;
        positive("max_steps", self.max_steps.unwrap_or(1))?;

        let within = |key, value: f64, low: f64, high: f64, help: &str| {
            // NaN is in no range.
            if (low..=high).contains(&value) {
                Ok(())
            } else {
                Err(Error::setting(key, format!("{value} is not possible"), help))
            }
        };
        let below_one = 1.0 - f64::EPSILON / 2.0;
        within("learning_rate", self.learning_rate, 0.0, f64::MAX, "use a finite number of at least 0")?;
        within("weight_decay", self.weight_decay, 0.0, f64::MAX, "use a finite number of at least 0")?;
        within("adam_beta1", self.adam_beta1, 0.0, below_one, "use a number of at least 0 and below 1")?;
        within("adam_beta2", self.adam_beta2, 0.0, below_one, "use a number of at least 0 and below 1")?;
        within("adam_epsilon", self.adam_epsilon, 0.0, f64::MAX, "use a finite number of at least 0")?;
        within(
            "max_grad_norm",
            self.max_grad_norm,
            0.0,
            f64::MAX,
            "use a finite number; 0 turns clipping off",
        )?;
        within("warmup_ratio", self.warmup_ratio, 0.0, 1.0, "use a share between 0 and 1")?;
        within("warmup_steps", self.warmup_steps, 0.0, 1e15, "use a number of steps, or a share below 1")?;
        if self.warmup_steps >= 1.0 && self.warmup_steps.fract() != 0.0 {
            let message = format!("{} is not a whole number of steps", self.warmup_steps);
            return Err(Error::setting("warmup_steps", message, "use a whole number, or a share below 1"));
        }
        if self.max_steps.is_none() {
            let help = "use a number above 0, or max_steps";
            within("num_train_epochs", self.num_train_epochs, f64::MIN_POSITIVE, 1e9, help)?;
        }

        if self.eval_strategy == Strategy::Best {
            let help = "best is a save_strategy; use no, steps or epoch";
            return Err(Error::setting("eval_strategy", "an evaluation cannot wait for a better one", help));
        }
        if self.eval_strategy != Strategy::No && !has_eval {
            let message = format!("{} needs rows to evaluate on, and there are none", self.eval_strategy);
            return Err(Error::setting("eval_strategy", message, "name a held-out split, or use no"));
        }
        if self.save_strategy == Strategy::Best && self.eval_strategy == Strategy::No {
            let help = "set eval_strategy to steps or epoch";
            return Err(Error::setting("save_strategy", "best needs evaluations during training", help));
        }
        if self.load_best_model_at_end {
            // The Trainer's own conditions: the best must be among what was saved.
            let matching = match (self.eval_strategy, self.save_strategy) {
                (Strategy::No, _) => false,
                (_, Strategy::Best) => true,
                (Strategy::Steps, Strategy::Steps) => self.save_steps.is_multiple_of(self.eval_steps()),
                (eval, save) => eval == save,
            };
            if !matching {
                let message = format!(
                    "needs a checkpoint wherever an evaluation may be the best: eval_strategy is {} and save_strategy is {}",
                    self.eval_strategy, self.save_strategy
                );
                let help = "use the same strategy for both (save_steps a multiple of eval_steps), or save_strategy: best";
                return Err(Error::setting("load_best_model_at_end", message, help));
            }
        }
        Ok(())
    }
}

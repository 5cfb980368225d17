//! The settings of a run, under TRL's and transformers' names.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fmt;

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
}

/// When to evaluate, or to write a checkpoint.
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

// Serde writes a unit variant's name to a formatter, so each name stands once.
impl fmt::Display for Scheduler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// A setting of the table.
pub struct Key {
    /// Its name.
    pub name: &'static str,
    /// What a resume compares.
    pub on_resume: OnResume,
    /// Its bounds; `None` if every value of its type can work.
    pub bounds: Option<Bounds>,
    value: fn(&Settings) -> String,
}

/// The values of a setting that can work.
pub struct Bounds {
    /// The values, to follow "must be": `at least 1`.
    pub text: &'static str,
    /// True if the settings' value is one of them.
    pub hold: fn(&Settings) -> bool,
}

/// Whether a resume may change a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnResume {
    /// The steps depend on it: it must be the checkpoint's.
    Same,
    /// What it resolves to is compared instead (`data_seed`, the steps of the run and of the warm-up).
    Resolved,
    /// No step depends on it.
    Free,
}

impl Key {
    /// The value as a configuration has it.
    pub fn value(&self, settings: &Settings) -> String {
        (self.value)(settings)
    }
}

/// The text of a value in a configuration.
trait Shown {
    fn shown(&self) -> String;
}

macro_rules! shown {
    ($($type:ty: $format:literal),*) => { $(impl Shown for $type {
        fn shown(&self) -> String {
            format!($format, self)
        }
    })* };
}

shown!(bool: "{}", u64: "{}", usize: "{}", f64: "{:?}", Scheduler: "{}", Strategy: "{}");

impl<T: Shown> Shown for Option<T> {
    fn shown(&self) -> String {
        self.as_ref().map_or("null".into(), T::shown)
    }
}

macro_rules! bounds {
    ($name:ident $type:ty) => {
        None
    };
    ($name:ident $type:ty, $check:expr, $text:literal) => {
        Some(Bounds {
            text: $text,
            hold: |settings| {
                let check: fn(&$type) -> bool = $check;
                check(&settings.$name)
            },
        })
    };
}

/// The table. Each line is a field of [`Settings`]: its meaning, its name, what a resume compares, its type
/// and default, and, where its type has values that cannot work, a condition and its wording.
macro_rules! settings {
    ($($(#[doc = $doc:literal])+ $name:ident $on_resume:ident: $type:ty = $default:expr $(, if $check:expr, $bounds:literal)?;)*) => {
        /// The settings of a run.
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct Settings {
            $(
                $(#[doc = $doc])+
                #[doc = concat!("\n\nDefault: `", stringify!($default), "`.", $("\nMust be ", $bounds, ".")?)]
                pub $name: $type,
            )*
        }

        impl Default for Settings {
            fn default() -> Settings {
                Settings { $($name: $default,)* }
            }
        }

        /// Every setting, in the order of the fields.
        pub const KEYS: &[Key] = &[$(Key {
            name: stringify!($name),
            on_resume: OnResume::$on_resume,
            bounds: bounds!($name $type $(, $check, $bounds)?),
            value: |settings| settings.$name.shown(),
        },)*];
    };
}

settings! {
    /// Rows per micro-batch, or packs of them.
    per_device_train_batch_size Same: usize = 8, if |v| *v >= 1, "at least 1";
    /// Rows per evaluation batch, or packs of them.
    per_device_eval_batch_size Free: usize = 8, if |v| *v >= 1, "at least 1";
    /// Micro-batches per step, normalised over all their targets together.
    gradient_accumulation_steps Same: usize = 1, if |v| *v >= 1, "at least 1";
    /// The highest learning rate of the schedule.
    learning_rate Same: f64 = 2e-5, if |v| (0.0..=f64::MAX).contains(v), "at least 0";
    /// AdamW's decoupled weight decay.
    weight_decay Same: f64 = 0.0, if |v| (0.0..=f64::MAX).contains(v), "at least 0";
    /// Decay biases and norms too (not a key of TRL).
    decay_all Same: bool = false;
    /// AdamW's first decay rate.
    adam_beta1 Same: f64 = 0.9, if |v| (0.0..1.0).contains(v), "at least 0 and below 1";
    /// AdamW's second decay rate.
    adam_beta2 Same: f64 = 0.999, if |v| (0.0..1.0).contains(v), "at least 0 and below 1";
    /// AdamW's epsilon.
    adam_epsilon Same: f64 = 1e-8, if |v| (0.0..=f64::MAX).contains(v), "at least 0";
    /// Gradients of a larger norm are scaled down to this one; 0 turns clipping off.
    max_grad_norm Same: f64 = 1.0, if |v| (0.0..=f64::MAX).contains(v), "at least 0";
    /// Passes over the training rows; a fraction ends within a pass.
    num_train_epochs Resolved: f64 = 3.0, if |v| (f64::MIN_POSITIVE..=1e9).contains(v), "above 0 and at most 1e9";
    /// Steps, which take precedence over `num_train_epochs`; `None` counts epochs.
    max_steps Resolved: Option<u64> = None, if |v| *v != Some(0), "at least 1";
    /// How the learning rate changes over the steps.
    lr_scheduler_type Same: Scheduler = Scheduler::Linear;
    /// Share of all steps that warm up, rounded up to steps.
    warmup_ratio Resolved: f64 = 0.0, if |v| (0.0..=1.0).contains(v), "between 0 and 1";
    /// Steps that warm up, which take precedence over `warmup_ratio` unless 0; below 1 a share, as in
    /// transformers 5.
    warmup_steps Resolved: f64 = 0.0, if |v| (0.0..1.0).contains(v) || ((1.0..=1e15).contains(v) && v.fract() == 0.0), "a whole number, or a share below 1";
    /// Steps between two lines of metrics; the first and the last step always have one.
    logging_steps Free: u64 = 1, if |v| *v >= 1, "at least 1";
    /// When to evaluate, besides before and after training.
    eval_strategy Free: Strategy = Strategy::No;
    /// Steps between two evaluations; `None` takes `logging_steps`.
    eval_steps Free: Option<u64> = None, if |v| *v != Some(0), "at least 1";
    /// When to write checkpoints.
    save_strategy Free: Strategy = Strategy::Steps;
    /// Steps between two checkpoints.
    save_steps Free: u64 = 500, if |v| *v >= 1, "at least 1";
    /// Checkpoints kept: the oldest are removed first, the best never. `None` keeps all.
    save_total_limit Free: Option<usize> = None, if |v| *v != Some(0), "at least 1";
    /// End with the weights of the lowest evaluation loss.
    load_best_model_at_end Free: bool = false;
    /// End a run whose loss is above twice that of its first step, and above 4 nats, for 20 steps in a row.
    stop_on_divergence Free: bool = true;
    /// Seed of everything random.
    seed Same: u64 = 42;
    /// Seed of the rows' order; `None` takes `seed`.
    data_seed Resolved: Option<u64> = None;
    /// Shuffle the rows anew for each epoch; otherwise file order.
    shuffle_dataset Same: bool = true;
    /// Recompute activations in the backward pass instead of keeping them. The result is the same to the bit.
    gradient_checkpointing Free: bool = false;
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

    /// Refuses values, and combinations of values, that cannot work. `has_eval`: the run has rows to evaluate
    /// on.
    pub fn validate(&self, has_eval: bool) -> Result<()> {
        for key in KEYS {
            if let Some(bounds) = key.bounds.as_ref().filter(|bounds| !(bounds.hold)(self)) {
                return Err(Error::out_of_bounds(key.name, key.value(self), bounds.text));
            }
        }
        let Settings { eval_strategy, save_strategy, .. } = *self;
        if eval_strategy == Strategy::Best {
            let problem = "applies to checkpoints only";
            return Err(Error::setting("eval_strategy", eval_strategy, problem, "use no, steps or epoch"));
        }
        if eval_strategy != Strategy::No && !has_eval {
            let problem = "needs rows to evaluate on, and there are none";
            return Err(Error::setting(
                "eval_strategy",
                eval_strategy,
                problem,
                "name a held-out split, or use no",
            ));
        }
        if save_strategy == Strategy::Best && eval_strategy == Strategy::No {
            let problem = "needs evaluations during training";
            return Err(Error::setting(
                "save_strategy",
                save_strategy,
                problem,
                "set eval_strategy to steps or epoch",
            ));
        }
        // The Trainer's own conditions: the best weights must be among those that were saved.
        let best_is_saved = match (eval_strategy, save_strategy) {
            (Strategy::No, _) => false,
            (_, Strategy::Best) => true,
            (Strategy::Steps, Strategy::Steps) => self.save_steps.is_multiple_of(self.eval_steps()),
            (eval, save) => eval == save,
        };
        if self.load_best_model_at_end && !best_is_saved {
            return Err(Error::setting(
                "load_best_model_at_end",
                true,
                format!(
                    "needs a checkpoint at every evaluation, but eval_strategy is {eval_strategy} and save_strategy is \
                     {save_strategy}"
                ),
                "use the same strategy for both (with save_steps a multiple of eval_steps), or save_strategy best",
            ));
        }
        Ok(())
    }
}

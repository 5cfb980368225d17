//! The settings of a run, under TRL's and transformers' names.

use crate::groups::{ParamGroup, Patterns};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use suasion_engine::Optimizer;

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

/// How gradients change the weights (transformers' `OptimizerNames`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Optim {
    /// AdamW.
    #[default]
    #[serde(alias = "adamw_torch")]
    AdamwTorchFused,
    /// AdamW with moments of eight bits, as bitsandbytes keeps them.
    #[serde(rename = "adamw_8bit", alias = "adamw_bnb_8bit", alias = "paged_adamw_8bit")]
    Adamw8bit,
    /// Adafactor with the learning rate of the schedule.
    Adafactor,
    /// Gradient descent, with `momentum=…` in `optim_args` if wanted.
    Sgd,
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

impl fmt::Display for Optim {
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
    /// The numbers that it may be; `None` if every value of its type can work.
    pub range: Option<Range>,
    value: fn(&Settings) -> String,
    number: fn(&Settings) -> Option<f64>,
}

/// The numbers that a setting may have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Range {
    /// From here on.
    AtLeast(f64),
    /// From the first to below the second.
    FromBelow(f64, f64),
    /// From the first to the second.
    FromTo(f64, f64),
    /// Above the first and up to the second.
    AboveTo(f64, f64),
    /// Whole numbers up to this, and shares below 1.
    WholeOrShare(f64),
}

impl Range {
    /// True for a number within. NaN and the infinities are in no range.
    pub fn holds(self, number: f64) -> bool {
        number.is_finite()
            && match self {
                Range::AtLeast(low) => number >= low,
                Range::FromBelow(low, high) => (low..high).contains(&number),
                Range::FromTo(low, high) => (low..=high).contains(&number),
                Range::AboveTo(low, high) => number > low && number <= high,
                Range::WholeOrShare(high) => {
                    (0.0..1.0).contains(&number) || ((1.0..=high).contains(&number) && number.fract() == 0.0)
                }
            }
    }
}

impl fmt::Display for Range {
    /// A phrase that follows "must be": `at least 1`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Range::AtLeast(low) => write!(f, "at least {low}"),
            Range::FromBelow(low, high) => write!(f, "at least {low} and below {high}"),
            Range::FromTo(low, high) => write!(f, "between {low} and {high}"),
            Range::AboveTo(low, high) => write!(f, "above {low} and at most {high:e}"),
            Range::WholeOrShare(_) => f.write_str("at least 0, and whole or below 1"),
        }
    }
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

/// A type of a setting.
trait Shown {
    /// The text of the value in a configuration.
    fn shown(&self) -> String;

    /// The value where it is a number, for its range.
    fn number(&self) -> Option<f64>;
}

macro_rules! shown {
    ($($type:ty: $format:literal $(as $number:ty)?),*) => { $(impl Shown for $type {
        fn shown(&self) -> String {
            format!($format, self)
        }

        fn number(&self) -> Option<f64> {
            None$(.or(Some(*self as $number)))?
        }
    })* };
}

shown!(bool: "{}", u64: "{}" as f64, usize: "{}" as f64, f64: "{:?}" as f64, Scheduler: "{}", Strategy: "{}");

shown!(Optim: "{}", Patterns: "{:?}", ParamGroups: "{:?}", String: "{}");

impl<T: Shown> Shown for Option<T> {
    fn shown(&self) -> String {
        self.as_ref().map_or("null".into(), T::shown)
    }

    fn number(&self) -> Option<f64> {
        self.as_ref().and_then(T::number)
    }
}

macro_rules! range {
    () => {
        None
    };
    ($range:expr) => {
        Some($range)
    };
}

/// The table. Each line is a field of [`Settings`]: its meaning, its name, what a resume compares, its type
/// and default, and, where its type has numbers that cannot work, the range of those that can.
macro_rules! settings {
    ($($(#[doc = $doc:literal])+ $name:ident $on_resume:ident: $type:ty = $default:expr $(, in $range:expr)?;)*) => {
        /// The settings of a run.
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct Settings {
            $(
                $(#[doc = $doc])+
                #[doc = concat!("\n\nDefault: `", stringify!($default), "`."$(, "\n\nWithin [`Range`]: `", stringify!($range), "`.")?)]
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
            range: range!($($range)?),
            value: |settings| settings.$name.shown(),
            number: |settings| settings.$name.number(),
        },)*];
    };
}

settings! {
    /// Rows per micro-batch, or packs of them.
    per_device_train_batch_size Same: usize = 8, in Range::AtLeast(1.0);
    /// Rows per evaluation batch, or packs of them.
    per_device_eval_batch_size Free: usize = 8, in Range::AtLeast(1.0);
    /// Micro-batches per step, normalised over all their targets together.
    gradient_accumulation_steps Same: usize = 1, in Range::AtLeast(1.0);
    /// The highest learning rate of the schedule.
    learning_rate Same: f64 = 2e-5, in Range::AtLeast(0.0);
    /// The optimizer.
    optim Same: Optim = Optim::AdamwTorchFused;
    /// Arguments of the optimizer: `momentum=0.9` for `sgd`.
    optim_args Same: Option<String> = None;
    /// Parameters with a learning rate or a weight decay of their own.
    param_groups Same: ParamGroups = ParamGroups::new();
    /// The parameters that are trained; `None` trains all.
    trainable Same: Option<Patterns> = None;
    /// Parameters that are not trained, of those that would be.
    freeze Same: Patterns = Patterns::default();
    /// Decoupled weight decay.
    weight_decay Same: f64 = 0.0, in Range::AtLeast(0.0);
    /// Decay biases and norms too (not a key of TRL).
    decay_all Same: bool = false;
    /// AdamW's first decay rate.
    adam_beta1 Same: f64 = 0.9, in Range::FromBelow(0.0, 1.0);
    /// AdamW's second decay rate.
    adam_beta2 Same: f64 = 0.999, in Range::FromBelow(0.0, 1.0);
    /// AdamW's epsilon.
    adam_epsilon Same: f64 = 1e-8, in Range::AtLeast(0.0);
    /// Gradients of a larger norm are scaled down to this one; 0 turns clipping off.
    max_grad_norm Same: f64 = 1.0, in Range::AtLeast(0.0);
    /// Passes over the training rows; a fraction ends within a pass.
    num_train_epochs Resolved: f64 = 3.0, in Range::AboveTo(0.0, 1e9);
    /// Steps, which take precedence over `num_train_epochs`; `None` counts epochs.
    max_steps Resolved: Option<u64> = None, in Range::AtLeast(1.0);
    /// How the learning rate changes over the steps.
    lr_scheduler_type Same: Scheduler = Scheduler::Linear;
    /// Share of all steps that warm up, rounded up to steps.
    warmup_ratio Resolved: f64 = 0.0, in Range::FromTo(0.0, 1.0);
    /// Steps that warm up, which take precedence over `warmup_ratio` unless 0; below 1 a share, as in
    /// transformers 5.
    warmup_steps Resolved: f64 = 0.0, in Range::WholeOrShare(1e15);
    /// Steps between two lines of metrics; the first and the last step always have one.
    logging_steps Free: u64 = 1, in Range::AtLeast(1.0);
    /// When to evaluate, besides before and after training.
    eval_strategy Free: Strategy = Strategy::No;
    /// Steps between two evaluations; `None` takes `logging_steps`.
    eval_steps Free: Option<u64> = None, in Range::AtLeast(1.0);
    /// When to write checkpoints.
    save_strategy Free: Strategy = Strategy::Steps;
    /// Steps between two checkpoints.
    save_steps Free: u64 = 500, in Range::AtLeast(1.0);
    /// Checkpoints kept: the oldest are removed first, the best never. `None` keeps all.
    save_total_limit Free: Option<usize> = None, in Range::AtLeast(1.0);
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
    /// Noise on the embeddings in training: up to `alpha / √(length · hidden size)`.
    neftune_noise_alpha Same: Option<f64> = None, in Range::AtLeast(0.0);
    /// Share of the uniform distribution in each target.
    label_smoothing_factor Same: f64 = 0.0, in Range::FromTo(0.0, 1.0);
    /// Train without the model's dropout.
    disable_dropout Same: bool = false;
    /// Recompute activations in the backward pass instead of keeping them. The result is the same to the bit.
    gradient_checkpointing Free: bool = false;
}

/// Groups of parameters, in the order in which they are asked.
pub type ParamGroups = Vec<ParamGroup>;

impl Settings {
    /// The optimizer.
    pub fn optimizer(&self) -> Optimizer {
        match self.optim {
            Optim::AdamwTorchFused => Optimizer::AdamW,
            Optim::Adamw8bit => Optimizer::AdamW8bit,
            Optim::Adafactor => Optimizer::Adafactor,
            Optim::Sgd => Optimizer::Sgd { momentum: self.momentum() > 0.0 },
        }
    }

    /// The momentum of `sgd`.
    pub fn momentum(&self) -> f64 {
        self.optim_args.as_deref().and_then(momentum).unwrap_or(0.0)
    }

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
            if let (Some(range), Some(number)) = (key.range, (key.number)(self))
                && !range.holds(number)
            {
                return Err(Error::out_of_bounds(key.name, key.value(self), &range.to_string()));
            }
        }
        if let Some(text) = &self.optim_args
            && (self.optim != Optim::Sgd || momentum(text).is_none())
        {
            let problem = format!("is no argument of {}", self.optim);
            let help = "sgd takes momentum=0.9, at least 0 and below 1; adam_beta1, adam_beta2, adam_epsilon and \
                        weight_decay are keys of their own";
            return Err(Error::setting("optim_args", text, problem, help));
        }
        for group in &self.param_groups {
            let rates = [group.learning_rate, group.weight_decay];
            if rates.iter().flatten().any(|rate| !(rate.is_finite() && *rate >= 0.0)) || rates == [None, None]
            {
                let help = "each group needs match and learning_rate or weight_decay, both at least 0";
                let shown = serde_json::json!(group);
                return Err(Error::setting("param_groups", shown, "is not possible", help));
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

/// The value of `momentum=0.9`.
fn momentum(text: &str) -> Option<f64> {
    let value = text.trim().strip_prefix("momentum")?.trim_start().strip_prefix('=')?;
    value.trim().parse().ok().filter(|value| (0.0..1.0).contains(value))
}

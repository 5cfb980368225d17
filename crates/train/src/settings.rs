//! The settings of a run, under TRL's and transformers' names.

mod keys;
mod validate;

use crate::Result;
use crate::groups::{self, ParamGroup, Patterns};
use crate::interval::Interval;
use crate::schedule::{Kwargs, Schedule, Scheduler};
use keys::Shown;
pub use keys::{Key, OnResume, Range};
use serde::{Deserialize, Serialize};
use std::fmt;
use suasion_engine::{Optimizer, Packing, Trainable};

/// What happens where a checkpoint or a line of metrics cannot be written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnSaveError {
    /// Warn and continue; the next checkpoint tries again.
    #[default]
    Continue,
    /// End the run.
    Stop,
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
    /// Every given number of steps.
    Steps,
    /// At the end of every epoch.
    Epoch,
    /// `save_strategy` only: after each evaluation that is the best so far.
    Best,
}

// Serde writes a unit variant's name to a formatter, so each name is written only once.
impl fmt::Display for OnSaveError {
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
    /// Micro-batches per step and rank, normalised over all their targets together.
    gradient_accumulation_steps Resolved: usize = 1, in Range::AtLeast(1.0);
    /// The highest learning rate of the schedule.
    learning_rate Same: f64 = 2e-5, in Range::AtLeast(0.0);
    /// The optimizer.
    optim Same: Optim = Optim::AdamwTorchFused;
    /// Arguments of the optimizer: `momentum=0.9` for `sgd`.
    optim_args Same: Option<String> = None;
    /// Decay of a moving average of the weights, which is evaluated and becomes the final model; `None` keeps none.
    ema_decay Same: Option<f64> = None, in Range::FromBelow(0.0, 1.0);
    /// Parameters with a learning rate or a weight decay of their own.
    param_groups Same: ParamGroups = ParamGroups::new();
    /// The parameters that are trained; empty trains all.
    trainable Same: Patterns = Patterns::default();
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
    /// Arguments of the schedule, under transformers' names and with its defaults.
    lr_scheduler_kwargs Same: Kwargs = Kwargs::new();
    /// Share of all steps that warm up, rounded up to steps.
    warmup_ratio Resolved: f64 = 0.0, in Range::FromTo(0.0, 1.0);
    /// Steps that warm up, which take precedence over `warmup_ratio` unless 0; below 1 a share, as in
    /// transformers 5.
    warmup_steps Resolved: f64 = 0.0, in Range::WholeOrShare(1e15);
    /// Steps between two lines of metrics, below 1 a share of all; the first and the last step always have one.
    logging_steps Free: Interval = Interval(1.0), in Range::StepsOrShare(1e15);
    /// When to evaluate, besides before and after training.
    eval_strategy Free: Strategy = Strategy::No;
    /// Steps between two evaluations, below 1 a share of all; `None` takes `logging_steps`.
    eval_steps Free: Option<Interval> = None, in Range::StepsOrShare(1e15);
    /// Steps, or with `eval_strategy = epoch` epochs, before the first evaluation during training.
    eval_delay Free: f64 = 0.0, in Range::AtLeast(0.0);
    /// Held-out prompts to answer at each evaluation.
    num_samples Free: usize = 0;
    /// The longest of these answers, in tokens.
    sample_max_new_tokens Free: usize = 64, in Range::AtLeast(1.0);
    /// When to write checkpoints.
    save_strategy Free: Strategy = Strategy::Steps;
    /// Steps between two checkpoints, below 1 a share of all.
    save_steps Free: Interval = Interval(500.0), in Range::StepsOrShare(1e15);
    /// Checkpoints hold the model alone, and no run can be resumed from them.
    save_only_model Free: bool = false;
    /// What happens where a checkpoint or a line of metrics cannot be written.
    on_save_error Free: OnSaveError = OnSaveError::Continue;
    /// Checkpoints kept: the oldest are removed first, the best never. `None` keeps all.
    save_total_limit Free: Option<usize> = None, in Range::AtLeast(1.0);
    /// End with the weights of the best evaluation.
    load_best_model_at_end Free: bool = false;
    /// What is best at an evaluation ([`METRICS`](crate::evaluate::METRICS)); `None` is the loss.
    metric_for_best_model Free: Option<String> = None;
    /// Whether more of it is better; `None` follows its name.
    greater_is_better Free: Option<bool> = None;
    /// Evaluations in a row without a better one after which the run ends.
    early_stopping_patience Free: Option<u64> = None, in Range::AtLeast(1.0);
    /// By how much an evaluation must be better to count.
    early_stopping_threshold Free: f64 = 0.0, in Range::AtLeast(0.0);
    /// End a run whose loss is above twice that of its first step, and above 4 nats, for 20 steps in a row.
    stop_on_divergence Free: bool = true;
    /// Seed of everything random.
    seed Same: u64 = 42;
    /// Seed of the rows' order; `None` takes `seed`.
    data_seed Resolved: Option<u64> = None;
    /// Shuffle the rows for each epoch; otherwise file order.
    shuffle_dataset Same: bool = true;
    /// Noise on the embeddings in training: up to `alpha / √(length · hidden size)`.
    neftune_noise_alpha Same: Option<f64> = None, in Range::AtLeast(0.0);
    /// Share of the uniform distribution in each target.
    label_smoothing_factor Same: f64 = 0.0, in Range::FromTo(0.0, 1.0);
    /// Pack the linear layers of the base under an adapter into 8 bits.
    load_in_8bit Same: bool = false;
    /// Pack the linear layers of the base under an adapter into 4 bits.
    load_in_4bit Same: bool = false;
    /// Pack the scales of these 4 bits too.
    use_bnb_nested_quant Same: bool = false;
    /// Factor of the load-balancing loss of experts; `None`: what the model's `config.json` says.
    router_aux_loss_coef Same: Option<f64> = None, in Range::AtLeast(0.0);
    /// Train without the model's dropout.
    disable_dropout Same: bool = false;
    /// Recompute activations in the backward pass instead of keeping them. The result is the same to the bit.
    gradient_checkpointing Free: bool = false;
}

/// Groups of parameters; the first that matches a parameter applies.
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

    /// Which parameters of a model are trained, that has parameters of these names.
    ///
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) for a pattern that matches nothing, and where nothing is left to train.
    pub fn choose(&self, names: &[String]) -> Result<Trainable> {
        groups::choose(&self.trainable, &self.freeze, &self.param_groups, names)
    }

    /// How the base under an adapter is packed.
    pub fn packing(&self) -> Option<Packing> {
        let four = self.load_in_4bit.then_some(Packing::Nf4 { nested: self.use_bnb_nested_quant });
        four.or(self.load_in_8bit.then_some(Packing::Int8))
    }

    /// The momentum of `sgd`.
    pub fn momentum(&self) -> f64 {
        self.optim_args.as_deref().and_then(momentum).unwrap_or(0.0)
    }

    /// The seed of the rows' order.
    pub fn data_seed(&self) -> u64 {
        self.data_seed.unwrap_or(self.seed)
    }

    /// The warm-up in steps: `warmup_steps` if it is not 0 (below 1 it is a share), else `ceil(total · warmup_ratio)`
    /// (transformers' `get_warmup_steps`).
    pub fn warmup(&self, total_steps: u64) -> u64 {
        let share = |ratio: f64| (total_steps as f64 * ratio).ceil() as u64;
        match self.warmup_steps {
            steps if steps >= 1.0 => steps as u64,
            ratio if ratio > 0.0 => share(ratio),
            _ => share(self.warmup_ratio),
        }
    }

    /// The schedule of a run of `total_steps`.
    ///
    /// # Errors
    /// If `lr_scheduler_kwargs` does not fit `lr_scheduler_type`.
    pub fn schedule(&self, total_steps: u64) -> Result<Schedule> {
        let (kind, kwargs) = (self.lr_scheduler_type, &self.lr_scheduler_kwargs);
        Schedule::new(kind, kwargs, self.learning_rate, self.warmup(total_steps), total_steps)
    }

    /// Steps between evaluations under `eval_strategy = steps`.
    pub fn eval_steps(&self) -> Interval {
        self.eval_steps.unwrap_or(self.logging_steps)
    }

    /// The metric that the best evaluation has the best value of, without the `eval_` that it may be named with.
    pub fn metric(&self) -> &str {
        let name = self.metric_for_best_model.as_deref().unwrap_or("loss");
        name.strip_prefix("eval_").unwrap_or(name)
    }

    /// True if a value of [`Settings::metric`] is better than another. What ends in `loss` should be low, as in the
    /// Trainer, and so should the perplexity.
    pub fn is_better(&self, value: f64, than: f64) -> bool {
        let low = self.metric().ends_with("loss") || self.metric() == "perplexity";
        if self.greater_is_better.unwrap_or(!low) { value > than } else { value < than }
    }
}

/// The value of `momentum=0.9`.
fn momentum(text: &str) -> Option<f64> {
    let value = text.trim().strip_prefix("momentum")?.trim_start().strip_prefix('=')?;
    value.trim().parse().ok().filter(|value| (0.0..1.0).contains(value))
}

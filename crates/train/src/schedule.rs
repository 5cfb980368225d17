//! The learning rate of each step, as computed by transformers' `optimization.py` (5.23).

use crate::{Error, Result};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;
use std::collections::BTreeMap;
use std::f64::consts::PI;
use std::fmt;

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
    /// True where the learning rates depend on the steps of the whole run.
    pub fn depends_on_total(self) -> bool {
        let free = [Scheduler::Constant, Scheduler::ConstantWithWarmup, Scheduler::InverseSqrt];
        !free.contains(&self) && !self.follows_evaluations()
    }

    /// True where evaluations decide the learning rates.
    pub fn follows_evaluations(self) -> bool {
        matches!(self, Scheduler::ReduceLrOnPlateau | Scheduler::Greedy)
    }

    /// True where there is a warm-up. As in transformers, the others ignore its settings.
    pub fn warms_up(self) -> bool {
        self != Scheduler::Constant && !self.follows_evaluations()
    }
}

// Serde writes a unit variant's name to a formatter, so each name stands once.
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

/// A kind of schedule with its arguments (`lr_scheduler_kwargs`), resolved.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Curve {
    Linear,
    Constant,
    ConstantWithWarmup,
    /// Down to `floor`, a share of the peak.
    Cosine {
        cycles: f64,
        floor: f64,
    },
    Restarts {
        cycles: f64,
    },
    Polynomial {
        power: f64,
        end: f64,
    },
    InverseSqrt {
        timescale: f64,
    },
    /// A cosine whose warm-up starts above zero.
    CosineWarmup {
        cycles: f64,
        floor: f64,
        warmup_from: Option<f64>,
    },
    Stable {
        decay_steps: u64,
        stable_steps: Option<u64>,
        warmup: Ramp,
        decay: Ramp,
        floor: f64,
        cycles: f64,
    },
    Plateau(Plateau),
    Greedy(Greedy),
}

/// How a rate rises or falls in `warmup_stable_decay`.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
enum Ramp {
    #[serde(rename = "linear")]
    Linear,
    #[serde(rename = "cosine")]
    Cosine,
    #[serde(rename = "1-sqrt")]
    Sqrt,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NoArgs {}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct CycleArgs {
    num_cycles: f64,
}

impl Default for CycleArgs {
    fn default() -> CycleArgs {
        CycleArgs { num_cycles: 0.5 }
    }
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RestartArgs {
    num_cycles: u64,
}

impl Default for RestartArgs {
    fn default() -> RestartArgs {
        RestartArgs { num_cycles: 1 }
    }
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct PolynomialArgs {
    lr_end: f64,
    power: f64,
}

impl Default for PolynomialArgs {
    fn default() -> PolynomialArgs {
        PolynomialArgs { lr_end: 1e-7, power: 1.0 }
    }
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct InverseSqrtArgs {
    timescale: Option<f64>,
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct FloorArgs {
    num_cycles: f64,
    min_lr: Option<f64>,
    min_lr_rate: Option<f64>,
}

impl Default for FloorArgs {
    fn default() -> FloorArgs {
        FloorArgs { num_cycles: 0.5, min_lr: None, min_lr_rate: None }
    }
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct WarmupFloorArgs {
    num_cycles: f64,
    min_lr: Option<f64>,
    min_lr_rate: Option<f64>,
    warmup_lr_rate: Option<f64>,
}

impl Default for WarmupFloorArgs {
    fn default() -> WarmupFloorArgs {
        WarmupFloorArgs { num_cycles: 0.5, min_lr: None, min_lr_rate: None, warmup_lr_rate: None }
    }
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct StableArgs {
    num_decay_steps: Option<u64>,
    num_stable_steps: Option<u64>,
    warmup_type: Ramp,
    decay_type: Ramp,
    min_lr_ratio: f64,
    num_cycles: f64,
}

impl Default for StableArgs {
    fn default() -> StableArgs {
        StableArgs {
            num_decay_steps: None,
            num_stable_steps: None,
            warmup_type: Ramp::Linear,
            decay_type: Ramp::Cosine,
            min_lr_ratio: 0.0,
            num_cycles: 0.5,
        }
    }
}

/// The arguments of `torch.optim.lr_scheduler.ReduceLROnPlateau`.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Plateau {
    mode: Mode,
    factor: f64,
    patience: u64,
    threshold: f64,
    threshold_mode: ThresholdMode,
    cooldown: u64,
    min_lr: f64,
    eps: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Mode {
    Min,
    Max,
}

#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ThresholdMode {
    Rel,
    Abs,
}

impl Default for Plateau {
    fn default() -> Plateau {
        Plateau {
            mode: Mode::Min,
            factor: 0.1,
            patience: 10,
            threshold: 1e-4,
            threshold_mode: ThresholdMode::Rel,
            cooldown: 0,
            min_lr: 0.0,
            eps: 1e-8,
        }
    }
}

/// The arguments of transformers' `GreedyLR`, as far as they decide rates.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Greedy {
    mode: Mode,
    factor: f64,
    patience: u64,
    threshold: f64,
    threshold_mode: ThresholdMode,
    cooldown: u64,
    warmup: u64,
    min_lr: f64,
    max_lr: f64,
    eps: f64,
    /// The metrics are averaged over the last `window_size`.
    smooth: bool,
    window_size: usize,
    /// Reductions at the lowest rate until everything begins anew.
    reset_start: i64,
}

impl Default for Greedy {
    fn default() -> Greedy {
        Greedy {
            mode: Mode::Min,
            factor: 0.95,
            patience: 10,
            threshold: 1e-6,
            threshold_mode: ThresholdMode::Abs,
            cooldown: 0,
            warmup: 0,
            min_lr: 1e-3,
            max_lr: 1.0,
            eps: 1e-8,
            smooth: false,
            window_size: 50,
            reset_start: 500,
        }
    }
}

/// What `reduce_lr_on_plateau` or `greedy` has seen of a run's evaluations. Part of a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PlateauState {
    /// The learning rate; `None` before the first evaluation.
    pub learning_rate: Option<f64>,
    /// The best metric.
    pub best: Option<f64>,
    /// Evaluations without an improvement in a row.
    pub bad: u64,
    /// Evaluations until they count again.
    pub cooldown: u64,
    /// Of `greedy`: evaluations with an improvement in a row.
    #[serde(default)]
    pub good: u64,
    /// Of `greedy`: evaluations until they count again after the rate has risen.
    #[serde(default)]
    pub warmup: u64,
    /// Of `greedy`: reductions at the lowest rate; the next begins at the settings' number again.
    #[serde(default)]
    pub at_lowest: i64,
    /// Of `greedy`: the metrics in the average, and their sum.
    #[serde(default)]
    pub window: Vec<f64>,
    /// See `window`.
    #[serde(default)]
    pub sum: f64,
}

/// True where a metric is better than the best one by the threshold.
fn is_better(metric: f64, best: f64, mode: Mode, threshold: f64, kind: ThresholdMode) -> bool {
    match (mode, kind) {
        (Mode::Min, ThresholdMode::Rel) => metric < best * (1.0 - threshold),
        (Mode::Min, ThresholdMode::Abs) => metric < best - threshold,
        (Mode::Max, ThresholdMode::Rel) => metric > best * (threshold + 1.0),
        (Mode::Max, ThresholdMode::Abs) => metric > best + threshold,
    }
}

impl Greedy {
    /// The rate after an evaluation (`GreedyLR.step`); `initial` is the one that a reset returns to.
    fn evaluated(&self, state: &mut PlateauState, metric: f64, initial: f64) -> f64 {
        let mut metric = metric;
        if self.smooth {
            state.window.push(metric);
            state.sum += metric;
            if state.window.len() > self.window_size {
                state.sum -= state.window.remove(0);
            }
            metric = state.sum / state.window.len() as f64;
        }
        let mut rate = state.learning_rate.unwrap_or(initial);
        let better = |best: f64| is_better(metric, best, self.mode, self.threshold, self.threshold_mode);
        let waiting = [&mut state.cooldown, &mut state.warmup].into_iter().find(|count| **count > 0);
        if let Some(count) = waiting {
            *count -= 1;
            (state.bad, state.good) = (0, 0);
        } else {
            if state.best.is_none_or(better) {
                (state.best, state.bad, state.good) = (Some(metric), 0, state.good + 1);
            } else {
                (state.bad, state.good) = (state.bad + 1, 0);
            }
            if state.good > self.patience {
                let risen = (rate / self.factor).min(self.max_lr);
                if risen - rate > self.eps {
                    rate = risen;
                }
                (state.warmup, state.good, state.at_lowest) = (self.warmup, 0, 0);
            } else if state.bad > self.patience {
                let reduced = (rate * self.factor).max(self.min_lr);
                if rate - reduced > self.eps {
                    rate = reduced;
                }
                if rate <= self.min_lr {
                    state.at_lowest += 1;
                    if self.reset_start - state.at_lowest <= 0 {
                        *state = PlateauState::default();
                        rate = initial;
                    }
                }
                (state.cooldown, state.bad) = (self.cooldown, 0);
            }
        }
        state.learning_rate = Some(rate);
        rate
    }
}

impl Curve {
    /// A kind with these arguments, for the highest learning rate `peak`.
    fn new(kind: Scheduler, kwargs: &Kwargs, peak: f64) -> Result<Curve> {
        let refused = |name: &str, problem: String, help: &str| {
            let value = format!("{name} of {kind}");
            Error::setting("lr_scheduler_kwargs", value, problem, help)
        };
        let shrinks = |factor: f64, help: &str| match factor >= 1.0 {
            true => Err(refused("factor", format!("is {factor}, which is not below 1"), help)),
            false => Ok(()),
        };
        // `min_lr` is a learning rate, `min_lr_rate` a share of the highest.
        let floor = |rate: Option<f64>, share: Option<f64>| match (rate, share) {
            (Some(_), Some(_)) => Err(refused(
                "min_lr",
                "is given beside min_lr_rate, which says the same in another way".into(),
                "keep one of them",
            )),
            (Some(rate), None) if rate < 0.0 || peak == 0.0 => Err(refused(
                "min_lr",
                format!("is {rate:e}, and learning_rate is {peak:e}"),
                "give a rate of at least 0 and a learning_rate above it",
            )),
            (Some(rate), None) => Ok(rate / peak),
            (None, Some(share)) => Ok(share),
            (None, None) => Err(refused(
                "min_lr",
                "is missing".into(),
                "give the lowest learning rate, lr_scheduler_kwargs: {min_lr: 1e-6}, or its share of the highest, \
                 {min_lr_rate: 0.1}",
            )),
        };
        Ok(match kind {
            Scheduler::Linear => args(kind, kwargs).map(|NoArgs {}| Curve::Linear)?,
            Scheduler::Constant => args(kind, kwargs).map(|NoArgs {}| Curve::Constant)?,
            Scheduler::ConstantWithWarmup => args(kind, kwargs).map(|NoArgs {}| Curve::ConstantWithWarmup)?,
            Scheduler::Cosine => {
                let CycleArgs { num_cycles } = args(kind, kwargs)?;
                Curve::Cosine { cycles: num_cycles, floor: 0.0 }
            }
            Scheduler::CosineWithRestarts => {
                let RestartArgs { num_cycles } = args(kind, kwargs)?;
                Curve::Restarts { cycles: num_cycles as f64 }
            }
            Scheduler::Polynomial => {
                let PolynomialArgs { lr_end, power } = args(kind, kwargs)?;
                if peak <= lr_end || lr_end < 0.0 {
                    return Err(refused(
                        "lr_end",
                        format!("is {lr_end:e}, and learning_rate is {peak:e}"),
                        "give a lower lr_end (1e-7 where there is none) or a higher learning_rate",
                    ));
                }
                Curve::Polynomial { power, end: lr_end }
            }
            Scheduler::InverseSqrt => {
                let InverseSqrtArgs { timescale } = args(kind, kwargs)?;
                if let Some(scale) = timescale.filter(|scale| *scale <= 0.0) {
                    return Err(refused(
                        "timescale",
                        format!("is {scale}, which is no number of steps"),
                        "give at least 1",
                    ));
                }
                Curve::InverseSqrt { timescale: timescale.unwrap_or(0.0) }
            }
            Scheduler::CosineWithMinLr => {
                let FloorArgs { num_cycles, min_lr, min_lr_rate } = args(kind, kwargs)?;
                Curve::Cosine { cycles: num_cycles, floor: floor(min_lr, min_lr_rate)? }
            }
            Scheduler::CosineWarmupWithMinLr => {
                let WarmupFloorArgs { num_cycles, min_lr, min_lr_rate, warmup_lr_rate } = args(kind, kwargs)?;
                let floor = floor(min_lr, min_lr_rate)?;
                Curve::CosineWarmup { cycles: num_cycles, floor, warmup_from: warmup_lr_rate }
            }
            Scheduler::WarmupStableDecay => {
                let a: StableArgs = args(kind, kwargs)?;
                let Some(decay_steps) = a.num_decay_steps else {
                    return Err(refused(
                        "num_decay_steps",
                        "is missing".into(),
                        "give the steps of the decay: lr_scheduler_kwargs: {num_decay_steps: 100}",
                    ));
                };
                Curve::Stable {
                    decay_steps,
                    stable_steps: a.num_stable_steps,
                    warmup: a.warmup_type,
                    decay: a.decay_type,
                    floor: a.min_lr_ratio,
                    cycles: a.num_cycles,
                }
            }
            Scheduler::ReduceLrOnPlateau => {
                let plateau: Plateau = args(kind, kwargs)?;
                shrinks(plateau.factor, "give 0.1, say")?;
                Curve::Plateau(plateau)
            }
            Scheduler::Greedy => {
                // What transformers prints with it, the run's metrics have anyway.
                let kwargs: Kwargs =
                    kwargs.clone().into_iter().filter(|(name, _)| name != "verbose").collect();
                let greedy: Greedy = args(kind, &kwargs)?;
                shrinks(greedy.factor, "give 0.95, say")?;
                Curve::Greedy(greedy)
            }
        })
    }
}

/// The arguments of a kind; a name that it does not have is refused.
fn args<T: DeserializeOwned>(kind: Scheduler, kwargs: &Kwargs) -> Result<T> {
    // PyYAML reads `1e-6` as text, and so have users learned to write numbers.
    let number = |value: &Value| value.as_str().and_then(|text| text.parse::<f64>().ok());
    let given =
        kwargs.iter().map(|(name, value)| (name.clone(), number(value).map_or(value.clone(), Value::from)));
    // A whole number in the form of a float (`100.0`) is one.
    let whole = |value: Value| match value.as_f64() {
        Some(number) if value.is_f64() && number.fract() == 0.0 && (0.0..1e15).contains(&number) => {
            Value::from(number as u64)
        }
        _ => value,
    };
    let object = Value::Object(given.map(|(name, value)| (name, whole(value))).collect());
    serde_json::from_value(object).map_err(|error| {
        Error::setting(
            "lr_scheduler_kwargs",
            Value::Object(kwargs.clone().into_iter().collect()),
            format!("does not fit lr_scheduler_type {kind}: {error}"),
            "names and values are those of transformers' schedule of this name",
        )
    })
}

impl Schedule {
    /// The schedule of a run of `total_steps`, with a highest rate and a warm-up.
    ///
    /// # Errors
    /// Where the arguments (`lr_scheduler_kwargs`) do not fit the kind.
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
        let p = match self.curve {
            Curve::Plateau(p) => p,
            Curve::Greedy(greedy) => return Some(greedy.evaluated(state, metric, self.learning_rate)),
            _ => return None,
        };
        let better = |best: f64| is_better(metric, best, p.mode, p.threshold, p.threshold_mode);
        if state.best.is_none_or(better) {
            (state.best, state.bad) = (Some(metric), 0);
        } else {
            state.bad += 1;
        }
        if state.cooldown > 0 {
            state.cooldown -= 1;
            state.bad = 0;
        }
        let rate = state.learning_rate.get_or_insert(self.learning_rate);
        if state.bad > p.patience {
            let reduced = (*rate * p.factor).max(p.min_lr);
            if *rate - reduced > p.eps {
                *rate = reduced;
            }
            (state.cooldown, state.bad) = (p.cooldown, 0);
        }
        Some(*rate)
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

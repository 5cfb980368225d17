//! The kinds of schedules and their arguments (`lr_scheduler_kwargs`).

use super::evaluated::{Greedy, Plateau};
use super::{Kwargs, Scheduler, arguments};
use crate::{Error, Result};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

/// A kind of schedule with its arguments (`lr_scheduler_kwargs`), resolved.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Curve {
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
pub(super) enum Ramp {
    #[serde(rename = "linear")]
    Linear,
    #[serde(rename = "cosine")]
    Cosine,
    #[serde(rename = "1-sqrt")]
    Sqrt,
}

arguments! {
    struct NoArgs {}
    struct CycleArgs { num_cycles: f64 = 0.5 }
    struct RestartArgs { num_cycles: u64 = 1 }
    struct PolynomialArgs { lr_end: f64 = 1e-7, power: f64 = 1.0 }
    struct InverseSqrtArgs { timescale: Option<f64> = None }
    struct FloorArgs {
        num_cycles: f64 = 0.5,
        min_lr: Option<f64> = None,
        min_lr_rate: Option<f64> = None,
    }
    struct WarmupFloorArgs {
        num_cycles: f64 = 0.5,
        min_lr: Option<f64> = None,
        min_lr_rate: Option<f64> = None,
        warmup_lr_rate: Option<f64> = None,
    }
    struct StableArgs {
        num_decay_steps: Option<u64> = None,
        num_stable_steps: Option<u64> = None,
        warmup_type: Ramp = Ramp::Linear,
        decay_type: Ramp = Ramp::Cosine,
        min_lr_ratio: f64 = 0.0,
        num_cycles: f64 = 0.5,
    }
}

impl Curve {
    /// A kind with these arguments, for the highest learning rate `peak`.
    pub(super) fn new(kind: Scheduler, kwargs: &Kwargs, peak: f64) -> Result<Curve> {
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
                "is given beside min_lr_rate, which sets the same floor".into(),
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
                        format!("is {scale}, which is not a number of steps"),
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

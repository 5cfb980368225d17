//! The schedules whose learning rate follows the evaluations of a run.

use super::arguments;
use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Mode {
    Min,
    Max,
}

#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum ThresholdMode {
    Rel,
    Abs,
}

arguments! {
    /// The arguments of `torch.optim.lr_scheduler.ReduceLROnPlateau`.
    struct Plateau {
        mode: Mode = Mode::Min,
        factor: f64 = 0.1,
        patience: u64 = 10,
        threshold: f64 = 1e-4,
        threshold_mode: ThresholdMode = ThresholdMode::Rel,
        cooldown: u64 = 0,
        min_lr: f64 = 0.0,
        eps: f64 = 1e-8,
    }
    /// The arguments of transformers' `GreedyLR`, as far as they decide rates.
    struct Greedy {
        mode: Mode = Mode::Min,
        factor: f64 = 0.95,
        patience: u64 = 10,
        threshold: f64 = 1e-6,
        threshold_mode: ThresholdMode = ThresholdMode::Abs,
        cooldown: u64 = 0,
        warmup: u64 = 0,
        min_lr: f64 = 1e-3,
        max_lr: f64 = 1.0,
        eps: f64 = 1e-8,
        /// The metrics are averaged over the last `window_size`.
        smooth: bool = false,
        window_size: usize = 50,
        /// Reductions at the lowest rate after which the state is reset.
        reset_start: i64 = 500,
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

/// True if a metric is better than the best one by the threshold.
fn is_better(metric: f64, best: f64, mode: Mode, threshold: f64, kind: ThresholdMode) -> bool {
    match (mode, kind) {
        (Mode::Min, ThresholdMode::Rel) => metric < best * (1.0 - threshold),
        (Mode::Min, ThresholdMode::Abs) => metric < best - threshold,
        (Mode::Max, ThresholdMode::Rel) => metric > best * (threshold + 1.0),
        (Mode::Max, ThresholdMode::Abs) => metric > best + threshold,
    }
}

impl Plateau {
    /// The rate after an evaluation (`ReduceLROnPlateau.step`); `initial` is the one before the first.
    pub(super) fn evaluated(&self, state: &mut PlateauState, metric: f64, initial: f64) -> f64 {
        let better = |best: f64| is_better(metric, best, self.mode, self.threshold, self.threshold_mode);
        if state.best.is_none_or(better) {
            (state.best, state.bad) = (Some(metric), 0);
        } else {
            state.bad += 1;
        }
        if state.cooldown > 0 {
            state.cooldown -= 1;
            state.bad = 0;
        }
        let rate = state.learning_rate.get_or_insert(initial);
        if state.bad > self.patience {
            let reduced = (*rate * self.factor).max(self.min_lr);
            if *rate - reduced > self.eps {
                *rate = reduced;
            }
            (state.cooldown, state.bad) = (self.cooldown, 0);
        }
        *rate
    }
}

impl Greedy {
    /// The rate after an evaluation (`GreedyLR.step`); `initial` is the one that a reset returns to.
    pub(super) fn evaluated(&self, state: &mut PlateauState, metric: f64, initial: f64) -> f64 {
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

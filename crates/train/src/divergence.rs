//! Whether a run diverges: its losses against that of its first step.

use serde::{Deserialize, Serialize};
use std::fmt;
use suasion_data::report::format::loss as shown;

/// A loss is high above this multiple of the first step's.
pub const MULTIPLE: f64 = 2.0;
/// And it is not high below this many nats, whatever the first step's loss was: rows differ.
pub const FLOOR: f64 = 4.0;
/// High losses in a row with which `stop_on_divergence` ends a run.
pub const STEPS: u64 = 20;
/// High losses in a row with which a run that ends is reported as diverged.
const AT_THE_END: u64 = 3;

/// The statistics of a run's losses so far. Part of a checkpoint, so that a resumed run has them too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Watch {
    /// The loss of the first step that has one.
    pub first: Option<f64>,
    /// The last steps in a row whose loss is high.
    pub high: u64,
}

/// A run that has diverged.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Divergence {
    /// The last step.
    pub step: u64,
    /// Steps in a row with a high loss, up to it.
    pub steps: u64,
    /// The loss of the first step.
    pub first: f64,
    /// The threshold of a high loss.
    pub limit: f64,
    /// The loss of the last step, or of the evaluation after it.
    pub loss: f64,
    /// True if the run was ended for it (`stop_on_divergence`).
    pub stopped: bool,
}

impl fmt::Display for Divergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Divergence { step, steps, first, limit, loss, stopped } = *self;
        let (first, limit, loss) = (shown(first), shown(limit), shown(loss));
        match steps {
            0 => write!(f, "the run has diverged: the held-out loss is {loss} after step {step}")?,
            _ => write!(f, "the run has diverged: its loss was above {limit} for {steps} steps in a row")?,
        }
        write!(f, " ({first} at its start, {loss} at step {step})")?;
        if stopped { write!(f, "; it was stopped, and no final model was written") } else { Ok(()) }
    }
}

impl Watch {
    /// Records the loss of a step.
    pub(crate) fn see(&mut self, loss: f64) {
        let first = *self.first.get_or_insert(loss);
        if loss > limit(first) { self.high += 1 } else { self.high = 0 }
    }

    /// The divergence for which a run is ended, if any.
    pub(crate) fn stops(&self, step: u64, loss: Option<f64>) -> Option<Divergence> {
        self.after(STEPS, step, loss).map(|divergence| Divergence { stopped: true, ..divergence })
    }

    /// The divergence of a run that ends after `step`: by its last losses, or by the held-out losses before and after.
    pub(crate) fn at_end(
        &self,
        step: u64,
        loss: Option<f64>,
        held_out: Option<(f64, f64)>,
    ) -> Option<Divergence> {
        let evaluated = || {
            let (before, after) = held_out.filter(|(before, after)| *after > limit(*before))?;
            Some(Divergence {
                step,
                steps: 0,
                first: before,
                limit: limit(before),
                loss: after,
                stopped: false,
            })
        };
        self.after(AT_THE_END, step, loss).or_else(evaluated)
    }

    fn after(&self, steps: u64, step: u64, loss: Option<f64>) -> Option<Divergence> {
        let first = self.first.filter(|_| self.high >= steps)?;
        let loss = loss.unwrap_or(f64::INFINITY);
        Some(Divergence { step, steps: self.high, first, limit: limit(first), loss, stopped: false })
    }
}

fn limit(first: f64) -> f64 {
    (MULTIPLE * first).max(FLOOR)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(losses: &[f64]) -> Watch {
        let mut watch = Watch::default();
        losses.iter().for_each(|loss| watch.see(*loss));
        watch
    }

    #[test]
    fn a_loss_is_high_above_twice_the_first_and_four_nats() {
        assert_eq!(seen(&[3.0, 5.9, 6.1, 7.0]).high, 2);
        assert_eq!(seen(&[3.0, 6.1, 6.0, 6.1]).high, 1);
        // An easy first row does not make ordinary losses high.
        assert_eq!(seen(&[0.01, 2.5, 3.9, 4.1]).high, 1);
    }

    #[test]
    fn a_run_ends_after_twenty_high_losses_in_a_row() {
        let mut losses = vec![2.0];
        losses.extend([9.0; 19]);
        assert_eq!(seen(&losses).stops(20, Some(9.0)), None);
        losses.push(9.5);
        let found = seen(&losses).stops(21, Some(9.5)).unwrap();
        assert_eq!((found.steps, found.first, found.limit, found.stopped), (20, 2.0, 4.0, true));
        let text = found.to_string();
        assert!(
            text.contains("above 4.0000 for 20 steps in a row (2.0000 at its start, 9.5000 at step 21)"),
            "{text}"
        );
    }

    #[test]
    fn a_run_that_ends_high_has_diverged() {
        let high = seen(&[2.0, 8.0, 8.0, 8.0]);
        assert_eq!(high.at_end(4, Some(8.0), None).unwrap().steps, 3);
        let low = seen(&[2.0, 8.0, 8.0]);
        assert_eq!(low.at_end(3, Some(8.0), Some((2.0, 3.9))), None);
        assert_eq!(low.at_end(3, Some(8.0), Some((2.0, 4.5))).unwrap().loss, 4.5);
    }
}

//! The loss of single tokens.

use crate::batches::{eval_batch, measured};
use crate::{Error, Result};
use suasion_data::Sample;
use suasion_engine::{Backend, Model};

/// The nll in nats of each token of a sample, supervised or not; `None` if no token precedes it, and for padding. The
/// model's budget must hold [`crate::plan::eval_budget`] of one sample.
///
/// # Errors
/// [`Error::NonFinite`] for a loss that is not finite.
pub fn token_losses<B: Backend>(model: &mut Model<B>, sample: &Sample) -> Result<Vec<Option<f32>>> {
    let mut losses = vec![None; sample.len()];
    let batch = eval_batch([sample]);
    if batch.targets.is_empty() {
        return Ok(losses);
    }
    let outcomes = model.forward(&batch)?;
    for (place, outcome) in measured(sample).zip(&outcomes) {
        if !outcome.nll.is_finite() {
            return Err(Error::NonFinite {
                step: None,
                evaluation: true,
                what: "the loss of a token",
                value: f64::from(outcome.nll),
                rows: vec![sample.id.clone()],
                checkpoint: None,
            });
        }
        losses[place.position] = Some(outcome.nll);
    }
    Ok(losses)
}

//! Samples to the engine's flat batches: no padding, and only what the loss or the report asks for.

use suasion_data::{IGNORE, Origin, Sample};
use suasion_engine::Batch;

/// Tokens of a sample that are computed: trailing padding without a label is left out, because no token sees it.
pub fn used(sample: &Sample) -> usize {
    let padding = |&i: &usize| sample.origins[i] == Origin::Padding && sample.labels[i] == IGNORE;
    sample.len() - (0..sample.len()).rev().take_while(padding).count()
}

/// The rows' tokens and targets as one batch. A row without a target is left out: samples never see each other, so
/// it could change nothing.
pub fn train_batch<'a>(samples: impl IntoIterator<Item = &'a Sample>) -> Batch {
    let mut batch = Batch::default();
    for sample in samples {
        if sample.targets().next().is_some() {
            batch.push(&sample.input_ids[..used(sample)], sample.targets());
        }
    }
    batch
}

/// What evaluation asks of one position of a sample: `(position ≥ 1, id, is it one of the sample's own targets)`.
pub(crate) fn measured(sample: &Sample) -> impl Iterator<Item = (usize, u32, bool)> + '_ {
    (1..used(sample)).filter_map(|i| {
        let own = sample.labels[i] != IGNORE && sample.weights.as_ref().is_none_or(|w| w[i] != 0.0);
        let id = if own { sample.labels[i] as u32 } else { sample.input_ids[i] };
        (own || sample.origins[i] != Origin::Padding).then_some((i, id, own))
    })
}

/// The rows' tokens with every position as a target, supervised or not: the losses per section.
pub(crate) fn eval_batch<'a>(samples: impl IntoIterator<Item = &'a Sample>) -> Batch {
    let mut batch = Batch::default();
    for sample in samples {
        if measured(sample).next().is_some() {
            let targets = measured(sample).map(|(i, id, _)| (i as u32 - 1, id, 1.0));
            batch.push(&sample.input_ids[..used(sample)], targets);
        }
    }
    batch
}

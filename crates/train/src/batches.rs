//! Turns samples (rows, or packs of rows) into the engine's flat batches, without padding and with only the
//! targets that the loss or the report needs.

use crate::{Error, Result};
use std::borrow::Cow;
use suasion_data::{IGNORE, Origin, RowId, Sample};
use suasion_engine::{Batch, Target};

/// Tokens of a sample that are computed: trailing padding without a label is left out, because no token
/// attends to it.
pub fn used(sample: &Sample) -> usize {
    let padding = |&i: &usize| sample.origins[i] == Origin::Padding && sample.labels[i] == IGNORE;
    sample.len() - (0..sample.len()).rev().take_while(padding).count()
}

/// Refuses a batch whose positions do not fit the 32 bits that a [`Batch`] has for them. `key` is the setting
/// of the batch size.
pub(crate) fn check_size(key: &'static str, tokens: usize) -> Result<()> {
    match u32::try_from(tokens) {
        Ok(_) => Ok(()),
        Err(_) => Err(Error::BatchTooLarge { key, tokens }),
    }
}

/// The rows' tokens and targets as one batch. A row without a target is left out: samples do not attend to
/// each other, so it cannot change the loss.
pub fn train_batch<'a>(samples: impl IntoIterator<Item = &'a Sample>) -> Batch {
    let mut batch = Batch::default();
    for sample in samples {
        if sample.targets().next().is_some() {
            append(&mut batch, sample, sample.targets());
        }
    }
    batch
}

/// Appends a sample's segments, each of which attends to itself and its prefix only, and these targets of it.
fn append(batch: &mut Batch, sample: &Sample, targets: impl Iterator<Item = (u32, u32, f32)>) {
    let (start, used) = (batch.tokens() as u32, used(sample) as u32);
    for segment in sample.segments() {
        let end = segment.own.end.min(used);
        if segment.own.start < end {
            let ids = &sample.input_ids[segment.own.start as usize..end as usize];
            let prefix = match segment.prefix.is_empty() {
                true => 0..0,
                false => start + segment.prefix.start..start + segment.prefix.end,
            };
            batch.push_after(prefix, ids, []);
        }
    }
    batch.targets.extend(targets.map(|(row, id, weight)| Target { row: start + row, id, weight }));
}

/// A position of a sample that evaluation measures.
pub(crate) struct Measured {
    /// The position.
    pub(crate) position: usize,
    /// The position whose hidden row predicts it.
    pub(crate) row: u32,
    /// The token to predict.
    pub(crate) id: u32,
    /// True if it is one of the sample's own targets.
    pub(crate) own: bool,
    /// The index of its segment.
    pub(crate) segment: usize,
}

/// Every position that has a token before it, supervised or not, in order.
pub(crate) fn measured(sample: &Sample) -> impl Iterator<Item = Measured> + '_ {
    let used = used(sample) as u32;
    sample.segments().enumerate().flat_map(move |(number, segment)| {
        let tokens = segment.own.start..segment.own.end.min(used);
        tokens.filter_map(move |at| {
            let (position, row) = (at as usize, segment.predictor(at)?);
            let weighs = || sample.weights.as_ref().is_none_or(|w| w[position] != 0.0);
            let own = sample.labels[position] != IGNORE && weighs();
            let id = if own { sample.labels[position] as u32 } else { sample.input_ids[position] };
            let measured = own || sample.origins[position] != Origin::Padding;
            measured.then_some(Measured { position, row, id, own, segment: number })
        })
    })
}

/// The row that a position of a sample belongs to; the sample itself for a shared prompt.
pub(crate) fn row_at(sample: &Sample, position: u32) -> RowId {
    let row = sample.pack.as_ref().and_then(|pack| {
        let index = pack.ends().position(|segment| segment.own.contains(&position))?;
        pack.rows.get(index)
    });
    row.unwrap_or(&sample.id).clone()
}

/// The rows of a sample: itself, or the rows of the pack.
pub(crate) fn row_ids(sample: &Sample) -> Vec<RowId> {
    sample.pack.as_ref().map_or_else(|| vec![sample.id.clone()], |pack| pack.rows.clone())
}

/// Computed tokens of the sample's longest row: the positions that a model needs.
pub fn longest_row(sample: &Sample) -> usize {
    used(sample).min(sample.longest_row())
}

/// The samples with every pack taken apart into its rows.
pub(crate) fn unpacked(samples: &[Sample]) -> Cow<'_, [Sample]> {
    match samples.iter().any(|sample| sample.pack.is_some()) {
        true => samples.iter().flat_map(Sample::unpack).collect(),
        false => samples.into(),
    }
}

/// The rows' tokens with every position as a target, supervised or not, for the losses per section.
pub(crate) fn eval_batch<'a>(samples: impl IntoIterator<Item = &'a Sample>) -> Batch {
    let mut batch = Batch::default();
    for sample in samples {
        if measured(sample).next().is_some() {
            append(&mut batch, sample, measured(sample).map(|m| (m.row, m.id, 1.0)));
        }
    }
    batch
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_limited_to_32_bits_of_positions() {
        check_size("per_device_train_batch_size", u32::MAX as usize).unwrap();
        let error = check_size("per_device_train_batch_size", u32::MAX as usize + 1).unwrap_err();
        let message = "per_device_train_batch_size: a batch of 4294967296 tokens is larger than the engine's limit of 4294967295";
        assert_eq!(error.to_string(), message);
        assert!(error.is_usage() && error.help().unwrap().starts_with("lower per_device_train_batch_size"));
    }
}

//! The ranks of a run: processes that share its work, on one machine or on several.
//!
//! [`place`] reads a process's rank from the variables of torchrun and Slurm; [`meeting`] lets the ranks find each other, [`mesh`]
//! connects them by TCP, and `wire` is their protocol. [`cards`] checks that each has its own card.
//! [`crate::train`] takes any [`Collective`](suasion_engine::Collective).

pub mod cards;
pub mod meeting;
pub mod mesh;
pub mod place;
mod wire;

pub use meeting::Patience;
pub use mesh::Mesh;
pub use place::Place;

use crate::run::Run;
use crate::settings::KEYS;
use crate::state::RunState;
use crate::{Error, Result};
use suasion_data::Sample;
use suasion_engine::{Backend, Model};
use suasion_files::Written;

/// Refuses ranks with different settings, data, weights or checkpoints; the error names what differs.
pub(crate) fn agree<B: Backend>(run: &Run<'_, B>, state: &RunState) -> Result<()> {
    let collective = run.collective;
    if collective.ranks() == 1 {
        return Ok(());
    }
    let named = |name: &str, value: String| (name.to_string(), value);
    let mut own = vec![
        named("the version of suasion", env!("CARGO_PKG_VERSION").into()),
        named("the objective", format!("{:?}", run.identity.objective)),
        named("the data's fingerprint", run.identity.data_fingerprint.clone()),
        named("the labelling rules' version", run.identity.masking_version.to_string()),
        named("the training rows", digest(run.train)),
        named("the rows to evaluate on", digest(run.eval)),
    ];
    own.extend(KEYS.iter().map(|key| named(key.name, key.value(run.settings))));
    let of_model = [
        ("the fingerprint of the adapter's base model", run.model.base().unwrap_or("none").to_string()),
        ("the trained parameters", run.model.trained_names().join(" ")),
        ("the weights at the start", weights(run.model)?),
        ("the step to go on from", state.progress.step.to_string()),
        ("the checkpoint to go on from", state.checksum.clone()),
    ];
    own.extend(of_model.map(|(name, value)| named(name, value)));
    let message = serde_json::to_vec(&own).expect("names and values are plain text");
    let all = collective.exchange(&message)?;
    let read =
        |message: &Vec<u8>| serde_json::from_slice::<Vec<(String, String)>>(message).unwrap_or_default();
    let first = read(&all[0]);
    for (rank, message) in all.iter().enumerate().skip(1) {
        let theirs = read(message);
        let at = (0..first.len().max(theirs.len())).find(|at| first.get(*at) != theirs.get(*at));
        let Some(at) = at else { continue };
        let shown = |of: &[(String, String)]| of.get(at).map_or("nothing".into(), |(_, value)| short(value));
        let what = first.get(at).or(theirs.get(at)).map_or(String::new(), |(name, _)| name.clone());
        return Err(Error::RankMismatch { what, rank, theirs: shown(&theirs), first: shown(&first) });
    }
    Ok(())
}

/// The part of a value that a message shows.
fn short(value: &str) -> String {
    match value.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &value[..end]),
        None => value.to_string(),
    }
}

/// A hash of the ids, labels and weights of rows.
fn digest(samples: &[Sample]) -> String {
    let mut bytes = Vec::new();
    for sample in samples {
        bytes.extend((sample.len() as u64).to_le_bytes());
        bytes.extend(sample.input_ids.iter().flat_map(|id| id.to_le_bytes()));
        bytes.extend(sample.labels.iter().flat_map(|label| label.to_le_bytes()));
        bytes.extend(sample.weights.iter().flatten().flat_map(|weight| weight.to_le_bytes()));
        for segment in sample.segments() {
            let ends = [segment.own.start, segment.own.end, segment.prefix.start, segment.prefix.end];
            bytes.extend(ends.iter().flat_map(|end| end.to_le_bytes()));
        }
        if bytes.len() > 1 << 20 {
            bytes = Written::of_bytes(&bytes).blake3.into_bytes();
        }
    }
    format!("{} ({})", samples.len(), Written::of_bytes(&bytes).blake3)
}

/// A hash of the weights. Those of an adapter's base have a fingerprint of their own.
fn weights<B: Backend>(model: &Model<B>) -> Result<String> {
    let names = if model.base().is_some() { model.trained_names() } else { model.parameter_names() };
    let mut hashes = Vec::new();
    for name in names {
        let values = model.parameter(&name)?.data;
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        hashes.extend(Written::of_bytes(&bytes).blake3.into_bytes());
    }
    Ok(Written::of_bytes(&hashes).blake3)
}

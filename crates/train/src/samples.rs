//! Replies to held-out prompts during training.

use crate::batches::unpacked;
use crate::generate::{capacity, generate_with};
use crate::metrics::SampleRecord;
use crate::{Result, Sampling, Settings, prompt_ids};
use std::collections::HashSet;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use suasion_data::{Origin, Sample};
use suasion_engine::{Backend, Model};

/// Greedy replies to the first `num_samples` distinct prompts, which are the same at every evaluation. `None` where
/// the stop flag was raised.
pub(crate) fn replies<B: Backend>(
    model: &mut Model<B>,
    rows: &[Sample],
    settings: &Settings,
    stops: &[u32],
    decode: Option<&dyn Fn(&[u32]) -> String>,
    stop: &AtomicBool,
) -> Result<Option<Vec<SampleRecord>>> {
    let mut seen = HashSet::new();
    let rows = unpacked(rows);
    let prompts = rows.iter().filter(|row| !prompt_ids(row).is_empty() && seen.insert(prompt_ids(row)));
    let prompts: Vec<&Sample> = prompts.take(settings.num_samples).collect();
    let longest = prompts.iter().map(|row| prompt_ids(row).len()).max().unwrap_or(1);
    let mut cache = model.cache(capacity(model, longest, settings.sample_max_new_tokens))?;
    let sampling = Sampling {
        max_new_tokens: settings.sample_max_new_tokens,
        stop_ids: stops.to_vec(),
        ..Sampling::default()
    };
    let text = |ids: &[u32]| decode.map_or_else(|| format!("{ids:?}"), |decode| decode(ids));
    let mut records = Vec::with_capacity(prompts.len());
    for row in prompts {
        let prompt = prompt_ids(row);
        let mut go_on = |_| match stop.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        };
        let mut reply = generate_with(model, &mut cache, prompt, &sampling, &mut go_on)?.ids;
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        if reply.last().is_some_and(|id| stops.contains(id)) {
            reply.pop();
        }
        let response = row.input_ids.iter().zip(&row.origins).skip(prompt.len());
        let response = response.take_while(|(_, origin)| matches!(origin, Origin::Response { .. }));
        let response: Vec<u32> = response.map(|(id, _)| *id).collect();
        records.push(SampleRecord {
            row: row.id.row,
            prompt: text(prompt),
            reply: text(&reply),
            reference: text(&response),
        });
    }
    Ok(Some(records))
}

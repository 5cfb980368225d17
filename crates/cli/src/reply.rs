//! Replies of a model, generated token by token.

use crate::interrupt;
use std::ops::ControlFlow;
use std::sync::atomic::Ordering;
use suasion_data::tokens::Tokenizer;
use suasion_data::{Origin, Sample};
use suasion_engine::{KvCache, Model};
use suasion_train::Sampling;
use suasion_train::generate::{Stopped, generate_with};

/// A finished reply.
pub struct Reply {
    /// Its text, without the stop token.
    pub text: String,
    /// Its token ids, the stop token included.
    pub ids: Vec<u32>,
    /// Why it ended.
    pub stopped: Stopped,
}

impl Reply {
    /// Why it ended, as a clause.
    pub fn why(&self) -> &'static str {
        match self.stopped {
            Stopped::Stop(_) => "ended by its stop token",
            Stopped::MaxNewTokens => "cut off by max_new_tokens",
            Stopped::ContextFull => "cut off: the model has no further positions",
            Stopped::Callback => "interrupted",
        }
    }

    /// Why it ended, as a name in JSON.
    pub fn stopped_name(&self) -> &'static str {
        match self.stopped {
            Stopped::Stop(_) => "stop",
            Stopped::MaxNewTokens => "max_new_tokens",
            Stopped::ContextFull => "context_full",
            Stopped::Callback => "interrupted",
        }
    }
}

/// Generates one reply; `piece` gets its text as soon as characters are whole.
///
/// # Errors
/// Where the model cannot continue the prompt, or `piece` fails.
pub fn reply(
    model: &mut Model,
    cache: &mut KvCache,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    sampling: &Sampling,
    piece: &mut dyn FnMut(&str) -> std::io::Result<()>,
) -> anyhow::Result<Reply> {
    let stop = interrupt::flag();
    let mut stream = tokenizer.decode_stream(true);
    let mut text = String::new();
    let mut failed = None;
    let mut hand_on = |new: Option<String>| -> ControlFlow<()> {
        let Some(new) = new else { return ControlFlow::Continue(()) };
        text.push_str(&new);
        match piece(&new) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                failed = Some(error);
                ControlFlow::Break(())
            }
        }
    };
    let generated = generate_with(model, cache, prompt, sampling, &mut |id| {
        if stop.load(Ordering::SeqCst) {
            return ControlFlow::Break(());
        }
        hand_on(stream.push(id))
    })?;
    let _ = hand_on(stream.finish());
    match failed {
        Some(error) => Err(error.into()),
        None => Ok(Reply { text, ids: generated.ids, stopped: generated.stopped }),
    }
}

/// The response of a row, as text.
pub fn reference(sample: &Sample, tokenizer: &Tokenizer) -> String {
    let ids: Vec<u32> = sample
        .input_ids
        .iter()
        .zip(&sample.origins)
        .filter(|(_, origin)| matches!(origin, Origin::Response { .. }))
        .map(|(id, _)| *id)
        .collect();
    tokenizer.decode(&ids, true)
}

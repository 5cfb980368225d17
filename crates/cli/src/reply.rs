//! Replies of a model, generated token by token, and the flags that say how.

use crate::interrupt;
use std::ops::ControlFlow;
use std::sync::atomic::Ordering;
use suasion_data::tokens::Tokenizer;
use suasion_data::{Origin, Sample};
use suasion_engine::{KvCache, Model};
use suasion_train::Sampling;
use suasion_train::generate::{Stopped, generate_after};

/// How tokens are chosen.
#[derive(clap::Args, Debug)]
pub struct SamplingArgs {
    /// The longest reply, in tokens
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_new_tokens: usize,
    /// Sample, with logits divided by T
    #[arg(long, value_name = "T", conflicts_with = "greedy")]
    temperature: Option<f64>,
    /// Sample from the K most likely tokens
    #[arg(long, value_name = "K", conflicts_with = "greedy")]
    top_k: Option<usize>,
    /// Sample from the most likely tokens whose probabilities add up to P
    #[arg(long, value_name = "P", conflicts_with = "greedy")]
    top_p: Option<f64>,
    /// Sample from the tokens with at least P times the probability of the most likely one
    #[arg(long, value_name = "P", conflicts_with = "greedy")]
    min_p: Option<f64>,
    /// Always take the most likely token (the default where no sampling flag is given)
    #[arg(long)]
    greedy: bool,
}

impl SamplingArgs {
    /// The flags, with a seed and the tokens that end a reply.
    pub fn of(&self, seed: u64, stop_ids: Vec<u32>) -> Sampling {
        let sampled = self.temperature.is_some()
            || self.top_k.is_some()
            || self.top_p.is_some()
            || self.min_p.is_some();
        let default = Sampling::default();
        Sampling {
            do_sample: sampled && !self.greedy,
            temperature: self.temperature.unwrap_or(default.temperature),
            top_k: self.top_k.unwrap_or(default.top_k),
            top_p: self.top_p.unwrap_or(default.top_p),
            min_p: self.min_p.unwrap_or(default.min_p),
            seed,
            max_new_tokens: self.max_new_tokens,
            stop_ids,
        }
    }
}

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

/// Generates one reply; `piece` gets its text as soon as characters are whole. The first `known` tokens of the
/// prompt are in the cache.
///
/// # Errors
/// Where the model cannot continue the prompt, or `piece` fails.
pub fn reply(
    model: &mut Model,
    cache: &mut KvCache,
    known: usize,
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
    let generated = generate_after(model, cache, known, prompt, sampling, &mut |id| {
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

//! Generation with a KV cache: greedy, or sampled as transformers samples.

use crate::rng::{Purpose, Rng};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::ops::ControlFlow;
use suasion_data::{Origin, Sample};
use suasion_engine::{Backend, Budget, KvCache, Model};

/// How tokens are chosen. The filters apply in transformers' order: temperature, top-k, top-p, min-p.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sampling {
    /// Draw from the distribution; otherwise take the likeliest token (of equals the lowest id).
    pub do_sample: bool,
    /// Logits are divided by it (1). 0 means greedy.
    pub temperature: f64,
    /// Keep the k likeliest tokens and their equals (0 = off).
    pub top_k: usize,
    /// Keep the smallest set of likeliest tokens whose probability reaches this (1 = off).
    pub top_p: f64,
    /// Keep the tokens that have at least this share of the likeliest one's probability (0 = off).
    pub min_p: f64,
    /// The seed of the draws (42).
    pub seed: u64,
    /// Most tokens to make (256), the stop token included.
    pub max_new_tokens: usize,
    /// Tokens that end the text.
    pub stop_ids: Vec<u32>,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling {
            do_sample: false,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: 42,
            max_new_tokens: 256,
            stop_ids: Vec::new(),
        }
    }
}

impl Sampling {
    /// Refuses values that mean nothing.
    pub fn validate(&self) -> Result<()> {
        let check = |key, value: f64, low: f64, high: f64, help: &str| {
            if (low..=high).contains(&value) {
                Ok(())
            } else {
                Err(Error::setting(key, format!("{value} is not possible"), help))
            }
        };
        check("temperature", self.temperature, 0.0, f64::MAX, "use a number of at least 0 (0 is greedy)")?;
        check("top_p", self.top_p, 0.0, 1.0, "use a number between 0 and 1 (1 is off)")?;
        check("min_p", self.min_p, 0.0, 1.0, "use a number between 0 and 1 (0 is off)")?;
        if self.max_new_tokens == 0 {
            return Err(Error::setting("max_new_tokens", "0 is not possible", "use at least 1"));
        }
        Ok(())
    }

    fn greedy(&self) -> bool {
        !self.do_sample || self.temperature == 0.0
    }
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stopped {
    /// By this stop token.
    Stop(u32),
    /// By `max_new_tokens`.
    MaxNewTokens,
    /// Because the model has no further positions.
    ContextFull,
    /// Because the caller said so.
    Callback,
}

/// A generated text.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Generated {
    /// The new ids, with the stop token where there was one.
    pub ids: Vec<u32>,
    /// Why it ended.
    pub stopped: Stopped,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
}

/// The tokens before a sample's first response: what the model is given at inference.
pub fn prompt_ids(sample: &Sample) -> &[u32] {
    let answer = |origin: &Origin| matches!(origin, Origin::Response { .. } | Origin::EndOfTurn { .. });
    let end = sample.origins.iter().position(answer).unwrap_or(sample.len());
    &sample.input_ids[..end]
}

/// What a model's arena must hold to generate after prompts of up to this many tokens.
pub fn budget(prompt_tokens: usize) -> Budget {
    Budget { tokens: prompt_tokens.max(1), targets: 1, train: false, recompute: false }
}

/// Continues `prompt`, token by token. Each new token goes to `on_token`, which may end the text; the stop token
/// does not. A model keeps every cache's memory as long as it lives: for many prompts use [`generate_with`].
pub fn generate<B: Backend>(
    model: &mut Model<B>,
    prompt: &[u32],
    sampling: &Sampling,
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<Generated> {
    check(model, prompt, sampling)?;
    let mut cache = model.cache(capacity(model, prompt.len(), sampling.max_new_tokens))?;
    generate_with(model, &mut cache, prompt, sampling, on_token)
}

/// The places that a cache needs for a prompt and its continuation: the last new token is never fed back, and a
/// model with learned positions has no more than those.
pub fn capacity<B: Backend>(model: &Model<B>, prompt_tokens: usize, max_new_tokens: usize) -> usize {
    let wanted = prompt_tokens.saturating_add(max_new_tokens).saturating_sub(1).max(1);
    model.architecture().position_limit().map_or(wanted, |limit| wanted.min(limit))
}

/// As [`generate`], over a cache that earlier prompts have used. Where the cache is full the text ends with
/// [`Stopped::ContextFull`].
pub fn generate_with<B: Backend>(
    model: &mut Model<B>,
    cache: &mut KvCache,
    prompt: &[u32],
    sampling: &Sampling,
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<Generated> {
    check(model, prompt, sampling)?;
    cache.truncate(0);
    let mut rng = Rng::new(sampling.seed, Purpose::Sampling, 0);
    let mut generated =
        Generated { ids: Vec::new(), stopped: Stopped::MaxNewTokens, prompt_tokens: prompt.len() };
    let mut logits = model.decode(cache, prompt)?;
    loop {
        let id = choose(&mut logits, sampling, &mut rng)?;
        generated.ids.push(id);
        if sampling.stop_ids.contains(&id) {
            generated.stopped = Stopped::Stop(id);
        } else if on_token(id).is_break() {
            generated.stopped = Stopped::Callback;
        } else if generated.ids.len() < sampling.max_new_tokens {
            if cache.len() < cache.capacity() {
                logits = model.decode(cache, &[id])?;
                continue;
            }
            generated.stopped = Stopped::ContextFull;
        }
        return Ok(generated);
    }
}

fn check<B: Backend>(model: &Model<B>, prompt: &[u32], sampling: &Sampling) -> Result<()> {
    sampling.validate()?;
    let vocab = model.architecture().vocab_size;
    let message = if prompt.is_empty() {
        "the prompt has no token to continue from".to_string()
    } else if let Some(id) = prompt.iter().find(|id| **id as usize >= vocab) {
        format!("token id {id} of the prompt is outside the model's vocabulary of {vocab}")
    } else if let Some(limit) = model.architecture().position_limit().filter(|limit| prompt.len() > *limit) {
        format!("the prompt has {} tokens, and the model has {limit} positions", prompt.len())
    } else {
        return Ok(());
    };
    Err(Error::Generate { message })
}

fn choose(logits: &mut [f32], sampling: &Sampling, rng: &mut Rng) -> Result<u32> {
    if let Some(value) = logits.iter().find(|logit| !logit.is_finite()) {
        return Err(Error::non_finite("a logit", f64::from(*value), Vec::new()));
    }
    if sampling.greedy() {
        return Ok(argmax(logits));
    }
    filter(logits, sampling);
    Ok(draw(logits, rng.unit()))
}

/// The likeliest token; of equals the lowest id.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = id;
        }
    }
    best as u32
}

/// The token at `point` (in `[0, 1)`) of the cumulative distribution that the logits give, in the order of ids.
pub fn draw(logits: &[f32], point: f64) -> u32 {
    let weights = exponentials(logits);
    let mut rest = point * weights.iter().sum::<f64>();
    let mut last = 0;
    for (id, weight) in weights.iter().enumerate().filter(|(_, weight)| **weight > 0.0) {
        last = id;
        if rest < *weight {
            break;
        }
        rest -= weight;
    }
    last as u32
}

/// Applies temperature, top-k, top-p and min-p in place, as transformers' logits warpers do; what is removed
/// becomes `-inf`. At least one token stays.
pub fn filter(logits: &mut [f32], sampling: &Sampling) {
    if sampling.temperature != 1.0 && sampling.temperature != 0.0 {
        let temperature = sampling.temperature as f32;
        logits.iter_mut().for_each(|logit| *logit /= temperature);
    }
    if sampling.top_k > 0 && sampling.top_k < logits.len() {
        let mut sorted = logits.to_vec();
        let (_, threshold, _) = sorted.select_nth_unstable_by(sampling.top_k - 1, |a, b| b.total_cmp(a));
        let threshold = *threshold;
        remove(logits, |_, logit| logit < threshold);
    }
    if sampling.top_p < 1.0 {
        // Ascending, and of equals the lowest id last, so that it is the one that stays.
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_unstable_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a)));
        let weights = exponentials(logits);
        let total: f64 = weights.iter().sum();
        let (likeliest, others) = order.split_last().expect("a vocabulary is not empty");
        debug_assert!(logits[*likeliest] > f32::NEG_INFINITY);
        let mut cumulative = 0.0;
        for &id in others {
            cumulative += weights[id] / total;
            if cumulative <= 1.0 - sampling.top_p {
                logits[id] = f32::NEG_INFINITY;
            }
        }
    }
    if sampling.min_p > 0.0 {
        // The likeliest token's exponential is 1, so the others' are their shares of its probability.
        let weights = exponentials(logits);
        remove(logits, |id, _| weights[id] < sampling.min_p);
    }
}

fn remove(logits: &mut [f32], removed: impl Fn(usize, f32) -> bool) {
    for (id, logit) in logits.iter_mut().enumerate() {
        if removed(id, *logit) {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// `exp(logit − largest logit)`: probabilities but for their sum.
fn exponentials(logits: &[f32]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    logits.iter().map(|&logit| (f64::from(logit) - f64::from(largest)).exp()).collect()
}

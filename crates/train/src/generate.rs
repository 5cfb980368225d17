//! Generation with a KV cache: greedy, or by sampling as in transformers.

use crate::rng::{Purpose, Rng};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::ops::ControlFlow;
use suasion_data::{Origin, Sample};
use suasion_engine::{Backend, Budget, KvCache, Model};

/// How tokens are chosen. The filters apply in the order of transformers: temperature, top-k, top-p, min-p.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sampling {
    /// Sample from the distribution; otherwise take the likeliest token (the lowest id among equals).
    pub do_sample: bool,
    /// Divides the logits (1); 0 is greedy.
    pub temperature: f64,
    /// Keep the k likeliest tokens, and those as likely as the k-th (0, off).
    pub top_k: usize,
    /// Keep the smallest set of likeliest tokens whose probabilities sum to at least this (1, off).
    pub top_p: f64,
    /// Keep the tokens with at least this share of the likeliest token's probability (0, off).
    pub min_p: f64,
    /// The seed of the samples (42).
    pub seed: u64,
    /// The maximum number of new tokens (256), including the stop token.
    pub max_new_tokens: usize,
    /// Tokens that end the generation.
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
    /// Refuses values that cannot work.
    pub fn validate(&self) -> Result<()> {
        let check = |key, value: f64, high: f64, bounds: &str| match (0.0..=high).contains(&value) {
            true => Ok(()),
            false => Err(Error::out_of_bounds(key, value, bounds)),
        };
        check("temperature", self.temperature, f64::MAX, "at least 0 (0 is greedy)")?;
        check("top_p", self.top_p, 1.0, "between 0 and 1 (1 is off)")?;
        check("min_p", self.min_p, 1.0, "between 0 and 1 (0 is off)")?;
        match self.max_new_tokens {
            0 => Err(Error::out_of_bounds("max_new_tokens", 0, "at least 1")),
            _ => Ok(()),
        }
    }

    fn greedy(&self) -> bool {
        !self.do_sample || self.temperature == 0.0
    }
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stopped {
    /// This stop token.
    Stop(u32),
    /// `max_new_tokens` was reached.
    MaxNewTokens,
    /// The cache is full, or the model has no further positions.
    ContextFull,
    /// The callback ended it.
    Callback,
}

/// Generated tokens.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Generated {
    /// The new ids, including the stop token if there was one.
    pub ids: Vec<u32>,
    /// Why it ended.
    pub stopped: Stopped,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
}

/// The tokens before a sample's first response: the prompt at inference.
pub fn prompt_ids(sample: &Sample) -> &[u32] {
    let answer = |origin: &Origin| matches!(origin, Origin::Response { .. } | Origin::EndOfTurn { .. });
    let end = sample.origins.iter().position(answer).unwrap_or(sample.len());
    &sample.input_ids[..end]
}

/// The budget of a model that generates after prompts of up to this many tokens.
pub fn budget(prompt_tokens: usize) -> Budget {
    Budget { tokens: prompt_tokens.max(1), targets: 1, train: false, recompute: false }
}

/// Generates a continuation of `prompt`. Each new token except the stop token is passed to `on_token`, which may
/// end the generation. For several prompts, [`generate_with`] reuses one cache.
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

/// The capacity that a cache needs for a prompt and its continuation. The last new token is never fed back,
/// and a model with learned positions cannot use more than those.
pub fn capacity<B: Backend>(model: &Model<B>, prompt_tokens: usize, max_new_tokens: usize) -> usize {
    let wanted = prompt_tokens.saturating_add(max_new_tokens).saturating_sub(1).max(1);
    model.architecture().position_limit().map_or(wanted, |limit| wanted.min(limit))
}

/// As [`generate`], with a cache that is cleared and reused. The generation ends with
/// [`Stopped::ContextFull`] when the cache is full.
pub fn generate_with<B: Backend>(
    model: &mut Model<B>,
    cache: &mut KvCache,
    prompt: &[u32],
    sampling: &Sampling,
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<Generated> {
    generate_after(model, cache, 0, prompt, sampling, on_token)
}

/// As [`generate_with`], for a cache whose first `known` tokens are the first of `prompt`: a conversation grows
/// by a turn, and what came before is not computed again. At least one token of the prompt is.
pub fn generate_after<B: Backend>(
    model: &mut Model<B>,
    cache: &mut KvCache,
    known: usize,
    prompt: &[u32],
    sampling: &Sampling,
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<Generated> {
    check(model, prompt, sampling)?;
    cache.truncate(known.min(prompt.len() - 1));
    let mut rng = Rng::new(sampling.seed, Purpose::Sampling, 0);
    let mut generated =
        Generated { ids: Vec::new(), stopped: Stopped::MaxNewTokens, prompt_tokens: prompt.len() };
    let mut logits = model.decode(cache, &prompt[cache.len()..])?;
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
    if prompt.is_empty() {
        return Err(Error::EmptyPrompt);
    }
    if let Some(position) = prompt.iter().position(|id| *id as usize >= vocab) {
        return Err(Error::PromptVocabulary { token: prompt[position], position, vocab });
    }
    match model.architecture().position_limit() {
        Some(limit) if prompt.len() > limit => Err(Error::PromptTooLong { tokens: prompt.len(), limit }),
        _ => Ok(()),
    }
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

/// The likeliest token; the lowest id among equals.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = id;
        }
    }
    best as u32
}

/// The token at `point` (in `[0, 1)`) of the cumulative distribution of the logits, in the order of ids.
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

/// Applies temperature, top-k, top-p and min-p in place, as the logits warpers of transformers do. Removed
/// tokens become `-inf`; at least one token stays.
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
        // Ascending, and among equals the lowest id last, because the last one always stays.
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
        // The exponential of the likeliest token is 1, so the others are shares of its probability.
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

/// `exp(logit − largest logit)`: unnormalised probabilities.
fn exponentials(logits: &[f32]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    logits.iter().map(|&logit| (f64::from(logit) - f64::from(largest)).exp()).collect()
}

//! From logits to the next token: transformers' processors, in its order.

use crate::rng::Rng;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// How tokens are chosen, under transformers' names and in its order: the penalty on repetition, the ban of repeated
/// n-grams, and where tokens are sampled temperature, top-k, top-p and min-p.
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
    /// Divides the positive logits of tokens that are there already, prompt included, and multiplies the negative ones (1,
    /// off).
    pub repetition_penalty: f64,
    /// No n-gram of this size occurs twice, prompt included (0, off).
    pub no_repeat_ngram_size: usize,
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
            repetition_penalty: 1.0,
            no_repeat_ngram_size: 0,
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
        if self.repetition_penalty == 0.0 {
            return Err(Error::out_of_bounds("repetition_penalty", 0, "above 0 (1 is off)"));
        }
        check("repetition_penalty", self.repetition_penalty, f64::MAX, "above 0 (1 is off)")?;
        match self.max_new_tokens {
            0 => Err(Error::out_of_bounds("max_new_tokens", 0, "at least 1")),
            _ => Ok(()),
        }
    }

    pub(crate) fn greedy(&self) -> bool {
        !self.do_sample || self.temperature == 0.0
    }
}

/// The next token after `context`, the prompt and what was generated.
pub(crate) fn choose(logits: &mut [f32], context: &[u32], sampling: &Sampling, rng: &mut Rng) -> Result<u32> {
    if let Some(value) = logits.iter().find(|logit| !logit.is_finite()) {
        return Err(Error::non_finite("a logit", f64::from(*value), Vec::new()));
    }
    penalise(logits, context, sampling);
    if sampling.greedy() {
        return Ok(argmax(logits));
    }
    filter(logits, sampling);
    Ok(draw(logits, rng.unit()))
}

/// Applies the penalty on repetition and the ban of repeated n-grams in place, as transformers' processors of these
/// names do.
pub fn penalise(logits: &mut [f32], context: &[u32], sampling: &Sampling) {
    if sampling.repetition_penalty != 1.0 {
        let penalty = sampling.repetition_penalty as f32;
        let seen: BTreeSet<u32> = context.iter().copied().collect();
        for id in seen {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
            }
        }
    }
    let n = sampling.no_repeat_ngram_size;
    if n > 0 && context.len() + 1 >= n {
        let end = &context[context.len() + 1 - n..];
        for gram in context.windows(n).filter(|gram| gram[..n - 1] == *end) {
            if let Some(logit) = logits.get_mut(gram[n - 1] as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
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

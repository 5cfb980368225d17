//! Generation with a KV cache: greedy, or by sampling as in transformers; one row, or several at once.

use crate::logits::{Sampling, choose};
use crate::rng::{Purpose, Rng};
use crate::{Error, Result};
use serde::Serialize;
use std::ops::ControlFlow;
use suasion_data::{Origin, Sample};
use suasion_engine::{Backend, Budget, KvCache, Model};

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

/// The budget of a model that generates after prompts of up to this many tokens, one at a time.
pub fn budget(prompt_tokens: usize) -> Budget {
    budget_of(prompt_tokens, 1)
}

/// As [`budget`], for so many rows at once.
pub fn budget_of(prompt_tokens: usize, rows: usize) -> Budget {
    Budget { tokens: prompt_tokens.max(rows).max(1), targets: rows.max(1), train: false, recompute: false }
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
/// by a turn, and the earlier part is not recomputed. At least one token of the prompt is.
pub fn generate_after<B: Backend>(
    model: &mut Model<B>,
    cache: &mut KvCache,
    known: usize,
    prompt: &[u32],
    sampling: &Sampling,
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<Generated> {
    let mut on_token = |_, id| on_token(id);
    let mut row = Row::begin(model, cache, known, 0, Request { prompt, stream: 0 }, sampling)?;
    while row.take(cache, sampling, &mut on_token)? {
        row.logits = model.decode(cache, &[row.last()])?;
    }
    Ok(row.generated)
}

/// A prompt to continue.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Its tokens.
    pub prompt: &'a [u32],
    /// Which of the seed's random streams its samples are drawn from. With one per row, no row depends on others.
    pub stream: u64,
}

/// Generates continuations of several prompts, as many at once as the cache has sequences; the model needs
/// [`budget_of`] so many. What is generated for a prompt does not depend on the others. `on_token` gets the index of
/// the prompt with each new token and may end this prompt's generation; `done` gets each finished one, in the order in
/// which they finish, and may end all.
pub fn generate_batch<B: Backend>(
    model: &mut Model<B>,
    cache: &mut KvCache,
    requests: &[Request<'_>],
    sampling: &Sampling,
    on_token: &mut dyn FnMut(usize, u32) -> ControlFlow<()>,
    done: &mut dyn FnMut(usize, Generated) -> ControlFlow<()>,
) -> Result<()> {
    let mut waiting = requests.iter().enumerate();
    let mut free: Vec<usize> = (0..cache.slots()).rev().collect();
    let mut rows: Vec<Row> = Vec::with_capacity(cache.slots());
    loop {
        while let Some(slot) = free.last().copied() {
            let Some((index, request)) = waiting.next() else { break };
            cache.truncate_slot(slot, 0);
            rows.push(Row { index, ..Row::begin(model, cache, 0, slot, *request, sampling)? });
            free.pop();
        }
        if rows.is_empty() {
            return Ok(());
        }
        let mut going = Vec::with_capacity(rows.len());
        for mut row in rows {
            if row.take(cache, sampling, on_token)? {
                going.push(row);
                continue;
            }
            free.push(row.slot);
            if done(row.index, row.generated).is_break() {
                return Ok(());
            }
        }
        rows = going;
        let next: Vec<(usize, u32)> = rows.iter().map(|row| (row.slot, row.last())).collect();
        for (row, logits) in rows.iter_mut().zip(model.decode_batch(cache, &next)?) {
            row.logits = logits;
        }
    }
}

/// A generation under way.
struct Row {
    index: usize,
    slot: usize,
    rng: Rng,
    /// The prompt and what was generated.
    context: Vec<u32>,
    logits: Vec<f32>,
    generated: Generated,
}

impl Row {
    /// Reads the prompt into a sequence of the cache, whose first `known` tokens are the prompt's first.
    fn begin<B: Backend>(
        model: &mut Model<B>,
        cache: &mut KvCache,
        known: usize,
        slot: usize,
        request: Request<'_>,
        sampling: &Sampling,
    ) -> Result<Row> {
        let prompt = request.prompt;
        check(model, prompt, sampling)?;
        cache.truncate_slot(slot, known.min(prompt.len() - 1));
        let logits = model.decode_slot(cache, slot, &prompt[cache.len_of(slot)..])?;
        Ok(Row {
            index: 0,
            slot,
            rng: Rng::new(sampling.seed, Purpose::Sampling, request.stream),
            context: prompt.to_vec(),
            logits,
            generated: Generated {
                ids: Vec::new(),
                stopped: Stopped::MaxNewTokens,
                prompt_tokens: prompt.len(),
            },
        })
    }

    /// Takes the next token; false if it is the last.
    fn take(
        &mut self,
        cache: &KvCache,
        sampling: &Sampling,
        on_token: &mut dyn FnMut(usize, u32) -> ControlFlow<()>,
    ) -> Result<bool> {
        let id = choose(&mut self.logits, &self.context, sampling, &mut self.rng)?;
        self.context.push(id);
        let generated = &mut self.generated;
        generated.ids.push(id);
        if sampling.stop_ids.contains(&id) {
            generated.stopped = Stopped::Stop(id);
        } else if on_token(self.index, id).is_break() {
            generated.stopped = Stopped::Callback;
        } else if generated.ids.len() < sampling.max_new_tokens {
            if cache.len_of(self.slot) < cache.capacity() {
                return Ok(true);
            }
            generated.stopped = Stopped::ContextFull;
        }
        Ok(false)
    }

    fn last(&self) -> u32 {
        self.context[self.context.len() - 1]
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

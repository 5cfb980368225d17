//! Generation: one sequence at a time, its keys and values kept.

use super::Model;
use super::pass::{Keys, Rows};
use crate::kernels::{Attention, Backend, Span, View};
use crate::params::LinearAt;
use crate::{Error, Result};

/// Keys and values of one sequence in every layer.
#[derive(Debug)]
pub struct KvCache {
    /// `[capacity, 2·kv_heads·head_dim]` per layer.
    layers: Vec<View>,
    capacity: usize,
    len: usize,
}

impl KvCache {
    /// Tokens seen so far.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True before the first token.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Tokens that fit.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Forgets everything after the first `len` tokens, so that the memory serves the next sequence.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }
}

impl<B: Backend> Model<B> {
    /// A cache for a sequence of up to `capacity` tokens. Its memory belongs to the model and is not given
    /// back before the model is; use [`KvCache::truncate`] to start another sequence.
    ///
    /// # Errors
    /// [`Error::Memory`] where there is not enough.
    pub fn cache(&mut self, capacity: usize) -> Result<KvCache> {
        let width = self.arch.heads.kv_width();
        // The rotation table for the whole cache at once, not again for each token.
        self.cover(capacity)?;
        let layers = (0..self.arch.layers).map(|_| self.backend.allocate(capacity * width));
        Ok(KvCache { layers: layers.collect::<Result<_>>()?, capacity, len: 0 })
    }

    /// Appends `ids` to the cached sequence; the logits `[vocab]` after the last of them.
    ///
    /// # Errors
    /// [`Error::Batch`] when there is nothing to append, the cache is full, an id is outside the vocabulary, or
    /// a learned position table ends.
    pub fn decode(&mut self, cache: &mut KvCache, ids: &[u32]) -> Result<Vec<f32>> {
        let fail = |message| Err(Error::Batch { message });
        let end = cache.len + ids.len();
        if ids.is_empty() {
            return fail("nothing to append to the sequence".into());
        }
        if end > cache.capacity {
            return fail(format!("{end} tokens do not fit a cache of {}", cache.capacity));
        }
        if let Some(id) = ids.iter().find(|id| **id as usize >= self.arch.vocab_size) {
            return fail(format!(
                "token id {id} is outside the model's vocabulary of {}",
                self.arch.vocab_size
            ));
        }
        if let Some(limit) = self.arch.position_limit().filter(|limit| end > *limit) {
            return fail(format!("{end} tokens are more than the model's {limit} learned positions"));
        }
        for ids in ids.chunks(self.budget.tokens) {
            self.append(cache, ids);
        }
        Ok(self.last_logits())
    }

    /// Runs the rows of `ids` through all layers, the last layer for the last row only.
    fn append(&mut self, cache: &mut KvCache, ids: &[u32]) {
        let (start, end) = (cache.len, cache.len + ids.len());
        let positions: Vec<u32> = (start as u32..end as u32).collect();
        let attention = |queries: usize| Attention {
            rows: positions[positions.len() - queries..].to_vec(),
            spans: vec![Span { prefix: 0..0, own: 0..end, queries: 0..queries }],
            groups: vec![vec![0]],
        };
        let (everyone, last_one) = (attention(ids.len()), attention(1));
        let last_row = [ids.len() as u32 - 1];
        let full =
            Rows { positions: &positions, asking: None, asking_positions: &positions, attention: &everyone };
        let last = Rows {
            positions: &positions,
            asking: Some(&last_row),
            asking_positions: &positions[ids.len() - 1..],
            attention: &last_one,
        };
        let width = self.arch.heads.kv_width();
        self.embed(ids, &positions);
        for (n, kv) in cache.layers.iter().enumerate() {
            let rows = if n + 1 < cache.layers.len() { &full } else { &last };
            let keys = Keys { new: kv.rows(start..end, width), all: kv.top(end, width) };
            self.layer_forward(n, rows, keys, self.output(n, rows));
        }
        cache.len = end;
    }

    /// Final norm and head of the one row that [`Model::append`] left.
    fn last_logits(&mut self) -> Vec<f32> {
        let vocab = self.arch.vocab_size;
        let (h, ..) = self.final_norm(1);
        let logits = self.arena.logits.top(1, vocab);
        self.linear(logits, false, h, &LinearAt { w: self.layout.head.clone(), b: None }, 1);
        let mut values = vec![0.0; vocab];
        self.backend.read(logits, &mut values);
        values
    }
}

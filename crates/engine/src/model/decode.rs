//! Generation: one sequence at a time, its keys and values cached.

use super::Model;
use super::block::{Keys, Rows};
use crate::kernels::{AttentionPlan, AttentionRange, Backend, Buffer};
use crate::{Error, Result};
use std::sync::Arc;

/// Keys and values of one sequence in every layer of one model. Its memory is freed when it is dropped.
#[derive(Debug)]
pub struct KvCache {
    /// `[capacity, 2·kv_heads·head_dim]` per layer.
    layers: Vec<Buffer>,
    /// The model that it belongs to, by its parameters' buffer.
    model: crate::kernels::View,
    capacity: usize,
    /// The tokens, for sequences whose rotation depends on their length.
    ids: Vec<u32>,
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
    /// A cache for a sequence of up to `capacity` tokens.
    ///
    /// # Errors
    /// [`Error::Memory`] where there is not enough.
    pub fn cache(&mut self, capacity: usize) -> Result<KvCache> {
        let arch = Arc::clone(&self.arch);
        let widths = arch.blocks.iter().map(|block| block.attention.heads.kv_width());
        let layers = widths.map(|width| self.backend.allocate(capacity.saturating_mul(width)));
        let layers = layers.collect::<Result<_>>()?;
        // The rotation tables for the whole cache at once, not again for each token.
        self.cover(capacity, &[])?;
        Ok(KvCache { layers, model: self.parameters.view(), capacity, ids: Vec::new(), len: 0 })
    }

    /// Appends `ids` to the cached sequence; the logits `[vocab]` after the last of them.
    ///
    /// # Errors
    /// [`Error::Batch`] when the cache belongs to another model, there is nothing to append, the cache is
    /// full, an id is outside the vocabulary, or a learned position table ends.
    pub fn decode(&mut self, cache: &mut KvCache, ids: &[u32]) -> Result<Vec<f32>> {
        let fail = |message| Err(Error::Batch { message });
        if cache.model != self.parameters.view() {
            return fail("the cache belongs to another model".into());
        }
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
        cache.ids.truncate(cache.len);
        cache.ids.extend(ids);
        let variants = |length: usize| self.ropes.iter().map(move |rope| rope.rope.variant(length));
        if !variants(cache.len).eq(variants(end)) {
            // All keys are rotated otherwise now: compute them again.
            cache.len = 0;
        }
        self.cover(end, &[end])?;
        let ids = cache.ids[cache.len..].to_vec();
        for ids in ids.chunks(self.budget.tokens) {
            self.append(cache, ids, end)?;
        }
        self.last_logits()
    }

    /// Runs the rows of `ids` through all layers, the last layer for the last row only. The sequence will have
    /// `length` tokens.
    fn append(&mut self, cache: &mut KvCache, ids: &[u32], length: usize) -> Result<()> {
        let (start, end) = (cache.len, cache.len + ids.len());
        let positions: Vec<u32> = (start as u32..end as u32).collect();
        let mut attention = |queries: usize| {
            self.backend.upload_plan(AttentionPlan {
                rows: positions[positions.len() - queries..].to_vec(),
                ranges: vec![AttentionRange { prefix: 0..0, own: 0..end, queries: 0..queries }],
                groups: vec![vec![0]],
            })
        };
        let (all_plan, last_plan) = (attention(ids.len())?, attention(1)?);
        let rope_rows = self.rope_rows(&positions, &vec![length; ids.len()], &[ids.len() as u32 - 1])?;
        let position_list = self.backend.upload_indices(&positions)?;
        let last_row = self.backend.upload_indices(&[ids.len() as u32 - 1])?;
        let positions = position_list.view();
        let full = Rows {
            positions,
            query_rows: None,
            query_positions: positions,
            attention: &all_plan,
            rope_rows: &rope_rows,
        };
        let last = Rows {
            positions,
            query_rows: Some(last_row.view()),
            query_positions: positions.part(ids.len() - 1..ids.len()),
            attention: &last_plan,
            rope_rows: &rope_rows,
        };
        let id_list = self.backend.upload_indices(ids)?;
        self.embed(id_list.view(), positions, None)?;
        let arch = Arc::clone(&self.arch);
        for (n, (buffer, block)) in cache.layers.iter().zip(&arch.blocks).enumerate() {
            let rows = if n + 1 < cache.layers.len() { &full } else { &last };
            let kv = buffer.matrix(cache.capacity, block.attention.heads.kv_width());
            let keys = Keys { new: kv.row_range(start..end), all: kv.top(end) };
            self.block_forward(n, rows, keys, self.output(n, rows))?;
        }
        cache.len = end;
        Ok(())
    }

    /// Final norm and head of the one row that [`Model::append`] left.
    fn last_logits(&mut self) -> Result<Vec<f32>> {
        let (h, ..) = self.final_norm(1)?;
        let logits = self.arena.logits.top(1);
        self.backend.linear(logits, false, h, self.slot_view(&self.map.head), None)?;
        let mut values = vec![0.0; self.arch.vocab_size];
        self.backend.read(logits, &mut values)?;
        self.arch.head.finish(&mut values);
        Ok(values)
    }
}

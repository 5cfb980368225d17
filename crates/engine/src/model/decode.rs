//! Generation with cached keys and values.

use super::Model;
use super::block::{Keys, Rows};
use crate::kernels::{AttentionPlan, AttentionRange, Backend, Buffer, View};
use crate::{Error, Result};
use std::sync::Arc;

/// Keys and values of one or several sequences, in every layer of one model. Its memory is freed when it is dropped.
#[derive(Debug)]
pub struct KvCache {
    /// `[slots·capacity + rows, 2·kv_heads·head_dim]` per layer: the sequences one after the other, then, with several
    /// sequences, space for one new row of each.
    layers: Vec<Buffer>,
    /// The model that it belongs to, identified by its parameters' buffer.
    model: View,
    /// Tokens that fit into each sequence.
    capacity: usize,
    slots: Vec<Slot>,
}

/// A sequence.
#[derive(Clone, Debug, Default)]
struct Slot {
    /// The tokens, kept for models whose rotation depends on the sequence length.
    ids: Vec<u32>,
    len: usize,
}

impl KvCache {
    /// Number of cached tokens of the first sequence.
    pub fn len(&self) -> usize {
        self.slots[0].len
    }

    /// True before the first token.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens that fit into each sequence.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Number of sequences.
    pub fn slots(&self) -> usize {
        self.slots.len()
    }

    /// Number of cached tokens of a sequence.
    pub fn len_of(&self, slot: usize) -> usize {
        self.slots[slot].len
    }

    /// Drops everything after the first `len` tokens of the first sequence, so that the memory can be reused.
    pub fn truncate(&mut self, len: usize) {
        self.truncate_slot(0, len);
    }

    /// As [`KvCache::truncate`], of any sequence.
    pub fn truncate_slot(&mut self, slot: usize, len: usize) {
        let slot = &mut self.slots[slot];
        slot.len = slot.len.min(len);
    }

    /// Rows of each layer's buffer.
    fn rows(slots: usize, capacity: usize) -> usize {
        let new = if slots > 1 { slots } else { 0 };
        slots.saturating_mul(capacity).saturating_add(new)
    }
}

impl<B: Backend> Model<B> {
    /// A cache for a sequence of up to `capacity` tokens.
    ///
    /// # Errors
    /// [`Error::Memory`] if there is not enough memory.
    pub fn cache(&mut self, capacity: usize) -> Result<KvCache> {
        self.cache_of(1, capacity)
    }

    /// A cache for several sequences of up to `capacity` tokens each.
    ///
    /// # Errors
    /// [`Error::Memory`] if there is not enough memory, [`Error::Batch`] without a sequence.
    pub fn cache_of(&mut self, slots: usize, capacity: usize) -> Result<KvCache> {
        if slots == 0 {
            return Err(Error::Batch { message: "a cache of no sequence".into() });
        }
        let arch = Arc::clone(&self.arch);
        let rows = KvCache::rows(slots, capacity);
        let widths = arch.blocks.iter().map(|block| block.attention.heads.kv_width());
        let layers = widths.map(|width| self.backend.allocate(rows.saturating_mul(width)));
        let layers = layers.collect::<Result<_>>()?;
        // Builds the rotation tables for the whole cache once instead of growing them token by token.
        self.cover(capacity, &[])?;
        Ok(KvCache { layers, model: self.parameters.view(), capacity, slots: vec![Slot::default(); slots] })
    }

    /// Appends `ids` to the first cached sequence and returns the logits `[vocab]` after the last of them.
    ///
    /// # Errors
    /// [`Error::Batch`] when the cache belongs to another model, there is nothing to append, the cache is
    /// full, an id is outside the vocabulary, or a position is beyond a learned position table.
    pub fn decode(&mut self, cache: &mut KvCache, ids: &[u32]) -> Result<Vec<f32>> {
        self.decode_slot(cache, 0, ids)
    }

    /// As [`Model::decode`], for any of the sequences.
    ///
    /// # Errors
    /// As [`Model::decode`].
    pub fn decode_slot(&mut self, cache: &mut KvCache, slot: usize, ids: &[u32]) -> Result<Vec<f32>> {
        let end = self.check_decode(cache, slot, ids)?;
        self.refresh_dora()?;
        let at = &mut cache.slots[slot];
        at.ids.truncate(at.len);
        at.ids.extend(ids);
        if self.turns(at.len, end) {
            // The rotation of all keys has changed: compute them again.
            at.len = 0;
        }
        self.cover(end, &[end])?;
        let ids = at.ids[at.len..].to_vec();
        for ids in ids.chunks(self.budget.tokens) {
            self.append(cache, slot, ids, end)?;
        }
        self.logits(1).map(|mut rows| rows.remove(0))
    }

    /// Appends one token to each of several sequences, in one pass over the weights; returns the logits `[vocab]` of
    /// each. The model's budget must allow as many tokens and targets.
    ///
    /// # Errors
    /// As [`Model::decode`], and if a sequence occurs twice.
    pub fn decode_batch(&mut self, cache: &mut KvCache, next: &[(usize, u32)]) -> Result<Vec<Vec<f32>>> {
        let mut ends = Vec::with_capacity(next.len());
        for (i, (slot, id)) in next.iter().enumerate() {
            ends.push(self.check_decode(cache, *slot, &[*id])?);
            if next[..i].iter().any(|(other, _)| other == slot) {
                return Err(Error::Batch { message: format!("sequence {slot} is named twice") });
            }
        }
        let fits = next.len() <= self.budget.tokens.min(self.budget.targets);
        let turn = next.iter().zip(&ends).any(|((slot, _), end)| self.turns(cache.slots[*slot].len, *end));
        if next.len() < 2 || !fits || turn {
            return next.iter().map(|(slot, id)| self.decode_slot(cache, *slot, &[*id])).collect();
        }
        self.refresh_dora()?;
        self.cover(ends.iter().copied().max().unwrap_or(0), &ends)?;
        self.append_each(cache, next, &ends)?;
        self.logits(next.len())
    }

    /// The length of a sequence after appending `ids`; an error if they cannot be appended.
    fn check_decode(&self, cache: &KvCache, slot: usize, ids: &[u32]) -> Result<usize> {
        let fail = |message| Err(Error::Batch { message });
        if cache.model != self.parameters.view() {
            return fail("the cache belongs to another model".into());
        }
        let Some(slot) = cache.slots.get(slot) else {
            return fail(format!("sequence {slot} of a cache of {}", cache.slots.len()));
        };
        let end = slot.len + ids.len();
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
        Ok(end)
    }

    /// True if a sequence of `to` tokens is rotated differently from one of `from`.
    fn turns(&self, from: usize, to: usize) -> bool {
        self.ropes.iter().any(|rope| rope.rope.variant(from) != rope.rope.variant(to))
    }

    /// Runs the rows of `ids` through all layers, the last layer for the last row only. The sequence will have
    /// `length` tokens.
    fn append(&mut self, cache: &mut KvCache, slot: usize, ids: &[u32], length: usize) -> Result<()> {
        let (start, end) = (cache.slots[slot].len, cache.slots[slot].len + ids.len());
        let first = slot * cache.capacity;
        let positions: Vec<u32> = (start as u32..end as u32).collect();
        let mut attention = |queries: usize| {
            let of = &positions[positions.len() - queries..];
            self.backend.upload_plan(AttentionPlan {
                rows: of.iter().map(|position| first as u32 + position).collect(),
                ranges: vec![AttentionRange { prefix: 0..0, own: first..first + end, queries: 0..queries }],
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
        let rows = KvCache::rows(cache.slots.len(), cache.capacity);
        for (n, (buffer, block)) in cache.layers.iter().zip(&arch.blocks).enumerate() {
            let kv = buffer.matrix(rows, block.attention.heads.kv_width());
            let new = kv.row_range(first + start..first + end);
            let keys = Keys { new, places: &[], all: kv.top(first + end) };
            let rows = if n + 1 < cache.layers.len() { &full } else { &last };
            self.block_forward(n, rows, keys, self.output(n, rows))?;
        }
        cache.slots[slot].len = end;
        Ok(())
    }

    /// Runs one row of each of several sequences through all layers. They will have `ends` tokens.
    fn append_each(&mut self, cache: &mut KvCache, next: &[(usize, u32)], ends: &[usize]) -> Result<()> {
        let capacity = cache.capacity;
        let positions: Vec<u32> = ends.iter().map(|end| *end as u32 - 1).collect();
        let count = next.len();
        let at = |i: usize| next[i].0 * capacity + ends[i] - 1;
        let plan = self.backend.upload_plan(AttentionPlan {
            rows: (0..count).map(|i| at(i) as u32).collect(),
            ranges: (0..count)
                .map(|i| AttentionRange {
                    prefix: 0..0,
                    own: next[i].0 * capacity..at(i) + 1,
                    queries: i..i + 1,
                })
                .collect(),
            groups: (0..count).map(|i| vec![i]).collect(),
        })?;
        let all: Vec<u32> = (0..count as u32).collect();
        let rope_rows = self.rope_rows(&positions, ends, &all)?;
        let position_list = self.backend.upload_indices(&positions)?;
        let (positions, row_list) = (position_list.view(), self.backend.upload_indices(&all)?);
        let id_list = self.backend.upload_indices(&next.iter().map(|(_, id)| *id).collect::<Vec<_>>())?;
        self.embed(id_list.view(), positions, None)?;
        let arch = Arc::clone(&self.arch);
        let rows = KvCache::rows(cache.slots.len(), capacity);
        for (n, (buffer, block)) in cache.layers.iter().zip(&arch.blocks).enumerate() {
            let kv = buffer.matrix(rows, block.attention.heads.kv_width());
            let new = kv.row_range(rows - cache.slots.len()..rows - cache.slots.len() + count);
            let places: Vec<View> = (0..count).map(|i| kv.row_range(at(i)..at(i) + 1)).collect();
            let keys = Keys { new, places: &places, all: kv.top(cache.slots.len() * capacity) };
            let rows = Rows {
                positions,
                query_rows: (n + 1 == cache.layers.len()).then_some(row_list.view()),
                query_positions: positions,
                attention: &plan,
                rope_rows: &rope_rows,
            };
            self.block_forward(n, &rows, keys, self.output(n, &rows))?;
        }
        for ((slot, id), end) in next.iter().zip(ends) {
            let slot = &mut cache.slots[*slot];
            slot.ids.truncate(slot.len);
            slot.ids.push(*id);
            slot.len = *end;
        }
        Ok(())
    }

    /// Final norm and head of the first `count` output rows of the last layer.
    fn logits(&mut self, count: usize) -> Result<Vec<Vec<f32>>> {
        let (h, ..) = self.final_norm(count)?;
        let map = Arc::clone(&self.map);
        let mut all = Vec::with_capacity(count);
        for start in (0..count).step_by(self.arena.chunk) {
            let rows = start..count.min(start + self.arena.chunk);
            let logits = self.arena.logits.top(rows.len());
            self.linear(logits, false, h.row_range(rows.clone()), &map.head)?;
            let mut values = vec![0.0; rows.len() * self.arch.vocab_size];
            self.backend.read(logits, &mut values)?;
            all.extend(values.chunks(self.arch.vocab_size).map(|row| {
                let mut row = row.to_vec();
                self.arch.head.finish(&mut row);
                row
            }));
        }
        Ok(all)
    }
}

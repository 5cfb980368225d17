//! The input of a step: tokens without padding, the boundaries that attention respects, and the targets of
//! the loss.

use crate::kernels::{AttentionPlan, AttentionRange};
use crate::{Error, Result};
use std::borrow::Cow;
use std::ops::Range;

/// One term of the loss: `weight · nll(id | hidden row)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    /// Row of the batch whose hidden state predicts the token.
    pub row: u32,
    /// The token to predict.
    pub id: u32,
    /// Weight in the loss.
    pub weight: f32,
}

/// A range of tokens that attention keeps separate. A token attends to the whole prefix, and to its own range up to and
/// including itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Rows of the segment.
    pub own: Range<u32>,
    /// Rows of an earlier segment that all tokens of this one attend to (a shared prompt); empty if there are none.
    pub prefix: Range<u32>,
}

/// A micro-batch: one flat buffer of tokens without padding.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Token ids, `[tokens]`.
    pub ids: Vec<u32>,
    /// Position of each token, `[tokens]`: restarts with each sample, continues after a shared prefix.
    pub positions: Vec<u32>,
    /// Segments that tile `0..tokens` in order.
    pub segments: Vec<Segment>,
    /// Terms of the loss, in any order; a row may have several.
    pub targets: Vec<Target>,
}

impl Batch {
    /// Appends a sample that attends only to itself. `targets` are `(position, id, weight)` relative to the sample.
    pub fn push(&mut self, ids: &[u32], targets: impl IntoIterator<Item = (u32, u32, f32)>) {
        self.append(ids, 0..0, targets);
    }

    /// Appends a continuation of the rows `prefix`, which end an earlier segment or are a whole one: it attends to them
    /// and to itself, and its positions continue theirs.
    ///
    /// The first token of a continuation is predicted by the prefix's last row: that target belongs to that row, so add
    /// it to `targets` of the batch directly.
    pub fn push_after(
        &mut self,
        prefix: Range<u32>,
        ids: &[u32],
        targets: impl IntoIterator<Item = (u32, u32, f32)>,
    ) {
        self.append(ids, prefix, targets);
    }

    fn append(
        &mut self,
        ids: &[u32],
        prefix: Range<u32>,
        targets: impl IntoIterator<Item = (u32, u32, f32)>,
    ) {
        let start = self.ids.len() as u32;
        let position = if prefix.is_empty() { 0 } else { self.positions[prefix.end as usize - 1] + 1 };
        self.ids.extend_from_slice(ids);
        self.positions.extend(position..position + ids.len() as u32);
        self.segments.push(Segment { own: start..start + ids.len() as u32, prefix });
        self.targets.extend(targets.into_iter().map(|(row, id, weight)| Target {
            row: start + row,
            id,
            weight,
        }));
    }

    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// `Σ w` over the targets.
    pub fn weight(&self) -> f64 {
        self.targets.iter().map(|t| t.weight as f64).sum()
    }

    /// How many sequences each token belongs to: more than one for a shared prefix.
    pub(crate) fn sequences(&self) -> Vec<f32> {
        let mut counts = vec![0f32; self.ids.len()];
        let meet = |a: &Range<u32>, b: &Range<u32>| a.start < b.end && b.start < a.end;
        for last in &self.segments {
            if self.segments.iter().any(|other| meet(&other.prefix, &last.own)) {
                continue;
            }
            let mut rows = Some(last.own.clone());
            while let Some(own) = rows.take().filter(|rows| !rows.is_empty()) {
                counts[own.start as usize..own.end as usize].iter_mut().for_each(|count| *count += 1.0);
                let of = self.segments.iter().find(|segment| meet(&segment.own, &own));
                rows = of.map(|segment| segment.prefix.clone());
            }
        }
        counts
    }

    /// Rejects ids, positions, segments and targets that are out of range.
    pub(crate) fn check(&self, vocab: usize, positions: Option<usize>) -> Result<()> {
        let fail = |message| Err(Error::Batch { message });
        if self.positions.len() != self.ids.len() {
            return fail(format!("{} positions for {} tokens", self.positions.len(), self.ids.len()));
        }
        let largest = self.ids.iter().chain(self.targets.iter().map(|t| &t.id)).max();
        if let Some(id) = largest.filter(|id| **id as usize >= vocab) {
            return fail(format!("token id {id} is outside the model's vocabulary of {vocab}"));
        }
        if let (Some(limit), Some(&p)) = (positions, self.positions.iter().max())
            && p as usize >= limit
        {
            return fail(format!("position {p} is beyond the model's {limit} learned positions"));
        }
        let mut next = 0;
        for s in &self.segments {
            if s.own.start != next || s.own.end < s.own.start || s.prefix.end > s.own.start {
                return fail(format!("segments do not tile the batch: {s:?} follows row {next}"));
            }
            next = s.own.end;
        }
        if next as usize != self.ids.len() {
            return fail(format!("segments cover {next} of {} tokens", self.ids.len()));
        }
        match self.targets.iter().find(|t| t.row as usize >= self.ids.len()) {
            Some(t) => fail(format!("a target on row {} of a batch of {} tokens", t.row, self.ids.len())),
            None => Ok(()),
        }
    }

    /// The length of each token's sequence; a shared prefix has the length of the sequences that continue it.
    ///
    /// # Errors
    /// [`Error::Batch`] if two continuations of one prefix are not `alike`, so that the prefix would have to be
    /// computed twice.
    pub(crate) fn lengths(&self, alike: impl Fn(usize, usize) -> bool) -> Result<Vec<usize>> {
        let end = |s: &Segment| self.positions[..s.own.end as usize].last().map_or(0, |p| *p as usize + 1);
        let mut lengths: Vec<usize> = self.segments.iter().map(end).collect();
        // Backwards, so that a prefix of a prefix gets the length of the last continuation.
        let mut followed = vec![false; lengths.len()];
        for i in (0..lengths.len()).rev() {
            let prefix = &self.segments[i].prefix;
            for j in 0..i {
                let own = &self.segments[j].own;
                if own.start >= prefix.end || prefix.start >= own.end {
                    continue;
                }
                if std::mem::replace(&mut followed[j], true) && !alike(lengths[i], lengths[j]) {
                    return Err(Error::Batch {
                        message: format!(
                            "sequences of {} and {} tokens share a prompt, and the model's RoPE scaling rotates it \
                             differently for them",
                            lengths[j], lengths[i]
                        ),
                    });
                }
                lengths[j] = lengths[i];
            }
        }
        let each = self.segments.iter().zip(lengths);
        Ok(each.flat_map(|(s, length)| std::iter::repeat_n(length, s.own.len())).collect())
    }

    /// Attention with a query for every row.
    pub(crate) fn attention(&self) -> AttentionPlan {
        self.attention_for(&(0..self.ids.len() as u32).collect::<Vec<_>>())
    }

    /// Attention with queries for `rows` only, which ascend (repeats allowed).
    pub(crate) fn attention_for(&self, rows: &[u32]) -> AttentionPlan {
        debug_assert!(rows.is_sorted());
        let usize = |r: &Range<u32>| r.start as usize..r.end as usize;
        let (mut ranges, mut groups, mut first) = (Vec::<AttentionRange>::new(), Vec::<Vec<usize>>::new(), 0);
        for segment in &self.segments {
            let end = first + rows[first..].partition_point(|r| *r < segment.own.end);
            if end > first {
                let prefix = usize(&segment.prefix);
                // Every range with a key in the prefix, wherever it is in the batch.
                let shares = |group: &mut Vec<usize>| group.iter().any(|&i| touches(&ranges[i], &prefix));
                let mut group: Vec<usize> = groups.extract_if(.., shares).flatten().collect();
                group.push(ranges.len());
                groups.push(group);
                ranges.push(AttentionRange { prefix, own: usize(&segment.own), queries: first..end });
            }
            first = end;
        }
        AttentionPlan { rows: rows.to_vec(), ranges, groups }
    }
}

/// A batch with the data derived from it that a pass needs: another thread can prepare it while the device computes.
#[derive(Clone, Debug)]
pub struct Prepared<'a> {
    pub(crate) batch: Cow<'a, Batch>,
    /// Targets ordered by row, which is the order in which attention takes its queries.
    pub(crate) order: Vec<usize>,
    /// The rows of the targets in this order, and their positions.
    pub(crate) rows: Vec<u32>,
    pub(crate) row_positions: Vec<u32>,
    /// Attention with a query for every row, and for the targets' rows.
    pub(crate) plans: [AttentionPlan; 2],
}

impl<'a> Prepared<'a> {
    /// Prepares a batch. Whether it fits a model is checked when it is run.
    pub fn new(batch: Cow<'a, Batch>) -> Prepared<'a> {
        let mut order: Vec<usize> = (0..batch.targets.len()).collect();
        order.sort_by_key(|&i| batch.targets[i].row);
        let rows: Vec<u32> = order.iter().map(|&i| batch.targets[i].row).collect();
        let position = |row: &u32| batch.positions.get(*row as usize).copied().unwrap_or(0);
        let row_positions = rows.iter().map(position).collect();
        let plans = [batch.attention(), batch.attention_for(&rows)];
        Prepared { batch, order, rows, row_positions, plans }
    }

    /// The batch.
    pub fn batch(&self) -> &Batch {
        &self.batch
    }
}

/// True if the range has one of `keys`, in its prefix or among its own.
fn touches(range: &AttentionRange, keys: &Range<usize>) -> bool {
    [&range.prefix, &range.own].into_iter().any(|r| r.start < keys.end && keys.start < r.end)
}

//! A labelled row, or a pack of rows: what a trainer receives.

mod segments;

pub use segments::{Pack, Segment};

use crate::{IGNORE, Origin, RowId};
use std::ops::Range;

/// A row or a pack of rows, ready for training. All vectors have one entry per token.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The source row. For a pack made here, its first row; for a pack that was read, its own line.
    pub id: RowId,
    /// Token ids.
    pub input_ids: Vec<u32>,
    /// `input_ids[i]` if supervised, else [`IGNORE`]. Not shifted: the model shifts.
    pub labels: Vec<i32>,
    /// Why each token is supervised or not.
    pub origins: Vec<Origin>,
    /// The loss weight of each token's label; `None` if all are 0 or 1.
    pub weights: Option<Vec<f32>>,
    /// The boundaries of a pack; `None` for a single row.
    pub pack: Option<Box<Pack>>,
}

/// A run of tokens of one origin.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    pub origin: Origin,
    pub tokens: Range<usize>,
    /// The number of supervised tokens.
    pub supervised: usize,
}

impl Run {
    /// The run of these tokens, with their labels.
    fn of(origin: Origin, tokens: Range<usize>, labels: &[i32]) -> Run {
        let supervised = labels[tokens.clone()].iter().filter(|label| **label != IGNORE).count();
        Run { origin, tokens, supervised }
    }
}

impl Sample {
    /// The targets of the loss, after the shift by one: `(position of the hidden state, id to predict, weight)`.
    ///
    /// A label at index 0 has no hidden state before it, so it is not a target; nor is a label of weight 0. In a
    /// pack the same holds for each row: no target crosses a boundary, and the last token of a shared prompt
    /// predicts the first token of each response.
    pub fn targets(&self) -> impl Iterator<Item = (u32, u32, f32)> + '_ {
        self.segments().flat_map(move |segment| {
            segment.own.clone().filter(|&i| self.labels[i as usize] != IGNORE).filter_map(move |i| {
                let weight = self.weights.as_ref().map_or(1.0, |w| w[i as usize]);
                let row = segment.predictor(i)?;
                (weight != 0.0).then(|| (row, self.labels[i as usize] as u32, weight))
            })
        })
    }

    /// True if the sample has a target.
    pub fn has_target(&self) -> bool {
        match (&self.pack, &self.weights) {
            // Without a pack and weights, any label after the first is enough. Prompts are long, and branch-free
            // blocks are vectorised.
            (None, None) => self.labels.get(1..).is_some_and(|labels| {
                let any = |block: &[i32]| block.iter().fold(false, |any, &label| any | (label != IGNORE));
                labels.chunks(64).any(any)
            }),
            _ => self.targets().next().is_some(),
        }
    }

    /// The segments of a pack; for a single row, one segment that covers it.
    pub fn segments(&self) -> impl Iterator<Item = Segment> + '_ {
        let packed = self.pack.iter().flat_map(|pack| pack.segments.iter().cloned());
        let whole = self.pack.is_none().then(|| Segment::whole(0..self.len() as u32));
        packed.chain(whole)
    }

    /// The runs of tokens of one origin, in order; none crosses a boundary of a pack.
    pub(crate) fn runs(&self) -> Vec<Run> {
        let mut runs = Vec::new();
        for segment in self.segments() {
            let mut end = segment.own.start as usize;
            for same in self.origins[end..segment.own.end as usize].chunk_by(|a, b| a == b) {
                let start = end;
                end += same.len();
                runs.push(Run::of(same[0], start..end, &self.labels));
            }
        }
        runs
    }

    /// [`Sample::runs`] of a single row, from the origins and lengths of its runs.
    pub(crate) fn known_runs(&self, known: &[(Origin, usize)]) -> Vec<Run> {
        let mut end = 0;
        let run = |same: &[(Origin, usize)]| {
            let start = end;
            end += same.iter().map(|(_, length)| length).sum::<usize>();
            Run::of(same[0].0, start..end, &self.labels)
        };
        known.chunk_by(|a, b| a.0 == b.0).map(run).collect()
    }

    /// Number of rows: 1 for a single row.
    pub fn rows(&self) -> usize {
        self.pack.as_ref().map_or(1, |pack| pack.rows.len())
    }

    /// Number of tokens of the longest row, including a shared prompt: the number of positions that a model needs.
    pub fn longest_row(&self) -> usize {
        self.segments().map(|segment| segment.row_len() as usize).max().unwrap_or(0)
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.input_ids.len()
    }

    /// True for a sample without tokens.
    pub fn is_empty(&self) -> bool {
        self.input_ids.is_empty()
    }

    /// The rows of a pack as they were before packing, except that the label of a row's first token is masked. For
    /// a single row, that row.
    pub fn unpack(&self) -> Vec<Sample> {
        let Some(pack) = &self.pack else { return vec![self.clone()] };
        let copies = |i: usize| {
            let at = pack.segments.partition_point(|s| s.own.end as usize <= i);
            pack.segments[at].copies() as f32
        };
        let row = |(id, tokens): (&RowId, Vec<usize>)| {
            let weight = |&i: &usize| match self.labels[i] {
                IGNORE => 0.0,
                // The weight of a shared token is the sum of its weights in all of its rows.
                _ => self.weights.as_ref().map_or(1.0, |weights| weights[i]) / copies(i),
            };
            Sample {
                id: id.clone(),
                input_ids: tokens.iter().map(|&i| self.input_ids[i]).collect(),
                labels: tokens.iter().map(|&i| self.labels[i]).collect(),
                origins: tokens.iter().map(|&i| self.origins[i]).collect(),
                weights: column(tokens.iter().map(weight).collect()),
                pack: None,
            }
        };
        pack.rows.iter().zip(pack.row_tokens()).map(row).collect()
    }
}

/// The weights, if any is neither 0 nor 1.
pub(crate) fn column(weights: Vec<f32>) -> Option<Vec<f32>> {
    weights.iter().any(|w| *w != 0.0 && *w != 1.0).then_some(weights)
}

//! What the trainer receives: ids, labels, origins, weights.

mod segments;

pub use segments::{Pack, Segment};

use crate::{IGNORE, Origin, RowId};

/// One row, or a pack of rows, ready for training. All vectors have the same length.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The row that it was made from; of a pack made here, its first row, of a pack that was read, its own line.
    pub id: RowId,
    /// Token ids.
    pub input_ids: Vec<u32>,
    /// `input_ids[i]` where supervised, else [`IGNORE`]. Not shifted: the model shifts.
    pub labels: Vec<i32>,
    /// Why each token is supervised or not.
    pub origins: Vec<Origin>,
    /// A weight per token (of its label); `None` where all weights are 0 or 1.
    pub weights: Option<Vec<f32>>,
    /// For a pack of rows, who sees whom.
    pub pack: Option<Box<Pack>>,
}

impl Sample {
    /// Targets after the shift: `(position of the hidden row, id to predict, weight)`. The label at index 0
    /// has no hidden row before it and is not a target; labels of weight 0 are not targets. In a pack the same holds
    /// for each row: no target crosses a boundary, and the last row of a shared prompt predicts the first token of
    /// each response.
    pub fn targets(&self) -> impl Iterator<Item = (u32, u32, f32)> + '_ {
        self.segments().flat_map(move |segment| {
            segment.own.clone().filter(|&i| self.labels[i as usize] != IGNORE).filter_map(move |i| {
                let weight = self.weights.as_ref().map_or(1.0, |w| w[i as usize]);
                let row = segment.predictor(i)?;
                (weight != 0.0).then(|| (row, self.labels[i as usize] as u32, weight))
            })
        })
    }

    /// The runs that attention keeps to themselves: those of a pack, else the one that is all of it.
    pub fn segments(&self) -> impl Iterator<Item = Segment> + '_ {
        let packed = self.pack.iter().flat_map(|pack| pack.segments.iter().cloned());
        let whole = self.pack.is_none().then(|| Segment::whole(0..self.len() as u32));
        packed.chain(whole)
    }

    /// Number of rows: 1, or those of a pack.
    pub fn rows(&self) -> usize {
        self.pack.as_ref().map_or(1, |pack| pack.rows.len())
    }

    /// Tokens of its longest row, a shared prompt included: the positions that a model needs for it.
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

    /// The rows of a pack, each by itself as if it had never been packed (but for the label of its first token,
    /// which is no target). A row by itself is its own only row.
    pub fn unpack(&self) -> Vec<Sample> {
        let Some(pack) = &self.pack else { return vec![self.clone()] };
        let copies = |i: usize| {
            let at = pack.segments.partition_point(|s| s.own.end as usize <= i);
            pack.segments[at].copies() as f32
        };
        let row = |(id, tokens): (&RowId, Vec<usize>)| {
            let weight = |&i: &usize| match self.labels[i] {
                IGNORE => 0.0,
                // A shared token weighs as much as it does in all of its rows together.
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

/// A weight column only where some weight is neither 0 nor 1.
pub(crate) fn column(weights: Vec<f32>) -> Option<Vec<f32>> {
    weights.iter().any(|w| *w != 0.0 && *w != 1.0).then_some(weights)
}

//! What training adds to the forward pass: dropout, and noise on the embeddings.

use super::Model;
use crate::Result;
use crate::kernels::{Backend, Draw, Dropout, View};

/// What training adds to a model's passes and to its loss. The default adds nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Regularisation {
    /// What random numbers are drawn from: a number that no other micro-batch of the run has. `None` draws none, so
    /// nothing is dropped and no noise is added.
    pub seed: Option<u64>,
    /// The architecture's dropout is applied.
    pub dropout: bool,
}

/// An operation that draws random numbers, in a pass. Two with the same number would draw the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Site {
    /// What enters the first layer.
    Embedding,
    /// The probabilities of a layer's attention.
    Attention(usize),
    /// The output of a layer's attention.
    AfterAttention(usize),
    /// The output of a layer's MLP.
    AfterMlp(usize),
    /// The input of an adapter, by the number of its module.
    Adapter(usize),
}

impl Site {
    fn number(self) -> u32 {
        // There are at most `MAX_LAYERS` layers of a few modules each, so the numbers are apart.
        let (kind, n) = match self {
            Site::Embedding => (0, 0),
            Site::Attention(n) => (2, n),
            Site::AfterAttention(n) => (3, n),
            Site::AfterMlp(n) => (4, n),
            Site::Adapter(n) => (5, n),
        };
        (n as u32) << 3 | kind
    }
}

impl<B: Backend> Model<B> {
    /// What [`Model::accumulate`] adds to the passes that follow; evaluation and generation never add anything.
    pub fn regularise(&mut self, with: Regularisation) {
        self.regularisation = with;
    }

    /// The dropout of an operation in the current pass.
    pub(super) fn dropout(&self, site: Site, rate: f32) -> Option<Dropout> {
        let pass = self.pass.filter(|pass| pass.dropout && rate > 0.0)?;
        Some(Dropout { draw: Draw { key: pass.seed?, site: site.number() }, rate })
    }

    /// Applies a dropout to values, or to their gradient.
    pub(super) fn drop(&mut self, x: View, dropout: Option<Dropout>) -> Result<()> {
        dropout.map_or(Ok(()), |dropout| self.backend.dropout(x, dropout))
    }
}

//! What training adds to the forward pass: dropout, and noise on the embeddings.

use super::Model;
use crate::Result;
use crate::batch::Batch;
use crate::kernels::{Backend, Buffer, Draw, Dropout, View};

/// What training adds to a model's passes and to its loss. The default adds only the load-balancing loss of experts, if
/// the architecture has a factor for it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Regularisation {
    /// Seed of the random numbers, different for every micro-batch of the run. With `None`, nothing is dropped and no
    /// noise is added.
    pub seed: Option<u64>,
    /// Apply the architecture's dropout.
    pub dropout: bool,
    /// Uniform noise on the embeddings (NEFTune, Jain et al. 2023), of up to `alpha / √(length · hidden)`; 0 adds none.
    ///
    /// The length is that of the longest sequence that contains the token.
    pub noise_alpha: f32,
    /// Share of the uniform distribution in each target ([`TargetLoss::smoothed`](crate::TargetLoss::smoothed)).
    pub label_smoothing: f32,
    /// Share of this pass in the step's load-balancing loss ([`Architecture::balance`](crate::Architecture)).
    pub balance: f32,
}

impl Default for Regularisation {
    fn default() -> Regularisation {
        Regularisation { seed: None, dropout: false, noise_alpha: 0.0, label_smoothing: 0.0, balance: 1.0 }
    }
}

/// An operation within a pass that draws random numbers. Two operations with the same number would draw the same
/// values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Site {
    /// The input of the first layer.
    Embedding,
    /// Noise on the embeddings.
    Noise,
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
        // There are at most `MAX_LAYERS` layers with a few modules each, so the numbers do not collide.
        let (kind, n) = match self {
            Site::Embedding => (0, 0),
            Site::Noise => (1, 0),
            Site::Attention(n) => (2, n),
            Site::AfterAttention(n) => (3, n),
            Site::AfterMlp(n) => (4, n),
            Site::Adapter(n) => (5, n),
        };
        (n as u32) << 3 | kind
    }
}

impl<B: Backend> Model<B> {
    /// Sets what [`Model::accumulate`] adds to the passes that follow; evaluation and generation never add anything.
    pub fn regularise(&mut self, with: Regularisation) {
        self.regularisation = with;
    }

    /// The dropout of an operation in the current pass.
    pub(super) fn dropout(&self, site: Site, rate: f32) -> Option<Dropout> {
        self.pass.filter(|pass| pass.dropout && rate > 0.0)?;
        Some(Dropout { draw: self.draw(site)?, rate })
    }

    /// The random numbers of an operation in the current pass.
    pub(super) fn draw(&self, site: Site) -> Option<Draw> {
        Some(Draw { key: self.pass?.seed?, site: site.number() })
    }

    /// The size of the noise on each row's embedding, if the current pass has noise.
    pub(super) fn noise_sizes(&mut self, batch: &Batch) -> Result<Option<Buffer>> {
        let pass = self.pass.filter(|pass| pass.seed.is_some() && pass.noise_alpha > 0.0);
        let Some(pass) = pass else { return Ok(None) };
        let mut lengths = vec![0usize; batch.tokens()];
        for segment in &batch.segments {
            let length = segment.own.len() + segment.prefix.len();
            for row in segment.own.clone().chain(segment.prefix.clone()) {
                lengths[row as usize] = lengths[row as usize].max(length);
            }
        }
        let alpha = f64::from(pass.noise_alpha) * f64::from(self.arch.embedding.noise_scale);
        let hidden = self.arch.hidden as f64;
        let size = |length: &usize| (alpha / (*length as f64 * hidden).sqrt()) as f32;
        let sizes: Vec<f32> = lengths.iter().map(size).collect();
        let buffer = self.backend.allocate(sizes.len())?;
        self.backend.write(buffer.view(), &sizes)?;
        Ok(Some(buffer))
    }

    /// Applies a dropout to values, or to their gradient.
    pub(super) fn drop(&mut self, x: View, dropout: Option<Dropout>) -> Result<()> {
        dropout.map_or(Ok(()), |dropout| self.backend.dropout(x, dropout))
    }
}

//! The parameters as operations read them: matrices and vectors, layers, blocks.

use super::Store;
use std::ops::Range;

/// A matrix or vector that an operation reads as a whole: a parameter, or a part of a fused one.
#[derive(Clone, Debug, PartialEq)]
pub struct Slot {
    /// Its place among the model's slots.
    pub index: usize,
    /// The parameter that it is a part of.
    pub parameter: usize,
    /// Its range in the buffer of parameters; for a mapped one, its elements in the engine's layout.
    pub range: Range<usize>,
    /// Rows and columns; a vector is one row.
    pub shape: [usize; 2],
    /// Whether it is trained, and if so the place of its gradient.
    pub store: Store,
}

impl Slot {
    /// The range of its gradient in the flat buffer of gradients, if it is trained.
    pub fn gradient(&self) -> Option<Range<usize>> {
        match self.store {
            Store::Frozen => None,
            Store::Trained(start) => Some(start..start + self.range.len()),
        }
    }
}

/// A norm.
#[derive(Clone, Debug, PartialEq)]
pub struct NormSlots {
    /// Weight.
    pub weight: Slot,
    /// Bias.
    pub bias: Option<Slot>,
}

impl NormSlots {
    pub(super) fn slots(&self) -> impl Iterator<Item = &Slot> {
        [&self.weight].into_iter().chain(&self.bias)
    }
}

/// A linear layer: one product for all its parts, whose outputs are adjacent.
#[derive(Clone, Debug, PartialEq)]
pub struct Linear {
    /// Number of columns of its input.
    pub inputs: usize,
    /// Its parts, in the order of their outputs.
    pub parts: Vec<Part>,
}

/// Outputs of a linear layer that form one module in files.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// Name of the module in files, without `.weight`.
    pub name: String,
    /// The range of its outputs among the layer's.
    pub outputs: Range<usize>,
    /// `[outputs, inputs]`.
    pub weight: Slot,
    /// `[outputs]`.
    pub bias: Option<Slot>,
    /// The adapter added to its product.
    pub adapter: Option<Adapter>,
}

/// The adapter of a part. Parts of one file tensor share `a`.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// `[rank, inputs]`.
    pub a: Slot,
    /// `[outputs, rank]`.
    pub b: Slot,
    /// Factor on the product.
    pub scale: f32,
    /// DoRA: the magnitudes of the weights' rows, and the offset of the part's row norms among those of all layers.
    pub magnitude: Option<(Slot, usize)>,
    /// Number of the module among those with an adapter, used to draw its dropout.
    pub module: usize,
}

impl Adapter {
    fn slots(&self) -> impl Iterator<Item = &Slot> {
        [&self.a, &self.b].into_iter().chain(self.magnitude.as_ref().map(|(slot, _)| slot))
    }
}

impl Part {
    /// True if an adapter scales the outputs.
    pub(crate) fn is_dora(&self) -> bool {
        self.adapter.as_ref().is_some_and(|adapter| adapter.magnitude.is_some())
    }
}

impl Linear {
    pub(super) fn slots(&self) -> impl Iterator<Item = &Slot> {
        let own = self.parts.iter().flat_map(|part| [&part.weight].into_iter().chain(&part.bias));
        own.chain(self.parts.iter().filter_map(|part| part.adapter.as_ref()).flat_map(Adapter::slots))
    }

    /// Number of columns of its output.
    pub fn outputs(&self) -> usize {
        self.parts.last().map_or(0, |part| part.outputs.end)
    }

    /// Runs of adjacent outputs whose `slot` (weight or bias) is trained and whose gradients are adjacent too: the
    /// outputs, and the slots.
    pub(crate) fn trained<'a>(
        &'a self,
        slot: impl Fn(&'a Part) -> Option<&'a Slot>,
    ) -> Vec<(Range<usize>, Vec<&'a Slot>)> {
        let mut runs: Vec<(Range<usize>, Vec<&Slot>)> = Vec::new();
        for part in &self.parts {
            let Some((slot, gradient)) = slot(part).and_then(|s| Some((s, s.gradient()?))) else { continue };
            let follows = |slots: &[&Slot]| {
                slots.last().and_then(|s| s.gradient()).is_some_and(|before| before.end == gradient.start)
            };
            match runs.last_mut() {
                Some((outputs, slots)) if outputs.end == part.outputs.start && follows(slots) => {
                    outputs.end = part.outputs.end;
                    slots.push(slot);
                }
                _ => runs.push((part.outputs.clone(), vec![slot])),
            }
        }
        runs
    }
}

/// Parameters of one block.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockSlots {
    /// Norm before the attention.
    pub attention_norm: Option<NormSlots>,
    /// Queries.
    pub q: Linear,
    /// Keys, then values.
    pub kv: Linear,
    /// Norms of queries and of keys.
    pub qk_norm: Option<[NormSlots; 2]>,
    /// The attention's output.
    pub out: Linear,
    /// Norm after the attention.
    pub after_attention: Option<NormSlots>,
    /// Norm before the MLP.
    pub mlp_norm: Option<NormSlots>,
    /// The projection to the logits of experts, if the layer has them.
    pub router: Option<Linear>,
    /// Gate and up, or up alone; with experts, those of all experts one after the other.
    pub up: Linear,
    /// Down; with experts, those of all experts one after the other.
    pub down: Linear,
    /// Norm after the MLP.
    pub after_mlp: Option<NormSlots>,
}

impl BlockSlots {
    /// The layers that may have an adapter: not those of experts, which transformers stores in one tensor.
    pub(crate) fn linears(&self) -> impl Iterator<Item = &Linear> + Clone {
        let mlp = [&self.up, &self.down].into_iter().filter(|_| self.router.is_none());
        [&self.q, &self.kv, &self.out].into_iter().chain(mlp)
    }

    /// All layers, including those of experts.
    pub(super) fn all_linears(&self) -> impl Iterator<Item = &Linear> {
        [&self.q, &self.kv, &self.out, &self.up, &self.down].into_iter().chain(&self.router)
    }

    pub(super) fn slots(&self) -> impl Iterator<Item = &Slot> {
        let norms = [&self.attention_norm, &self.after_attention, &self.mlp_norm, &self.after_mlp];
        let norms = norms.into_iter().flatten().chain(self.qk_norm.iter().flatten());
        norms.flat_map(NormSlots::slots).chain(self.all_linears().flat_map(Linear::slots))
    }
}

//! A model as a value: everything that the forward pass needs, layer by layer.

use crate::dtype::Packing;
use crate::kernels::{Activation, Heads, Norm, Routing};
use crate::rope::Rope;

/// A decoder-only model. Families differ only in values, not in code; [`crate::families`] reads them from
/// `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct Architecture {
    /// `model_type` of `config.json`.
    pub model_type: String,
    /// Rows of the embedding and of the head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Positions for which the model was made. A limit only if positions are learned.
    pub max_positions: usize,
    /// From tokens to the residual stream.
    pub embedding: Embedding,
    /// The layers, in order; each may differ.
    pub blocks: Vec<Block>,
    /// From the residual stream to logits.
    pub head: Head,
    /// Names of the weights in files.
    pub names: Names,
    /// Initialisation of a model without weights.
    pub init: Init,
    /// Factor of the load-balancing loss of experts, which training adds to its loss; 0 disables it.
    pub balance: f32,
    /// Rows of embedding and head that the weight files do not have yet.
    pub added: Option<AddedRows>,
    /// How the matrices of linear layers are packed in the files (`quantization_config`).
    pub packed: Option<Packing>,
    /// Settings of `config.json` that have no effect here (RoPE settings overridden by others), as sentences.
    pub not_applied: Vec<String>,
}

/// Rows of embedding and head for tokens that were added to a vocabulary ([`Architecture::grow`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddedRows {
    /// Rows in the files of the base.
    pub base: usize,
    /// Seed of the other rows, if they are not in the files.
    pub seed: u64,
}

/// The token embedding, and the values added to it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Embedding {
    /// Rows of a table of learned positions.
    pub positions: Option<usize>,
    /// Factor on the embedding.
    pub scale: f32,
    /// Factor on the noise that training adds: the embedding's factor if transformers multiplies outside the embedding
    /// module (Granite).
    pub noise_scale: f32,
    /// Dropout of the first layer's input, in training.
    pub dropout: f32,
}

/// One layer: `x' = x + attention(norm(x))`, then `x' + mlp(norm(x'))`; if parallel, `x + attention(norm(x)) +
/// mlp(norm'(x))`.
#[derive(Clone, Debug, PartialEq)]
pub struct Block {
    /// The norms.
    pub norms: Norms,
    /// The attention.
    pub attention: Attention,
    /// The MLP.
    pub mlp: Mlp,
    /// Factor on the outputs of attention and MLP before they are added to the residual stream.
    pub residual_scale: f32,
    /// Dropout of these outputs, in training.
    pub residual_dropout: f32,
    /// True if attention and MLP read the same input.
    pub parallel: bool,
}

/// Norms of a block, each if present.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norms {
    /// Before the attention.
    pub attention: Option<Norm>,
    /// After the attention, before its output is added to the residual stream.
    pub after_attention: Option<Norm>,
    /// Before the MLP.
    pub mlp: Option<Norm>,
    /// After the MLP, before its output is added to the residual stream.
    pub after_mlp: Option<Norm>,
}

impl Norms {
    /// One norm before the attention and one before the MLP.
    pub fn before(norm: Norm) -> Norms {
        Norms { attention: Some(norm), after_attention: None, mlp: Some(norm), after_mlp: None }
    }
}

/// The normalisation of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QkNorm {
    /// The norm.
    pub norm: Norm,
    /// Normalise all heads of a row together, not each head separately.
    pub whole: bool,
}

impl QkNorm {
    /// Number of groups of columns that are normalised separately, for `heads` heads.
    pub fn groups(self, heads: usize) -> usize {
        if self.whole { 1 } else { heads }
    }
}

/// The attention of a block.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    /// Heads, and the factor on their scores.
    pub heads: Heads,
    /// Normalisation of queries and keys, before the rotation.
    pub qk_norm: Option<QkNorm>,
    /// Rotary positions.
    pub rope: Option<Rope>,
    /// True if queries, keys and values have a bias.
    pub qkv_bias: bool,
    /// True if the output projection has a bias.
    pub out_bias: bool,
    /// Dropout of the probabilities, in training.
    pub dropout: f32,
}

/// The MLP of a block, or several MLPs of which each row uses some.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mlp {
    /// Width between its two matrices.
    pub intermediate: usize,
    /// The function between these matrices.
    pub activation: Activation,
    /// True if its matrices have a bias.
    pub bias: bool,
    /// A mixture of experts, each an MLP of these sizes.
    pub experts: Option<Experts>,
}

/// Experts, and how each row chooses among them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Experts {
    /// Number of experts.
    pub count: usize,
    /// How rows choose experts.
    pub routing: Routing,
}

impl Mlp {
    /// Number of MLPs that each row passes through.
    pub fn per_row(&self) -> usize {
        self.experts.map_or(1, |experts| experts.routing.per_row)
    }

    /// Number of columns of the first matrix's output.
    pub(crate) fn up_width(&self) -> usize {
        self.intermediate.saturating_mul(self.activation.gate_width())
    }
}

/// The final norm and the projection to the vocabulary.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Head {
    /// The norm before it.
    pub norm: Norm,
    /// True if its matrix is the embedding.
    pub tied: bool,
    /// Factor on the logits.
    pub scale: f32,
    /// Scaled logits `x` become `cap · tanh(x / cap)`.
    pub softcap: Option<f32>,
}

impl Head {
    /// Scales and caps logits.
    pub(crate) fn finish(&self, logits: &mut [f32]) {
        for x in logits {
            *x *= self.scale;
            *x = self.softcap.map_or(*x, |cap| cap * (*x / cap).tanh());
        }
    }
}

/// Names of the weights in files, without `.weight` and `.bias`, and the layout of linear layers there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Names {
    /// Token embedding.
    pub embedding: &'static str,
    /// Learned positions.
    pub positions: &'static str,
    /// Prefix of a block's names; `{}` is its number.
    pub block: &'static str,
    /// Norm before the attention.
    pub attention_norm: &'static str,
    /// Queries, keys and values: three tensors, or one that contains them in this order.
    pub qkv: &'static [&'static str],
    /// Norms of queries and keys.
    pub qk_norm: [&'static str; 2],
    /// True if one tensor contains queries, keys and values head by head.
    pub qkv_by_head: bool,
    /// Output projection of the attention.
    pub out: &'static str,
    /// Norm after the attention.
    pub after_attention: &'static str,
    /// Norm before the MLP.
    pub mlp_norm: &'static str,
    /// Norm after the MLP.
    pub after_mlp: &'static str,
    /// Gate and up, or the single input of the activation.
    pub up: &'static [&'static str],
    /// Output projection of the MLP.
    pub down: &'static str,
    /// The projection to the logits of experts.
    pub router: &'static str,
    /// Replaces the first part of the MLP's names in an expert; `{}` is its number.
    pub expert: &'static str,
    /// Final norm.
    pub norm: &'static str,
    /// Head, if it is not tied.
    pub head: &'static str,
    /// True if linear layers are stored as `[inputs, outputs]` (Conv1D).
    pub transposed: bool,
}

/// transformers' initialisation: normal with `std`, biases 0, norms so that they multiply by 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Init {
    /// `initializer_range`.
    pub std: f64,
    /// Standard deviation of the projections that write to the residual stream.
    pub residual_std: f64,
    /// The embedding row that is all zeros (`pad_token_id`, in families whose embedding has a padding row).
    pub padding_row: Option<usize>,
}

/// Far above any model's sizes, and small enough that the product of two of them does not overflow.
pub(crate) const MAX_SIZE: usize = 1 << 31;

/// More layers than any model has; a file that declares more is broken or hostile.
pub(crate) const MAX_LAYERS: usize = 10_000;

impl Architecture {
    /// The maximum number of positions, if positions are learned.
    pub fn position_limit(&self) -> Option<usize> {
        self.embedding.positions
    }

    /// Gives embedding and head more rows. Rows missing in the weight files are drawn from the multivariate normal
    /// distribution of the existing rows: their mean, and 1e-9 times their covariance, as `resize_token_embeddings` of
    /// transformers does (Hewitt 2021). Does nothing if there are as many rows already.
    pub fn grow(&mut self, vocab_size: usize, seed: u64) {
        if vocab_size > self.vocab_size {
            let base = self.added.map_or(self.vocab_size, |added| added.base);
            self.added = Some(AddedRows { base, seed });
            self.vocab_size = vocab_size;
        }
    }

    /// The number of experts of a layer, if the model has any; all layers have the same number.
    pub fn experts(&self) -> Option<usize> {
        self.blocks.iter().find_map(|block| Some(block.mlp.experts?.count))
    }

    /// True if all rows choose experts in the last layer, and not only the rows that the loss needs.
    pub(crate) fn balances_last(&self) -> bool {
        self.balance != 0.0 && self.blocks.last().is_some_and(|block| block.mlp.experts.is_some())
    }

    /// True if training applies any dropout.
    pub fn has_dropout(&self) -> bool {
        let of = |block: &Block| block.attention.dropout.max(block.residual_dropout);
        self.embedding.dropout > 0.0 || self.blocks.iter().any(|block| of(block) > 0.0)
    }

    /// Sets the window of each layer.
    pub(crate) fn set_windows(&mut self, windows: Vec<Option<usize>>) {
        for (block, window) in self.blocks.iter_mut().zip(windows) {
            block.attention.heads.window = window;
        }
    }

    /// Columns of a layer's query, key/value and `up` rows, the last for all experts of a row together.
    pub(crate) fn widths(block: &Block) -> [usize; 3] {
        let (heads, mlp) = (block.attention.heads, block.mlp);
        [heads.query_width(), heads.kv_width(), mlp.up_width().saturating_mul(mlp.per_row())]
    }

    /// Rejects sizes that contradict each other, lead to a division by zero or are larger than any model's.
    ///
    /// # Errors
    /// A sentence with the sizes.
    pub(crate) fn check(&self) -> Result<(), String> {
        if self.blocks.is_empty() {
            return Err("a model without layers".into());
        }
        let mut sizes = vec![self.hidden, self.vocab_size, self.max_positions];
        sizes.extend(self.embedding.positions);
        let mut weights = 0u128;
        for block in &self.blocks {
            let h = block.attention.heads;
            if h.kv_heads == 0 || !h.heads.is_multiple_of(h.kv_heads) {
                return Err(format!(
                    "{} attention heads do not divide into {} key/value heads",
                    h.heads, h.kv_heads
                ));
            }
            let rotated = block.attention.rope.as_ref().map_or(0, Rope::rotated);
            if h.head_dim == 0 || h.heads == 0 || rotated > h.head_dim {
                return Err(format!("{} heads of {} in a width of {}", h.heads, h.head_dim, self.hidden));
            }
            let widths = Architecture::widths(block);
            sizes.extend(widths);
            sizes.push(block.mlp.intermediate);
            let mut count = 1;
            if let Some(experts) = block.mlp.experts {
                let per_row = experts.routing.per_row;
                if !(1..=experts.count).contains(&per_row) {
                    return Err(format!("{per_row} of {} experts for each row", experts.count));
                }
                if block.norms.after_mlp.is_some() || block.mlp.bias || block.residual_scale != 1.0 {
                    return Err("experts with biases, a norm after them or a factor are not computed".into());
                }
                sizes.push(experts.count);
                count = experts.count;
            }
            let widest = widths.into_iter().max().unwrap_or(0).max(self.hidden);
            weights += widest as u128 * self.hidden as u128 * 8 * count as u128;
        }
        let outer = sizes[..3].iter().max().map_or(0, |widest| *widest as u128 * self.hidden as u128 * 8);
        let plausible = sizes.iter().all(|size| (1..=MAX_SIZE).contains(size));
        if !plausible || weights + outer > 1 << 48 || self.blocks.len() > MAX_LAYERS {
            return Err(format!(
                "a model of {} layers of width {} is not plausible",
                self.blocks.len(),
                self.hidden
            ));
        }
        Ok(())
    }
}

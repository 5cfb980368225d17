//! The parameters of operations: norms, activations, heads, optimizer steps.

/// A normalisation over the last dimension.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Norm {
    /// `x / sqrt(mean(x²) + eps) · (offset + w)` (Zhang & Sennrich 2019). One statistic per row: the reciprocal
    /// root.
    Rms {
        /// Added to the mean square.
        eps: f32,
        /// Added to the weight: 0, or 1 in Gemma, whose weights are stored as differences from 1.
        offset: f32,
    },
    /// `(x − mean) / sqrt(var + eps) · w + b` (Ba et al. 2016). Two statistics per row: mean, reciprocal
    /// deviation.
    Layer {
        /// Added to the variance.
        eps: f32,
    },
}

impl Norm {
    /// Statistics kept per normalised group for the backward pass.
    pub fn statistics(self) -> usize {
        match self {
            Norm::Rms { .. } => 1,
            Norm::Layer { .. } => 2,
        }
    }

    /// The offset added to the weight.
    pub fn offset(self) -> f32 {
        match self {
            Norm::Rms { offset, .. } => offset,
            Norm::Layer { .. } => 0.0,
        }
    }
}

/// The function between the two matrices of the MLP. `up` is the output of the first one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `silu(gate) · up`; a row of `up` is `[gate, up]`, twice the width of the result (Shazeer 2020).
    SwiGlu,
    /// `gelu_new(gate) · up`, laid out as [`Activation::SwiGlu`].
    GeGluTanh,
    /// `gelu_new`: `0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))`.
    GeluTanh,
    /// `x·Φ(x) = 0.5·x·(1 + erf(x/√2))`.
    Gelu,
}

impl Activation {
    /// Columns of `up` per column of the result: 2 with a gate.
    pub fn gate_width(self) -> usize {
        match self {
            Activation::SwiGlu | Activation::GeGluTanh => 2,
            Activation::GeluTanh | Activation::Gelu => 1,
        }
    }
}

/// Heads of an attention. Query rows are `[heads · head_dim]`; key/value rows are
/// `[kv_heads · head_dim]` of keys, then as many of values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heads {
    /// Query heads; a multiple of `kv_heads`. Query head `h` reads kv head `h / (heads / kv_heads)`.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Size of a head.
    pub head_dim: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// Scaled scores `s` become `cap · tanh(s / cap)` (Gemma 2).
    pub softcap: Option<f32>,
    /// Number of keys that a query sees: itself and the `window − 1` before it, counted over its prefix and then its
    /// own range; `None` for all of them.
    pub window: Option<usize>,
}

impl Heads {
    /// Columns of a query row; `usize::MAX` if the product overflows.
    pub fn query_width(&self) -> usize {
        self.heads.saturating_mul(self.head_dim)
    }

    /// Columns of the keys (and of the values) of a row; `usize::MAX` if the product overflows.
    pub fn key_width(&self) -> usize {
        self.kv_heads.saturating_mul(self.head_dim)
    }

    /// Columns of a key/value row: keys, then values; `usize::MAX` if the product overflows.
    pub fn kv_width(&self) -> usize {
        self.key_width().saturating_mul(2)
    }
}

/// How experts are chosen for each row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Routing {
    /// Experts per row.
    pub per_row: usize,
    /// Divide the weights of a row's experts by their sum.
    pub normalise: bool,
}

/// One AdamW step (Loshchilov & Hutter 2019), in the order of operations of `torch.optim.AdamW`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Step number, from 1.
    pub t: u64,
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Decay every parameter; `false` excludes biases and norms, as the Trainer does. The model reads this field: a
    /// backend decays every parameter it is given.
    pub decay_all: bool,
    /// Gradients are multiplied by this first (clipping).
    pub gradient_scale: f32,
}

/// The first step with the defaults of `torch.optim.AdamW`.
impl Default for AdamW {
    fn default() -> AdamW {
        AdamW {
            t: 1,
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
            decay_all: true,
            gradient_scale: 1.0,
        }
    }
}

/// The scalars of an AdamW step in the form that f32 kernels take.
#[derive(Clone, Copy, Debug)]
pub(super) struct AdamWScalars {
    pub(super) keep: f32,
    pub(super) beta1: f32,
    pub(super) lerp1: f32,
    pub(super) beta2: f32,
    pub(super) lerp2: f32,
    pub(super) root2: f32,
    pub(super) eps: f32,
    pub(super) rate: f32,
    pub(super) scale: f32,
}

impl AdamW {
    /// The scalars are f64 up to here, as in PyTorch, and are rounded once for the f32 tensors.
    pub(super) fn scalars(self) -> AdamWScalars {
        let correction1 = 1.0 - self.beta1.powi(self.t as i32);
        let correction2 = 1.0 - self.beta2.powi(self.t as i32);
        AdamWScalars {
            keep: (1.0 - self.lr * self.weight_decay) as f32,
            beta1: self.beta1 as f32,
            lerp1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            lerp2: (1.0 - self.beta2) as f32,
            root2: correction2.sqrt() as f32,
            eps: self.eps as f32,
            rate: (self.lr / correction1) as f32,
            scale: self.gradient_scale,
        }
    }
}

/// One step of Adafactor (Shazeer & Stern 2018) with a given learning rate, as transformers' Trainer configures it
/// (`scale_parameter=False, relative_step=False`): no first moment, updates clipped to a root mean square of 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adafactor {
    /// Step number, from 1.
    pub t: u64,
    /// Learning rate.
    pub lr: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Gradients are multiplied by this first (clipping).
    pub gradient_scale: f32,
}

impl Adafactor {
    /// Added to squared gradients.
    pub const EPS: f64 = 1e-30;

    /// Decay of the mean squares: `1 − t^−0.8`.
    pub fn beta2(self) -> f64 {
        1.0 - (self.t as f64).powf(-0.8)
    }
}

/// One step of gradient descent, in the order of operations of `torch.optim.SGD`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sgd {
    /// Learning rate.
    pub lr: f64,
    /// The factor on the last direction.
    pub momentum: f64,
    /// Weight decay, which is added to the gradient.
    pub weight_decay: f64,
    /// Gradients are multiplied by this first (clipping).
    pub gradient_scale: f32,
}

/// The loss of one target.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TargetLoss {
    /// Negative log-likelihood in nats, unweighted.
    pub nll: f32,
    /// True if the target is the most likely token (the first one of several equal ones).
    pub top1: bool,
    /// Entropy in nats of the distribution that predicted the target.
    pub entropy: f32,
    /// Mean of `−ln p` over the vocabulary if the loss is smoothed, else 0.
    pub uniform: f32,
}

impl TargetLoss {
    /// Columns of a backend's table of losses: the negative log-likelihood, 1 or 0 for `top1`, the entropy,
    /// and `uniform`.
    pub const COLUMNS: usize = 4;

    /// Reads a row of a backend's table of losses.
    pub fn from_columns(row: [f32; Self::COLUMNS]) -> TargetLoss {
        TargetLoss { nll: row[0], top1: row[1] != 0.0, entropy: row[2], uniform: row[3] }
    }

    /// The inverse of [`TargetLoss::from_columns`].
    pub fn columns(self) -> [f32; Self::COLUMNS] {
        [self.nll, f32::from(u8::from(self.top1)), self.entropy, self.uniform]
    }

    /// The loss when each target is mixed with a share `smoothing` of the uniform distribution: `(1 − smoothing) · nll +
    /// smoothing · uniform` (Szegedy et al. 2016; transformers' `LabelSmoother`).
    pub fn smoothed(self, smoothing: f64) -> f64 {
        (1.0 - smoothing) * f64::from(self.nll) + smoothing * f64::from(self.uniform)
    }
}

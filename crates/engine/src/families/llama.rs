//! `llama` and `qwen2`: RMS norm, rotary positions, SwiGLU.

use super::config::Config;
use super::rope::Rotary;
use crate::Result;
use crate::arch::{Architecture, Attention, Block, Embedding, Head, Init, Mlp, Names, Norms, QkNorm};
use crate::kernels::{Activation, Heads, Norm};

pub(super) const NAMES: Names = Names {
    embedding: "model.embed_tokens",
    positions: "",
    block: "model.layers.{}",
    attention_norm: "input_layernorm",
    qkv: &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    qk_norm: ["self_attn.q_norm", "self_attn.k_norm"],
    qkv_by_head: false,
    out: "self_attn.o_proj",
    after_attention: "",
    mlp_norm: "post_attention_layernorm",
    after_mlp: "",
    up: &["mlp.gate_proj", "mlp.up_proj"],
    down: "mlp.down_proj",
    router: "",
    expert: "",
    norm: "model.norm",
    head: "lm_head",
    transposed: false,
};

/// The differences between families of this kind.
pub(super) struct Variant {
    pub(super) head_dim: usize,
    pub(super) kv_heads: usize,
    pub(super) qkv_bias: bool,
    pub(super) out_bias: bool,
    pub(super) mlp_bias: bool,
    /// RMS norm of queries and keys: over each head, or over all of them.
    pub(super) qk_norm: Option<QkNorms>,
    pub(super) activation: Activation,
    /// The offset that norms add to their weights.
    pub(super) offset: f32,
    /// Default of `rms_norm_eps`.
    pub(super) eps: f64,
    /// Default of `tie_word_embeddings`.
    pub(super) tied: bool,
    /// Default of `max_position_embeddings`.
    pub(super) max_positions: usize,
    /// Default of `rope_theta`.
    pub(super) theta: f64,
    /// Default of `partial_rotary_factor`, in families that rotate only a part of each head.
    pub(super) partial: Option<f64>,
}

/// The extent of a norm of queries and keys.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum QkNorms {
    EachHead,
    AllHeads,
}

/// Llama: the number of key/value heads defaults to that of heads, the head size to `hidden_size /
/// num_attention_heads`.
pub(super) fn llama(c: &Config) -> Result<Architecture> {
    let bias = c.flag_or("attention_bias", false)?;
    let mlp_bias = c.flag_or("mlp_bias", false)?;
    decoder(c, Variant { qkv_bias: bias, out_bias: bias, mlp_bias, ..sizes(c)? })
}

/// Qwen2: only queries, keys and values have biases.
pub(super) fn qwen2(c: &Config) -> Result<Architecture> {
    let kv_heads = c.kv_heads(c.size("num_attention_heads")?, 32)?;
    let variant = Variant { qkv_bias: true, kv_heads, max_positions: 32_768, ..sizes(c)? };
    let mut arch = decoder(c, variant)?;
    qwen_windows(c, &mut arch)?;
    Ok(arch)
}

/// Qwen's windows: on the layers from `max_window_layers` on, if `use_sliding_window` is set.
pub(super) fn qwen_windows(c: &Config, arch: &mut Architecture) -> Result<()> {
    let window = c.optional_size("sliding_window", Some(4096))?;
    let used = c.flag_or("use_sliding_window", false)?;
    let window = window.filter(|_| used);
    let first = match c.get("max_window_layers") {
        Some(value) if value.as_u64() == Some(0) => 0,
        _ => c.size_or("max_window_layers", Some(28))?,
    };
    let windows = c.windows(arch.blocks.len(), window, |n| window.is_some() && n >= first)?;
    arch.set_windows(windows);
    Ok(())
}

/// Llama's defaults.
pub(super) fn sizes(c: &Config) -> Result<Variant> {
    let (hidden, heads) = (c.size("hidden_size")?, c.size("num_attention_heads")?);
    Ok(Variant {
        head_dim: c.size_or("head_dim", hidden.checked_div(heads))?,
        kv_heads: c.kv_heads(heads, heads)?,
        qkv_bias: false,
        out_bias: false,
        mlp_bias: false,
        qk_norm: None,
        activation: Activation::SwiGlu,
        offset: 0.0,
        eps: 1e-6,
        tied: false,
        max_positions: 2048,
        theta: 10_000.0,
        partial: None,
    })
}

/// A decoder whose layers are all alike.
pub(super) fn decoder(c: &Config, v: Variant) -> Result<Architecture> {
    if v.activation == Activation::SwiGlu {
        c.activation("hidden_act", Some("silu"), &["silu", "swish"])?;
    }
    let (hidden, heads) = (c.size("hidden_size")?, c.size("num_attention_heads")?);
    if !v.head_dim.is_multiple_of(2) {
        return Err(c.refuse(
            format!(
                "{heads} heads of {} in a width of {hidden}: rotary positions need an even size",
                v.head_dim
            ),
            "shapes in config.json contradict each other; copy it from the model's repository again".into(),
        ));
    }
    let max_positions = c.size_or("max_position_embeddings", Some(v.max_positions))?;
    let norm = Norm::Rms { eps: c.epsilon("rms_norm_eps", v.eps)?, offset: v.offset };
    let rotary = Rotary { theta: v.theta, partial: v.partial, ..Rotary::whole(v.head_dim, max_positions) };
    let std = c.initializer_range()?;
    let scale = (1.0 / (v.head_dim as f64).sqrt()) as f32;
    let block = Block {
        norms: Norms::before(norm),
        attention: Attention {
            heads: Heads {
                heads,
                kv_heads: v.kv_heads,
                head_dim: v.head_dim,
                scale,
                softcap: None,
                window: None,
            },
            qk_norm: v.qk_norm.map(|over| QkNorm { norm, whole: over == QkNorms::AllHeads }),
            rope: Some(c.rope(&rotary)?),
            qkv_bias: v.qkv_bias,
            out_bias: v.out_bias,
            dropout: c.dropout("attention_dropout", 0.0)?,
        },
        mlp: Mlp {
            intermediate: c.size("intermediate_size")?,
            activation: v.activation,
            bias: v.mlp_bias,
            experts: None,
        },
        residual_scale: 1.0,
        residual_dropout: 0.0,
        parallel: false,
    };
    Ok(Architecture {
        model_type: c.text("model_type")?.to_string(),
        vocab_size: c.size("vocab_size")?,
        hidden,
        max_positions,
        embedding: Embedding { positions: None, scale: 1.0, noise_scale: 1.0, dropout: 0.0 },
        blocks: vec![block; c.layers("num_hidden_layers", hidden)?],
        head: Head { norm, tied: c.flag_or("tie_word_embeddings", v.tied)?, scale: 1.0, softcap: None },
        names: NAMES,
        init: Init { std, residual_std: std, padding_row: c.padding_row()? },
        balance: 0.0,
        added: None,
        packed: None,
        not_applied: c.overridden()?.into_iter().collect(),
    })
}

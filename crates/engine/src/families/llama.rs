//! `llama` and `qwen2`: RMS norm, rotary positions, SwiGLU.

use super::config::Config;
use crate::Result;
use crate::arch::{Architecture, Attention, Block, Embedding, Head, Init, Mlp, Names, Norms};
use crate::kernels::{Activation, Heads, Norm};

pub(super) const NAMES: Names = Names {
    embedding: "model.embed_tokens",
    positions: "",
    block: "model.layers.{}",
    attention_norm: "input_layernorm",
    qkv: &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    qk_norm: ["self_attn.q_norm", "self_attn.k_norm"],
    out: "self_attn.o_proj",
    mlp_norm: "post_attention_layernorm",
    up: &["mlp.gate_proj", "mlp.up_proj"],
    down: "mlp.down_proj",
    norm: "model.norm",
    head: "lm_head",
    transposed: false,
};

/// What differs between families of this kind.
pub(super) struct Variant {
    pub(super) head_dim: usize,
    pub(super) kv_heads: usize,
    pub(super) qkv_bias: bool,
    pub(super) out_bias: bool,
    pub(super) mlp_bias: bool,
    /// RMS norm of each head of queries and keys.
    pub(super) qk_norm: bool,
    /// transformers' default of `max_position_embeddings`.
    pub(super) max_positions: usize,
}

/// Llama: the key/value heads default to the heads, the head size to `hidden_size / num_attention_heads`.
pub(super) fn llama(c: &Config) -> Result<Architecture> {
    let bias = c.flag_or("attention_bias", false)?;
    let mlp_bias = c.flag_or("mlp_bias", false)?;
    decoder(c, Variant { qkv_bias: bias, out_bias: bias, mlp_bias, ..sizes(c)? })
}

/// Qwen2: queries, keys and values have biases, nothing else does.
pub(super) fn qwen2(c: &Config) -> Result<Architecture> {
    c.refuse_windows("the published Qwen2 and Qwen2.5 models attend to whole sequences")?;
    let kv_heads = c.kv_heads(c.size("num_attention_heads")?, 32)?;
    decoder(c, Variant { qkv_bias: true, kv_heads, max_positions: 32_768, ..sizes(c)? })
}

/// Llama's defaults.
fn sizes(c: &Config) -> Result<Variant> {
    let (hidden, heads) = (c.size("hidden_size")?, c.size("num_attention_heads")?);
    Ok(Variant {
        head_dim: c.size_or("head_dim", hidden.checked_div(heads))?,
        kv_heads: c.kv_heads(heads, heads)?,
        qkv_bias: false,
        out_bias: false,
        mlp_bias: false,
        qk_norm: false,
        max_positions: 2048,
    })
}

/// A decoder whose layers are all alike.
pub(super) fn decoder(c: &Config, v: Variant) -> Result<Architecture> {
    c.activation("hidden_act", Some("silu"), &["silu", "swish"])?;
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
    let norm = Norm::Rms { eps: c.epsilon("rms_norm_eps", 1e-6)? };
    let std = c.initializer_range()?;
    let mut not_applied = c.dropout(&["attention_dropout"])?;
    not_applied.extend(c.overridden()?);
    let scale = (1.0 / (v.head_dim as f64).sqrt()) as f32;
    let block = Block {
        norms: Norms { attention: norm, mlp: norm },
        attention: Attention {
            heads: Heads { heads, kv_heads: v.kv_heads, head_dim: v.head_dim, scale },
            qk_norm: v.qk_norm.then_some(norm),
            rope: Some(c.rope(v.head_dim, max_positions)?),
            qkv_bias: v.qkv_bias,
            out_bias: v.out_bias,
        },
        mlp: Mlp {
            intermediate: c.size("intermediate_size")?,
            activation: Activation::SwiGlu,
            bias: v.mlp_bias,
        },
    };
    Ok(Architecture {
        model_type: c.text("model_type")?.to_string(),
        vocab_size: c.size("vocab_size")?,
        hidden,
        max_positions,
        embedding: Embedding { positions: None },
        blocks: vec![block; c.layers("num_hidden_layers", hidden)?],
        head: Head { norm, tied: c.flag_or("tie_word_embeddings", false)? },
        names: NAMES,
        init: Init { std, residual_std: std, padding_row: c.padding_row()? },
        not_applied,
    })
}

//! `gpt_neox` (GPT-NeoX, Pythia): layer norms, attention parallel to the MLP, rotation of a part of each head, GELU.

use super::config::Config;
use super::rope::Rotary;
use crate::Result;
use crate::arch::{Architecture, Attention, Block, Embedding, Head, Init, Mlp, Names, Norms};
use crate::kernels::{Heads, Norm};

const NAMES: Names = Names {
    embedding: "gpt_neox.embed_in",
    positions: "",
    block: "gpt_neox.layers.{}",
    attention_norm: "input_layernorm",
    qkv: &["attention.query_key_value"],
    qk_norm: ["", ""],
    qkv_by_head: true,
    out: "attention.dense",
    after_attention: "",
    mlp_norm: "post_attention_layernorm",
    after_mlp: "",
    up: &["mlp.dense_h_to_4h"],
    down: "mlp.dense_4h_to_h",
    router: "",
    expert: "",
    norm: "gpt_neox.final_layer_norm",
    head: "embed_out",
    transposed: false,
};

pub(super) fn gpt_neox(c: &Config) -> Result<Architecture> {
    let activation = c.gelu("hidden_act", "gelu")?;
    let (hidden, heads) = (c.size("hidden_size")?, c.size("num_attention_heads")?);
    let head_dim = hidden / heads;
    if head_dim * heads != hidden {
        return Err(c.refuse(
            format!("{heads} heads of {head_dim} in a width of {hidden}"),
            "shapes in config.json contradict each other; copy it from the model's repository again".into(),
        ));
    }
    let max_positions = c.size_or("max_position_embeddings", Some(2048))?;
    let keys = ["rotary_emb_base", "rotary_pct"];
    let rotary = Rotary { partial: Some(0.25), keys, ..Rotary::whole(head_dim, max_positions) };
    let norm = Norm::Layer { eps: c.epsilon("layer_norm_eps", 1e-5)? };
    let std = c.initializer_range()?;
    let bias = c.flag_or("attention_bias", true)?;
    let dropout = c.dropout("hidden_dropout", 0.0)?;
    let scale = (1.0 / (head_dim as f64).sqrt()) as f32;
    let block = Block {
        norms: Norms::before(norm),
        attention: Attention {
            heads: Heads { heads, kv_heads: heads, head_dim, scale, softcap: None, window: None },
            qk_norm: None,
            rope: Some(c.rope(&rotary)?),
            qkv_bias: bias,
            out_bias: bias,
            dropout: c.dropout("attention_dropout", 0.0)?,
        },
        mlp: Mlp { intermediate: c.size("intermediate_size")?, activation, bias: true, experts: None },
        residual_scale: 1.0,
        residual_dropout: dropout,
        parallel: c.flag_or("use_parallel_residual", true)?,
    };
    Ok(Architecture {
        model_type: c.text("model_type")?.to_string(),
        vocab_size: c.size("vocab_size")?,
        hidden,
        max_positions,
        embedding: Embedding { positions: None, scale: 1.0, noise_scale: 1.0, dropout },
        blocks: vec![block; c.layers("num_hidden_layers", hidden)?],
        head: Head { norm, tied: c.flag_or("tie_word_embeddings", false)?, scale: 1.0, softcap: None },
        names: NAMES,
        init: Init { std, residual_std: std, padding_row: None },
        balance: 0.0,
        added: None,
        packed: None,
        not_applied: c.overridden()?.into_iter().collect(),
    })
}

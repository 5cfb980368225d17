//! `gpt2`: layer norm, learned positions, GELU, biases everywhere.

use super::config::Config;
use crate::Result;
use crate::arch::{Architecture, Attention, Block, Embedding, Head, Init, Mlp, Names, Norms};
use crate::kernels::{Heads, Norm};

const NAMES: Names = Names {
    embedding: "transformer.wte",
    positions: "transformer.wpe",
    block: "transformer.h.{}",
    attention_norm: "ln_1",
    qkv: &["attn.c_attn"],
    qk_norm: ["", ""],
    qkv_by_head: false,
    out: "attn.c_proj",
    after_attention: "",
    mlp_norm: "ln_2",
    after_mlp: "",
    up: &["mlp.c_fc"],
    down: "mlp.c_proj",
    router: "",
    expert: "",
    norm: "transformer.ln_f",
    head: "lm_head",
    transposed: true,
};

pub(super) fn gpt2(c: &Config) -> Result<Architecture> {
    let activation = c.gelu("activation_function", "gelu_new")?;
    c.refuse_flag("add_cross_attention", "there is no encoder here")?;
    let by_layer = c.flag_or("scale_attn_by_inverse_layer_idx", false)?;
    let (hidden, heads) = (c.size("n_embd")?, c.size("n_head")?);
    let head_dim = hidden / heads;
    if head_dim * heads != hidden {
        return Err(c.refuse(
            format!("{heads} heads of {head_dim} in a width of {hidden}"),
            "shapes in config.json contradict each other; copy it from the model's repository again".into(),
        ));
    }
    let layers = c.layers("n_layer", hidden)?;
    let scaled = c.flag_or("scale_attn_weights", true)?;
    let max_positions = c.size_or("n_positions", Some(1024))?;
    let norm = Norm::Layer { eps: c.epsilon("layer_norm_epsilon", 1e-5)? };
    let std = c.initializer_range()?;
    let scale = if scaled { (1.0 / (head_dim as f64).sqrt()) as f32 } else { 1.0 };
    let block = Block {
        norms: Norms::before(norm),
        attention: Attention {
            heads: Heads { heads, kv_heads: heads, head_dim, scale, softcap: None, window: None },
            qk_norm: None,
            rope: None,
            qkv_bias: true,
            out_bias: true,
            dropout: c.dropout("attn_pdrop", 0.1)?,
        },
        mlp: Mlp {
            intermediate: c.size_or("n_inner", Some(4 * hidden))?,
            activation,
            bias: true,
            experts: None,
        },
        residual_scale: 1.0,
        residual_dropout: c.dropout("resid_pdrop", 0.1)?,
        parallel: false,
    };
    let mut blocks = vec![block; layers];
    for (n, block) in blocks.iter_mut().enumerate().filter(|_| by_layer) {
        block.attention.heads.scale /= (n + 1) as f32;
    }
    Ok(Architecture {
        model_type: c.text("model_type")?.to_string(),
        vocab_size: c.size("vocab_size")?,
        hidden,
        max_positions,
        embedding: Embedding {
            positions: Some(max_positions),
            scale: 1.0,
            noise_scale: 1.0,
            dropout: c.dropout("embd_pdrop", 0.1)?,
        },
        blocks,
        head: Head { norm, tied: c.flag_or("tie_word_embeddings", true)?, scale: 1.0, softcap: None },
        names: NAMES,
        init: Init { std, residual_std: std / (2.0 * layers as f64).sqrt(), padding_row: None },
        balance: 0.0,
        added: None,
        packed: None,
        not_applied: Vec::new(),
    })
}

//! `qwen3`: Llama's decoder with an RMS norm of each head of queries and keys, and a head size of its own.

use super::config::Config;
use super::llama::{Variant, decoder};
use crate::Result;
use crate::arch::Architecture;

pub(super) fn qwen3(c: &Config) -> Result<Architecture> {
    c.refuse_windows("the published Qwen3 models attend to whole sequences")?;
    let bias = c.flag_or("attention_bias", false)?;
    decoder(
        c,
        Variant {
            // transformers' defaults, which do not follow from the other sizes.
            head_dim: c.size_or("head_dim", Some(128))?,
            kv_heads: c.kv_heads(c.size("num_attention_heads")?, 32)?,
            qkv_bias: bias,
            out_bias: bias,
            mlp_bias: false,
            qk_norm: true,
            max_positions: 32_768,
        },
    )
}

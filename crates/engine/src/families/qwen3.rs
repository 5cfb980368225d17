//! `qwen3`: Llama's decoder with an RMS norm of each head of queries and keys, and a head size of its own.

use super::config::Config;
use super::llama::{QkNorms, Variant, decoder, qwen_windows, sizes};
use crate::Result;
use crate::arch::Architecture;

pub(super) fn qwen3(c: &Config) -> Result<Architecture> {
    let mut arch = decoder(c, variant(c, 32)?)?;
    qwen_windows(c, &mut arch)?;
    Ok(arch)
}

/// Qwen3's decoder, with transformers' defaults that do not follow from the other sizes.
pub(super) fn variant(c: &Config, kv_heads: usize) -> Result<Variant> {
    let bias = c.flag_or("attention_bias", false)?;
    Ok(Variant {
        head_dim: c.size_or("head_dim", Some(128))?,
        kv_heads: c.kv_heads(c.size("num_attention_heads")?, kv_heads)?,
        qkv_bias: bias,
        out_bias: bias,
        qk_norm: Some(QkNorms::EachHead),
        max_positions: 32_768,
        ..sizes(c)?
    })
}

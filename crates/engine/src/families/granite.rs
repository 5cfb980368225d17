//! `granite`: Llama's decoder with factors on the embedding, the scores, the residual branches and the logits.

use super::config::Config;
use super::llama::{Variant, decoder, sizes};
use crate::Result;
use crate::arch::Architecture;

pub(super) fn granite(c: &Config) -> Result<Architecture> {
    let bias = c.flag_or("attention_bias", false)?;
    let mlp_bias = c.flag_or("mlp_bias", false)?;
    let mut arch = decoder(c, Variant { qkv_bias: bias, out_bias: bias, mlp_bias, ..sizes(c)? })?;
    arch.embedding.scale = c.factor("embedding_multiplier", 1.0)?;
    arch.embedding.noise_scale = arch.embedding.scale;
    arch.head.scale = 1.0 / c.factor("logits_scaling", 1.0)?;
    for block in &mut arch.blocks {
        block.attention.heads.scale = c.factor("attention_multiplier", 1.0)?;
        block.residual_scale = c.factor("residual_multiplier", 1.0)?;
    }
    Ok(arch)
}

//! `olmo2`: Llama's decoder with norms after attention and MLP instead of before them, and over all of q and k.

use super::config::Config;
use super::llama::{self, QkNorms, Variant, decoder, sizes};
use crate::Result;
use crate::arch::{Architecture, Names, Norms};

const NAMES: Names = Names {
    after_attention: "post_attention_layernorm",
    after_mlp: "post_feedforward_layernorm",
    ..llama::NAMES
};

pub(super) fn olmo2(c: &Config) -> Result<Architecture> {
    let bias = c.flag_or("attention_bias", false)?;
    let qk_norm = Some(QkNorms::AllHeads);
    let mut arch = decoder(c, Variant { qkv_bias: bias, out_bias: bias, qk_norm, eps: 1e-5, ..sizes(c)? })?;
    arch.names = NAMES;
    let after = Some(arch.head.norm);
    for block in &mut arch.blocks {
        block.norms = Norms { attention: None, after_attention: after, mlp: None, after_mlp: after };
    }
    Ok(arch)
}

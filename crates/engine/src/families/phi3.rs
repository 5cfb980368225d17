//! `phi3` (Phi-3, Phi-3.5, Phi-4): Llama's decoder with fused projections, rotation of a part of each head, LongRoPE.

use super::config::Config;
use super::llama::{self, Variant, decoder, sizes};
use crate::Result;
use crate::arch::{Architecture, Names};

const NAMES: Names = Names { qkv: &["self_attn.qkv_proj"], up: &["mlp.gate_up_proj"], ..llama::NAMES };

pub(super) fn phi3(c: &Config) -> Result<Architecture> {
    for key in ["attention_bias", "mlp_bias"] {
        c.refuse_flag(key, "the projections of a Phi-3 model have no biases")?;
    }
    // Used by LongRoPE only.
    c.size_or("original_max_position_embeddings", Some(4096))?;
    let variant = Variant { eps: 1e-5, max_positions: 4096, partial: Some(1.0), ..sizes(c)? };
    let mut arch = decoder(c, variant)?;
    arch.names = NAMES;
    let window = c.optional_size("sliding_window", None)?;
    let windows = c.windows(arch.blocks.len(), window, |_| window.is_some())?;
    arch.set_windows(windows);
    let dropout = c.dropout("resid_pdrop", 0.0)?;
    arch.blocks.iter_mut().for_each(|block| block.residual_dropout = dropout);
    // transformers reads it but does not use it.
    c.dropout("embd_pdrop", 0.0)?;
    Ok(arch)
}

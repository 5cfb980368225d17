//! `gemma2` and `gemma3_text`: four norms per layer whose weights are stored as differences from 1, windows on some
//! layers, capped scores and logits, a scaled embedding; Gemma 3 has norms of q and k and another RoPE base under a
//! window.

use super::config::Config;
use super::llama::{self, QkNorms, Variant, decoder, sizes};
use super::rope::Rotary;
use crate::Result;
use crate::arch::{Architecture, Names, Norms};
use crate::kernels::Activation;

const NAMES: Names = Names {
    after_attention: "post_attention_layernorm",
    mlp_norm: "pre_feedforward_layernorm",
    after_mlp: "post_feedforward_layernorm",
    ..llama::NAMES
};

/// Gemma 2: every other layer has a window, starting with the first.
pub(super) fn gemma2(c: &Config) -> Result<Architecture> {
    let mut arch = gemma(c, Variant { max_positions: 8192, ..variant(c)? }, Some(50.0), Some(30.0))?;
    windows(c, &mut arch, 2)?;
    Ok(arch)
}

/// Gemma 3: five of six layers have a window.
pub(super) fn gemma3(c: &Config) -> Result<Architecture> {
    let qk_norm = Some(QkNorms::EachHead);
    // The base of the full layers; `rope_scaling` applies to them too.
    let variant = Variant { qk_norm, max_positions: 131_072, theta: 1e6, ..variant(c)? };
    let head_dim = variant.head_dim;
    let nested = c.object("rope_parameters")?.filter(|rope| rope.has("full_attention"));
    let mut arch = match &nested {
        None => gemma(c, variant, None, None)?,
        Some(rope) => {
            let positions = c.size_or("max_position_embeddings", Some(variant.max_positions))?;
            let rotary = Rotary { theta: 1e6, ..Rotary::whole(head_dim, positions) };
            let full = match (rope.object("full_attention")?, c.object("rope_scaling")?) {
                (_, Some(_)) => {
                    return Err(c.refuse(
                        "rope_scaling beside rope_parameters by layer is not supported".into(),
                        "state the full layers' scaling in rope_parameters.full_attention".into(),
                    ));
                }
                (full, None) => c.rope_of(&full.unwrap_or(c.nothing()), &rotary)?,
            };
            let mut arch = gemma(c, variant, None, None)?;
            arch.blocks.iter_mut().for_each(|block| block.attention.rope = Some(full.clone()));
            arch
        }
    };
    let every = c.size_or("sliding_window_pattern", Some(6))?;
    windows(c, &mut arch, every)?;
    let keys = ["rope_local_base_freq", "partial_rotary_factor"];
    let rotary = Rotary { keys, ..Rotary::whole(head_dim, arch.max_positions) };
    let local = match &nested {
        Some(rope) => rope.object("sliding_attention")?,
        None => None,
    };
    let local = c.rope_of(&local.unwrap_or(c.nothing()), &rotary)?;
    for block in arch.blocks.iter_mut().filter(|block| block.attention.heads.window.is_some()) {
        block.attention.rope = Some(local.clone());
    }
    Ok(arch)
}

/// The defaults of both families.
fn variant(c: &Config) -> Result<Variant> {
    let bias = c.flag_or("attention_bias", false)?;
    Ok(Variant {
        head_dim: c.size_or("head_dim", Some(256))?,
        kv_heads: c.kv_heads(c.size("num_attention_heads")?, 4)?,
        qkv_bias: bias,
        out_bias: bias,
        activation: Activation::GeGluTanh,
        offset: 1.0,
        tied: true,
        ..sizes(c)?
    })
}

fn gemma(
    c: &Config,
    variant: Variant,
    score_cap: Option<f64>,
    logit_cap: Option<f64>,
) -> Result<Architecture> {
    c.activation("hidden_activation", Some("gelu_pytorch_tanh"), &["gelu_pytorch_tanh", "gelu_new"])?;
    if c.has("hidden_act") {
        // Published files have it beside `hidden_activation`; it is not used.
        c.activation("hidden_act", None, &["gelu_pytorch_tanh", "gelu_new", "gelu"])?;
    }
    c.refuse_flag("use_bidirectional_attention", "only causal attention is computed")?;
    let mut arch = decoder(c, variant)?;
    arch.names = NAMES;
    arch.embedding.scale = (arch.hidden as f64).sqrt() as f32;
    arch.head.softcap = c.limit("final_logit_softcapping", logit_cap)?;
    let norm = Some(arch.head.norm);
    for block in &mut arch.blocks {
        block.norms = Norms { attention: norm, after_attention: norm, mlp: norm, after_mlp: norm };
        let heads = &mut block.attention.heads;
        heads.scale = (1.0 / f64::from(c.factor("query_pre_attn_scalar", 256.0)?).sqrt()) as f32;
        // transformers' Gemma 3 has the key but does not cap scores.
        heads.softcap = match score_cap {
            Some(cap) => c.limit("attn_logit_softcapping", Some(cap))?,
            None => None,
        };
    }
    Ok(arch)
}

/// Windows on all layers except each `every`th.
fn windows(c: &Config, arch: &mut Architecture, every: usize) -> Result<()> {
    let window = c.optional_size("sliding_window", Some(4096))?;
    let windows = c.windows(arch.blocks.len(), window, |n| !(n + 1).is_multiple_of(every))?;
    arch.set_windows(windows);
    Ok(())
}

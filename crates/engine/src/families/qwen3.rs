//! `qwen3`: Llama's decoder with an RMS norm of each head of queries and keys, and a separate head size; and
//! `qwen3_moe`, with experts on some layers.

use super::config::Config;
use super::llama::{self, QkNorms, Variant, decoder, qwen_windows, sizes};
use crate::Result;
use crate::arch::{Architecture, Experts, Names};
use crate::kernels::Routing;

pub(super) fn qwen3(c: &Config) -> Result<Architecture> {
    let mut arch = decoder(c, variant(c, 32)?)?;
    qwen_windows(c, &mut arch)?;
    Ok(arch)
}

/// Qwen3's decoder, with those defaults of transformers that do not follow from the other sizes.
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

const NAMES: Names = Names { router: "mlp.gate", expert: "mlp.experts.{}", ..llama::NAMES };

/// Qwen3-MoE: experts on every `decoder_sparse_step`th layer except those in `mlp_only_layers`.
pub(super) fn qwen3_moe(c: &Config) -> Result<Architecture> {
    let mut arch = decoder(c, variant(c, 4)?)?;
    let balance = c.number_or("router_aux_loss_coef", 0.001, 0.0..=1e6)?;
    if c.flag_or("output_router_logits", false)? {
        arch.balance = balance as f32;
    }
    arch.names = NAMES;
    let window = c.optional_size("sliding_window", Some(4096))?;
    let used = c.flag_or("use_sliding_window", false)?;
    let window = window.filter(|_| used);
    // Published files have it; in this family either all layers have the window or none.
    c.get("max_window_layers");
    let windows = c.windows(arch.blocks.len(), window, |_| window.is_some())?;
    arch.set_windows(windows);

    let key = if c.has("num_local_experts") { "num_local_experts" } else { "num_experts" };
    let experts = Experts {
        count: c.size_or(key, Some(128))?,
        routing: Routing {
            per_row: c.size_or("num_experts_per_tok", Some(8))?,
            normalise: c.flag_or("norm_topk_prob", false)?,
        },
    };
    let (width, step) =
        (c.size_or("moe_intermediate_size", Some(768))?, c.size_or("decoder_sparse_step", Some(1))?);
    let dense = c.layer_numbers("mlp_only_layers")?;
    for (n, block) in arch.blocks.iter_mut().enumerate() {
        if !dense.contains(&n) && (n + 1).is_multiple_of(step) {
            (block.mlp.intermediate, block.mlp.experts) = (width, Some(experts));
        }
    }
    Ok(arch)
}

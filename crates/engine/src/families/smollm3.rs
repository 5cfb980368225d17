//! `smollm3`: Llama's decoder with some layers without rotation.

use super::config::Config;
use super::llama::{Variant, decoder, sizes};
use crate::Result;
use crate::arch::Architecture;
use serde_json::Value;

pub(super) fn smollm3(c: &Config) -> Result<Architecture> {
    let bias = c.flag_or("attention_bias", false)?;
    let variant = Variant {
        kv_heads: c.kv_heads(c.size("num_attention_heads")?, 4)?,
        qkv_bias: bias,
        out_bias: bias,
        mlp_bias: c.flag_or("mlp_bias", false)?,
        tied: true,
        max_positions: 32_768,
        theta: 2e6,
        ..sizes(c)?
    };
    let mut arch = decoder(c, variant)?;
    let rotates = rotating(c, arch.blocks.len())?;
    for (block, _) in arch.blocks.iter_mut().zip(&rotates).filter(|(_, rotates)| !**rotates) {
        block.attention.rope = None;
    }
    let window = c.optional_size("sliding_window", None)?;
    let used = c.flag_or("use_sliding_window", false)?;
    let windows =
        c.windows(arch.blocks.len(), window.filter(|_| used), |n| used && window.is_some() && !rotates[n])?;
    arch.set_windows(windows);
    Ok(arch)
}

/// Which layers rotate: `no_rope_layers` has 1 for those that do, and at least one entry per layer.
fn rotating(c: &Config, layers: usize) -> Result<Vec<bool>> {
    let interval = c.size_or("no_rope_layer_interval", Some(4))?;
    let Some(list) = c.get("no_rope_layers") else {
        return Ok((0..layers).map(|n| !(n + 1).is_multiple_of(interval)).collect());
    };
    let flag = |value: &Value| value.as_u64().filter(|n| *n <= 1).map(|n| n == 1);
    let flags = list.as_array().and_then(|list| list.iter().map(flag).collect::<Option<Vec<bool>>>());
    let mut flags = flags.filter(|flags| flags.len() >= layers).ok_or_else(|| {
        c.wrong("no_rope_layers", &format!("a list of 0 and 1 for each of {layers} layers"))
    })?;
    flags.truncate(layers);
    Ok(flags)
}

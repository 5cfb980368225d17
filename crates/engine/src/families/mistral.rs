//! `mistral`: Llama's decoder with a sliding window on every layer.

use super::config::Config;
use super::llama::{Variant, decoder, sizes};
use crate::Result;
use crate::arch::Architecture;

pub(super) fn mistral(c: &Config) -> Result<Architecture> {
    let kv_heads = c.kv_heads(c.size("num_attention_heads")?, 8)?;
    let mut arch = decoder(c, Variant { kv_heads, max_positions: 131_072, ..sizes(c)? })?;
    let window = c.optional_size("sliding_window", Some(4096))?;
    let windows = c.windows(arch.blocks.len(), window, |_| window.is_some())?;
    // transformers applies the window to every layer of this family, whatever the list says.
    if let Some(n) = windows.iter().position(|layer| *layer != window) {
        return Err(c.refuse(
            format!("layer_types[{n}] is full_attention, and sliding_window is {}", window.unwrap_or(0)),
            "every layer of a Mistral model has the window; set sliding_window to null for none".into(),
        ));
    }
    arch.set_windows(windows);
    Ok(arch)
}

//! `quantization_config`: how a model's files have its matrices packed.

use super::config::Config;
use crate::Result;
use crate::dtype::Packing;

const KEY: &str = "quantization_config";

/// The packing that bitsandbytes' settings describe; other methods are rejected.
pub(super) fn packing(config: &Config) -> Result<Option<Packing>> {
    let Some(settings) = config.object(KEY)? else { return Ok(None) };
    let refuse = |what: String| {
        let help =
            "use the original checkpoint; with load_in_4bit=true its linear layers take as little memory";
        Err(config.refuse(format!("{KEY}: {what}"), help.into()))
    };
    let flag = |key: &str| settings.get(key).and_then(|value| value.as_bool()).unwrap_or(false);
    let (four, eight) = (flag("load_in_4bit"), flag("load_in_8bit"));
    let method = settings.get("quant_method").and_then(|method| method.as_str());
    let packing = match method {
        Some("bitsandbytes") | None if four => match settings
            .get("bnb_4bit_quant_type")
            .and_then(|t| t.as_str())
        {
            Some("nf4") => Packing::Nf4 { nested: flag("bnb_4bit_use_double_quant") },
            other => {
                return refuse(format!("bnb_4bit_quant_type {} is not read, nf4 is", other.unwrap_or("fp4")));
            }
        },
        Some("bitsandbytes") | None if eight && !flag("llm_int8_has_fp16_weight") => Packing::Int8,
        Some("bitsandbytes") => return refuse("neither 4 bits nor 8 bits of bitsandbytes".into()),
        Some(method) => {
            return refuse(format!(
                "weights that {method} has quantised are not read, those of bitsandbytes are"
            ));
        }
        None => return refuse("it names no quant_method".into()),
    };
    // The other settings affect how bitsandbytes computes, not the stored values.
    settings.read_all();
    Ok(Some(packing))
}

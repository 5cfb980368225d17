//! A family of models as a value, read from `config.json`.

use crate::kernels::{Activation, Heads, Norm};
use crate::{Error, Result};
use serde_json::Value;
use std::path::Path;

/// Everything that the forward pass must know. Families differ in fields, never in code; how their weights
/// are named and laid out in files is [`Layout`]'s business.
#[derive(Clone, Debug, PartialEq)]
pub struct Architecture {
    /// `model_type` of `config.json`.
    pub model_type: String,
    /// Rows of the embedding and of the head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Blocks.
    pub layers: usize,
    /// Width inside the MLP.
    pub intermediate: usize,
    /// Positions that the model was made for. A limit only where positions are learned.
    pub max_positions: usize,
    /// Attention heads and their scale.
    pub heads: Heads,
    /// Normalisation before attention, before the MLP and at the end.
    pub norm: Norm,
    /// How a token knows where it stands.
    pub position: Position,
    /// What stands between the MLP's matrices.
    pub activation: Activation,
    /// Which linear layers have a bias.
    pub bias: Biases,
    /// The head is the embedding.
    pub tied: bool,
    /// Names and layout of the weights in files.
    pub layout: Layout,
    /// Initialisation of a model without weights.
    pub init: Init,
    /// Settings of `config.json` that change training elsewhere and are not applied here (dropout), in words.
    pub not_applied: Vec<String>,
}

/// How positions enter.
#[derive(Clone, Debug, PartialEq)]
pub enum Position {
    /// Rotary embeddings: `head_dim / 2` inverse frequencies, scaling applied.
    Rope(Vec<f32>),
    /// A learned vector per position, added to the embedding.
    Learned,
}

/// Which linear layers have a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Biases {
    /// Queries, keys and values.
    pub qkv: bool,
    /// The attention's output.
    pub out: bool,
    /// The MLP's matrices.
    pub mlp: bool,
}

/// How a family names its weights and lays them out in files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `model.layers.N.self_attn.q_proj…`, separate projections.
    Llama,
    /// `transformer.h.N.attn.c_attn…`, fused qkv, Conv1D (inputs × outputs).
    Gpt2,
}

/// transformers' initialisation: normal with `std`, biases 0, norms 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Init {
    /// `initializer_range`.
    pub std: f64,
    /// Deviation of the projections that write to the residual stream.
    pub residual_std: f64,
    /// The embedding's row of zeros (`pad_token_id` of the families whose embedding has a padding row).
    pub padding_row: Option<usize>,
}

impl Architecture {
    /// Reads `dir/config.json`.
    ///
    /// # Errors
    /// When the file is missing or broken, and when it asks for something that this engine does not compute.
    pub fn from_dir(dir: &Path) -> Result<Architecture> {
        let path = dir.join("config.json");
        let text = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
        let config = serde_json::from_slice(&text).map_err(|e| Error::Config {
            path: path.clone(),
            message: format!("not valid JSON: {e}"),
            help: "copy config.json from the model's repository again".into(),
        })?;
        Architecture::from_json(&config, &path)
    }

    /// Reads a parsed `config.json`, in the style of transformers 4 or 5; `path` is for messages.
    ///
    /// # Errors
    /// As [`Architecture::from_dir`].
    pub fn from_json(config: &Value, path: &Path) -> Result<Architecture> {
        let config = Config { json: config, path };
        let family = config.text("model_type")?;
        let arch = match family {
            "llama" | "qwen2" => config.llama(family)?,
            "gpt2" => config.gpt2()?,
            other => {
                return Err(config.refuse(
                    format!("model_type \"{other}\" is not supported"),
                    "supported families: llama, qwen2, gpt2".into(),
                ));
            }
        };
        config.plausible(&arch)?;
        Ok(arch)
    }

    /// Parameters, a tied head counted once.
    pub fn parameter_count(&self) -> u64 {
        crate::params::Layout::of(self).len() as u64
    }

    /// Positions that cannot be exceeded: those of a learned table.
    pub fn position_limit(&self) -> Option<usize> {
        matches!(self.position, Position::Learned).then_some(self.max_positions)
    }
}

/// Far above any model's sizes, far below what overflows when two of them are multiplied.
const MAX_SIZE: u64 = 1 << 31;

/// More layers than any model has; a file that asks for more is broken or hostile.
const MAX_LAYERS: usize = 10_000;

/// A parsed `config.json` and where it came from.
struct Config<'a> {
    json: &'a Value,
    path: &'a Path,
}

impl Config<'_> {
    fn refuse(&self, message: String, help: String) -> Error {
        Error::Config { path: self.path.to_path_buf(), message, help }
    }

    fn wrong(&self, key: &str, want: &str) -> Error {
        let found = self.json.get(key).map_or("it is missing".to_string(), |v| format!("it is {v}"));
        self.refuse(
            format!("\"{key}\" must be {want}; {found}"),
            "copy config.json from the model's repository again".into(),
        )
    }

    /// The value of a key that is present and not null.
    fn get(&self, key: &str) -> Option<&Value> {
        self.json.get(key).filter(|v| !v.is_null())
    }

    fn text(&self, key: &str) -> Result<&str> {
        self.get(key).and_then(Value::as_str).ok_or_else(|| self.wrong(key, "a string"))
    }

    fn size(&self, key: &str) -> Result<usize> {
        self.size_or(key, None)
    }

    fn size_or(&self, key: &str, default: Option<usize>) -> Result<usize> {
        match (self.get(key), default) {
            (None, Some(default)) => Ok(default),
            (Some(v), _) => {
                let size = v.as_u64().filter(|n| (1..=MAX_SIZE).contains(n));
                size.map(|n| n as usize)
                    .ok_or_else(|| self.wrong(key, "a positive whole number of at most 2^31"))
            }
            (None, None) => Err(self.wrong(key, "a positive whole number")),
        }
    }

    fn number_or(&self, key: &str, default: f64) -> Result<f64> {
        match self.get(key) {
            None => Ok(default),
            Some(v) => v.as_f64().filter(|x| x.is_finite()).ok_or_else(|| self.wrong(key, "a number")),
        }
    }

    fn flag_or(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(v) => v.as_bool().ok_or_else(|| self.wrong(key, "true or false")),
        }
    }

    /// `llama` and `qwen2`: RMS norm, rotary positions, SwiGLU.
    fn llama(&self, family: &str) -> Result<Architecture> {
        let qwen = family == "qwen2";
        match self.text("hidden_act")? {
            "silu" | "swish" => {}
            other => {
                return Err(
                    self.refuse(format!("hidden_act \"{other}\" is not supported"), "supported: silu".into())
                );
            }
        }
        if qwen && self.flag_or("use_sliding_window", false)? {
            return Err(self.refuse(
                "use_sliding_window = true is not supported".into(),
                "the published Qwen2 and Qwen2.5 models have it off".into(),
            ));
        }
        let (hidden, heads) = (self.size("hidden_size")?, self.size("num_attention_heads")?);
        let head_dim = self.size_or("head_dim", hidden.checked_div(heads))?;
        let max_positions = self.size_or("max_position_embeddings", Some(2048))?;
        let attention_bias = !qwen && self.flag_or("attention_bias", false)?;
        let std = self.number_or("initializer_range", 0.02)?;
        Ok(Architecture {
            model_type: family.to_string(),
            vocab_size: self.size("vocab_size")?,
            hidden,
            layers: self.size("num_hidden_layers")?,
            intermediate: self.size("intermediate_size")?,
            max_positions,
            heads: Heads {
                heads,
                kv_heads: self.size_or("num_key_value_heads", Some(heads))?,
                head_dim,
                scale: (1.0 / (head_dim as f64).sqrt()) as f32,
            },
            norm: Norm::Rms { eps: self.number_or("rms_norm_eps", 1e-6)? as f32 },
            position: Position::Rope(self.rope(head_dim, max_positions)?),
            activation: Activation::SwiGlu,
            bias: Biases {
                qkv: qwen || attention_bias,
                out: attention_bias,
                mlp: !qwen && self.flag_or("mlp_bias", false)?,
            },
            tied: self.flag_or("tie_word_embeddings", false)?,
            layout: Layout::Llama,
            init: Init { std, residual_std: std, padding_row: self.padding_row()? },
            not_applied: self.dropout(&["attention_dropout"])?,
        })
    }

    /// `gpt2`: layer norm, learned positions, GELU, biases everywhere.
    fn gpt2(&self) -> Result<Architecture> {
        match self.get("activation_function").and_then(Value::as_str).unwrap_or("gelu_new") {
            "gelu_new" | "gelu_pytorch_tanh" => {}
            other => {
                return Err(self.refuse(
                    format!("activation_function \"{other}\" is not supported"),
                    "supported: gelu_new, gelu_pytorch_tanh".into(),
                ));
            }
        }
        for key in ["scale_attn_by_inverse_layer_idx", "add_cross_attention"] {
            if self.flag_or(key, false)? {
                return Err(self.refuse(
                    format!("{key} = true is not supported"),
                    "the GPT-2 models have it off".into(),
                ));
            }
        }
        let (hidden, heads, layers) = (self.size("n_embd")?, self.size("n_head")?, self.size("n_layer")?);
        let head_dim = hidden / heads;
        let scaled = self.flag_or("scale_attn_weights", true)?;
        let std = self.number_or("initializer_range", 0.02)?;
        Ok(Architecture {
            model_type: "gpt2".to_string(),
            vocab_size: self.size("vocab_size")?,
            hidden,
            layers,
            intermediate: self.size_or("n_inner", Some(4 * hidden))?,
            max_positions: self.size_or("n_positions", Some(1024))?,
            heads: Heads {
                heads,
                kv_heads: heads,
                head_dim,
                scale: if scaled { (1.0 / (head_dim as f64).sqrt()) as f32 } else { 1.0 },
            },
            norm: Norm::Layer { eps: self.number_or("layer_norm_epsilon", 1e-5)? as f32 },
            position: Position::Learned,
            activation: Activation::GeluTanh,
            bias: Biases { qkv: true, out: true, mlp: true },
            tied: self.flag_or("tie_word_embeddings", true)?,
            layout: Layout::Gpt2,
            init: Init { std, residual_std: std / (2.0 * layers as f64).sqrt(), padding_row: None },
            not_applied: self.dropout(&["attn_pdrop", "embd_pdrop", "resid_pdrop"])?,
        })
    }

    /// Dropout that transformers would apply in training. Fine-tuning here is without it, and says so.
    fn dropout(&self, keys: &[&str]) -> Result<Vec<String>> {
        let mut found = Vec::new();
        for key in keys {
            let rate = self.number_or(key, 0.0)?;
            if rate != 0.0 {
                found.push(format!("{key} = {rate}: dropout is not applied"));
            }
        }
        Ok(found)
    }

    fn padding_row(&self) -> Result<Option<usize>> {
        match self.get("pad_token_id") {
            None => Ok(None),
            // transformers has met -1 in the wild; it means none.
            Some(v) if v.as_i64() == Some(-1) => Ok(None),
            Some(v) => match v.as_u64() {
                Some(id) => Ok(Some(id as usize)),
                None => Err(self.wrong("pad_token_id", "a token id")),
            },
        }
    }

    /// Inverse frequencies, scaled as `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`
    /// (transformers 4) say.
    fn rope(&self, head_dim: usize, max_positions: usize) -> Result<Vec<f32>> {
        let nested = self.get("rope_parameters").or_else(|| self.get("rope_scaling"));
        let empty = Value::Null;
        let scaling = Config { json: nested.unwrap_or(&empty), path: self.path };
        let theta = scaling.number_or("rope_theta", self.number_or("rope_theta", 10_000.0)?)?;
        if self.number_or("partial_rotary_factor", scaling.number_or("partial_rotary_factor", 1.0)?)? != 1.0 {
            return Err(self.refuse(
                "partial_rotary_factor is not supported".into(),
                "the published Llama and Qwen2 models rotate whole heads".into(),
            ));
        }
        let plain = (0..head_dim / 2).map(|i| {
            // f32 as in transformers, whose rounding the published weights were trained with.
            1.0 / (theta as f32).powf((2 * i) as f32 / head_dim as f32)
        });
        let kind = scaling.get("rope_type").or_else(|| scaling.get("type")).and_then(Value::as_str);
        match kind.unwrap_or("default") {
            "default" => Ok(plain.collect()),
            "linear" => {
                let factor = scaling.number_or("factor", 1.0)? as f32;
                Ok(plain.map(|f| f / factor).collect())
            }
            "llama3" => {
                let original = scaling.number_or("original_max_position_embeddings", max_positions as f64)?;
                let scale = Llama3 {
                    factor: scaling.number_or("factor", 8.0)? as f32,
                    low: scaling.number_or("low_freq_factor", 1.0)? as f32,
                    high: scaling.number_or("high_freq_factor", 4.0)? as f32,
                    original: original as f32,
                };
                Ok(plain.map(|f| scale.apply(f)).collect())
            }
            other => Err(self.refuse(
                format!("rope_type \"{other}\" is not supported"),
                "supported: default, linear, llama3".into(),
            )),
        }
    }

    /// Refuses what would overflow or divide by zero later.
    fn plausible(&self, a: &Architecture) -> Result<()> {
        let h = a.heads;
        let help = || {
            "shapes in config.json contradict each other; copy it from the model's repository again".into()
        };
        if !h.heads.is_multiple_of(h.kv_heads) {
            let message =
                format!("{} attention heads do not divide into {} key/value heads", h.heads, h.kv_heads);
            return Err(self.refuse(message, help()));
        }
        let heads_tile = a.layout != Layout::Gpt2 || h.head_dim * h.heads == a.hidden;
        let rotates = !matches!(a.position, Position::Rope(_)) || h.head_dim.is_multiple_of(2);
        if h.head_dim == 0 || !heads_tile || !rotates {
            return Err(self
                .refuse(format!("{} heads of {} in a width of {}", h.heads, h.head_dim, a.hidden), help()));
        }
        let widest = [
            a.hidden,
            a.vocab_size,
            a.intermediate * a.activation.fan(),
            h.query_width(),
            h.kv_width(),
            a.max_positions,
        ]
        .into_iter()
        .max()
        .unwrap_or(0);
        let layers = (a.layers as u128) * (a.hidden as u128) * (widest as u128) * 8;
        if layers > 1 << 48 || a.layers > MAX_LAYERS {
            return Err(self.refuse(
                format!("a model of {} layers of width {} is not plausible", a.layers, a.hidden),
                help(),
            ));
        }
        Ok(())
    }
}

/// Llama 3.1's scaling: long wavelengths are stretched, short ones kept, those between blended
/// (`_compute_llama3_parameters` of transformers).
struct Llama3 {
    factor: f32,
    low: f32,
    high: f32,
    original: f32,
}

impl Llama3 {
    fn apply(&self, frequency: f32) -> f32 {
        let wavelength = 2.0 * std::f32::consts::PI / frequency;
        if wavelength > self.original / self.low {
            frequency / self.factor
        } else if wavelength < self.original / self.high {
            frequency
        } else {
            let smooth = (self.original / wavelength - self.low) / (self.high - self.low);
            (1.0 - smooth) * frequency / self.factor + smooth * frequency
        }
    }
}

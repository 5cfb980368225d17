//! Typed access to the keys of a `config.json`, and the settings that families share.

use crate::arch::{MAX_LAYERS, MAX_SIZE};
use crate::rope::{Llama3, Rope};
use crate::{Error, Result};
use serde_json::Value;
use std::ops::RangeInclusive;
use std::path::Path;

/// A parsed `config.json` and where it came from.
pub(super) struct Config<'a> {
    json: &'a Value,
    path: &'a Path,
}

impl<'a> Config<'a> {
    pub(super) fn new(json: &'a Value, path: &'a Path) -> Config<'a> {
        Config { json, path }
    }

    /// An error about this file.
    pub(super) fn refuse(&self, message: String, help: String) -> Error {
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
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.json.get(key).filter(|v| !v.is_null())
    }

    pub(super) fn text(&self, key: &str) -> Result<&'a str> {
        self.get(key).and_then(Value::as_str).ok_or_else(|| self.wrong(key, "a string"))
    }

    pub(super) fn size(&self, key: &str) -> Result<usize> {
        self.size_or(key, None)
    }

    pub(super) fn size_or(&self, key: &str, default: Option<usize>) -> Result<usize> {
        match (self.get(key), default) {
            (None, Some(default)) => Ok(default),
            (Some(v), _) => {
                let size = v.as_u64().filter(|n| (1..=MAX_SIZE as u64).contains(n));
                size.map(|n| n as usize)
                    .ok_or_else(|| self.wrong(key, "a positive whole number of at most 2^31"))
            }
            (None, None) => Err(self.wrong(key, "a positive whole number")),
        }
    }

    /// A number within `range`: what lies outside breaks the arithmetic, or belongs to no model.
    pub(super) fn number_or(&self, key: &str, default: f64, range: RangeInclusive<f64>) -> Result<f64> {
        match self.get(key) {
            None => Ok(default),
            Some(_) => self.number(key, range),
        }
    }

    fn number(&self, key: &str, range: RangeInclusive<f64>) -> Result<f64> {
        let number = self.get(key).and_then(Value::as_f64).filter(|x| range.contains(x));
        number.ok_or_else(|| self.wrong(key, &format!("a number from {} to {}", range.start(), range.end())))
    }

    /// What a norm adds to the variance.
    pub(super) fn epsilon(&self, key: &str, default: f64) -> Result<f32> {
        Ok(self.number_or(key, default, 0.0..=1.0)? as f32)
    }

    /// The deviation of random weights.
    pub(super) fn initializer_range(&self) -> Result<f64> {
        self.number_or("initializer_range", 0.02, 0.0..=1.0)
    }

    pub(super) fn flag_or(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(v) => v.as_bool().ok_or_else(|| self.wrong(key, "true or false")),
        }
    }

    /// The number of layers, small enough to list them.
    pub(super) fn layers(&self, key: &str, hidden: usize) -> Result<usize> {
        match self.size(key)? {
            layers if layers <= MAX_LAYERS => Ok(layers),
            layers => Err(self.refuse(
                format!("a model of {layers} layers of width {hidden} is not plausible"),
                "copy config.json from the model's repository again".into(),
            )),
        }
    }

    /// Refuses an activation other than these, which compute the same.
    pub(super) fn activation(&self, key: &str, default: Option<&'a str>, same: &[&str]) -> Result<()> {
        let name = match (self.get(key), default) {
            (None, Some(default)) => default,
            _ => self.text(key)?,
        };
        match same.contains(&name) {
            true => Ok(()),
            false => Err(self.refuse(
                format!("{key} \"{name}\" is not supported"),
                format!("supported: {}", same.join(", ")),
            )),
        }
    }

    /// Refuses a flag that is on.
    pub(super) fn refuse_flag(&self, key: &str, help: &str) -> Result<()> {
        match self.flag_or(key, false)? {
            true => Err(self.refuse(format!("{key} = true is not supported"), help.into())),
            false => Ok(()),
        }
    }

    /// Refuses layers that attend to a window of their sequence.
    pub(super) fn refuse_windows(&self, help: &str) -> Result<()> {
        self.refuse_flag("use_sliding_window", help)?;
        let kinds = self.get("layer_types").and_then(Value::as_array).into_iter().flatten();
        match kinds.into_iter().find(|kind| kind.as_str() != Some("full_attention")) {
            Some(kind) => Err(self.refuse(format!("layer_types with {kind} is not supported"), help.into())),
            None => Ok(()),
        }
    }

    /// Dropout that transformers would apply in training; fine-tuning here is without it, and reports that.
    pub(super) fn dropout(&self, keys: &[&str]) -> Result<Vec<String>> {
        let mut found = Vec::new();
        for key in keys {
            let rate = self.number_or(key, 0.0, 0.0..=1.0)?;
            if rate != 0.0 {
                found.push(format!("{key} = {rate}: dropout is not applied"));
            }
        }
        Ok(found)
    }

    /// The embedding's row of zeros.
    pub(super) fn padding_row(&self) -> Result<Option<usize>> {
        match self.get("pad_token_id") {
            None => Ok(None),
            // Published configurations write -1 where there is none.
            Some(v) if v.as_i64() == Some(-1) => Ok(None),
            Some(v) => match v.as_u64() {
                Some(id) => Ok(Some(id as usize)),
                None => Err(self.wrong("pad_token_id", "a token id")),
            },
        }
    }

    /// The key/value heads: one for each head where the key is null, `default` where it is missing.
    pub(super) fn kv_heads(&self, heads: usize, default: usize) -> Result<usize> {
        let default = if self.json.get("num_key_value_heads").is_some() { heads } else { default };
        self.size_or("num_key_value_heads", Some(default))
    }

    /// An object that is not empty, which is what Python takes for true.
    fn object(&self, key: &str) -> Result<Option<Config<'a>>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) if map.is_empty() => Ok(None),
            Some(json @ Value::Object(_)) => Ok(Some(Config { json, path: self.path })),
            Some(_) => Err(self.wrong(key, "an object")),
        }
    }

    /// A sentence about RoPE settings that have no effect.
    pub(super) fn overridden(&self) -> Result<Option<String>> {
        let (new, old) = (self.object("rope_parameters")?, self.object("rope_scaling")?);
        let both = new.is_some_and(|new| old.is_some_and(|old| old.json != new.json));
        let sentence = "rope_parameters is not applied: rope_scaling stands beside it and has precedence";
        Ok(both.then(|| sentence.to_string()))
    }

    /// Rotary positions over whole heads, scaled as `rope_parameters` (transformers 5) or `rope_theta` and
    /// `rope_scaling` (transformers 4) say. Where both are there, `rope_scaling` is used alone
    /// (`convert_rope_params_to_dict` of transformers 5).
    pub(super) fn rope(&self, head_dim: usize, max_positions: usize) -> Result<Rope> {
        // The exponent of theta is below 1; f32 holds what is left of it.
        const THETA: RangeInclusive<f64> = 1e-3..=1e15;
        const FACTOR: RangeInclusive<f64> = 1e-3..=1e9;
        let nothing = Config { json: &Value::Null, path: self.path };
        let nested = self.object("rope_scaling")?.or(self.object("rope_parameters")?);
        let scaling = nested.unwrap_or(nothing);
        let outer = self.number_or("rope_theta", 10_000.0, THETA)?;
        let theta = scaling.number_or("rope_theta", outer, THETA)?;
        let key = "partial_rotary_factor";
        if scaling.number_or(key, self.number_or(key, 1.0, 0.0..=1.0)?, 0.0..=1.0)? != 1.0 {
            return Err(self.refuse(
                "partial_rotary_factor is not supported".into(),
                "the published models of this family rotate whole heads".into(),
            ));
        }
        let kind = ["rope_type", "type"].into_iter().find(|key| scaling.get(key).is_some());
        match kind.map_or(Ok("default"), |key| scaling.text(key))? {
            "default" => Ok(Rope::new(theta, head_dim, |f| f)),
            "linear" => {
                let factor = scaling.number("factor", FACTOR)? as f32;
                Ok(Rope::new(theta, head_dim, |f| f / factor))
            }
            "llama3" => {
                let original = max_positions as f64;
                let original = scaling.number_or("original_max_position_embeddings", original, 1.0..=1e12)?;
                let (low, high) =
                    (scaling.number("low_freq_factor", FACTOR)?, scaling.number("high_freq_factor", FACTOR)?);
                if low >= high {
                    return Err(self.refuse(
                        format!("low_freq_factor {low} is not below high_freq_factor {high}"),
                        "copy config.json from the model's repository again".into(),
                    ));
                }
                let scale = Llama3 {
                    factor: scaling.number("factor", FACTOR)? as f32,
                    low: low as f32,
                    high: high as f32,
                    original: original as f32,
                };
                Ok(Rope::new(theta, head_dim, |f| scale.apply(f)))
            }
            other => Err(self.refuse(
                format!("rope_type \"{other}\" is not supported"),
                "supported: default, linear, llama3".into(),
            )),
        }
    }
}

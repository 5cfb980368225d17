//! Typed access to the keys of a `config.json`, and the settings that families share.

use crate::arch::{MAX_LAYERS, MAX_SIZE};
use crate::rope::{Llama3, Rope};
use crate::{Error, Result};
use serde_json::Value;
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

    pub(super) fn number_or(&self, key: &str, default: f64) -> Result<f64> {
        match self.get(key) {
            None => Ok(default),
            Some(v) => v.as_f64().filter(|x| x.is_finite()).ok_or_else(|| self.wrong(key, "a number")),
        }
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
            let rate = self.number_or(key, 0.0)?;
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

    /// Rotary positions over whole heads, scaled as `rope_parameters` (transformers 5) or `rope_theta` and
    /// `rope_scaling` (transformers 4) say.
    pub(super) fn rope(&self, head_dim: usize, max_positions: usize) -> Result<Rope> {
        let nested = self.get("rope_parameters").or_else(|| self.get("rope_scaling"));
        let scaling = Config { json: nested.unwrap_or(&Value::Null), path: self.path };
        let theta = scaling.number_or("rope_theta", self.number_or("rope_theta", 10_000.0)?)?;
        if self.number_or("partial_rotary_factor", scaling.number_or("partial_rotary_factor", 1.0)?)? != 1.0 {
            return Err(self.refuse(
                "partial_rotary_factor is not supported".into(),
                "the published models of this family rotate whole heads".into(),
            ));
        }
        let kind = scaling.get("rope_type").or_else(|| scaling.get("type")).and_then(Value::as_str);
        match kind.unwrap_or("default") {
            "default" => Ok(Rope::new(theta, head_dim, |f| f)),
            "linear" => {
                let factor = scaling.number_or("factor", 1.0)? as f32;
                Ok(Rope::new(theta, head_dim, |f| f / factor))
            }
            "llama3" => {
                let original = scaling.number_or("original_max_position_embeddings", max_positions as f64)?;
                let scale = Llama3 {
                    factor: scaling.number_or("factor", 8.0)? as f32,
                    low: scaling.number_or("low_freq_factor", 1.0)? as f32,
                    high: scaling.number_or("high_freq_factor", 4.0)? as f32,
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

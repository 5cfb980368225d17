//! Rotary positions from `config.json`.

use super::config::Config;
use crate::Result;
use crate::rope::{Beyond, Llama3, Rope, Yarn, plain};
use serde_json::Value;
use std::ops::RangeInclusive;

/// The base is raised to a power below 1, and f32 must represent the result.
const THETA: RangeInclusive<f64> = 1e-3..=1e15;
const FACTOR: RangeInclusive<f64> = 1e-3..=1e9;
const POSITIONS: RangeInclusive<f64> = 1.0..=1e12;

/// A family's rotary settings.
pub(super) struct Rotary {
    /// Columns of a head.
    pub(super) head_dim: usize,
    /// `max_position_embeddings`.
    pub(super) max_positions: usize,
    /// Default of the base.
    pub(super) theta: f64,
    /// Default of the rotated part of a head, in families that rotate a part; `None` if the family rotates whole heads.
    pub(super) partial: Option<f64>,
    /// Keys outside `rope_parameters` for the base and for the rotated part.
    pub(super) keys: [&'static str; 2],
}

impl Rotary {
    /// Whole heads, as most families rotate.
    pub(super) fn whole(head_dim: usize, max_positions: usize) -> Rotary {
        let keys = ["rope_theta", "partial_rotary_factor"];
        Rotary { head_dim, max_positions, theta: 10_000.0, partial: None, keys }
    }
}

impl<'a> Config<'a> {
    /// Rotary positions from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4). If
    /// both are present, only `rope_scaling` is used (`convert_rope_params_to_dict` of transformers 5).
    pub(super) fn rope(&self, r: &Rotary) -> Result<Rope> {
        let nested = self.object("rope_scaling")?.or(self.object("rope_parameters")?);
        self.rope_of(&nested.unwrap_or(self.nothing()), r)
    }

    /// Rotary positions from an object of settings.
    pub(super) fn rope_of(&self, scaling: &Config, r: &Rotary) -> Result<Rope> {
        let [theta_key, partial_key] = r.keys;
        let outer = self.number_or(theta_key, r.theta, THETA)?;
        let theta = scaling.number_or("rope_theta", outer, THETA)?;
        let outer = self.number_or(partial_key, r.partial.unwrap_or(1.0), 0.0..=1.0)?;
        let partial = scaling.number_or("partial_rotary_factor", outer, 0.0..=1.0)?;
        let rotated = (r.head_dim as f64 * partial) as usize;
        if partial != 1.0 && r.partial.is_none() {
            return Err(self.refuse(
                format!("partial_rotary_factor = {partial} is not supported"),
                "models of this family rotate whole heads".into(),
            ));
        }
        if rotated == 0 || rotated % 2 == 1 {
            return Err(self.refuse(
                format!("{rotated} of {} columns of a head would be rotated", r.head_dim),
                format!("rotary positions need an even number; see head_dim and {partial_key}"),
            ));
        }
        let keys: Vec<&str> = ["rope_type", "type"].into_iter().filter(|key| scaling.has(key)).collect();
        let kind = keys.first().map_or(Ok("default"), |key| scaling.text(key))?;
        let family = self.text("model_type")?;
        // Phi-3's own names for LongRoPE; its transformers class supports no other scaling.
        let kind = if family == "phi3" && ["su", "yarn"].contains(&kind) { "longrope" } else { kind };
        let frequencies = plain(theta, rotated);
        match kind {
            "default" => Ok(Rope::of(frequencies)),
            "linear" => {
                let factor = scaling.number("factor", FACTOR)? as f32;
                Ok(Rope::of(frequencies.into_iter().map(|f| f / factor).collect()))
            }
            "dynamic" if rotated > 2 => {
                let factor = scaling.number("factor", FACTOR)?;
                let beyond = Some(Beyond::Dynamic { positions: r.max_positions, theta, factor });
                Ok(Rope { beyond, ..Rope::of(frequencies) })
            }
            "llama3" => {
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
                    original: self.original_positions(scaling, r)? as f32,
                };
                Ok(Rope::of(frequencies.into_iter().map(|f| scale.apply(f)).collect()))
            }
            "yarn" => self.yarn(scaling, r, theta, rotated),
            "longrope" => self.longrope(scaling, r, &frequencies),
            other => Err(self.refuse(
                format!("rope_type \"{other}\" is not supported"),
                "supported: default, linear, dynamic, yarn, llama3, longrope".into(),
            )),
        }
    }

    /// Positions with which the model was first trained. The key outside `rope_parameters` is Phi-3's, and takes
    /// precedence.
    fn original_positions(&self, scaling: &Config, r: &Rotary) -> Result<f64> {
        let key = "original_max_position_embeddings";
        let inner = scaling.number_or(key, r.max_positions as f64, POSITIONS)?;
        self.number_or(key, inner, POSITIONS)
    }

    /// A number; null if it is to be computed.
    fn optional(&self, key: &str, range: RangeInclusive<f64>) -> Result<Option<f64>> {
        self.has(key).then(|| self.number(key, range)).transpose()
    }

    fn yarn(&self, scaling: &Config, r: &Rotary, theta: f64, rotated: usize) -> Result<Rope> {
        let original = self.original_positions(scaling, r)?;
        let factor = scaling.optional("factor", FACTOR)?.unwrap_or(r.max_positions as f64 / original);
        let weights = [scaling.optional("mscale", FACTOR)?, scaling.optional("mscale_all_dim", FACTOR)?];
        let attention = scaling.optional("attention_factor", FACTOR)?;
        let attention = attention.unwrap_or_else(|| match weights {
            [Some(over), Some(under)] => {
                Yarn::attention_factor(factor, over) / Yarn::attention_factor(factor, under)
            }
            _ => Yarn::attention_factor(factor, 1.0),
        });
        let yarn = Yarn {
            theta,
            rotated,
            factor,
            original,
            beta_fast: scaling.optional("beta_fast", FACTOR)?.unwrap_or(32.0),
            beta_slow: scaling.optional("beta_slow", FACTOR)?.unwrap_or(1.0),
            truncate: scaling.flag_or("truncate", true)?,
        };
        Ok(Rope { scale: attention as f32, ..Rope::of(yarn.frequencies()) })
    }

    fn longrope(&self, scaling: &Config, r: &Rotary, plain: &[f32]) -> Result<Rope> {
        let original = self.original_positions(scaling, r)?;
        let factor = scaling.optional("factor", FACTOR)?.unwrap_or(r.max_positions as f64 / original);
        let attention = scaling.optional("attention_factor", FACTOR)?;
        let attention = attention.unwrap_or_else(|| match factor <= 1.0 || original <= 1.0 {
            true => 1.0,
            false => (1.0 + factor.ln() / original.ln()).sqrt(),
        });
        let divided = |key: &str| -> Result<Vec<f32>> {
            let factors = scaling.numbers(key, plain.len(), FACTOR)?;
            // 1 / (factor · theta^x), as transformers rounds it.
            Ok(plain.iter().zip(factors).map(|(f, by)| 1.0 / (by as f32 * (1.0 / f))).collect())
        };
        let beyond = Beyond::Long { positions: original as usize, frequencies: divided("long_factor")? };
        Ok(Rope { frequencies: divided("short_factor")?, scale: attention as f32, beyond: Some(beyond) })
    }

    /// A list of numbers.
    fn numbers(&self, key: &str, count: usize, range: RangeInclusive<f64>) -> Result<Vec<f64>> {
        let want = || format!("a list of {count} numbers from {} to {}", range.start(), range.end());
        let list = self.get(key).and_then(Value::as_array).filter(|list| list.len() == count);
        let numbers = list.and_then(|list| {
            list.iter().map(|v| v.as_f64().filter(|x| range.contains(x))).collect::<Option<Vec<f64>>>()
        });
        numbers.ok_or_else(|| self.wrong(key, &want()))
    }
}

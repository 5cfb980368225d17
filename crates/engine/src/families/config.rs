//! Typed access to the keys of a `config.json`, and the settings that families share.

use crate::arch::{MAX_LAYERS, MAX_SIZE};
use crate::kernels::Activation;
use crate::{Error, Result};
use serde_json::Value;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::path::Path;
use std::rc::Rc;

/// A parsed `config.json` and where it came from, or an object in it.
#[derive(Clone)]
pub(super) struct Config<'a> {
    json: &'a Value,
    path: &'a Path,
    /// Names of the enclosing objects, each followed by a dot.
    within: String,
    /// Keys that have been read, with the names of their enclosing objects.
    read: Rc<RefCell<BTreeSet<String>>>,
}

impl<'a> Config<'a> {
    pub(super) fn new(json: &'a Value, path: &'a Path) -> Config<'a> {
        Config { json, path, within: String::new(), read: Rc::default() }
    }

    /// The same file, with no key marked as read.
    pub(super) fn afresh(&self) -> Config<'a> {
        Config::new(self.json, self.path)
    }

    /// An object without keys.
    pub(super) fn nothing(&self) -> Config<'a> {
        Config { json: &Value::Null, ..self.clone() }
    }

    /// An object that is not empty: an empty one is false in Python.
    pub(super) fn object(&self, key: &str) -> Result<Option<Config<'a>>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) if map.is_empty() => Ok(None),
            Some(json @ Value::Object(_)) => {
                Ok(Some(Config { json, within: format!("{}{key}.", self.within), ..self.clone() }))
            }
            Some(_) => Err(self.wrong(key, "an object")),
        }
    }

    /// A sentence about RoPE settings that have no effect, if there are any.
    pub(super) fn overridden(&self) -> Result<Option<String>> {
        let (new, old) = (self.object("rope_parameters")?, self.object("rope_scaling")?);
        let Some(new) = new.filter(|new| old.is_some_and(|old| old.json != new.json)) else {
            return Ok(None);
        };
        // One sentence for all of its keys.
        new.read_all();
        Ok(Some(
            "rope_parameters is not applied: rope_scaling stands beside it and has precedence".to_string(),
        ))
    }

    /// Marks all keys of an object as read.
    pub(super) fn read_all(&self) {
        let keys = self.json.as_object().into_iter().flat_map(|map| map.keys());
        self.read.borrow_mut().extend(keys.map(|key| format!("{}{key}", self.within)));
    }

    /// Sentences about keys that no setting of the family uses.
    pub(super) fn not_read(&self) -> Vec<String> {
        let sentence =
            |name| format!("config.json: \"{name}\" is not a setting of this family and is not used");
        self.unread().into_iter().map(sentence).collect()
    }

    /// Keys that have not been read, except those known to matter only elsewhere.
    pub(super) fn unread(&self) -> Vec<String> {
        let read = self.read.borrow();
        let mut unread = Vec::new();
        let mut objects = vec![(String::new(), self.json)];
        while let Some((within, json)) = objects.pop() {
            for (key, value) in json.as_object().into_iter().flatten() {
                let name = format!("{within}{key}");
                if read.contains(&name) {
                    objects.push((format!("{name}."), value));
                } else if !value.is_null() && !INERT.contains(&key.as_str()) {
                    unread.push(name);
                }
            }
        }
        unread
    }

    /// An error about this file.
    pub(super) fn refuse(&self, message: String, help: String) -> Error {
        Error::Config { path: self.path.to_path_buf(), message, help }
    }

    pub(super) fn wrong(&self, key: &str, want: &str) -> Error {
        let found = self.json.get(key).map_or("it is missing".to_string(), |v| format!("it is {v}"));
        self.refuse(
            format!("\"{key}\" must be {want}; {found}"),
            "copy config.json from the model's repository again".into(),
        )
    }

    /// The value of a key that is present and not null.
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.read.borrow_mut().insert(format!("{}{key}", self.within));
        self.json.get(key).filter(|v| !v.is_null())
    }

    /// Whether a key is present and not null.
    pub(super) fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// Whether a key is present and null; that differs from a missing key if the default is not null.
    pub(super) fn is_null(&self, key: &str) -> bool {
        self.get(key).is_none() && self.json.get(key).is_some()
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

    /// A number within `range`: values outside break the arithmetic, or occur in no model.
    pub(super) fn number_or(&self, key: &str, default: f64, range: RangeInclusive<f64>) -> Result<f64> {
        if self.has(key) { self.number(key, range) } else { Ok(default) }
    }

    pub(super) fn number(&self, key: &str, range: RangeInclusive<f64>) -> Result<f64> {
        let number = self.get(key).and_then(Value::as_f64).filter(|x| range.contains(x));
        number.ok_or_else(|| self.wrong(key, &format!("a number from {} to {}", range.start(), range.end())))
    }

    /// The epsilon that a norm adds to the variance.
    pub(super) fn epsilon(&self, key: &str, default: f64) -> Result<f32> {
        Ok(self.number_or(key, default, 0.0..=1.0)? as f32)
    }

    /// The standard deviation of random weights.
    pub(super) fn initializer_range(&self) -> Result<f64> {
        self.number_or("initializer_range", 0.02, 0.0..=1.0)
    }

    /// A positive factor.
    pub(super) fn factor(&self, key: &str, default: f64) -> Result<f32> {
        Ok(self.number_or(key, default, 1e-9..=1e9)? as f32)
    }

    /// A limit that null switches off, and that is `default` if the key is missing.
    pub(super) fn limit(&self, key: &str, default: Option<f64>) -> Result<Option<f32>> {
        match (self.is_null(key), default) {
            (true, _) => Ok(None),
            (false, None) if !self.has(key) => Ok(None),
            (false, default) => self.factor(key, default.unwrap_or(1.0)).map(Some),
        }
    }

    pub(super) fn flag_or(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(v) => v.as_bool().ok_or_else(|| self.wrong(key, "true or false")),
        }
    }

    /// The number of layers, limited so that they can be listed.
    pub(super) fn layers(&self, key: &str, hidden: usize) -> Result<usize> {
        match self.size(key)? {
            layers if layers <= MAX_LAYERS => Ok(layers),
            layers => Err(self.refuse(
                format!("a model of {layers} layers of width {hidden} is not plausible"),
                "copy config.json from the model's repository again".into(),
            )),
        }
    }

    /// Rejects an activation other than those of `same`, which are all computed alike.
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

    /// A GELU activation: exact, or the tanh approximation.
    pub(super) fn gelu(&self, key: &str, default: &'a str) -> Result<Activation> {
        let (exact, tanh) =
            (["gelu", "gelu_python"], ["gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh"]);
        self.activation(key, Some(default), &[&exact[..], &tanh].concat())?;
        let name = self.get(key).and_then(Value::as_str).unwrap_or(default);
        Ok(if exact.contains(&name) { Activation::Gelu } else { Activation::GeluTanh })
    }

    /// Rejects a flag that is on.
    pub(super) fn refuse_flag(&self, key: &str, help: &str) -> Result<()> {
        match self.flag_or(key, false)? {
            true => Err(self.refuse(format!("{key} = true is not supported"), help.into())),
            false => Ok(()),
        }
    }

    /// The key/value heads: the number of heads if the key is null, `default` if it is missing.
    pub(super) fn kv_heads(&self, heads: usize, default: usize) -> Result<usize> {
        let default = if self.is_null("num_key_value_heads") { heads } else { default };
        self.size_or("num_key_value_heads", Some(default))
    }

    /// A size that null switches off, and that is `default` if the key is missing.
    pub(super) fn optional_size(&self, key: &str, default: Option<usize>) -> Result<Option<usize>> {
        match self.has(key) {
            true => self.size(key).map(Some),
            false if self.is_null(key) => Ok(None),
            false => Ok(default),
        }
    }

    /// A list of layer numbers, empty if the key is missing.
    pub(super) fn layer_numbers(&self, key: &str) -> Result<Vec<usize>> {
        let Some(list) = self.get(key) else { return Ok(Vec::new()) };
        let numbers = list.as_array().and_then(|list| {
            list.iter().map(|v| v.as_u64().map(|n| n as usize)).collect::<Option<Vec<usize>>>()
        });
        numbers.ok_or_else(|| self.wrong(key, "a list of layers, the first being 0"))
    }

    /// The window of each layer: from `layer_types`, else `sliding` says which layers have one.
    pub(super) fn windows(
        &self,
        layers: usize,
        window: Option<usize>,
        sliding: impl Fn(usize) -> bool,
    ) -> Result<Vec<Option<usize>>> {
        let sliding: Vec<bool> = match self.get("layer_types") {
            None => (0..layers).map(sliding).collect(),
            Some(types) => {
                let kinds = types.as_array().filter(|kinds| kinds.len() == layers);
                let kinds = kinds.and_then(|kinds| {
                    let is_sliding = |kind: &Value| match kind.as_str() {
                        Some("full_attention") => Some(false),
                        Some("sliding_attention") => Some(true),
                        _ => None,
                    };
                    kinds.iter().map(is_sliding).collect::<Option<Vec<bool>>>()
                });
                let want = format!("a list of {layers} times full_attention or sliding_attention");
                kinds.ok_or_else(|| self.wrong("layer_types", &want))?
            }
        };
        if window.is_none() && sliding.contains(&true) {
            return Err(self.refuse(
                "layer_types has sliding_attention, and sliding_window is null or switched off".into(),
                "state sliding_window (and use_sliding_window, where the family has it)".into(),
            ));
        }
        Ok(sliding.into_iter().map(|sliding| window.filter(|_| sliding)).collect())
    }

    /// A dropout probability.
    pub(super) fn dropout(&self, key: &str, default: f64) -> Result<f32> {
        Ok(self.number_or(key, default, 0.0..=1.0)? as f32)
    }

    /// The embedding row that is all zeros.
    pub(super) fn padding_row(&self) -> Result<Option<usize>> {
        match self.get("pad_token_id") {
            None => Ok(None),
            // Published configurations use -1 for none.
            Some(v) if v.as_i64() == Some(-1) => Ok(None),
            Some(v) => match v.as_u64() {
                Some(id) => Ok(Some(id as usize)),
                None => Err(self.wrong("pad_token_id", "a token id")),
            },
        }
    }
}

/// Keys without effect here: origin of the model, its tokens, its generation, other heads.
const INERT: &[&str] = &[
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_name_or_path",
    "_sliding_window_pattern",
    "add_cross_attention",
    "architectures",
    "attn_implementation",
    "auto_map",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "cache_implementation",
    "chunk_size_feed_forward",
    "classifier_dropout",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "id2label",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "length_penalty",
    "mask_token_id",
    "max_length",
    "min_length",
    "n_ctx",
    "name_or_path",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_labels",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "pad_token_id",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "pruned_heads",
    "remove_invalid_values",
    "reorder_and_upcast_attn",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "typical_p",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
];

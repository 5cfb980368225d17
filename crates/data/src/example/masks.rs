//! Authors' masks: loss weights in a row for messages, parts of messages and ranges of characters.
//!
//! | key | of | after | value |
//! |---|---|---|---|
//! | `train`, `training` | message, part, range, segment | axolotl | true or false, 1 or 0 |
//! | `loss` | message, part | ms-swift | true or false, or a weight from 0 to 1 |
//! | `weight`, `loss_weight`, `loss_scale` | message, part, segment | OpenAI, LLaMA-Factory, ms-swift | a weight of at least 0 |
//! | `train_detail`, `training_detail` | message | axolotl | ranges of characters: `begin_offset`, `end_offset` (the last character), `train` |
//!
//! A key that only looks like one of these is an error that names it: an author's mask is never ignored.

use super::chat::Detail;
use super::reader::Reader;
use crate::Result;
use crate::source::{as_f64, shown};
use serde_json::{Map, Value};

/// Keys that switch supervision on or off.
const SWITCHES: [&str; 3] = ["train", "training", "loss"];

/// Keys that set a loss weight.
const WEIGHTS: [&str; 3] = ["weight", "loss_weight", "loss_scale"];

/// Words in the names of masks.
const WORDS: [&str; 22] = [
    "mask",
    "masks",
    "masked",
    "masking",
    "train",
    "trained",
    "training",
    "trainable",
    "loss",
    "losses",
    "weight",
    "weights",
    "weighted",
    "supervise",
    "supervised",
    "supervision",
    "learn",
    "learned",
    "learnable",
    "untrained",
    "ignore",
    "ignored",
];

/// Names under which a single value masks a whole row.
const OF_ROWS: [&str; 12] = [
    "train",
    "training",
    "trainable",
    "loss",
    "weight",
    "loss_weight",
    "loss_scale",
    "sample_weight",
    "mask",
    "masked",
    "loss_mask",
    "train_mask",
];

/// Per-token columns of tokenizers that are not loss masks.
const HARMLESS: [&str; 1] = ["special_tokens_mask"];

pub(super) const HELP: &str = "\"train\", \"training\" and \"loss\" are true or false, \"weight\", \"loss_weight\" and \"loss_scale\" a \
                               finite number of 0 or more: {\"role\": \"assistant\", \"content\": \"..\", \"train\": false}";

/// The loss masks of a message.
#[derive(Default)]
pub(super) struct Mask {
    /// The weight of the message.
    pub weight: Option<f32>,
    /// The weights of parts of its texts.
    pub details: Vec<Detail>,
}

/// Removes the masks from an object and returns their weight. A switch that is off masks, whatever the weight. The
/// error says which key is wrong, and why.
pub(super) fn take(object: &mut Map<String, Value>) -> Result<Option<f32>, String> {
    let keys = || SWITCHES.into_iter().chain(WEIGHTS);
    if !object.keys().any(|key| keys().any(|known| known == key)) {
        return Ok(None);
    }
    let (mut on, mut weight): (Option<(&str, bool)>, Option<(&str, f32)>) = (None, None);
    let number = |value: &Value| as_f64(value).map(|w| w as f32).filter(|w| w.is_finite() && *w >= 0.0);
    for key in keys() {
        let Some(value) = object.shift_remove(key).filter(|value| !value.is_null()) else { continue };
        let wrong = || format!("has the {key:?} {}", shown(&value));
        let switch = value.as_bool().or(number(&value).filter(|w| *w == 0.0 || *w == 1.0).map(|w| w == 1.0));
        if let Some(switch) = switch.filter(|_| SWITCHES.contains(&key)) {
            match on {
                Some((other, before)) if before != switch => {
                    return Err(format!("has a {other:?} that is {before} and a {key:?} that is {switch}"));
                }
                _ => on = Some((key, switch)),
            }
            continue;
        }
        let given = switch.map(|on| f32::from(u8::from(on))).or(number(&value));
        let given =
            given.filter(|w| !SWITCHES.contains(&key) || key == "loss" && *w < 1.0).ok_or_else(wrong)?;
        match weight {
            Some((other, before)) if before != given => {
                return Err(format!("has the {other:?} {before} and the {key:?} {given}"));
            }
            _ => weight = Some((key, given)),
        }
    }
    Ok(match (on, weight) {
        (Some((_, false)), _) => Some(0.0),
        (_, Some((_, weight))) => Some(weight),
        (on, None) => on.map(|_| 1.0),
    })
}

/// True for a name that consists of mask words.
pub(super) fn looks_like_mask(name: &str) -> bool {
    // Some non-ASCII letters become ASCII in lower case.
    let known = |word: &str| match word.is_ascii() {
        true => WORDS.iter().any(|known| known.eq_ignore_ascii_case(word)),
        false => WORDS.contains(&word.to_lowercase().as_str()),
    };
    let (mut start, mut lower, mut found) = (0, false, false);
    for (at, c) in name.char_indices() {
        let letter = c.is_alphabetic();
        if !letter || lower && c.is_uppercase() {
            found |= known(&name[start..at]);
            start = if letter { at } else { at + c.len_utf8() };
        }
        lower = letter && c.is_lowercase();
    }
    (found || known(&name[start..])) && !HARMLESS.contains(&name)
}

/// True for a value that could be a mask. Texts could not: `training_stage` may have any text.
fn masks(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::String(text) => {
            let text = text.trim().to_lowercase();
            matches!(text.as_str(), "true" | "false" | "yes" | "no") || text.parse::<f64>().is_ok()
        }
        _ => true,
    }
}

/// The first key of an object that looks like a mask but is not a known one.
pub(super) fn unknown(object: &Map<String, Value>) -> Option<&String> {
    object.iter().find(|(key, value)| looks_like_mask(key) && masks(value)).map(|(key, _)| key)
}

impl Reader<'_> {
    /// Refuses a column that looks like a mask of the row: a single value under the name of a mask, or a list of
    /// numbers under a name that contains a mask word.
    pub(super) fn refuse_masks(&self, known: &[&str]) -> Result<()> {
        let bits = |list: &[Value]| !list.is_empty() && list.iter().all(|v| v.is_number() || v.is_boolean());
        let mask = |(name, value): &(&String, &Value)| match value {
            _ if known.contains(&name.as_str()) => false,
            Value::Array(list) => bits(list) && looks_like_mask(name),
            Value::Bool(_) | Value::Number(_) => OF_ROWS.contains(&name.to_lowercase().as_str()),
            Value::String(_) => name.as_str() == "loss_scale",
            _ => false,
        };
        let Some((name, _)) = self.fields.iter().find(mask) else { return Ok(()) };
        Err(self.error(
            format!("the column {name:?} looks like a mask of the loss, and no format has it"),
            "give each message its own \"train\" or \"weight\", or each token one in \"completion_mask\", \
             \"assistant_masks\" or \"weights\"; if it is no mask, leave the column out or name it otherwise",
        ))
    }
}

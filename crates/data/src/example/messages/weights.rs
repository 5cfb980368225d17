//! The masks of a message: its own, those of its parts, and those of ranges of its characters.

use super::{At, REASONING, part_text};
use crate::example::chat::{Detail, held, held_mut};
use crate::example::masks::{HELP, Mask, take, unknown};
use crate::example::reader::shown_keys;
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::ops::Range;

/// Keys of ranges of a message's characters.
const RANGES: [&str; 2] = ["train_detail", "training_detail"];

impl At<'_, '_> {
    fn wrong_mask(&self, what: impl std::fmt::Display) -> Error {
        self.error(what, HELP)
    }

    fn refuse(&self, object: &Map<String, Value>, what: &str) -> Result<()> {
        let Some(key) = unknown(object) else { return Ok(()) };
        Err(self.wrong_mask(format_args!(
            "has{what} the key {key:?}, which looks like a mask and is none that is known"
        )))
    }

    /// Refuses masks on a tool call: a call has the weight of its message.
    pub(super) fn refuse_mask_of_call(&self, call: &Map<String, Value>) -> Result<()> {
        let Some(key) = unknown(call) else { return Ok(()) };
        let help = "a call is learned as its message is: give the message the mask";
        Err(self.error(format_args!("has a tool call with the mask {key:?}"), help))
    }

    /// Removes the masks from a message: its own, those of its parts, and those of ranges of its characters.
    pub(super) fn masks(
        &self,
        message: &mut Map<String, Value>,
        content: &str,
        answer: bool,
    ) -> Result<Mask> {
        let mut weight = take(message).map_err(|what| self.wrong_mask(what))?;
        let mut details = Vec::new();
        let ranges = RANGES.into_iter().filter_map(|key| {
            held(message, key)?;
            Some((key, message.shift_remove(key)?))
        });
        let ranges: Vec<_> = ranges.collect();
        self.refuse(message, "")?;
        if let Some(Value::Array(parts)) = held_mut(message, content) {
            let mut lengths = [0, 0];
            self.parts_weights(parts, &mut lengths, None, &mut details)?;
        }
        // Reasoning in parts is joined, because templates write one text.
        for key in REASONING {
            let Some(Value::Array(parts)) = held_mut(message, key) else { continue };
            let mut lengths = [0, 0];
            self.parts_weights(parts, &mut lengths, Some(true), &mut details)?;
            let texts = parts.iter().map(|part| match part {
                Value::String(text) => Some(text.as_str()),
                Value::Object(part) => part_text(part).1.and_then(Value::as_str),
                _ => None,
            });
            if let Some(joined) = texts.collect::<Option<String>>() {
                message.insert(key.into(), joined.into());
            }
        }
        for (key, value) in ranges {
            let Some(Value::String(text)) = message.get(content) else {
                let what = format_args!("has {key:?} and no {content:?} that is a text");
                return Err(self
                    .error(what, "of content in parts each part may have its own \"train\" or \"weight\""));
            };
            if !self.ranges(key, value, text, &mut details)? {
                weight = Some(0.0);
            }
        }
        let learned = details.iter().any(|detail| detail.weight > 0.0);
        if !answer && (learned || weight.is_some_and(|w| w > 0.0)) {
            return Err(self.error(
                "is to be learned, and is not the assistant's",
                "only answers are learned: leave its \"train\", \"loss\" or \"weight\" out, or set prompt_loss_weight or \
                 loss_weights to learn prompts too",
            ));
        }
        if weight == Some(0.0) {
            details.clear();
        }
        Ok(Mask { weight, details })
    }

    /// Removes the masks from parts and adds the weights of texts. `lengths`: bytes of content and of reasoning so far.
    fn parts_weights(
        &self,
        parts: &mut [Value],
        lengths: &mut [usize; 2],
        reasoning: Option<bool>,
        details: &mut Vec<Detail>,
    ) -> Result<()> {
        for (n, part) in parts.iter_mut().enumerate() {
            let (bytes, reasoning, weight) = match part {
                Value::String(text) => (text.len(), reasoning.unwrap_or(false), None),
                Value::Object(part) => {
                    let weight = take(part)
                        .map_err(|what| self.wrong_mask(format_args!("has a part {n} that {what}")))?;
                    self.refuse(part, &format!(" in its part {n}"))?;
                    let (kind, text) = part_text(part);
                    let thought = matches!(kind, "reasoning" | "thinking");
                    match text
                        .and_then(Value::as_str)
                        .filter(|_| !kind.contains("call") && kind != "function")
                    {
                        Some(text) => (text.len(), reasoning.unwrap_or(thought), weight),
                        None if weight.is_some() => {
                            let what = format_args!("has a mask on its part {n} of type {kind:?}");
                            return Err(self.error(what, "only text may have one: give the message the mask"));
                        }
                        None => continue,
                    }
                }
                _ => continue,
            };
            let length = &mut lengths[usize::from(reasoning)];
            let range = *length..*length + bytes;
            *length = range.end;
            if let Some(weight) = weight {
                details.push(Detail { reasoning, bytes: range, weight });
            }
        }
        Ok(())
    }

    /// Ranges of characters of the content. Characters outside all ranges are masked; false for an empty list,
    /// which masks the whole message.
    fn ranges(&self, key: &str, value: Value, text: &str, details: &mut Vec<Detail>) -> Result<bool> {
        let help = "it is a list of {\"begin_offset\": 0, \"end_offset\": 8, \"train\": true}: the first and the last \
                    character of a range, counted from 0";
        let value = match value {
            Value::Null => return Ok(true),
            Value::String(json) => serde_json::from_str(&json).unwrap_or(Value::String(json)),
            other => other,
        };
        let Value::Array(list) = value else {
            return Err(self.error(format_args!("has a {key:?} that is not a list"), help));
        };
        if list.is_empty() {
            return Ok(false);
        }
        let starts: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
        let characters = starts.len() - 1;
        let mut ranges: Vec<(Range<usize>, f32)> = Vec::with_capacity(list.len());
        for (n, range) in list.into_iter().enumerate() {
            let wrong = |what: String| Err(self.error(format_args!("has a {key:?}[{n}] that {what}"), help));
            let Value::Object(mut range) = range else { return wrong("is not an object".into()) };
            let mut offset = |key: &str| range.shift_remove(key).and_then(|v| v.as_u64()).map(|v| v as usize);
            let (Some(first), Some(last)) = (offset("begin_offset"), offset("end_offset")) else {
                return wrong(format!(
                    "has no \"begin_offset\" and \"end_offset\"; it has {}",
                    shown_keys(&range)
                ));
            };
            let weight = match take(&mut range) {
                Ok(Some(weight)) => weight,
                Ok(None) => return wrong("has no \"train\"".into()),
                Err(what) => return wrong(what),
            };
            if let Some((other, _)) = range.iter().find(|(_, value)| !value.is_null()) {
                return wrong(format!("has the unknown key {other:?}"));
            }
            // End offsets are often one too large, and axolotl clips them.
            if first > last || last > characters {
                return wrong(format!(
                    "goes from {first} to {last}; the content has {characters} characters"
                ));
            }
            let range = starts[first]..starts[(last + 1).min(characters)];
            let same = |other: &&(Range<usize>, f32)| {
                other.0.start < range.end && range.start < other.0.end && other.1 != weight
            };
            if let Some((other, _)) = ranges.iter().find(same) {
                let at = starts.partition_point(|start| *start < range.start.max(other.start));
                return wrong(format!("gives character {at} another mask than an earlier range"));
            }
            ranges.push((range, weight));
        }
        let detail = |(bytes, weight)| Detail { reasoning: false, bytes, weight };
        details.push(detail((0..text.len(), 0.0)));
        details.extend(ranges.into_iter().map(detail));
        Ok(true)
    }
}

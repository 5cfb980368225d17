//! Instructions and segments: rows that are text by themselves.

use super::conversation::message;
use super::{Reader, Segment};
use crate::Result;
use crate::chat::Conversation;
use crate::row::type_name;
use serde_json::Value;

/// An instruction with its answer (the format of Stanford's Alpaca). It becomes a conversation where the model has a
/// chat template, and text around the headings of the Alpaca prompt where it has none.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Alpaca {
    /// The conversation's system prompt; in plain text it takes the place of the opening sentence.
    pub system: Option<String>,
    /// Earlier instructions, each with its answer.
    pub history: Vec<(String, String)>,
    /// What is asked.
    pub instruction: String,
    /// What it is asked of; `None` where the row has none.
    pub input: Option<String>,
    /// The answer.
    pub output: String,
}

impl Alpaca {
    /// The same as messages: the input follows the instruction on a line of its own.
    pub fn conversation(&self) -> Conversation {
        let mut messages = Vec::new();
        if let Some(text) = &self.system {
            messages.push(message("system", text.clone()));
        }
        for (asked, answered) in &self.history {
            messages.push(message("user", asked.clone()));
            messages.push(message("assistant", answered.clone()));
        }
        let asked = match &self.input {
            Some(input) => format!("{}\n{input}", self.instruction),
            None => self.instruction.clone(),
        };
        messages.push(message("user", asked));
        messages.push(message("assistant", self.output.clone()));
        let weights = vec![None; messages.len()];
        Conversation { messages, weights, ..Conversation::default() }
    }
}

impl Reader<'_> {
    /// `instruction`, `input`, and the answer under `output`.
    pub(super) fn alpaca(mut self, output: &str) -> Result<Alpaca> {
        Ok(Alpaca {
            instruction: self.string("instruction")?,
            input: self.optional_string("input")?.filter(|text| !text.is_empty()),
            output: self.string(output)?,
            system: self.optional_string("system")?.filter(|text| !text.is_empty()),
            history: self.history()?,
        })
    }

    fn history(&mut self) -> Result<Vec<(String, String)>> {
        let help = "history is a list of pairs: [[\"instruction\", \"answer\"], ..]";
        let list = match self.fields.swap_remove("history") {
            None | Some(Value::Null) => return Ok(Vec::new()),
            Some(Value::Array(list)) => list,
            Some(other) => {
                let found = type_name(&other);
                return Err(self.error(format!("\"history\" is {found}, not a list"), help));
            }
        };
        let pair = |(at, value): (usize, Value)| match value.as_array().map(Vec::as_slice) {
            Some([Value::String(asked), Value::String(answered)]) => Ok((asked.clone(), answered.clone())),
            _ => Err(self.error(format!("history[{at}] is no pair of strings"), help)),
        };
        list.into_iter().enumerate().map(pair).collect()
    }

    /// `segments` of `text` with `train` (also called `label`) or `weight`.
    pub(super) fn segments(mut self) -> Result<Vec<Segment>> {
        let help = "a segment is {\"text\": \"..\", \"train\": true}, or has a \"weight\"";
        let list = match self.fields.swap_remove("segments") {
            Some(Value::Array(list)) => list,
            Some(other) => {
                let found = type_name(&other);
                return Err(self.error(format!("\"segments\" is {found}, not a list"), help));
            }
            None => return Err(self.missing("segments")),
        };
        if list.is_empty() {
            return Err(self.error("\"segments\" is empty".into(), "fill it, or remove the row"));
        }
        let mut out = Vec::with_capacity(list.len());
        for (at, value) in list.into_iter().enumerate() {
            let error = |what: String| self.error(format!("segments[{at}] {what}"), help);
            let Value::Object(segment) = value else {
                return Err(error(format!("is {}, not an object", type_name(&value))));
            };
            let given = |key: &str| segment.get(key).filter(|v| !v.is_null());
            let text = match given("text") {
                Some(Value::String(text)) => text.clone(),
                Some(other) => return Err(error(format!("has a \"text\" that is {}", type_name(other)))),
                None => return Err(error("has no \"text\"".into())),
            };
            let train = match given("train").or(given("label")) {
                None => None,
                Some(Value::Bool(train)) => Some(*train),
                Some(value) => match value.as_i64() {
                    Some(n @ (0 | 1)) => Some(n == 1),
                    _ => return Err(error(format!("has the \"train\" {value}"))),
                },
            };
            let weight = match given("weight").or(given("loss_weight")) {
                None => None,
                Some(value) => {
                    match value.as_f64().map(|w| w as f32).filter(|w| w.is_finite() && *w >= 0.0) {
                        Some(weight) => Some(weight),
                        None => return Err(error(format!("has the \"weight\" {value}"))),
                    }
                }
            };
            let weight = match (train, weight) {
                (Some(false), _) => 0.0,
                (_, Some(weight)) => weight,
                (Some(true), None) => 1.0,
                (None, None) => return Err(error("has neither \"train\" nor \"weight\"".into())),
            };
            out.push(Segment { text, weight });
        }
        Ok(out)
    }
}

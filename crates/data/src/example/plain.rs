//! Rows that do not need a chat template: a prompt with its completion, instructions, segments.

use super::body::{Alpaca, Body, TextPiece};
use super::masks;
use super::reader::Reader;
use crate::source::row::type_name;
use crate::{Error, Result};
use serde_json::Value;

impl Reader<'_> {
    pub(super) fn input_full(mut self) -> Result<Body> {
        let input = self.string("input_text")?;
        let full = self.string("full_text")?;
        if !full.starts_with(&input) {
            return Err(self.not_a_prefix(&input, &full));
        }
        Ok(Body::Text { text: full, prompt_len: input.len() })
    }

    /// `prompt`, followed by the text under the key `after`.
    pub(super) fn prompt_completion(mut self, after: &str) -> Result<Body> {
        let mut text = self.string("prompt")?;
        let completion = self.string(after)?;
        let prompt_len = text.len();
        text.push_str(&completion);
        Ok(Body::Text { text, prompt_len })
    }

    /// The error for a `full_text` that does not start with `input_text`: the first difference, and a common
    /// cause if one applies.
    fn not_a_prefix(&self, input: &str, full: &str) -> Error {
        let at = input.bytes().zip(full.bytes()).take_while(|(a, b)| a == b).count();
        let hint = if full.starts_with(input.trim_end()) {
            "; input_text ends in white space that full_text does not have there"
        } else if full.replace("\r\n", "\n").starts_with(&input.replace("\r\n", "\n")) {
            "; one has CRLF line ends and the other LF"
        } else if full.trim_start().starts_with(input.trim_start()) {
            "; they differ in leading white space"
        } else {
            ""
        };
        let help = format!(
            "input_text has {} and full_text has {} there{hint}",
            around(input, at),
            around(full, at)
        );
        Error::row(
            self.id.clone(),
            format!("\"full_text\" does not start with \"input_text\": first difference at byte {at}"),
            help,
        )
    }

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
            Some([Value::String(instruction), Value::String(answer)]) => {
                Ok((instruction.clone(), answer.clone()))
            }
            _ => Err(self.error(format!("history[{at}] is not a pair of strings"), help)),
        };
        list.into_iter().enumerate().map(pair).collect()
    }

    /// `segments` of `text` with a mask ([`masks`]); `train` is also called `label`.
    pub(super) fn segments(mut self) -> Result<Vec<TextPiece>> {
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
            let Value::Object(mut segment) = value else {
                return Err(error(format!("is {}, not an object", type_name(&value))));
            };
            let text = match segment.shift_remove("text").filter(|text| !text.is_null()) {
                Some(Value::String(text)) => text,
                Some(other) => return Err(error(format!("has a \"text\" that is {}", type_name(&other)))),
                None => return Err(error("has no \"text\"".into())),
            };
            let label = segment.shift_remove("label");
            if let Some(label) = label.filter(|_| !segment.contains_key("train")) {
                segment.insert("train".into(), label);
            }
            let weight = masks::take(&mut segment).map_err(&error)?;
            if let Some(key) = masks::unknown(&segment) {
                return Err(error(format!(
                    "has the key {key:?}, which looks like a mask and is none that is known"
                )));
            }
            let Some(weight) = weight else {
                return Err(error("has neither \"train\" nor \"weight\"".into()));
            };
            out.push(TextPiece { text, weight });
        }
        Ok(out)
    }
}

/// A few characters around byte `at`, quoted and escaped, with a note if the text ends there.
fn around(text: &str, at: usize) -> String {
    let mut start = at.saturating_sub(12);
    while !text.is_char_boundary(start) {
        start -= 1;
    }
    let mut end = (at + 20).min(text.len());
    while !text.is_char_boundary(end) {
        end += 1;
    }
    let before = if start > 0 { ".." } else { "" };
    let after = if end < text.len() { ".." } else { "" };
    let ends = if at >= text.len() { " (it ends)" } else { "" };
    format!("{before}{:?}{after}{ends}", &text[start..end])
}

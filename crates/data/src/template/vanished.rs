//! Messages that a template does not render.

use super::context;
use super::marks::{Marks, mark};
use super::proof::{Proof, is_assistant, role};
use super::python;
use crate::{Code, Finding, Result};
use serde_json::Value;

/// The maximal number of messages that are examined: each costs a rendering.
const CLOSELY: usize = 16;

impl Proof<'_> {
    /// Finds the messages whose content or tool calls are missing from the rendering (C002). A message without a
    /// mark, or without its text, is rendered again with other content: if that changes nothing, no token
    /// represents it.
    ///
    /// # Errors
    /// [`Error::Row`](crate::Error::Row) if it is an answer.
    pub fn find_vanished(&mut self, marks: Option<&Marks>) -> Result<()> {
        // For each message's content and tool calls: whether they have marks, and whether any of these is in the
        // rendering.
        let (mut marked, mut rendered) =
            (vec![[false; 2]; self.messages.len()], vec![[false; 2]; self.messages.len()]);
        if let Some(marks) = marks {
            for field in marks.fields.iter().filter(|field| !field.reasoning) {
                marked[field.message][usize::from(field.tool)] = true;
            }
            for field in
                marks.falls.iter().map(|fall| &marks.fields[fall.field]).filter(|field| !field.reasoning)
            {
                rendered[field.message][usize::from(field.tool)] = true;
            }
        }
        let mut found: Vec<(usize, &str)> = Vec::new();
        let mut looked = 0;
        for (i, message) in self.messages.iter().enumerate() {
            for (what, key, tool) in [("content", "content", 0), ("tool calls", "tool_calls", 1)] {
                let mut texts = Vec::new();
                strings(&message[key], &mut texts);
                let shown = || texts.iter().all(|text| self.text.contains(text));
                // Content beside tool calls may be dropped: the answer is still present.
                let called = tool == 0 && rendered[i][1];
                let fine =
                    called || if marked[i][tool] { rendered[i][tool] } else { texts.is_empty() || shown() };
                if fine || looked == CLOSELY {
                    continue;
                }
                looked += 1;
                if self.changes_nothing(i, key) {
                    found.push((i, what));
                }
            }
        }
        if let Some((i, _)) =
            found.iter().find(|(i, what)| *what == "content" && is_assistant(&self.messages[*i]))
        {
            return Err(self.error(format!("message {i}: the template does not render its content")));
        }
        let Some(&(i, what)) = found.first() else { return Ok(()) };
        let more = match found.len() {
            1 => String::new(),
            n => format!(" (and {} more)", n - 1),
        };
        let message = format!(
            "message {i} has the role {:?}, and the chat template renders nothing of its {what}{more}",
            role(&self.messages[i])
        );
        self.findings.push(Finding::new(self.id.row, Code::C002, message));
        Ok(())
    }

    /// True if the rendering is the same with other strings under a key of message `i`.
    fn changes_nothing(&self, i: usize, key: &str) -> bool {
        let Some(other) = mark(self.plane, 0) else { return false };
        let other = other.to_string();
        let mut message = self.messages[i].clone();
        match &mut message[key] {
            // A template may write only the name or the arguments of a call.
            Value::Array(calls) if key == "tool_calls" => calls.iter_mut().for_each(|call| {
                let function = if call.get("function").is_some() { &mut call["function"] } else { call };
                function["name"] = other.as_str().into();
                function["arguments"] = serde_json::json!({ other.as_str(): other.as_str() });
            }),
            content => reword(content, &other),
        }
        let mut messages = self.plain.clone();
        messages[i] = message.as_object().map(context::message).unwrap_or_default();
        self.render(&messages, false).is_ok_and(|text| text == self.text)
    }
}

/// False for the keys of parts and calls whose values are not text.
fn is_text(key: &str) -> bool {
    !matches!(key, "type" | "id" | "role")
}

/// The strings of a content or of tool calls, without white space at their ends; blank ones are left out.
fn strings<'a>(value: &'a Value, out: &mut Vec<&'a str>) {
    match value {
        Value::String(text) => {
            let core = &text[python::core(text)];
            out.extend((!core.is_empty()).then_some(core));
        }
        Value::Array(list) => list.iter().for_each(|value| strings(value, out)),
        Value::Object(map) => {
            map.iter().filter(|(key, _)| is_text(key)).for_each(|(_, value)| strings(value, out));
        }
        _ => {}
    }
}

/// Replaces each of these strings by another text.
fn reword(value: &mut Value, other: &str) {
    match value {
        Value::String(text) if !python::core(text).is_empty() => *text = other.to_string(),
        Value::Array(list) => list.iter_mut().for_each(|value| reword(value, other)),
        Value::Object(map) => {
            map.iter_mut().filter(|(key, _)| is_text(key)).for_each(|(_, value)| reword(value, other));
        }
        _ => {}
    }
}

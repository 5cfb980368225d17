//! The variables of a template: messages as MiniJinja values, and everything around them.

use super::engine;
use super::options::{TemplateOptions, is_reserved};
use super::python;
use crate::example::Conversation;
use crate::example::chat::held;
use crate::source::number_of;
use minijinja::Value;
use minijinja::value::{Enumerator, Object};
use serde_json::{Map, Value as Json};
use std::sync::Arc;

/// Keys of a message's reasoning. transformers makes the first two aliases of whichever is present.
pub(super) const REASONING: [&str; 3] = ["reasoning_content", THINKING, "reasoning"];

const THINKING: &str = "thinking";

/// A small ordered mapping. A linear search over a few keys is faster than hashing, and needs no table: a
/// rendering of nine messages went from 17 to 10 µs.
#[derive(Debug)]
struct Entries(Vec<(Value, Value)>);

impl Object for Entries {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.get_value_by_str(key.as_str()?)
    }

    fn get_value_by_str(self: &Arc<Self>, key: &str) -> Option<Value> {
        self.0.iter().find(|(k, _)| k.as_str() == Some(key)).map(|(_, v)| v.clone())
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.0.iter().map(|(k, _)| k.clone()).collect())
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        Some(self.0.len())
    }
}

/// A JSON value as a MiniJinja value; the order of keys is kept.
pub(super) fn jinja(value: &Json) -> Value {
    match value {
        Json::Null => Value::from(()),
        Json::Bool(x) => (*x).into(),
        Json::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(x), _) => x.into(),
            (None, Some(x)) => x.into(),
            _ => n.as_f64().unwrap_or(f64::NAN).into(),
        },
        Json::String(text) => text.as_str().into(),
        Json::Array(list) => list.iter().map(jinja).collect(),
        Json::Object(map) if number_of(map).is_some() => python::beyond(number_of(map).unwrap_or_default()),
        Json::Object(map) => Value::from_pairs(map.iter().map(|(k, v)| (k.as_str(), jinja(v)))),
    }
}

/// A message as transformers passes it to the template: null keys are dropped, and the keys of the reasoning
/// are aliases.
pub(super) fn message(message: &Map<String, Json>) -> Value {
    let present = |key: &str| held(message, key).filter(|v| !v.is_null());
    let reasoning = REASONING.iter().find_map(|key| present(key));
    let mut entries = Vec::with_capacity(message.len() + 2);
    // The order is that of Python's {"thinking": reasoning, **message, "reasoning_content": reasoning}.
    if let Some(reasoning) = reasoning {
        entries.push((THINKING.into(), jinja(present(THINKING).unwrap_or(reasoning))));
    }
    let own = message.iter().filter(|(key, v)| !v.is_null() && *key != THINKING);
    entries.extend(own.map(|(key, v)| (key.as_str().into(), jinja(v))));
    if let (Some(reasoning), None) = (reasoning, present(REASONING[0])) {
        entries.push((REASONING[0].into(), jinja(reasoning)));
    }
    Value::from_object(Entries(entries))
}

/// The variables that are equal for all rows: those of the options, the special tokens and the date.
#[derive(Debug)]
pub(super) struct Variables(Vec<(Value, Value)>);

impl Variables {
    /// Variables of the options come before the special tokens. Without a date in the options, today's date is used.
    pub fn new(tokens: &[(String, String)], options: &TemplateOptions) -> Variables {
        let mut shared: Vec<(Value, Value)> = Vec::new();
        // The configuration rejects reserved names; here they are only kept from overriding.
        let kwargs = options.kwargs.iter().filter(|(name, _)| !is_reserved(name));
        shared.extend(kwargs.map(|(name, value)| (name.as_str().into(), jinja(value))));
        shared.extend(tokens.iter().map(|(name, token)| (name.as_str().into(), token.as_str().into())));
        let date = options.date.unwrap_or_else(|| jiff::Zoned::now().date());
        shared.push((engine::NOW.into(), date.at(12, 0, 0, 0).to_string().into()));
        shared.push(("documents".into(), ().into()));
        Variables(shared)
    }

    /// All variables of one rendering. The first of two variables with the same name wins, so those of the
    /// row override these.
    pub fn context(
        &self,
        c: &Conversation,
        messages: &[Value],
        add_generation_prompt: bool,
        marks: Option<(char, char)>,
    ) -> Value {
        let tools = c.tools.as_ref().map_or(().into(), |tools| tools.iter().map(jinja).collect());
        let mut entries: Vec<(Value, Value)> = Vec::with_capacity(5 + self.0.len() + c.kwargs.len());
        entries.push(("messages".into(), messages.to_vec().into()));
        entries.push(("tools".into(), tools));
        entries.push(("add_generation_prompt".into(), add_generation_prompt.into()));
        if let Some((open, close)) = marks {
            entries.push((engine::OPEN.into(), open.to_string().into()));
            entries.push((engine::CLOSE.into(), close.to_string().into()));
        }
        entries.extend(c.kwargs.iter().map(|(k, v)| (k.as_str().into(), jinja(v))));
        entries.extend(self.0.iter().cloned());
        Value::from_object(Entries(entries))
    }
}

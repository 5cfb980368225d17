//! A template's general behaviour, found by rendering small conversations.

use super::compiled::ChatTemplate;
use super::context::{self, Variables};
use crate::example::Conversation;
use crate::example::chat::held;
use serde_json::{Map, Value, json};
use std::borrow::Cow;

/// Roles, each with other names that some templates use.
const NAMES: [(&str, &[&str]); 3] = [
    ("assistant", &["model"]),
    ("tool", &["ipython", "observation", "function"]),
    ("developer", &["system"]),
];

/// A role that no template supports.
const UNKNOWN: &str = "kx7q-role";

/// The text of the tested message.
const PROBE: &str = "kx7q";

/// The general behaviour of a template.
#[derive(Debug, Default)]
pub(super) struct Habits {
    /// True if it has a generation prompt; in some places it may be empty.
    pub prompts: bool,
    /// Roles that it does not render, with the names that it does render.
    renames: Vec<(&'static str, &'static str)>,
}

impl Habits {
    pub fn of(template: &ChatTemplate, variables: &Variables) -> Habits {
        let render = |messages: Value, prompt: bool| {
            let messages: Vec<_> = messages
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(Value::as_object)
                .map(context::message)
                .collect();
            template.render_with(variables, &Conversation::default(), &messages, prompt, None).ok()
        };
        let user = json!({"role": "user", "content": "a"});
        let renders = |role: &str, name: &str| {
            let own = json!({"role": name, "content": PROBE, "name": "f", "tool_call_id": "call00000"});
            let call =
                json!({"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {}}});
            let caller = json!({"role": "assistant", "content": "", "tool_calls": [call]});
            let messages = match role {
                "assistant" => json!([user, own]),
                "tool" => json!([user, caller, own]),
                _ => json!([own, user]),
            };
            render(messages, false).is_some_and(|text| text.contains(PROBE))
        };
        let rename = |(role, names): (&'static str, &[&'static str])| {
            // No renaming is needed, or the template renders any role, which shows nothing about the names.
            if renders(role, role) || renders(role, UNKNOWN) {
                return None;
            }
            names.iter().copied().find(|name| renders(role, name)).map(|name| (role, name))
        };
        let (with, without) = (render(json!([user]), true), render(json!([user]), false));
        // A template that rejects a single user message may still have a generation prompt elsewhere.
        let prompts = with != without || with.is_none();
        Habits { prompts, renames: NAMES.into_iter().filter_map(rename).collect() }
    }

    /// A conversation with the role names that the template supports.
    pub fn named<'a>(&self, c: &'a Conversation) -> Cow<'a, Conversation> {
        let other = |message: &Map<String, Value>| {
            let role = held(message, "role")?;
            self.renames.iter().find(|(known, _)| role == known).map(|&(_, name)| name)
        };
        if self.renames.is_empty() || !c.messages.iter().any(|message| other(message).is_some()) {
            return Cow::Borrowed(c);
        }
        let mut c = c.clone();
        for message in &mut c.messages {
            if let Some(name) = other(message) {
                message.insert("role".into(), name.into());
            }
        }
        Cow::Owned(c)
    }
}

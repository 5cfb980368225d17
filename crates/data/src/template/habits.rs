//! What a template does with conversations of any kind, found by rendering small ones.

use super::compiled::ChatTemplate;
use super::context::{self, Variables};
use crate::example::Conversation;
use crate::example::chat::held;
use serde_json::{Map, Value, json};
use std::borrow::Cow;

/// Roles, each with names that some templates know instead.
const NAMES: [(&str, &[&str]); 3] = [
    ("assistant", &["model"]),
    ("tool", &["ipython", "observation", "function"]),
    ("developer", &["system"]),
];

/// A role that no template knows.
const UNKNOWN: &str = "kx7q-role";

/// The text of the message in question.
const PROBE: &str = "kx7q";

/// The habits of a template.
#[derive(Debug, Default)]
pub(super) struct Habits {
    /// True if it has a generation prompt; at single places it may be empty.
    pub prompts: bool,
    /// Roles that it does not render, with the names under which it does.
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
            // Under a name that means nothing to it too, a template does not know the other name either.
            if renders(role, role) || renders(role, UNKNOWN) {
                return None;
            }
            names.iter().copied().find(|name| renders(role, name)).map(|name| (role, name))
        };
        let (with, without) = (render(json!([user]), true), render(json!([user]), false));
        // A template that rejects a lone user's message may still have a generation prompt elsewhere.
        let prompts = with != without || with.is_none();
        Habits { prompts, renames: NAMES.into_iter().filter_map(rename).collect() }
    }

    /// A conversation with the names of roles that the template knows.
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

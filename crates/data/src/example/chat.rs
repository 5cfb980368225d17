//! Conversations in one representation, whatever their format.

use serde_json::{Map, Value};
use std::ops::Range;

/// A conversation in OpenAI's message format, which chat templates expect.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conversation {
    /// Messages: objects with `role`, `content` (text, or a list of parts `{type: text, text}`) and any other keys of the
    /// row (`name`, `tool_calls` with arguments as objects or JSON text, `tool_call_id`, reasoning fields). Keys whose
    /// value is null are dropped.
    pub messages: Vec<Map<String, Value>>,
    /// Loss weight of each message, if the row gives one (`train`, `loss`, `weight` and their like). One
    /// entry per message.
    pub weights: Vec<Option<f32>>,
    /// Loss weights of parts of a message's text, by the message's index; they override the message's own weight.
    /// If parts overlap, the last applies.
    pub details: Vec<(usize, Vec<Detail>)>,
    /// Messages before this index are prompt, whatever their role (for `prompt` and `completion` given as
    /// messages).
    pub prompt_messages: usize,
    /// Tool definitions, as objects.
    pub tools: Option<Vec<Value>>,
    /// Template variables of the row (`chat_template_kwargs`); they override those of the policy.
    pub kwargs: Map<String, Value>,
}

/// The loss weight of a part of a message's text.
#[derive(Clone, Debug, PartialEq)]
pub struct Detail {
    /// True for the message's reasoning, false for its content.
    pub reasoning: bool,
    /// The range in bytes of the text; for content in parts, of its joined text parts.
    pub bytes: Range<usize>,
    /// Its loss weight.
    pub weight: f32,
}

/// The value of a key in a message. A message has few keys, so comparing them is faster than hashing.
pub(crate) fn held<'a>(message: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    message.iter().find(|(name, _)| *name == key).map(|(_, value)| value)
}

/// As [`held`], mutable.
pub(super) fn held_mut<'a>(message: &'a mut Map<String, Value>, key: &str) -> Option<&'a mut Value> {
    message.iter_mut().find(|(name, _)| *name == key).map(|(_, value)| value)
}

/// A message with text as its content.
pub(super) fn message(role: &str, content: String) -> Map<String, Value> {
    let mut map = Map::new();
    map.insert("role".into(), role.into());
    map.insert("content".into(), content.into());
    map
}

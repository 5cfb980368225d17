//! Conversations in one representation, whatever their format.

use serde_json::{Map, Value};

/// A conversation in OpenAI's message format, which chat templates expect.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conversation {
    /// Messages: objects with `role`, `content` (text, or a list of parts `{type: text, text}`) and any other keys of the
    /// row (`name`, `tool_calls` with arguments as objects or JSON text, `tool_call_id`, reasoning fields). Keys whose
    /// value is null are dropped.
    pub messages: Vec<Map<String, Value>>,
    /// Loss weight of each message, if the row gives one (`train`: 0 or 1, `weight`, `loss_weight`). One
    /// entry per message.
    pub weights: Vec<Option<f32>>,
    /// Messages before this index are prompt, whatever their role (for `prompt` and `completion` given as
    /// messages).
    pub prompt_messages: usize,
    /// Tool definitions, as objects.
    pub tools: Option<Vec<Value>>,
    /// Template variables of the row (`chat_template_kwargs`); they override those of the policy.
    pub kwargs: Map<String, Value>,
}

/// A message with text as its content.
pub(super) fn message(role: &str, content: String) -> Map<String, Value> {
    let mut map = Map::new();
    map.insert("role".into(), role.into());
    map.insert("content".into(), content.into());
    map
}

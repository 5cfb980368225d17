//! Conversations, in one shape whatever they came as.

use serde_json::{Map, Value};

/// A conversation in OpenAI's shape: what chat templates are given.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conversation {
    /// Messages as objects with `role`, `content` and whatever else they came with (`name`, `tool_calls` with
    /// arguments as objects, `tool_call_id`, reasoning fields). Keys whose value is null are already dropped.
    pub messages: Vec<Map<String, Value>>,
    /// Loss weight of each message where the row gives one (`train`: 0 or 1, `weight`, `loss_weight`); one entry
    /// per message.
    pub weights: Vec<Option<f32>>,
    /// Messages before this index are prompt, whatever their role (`prompt`/`completion` as message lists).
    pub prompt_messages: usize,
    /// Tool definitions, as objects.
    pub tools: Option<Vec<Value>>,
    /// The row's own template variables (`chat_template_kwargs`), over the policy's.
    pub kwargs: Map<String, Value>,
}

/// A message of text.
pub(super) fn message(role: &str, content: String) -> Map<String, Value> {
    let mut map = Map::new();
    map.insert("role".into(), role.into());
    map.insert("content".into(), content.into());
    map
}

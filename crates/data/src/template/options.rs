//! Options of a rendering.

use crate::policy::Policy;
use serde_json::{Map, Value};

/// Everything that a rendering depends on apart from the template and the conversation.
#[derive(Clone, Debug, Default)]
pub struct TemplateOptions {
    /// The date that `strftime_now` sees (at noon); `None` means today.
    pub date: Option<jiff::civil::Date>,
    /// Template variables of the configuration (`template_kwargs`); those of a row override them.
    pub kwargs: Map<String, Value>,
}

impl TemplateOptions {
    /// The options of a policy. A malformed date is ignored: the configuration has validated it.
    pub fn of(policy: &Policy) -> TemplateOptions {
        TemplateOptions {
            date: policy.template_date.as_deref().and_then(|date| date.parse().ok()),
            kwargs: policy.template_kwargs.iter().map(|(k, v)| (k.clone(), v.clone())).collect(),
        }
    }
}

/// True for variables that neither the configuration (`template_kwargs`) nor a row (`chat_template_kwargs`)
/// may set.
///
/// transformers takes messages, tools and the generation prompt as separate arguments and rejects duplicates.
/// It allows a call to override the special tokens. Here they come from the tokenizer only: a text with other
/// ones would have no known BOS and no known stop token. `documents` may be set, as in transformers.
pub fn is_reserved(name: &str) -> bool {
    let ours = ["messages", "tools", "add_generation_prompt", "bos_token", "eos_token"];
    ours.contains(&name) || name.starts_with("__suasion")
}

//! What a rendering depends on beside the conversation, and what it may not set.

use crate::policy::Policy;
use serde_json::{Map, Value};

/// What a rendering depends on beside the conversation.
#[derive(Clone, Debug, Default)]
pub struct TemplateOptions {
    /// The date that `strftime_now` gives (at noon); today where there is none.
    pub date: Option<jiff::civil::Date>,
    /// Template variables of the config (`template_kwargs`); a row's own go over them.
    pub kwargs: Map<String, Value>,
}

impl TemplateOptions {
    /// What a policy says. A date that is none is left out: the configuration has checked it.
    pub fn of(policy: &Policy) -> TemplateOptions {
        TemplateOptions {
            date: policy.template_date.as_deref().and_then(|date| date.parse().ok()),
            kwargs: policy.template_kwargs.iter().map(|(k, v)| (k.clone(), v.clone())).collect(),
        }
    }
}

/// True for the names that are no variables of a template's own: neither the configuration (`template_kwargs`) nor a
/// row (`chat_template_kwargs`) may set them.
///
/// transformers takes messages, tools and the generation prompt as arguments of their own and refuses them twice. It
/// lets a call override the special tokens; but here the tokenizer says what these are, and a text with others
/// would have no stop token and no BOS that anybody knows. `documents` may be set, as there.
pub fn is_reserved(name: &str) -> bool {
    let ours = ["messages", "tools", "add_generation_prompt", "bos_token", "eos_token"];
    ours.contains(&name) || name.starts_with("__suasion")
}

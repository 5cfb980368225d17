//! The state of a proof: the conversation, its rendering, and the other renderings that the proof uses.

use super::compiled::{ChatTemplate, TemplateError};
use super::context::{self, Variables};
use super::habits::Habits;
use super::options::is_reserved;
use crate::example::Conversation;
use crate::policy::{Policy, Supervise};
use crate::render::{Rendered, Stops};
use crate::{Code, Error, Finding, Result, RowId};
use serde_json::Value;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// The number of answers, apart from the last one, whose prompt is rendered with all messages before it. For
/// further answers a few messages before the answer must suffice ([`Proof::window`]), so that the work is linear
/// in the conversation's length.
const NEAR: usize = 128;

/// The number of messages before an answer that are rendered for it beyond [`NEAR`].
const WINDOW: usize = 8;

/// The help text of a row whose spans cannot be proved.
const HELP: &str = "mark the assistant's text with {% generation %} .. {% endgeneration %} in the template, or \
                    give the row as prompt and completion";

/// A rendered conversation with its findings.
#[derive(Clone, Debug, PartialEq)]
pub struct Chat {
    /// The text, which contains its own special tokens, and the spans that tile it.
    pub rendered: Rendered,
    /// C001, C002, G001 and M007. A missing stop token (M002) is found later, in the tokens.
    pub findings: Vec<Finding>,
}

/// The part of the proofs that is common to all rows of a source.
#[derive(Debug)]
pub(super) struct Setup {
    pub template: Arc<ChatTemplate>,
    pub policy: Arc<Policy>,
    pub stops: Stops,
    pub variables: Variables,
    pub habits: Habits,
}

impl Setup {
    /// The messages as the template sees them, and their rendering.
    pub fn plain(&self, id: &RowId, c: &Conversation) -> Result<(Vec<minijinja::Value>, String)> {
        if let Some(name) = c.kwargs.keys().find(|name| is_reserved(name)) {
            return Err(Error::row(
                id.clone(),
                format!("\"chat_template_kwargs\" sets {name:?}, which is reserved"),
                "remove it: messages and tools have their own columns, the generation prompt is for inference, and the \
                 special tokens come from the tokenizer",
            ));
        }
        let messages: Vec<minijinja::Value> = c.messages.iter().map(context::message).collect();
        let text = self.template.render_with(&self.variables, c, &messages, false, None).map_err(|e| {
            Error::row(
                id.clone(),
                format!("the chat template rejects the conversation: {e}"),
                "check the roles, their order and the fields that the template needs",
            )
        })?;
        Ok((messages, text))
    }
}

/// The renderings that a proof relies on, apart from that of the whole conversation.
#[derive(Debug, Default)]
pub(super) struct Evidence {
    /// Renderings of the first `n` messages, with or without generation prompt; `None` if the template
    /// rejects them.
    pub prefixes: BTreeMap<(usize, bool), Option<String>>,
    /// The rendering with marks around the `{% generation %}` blocks, and the marks.
    pub marked: Option<(String, (char, char))>,
    /// True if the proof uses other renderings, which are not kept: with substituted content, or of a window of
    /// the messages.
    pub others: bool,
}

pub(super) struct Proof<'a> {
    pub setup: &'a Setup,
    pub c: &'a Conversation,
    pub messages: Vec<Value>,
    /// The messages as the template sees them.
    pub plain: Vec<minijinja::Value>,
    pub text: String,
    pub plane: u32,
    pub space: Option<char>,
    pub id: RowId,
    pub evidence: RefCell<Evidence>,
    pub findings: Vec<Finding>,
    /// In a long conversation, the last answer near its start, and the last answer of all.
    pub near: Option<(usize, usize)>,
}

/// A response that was found.
pub(super) struct Turn {
    pub message: usize,
    /// The byte at which its text starts; the generation prompt may contain the beginning of that text.
    pub from: usize,
    pub start: usize,
    pub end: usize,
    pub stop: Option<Range<usize>>,
}

impl Proof<'_> {
    pub fn error(&self, message: impl Into<String>) -> Error {
        Error::row(self.id.clone(), message, HELP)
    }

    /// Adds a finding about answer `i`, if it is supervised.
    pub fn find(&mut self, i: usize, code: Code, message: String) {
        if self.weight(i).is_some_and(|w| w > 0.0) {
            self.findings.push(Finding::new(self.id.row, code, message));
        }
    }

    /// The loss weight of answer `i`; `None` if it is prompt.
    pub fn weight(&self, i: usize) -> Option<f32> {
        let own = self.c.weights.get(i).copied().flatten();
        let last = self.messages.iter().rposition(is_assistant);
        (i >= self.c.prompt_messages).then(|| match self.setup.policy.supervise {
            Supervise::All => own.unwrap_or(1.0),
            Supervise::Last => {
                if Some(i) == last {
                    own.unwrap_or(1.0)
                } else {
                    0.0
                }
            }
            Supervise::PerMessage => own.unwrap_or(0.0),
        })
    }

    pub fn render(&self, messages: &[minijinja::Value], generation: bool) -> Result<String, TemplateError> {
        self.setup.template.render_with(&self.setup.variables, self.c, messages, generation, None)
    }

    /// True if the messages before message `n` are too many to be rendered for it.
    pub fn is_far(&self, n: usize) -> bool {
        self.near.is_some_and(|(first, last)| n > first && n < last)
    }

    /// The indices of some of the messages before message `i`: the system messages at the start, and the last
    /// messages, starting with a user's. If no user message is near, the last one is placed before them.
    pub fn window(&self, i: usize) -> Vec<usize> {
        let head = self.messages.iter().take_while(|m| role(m) == "system").count();
        let user = |at: &usize| role(&self.messages[*at]) == "user";
        let from = i.saturating_sub(WINDOW).max(head);
        let start = (head..=from).rev().take(WINDOW).find(user);
        let mut window: Vec<usize> = (0..head).collect();
        match start {
            Some(start) => window.extend(start..i),
            None => {
                // The last user message, then the last messages from an answer on.
                window.extend((head..from).rev().find(user));
                window.extend((from..i).find(|at| is_assistant(&self.messages[*at])).unwrap_or(from)..i);
            }
        }
        window
    }

    /// The rendering of the first `n` messages; `None` if the template rejects them, or if they are too many.
    pub fn prefix(&self, n: usize, generation: bool) -> Option<String> {
        if self.is_far(n) {
            return None;
        }
        let mut evidence = self.evidence.borrow_mut();
        let known = evidence.prefixes.entry((n, generation));
        known.or_insert_with(|| self.render(&self.plain[..n], generation).ok()).clone()
    }

    /// The rendering of messages, one of which has substituted content.
    pub fn reworded(&self, messages: &[minijinja::Value]) -> Result<String, TemplateError> {
        self.evidence.borrow_mut().others = true;
        self.render(messages, false)
    }
}

/// See [`Proof::near`].
pub(super) fn near(messages: &[Value]) -> Option<(usize, usize)> {
    let mut answers = (0..messages.len()).filter(|&i| is_assistant(&messages[i]));
    let last = answers.clone().next_back()?;
    answers.nth(NEAR - 1).map(|first| (first, last))
}

pub(super) fn role(message: &Value) -> &str {
    message["role"].as_str().unwrap_or_default()
}

/// True for the roles of the model.
pub(super) fn is_assistant(message: &Value) -> bool {
    is_assistant_role(&message["role"])
}

/// As [`is_assistant`], for the role alone.
pub(super) fn is_assistant_role(role: &Value) -> bool {
    matches!(role.as_str(), Some("assistant" | "model"))
}

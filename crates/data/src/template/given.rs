//! The form in which a template gets a row: content as text or in parts, the arguments of calls as objects or as
//! JSON text.
//!
//! Templates differ in the forms that they support, and do not declare them. So the form is found by trial: the
//! conversation is rendered with a private mark in each text, in the forms below, and the first form is used in
//! which every text is rendered, and none is printed as a list or mapping.
//!
//! | content | forms |
//! |---|---|
//! | in parts | in parts; its texts joined; joined for the model's messages only, or for the others only |
//! | a string | a string; a single part; a part for the model's messages only, or for the others only |

use super::context;
use super::marks::{PLANE, PLANES, mark};
use super::proof::{Setup, is_assistant_role};
use super::python;
use super::shape::{key, specimen};
use crate::example::Conversation;
use crate::example::chat::held;
use crate::source::parse;
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};

/// Maximum number of shapes whose form is remembered.
const SHAPES: usize = 1024;

/// The form of a message's content.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Shown {
    AsItIs,
    Parts,
    Text,
}

use Shown::{AsItIs, Parts, Text};

/// The forms of a conversation: for the model's messages, and for the others.
const FORMS: [(Shown, Shown); 5] =
    [(AsItIs, AsItIs), (Parts, Parts), (Text, Text), (Text, Parts), (Parts, Text)];

/// The form of each shape seen so far.
#[derive(Debug, Default)]
pub(super) struct Forms(RwLock<HashMap<Vec<u8>, usize>>);

/// The joined text of content in parts; `None` for other content, and if a part is not text.
fn joined(content: &Value) -> Option<String> {
    let text = |part: &Value| part["text"].as_str().filter(|_| part["type"] == "text").map(str::to_string);
    content.as_array()?.iter().map(text).collect()
}

/// The arguments of the calls in a message.
fn arguments(message: &mut Map<String, Value>) -> impl Iterator<Item = &mut Value> {
    let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten();
    calls.filter_map(|call| call.get_mut("function")?.get_mut("arguments"))
}

/// A conversation with the content of its messages in one of the forms.
fn shown(c: &Conversation, (answers, others): (Shown, Shown)) -> Conversation {
    let mut c = c.clone();
    for message in &mut c.messages {
        let form = if message.get("role").is_some_and(is_assistant_role) { answers } else { others };
        let Some(content) = message.get_mut("content") else { continue };
        let new = match (form, &*content) {
            (Parts, Value::String(text)) => Some(json!([{"type": "text", "text": text}])),
            (Text, list) => joined(list).map(Value::from),
            _ => None,
        };
        if let Some(new) = new {
            *content = new;
        }
    }
    c
}

/// A conversation with objects in place of the JSON texts of call arguments; and these texts. `None` if it has none.
fn with_objects(c: &Conversation) -> Option<(Conversation, Vec<(String, Value)>)> {
    let has_text = |call: &Value| call["function"]["arguments"].is_string();
    let calls = |m: &Map<String, Value>| {
        held(m, "tool_calls").and_then(Value::as_array).is_some_and(|calls| calls.iter().any(has_text))
    };
    if !c.messages.iter().any(calls) {
        return None;
    }
    let (mut c, mut texts) = (c.clone(), Vec::new());
    for given in c.messages.iter_mut().flat_map(arguments) {
        if let Value::String(text) = given
            && let Ok(object @ Value::Object(_)) = parse(text)
        {
            texts.push((std::mem::take(text), object.clone()));
            *given = object;
        }
    }
    Some((c, texts))
}

impl Setup {
    /// The conversation in the form that the template supports.
    pub fn given<'a>(&self, c: &'a Conversation, forms: &Forms) -> Cow<'a, Conversation> {
        let Some((objects, texts)) = with_objects(c) else { return self.content(c, forms) };
        let objects = self.content(&objects, forms).into_owned();
        // A mapping printed as Python would print it should not be trained on: such a template needs the JSON text.
        let printed = |rendered: &str| {
            texts.iter().any(|(text, object)| {
                let python = python::str(&context::jinja(object)).unwrap_or_default();
                python != *text && rendered.contains(&python)
            })
        };
        match self.text(&objects) {
            Some(rendered) if !printed(&rendered) => Cow::Owned(objects),
            objects_rendered => {
                let as_text = self.content(c, forms);
                let rendered = self.text(&as_text);
                let holds = |rendered: &str| texts.iter().all(|(text, _)| rendered.contains(text.as_str()));
                match (rendered, objects_rendered) {
                    (Some(_), None) => as_text,
                    (Some(rendered), Some(_)) if holds(&rendered) => as_text,
                    _ => Cow::Owned(objects),
                }
            }
        }
    }

    fn text(&self, c: &Conversation) -> Option<String> {
        let messages: Vec<minijinja::Value> = c.messages.iter().map(context::message).collect();
        self.template.render_with(&self.variables, c, &messages, false, None).ok()
    }

    /// The conversation with its content in the form that the template supports.
    fn content<'a>(&self, c: &'a Conversation, forms: &Forms) -> Cow<'a, Conversation> {
        let listed = |m: &Map<String, Value>| held(m, "content").is_some_and(Value::is_array);
        if !self.template.compiled(c).parts && !c.messages.iter().any(listed) {
            return Cow::Borrowed(c);
        }
        let form = match key(c) {
            None => self.form(c),
            Some(key) => {
                let known = forms.0.read().unwrap_or_else(PoisonError::into_inner).get(&key).copied();
                known.unwrap_or_else(|| {
                    let form = specimen(c).map_or(0, |specimen| self.form(&specimen));
                    let mut forms = forms.0.write().unwrap_or_else(PoisonError::into_inner);
                    if forms.len() >= SHAPES {
                        forms.clear();
                    }
                    forms.insert(key, form);
                    form
                })
            }
        };
        if form == 0 { Cow::Borrowed(c) } else { Cow::Owned(shown(c, FORMS[form])) }
    }

    /// The index of the first form in which most texts are rendered.
    fn form(&self, c: &Conversation) -> usize {
        let all = serde_json::to_string(&c.messages).unwrap_or_default();
        let unused = |plane: &u32| !all.chars().any(|ch| (*plane..plane + PLANE).contains(&(ch as u32)));
        let Some(plane) = PLANES.into_iter().find(unused) else { return 0 };
        let mut best = (0, None);
        let mut tried: Vec<Conversation> = Vec::new();
        for (at, form) in FORMS.into_iter().enumerate() {
            let candidate = shown(c, form);
            if tried.contains(&candidate) {
                continue;
            }
            let (count, of) = self.rendered_texts(&candidate, plane);
            if count == Some(of) {
                return at;
            }
            if count > best.1 {
                best = (at, count);
            }
            tried.push(candidate);
        }
        best.0
    }

    /// The number of a conversation's texts that are rendered, and the number of all; `None` if the template
    /// rejects it, or prints a part as a mapping.
    fn rendered_texts(&self, c: &Conversation, plane: u32) -> (Option<usize>, usize) {
        let Some(printed) = mark(plane, PLANE as usize - 1) else { return (None, 0) };
        let mut marked = c.clone();
        let mut n = 0;
        let mut put = |text: &mut String| {
            let core = python::core(text);
            if let Some(mark) = mark(plane, n).filter(|_| !core.is_empty()) {
                // Marks both ends, for templates that truncate a text.
                text.insert(core.end, mark);
                text.insert(core.start, mark);
                n += 1;
            }
        };
        for content in marked.messages.iter_mut().filter_map(|message| message.get_mut("content")) {
            match content {
                Value::String(text) => put(text),
                Value::Array(list) => {
                    for part in list.iter_mut().filter_map(Value::as_object_mut) {
                        if let Some(Value::String(text)) = part.get_mut("text") {
                            put(text);
                        }
                        // Templates that support parts do not print unknown keys.
                        part.insert(printed.to_string(), Value::Null);
                    }
                }
                _ => {}
            }
        }
        let Some(text) = self.text(&marked).filter(|text| !text.contains(printed)) else { return (None, n) };
        let shown = (0..n).filter(|n| mark(plane, *n).is_some_and(|mark| text.contains(mark))).count();
        (Some(shown), n)
    }
}

//! Where the responses are, by proof: `{% generation %}` blocks, else marks around the fields, else prefixes.

use super::context::{self, REASONING};
use super::{Chat, Chats, TemplateError, python};
use crate::chat::Conversation;
use crate::policy::{Policy, Supervise};
use crate::render::{Rendered, Span, Stops};
use crate::{Code, Error, Finding, Origin, Result, RowId, Section};
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;

/// The help of a row whose spans cannot be proved.
const HELP: &str = "mark what the assistant says with {% generation %} .. {% endgeneration %} in the template, or \
                    give the row as prompt and completion";

/// Two private-use planes of 65,534 characters; marks come from one that the conversation does not use.
const PLANES: [u32; 2] = [0xF_0000, 0x10_0000];
const PLANE: u32 = 0xFFFD;

/// White space of which some stands for that of the fields; the first that the conversation does not use.
const SPACES: [char; 6] = ['\u{2003}', '\u{2002}', '\u{2001}', '\u{2004}', '\u{2005}', '\u{3000}'];

/// Which fields get marks. A template that looks at a field's first or last characters may survive fewer.
#[derive(Clone, Copy, PartialEq)]
struct Fields {
    prompts: bool,
    tools: bool,
    open: bool,
}

const ATTEMPTS: [Fields; 4] = [
    Fields { prompts: true, tools: true, open: true },
    Fields { prompts: false, tools: true, open: true },
    Fields { prompts: false, tools: false, open: true },
    Fields { prompts: false, tools: false, open: false },
];

/// One marked string.
struct Field {
    message: usize,
    /// The white space before and after its words.
    head: String,
    tail: String,
    /// Part of a tool call.
    tool: bool,
}

/// Where a mark fell.
#[derive(Clone, Copy)]
struct Fall {
    /// The byte of the plain rendering: where the field's words start or end.
    at: usize,
    /// The same with the white space around the words, where the template renders it.
    outer: usize,
    field: usize,
    /// True for the mark after the words.
    close: bool,
}

/// A proven set of marks.
struct Marks {
    fields: Vec<Field>,
    falls: Vec<Fall>,
    which: Fields,
    /// What stands for the fields' white space, where it is told apart from the template's.
    space: Option<char>,
    /// The messages with their marks.
    messages: Vec<minijinja::Value>,
}

impl Marks {
    /// The falls of message `i`'s fields, in order of place.
    fn of(&self, i: usize) -> impl Iterator<Item = &Fall> {
        self.falls.iter().filter(move |f| self.fields[f.field].message == i)
    }
}

/// One response, as found.
struct Turn {
    message: usize,
    start: usize,
    end: usize,
    stop: Option<Range<usize>>,
}

fn mark(plane: u32, n: usize) -> Option<char> {
    u32::try_from(n).ok().filter(|n| *n < PLANE).and_then(|n| char::from_u32(plane + n))
}

/// A text without its marks, and where they fell: (byte, number of the mark).
fn strip(text: &str, plane: u32) -> (String, Vec<(usize, usize)>) {
    let mut out = String::with_capacity(text.len());
    let mut falls = Vec::new();
    for c in text.chars() {
        match (c as u32).checked_sub(plane) {
            Some(n) if n < PLANE => falls.push((out.len(), n as usize)),
            _ => out.push(c),
        }
    }
    (out, falls)
}

/// A text without the marks of fields, with their own white space in its place, and where the marks fell.
fn strip_fields(text: &str, plane: u32, fields: &[Field], space: Option<char>) -> (String, Vec<Fall>) {
    let mut out = String::with_capacity(text.len());
    let mut falls = Vec::new();
    let mut rest = text.chars();
    while let Some(c) = rest.next() {
        let n = match (c as u32).checked_sub(plane) {
            Some(n) if n < PLANE => n as usize,
            _ => {
                out.push(c);
                continue;
            }
        };
        let Some(field) = fields.get(n / 2) else { continue };
        let close = n % 2 == 1;
        let at = out.len();
        let (at, outer) = match space {
            Some(space) if close => {
                let mut after = rest.clone();
                if !field.tail.is_empty() && after.next() == Some(space) {
                    rest = after;
                    out.push_str(&field.tail);
                }
                (at, out.len())
            }
            Some(space) => {
                let before = at - if out.ends_with(space) { space.len_utf8() } else { 0 };
                if before < at && !field.head.is_empty() {
                    out.truncate(before);
                    out.push_str(&field.head);
                    (out.len(), before)
                } else {
                    (at, at)
                }
            }
            None => (at, at),
        };
        falls.push(Fall { at, outer, field: n / 2, close });
    }
    if space.is_none() {
        // The fields' white space cannot be told from the template's own; where it may be there, it is.
        for fall in &mut falls {
            let field = &fields[fall.field];
            if fall.close && out[fall.at..].starts_with(&field.tail) {
                fall.outer += field.tail.len();
            } else if !fall.close && out[..fall.at].ends_with(&field.head) {
                fall.outer -= field.head.len();
            }
        }
    }
    (out, falls)
}

/// The first byte in which two texts differ, shown with what stands there.
fn difference(a: &str, b: &str) -> String {
    let at = a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
    let show = |text: &str| {
        let start = text.floor_char_boundary(at);
        text[start..].chars().take(24).collect::<String>()
    };
    format!("at byte {at}: {:?} against {:?}", show(a), show(b))
}

fn role(message: &Value) -> &str {
    message["role"].as_str().unwrap_or_default()
}

/// True for the roles that are the model's.
fn is_assistant(message: &Value) -> bool {
    matches!(role(message), "assistant" | "model")
}

/// Messages as transformers hands them to the template, for what is looked up in them here.
fn normalise(messages: &[Map<String, Value>]) -> Vec<Value> {
    let one = |message: &Map<String, Value>| {
        let mut message: Map<String, Value> =
            message.iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.clone(), v.clone())).collect();
        let reasoning = REASONING.iter().find_map(|k| message.get(*k));
        if let Some(reasoning) = reasoning.cloned() {
            for key in &REASONING[..2] {
                message.entry(*key).or_insert_with(|| reasoning.clone());
            }
        }
        Value::Object(message)
    };
    messages.iter().map(one).collect()
}

/// The spans of a conversation, by proof, from its messages as the template sees them and their rendering.
///
/// # Errors
/// [`Error::Row`] where there is no proof.
pub(super) fn prove(
    chats: &Chats<'_>,
    id: RowId,
    c: &Conversation,
    plain: Vec<minijinja::Value>,
    text: String,
) -> Result<Chat> {
    prove_with_evidence(chats, id, c, plain, text).map(|(chat, _)| chat)
}

/// The renderings, beside the whole one, that a proof rests on.
#[derive(Debug, Default)]
pub(super) struct Evidence {
    /// Those of the first messages, with the generation prompt or without; none where the template refuses them.
    pub prefixes: BTreeMap<(usize, bool), Option<String>>,
    /// The one with marks around the `{% generation %}` blocks, and the marks.
    pub marked: Option<(String, (char, char))>,
    /// True where the conversation was rendered with other words in it.
    pub reworded: bool,
}

/// As [`prove`], with what the proof rests on.
///
/// # Errors
/// As [`prove`].
pub(super) fn prove_with_evidence(
    chats: &Chats<'_>,
    id: RowId,
    c: &Conversation,
    plain: Vec<minijinja::Value>,
    text: String,
) -> Result<(Chat, Evidence)> {
    let messages = normalise(&c.messages);
    let all = serde_json::to_string(&messages).unwrap_or_default();
    let Some(plane) = PLANES.into_iter().find(|plane| {
        let used = |ch: char| (*plane..plane + PLANE).contains(&(ch as u32));
        !text.contains(used) && !all.contains(used)
    }) else {
        let message = "the conversation uses characters of both supplementary private-use planes";
        return Err(Error::row(id, message, "remove them"));
    };
    let space = SPACES.into_iter().find(|space| !text.contains(*space) && !all.contains(*space));
    let policy = chats.policy;
    let evidence = RefCell::default();
    let mut work =
        Work { chats, c, policy, messages, plain, text, plane, space, id, evidence, findings: Vec::new() };
    let marks = work.marks();
    let turns = if chats.template.compiled(c).generation {
        work.generation(marks.as_ref(), &chats.stops)?
    } else {
        work.turns(marks.as_ref(), &chats.stops)?
    };
    let evidence = work.evidence.take();
    Ok((work.tile(turns, marks.as_ref())?, evidence))
}

struct Work<'a> {
    chats: &'a Chats<'a>,
    c: &'a Conversation,
    policy: &'a Policy,
    messages: Vec<Value>,
    /// The messages as the template sees them.
    plain: Vec<minijinja::Value>,
    text: String,
    plane: u32,
    space: Option<char>,
    id: RowId,
    evidence: RefCell<Evidence>,
    findings: Vec<Finding>,
}

/// Where an answer's first mark fell.
#[derive(Clone, Copy)]
struct Own {
    at: usize,
    outer: usize,
    /// True where it opens what the assistant says, and no tool call.
    content: bool,
}

/// How the strings of one message are marked.
struct Wrap {
    plane: u32,
    /// What stands for their white space; without it that stays as it is.
    space: Option<char>,
    message: usize,
    /// True where they get an opening mark, too.
    open: bool,
}

impl Wrap {
    /// Marks around the words of each string in a value. They stand inside its white space, so that a template which
    /// trims meets what it met before; a blank string gets none, since a mark would make it true.
    fn wrap(&self, value: &mut Value, tool: bool, fields: &mut Vec<Field>) {
        match value {
            Value::String(text) => {
                let n = fields.len();
                let (Some(open), Some(close)) = (mark(self.plane, 2 * n), mark(self.plane, 2 * n + 1)) else {
                    return;
                };
                let core = python::strip(text, None, true, true);
                if core.is_empty() {
                    return;
                }
                let start = text.len() - python::strip(text, None, true, false).len();
                let (mut head, tail) = (text[..start].to_string(), text[start + core.len()..].to_string());
                let mut new = String::with_capacity(text.len() + 12);
                let white = |new: &mut String, given: &str| match self.space {
                    Some(space) if !given.is_empty() => new.push(space),
                    _ => new.push_str(given),
                };
                if self.open {
                    white(&mut new, &head);
                    new.push(open);
                } else {
                    new.push_str(&std::mem::take(&mut head));
                }
                new.push_str(core);
                new.push(close);
                white(&mut new, &tail);
                *text = new;
                fields.push(Field { message: self.message, head, tail, tool });
            }
            Value::Array(list) => list.iter_mut().for_each(|v| self.wrap(v, tool, fields)),
            Value::Object(map) => {
                for (key, value) in map.iter_mut() {
                    // A part's type and a call's id are no text: templates compare them.
                    if !matches!(key.as_str(), "type" | "id" | "role") {
                        self.wrap(value, tool, fields);
                    }
                }
            }
            _ => {}
        }
    }
}

impl Work<'_> {
    fn error(&self, message: impl Into<String>) -> Error {
        Error::row(self.id.clone(), message, HELP)
    }

    /// A finding about an answer that is learned; about the others there is nothing to find.
    fn find(&mut self, i: usize, code: Code, message: String) {
        if self.weight(i).is_some_and(|w| w > 0.0) {
            self.findings.push(Finding::new(self.id.row, code, message));
        }
    }

    fn render(&self, messages: &[minijinja::Value], generation: bool) -> Result<String, TemplateError> {
        self.chats.template.render_with(&self.chats.variables, self.c, messages, generation, None)
    }

    /// The rendering of the first `n` messages; none where the template refuses them.
    fn prefix(&self, n: usize, generation: bool) -> Option<String> {
        let mut evidence = self.evidence.borrow_mut();
        let known = evidence.prefixes.entry((n, generation));
        known.or_insert_with(|| self.render(&self.plain[..n], generation).ok()).clone()
    }

    /// The rendering of some messages in which one has other words.
    fn reworded(&self, messages: &[minijinja::Value]) -> Result<String, TemplateError> {
        self.evidence.borrow_mut().reworded = true;
        self.render(messages, false)
    }

    /// The most marks with which the stripped rendering is byte-equal to the plain one.
    fn marks(&self) -> Option<Marks> {
        ATTEMPTS.into_iter().find_map(|which| {
            let padded = self.space.and_then(|space| self.attempt(which, Some(space)));
            match padded {
                Some(Ok(marks)) => Some(marks),
                // Without white space around any field, the other way is the same.
                Some(Err(false)) => None,
                Some(Err(true)) | None => self.attempt(which, None)?.ok(),
            }
        })
    }

    /// One set of marks. None where there is nothing to mark; an error where the template does not keep it, with
    /// whether there was white space at stake.
    fn attempt(&self, which: Fields, space: Option<char>) -> Option<Result<Marks, bool>> {
        let mut messages = self.messages.clone();
        let mut fields = Vec::new();
        for (i, message) in messages.iter_mut().enumerate() {
            let assistant = is_assistant(message);
            let Some(message) = message.as_object_mut() else { continue };
            if !assistant && !which.prompts {
                continue;
            }
            let wrap = Wrap { plane: self.plane, space, message: i, open: which.open };
            for key in ["content", "reasoning_content", "thinking", "reasoning"] {
                if let Some(value) = message.get_mut(key) {
                    wrap.wrap(value, false, &mut fields);
                }
            }
            if which.tools && assistant {
                for call in message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten()
                {
                    let function = match call.get("function") {
                        Some(_) => &mut call["function"],
                        None => call,
                    };
                    for key in ["name", "arguments"] {
                        if let Some(value) = function.get_mut(key) {
                            wrap.wrap(value, true, &mut fields);
                        }
                    }
                }
            }
        }
        if fields.is_empty() {
            return None;
        }
        let spaced = fields.iter().any(|f| !f.head.is_empty() || !f.tail.is_empty());
        let messages: Vec<minijinja::Value> =
            messages.iter().filter_map(Value::as_object).map(context::message).collect();
        let Ok(marked) = self.render(&messages, false) else { return Some(Err(spaced)) };
        let (stripped, falls) = strip_fields(&marked, self.plane, &fields, space);
        // A field whose end comes first is no longer the field (reversed, or taken apart).
        let mut closed = std::collections::HashSet::new();
        let mut opened = std::collections::HashSet::new();
        for fall in &falls {
            if fall.close {
                closed.insert(fall.field);
            } else if opened.insert(fall.field) && closed.contains(&fall.field) {
                return Some(Err(spaced));
            }
        }
        let same = stripped == self.text;
        Some(same.then_some(Marks { fields, falls, which, space, messages }).ok_or(spaced))
    }

    /// True where a message has something to say.
    fn speaks(message: &Value) -> bool {
        match &message["content"] {
            Value::String(text) => !python::strip(text, None, true, true).is_empty(),
            Value::Array(parts) => !parts.is_empty(),
            _ => false,
        }
    }

    /// True where a prompt between answer `i` and the next may have a stop token in it, or a part of one at an end.
    fn typed_behind(&self, i: usize, stops: &Stops) -> bool {
        fn types(value: &Value, stop: &str) -> bool {
            let part = |text: &str| {
                let mut cuts = (1..stop.len()).filter(|at| stop.is_char_boundary(*at));
                cuts.any(|at| text.ends_with(&stop[..at]) || text.starts_with(&stop[at..]))
            };
            match value {
                Value::String(text) => text.contains(stop) || part(text) || part(text.trim()),
                Value::Array(list) => list.iter().any(|value| types(value, stop)),
                Value::Object(map) => map.iter().any(|(key, value)| key != "role" && types(value, stop)),
                _ => false,
            }
        }
        let stops: Vec<&String> = stops.all.iter().filter(|stop| !stop.is_empty()).collect();
        let mut behind = self.messages[i + 1..].iter().take_while(|message| !is_assistant(message));
        behind.any(|message| stops.iter().any(|stop| types(message, stop)))
    }

    fn first_stop(&self, range: Range<usize>, stops: &Stops) -> Option<Range<usize>> {
        let text = self.text.get(range.clone())?;
        let all = stops.all.iter().filter(|s| !s.is_empty());
        all.filter_map(|s| text.find(s.as_str()).map(|at| (at, s.len())))
            .min_by_key(|&(at, len)| (at, std::cmp::Reverse(len)))
            .map(|(at, len)| range.start + at..range.start + at + len)
    }

    /// The generation prompt by itself, where the rendering without it is a prefix of the one with it.
    fn generation_prompt(&self, n: usize) -> Option<String> {
        let with = self.prefix(n, true)?;
        let without = self.prefix(n, false)?;
        with.strip_prefix(&without).filter(|s| !s.is_empty()).map(str::to_string)
    }

    /// What the generation prompt adds after message `i - 1`'s last mark, found at the same mark in the whole.
    fn local_start(&self, i: usize, marks: Option<&Marks>, cursor: usize) -> Option<usize> {
        let marks = marks?;
        let before = i.checked_sub(1)?;
        let asked = marks.of(before).filter(|f| f.close).map(|f| f.outer).max().filter(|at| *at == cursor)?;
        let marked = self.render(&marks.messages[..i], true).ok()?;
        let (text, falls) = strip_fields(&marked, self.plane, &marks.fields, marks.space);
        // The marks must not have changed it: it is what the model is given.
        self.prefix(i, true).filter(|with| *with == text)?;
        let own = falls.iter().filter(|f| f.close && marks.fields[f.field].message == before);
        let tail = &text[own.map(|f| f.outer).max()?..];
        self.text[asked..].starts_with(tail).then_some(asked + tail.len())
    }

    /// Where any answer would start in the place of message `i`: the conversation with other words there is the same
    /// up to these words.
    fn other_start(&self, i: usize) -> Option<usize> {
        let words = mark(self.plane, 0)?;
        let mut message = Map::new();
        message.insert("role".into(), self.messages[i]["role"].clone());
        message.insert("content".into(), words.to_string().into());
        let mut messages = self.plain.clone();
        messages[i] = context::message(&message);
        // What follows may have to follow a tool call.
        let rendered = self.reworded(&messages).or_else(|_| self.reworded(&messages[..=i])).ok()?;
        let at = rendered.find(words)?;
        self.text.starts_with(&rendered[..at]).then_some(at)
    }

    /// True where what follows byte `end` also follows other words in the place of the content of message `i`: nothing
    /// of the content stands behind it.
    fn ends_at(&self, i: usize, end: usize) -> bool {
        let other = || {
            let words = mark(self.plane, 0)?;
            let mut message = self.messages[i].as_object()?.clone();
            message.insert("content".into(), words.to_string().into());
            let mut messages = self.plain.clone();
            messages[i] = context::message(&message);
            let rendered = self.reworded(&messages).ok()?;
            let at = rendered.rfind(words)?;
            Some(rendered[at + words.len_utf8()..] == self.text[end..])
        };
        other().unwrap_or(false)
    }

    /// Where the answer of message `i` starts: after its generation prompt. `own`: its first mark. None where there is
    /// nothing to learn.
    ///
    /// Each way is a proof: the bytes up to the start are those that the model is given (from the start of the text, or
    /// from the last mark before it), or those before any other answer, or the mark before the answer's own words.
    fn start(
        &self,
        i: usize,
        cursor: usize,
        own: Option<Own>,
        only_close: bool,
        marks: Option<&Marks>,
        stops: &Stops,
    ) -> Result<Option<usize>> {
        let upper = own.map_or(self.text.len(), |own| own.at);
        let inside = |at: &usize| (cursor..=upper).contains(at);
        let with = self.prefix(i, true).unwrap_or_default();
        let whole = (!with.is_empty() && self.text.starts_with(&with)).then_some(with.len());
        if let Some(at) = whole.or_else(|| self.local_start(i, marks, cursor)).filter(inside) {
            if own.is_some_and(|own| own.content && !only_close && at == own.outer) {
                return Ok(Some(at));
            }
            if with != self.prefix(i, false).unwrap_or_default() {
                return Ok(Some(at));
            }
            // A template without a generation prompt: what stands before the content may be a header.
            match own {
                Some(own) if own.content && !self.text[at..own.outer.max(at)].trim().is_empty() => {
                    return Ok(Some(own.outer));
                }
                // Only where the content ends is known: a header before it cannot be told from it.
                Some(own) if only_close && !self.text[at..own.at].trim().is_empty() => {
                    return Err(
                        self.error(format!("message {i}: the template changes where its content starts"))
                    );
                }
                Some(_) => return Ok(Some(at)),
                None => {
                    let rest = self.text[at..].trim_start();
                    if stops.all.iter().any(|s| !s.is_empty() && rest.starts_with(s.as_str())) {
                        return Ok(Some(at));
                    }
                }
            }
        }
        match own {
            // What the prompt says beyond the header (a thought that it opens) is not in the history.
            Some(own) if own.content && !only_close => return Ok(Some(own.outer)),
            None if Self::speaks(&self.messages[i]) => {}
            _ => {
                if let Some(at) = self.other_start(i).filter(inside) {
                    return Ok(Some(at));
                }
                if own.is_none() {
                    return Ok(None);
                }
            }
        }
        let message = format!(
            "message {i}: its place cannot be proved. The template changes it, and the rendering of what precedes it \
             with the generation prompt is no prefix of the whole ({})",
            difference(&with, &self.text)
        );
        Err(self.error(message))
    }

    /// The responses of a template without `{% generation %}`.
    fn turns(&mut self, marks: Option<&Marks>, stops: &Stops) -> Result<Vec<Turn>> {
        let mut turns = Vec::new();
        let mut cursor = 0;
        for i in 0..self.messages.len() {
            if !is_assistant(&self.messages[i]) {
                // The next answer stands behind what was asked.
                if let Some(m) = marks {
                    let last = m.of(i).filter(|f| f.close).map(|f| f.outer).filter(|at| *at >= cursor).max();
                    // A system message may be rendered later than its place (Mistral), so only others count.
                    if role(&self.messages[i]) != "system" {
                        cursor = cursor.max(last.unwrap_or(0));
                    }
                }
                continue;
            }
            let mut own: Vec<Fall> =
                marks.map_or(Vec::new(), |m| m.of(i).filter(|f| f.at >= cursor).copied().collect());
            // A field that is rendered again later (a call's name with its result) is the answer's only once.
            let mut seen = std::collections::HashSet::new();
            own.retain(|f| seen.insert((f.field, f.close)));
            if marks.is_some() && own.is_empty() && Self::speaks(&self.messages[i]) {
                return Err(self.error(format!("message {i}: the template does not render its content")));
            }
            // Where only its end was proved, its start is sought before that.
            let only_close = own.first().is_some_and(|f| f.close);
            let first = own.first().map(|f| Own {
                at: f.at,
                outer: if f.close { f.at } else { f.outer.max(cursor) },
                content: !f.close && marks.is_some_and(|m| !m.fields[f.field].tool),
            });
            let Some(start) = self.start(i, cursor, first, only_close, marks, stops)? else { continue };
            if only_close && first.is_some_and(|f| f.at == start) {
                return Err(self.error(format!("message {i}: the template changes where its content starts")));
            }
            let inner = own.last().map_or(start, |f| f.at).max(start);
            let content_end = own.last().map_or(start, |f| if f.close { f.outer } else { f.at }).max(start);
            if only_close && !self.ends_at(i, content_end) {
                return Err(self.error(format!("message {i}: the template takes its content apart")));
            }
            let after = marks.and_then(|m| {
                let later = m.falls.iter().filter(|f| m.fields[f.field].message > i && f.at > inner);
                later.map(|f| f.at).min()
            });
            // Text that no mark vouches for may type a stop token itself; then the first one proves nothing.
            let own_vouched =
                marks.is_some_and(|m| m.which.tools || self.messages[i]["tool_calls"].is_null());
            let typed_behind = !marks.is_some_and(|m| m.which.prompts) && self.typed_behind(i, stops);
            let vouched = own_vouched && !typed_behind;
            let whole = if vouched { None } else { self.prefix(i + 1, false) };
            let whole =
                whole.filter(|w| self.text.starts_with(w.as_str()) && w.len() >= start).map(|w| w.len());
            if !own_vouched {
                let said = self.messages[i].to_string();
                if stops.all.iter().any(|s| !s.is_empty() && said.contains(s.as_str())) {
                    let message = format!("message {i} types a stop token, and its end cannot be proved");
                    return Err(self.error(message));
                }
            }
            let last = i + 1 == self.messages.len();
            if !vouched && whole.is_none() && !last && (typed_behind || after.is_none()) {
                let shorter = self.prefix(i + 1, false).unwrap_or_default();
                let message = format!(
                    "message {i}: its end cannot be proved; the rendering up to it is no prefix of the whole ({})",
                    difference(&shorter, &self.text)
                );
                return Err(self.error(message));
            }
            let upper = after.unwrap_or(self.text.len());
            let upper = whole.filter(|_| typed_behind).map_or(upper, |whole| whole.min(upper));
            let stop = self.first_stop(content_end.min(upper)..upper, stops);
            // A call ends in what no mark stands in: brackets of the template's, numbers. Where no stop token follows,
            // the rendering up to this message says where that is.
            let calls = whole.is_none() && stop.is_none() && !self.messages[i]["tool_calls"].is_null();
            let whole = match calls.then(|| self.prefix(i + 1, false)).flatten() {
                Some(up_to) if self.text.starts_with(up_to.as_str()) => {
                    Some(up_to.trim_end().len().max(content_end))
                }
                _ => whole,
            };
            let end = stop.as_ref().map_or_else(|| whole.unwrap_or(content_end).min(upper), |s| s.start);
            cursor = stop.as_ref().map_or(end, |s| s.end);
            turns.push(Turn { message: i, start, end, stop });
        }
        Ok(turns)
    }

    /// The responses of a template that marks them.
    fn generation(&mut self, marks: Option<&Marks>, stops: &Stops) -> Result<Vec<Turn>> {
        let pair = (mark(self.plane, 0), mark(self.plane, 1));
        let (Some(open), Some(close)) = pair else { return Err(self.error("no marks")) };
        let Chats { template, variables, .. } = self.chats;
        let marked = template
            .render_with(variables, self.c, &self.plain, false, Some((open, close)))
            .map_err(|e| self.error(e.to_string()))?;
        let (stripped, falls) = strip(&marked, self.plane);
        let paired = falls.chunks(2).all(|p| matches!(p, [(_, 0), (_, 1)]));
        if stripped != self.text || !paired {
            let what = difference(&stripped, &self.text);
            return Err(self.error(format!("the template alters its own {{% generation %}} blocks ({what})")));
        }
        self.evidence.borrow_mut().marked = Some((marked, (open, close)));
        let blocks: Vec<Range<usize>> = falls.chunks(2).map(|p| p[0].0..p[1].0).collect();
        let said: Vec<usize> =
            (0..self.messages.len()).filter(|&i| is_assistant(&self.messages[i])).collect();
        let mut turns = Vec::new();
        for (k, block) in blocks.iter().enumerate() {
            let inside = marks.and_then(|m| {
                m.falls
                    .iter()
                    .find(|f| block.contains(&f.at) || f.at == block.end)
                    .map(|f| m.fields[f.field].message)
            });
            let by_count = (blocks.len() == said.len()).then(|| said[k]);
            let inside = inside.filter(|i| said.contains(i));
            let message = match by_count.or(inside) {
                Some(message) => message,
                None => self.whose(&said, turns.last().map(|t: &Turn| t.message))?,
            };
            // The block's own stop token is the last in it: an earlier one was typed.
            let text = &self.text[block.clone()];
            let found = stops.all.iter().filter(|s| !s.is_empty());
            let found = found.filter_map(|s| text.rfind(s.as_str()).map(|at| (at + s.len(), s.len()))).max();
            let content_end = marks.and_then(|m| {
                let own = m.falls.iter().filter(|f| f.close && f.at <= block.end && f.at >= block.start);
                own.map(|f| f.at - block.start).max()
            });
            let found = found.filter(|(end, len)| content_end.is_none_or(|c| end - len >= c));
            let stop = found.map(|(end, len)| block.start + end - len..block.start + end);
            if stop.as_ref().is_some_and(|s| s.end < block.end) {
                let turn = message;
                let message = format!(
                    "message {message}: its {{% generation %}} block covers text after the stop token"
                );
                self.find(turn, Code::M007, message);
            }
            turns.push(Turn {
                message,
                start: block.start,
                end: stop.as_ref().map_or(block.end, |s| s.start),
                stop: stop.clone(),
            });
            if let Some(stop) = stop.filter(|s| s.end < block.end) {
                turns.push(Turn { message, start: stop.end, end: block.end, stop: None });
            }
        }
        if let Some(turn) = turns.first()
            && self.covers_header(turn, marks)
        {
            let i = turn.message;
            let message = format!("message {i}: its {{% generation %}} block covers the role header");
            self.find(i, Code::M007, message);
        }
        Ok(turns)
    }

    /// The message of a block with nothing of any message in it, after the block of message `last`: that one again (an
    /// EOS of its own) or the next answer. Which of them matters only where they weigh differently.
    fn whose(&self, said: &[usize], last: Option<usize>) -> Result<usize> {
        let next = said.iter().copied().find(|i| last.is_none_or(|last| *i > last));
        match (last, next) {
            (Some(last), Some(next)) if self.weight(last) != self.weight(next) => {
                let message = format!(
                    "nothing says whether a {{% generation %}} block is of message {last} or of message {next}, and these \
                     have different weights"
                );
                Err(self.error(message))
            }
            _ => last.or(next).ok_or_else(|| self.error("a {% generation %} block without an answer")),
        }
    }

    /// True where a response begins with what the model is given, before anything of its own.
    fn covers_header(&self, turn: &Turn, marks: Option<&Marks>) -> bool {
        let Some(with) = self.prefix(turn.message, true) else { return false };
        let own = marks.and_then(|m| m.of(turn.message).map(|f| f.outer).find(|at| *at >= turn.start));
        let limit = own.unwrap_or(turn.end).min(turn.end);
        let shared = with.bytes().zip(self.text.bytes()).take_while(|(a, b)| a == b).count();
        shared.min(limit) > turn.start
    }

    fn section(&self, i: usize) -> Section {
        let last_user = self.messages.iter().rposition(|m| role(m) == "user");
        match role(&self.messages[i]) {
            "system" | "developer" => Section::System,
            "tool" | "function" | "ipython" | "observation" => Section::Tool,
            "user" if Some(i) == last_user => Section::Task,
            "user" => Section::Context,
            _ => Section::Other,
        }
    }

    /// The loss weight of an answer; None where it is prompt.
    fn weight(&self, i: usize) -> Option<f32> {
        let own = self.c.weights.get(i).copied().flatten();
        let last = self.messages.iter().rposition(is_assistant);
        (i >= self.c.prompt_messages).then(|| match self.policy.supervise {
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

    /// The prompt's fields: by their marks, else what lies between two responses.
    fn prompts(&self, turns: &[Turn], marks: Option<&Marks>) -> Vec<(Range<usize>, usize)> {
        let mut spans = Vec::new();
        if let Some(m) = marks.filter(|m| m.which.prompts) {
            for pair in m.falls.windows(2) {
                let [open, close] = pair else { continue };
                let message = m.fields[open.field].message;
                let whole = open.field == close.field && !open.close && close.close;
                if whole && !is_assistant(&self.messages[message]) {
                    spans.push((open.outer..close.outer, message));
                }
            }
            return spans;
        }
        let mut cursor = 0;
        for turn in turns {
            let before = (0..turn.message).rev().find(|&i| !is_assistant(&self.messages[i]));
            if let Some(message) = before.filter(|_| turn.start > cursor) {
                let region = &self.text[cursor..turn.start];
                let header = self.generation_prompt(turn.message).filter(|h| region.ends_with(h.as_str()));
                spans.push((cursor..turn.start - header.map_or(0, |h| h.len()), message));
            }
            cursor = turn.stop.as_ref().map_or(turn.end, |s| s.end);
        }
        spans
    }

    fn tile(mut self, turns: Vec<Turn>, marks: Option<&Marks>) -> Result<Chat> {
        let mut wanted: Vec<Span> = Vec::new();
        let mut altered: Vec<usize> = Vec::new();
        for turn in &turns {
            let index = turn.message.min(u16::MAX as usize) as u16;
            let weight = self.weight(turn.message);
            let (response, stop_origin, weight) = match weight {
                Some(weight) => (Origin::Response { turn: index }, Origin::EndOfTurn { turn: index }, weight),
                None => {
                    let section = Section::Context;
                    let weight = self.policy.section_weight(section);
                    (Origin::Prompt { turn: index, section }, Origin::Scaffold, weight)
                }
            };
            wanted.push(Span { range: turn.start..turn.end, origin: response, weight });
            if let Some(stop) = &turn.stop {
                let weight = if stop_origin == Origin::Scaffold { 0.0 } else { weight };
                wanted.push(Span { range: stop.clone(), origin: stop_origin, weight });
            }
        }
        for (i, message) in self.messages.iter().enumerate().filter(|(_, m)| is_assistant(m)) {
            let said = message["content"].as_str().unwrap_or_default();
            let own = turns.iter().filter(|t| t.message == i);
            let mut own = own.map(|t| &self.text[t.start..t.stop.as_ref().map_or(t.end, |s| s.end)]);
            if !said.is_empty() && !own.any(|text| text.contains(said)) {
                altered.push(i);
            }
        }
        altered.retain(|&i| self.weight(i).is_some_and(|w| w > 0.0));
        if let Some(&first) = altered.first() {
            let list: Vec<String> = altered.iter().map(usize::to_string).collect();
            let message =
                format!("the template altered the content of assistant message {}", list.join(", "));
            self.find(first, Code::C001, message);
        }
        for (range, message) in self.prompts(&turns, marks) {
            let section = self.section(message);
            let turn = message.min(u16::MAX as usize) as u16;
            let origin = Origin::Prompt { turn, section };
            wanted.push(Span { range, origin, weight: self.policy.section_weight(section) });
        }
        // Responses were pushed first: where a prompt's white space meets one, the response keeps it.
        wanted.sort_by_key(|s| (s.range.start, s.range.end));
        let mut spans: Vec<Span> = Vec::with_capacity(2 * wanted.len() + 1);
        let mut cursor = 0;
        for mut span in wanted {
            if span.range.start < cursor {
                if matches!(span.origin, Origin::Response { .. } | Origin::EndOfTurn { .. }) {
                    return Err(
                        self.error(format!("two messages claim byte {} of the rendering", span.range.start))
                    );
                }
                let kept = cursor.min(span.range.end);
                // The white space around a prompt's words may be an answer's; the words are nobody else's.
                let both = span.range.start..kept;
                let learned = spans.iter().rev().take_while(|s: &&Span| s.range.end > both.start).any(|s| {
                    matches!(s.origin, Origin::Response { .. } | Origin::EndOfTurn { .. })
                        && !self.text[s.range.start.max(both.start)..s.range.end.min(both.end)]
                            .trim()
                            .is_empty()
                });
                if learned {
                    return Err(self.error(format!(
                        "an answer and a prompt claim byte {} of the rendering",
                        both.start
                    )));
                }
                span.range.start = kept;
                if span.range.start < cursor {
                    continue;
                }
            }
            if span.range.start > cursor {
                spans.push(Span { range: cursor..span.range.start, origin: Origin::Scaffold, weight: 0.0 });
            }
            cursor = span.range.end;
            spans.push(span);
        }
        if cursor < self.text.len() {
            spans.push(Span { range: cursor..self.text.len(), origin: Origin::Scaffold, weight: 0.0 });
        }
        let rendered = Rendered { id: self.id, text: self.text, spans, add_special_tokens: false };
        Ok(Chat { rendered, findings: self.findings })
    }
}

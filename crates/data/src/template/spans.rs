//! Where the responses are, by proof: `{% generation %}` blocks, else marks around the fields, else prefixes.

use super::{Chat, ChatTemplate, TemplateError, TemplateOptions, normalise, python};
use crate::chat::Conversation;
use crate::policy::{Policy, Supervise};
use crate::render::{Rendered, Span, Stops};
use crate::{Code, Error, Finding, Origin, Result, RowId, Section};
use serde_json::Value;
use std::ops::Range;

/// The help of a row whose spans cannot be proved.
const HELP: &str = "mark what the assistant says with {% generation %} .. {% endgeneration %} in the template, or \
                    give the row as prompt and completion";

/// Two private-use planes of 65,534 characters; marks come from one that the conversation does not use.
const PLANES: [u32; 2] = [0xF_0000, 0x10_0000];
const PLANE: u32 = 0xFFFD;

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
    text: String,
    /// Part of a tool call.
    tool: bool,
}

/// Where marks fell: (offset in the stripped text, field, whether it closes).
type Falls = Vec<(usize, usize, bool)>;

/// A proven set of marks.
struct Marks {
    fields: Vec<Field>,
    falls: Falls,
    which: Fields,
    /// The messages with their marks.
    messages: Vec<Value>,
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

/// A text without its marks, and where they fell.
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

impl ChatTemplate {
    /// A conversation as text with spans, by proof; a row error where there is none.
    pub fn spans(
        &self,
        id: RowId,
        c: &Conversation,
        policy: &Policy,
        stops: &Stops,
        options: &TemplateOptions,
    ) -> Result<Chat> {
        let messages = normalise(&c.messages);
        let failed = |e: TemplateError| {
            Error::row(
                id.clone(),
                format!("the chat template refuses the conversation: {e}"),
                "look at the roles, their order and the fields that the template asks for",
            )
        };
        let text = self.render_with(c, &messages, false, options, None).map_err(failed)?;
        let Some(plane) = PLANES.into_iter().find(|plane| {
            let used = |ch: char| (*plane..plane + PLANE).contains(&(ch as u32));
            let all = serde_json::to_string(&messages).unwrap_or_default();
            !text.contains(used) && !all.contains(used)
        }) else {
            let message = "the conversation uses characters of both supplementary private-use planes";
            return Err(Error::row(id, message, "remove them"));
        };
        let mut work =
            Work { template: self, c, policy, messages, options, text, plane, id, findings: Vec::new() };
        let marks = work.marks();
        let turns = if self.compiled(c).generation {
            work.generation(marks.as_ref(), stops)?
        } else {
            work.turns(marks.as_ref(), stops)?
        };
        work.tile(turns, marks.as_ref())
    }
}

struct Work<'a> {
    template: &'a ChatTemplate,
    c: &'a Conversation,
    policy: &'a Policy,
    messages: Vec<Value>,
    options: &'a TemplateOptions,
    text: String,
    plane: u32,
    id: RowId,
    findings: Vec<Finding>,
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

    fn prefix(&self, n: usize, generation: bool) -> Result<String, TemplateError> {
        self.template.render_with(self.c, &self.messages[..n], generation, self.options, None)
    }

    /// The most marks with which the stripped rendering is byte-equal to the plain one.
    fn marks(&self) -> Option<Marks> {
        ATTEMPTS.into_iter().find_map(|which| {
            let mut messages = self.messages.clone();
            let mut fields = Vec::new();
            for (i, message) in messages.iter_mut().enumerate() {
                let assistant = is_assistant(message);
                let Some(message) = message.as_object_mut() else { continue };
                if !assistant && !which.prompts {
                    continue;
                }
                for key in ["content", "reasoning_content", "thinking", "reasoning"] {
                    if let Some(value) = message.get_mut(key) {
                        self.wrap(value, i, false, which.open, &mut fields);
                    }
                }
                if which.tools && assistant {
                    for call in
                        message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten()
                    {
                        let function = match call.get("function") {
                            Some(_) => &mut call["function"],
                            None => call,
                        };
                        for key in ["name", "arguments"] {
                            if let Some(value) = function.get_mut(key) {
                                self.wrap(value, i, true, which.open, &mut fields);
                            }
                        }
                    }
                }
            }
            if fields.is_empty() {
                return None;
            }
            let marked = self.template.render_with(self.c, &messages, false, self.options, None).ok()?;
            let (stripped, falls) = strip(&marked, self.plane);
            let falls: Falls = falls.into_iter().map(|(at, n)| (at, n / 2, n % 2 == 1)).collect();
            // A field whose end comes first is no longer the field (reversed, or taken apart).
            let mut closed = std::collections::HashSet::new();
            let mut opened = std::collections::HashSet::new();
            for &(_, field, close) in &falls {
                if close {
                    closed.insert(field);
                } else if opened.insert(field) && closed.contains(&field) {
                    return None;
                }
            }
            (stripped == self.text).then_some(Marks { fields, falls, which, messages })
        })
    }

    /// Marks around each string in a value. They stand inside its white space, so that a template which trims
    /// meets what it met before; a blank string gets none, since a mark would make it true.
    fn wrap(&self, value: &mut Value, message: usize, tool: bool, opens: bool, fields: &mut Vec<Field>) {
        match value {
            Value::String(text) => {
                let core = python::strip(text, None, true, true);
                let n = fields.len();
                let (Some(open), Some(close)) = (mark(self.plane, 2 * n), mark(self.plane, 2 * n + 1)) else {
                    return;
                };
                if core.is_empty() {
                    return;
                }
                let start = text.len() - python::strip(text, None, true, false).len();
                let end = start + core.len();
                let before = if opens { open.to_string() } else { String::new() };
                let new = format!("{}{before}{core}{close}{}", &text[..start], &text[end..]);
                fields.push(Field { message, tool, text: std::mem::replace(text, new) });
            }
            Value::Array(list) => list.iter_mut().for_each(|v| self.wrap(v, message, tool, opens, fields)),
            Value::Object(map) => {
                for (key, value) in map.iter_mut() {
                    // A part's type and a call's id are no text: templates compare them.
                    if !matches!(key.as_str(), "type" | "id" | "role") {
                        self.wrap(value, message, tool, opens, fields);
                    }
                }
            }
            _ => {}
        }
    }

    /// A field's open mark moved over its leading, or its close mark over its trailing, white space, where the
    /// text has the same white space there.
    fn outer(&self, field: &Field, at: usize, close: bool) -> usize {
        let core = python::strip(&field.text, None, true, true);
        let start = field.text.len() - python::strip(&field.text, None, true, false).len();
        if close {
            let tail = &field.text[start + core.len()..];
            if self.text[at..].starts_with(tail) { at + tail.len() } else { at }
        } else {
            let head = &field.text[..start];
            if self.text[..at].ends_with(head) { at - head.len() } else { at }
        }
    }

    /// True where a message has something to say.
    fn speaks(message: &Value) -> bool {
        match &message["content"] {
            Value::String(text) => !python::strip(text, None, true, true).is_empty(),
            Value::Array(parts) => !parts.is_empty(),
            _ => false,
        }
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
        let with = self.prefix(n, true).ok()?;
        let without = self.prefix(n, false).ok()?;
        with.strip_prefix(&without).filter(|s| !s.is_empty()).map(str::to_string)
    }

    /// What the generation prompt adds after message `i - 1`'s last mark, found at the same mark in the whole.
    fn local_start(&self, i: usize, marks: Option<&Marks>, cursor: usize) -> Option<usize> {
        let marks = marks?;
        let last = |falls: &[(usize, usize, bool)]| {
            let own = falls.iter().filter(|f| f.2 && i > 0 && marks.fields[f.1].message == i - 1);
            own.map(|f| f.0).max()
        };
        let asked = last(&marks.falls).filter(|at| *at == cursor)?;
        let marked =
            self.template.render_with(self.c, &marks.messages[..i], true, self.options, None).ok()?;
        let (text, falls) = strip(&marked, self.plane);
        let falls: Falls = falls.into_iter().map(|(at, n)| (at, n / 2, n % 2 == 1)).collect();
        let tail = &text[last(&falls)?..];
        self.text[asked..].starts_with(tail).then_some(asked + tail.len())
    }

    /// Where the answer of message `i` starts: after its generation prompt. `own`: its first mark, and whether
    /// that opens its content.
    fn start(
        &self,
        i: usize,
        cursor: usize,
        own: Option<(usize, bool)>,
        only_close: bool,
        marks: Option<&Marks>,
        stops: &Stops,
    ) -> Result<Option<usize>> {
        let upper = own.map_or(self.text.len(), |own| own.0);
        let with = self.prefix(i, true).unwrap_or_default();
        let without = self.prefix(i, false).unwrap_or_default();
        let whole = (!with.is_empty() && self.text.starts_with(&with)).then_some(with.len());
        let found = whole.or_else(|| self.local_start(i, marks, cursor));
        if let Some(at) = found.filter(|at| (cursor..=upper).contains(at)) {
            if with != without {
                return Ok(Some(at));
            }
            // A template without a generation prompt: what stands before the content may be a header.
            match own {
                Some((own, true)) if !self.text[at..own].trim().is_empty() => return Ok(Some(own)),
                // Only where the content ends is known: a header before it cannot be told from it.
                Some((own, false)) if only_close && !self.text[at..own].trim().is_empty() => {
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
        // A prompt that opens a thought which the history does not have: what they share, up to a whole marker.
        if self.text.starts_with(&without) && with.starts_with(&without) && without.len() >= cursor {
            let base = without.len();
            let shared = with.bytes().zip(self.text.bytes()).take_while(|(a, b)| a == b).count().min(upper);
            let shared = self.text.floor_char_boundary(shared);
            if shared > base
                && shared < with.len()
                && let Some(at) = self.text[base..shared].rfind(['>', '\n'])
            {
                return Ok(Some(base + at + 1));
            }
        }
        // The same prompt between what is proved to be content and the answer: nobody else's text is there.
        if let (Some((own, _)), Some(prompt)) = (own, with.strip_prefix(&without).filter(|p| !p.is_empty()))
            && own >= cursor
            && let Some(at) = self.text[cursor..own].rfind(prompt)
        {
            return Ok(Some(cursor + at + prompt.len()));
        }
        if own.is_some() || !Self::speaks(&self.messages[i]) {
            return Ok(own.map(|own| own.0));
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
                    let falls = m.falls.iter().filter(|f| m.fields[f.1].message == i && f.2);
                    let last = falls.map(|f| f.0).filter(|at| *at >= cursor).max();
                    // A system message may be rendered later than its place (Mistral), so only others count.
                    if role(&self.messages[i]) != "system" {
                        cursor = cursor.max(last.unwrap_or(0));
                    }
                }
                continue;
            }
            let mut own: Vec<_> = marks.map_or(Vec::new(), |m| {
                m.falls.iter().filter(|f| m.fields[f.1].message == i && f.0 >= cursor).copied().collect()
            });
            // A field that is rendered again later (a call's name with its result) is the answer's only once.
            let mut seen = std::collections::HashSet::new();
            own.retain(|f| seen.insert((f.1, f.2)));
            let field = |n: usize| marks.map(|m| &m.fields[n]);
            let first = own.first().map(|&(at, n, close)| match (close, field(n)) {
                (false, Some(field)) => self.outer(field, at, false).max(cursor),
                // Only its end was proved: its start is sought before that.
                _ => at,
            });
            let only_close = own.first().is_some_and(|f| f.2);
            if marks.is_some() && own.is_empty() && Self::speaks(&self.messages[i]) {
                return Err(self.error(format!("message {i}: the template does not render its content")));
            }
            let content = own.first().is_some_and(|f| !f.2 && field(f.1).is_some_and(|f| !f.tool));
            let own_start = first.map(|at| (at, content));
            let Some(start) = self.start(i, cursor, own_start, only_close, marks, stops)? else { continue };
            if only_close && Some(start) == first {
                return Err(self.error(format!("message {i}: the template changes where its content starts")));
            }
            let inner = own.last().map_or(start, |f| f.0).max(start);
            let content_end = own.last().map_or(start, |&(at, n, close)| match field(n) {
                Some(field) if close => self.outer(field, at, true),
                _ => at,
            });
            let content_end = content_end.max(start);
            let after = marks.and_then(|m| {
                let later = m.falls.iter().filter(|f| m.fields[f.1].message > i && f.0 > inner);
                later.map(|f| f.0).min()
            });
            // Text that no mark vouches for may type a stop token itself; then the first one proves nothing.
            let vouched = marks.is_some_and(|m| m.which.tools || self.messages[i]["tool_calls"].is_null());
            let whole = if vouched { None } else { self.prefix(i + 1, false).ok() };
            let whole =
                whole.filter(|w| self.text.starts_with(w.as_str()) && w.len() >= start).map(|w| w.len());
            if !vouched {
                let said = self.messages[i].to_string();
                if stops.all.iter().any(|s| !s.is_empty() && said.contains(s.as_str())) {
                    let message = format!("message {i} types a stop token, and its end cannot be proved");
                    return Err(self.error(message));
                }
                if whole.is_none() && i + 1 < self.messages.len() && after.is_none() {
                    let shorter = self.prefix(i + 1, false).unwrap_or_default();
                    let message = format!(
                        "message {i}: its end cannot be proved; the rendering up to it is no prefix of the whole ({})",
                        difference(&shorter, &self.text)
                    );
                    return Err(self.error(message));
                }
            }
            let upper = after.unwrap_or(self.text.len());
            let stop = self.first_stop(content_end.min(upper)..upper, stops);
            let end = stop.as_ref().map_or_else(|| whole.unwrap_or(content_end).min(upper), |s| s.start);
            if stop.is_none() {
                let message = format!("message {i}: no stop token follows it in the rendering");
                self.find(i, Code::M002, message);
            }
            cursor = stop.as_ref().map_or(end, |s| s.end);
            turns.push(Turn { message: i, start, end, stop });
        }
        Ok(turns)
    }

    /// The responses of a template that marks them.
    fn generation(&mut self, marks: Option<&Marks>, stops: &Stops) -> Result<Vec<Turn>> {
        let pair = (mark(self.plane, 0), mark(self.plane, 1));
        let (Some(open), Some(close)) = pair else { return Err(self.error("no marks")) };
        let marked = self
            .template
            .render_with(self.c, &self.messages, false, self.options, Some((open, close)))
            .map_err(|e| self.error(e.to_string()))?;
        let (stripped, falls) = strip(&marked, self.plane);
        let paired = falls.chunks(2).all(|p| matches!(p, [(_, 0), (_, 1)]));
        if stripped != self.text || !paired {
            let what = difference(&stripped, &self.text);
            return Err(self.error(format!("the template alters its own {{% generation %}} blocks ({what})")));
        }
        let blocks: Vec<Range<usize>> = falls.chunks(2).map(|p| p[0].0..p[1].0).collect();
        let said: Vec<usize> =
            (0..self.messages.len()).filter(|&i| is_assistant(&self.messages[i])).collect();
        let mut turns = Vec::new();
        for (k, block) in blocks.iter().enumerate() {
            let inside = marks.and_then(|m| {
                m.falls
                    .iter()
                    .find(|f| block.contains(&f.0) || f.0 == block.end)
                    .map(|f| m.fields[f.1].message)
            });
            let by_count = (blocks.len() == said.len()).then(|| said[k]);
            let inside = inside.filter(|i| said.contains(i));
            let message = by_count.or(inside).or(said.get(k).copied()).unwrap_or(0);
            // The block's own stop token is the last in it: an earlier one was typed.
            let text = &self.text[block.clone()];
            let found = stops.all.iter().filter(|s| !s.is_empty());
            let found = found.filter_map(|s| text.rfind(s.as_str()).map(|at| (at + s.len(), s.len()))).max();
            let content_end = marks.and_then(|m| {
                let own = m.falls.iter().filter(|f| f.2 && f.0 <= block.end && f.0 >= block.start);
                own.map(|f| f.0 - block.start).max()
            });
            let found = found.filter(|(end, len)| content_end.is_none_or(|c| end - len >= c));
            let stop = found.map(|(end, len)| block.start + end - len..block.start + end);
            if stop.is_none() {
                self.find(
                    message,
                    Code::M002,
                    format!("message {message}: its {{% generation %}} block has no stop token"),
                );
            } else if stop.as_ref().is_some_and(|s| s.end < block.end) {
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
        if let (Some(turn), Some(&first)) = (turns.first(), said.first())
            && let Ok(with) = self.prefix(first, true)
            && self.text.starts_with(&with)
            && turn.start < with.len()
        {
            let message = format!("message {first}: its {{% generation %}} block covers the role header");
            self.find(first, Code::M007, message);
        }
        Ok(turns)
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
                let [(start, a, false), (end, b, true)] = pair else { continue };
                let field = &m.fields[*a];
                if a == b && !is_assistant(&self.messages[field.message]) {
                    let range = self.outer(field, *start, false)..self.outer(field, *end, true);
                    spans.push((range, field.message));
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
                span.range.start = cursor.min(span.range.end);
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

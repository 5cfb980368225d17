//! Marks: private characters around the strings of messages, which show where a template renders these
//! strings.

use super::python;
use crate::source::number_of;
use serde_json::Value;
use std::ops::Range;

/// Two private-use planes of 65,534 characters. Marks come from one that the conversation does not use.
pub(super) const PLANES: [u32; 2] = [0xF_0000, 0x10_0000];

pub(super) const PLANE: u32 = 0xFFFD;

/// Candidates for a placeholder of a field's white space; the first that the conversation does not contain is used.
pub(super) const SPACES: [char; 6] = ['\u{2003}', '\u{2002}', '\u{2001}', '\u{2004}', '\u{2005}', '\u{3000}'];

/// Which fields get marks. A template that inspects the first or last characters of a field may need fewer
/// marks to render unchanged.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct Fields {
    pub prompts: bool,
    pub tools: bool,
    pub open: bool,
}

pub(super) const ATTEMPTS: [Fields; 4] = [
    Fields { prompts: true, tools: true, open: true },
    Fields { prompts: false, tools: true, open: true },
    Fields { prompts: false, tools: false, open: true },
    Fields { prompts: false, tools: false, open: false },
];

/// A marked string.
pub(super) struct Field {
    pub message: usize,
    /// The white space at its start and at its end.
    pub head: String,
    pub tail: String,
    /// True if it is part of a tool call.
    pub tool: bool,
    /// True if it is reasoning.
    pub reasoning: bool,
}

/// The position of a mark in a rendering.
#[derive(Clone, Copy)]
pub(super) struct Fall {
    /// Byte in the plain rendering at which the trimmed field starts or ends.
    pub at: usize,
    /// The same for the untrimmed field, if the template renders its white space.
    pub outer: usize,
    pub field: usize,
    /// True for the closing mark.
    pub close: bool,
}

/// Marks with which the template renders the same text.
pub(super) struct Marks {
    pub fields: Vec<Field>,
    pub falls: Vec<Fall>,
    pub which: Fields,
    /// The placeholder for the white space of fields, if it can be distinguished from the template's own.
    pub space: Option<char>,
    /// The marked messages.
    pub messages: Vec<minijinja::Value>,
    /// The falls of each message.
    own: Vec<Vec<usize>>,
}

impl Marks {
    pub fn new(
        fields: Vec<Field>,
        falls: Vec<Fall>,
        which: Fields,
        space: Option<char>,
        messages: Vec<minijinja::Value>,
    ) -> Marks {
        let mut own = vec![Vec::new(); messages.len()];
        for (at, fall) in falls.iter().enumerate() {
            own[fields[fall.field].message].push(at);
        }
        Marks { fields, falls, which, space, messages, own }
    }

    /// The positions of the marks of message `i`, in order.
    pub fn of(&self, i: usize) -> impl Iterator<Item = &Fall> {
        self.own[i].iter().map(|&at| &self.falls[at])
    }

    /// The ranges of those texts of message `i`'s reasoning or content that are marked at both ends.
    pub fn spans_of(&self, i: usize, reasoning: bool) -> impl Iterator<Item = Range<usize>> {
        let own = move |f: &&Fall| {
            let field = &self.fields[f.field];
            field.reasoning == reasoning && !field.tool
        };
        let pair = |pair: &[Fall]| match pair {
            [open, close] if open.field == close.field && !open.close && close.close => {
                Some(open.at..close.at)
            }
            _ => None,
        };
        let falls: Vec<Fall> = self.of(i).filter(own).copied().collect();
        let spans: Vec<_> = falls.windows(2).filter_map(pair).collect();
        spans.into_iter()
    }
}

pub(super) fn mark(plane: u32, n: usize) -> Option<char> {
    u32::try_from(n).ok().filter(|n| *n < PLANE).and_then(|n| char::from_u32(plane + n))
}

/// Removes marks from a text; returns it with the `(byte, number)` of each mark.
pub(super) fn strip(text: &str, plane: u32) -> (String, Vec<(usize, usize)>) {
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

/// Removes the marks of fields from a text and puts their own white space back; returns it with the positions
/// of the marks.
pub(super) fn strip_fields(
    text: &str,
    plane: u32,
    fields: &[Field],
    space: Option<char>,
) -> (String, Vec<Fall>) {
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
        // A field's white space cannot be distinguished from the template's. If the text has it at this
        // place, it counts as the field's.
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

/// Marks the strings of one message.
pub(super) struct Wrap {
    pub plane: u32,
    /// The placeholder for their white space; `None` leaves white space unchanged.
    pub space: Option<char>,
    pub message: usize,
    /// True for its reasoning.
    pub reasoning: bool,
    /// True to add opening marks, too.
    pub open: bool,
    /// True to mark a thought in the text, and the text after it, separately: a template may split them.
    pub thoughts: bool,
}

/// The parts of a text with a thought: the tag at its start, the thought with the closing tag, and the rest.
fn thought(text: &str) -> Option<[&str; 3]> {
    let start = if text.starts_with("<think>") { "<think>".len() } else { 0 };
    let end = start + text[start..].find("</think>")?;
    Some([&text[..start], &text[start..end], &text[end..]])
}

impl Wrap {
    fn field(&self, head: String, tail: String, tool: bool) -> Field {
        Field { message: self.message, head, tail, tool, reasoning: self.reasoning }
    }

    /// Puts marks around a part of a marked text, inside its white space and after the tag at its start.
    fn wrap_within(&self, part: &str, new: &mut String, fields: &mut Vec<Field>) {
        let n = fields.len();
        let tag = if part.starts_with("</think>") { "</think>".len() } else { 0 };
        let core = python::core(&part[tag..]);
        let (Some(open), Some(close)) = (mark(self.plane, 2 * n), mark(self.plane, 2 * n + 1)) else {
            new.push_str(part);
            return;
        };
        if core.is_empty() {
            new.push_str(part);
            return;
        }
        let (start, end) = (tag + core.start, tag + core.end);
        new.push_str(&part[..start]);
        new.extend(self.open.then_some(open));
        new.push_str(&part[start..end]);
        new.push(close);
        new.push_str(&part[end..]);
        fields.push(self.field(String::new(), String::new(), false));
    }

    /// Puts marks around each string in a value, inside its leading and trailing white space, so that
    /// trimming has the same effect as before. A blank string gets none, since a mark would make it true.
    pub fn wrap(&self, value: &mut Value, tool: bool, fields: &mut Vec<Field>) {
        match value {
            Value::String(text) => {
                let n = fields.len();
                let (Some(open), Some(close)) = (mark(self.plane, 2 * n), mark(self.plane, 2 * n + 1)) else {
                    return;
                };
                let inner = python::core(text);
                if inner.is_empty() {
                    return;
                }
                let core = &text[inner.clone()];
                let (mut head, tail) = (text[..inner.start].to_string(), text[inner.end..].to_string());
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
                fields.push(self.field(head, tail.clone(), tool));
                match self.thoughts.then(|| thought(core)).flatten() {
                    Some([before, said, after]) => {
                        new.push_str(before);
                        for part in [said, after] {
                            self.wrap_within(part, &mut new, fields);
                        }
                    }
                    None => new.push_str(core),
                }
                new.push(close);
                white(&mut new, &tail);
                *text = new;
            }
            Value::Array(list) => list.iter_mut().for_each(|v| self.wrap(v, tool, fields)),
            Value::Object(map) if number_of(map).is_none() => {
                for (key, value) in map.iter_mut() {
                    // The type of a part and the id of a call are not text: templates compare them.
                    if !matches!(key.as_str(), "type" | "id" | "role") {
                        self.wrap(value, tool, fields);
                    }
                }
            }
            _ => {}
        }
    }
}

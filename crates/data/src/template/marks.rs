//! Marks around the strings of messages: private characters that show where a template renders them.

use super::python;
use serde_json::Value;

/// Two private-use planes of 65,534 characters; marks come from one that the conversation does not use.
pub(super) const PLANES: [u32; 2] = [0xF_0000, 0x10_0000];

pub(super) const PLANE: u32 = 0xFFFD;

/// White space of which some stands for that of the fields; the first that the conversation does not use.
pub(super) const SPACES: [char; 6] = ['\u{2003}', '\u{2002}', '\u{2001}', '\u{2004}', '\u{2005}', '\u{3000}'];

/// Which fields get marks. A template that looks at a field's first or last characters may survive fewer.
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

/// One marked string.
pub(super) struct Field {
    pub message: usize,
    /// The white space before and after its words.
    pub head: String,
    pub tail: String,
    /// Part of a tool call.
    pub tool: bool,
}

/// Where a mark fell.
#[derive(Clone, Copy)]
pub(super) struct Fall {
    /// The byte of the plain rendering: where the field's words start or end.
    pub at: usize,
    /// The same with the white space around the words, where the template renders it.
    pub outer: usize,
    pub field: usize,
    /// True for the mark after the words.
    pub close: bool,
}

/// A proven set of marks.
pub(super) struct Marks {
    pub fields: Vec<Field>,
    pub falls: Vec<Fall>,
    pub which: Fields,
    /// What stands for the fields' white space, where it is told apart from the template's.
    pub space: Option<char>,
    /// The messages with their marks.
    pub messages: Vec<minijinja::Value>,
}

impl Marks {
    /// The falls of message `i`'s fields, in order of place.
    pub fn of(&self, i: usize) -> impl Iterator<Item = &Fall> {
        self.falls.iter().filter(move |f| self.fields[f.field].message == i)
    }
}

pub(super) fn mark(plane: u32, n: usize) -> Option<char> {
    u32::try_from(n).ok().filter(|n| *n < PLANE).and_then(|n| char::from_u32(plane + n))
}

/// A text without its marks, and where they fell: (byte, number of the mark).
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

/// A text without the marks of fields, with their own white space in its place, and where the marks fell.
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

/// How the strings of one message are marked.
pub(super) struct Wrap {
    pub plane: u32,
    /// What stands for their white space; without it that stays as it is.
    pub space: Option<char>,
    pub message: usize,
    /// True where they get an opening mark, too.
    pub open: bool,
}

impl Wrap {
    /// Marks around the words of each string in a value. They stand inside its white space, so that a template which
    /// trims meets what it met before; a blank string gets none, since a mark would make it true.
    pub fn wrap(&self, value: &mut Value, tool: bool, fields: &mut Vec<Field>) {
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

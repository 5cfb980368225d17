//! Conversations of one shape are rendered alike: what was proved of the shape is applied to each of them.
//!
//! A *shape* is everything about a conversation but the words in its strings: the roles, the keys, which strings are
//! blank, which begin or end in white space, the weights. From a shape a specimen is made, with one private character
//! for each string. What [`spans::prove`] finds for the specimen is the shape's *plan*: literal pieces and references
//! to strings, and the spans over them.
//!
//! A row is given its plan's spans where its own rendering is, byte for byte, the plan's pieces with the row's
//! strings in their places: the same equality that the marks of [`spans`] have to meet. Any other row is proved by
//! itself. A plan is made from the shape and not from a row, so no row's outcome depends on another's.

use super::{Chats, python, spans};
use crate::chat::Conversation;
use crate::{Finding, Origin, RowId, Span};
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

/// Shapes that are remembered. When there are more all are forgotten, which costs time and changes nothing.
const SHAPES: usize = 1024;

/// Longest blank string that is part of a shape, in bytes.
const BLANK: usize = 16;

/// Messages in the longest conversation that is given a shape.
const MESSAGES: usize = 1024;

/// Stands for white space at either end of a string. Whoever trims, trims it.
const SPACE: char = '\u{2003}';

/// The specimen's strings: characters of the last private-use plane.
const FIRST: u32 = 0x10_0000;

/// The plans of the shapes met so far; none where there is no proof for the specimen.
#[derive(Debug, Default)]
pub(super) struct Plans(RwLock<HashMap<Vec<u8>, Option<Arc<Plan>>>>);

/// A string that the plan's pieces refer to: white space, words, white space.
struct Field<'a> {
    text: &'a str,
    /// The words, in `text`.
    core: Range<usize>,
}

impl Field<'_> {
    fn of(text: &str) -> Field<'_> {
        let start = text.len() - python::strip(text, None, true, false).len();
        let core = start..start + python::strip(text, None, true, true).len();
        Field { text, core }
    }

    fn blank(&self) -> bool {
        self.core.is_empty()
    }
}

/// A part of a rendering.
#[derive(Debug)]
enum Piece {
    /// Text of the template, as a range of the specimen's rendering.
    Literal(Range<usize>),
    /// The white space before a field's words.
    Head(usize),
    /// A field's words.
    Core(usize),
    /// The white space after them.
    Tail(usize),
}

/// A place in a rendering: bytes into a piece.
type Place = (usize, usize);

/// How a shape is rendered.
#[derive(Debug)]
pub(super) struct Plan {
    /// The specimen's rendering.
    text: String,
    pieces: Vec<Piece>,
    spans: Vec<(Range<Place>, Origin, f32)>,
    findings: Vec<Finding>,
}

/// The strings of a message that templates print; what its role is decides what they do.
fn texts(message: &Map<String, Value>) -> impl Iterator<Item = (&String, &String)> {
    let texts = message.iter().filter(|(key, _)| *key != "role");
    texts.filter_map(|(key, value)| match value {
        Value::String(text) => Some((key, text)),
        _ => None,
    })
}

/// The strings with words in them, in order.
fn fields(c: &Conversation) -> impl Iterator<Item = Field<'_>> {
    let all = c.messages.iter().flat_map(|m| texts(m).map(|(_, text)| Field::of(text)));
    all.filter(|field| !field.blank())
}

/// A conversation's shape as bytes: two have the same exactly where their shapes are the same. None for those that
/// have none: with tools, calls, or other values than strings in their messages.
fn key(c: &Conversation) -> Option<Vec<u8>> {
    if c.tools.is_some() || c.messages.len() > MESSAGES {
        return None;
    }
    let mut key = Vec::with_capacity(32 * c.messages.len() + 16);
    // Lengths first: no two lists of strings make the same bytes.
    let push = |key: &mut Vec<u8>, text: &str| {
        key.extend((text.len() as u32).to_le_bytes());
        key.extend(text.as_bytes());
    };
    key.extend((c.prompt_messages as u64).to_le_bytes());
    key.extend((c.kwargs.len() as u64).to_le_bytes());
    for (name, value) in &c.kwargs {
        push(&mut key, name);
        push(&mut key, &value.to_string());
    }
    for (i, message) in c.messages.iter().enumerate() {
        let weight = c.weights.get(i).copied().flatten().map(f32::to_bits);
        key.push(u8::from(weight.is_some()));
        key.extend(weight.unwrap_or_default().to_le_bytes());
        key.extend((message.len() as u32).to_le_bytes());
        for (name, value) in message {
            let Value::String(text) = value else { return None };
            push(&mut key, name);
            let field = Field::of(text);
            match (name == "role", field.blank()) {
                (true, _) => push(&mut key, text),
                (false, true) if text.len() > BLANK => return None,
                (false, true) => {
                    key.push(0);
                    push(&mut key, text);
                }
                (false, false) => {
                    let (head, tail) = (field.core.start > 0, field.core.end < text.len());
                    key.push(1 + u8::from(head) + 2 * u8::from(tail));
                }
            }
        }
    }
    Some(key)
}

/// The conversation that stands for a shape.
fn specimen(c: &Conversation) -> Option<Conversation> {
    let mut c = c.clone();
    let mut n = 0;
    for message in &mut c.messages {
        for (key, value) in message.iter_mut() {
            let Value::String(text) = value else { return None };
            let field = Field::of(text);
            if key == "role" || field.blank() {
                continue;
            }
            let mut new = String::new();
            new.extend((field.core.start > 0).then_some(SPACE));
            new.push(char::from_u32(FIRST + n)?);
            new.extend((field.core.end < text.len()).then_some(SPACE));
            *text = new;
            n += 1;
        }
    }
    Some(c)
}

impl Chats<'_> {
    /// The plan of a conversation's shape, where it has a shape and the shape a proof.
    pub(super) fn plan(&self, c: &Conversation) -> Option<Arc<Plan>> {
        let key = key(c)?;
        let known = self.plans.0.read().unwrap_or_else(PoisonError::into_inner).get(&key).cloned();
        known.unwrap_or_else(|| {
            let plan = self.learn(c).map(Arc::new);
            let mut plans = self.plans.0.write().unwrap_or_else(PoisonError::into_inner);
            if plans.len() >= SHAPES {
                plans.clear();
            }
            plans.insert(key, plan.clone());
            plan
        })
    }

    /// The plan of a conversation's shape, from its specimen.
    fn learn(&self, c: &Conversation) -> Option<Plan> {
        let c = specimen(c)?;
        // A specimen is no row; its errors are nobody's.
        let id = RowId { file: Arc::from(Path::new("")), row: 0, line: None, in_file: 0 };
        let (messages, text) = self.plain(&id, &c).ok()?;
        let chat = spans::prove(self, id, &c, messages, text).ok()?;
        Plan::new(chat.rendered.text, &chat.rendered.spans, chat.findings)
    }
}

impl Plan {
    /// The pieces of a specimen's rendering, with its spans laid over them.
    fn new(text: String, spans: &[Span], findings: Vec<Finding>) -> Option<Plan> {
        let mut pieces = Vec::new();
        // Where each piece starts.
        let mut starts = Vec::new();
        let mut literal = 0;
        let mut push = |range: Range<usize>, piece: Option<Piece>| {
            if literal < range.start {
                starts.push(literal);
                pieces.push(Piece::Literal(literal..range.start));
            }
            if let Some(piece) = piece {
                starts.push(range.start);
                pieces.push(piece);
            }
            literal = range.end;
        };
        let mut spaces = text.matches(SPACE).count();
        for (at, c) in text.char_indices() {
            let Some(n) = (c as u32).checked_sub(FIRST) else { continue };
            let n = n as usize;
            let (end, wide) = (at + c.len_utf8(), SPACE.len_utf8());
            if text[..at].ends_with(SPACE) {
                push(at - wide..at, Some(Piece::Head(n)));
                spaces = spaces.checked_sub(1)?;
            }
            push(at..end, Some(Piece::Core(n)));
            if text[end..].starts_with(SPACE) {
                push(end..end + wide, Some(Piece::Tail(n)));
                spaces = spaces.checked_sub(1)?;
            }
        }
        push(text.len()..text.len(), None);
        // Such a space of the template's own could be anybody's.
        if spaces > 0 {
            return None;
        }
        let place = |at: usize| match starts.partition_point(|start| *start <= at) {
            0 => (0, 0),
            n if at == text.len() => (n, 0),
            n => (n - 1, at - starts[n - 1]),
        };
        let spans = spans.iter().map(|s| (place(s.range.start)..place(s.range.end), s.origin, s.weight));
        let spans: Vec<_> = spans.collect();
        let whole = |place: &Place| place.1 == 0 || matches!(pieces[place.0], Piece::Literal(_));
        if !spans.iter().all(|(range, ..)| whole(&range.start) && whole(&range.end)) {
            return None;
        }
        Some(Plan { text, pieces, spans, findings })
    }

    /// The spans and findings of a conversation of this shape, if `text`, its rendering, is made of these pieces.
    pub fn apply(&self, id: &RowId, c: &Conversation, text: &str) -> Option<(Vec<Span>, Vec<Finding>)> {
        let fields: Vec<Field<'_>> = fields(c).collect();
        let mut starts = Vec::with_capacity(self.pieces.len() + 1);
        let mut cursor = 0;
        for piece in &self.pieces {
            let field = |n: usize| fields.get(n);
            let piece = match piece {
                Piece::Literal(range) => &self.text[range.clone()],
                Piece::Head(n) => field(*n).map(|f| &f.text[..f.core.start])?,
                Piece::Core(n) => field(*n).map(|f| &f.text[f.core.clone()])?,
                Piece::Tail(n) => field(*n).map(|f| &f.text[f.core.end..])?,
            };
            starts.push(cursor);
            let same = text.as_bytes().get(cursor..cursor + piece.len()) == Some(piece.as_bytes());
            cursor = same.then_some(cursor + piece.len())?;
        }
        starts.push(cursor);
        if cursor != text.len() {
            return None;
        }
        let place = |(piece, offset): Place| starts[piece] + offset;
        let spans = self.spans.iter().map(|(range, origin, weight)| Span {
            range: place(range.start)..place(range.end),
            origin: *origin,
            weight: *weight,
        });
        let findings = self.findings.iter().map(|f| Finding { row: id.row, ..f.clone() });
        Some((spans.collect(), findings.collect()))
    }
}

//! Conversations of one shape are rendered alike: what was proved of the shape is applied to each of them.
//!
//! A *shape* is everything about a conversation but the words in its strings: the roles, the keys, which strings are
//! blank, which begin or end in white space, the weights. From a shape a specimen is made, with one private character
//! for each string. What [`spans::prove`] finds for the specimen is the shape's *plan*: literal pieces and references
//! to strings, and the spans over them.
//!
//! A row is given its plan's spans where each rendering that the specimen's proof rests on is, made for the row, byte
//! for byte the specimen's with the row's strings in their places: the whole; the one with marks around the
//! `{% generation %}` blocks; and the messages before each answer with the generation prompt, and without it where
//! the proof looked at that. A template that cannot look at texts ([`super::blind`]) renders them all alike; of it
//! only the whole is asked for. The marks around the fields are not rendered again: the row's strings in the pieces'
//! places are the same equality. Any other row is proved by itself. A plan is made from the shape and not from a row,
//! so no row's outcome depends on another's.
//!
//! So a row of a known shape takes one rendering under a blind template (7 µs for six messages of ChatML or Llama 3),
//! and else one more for each answer, of what precedes it (42 µs for six messages of Qwen3, where the whole alone
//! takes 14), or for its blocks (20 µs).

use super::proof::{Chat, Evidence, Setup};
use super::python;
use super::spans::prove_with_evidence;
use crate::example::Conversation;
use crate::render::{Rendered, Span};
use crate::{Finding, Origin, RowId};
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

/// Longest text that a plan keeps of prompts that are no part of the whole, in bytes.
const APART: usize = 64 << 10;

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

/// A rendering of the specimen, taken to pieces.
#[derive(Debug)]
struct Pieces {
    text: String,
    pieces: Vec<Piece>,
    /// The byte of `text` at which each piece starts.
    starts: Vec<usize>,
}

/// A place in a rendering: bytes into a piece.
type Place = (usize, usize);

/// A rendering of a shape's first messages, as the specimen's proof met it.
#[derive(Debug)]
struct Prefix {
    messages: usize,
    generation: bool,
    /// How many pieces of the whole it begins with, and what follows these; none where the template refuses the
    /// messages.
    text: Option<(usize, Pieces)>,
}

/// How a shape is rendered.
#[derive(Debug)]
pub(super) struct Plan {
    whole: Pieces,
    /// The rendering with marks around the `{% generation %}` blocks, and the marks.
    marked: Option<(Pieces, (char, char))>,
    prefixes: Vec<Prefix>,
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
            // Calls that are no list are nobody's.
            if name == "tool_calls" {
                return None;
            }
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

impl Plans {
    /// The plan of a conversation's shape, where it has a shape and the shape a proof.
    pub fn get(&self, setup: &Setup, c: &Conversation) -> Option<Arc<Plan>> {
        let key = key(c)?;
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner).get(&key).cloned();
        known.unwrap_or_else(|| {
            let plan = learn(setup, c).map(Arc::new);
            let mut plans = self.0.write().unwrap_or_else(PoisonError::into_inner);
            if plans.len() >= SHAPES {
                plans.clear();
            }
            plans.insert(key, plan.clone());
            plan
        })
    }
}

/// The plan of a conversation's shape, from its specimen.
fn learn(setup: &Setup, c: &Conversation) -> Option<Plan> {
    let c = specimen(c)?;
    // A specimen is no row; its errors are nobody's.
    let id = RowId { file: Arc::from(Path::new("")), row: 0, line: None, in_file: 0 };
    let (messages, text) = setup.plain(&id, &c).ok()?;
    let (chat, evidence) = prove_with_evidence(setup, id, &c, messages, text).ok()?;
    // What cannot look at texts renders all of them as it renders the specimen's.
    let blind = setup.template.compiled(&c).blind;
    Plan::new(chat, if blind { Evidence::default() } else { evidence })
}

impl Pieces {
    /// The pieces of a specimen's rendering. None where white space in it could be the template's or a field's.
    fn new(text: String) -> Option<Pieces> {
        let mut pieces = Vec::new();
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
        (spaces == 0).then_some(Pieces { text, pieces, starts })
    }

    /// How many of the first pieces another rendering of the specimen begins with, ending between two fields.
    fn shared(&self, other: &str) -> usize {
        let common = self.text.bytes().zip(other.bytes()).take_while(|(a, b)| a == b).count();
        let ends = self.starts.iter().skip(1).copied().chain([self.text.len()]);
        let mut n = ends.take_while(|end| *end <= common).count();
        while n > 0
            && (matches!(self.pieces[n - 1], Piece::Head(_))
                || matches!(self.pieces.get(n), Some(Piece::Tail(_))))
        {
            n -= 1;
        }
        n
    }

    /// The pieces with a row's strings in their places. None where the row has no such string.
    fn with<'a>(&'a self, fields: &'a [Field<'a>]) -> impl Iterator<Item = Option<&'a str>> {
        self.pieces.iter().map(move |piece| match piece {
            Piece::Literal(range) => Some(&self.text[range.clone()]),
            Piece::Head(n) => fields.get(*n).map(|f| &f.text[..f.core.start]),
            Piece::Core(n) => fields.get(*n).map(|f| &f.text[f.core.clone()]),
            Piece::Tail(n) => fields.get(*n).map(|f| &f.text[f.core.end..]),
        })
    }

    /// Where each piece starts in a row's rendering, and where the last one ends, if these pieces are what it is
    /// made of.
    fn places(&self, fields: &[Field<'_>], text: &str) -> Option<Vec<usize>> {
        let mut starts = Vec::with_capacity(self.pieces.len() + 1);
        let mut rest = text;
        for piece in self.with(fields) {
            starts.push(text.len() - rest.len());
            rest = rest.strip_prefix(piece?)?;
        }
        starts.push(text.len());
        rest.is_empty().then_some(starts)
    }
}

impl Plan {
    /// What was proved of a specimen, laid over the pieces of its renderings.
    fn new(chat: Chat, evidence: Evidence) -> Option<Plan> {
        // What other words would do is not asked again for each row.
        if evidence.reworded {
            return None;
        }
        let whole = Pieces::new(chat.rendered.text)?;
        let (pieces, starts) = (&whole.pieces, &whole.starts);
        let place = |at: usize| match starts.partition_point(|start| *start <= at) {
            0 => (0, 0),
            n if at == whole.text.len() => (n, 0),
            n => (n - 1, at - starts[n - 1]),
        };
        let spans = chat.rendered.spans.iter();
        let spans = spans.map(|s| (place(s.range.start)..place(s.range.end), s.origin, s.weight));
        let spans: Vec<_> = spans.collect();
        let clean = |place: &Place| place.1 == 0 || matches!(pieces[place.0], Piece::Literal(_));
        if !spans.iter().all(|(range, ..)| clean(&range.start) && clean(&range.end)) {
            return None;
        }
        let marked = match evidence.marked {
            Some((text, marks)) => Some((Pieces::new(text)?, marks)),
            None => None,
        };
        let mut prefixes = Vec::with_capacity(evidence.prefixes.len());
        let mut apart = 0;
        for ((messages, generation), text) in evidence.prefixes {
            let text = match text {
                Some(text) => {
                    let shared = whole.shared(&text);
                    let at = starts.get(shared).map_or(whole.text.len(), |start| *start);
                    apart += text.len() - at;
                    Some((shared, Pieces::new(text[at..].to_string())?))
                }
                None => None,
            };
            prefixes.push(Prefix { messages, generation, text });
        }
        (apart <= APART).then_some(Plan { whole, marked, prefixes, spans, findings: chat.findings })
    }

    /// True where the spans rest on marks around `{% generation %}` blocks.
    pub fn is_marked(&self) -> bool {
        self.marked.is_some()
    }

    /// A conversation of this shape with its spans, if the renderings that they rest on are made of these pieces. `text`
    /// is its rendering; a plan with marks needs none where the template cannot see them.
    pub fn apply(
        &self,
        setup: &Setup,
        id: &RowId,
        c: &Conversation,
        messages: &[minijinja::Value],
        text: Option<&str>,
    ) -> Option<Chat> {
        let fields: Vec<Field<'_>> = fields(c).collect();
        let render = |messages: &[_], generation, marks| {
            setup.template.render_with(&setup.variables, c, messages, generation, marks).ok()
        };
        if let Some((pieces, marks)) = &self.marked {
            // Marks that a row writes itself are none.
            if fields.iter().any(|field| field.text.contains([marks.0, marks.1])) {
                return None;
            }
            pieces.places(&fields, &render(messages, false, Some(*marks))?)?;
        }
        let text = match text {
            Some(text) => text.to_string(),
            None => self.whole.with(&fields).collect::<Option<String>>()?,
        };
        let starts = self.whole.places(&fields, &text)?;
        let holds = |prefix: &Prefix| match (
            &prefix.text,
            render(&messages[..prefix.messages], prefix.generation, None),
        ) {
            (Some((shared, rest)), Some(given)) => given
                .strip_prefix(&text[..starts[*shared]])
                .is_some_and(|g| rest.places(&fields, g).is_some()),
            (None, None) => true,
            _ => false,
        };
        if !self.prefixes.iter().all(holds) {
            return None;
        }
        let place = |(piece, offset): Place| starts[piece] + offset;
        let spans = self.spans.iter().map(|(range, origin, weight)| Span {
            range: place(range.start)..place(range.end),
            origin: *origin,
            weight: *weight,
        });
        let spans = spans.collect();
        let findings = self.findings.iter().map(|f| Finding { row: id.row, ..f.clone() }).collect();
        Some(Chat { rendered: Rendered { id: id.clone(), text, spans, add_special_tokens: false }, findings })
    }
}

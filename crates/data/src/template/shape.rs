//! Reuses a proof for all conversations of the same shape.
//!
//! The *shape* of a conversation is everything except the text of its strings: roles, keys, weights, which strings
//! are blank, and which start or end in white space. A *specimen* has that shape and one private character for
//! each string. The proof for the specimen is the *plan* of the shape: literal pieces, references to strings, and
//! the spans over these.
//!
//! A row gets the spans of the plan if every rendering that the specimen's proof relies on, made for the row,
//! is byte for byte that of the specimen with the row's strings substituted: the whole conversation; the
//! rendering with marks around `{% generation %}` blocks; and the messages before each answer with the
//! generation prompt (and without it, if the proof used that). A template that cannot inspect texts
//! ([`super::blind`]) renders all of these alike, so only the whole is rendered. Marks around fields are not
//! rendered again: the substitution shows the same. Every other row is proved on its own. A plan depends on
//! the shape only, so the result of a row never depends on other rows.
//!
//! A row of a known shape costs one rendering under a blind template (7 µs for six messages of ChatML or
//! Llama 3), else one more per answer, of the messages before it (42 µs for six messages of Qwen3, whose
//! whole rendering takes 14), or one more for the blocks (20 µs).

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

/// Maximum number of cached plans. Beyond it the cache is cleared, which costs time but does not change
/// results.
const SHAPES: usize = 1024;

/// Maximum length of a blank string in a shape, in bytes.
const BLANK: usize = 16;

/// Maximum number of messages of a conversation with a shape.
const MESSAGES: usize = 1024;

/// Maximum length of the text that a plan stores of prefixes that differ from the whole rendering, in bytes.
const APART: usize = 64 << 10;

/// Placeholder for white space at either end of a string of the specimen; trimming removes it.
const SPACE: char = '\u{2003}';

/// The first string of the specimen; strings are single characters of the last private-use plane.
const FIRST: u32 = 0x10_0000;

/// The plans of the shapes seen so far; `None` for a shape whose specimen has no proof.
#[derive(Debug, Default)]
pub(super) struct Plans(RwLock<HashMap<Vec<u8>, Option<Arc<Plan>>>>);

/// A string of a conversation, which pieces of a plan refer to.
struct Field<'a> {
    text: &'a str,
    /// Range of the trimmed string in `text`.
    core: Range<usize>,
}

impl Field<'_> {
    fn of(text: &str) -> Field<'_> {
        Field { text, core: python::core(text) }
    }

    fn blank(&self) -> bool {
        self.core.is_empty()
    }
}

/// A piece of a rendering.
#[derive(Debug)]
enum Piece {
    /// Text of the template, as a range of the specimen's rendering.
    Literal(Range<usize>),
    /// The leading white space of a field.
    Head(usize),
    /// A field without leading and trailing white space.
    Core(usize),
    /// The trailing white space of a field.
    Tail(usize),
}

/// A rendering of the specimen as pieces.
#[derive(Debug)]
struct Pieces {
    text: String,
    pieces: Vec<Piece>,
    /// The byte in `text` at which each piece starts.
    starts: Vec<usize>,
}

/// A position in a rendering: piece, and byte in the piece.
type Place = (usize, usize);

/// A rendering of the first messages of a shape that the proof relies on.
#[derive(Debug)]
struct Prefix {
    messages: usize,
    generation: bool,
    /// The number of pieces it has in common with the start of the whole, and the remaining pieces; `None` if
    /// the template rejects the messages.
    text: Option<(usize, Pieces)>,
}

/// The proof for a shape.
#[derive(Debug)]
pub(super) struct Plan {
    whole: Pieces,
    /// The rendering with marks around the `{% generation %}` blocks, and the marks.
    marked: Option<(Pieces, (char, char))>,
    prefixes: Vec<Prefix>,
    /// The model's input before an answer, if it is not a prefix of the whole: the number of pieces in common, and
    /// the remaining ones. It can be a prefix for a row whose answer begins with the text that the generation
    /// prompt opens.
    unequal: Vec<(usize, Pieces)>,
    spans: Vec<(Range<Place>, Origin, f32)>,
    findings: Vec<Finding>,
}

/// The strings of a message that templates print. The role is not one of them: it decides what templates do.
fn texts(message: &Map<String, Value>) -> impl Iterator<Item = (&String, &String)> {
    let texts = message.iter().filter(|(key, _)| *key != "role");
    texts.filter_map(|(key, value)| match value {
        Value::String(text) => Some((key, text)),
        _ => None,
    })
}

/// The non-blank strings of a conversation, in order.
fn fields(c: &Conversation) -> impl Iterator<Item = Field<'_>> {
    let all = c.messages.iter().flat_map(|m| texts(m).map(|(_, text)| Field::of(text)));
    all.filter(|field| !field.blank())
}

/// The shape of a conversation as bytes, equal for two conversations exactly if their shapes are equal.
/// `None` for conversations without a shape: those with tools, tool calls, weights of parts of a text, or values other
/// than strings in their messages.
pub(super) fn key(c: &Conversation) -> Option<Vec<u8>> {
    if c.tools.is_some() || !c.details.is_empty() || c.messages.len() > MESSAGES {
        return None;
    }
    let mut key = Vec::with_capacity(32 * c.messages.len() + 16);
    // Lengths come first, so that different lists of strings never give the same bytes.
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
            // Tool calls, even if they are only a string.
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

/// The specimen of a conversation's shape.
pub(super) fn specimen(c: &Conversation) -> Option<Conversation> {
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
    /// The plan for a conversation, if it has a shape and the shape a proof.
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

/// Makes the plan of a conversation's shape from its specimen.
fn learn(setup: &Setup, c: &Conversation) -> Option<Plan> {
    let c = specimen(c)?;
    // The specimen has no source row, so its errors are discarded.
    let id = RowId { file: Arc::from(Path::new("")), row: 0, line: None, in_file: 0 };
    let (messages, text) = setup.plain(&id, &c).ok()?;
    let (chat, evidence) = prove_with_evidence(setup, id, &c, messages, text).ok()?;
    // A blind template renders every text as it renders that of the specimen.
    Plan::new(chat, evidence, setup.template.compiled(&c).blind)
}

impl Pieces {
    /// The pieces of a specimen's rendering; `None` if a placeholder in it may be the template's own white
    /// space.
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
        // A placeholder that is not next to a string is the template's own.
        (spaces == 0).then_some(Pieces { text, pieces, starts })
    }

    /// The number of pieces that another rendering of the specimen starts with, cut so that no field is
    /// split.
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

    /// The texts of the pieces with a row's strings substituted; `None` for a string that the row lacks.
    fn with<'a>(&'a self, fields: &'a [Field<'a>]) -> impl Iterator<Item = Option<&'a str>> {
        self.pieces.iter().map(move |piece| match piece {
            Piece::Literal(range) => Some(&self.text[range.clone()]),
            Piece::Head(n) => fields.get(*n).map(|f| &f.text[..f.core.start]),
            Piece::Core(n) => fields.get(*n).map(|f| &f.text[f.core.clone()]),
            Piece::Tail(n) => fields.get(*n).map(|f| &f.text[f.core.end..]),
        })
    }

    /// The byte at which each piece starts in a row's rendering, and the end of the last one; `None` if the
    /// rendering does not consist of these pieces.
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
    /// Makes a plan from the spans and renderings of a specimen. `blind`: no rendering other than the whole is
    /// needed for a row.
    fn new(chat: Chat, evidence: Evidence, blind: bool) -> Option<Plan> {
        // Renderings that are not kept cannot be repeated for rows.
        if evidence.others && !blind {
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
            Some((text, marks)) if !blind => Some((Pieces::new(text)?, marks)),
            _ => None,
        };
        let mut unequal = Vec::new();
        let mut prefixes = Vec::with_capacity(evidence.prefixes.len());
        let mut apart = 0;
        for ((messages, generation), text) in evidence.prefixes {
            let text = match text {
                Some(text) => {
                    let shared = whole.shared(&text);
                    let at = starts.get(shared).map_or(whole.text.len(), |start| *start);
                    apart += text.len() - at;
                    if generation && !whole.text.starts_with(&text) {
                        unequal.push((shared, Pieces::new(text[at..].to_string())?));
                    }
                    Some((shared, Pieces::new(text[at..].to_string())?))
                }
                None => None,
            };
            if blind {
                continue;
            }
            prefixes.push(Prefix { messages, generation, text });
        }
        (apart <= APART).then_some(Plan { whole, marked, prefixes, unequal, spans, findings: chat.findings })
    }

    /// True if the spans come from `{% generation %}` blocks.
    pub fn is_marked(&self) -> bool {
        self.marked.is_some()
    }

    /// The spans of a conversation of this shape, if its renderings consist of the pieces of the plan. `text`
    /// is its rendering; it may be `None` for a plan with marks that the template cannot read.
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
            // A row that contains these characters itself cannot be marked with them.
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
        let given = |(shared, rest): &(usize, Pieces)| {
            let rest: Option<String> = rest.with(&fields).collect();
            rest.is_none_or(|rest| text[starts[*shared]..].starts_with(&rest))
        };
        if !self.prefixes.iter().all(holds) || self.unequal.iter().any(given) {
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

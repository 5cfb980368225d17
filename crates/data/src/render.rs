//! Text with the spans that tile it. Supervision is decided here, once.

use crate::example::{Alpaca, TextPiece};
use crate::policy::{Policy, Supervise};
use crate::{Origin, RowId, Section};
use std::ops::Range;

/// A byte range with one origin and one loss weight.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// Byte range in [`Rendered::text`].
    pub range: Range<usize>,
    /// Why it is supervised or not.
    pub origin: Origin,
    /// Loss weight of its tokens; 0 masks them.
    pub weight: f32,
}

/// A row as text. The spans tile the text exactly: no gap, no overlap, in order (an empty span is allowed).
#[derive(Clone, Debug, PartialEq)]
pub struct Rendered {
    /// The source row.
    pub id: RowId,
    /// The whole text: prompts, responses, and the text of stop tokens.
    pub text: String,
    /// The origin and weight of every byte.
    pub spans: Vec<Span>,
    /// True for plain text, to which the tokenizer's post-processor adds its special tokens (BOS); false for
    /// rendered chats, which contain their own.
    pub add_special_tokens: bool,
}

impl Rendered {
    /// The text of the responses, without stop tokens.
    pub fn response(&self) -> impl Iterator<Item = &str> {
        let spans = self.spans.iter().filter(|s| matches!(s.origin, Origin::Response { .. }));
        spans.map(|s| &self.text[s.range.clone()])
    }

    /// The text before the first response.
    pub fn prompt(&self) -> &str {
        let end =
            self.spans.iter().find(|s| s.origin.supervised()).map_or(self.text.len(), |s| s.range.start);
        &self.text[..end]
    }
}

/// The texts that end a response.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stops {
    /// The tokenizer's EOS, which is appended to responses without a stop text.
    pub eos: Option<String>,
    /// Every text that ends a response, including the EOS.
    pub all: Vec<String>,
}

impl Stops {
    /// A single stop text, the EOS.
    pub fn eos(text: impl Into<String>) -> Stops {
        let text = text.into();
        Stops { all: vec![text.clone()], eos: Some(text) }
    }
}

/// The section markers in order, each with the section that it begins. `[RESPONSE]` begins none: text between it
/// and the response is scaffold.
const MARKERS: [(&str, Option<Section>); 4] = [
    ("SYSTEM", Some(Section::System)),
    ("CONTEXT", Some(Section::Context)),
    ("TASK", Some(Section::Task)),
    ("RESPONSE", None),
];

/// Renders a prompt and its completion as text with spans.
///
/// The completion is the response, up to the stop text at its end, if there is one; white space after the stop
/// text is scaffold. If a completion has no stop text, the EOS is appended with the origin [`Origin::EndOfTurn`],
/// if the policy requires it and the tokenizer has one.
pub fn render(id: RowId, text: String, prompt_len: usize, policy: &Policy, stops: &Stops) -> Rendered {
    let mut text = text;
    let mut spans = sections(&text[..prompt_len], policy);
    let end = text.len();
    let found = final_stop(&text[prompt_len..], stops).map(|at| at.start + prompt_len..at.end + prompt_len);
    let Range { start: response_end, end: stop_end } = found.clone().unwrap_or(end..end);
    spans.push(Span { range: prompt_len..response_end, origin: Origin::Response { turn: 0 }, weight: 1.0 });
    if found.is_some() {
        spans.push(Span {
            range: response_end..stop_end,
            origin: Origin::EndOfTurn { turn: 0 },
            weight: 1.0,
        });
        if stop_end < end {
            spans.push(Span { range: stop_end..end, origin: Origin::Scaffold, weight: 0.0 });
        }
    } else if policy.append_eos
        && let Some(eos) = &stops.eos
    {
        text.push_str(eos);
        spans.push(Span { range: end..text.len(), origin: Origin::EndOfTurn { turn: 0 }, weight: 1.0 });
    }
    Rendered { id, text, spans, add_special_tokens: true }
}

/// The stop text at the end of a response, ignoring white space after it.
fn final_stop(response: &str, stops: &Stops) -> Option<Range<usize>> {
    let stop = |text: &str| {
        // The longest one, since a stop text may end in another.
        let lengths =
            stops.all.iter().filter(|s| !s.is_empty() && text.ends_with(s.as_str())).map(String::len);
        lengths.max().map(|len| text.len() - len..text.len())
    };
    // A stop text may itself end in white space, so the untrimmed response is tried first.
    stop(response).or_else(|| stop(response.trim_end()))
}

/// Renders segments as text with spans: segments with a weight above 0 are response, the others prompt.
///
/// A run of response segments is one response, up to the stop text at its end, if there is one. The EOS is
/// appended as to a plain completion, if the last segment is response and has no stop text at its end.
pub fn render_segments(id: RowId, segments: &[TextPiece], policy: &Policy, stops: &Stops) -> Rendered {
    let mut text = Pieces::default();
    for (at, segment) in segments.iter().enumerate() {
        if segment.weight > 0.0 {
            text.respond(&segment.text, segment.weight);
            let next = segments.get(at + 1);
            if next.is_none_or(|next| next.weight == 0.0) {
                text.end_turn(next.is_none(), policy, stops);
            }
        } else {
            text.prompt(&segment.text, Section::Other, policy);
        }
    }
    text.rendered(id)
}

/// Renders an instruction as plain text with spans: the prompt of Stanford's Alpaca, preceded by earlier turns in
/// the same form.
///
/// The instruction is the task, its input and earlier instructions are context, and the headings are scaffold.
/// Earlier answers get an EOS and are supervised like the last one, unless the policy supervises only the last.
pub fn render_alpaca(id: RowId, row: &Alpaca, policy: &Policy, stops: &Stops) -> Rendered {
    let mut text = Pieces::default();
    match (&row.system, &row.input) {
        (Some(system), _) => text.prompt(system, Section::System, policy),
        (None, Some(_)) => text.scaffold(
            "Below is an instruction that describes a task, paired with an input that provides further context. \
             Write a response that appropriately completes the request.",
        ),
        (None, None) => text.scaffold(
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
        ),
    }
    for (instruction, answer) in &row.history {
        text.scaffold("\n\n### Instruction:\n");
        text.prompt(instruction, Section::Context, policy);
        text.scaffold("\n\n### Response:\n");
        if policy.supervise == Supervise::Last {
            text.prompt(answer, Section::Context, policy);
            text.scaffold(stops.eos.as_deref().filter(|_| policy.append_eos).unwrap_or(""));
        } else {
            text.respond(answer, 1.0);
            text.end_turn(true, policy, stops);
        }
    }
    text.scaffold("\n\n### Instruction:\n");
    text.prompt(&row.instruction, Section::Task, policy);
    if let Some(input) = &row.input {
        text.scaffold("\n\n### Input:\n");
        text.prompt(input, Section::Context, policy);
    }
    text.scaffold("\n\n### Response:\n");
    text.respond(&row.output, 1.0);
    text.end_turn(true, policy, stops);
    text.rendered(id)
}

/// Builds text from pieces of known origin.
#[derive(Default)]
struct Pieces {
    text: String,
    spans: Vec<Span>,
    turn: u16,
    /// The index of the first span and the first byte of the open response.
    open: Option<(usize, usize)>,
}

impl Pieces {
    fn push(&mut self, text: &str, origin: Origin, weight: f32) {
        if !text.is_empty() {
            let start = self.text.len();
            self.text.push_str(text);
            self.spans.push(Span { range: start..self.text.len(), origin, weight });
        }
    }

    fn scaffold(&mut self, text: &str) {
        self.push(text, Origin::Scaffold, 0.0);
    }

    fn prompt(&mut self, text: &str, section: Section, policy: &Policy) {
        self.push(text, Origin::Prompt { turn: self.turn, section }, policy.section_weight(section));
    }

    fn respond(&mut self, text: &str, weight: f32) {
        self.open.get_or_insert((self.spans.len(), self.text.len()));
        self.push(text, Origin::Response { turn: self.turn }, weight);
    }

    /// Ends the open response: finds its stop text, or appends the EOS if both `append` and the policy require it.
    fn end_turn(&mut self, append: bool, policy: &Policy, stops: &Stops) {
        let Some((first, start)) = self.open.take() else { return };
        let turn = self.turn;
        self.turn = self.turn.saturating_add(1);
        let end_of_turn = Origin::EndOfTurn { turn };
        let Some(stop) = final_stop(&self.text[start..], stops) else {
            if append && policy.append_eos {
                let weight = self.spans[first..].last().map_or(1.0, |span| span.weight);
                self.push(stops.eos.as_deref().unwrap_or(""), end_of_turn, weight);
            }
            return;
        };
        let stop = stop.start + start..stop.end + start;
        for span in self.spans.split_off(first) {
            let Range { start, end } = span.range;
            let cuts = [start, stop.start.clamp(start, end), stop.end.clamp(start, end), end];
            let parts = [
                (span.origin, span.weight),
                (end_of_turn, span.weight),
                // White space after the stop text.
                (Origin::Scaffold, 0.0),
            ];
            for (range, (origin, weight)) in cuts.windows(2).zip(parts) {
                if range[0] < range[1] {
                    self.spans.push(Span { range: range[0]..range[1], origin, weight });
                }
            }
        }
    }

    fn rendered(self, id: RowId) -> Rendered {
        Rendered { id, text: self.text, spans: self.spans, add_special_tokens: true }
    }
}

/// The spans of a prompt, by its section markers.
///
/// From left to right, a marker counts if it is at the start of the text or after white space (so also at the
/// start of a line), and neither it nor a marker that follows it in the order SYSTEM, CONTEXT, TASK, RESPONSE
/// has counted before. Any other occurrence is content.
pub fn sections(prompt: &str, policy: &Policy) -> Vec<Span> {
    let markers: Vec<(String, Option<Section>)> = MARKERS
        .iter()
        .map(|(name, section)| {
            let text = policy.section_markers.get(*name).cloned().unwrap_or_else(|| format!("[{name}]"));
            (text, *section)
        })
        .collect();
    let prompt_span = |range: Range<usize>, section: Option<Section>| match section {
        Some(section) => Span {
            range,
            origin: Origin::Prompt { turn: 0, section },
            weight: policy.section_weight(section),
        },
        None => Span { range, origin: Origin::Scaffold, weight: 0.0 },
    };
    let mut spans = Vec::new();
    let mut open = Some(Section::Other);
    let mut start = 0;
    let mut at = 0;
    let mut rank = 0;
    while rank < markers.len() {
        let rest = &prompt[at..];
        let found = markers
            .iter()
            .enumerate()
            .skip(rank)
            .filter(|(_, (marker, _))| !marker.is_empty())
            .filter_map(|(r, (marker, _))| find_marker(prompt, at, rest, marker).map(|place| (place, r)))
            // If two markers start at the same position, the longer one is meant.
            .min_by_key(|&(place, r)| (place, std::cmp::Reverse(markers[r].0.len())));
        let Some((place, r)) = found else { break };
        if place > start {
            spans.push(prompt_span(start..place, open));
        }
        let end = place + markers[r].0.len();
        spans.push(Span { range: place..end, origin: Origin::Scaffold, weight: 0.0 });
        (start, at, open, rank) = (end, end, markers[r].1, r + 1);
    }
    if prompt.len() > start {
        spans.push(prompt_span(start..prompt.len(), open));
    }
    spans
}

/// The first position at or after `at` where `marker` is at the start of the text or after white space.
fn find_marker(prompt: &str, at: usize, rest: &str, marker: &str) -> Option<usize> {
    rest.match_indices(marker)
        .map(|(offset, _)| at + offset)
        .find(|&place| prompt[..place].chars().next_back().is_none_or(char::is_whitespace))
}

/// True if a completion starts, after white space, with the marker of the response. The marker is supervised like
/// the rest of the completion, so the model learns to write it.
pub fn starts_with_response_marker(completion: &str, policy: &Policy) -> bool {
    let marker = policy.section_markers.get("RESPONSE").map_or("[RESPONSE]", String::as_str);
    !marker.is_empty() && completion.trim_start().starts_with(marker)
}

//! Text and the spans that tile it: where supervision is decided, once.

use crate::example::{Alpaca, TextPiece};
use crate::policy::{Policy, Supervise};
use crate::{Origin, RowId, Section};
use std::ops::Range;

/// A run of bytes of one origin and one loss weight.
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
    /// The row that it was made from.
    pub id: RowId,
    /// The whole text: prompt, response, and the text of the stop token.
    pub text: String,
    /// What each byte is.
    pub spans: Vec<Span>,
    /// True for plain text, which gets what the tokenizer's post-processor adds in front (BOS); false for
    /// rendered chat text, which carries its own.
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
    /// The tokenizer's EOS: what is appended.
    pub eos: Option<String>,
    /// Every text that counts as the end of a response, the EOS among them.
    pub all: Vec<String>,
}

impl Stops {
    /// Only an EOS.
    pub fn eos(text: impl Into<String>) -> Stops {
        let text = text.into();
        Stops { all: vec![text.clone()], eos: Some(text) }
    }
}

/// The section markers in their order, each with the section that it opens. `[RESPONSE]` opens none: what
/// stands between it and the response is scaffold.
const MARKERS: [(&str, Option<Section>); 4] = [
    ("SYSTEM", Some(Section::System)),
    ("CONTEXT", Some(Section::Context)),
    ("TASK", Some(Section::Task)),
    ("RESPONSE", None),
];

/// A prompt and its completion to text with spans.
///
/// The completion is the response, up to the stop text that it ends in, if it does; white space after that
/// stop text is scaffold. A completion that ends in none gets the EOS appended, as text with the origin
/// [`Origin::EndOfTurn`], where the policy says so and there is one.
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

/// The stop text that a response ends in, white space after it aside.
fn final_stop(response: &str, stops: &Stops) -> Option<Range<usize>> {
    let stop = |text: &str| {
        // The longest stop text that it ends in, where one stop text ends in another.
        let lengths =
            stops.all.iter().filter(|s| !s.is_empty() && text.ends_with(s.as_str())).map(String::len);
        lengths.max().map(|len| text.len() - len..text.len())
    };
    // A stop text may itself end in white space, so the response as it stands comes first.
    stop(response).or_else(|| stop(response.trim_end()))
}

/// Segments to text with spans: what has a weight is response, the rest is prompt.
///
/// A run of segments with a weight is one response, up to the stop text that it ends in, if it does. The EOS is
/// appended as to a plain completion, where the last segment is response and ends in no stop text.
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

/// An instruction as plain text: the prompt of Stanford's Alpaca, earlier turns before it in the same form.
///
/// The instruction is the task, its input and earlier instructions are context, the headings are scaffold. Earlier
/// answers end in the EOS and are learned like the last one, unless the policy supervises only that.
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
    for (asked, answered) in &row.history {
        text.scaffold("\n\n### Instruction:\n");
        text.prompt(asked, Section::Context, policy);
        text.scaffold("\n\n### Response:\n");
        if policy.supervise == Supervise::Last {
            text.prompt(answered, Section::Context, policy);
            text.scaffold(stops.eos.as_deref().filter(|_| policy.append_eos).unwrap_or(""));
        } else {
            text.respond(answered, 1.0);
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

/// Plain text under construction, from pieces of known origin.
#[derive(Default)]
struct Pieces {
    text: String,
    spans: Vec<Span>,
    turn: u16,
    /// The first span and byte of the response that is open.
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

    /// Ends the open response: finds its stop text, or appends the EOS where `append` and the policy ask for it.
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
/// Read from left to right: a marker counts where it stands at the start of the text or after white space
/// (so also at the start of a line), was not counted before, and no marker that follows it in the order
/// SYSTEM, CONTEXT, TASK, RESPONSE was counted before it. Any other occurrence is content.
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
            // Where two start at one place, the longer marker is the one that was written.
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

/// The first place at or after `at` where `marker` stands at the start of the text or after white space.
fn find_marker(prompt: &str, at: usize, rest: &str, marker: &str) -> Option<usize> {
    rest.match_indices(marker)
        .map(|(offset, _)| at + offset)
        .find(|&place| prompt[..place].chars().next_back().is_none_or(char::is_whitespace))
}

/// True where a text starts, after white space, with the marker that opens the response. In a completion it
/// is supervised like all of it: the model learns to write the marker.
pub fn starts_with_response_marker(completion: &str, policy: &Policy) -> bool {
    let marker = policy.section_markers.get("RESPONSE").map_or("[RESPONSE]", String::as_str);
    !marker.is_empty() && completion.trim_start().starts_with(marker)
}

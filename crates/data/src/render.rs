//! Text and the spans that tile it: where supervision is decided, once.

use crate::policy::Policy;
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
    let completion = &text[prompt_len..];
    let trimmed = completion.trim_end();
    let stop = |text: &str| {
        // The longest stop text that it ends in, where one stop text ends in another.
        stops.all.iter().filter(|s| !s.is_empty() && text.ends_with(s.as_str())).map(String::len).max()
    };
    // A stop text may itself end in white space, so the completion as it stands comes first.
    let found = stop(completion).map(|len| (end - len, end)).or_else(|| {
        let trimmed_end = prompt_len + trimmed.len();
        stop(trimmed).map(|len| (trimmed_end - len, trimmed_end))
    });
    let (response_end, stop_end) = found.unwrap_or((end, end));
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

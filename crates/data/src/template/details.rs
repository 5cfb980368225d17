//! The loss weights of parts of an answer's text: locates these parts in the rendering.

use super::marks::Marks;
use super::proof::{Proof, Turn};
use super::python;
use crate::example::Detail;
use crate::policy::Supervise;
use crate::render::Span;
use crate::{Error, Origin, Result};
use serde_json::Value;
use std::ops::Range;

impl Proof<'_> {
    /// Gives parts of answers their own weights. The policy's choice of answers takes precedence.
    pub fn weigh_details(
        &self,
        mut spans: Vec<Span>,
        turns: &[Turn],
        marks: Option<&Marks>,
    ) -> Result<Vec<Span>> {
        for (i, details) in &self.c.details {
            let own = self.c.weights.get(*i).copied().flatten();
            let chosen = self.setup.policy.supervise == Supervise::PerMessage && own.is_none();
            if !chosen && self.weight(*i).is_none_or(|w| w == 0.0) {
                continue;
            }
            let mut texts = [None, None];
            for detail in details {
                let place = &mut texts[usize::from(detail.reasoning)];
                if place.is_none() {
                    *place = Some(self.places(*i, detail.reasoning, turns, marks)?);
                }
                for (text, at) in place.iter().flatten() {
                    let start = detail.bytes.start.max(text.start);
                    let end = detail.bytes.end.min(text.end);
                    if start < end {
                        weigh(&mut spans, at + start - text.start..at + end - text.start, detail);
                    }
                }
            }
        }
        Ok(spans)
    }

    /// The texts of an answer's content or reasoning, as ranges of all of them joined, each with the byte of the
    /// rendering at which it starts. White space at the ends of a text may be missing from the rendering.
    fn places(
        &self,
        i: usize,
        reasoning: bool,
        turns: &[Turn],
        marks: Option<&Marks>,
    ) -> Result<Vec<(Range<usize>, usize)>> {
        let own = || turns.iter().filter(|turn| turn.message == i);
        let (Some(start), Some(end)) = (own().map(|t| t.from).min(), own().map(|t| t.end).max()) else {
            return Err(self.not_placed(i, "the template does not render it"));
        };
        let key = if reasoning { "reasoning_content" } else { "content" };
        let texts: Vec<&str> = match &self.messages[i][key] {
            Value::String(text) => vec![text],
            Value::Array(parts) => {
                parts.iter().filter_map(|part| part.get("text").unwrap_or(part).as_str()).collect()
            }
            _ => Vec::new(),
        };
        let (mut joined, mut cursor) = (0, start);
        let mut places = Vec::with_capacity(texts.len());
        for text in texts {
            let range = joined..joined + text.len();
            joined = range.end;
            let inner = python::core(text);
            if inner.is_empty() {
                continue;
            }
            let (before, core, after) = (&text[..inner.start], &text[inner.clone()], &text[inner.end..]);
            let opens =
                marks.into_iter().flat_map(|m| m.spans_of(i, reasoning)).filter(|at| at.start >= cursor);
            let marked = opens.map(|at| at.start).find(|at| self.text[*at..].starts_with(core));
            let mut found = self.text[cursor..end].match_indices(core).map(|(at, _)| cursor + at);
            let at = match (marked, found.next(), found.next()) {
                (Some(at), ..) | (None, Some(at), None) => at,
                (None, None, _) => return Err(self.not_placed(i, "the template changes it")),
                (None, Some(_), Some(_)) => return Err(self.not_placed(i, "it stands there more than once")),
            };
            cursor = at + core.len();
            // White space at its ends is included if the rendering has it.
            let lead = if self.text[start..at].ends_with(before) { before.len() } else { 0 };
            let tail = if self.text[cursor..].starts_with(after) { after.len() } else { 0 };
            let shown = range.start + before.len() - lead..range.end - after.len() + tail;
            places.push((shown, at - lead));
        }
        Ok(places)
    }

    fn not_placed(&self, i: usize, why: &str) -> Error {
        Error::row(
            self.id.clone(),
            format!("message {i} has weights for parts of its text, whose places cannot be proved: {why}"),
            "give the message one weight for the whole, such as \"train\": false, or give the row as \"segments\"",
        )
    }
}

/// Sets the weight of a byte range of the answers.
fn weigh(spans: &mut Vec<Span>, range: Range<usize>, detail: &Detail) {
    let old = std::mem::take(spans);
    for span in old {
        let Range { start, end } = span.range;
        let inside = range.start.clamp(start, end)..range.end.clamp(start, end);
        if !matches!(span.origin, Origin::Response { .. }) || inside.is_empty() {
            spans.push(span);
            continue;
        }
        for (range, weight) in [
            (start..inside.start, span.weight),
            (inside.clone(), detail.weight),
            (inside.end..end, span.weight),
        ] {
            if !range.is_empty() {
                spans.push(Span { range, weight, ..span });
            }
        }
    }
}

//! Turns proven responses and prompts into spans that tile the text.

use super::marks::Marks;
use super::proof::{Chat, Proof, Turn, is_assistant, role};
use crate::render::{Rendered, Span};
use crate::{Code, Origin, Result, Section};
use serde_json::Value;
use std::ops::Range;

impl Proof<'_> {
    /// The text of the generation prompt, if the rendering without it is a prefix of the one with it.
    fn generation_prompt(&self, n: usize) -> Option<String> {
        let with = self.prefix(n, true)?;
        let without = self.prefix(n, false)?;
        with.strip_prefix(&without).filter(|s| !s.is_empty()).map(str::to_string)
    }

    fn section(&self, i: usize, last_user: Option<usize>) -> Section {
        match role(&self.messages[i]) {
            "system" | "developer" => Section::System,
            "tool" | "function" | "ipython" | "observation" => Section::Tool,
            "user" if Some(i) == last_user => Section::User,
            "user" => Section::Context,
            _ => Section::Other,
        }
    }

    /// Byte ranges of prompts, each with its message: by marks, else the text between two responses.
    fn prompts(&self, turns: &[Turn], marks: Option<&Marks>) -> Vec<(Range<usize>, usize)> {
        let mut spans = Vec::new();
        if let Some(m) = marks.filter(|m| m.which.prompts) {
            for pair in m.falls.windows(2) {
                let [open, close] = pair else { continue };
                let message = m.fields[open.field].message;
                let whole = open.field == close.field && !open.close && close.close;
                if whole && !is_assistant(&self.messages[message]) {
                    spans.push((open.outer..close.outer, message));
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

    pub fn tile(mut self, turns: Vec<Turn>, marks: Option<&Marks>) -> Result<Chat> {
        let mut wanted: Vec<Span> = Vec::new();
        let mut altered: Vec<usize> = Vec::new();
        for turn in &turns {
            let index = turn.message.min(u16::MAX as usize) as u16;
            let weight = self.weight(turn.message);
            let (response, stop_origin, weight) = match weight {
                Some(weight) => (Origin::Response { turn: index }, Origin::EndOfTurn { turn: index }, weight),
                None => {
                    let section = Section::Context;
                    let weight = self.setup.policy.section_weight(section);
                    (Origin::Prompt { turn: index, section }, Origin::Scaffold, weight)
                }
            };
            wanted.push(Span { range: turn.start..turn.end, origin: response, weight });
            if let Some(stop) = &turn.stop {
                let weight = if stop_origin == Origin::Scaffold { 0.0 } else { weight };
                wanted.push(Span { range: stop.clone(), origin: stop_origin, weight });
            }
        }
        let mut of = vec![Vec::new(); self.messages.len()];
        for turn in &turns {
            of[turn.message].push(turn);
        }
        for (i, message) in self.messages.iter().enumerate().filter(|(_, m)| is_assistant(m)) {
            let texts: Vec<&str> = match &message["content"] {
                Value::Array(parts) => parts.iter().filter_map(|part| part["text"].as_str()).collect(),
                content => content.as_str().into_iter().collect(),
            };
            let mut own = of[i].iter().map(|t| &self.text[t.from..t.stop.as_ref().map_or(t.end, |s| s.end)]);
            let written = |own: &str| texts.iter().all(|text| own.contains(text));
            if texts.iter().any(|text| !text.is_empty()) && !own.any(written) {
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
        let last_user = self.messages.iter().rposition(|m| role(m) == "user");
        for (range, message) in self.prompts(&turns, marks) {
            let section = self.section(message, last_user);
            let turn = message.min(u16::MAX as usize) as u16;
            let origin = Origin::Prompt { turn, section };
            let masked = self.c.weights.get(message).copied().flatten() == Some(0.0);
            let weight = if masked { 0.0 } else { self.setup.policy.section_weight(section) };
            wanted.push(Span { range, origin, weight });
        }
        // The sort is stable and responses come first: white space between a prompt and a response stays with
        // the response.
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
                let kept = cursor.min(span.range.end);
                // White space at the edge of a prompt may belong to an answer; its text may not.
                let both = span.range.start..kept;
                let learned = |s: &Span| match s.origin {
                    Origin::Response { turn } | Origin::EndOfTurn { turn } => {
                        let shared = s.range.start.max(both.start)..s.range.end.min(both.end);
                        Some(turn).filter(|_| !self.text[shared].trim().is_empty())
                    }
                    _ => None,
                };
                let mut over = spans.iter().rev().take_while(|s| s.range.end > both.start);
                if let (Some(answer), Origin::Prompt { turn, .. }) = (over.find_map(learned), span.origin) {
                    return Err(self.error(format!(
                        "an answer and a prompt claim byte {} of the rendering: the template writes message {turn} within what \
                         it writes of message {answer}",
                        both.start
                    )));
                }
                span.range.start = kept;
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
        let spans = self.weigh_details(spans, &turns, marks)?;
        let rendered = Rendered { id: self.id, text: self.text, spans, add_special_tokens: false };
        Ok(Chat { rendered, findings: self.findings })
    }
}

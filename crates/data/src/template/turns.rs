//! Proves where the responses are: by `{% generation %}` blocks, else by marks around fields, else by
//! prefixes.

use super::context;
use super::marks::{ATTEMPTS, Fall, Fields, Marks, Wrap, mark, strip, strip_fields};
use super::proof::{Proof, Setup, Turn, is_assistant, role};
use super::python;
use crate::render::Stops;
use crate::{Code, Result};
use serde_json::{Map, Value};
use std::ops::Range;

/// The position of an answer's first mark.
#[derive(Clone, Copy)]
struct Own {
    at: usize,
    outer: usize,
    /// True if it is the opening mark of content, not of a tool call.
    content: bool,
}

impl Proof<'_> {
    /// The largest set of marks without which the marked rendering is byte-equal to the plain one.
    pub fn marks(&self) -> Option<Marks> {
        ATTEMPTS.into_iter().find_map(|which| {
            let padded = self.space.and_then(|space| self.attempt(which, Some(space)));
            match padded {
                Some(Ok(marks)) => Some(marks),
                // No field has white space around it, so a placeholder makes no difference.
                Some(Err(false)) => None,
                Some(Err(true)) | None => self.attempt(which, None)?.ok(),
            }
        })
    }

    /// Tries one set of marks. `None` if there is nothing to mark; an error if the template does not render
    /// the same text, with whether any field has white space around it.
    fn attempt(&self, which: Fields, space: Option<char>) -> Option<Result<Marks, bool>> {
        let mut messages = self.messages.clone();
        let mut fields = Vec::new();
        for (i, message) in messages.iter_mut().enumerate() {
            let assistant = is_assistant(message);
            let Some(message) = message.as_object_mut() else { continue };
            if !assistant && !which.prompts {
                continue;
            }
            let (plane, reasoning) = (self.plane, false);
            let wrap = Wrap { plane, space, message: i, reasoning, open: which.open, thoughts: false };
            for key in ["content", "reasoning_content", "thinking", "reasoning"] {
                if let Some(value) = message.get_mut(key) {
                    let reasoning = key != "content";
                    let wrap = Wrap { reasoning, thoughts: assistant && !reasoning, ..wrap };
                    wrap.wrap(value, false, &mut fields);
                }
            }
            if which.tools && assistant {
                for call in message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten()
                {
                    let function = match call.get("function") {
                        Some(_) => &mut call["function"],
                        None => call,
                    };
                    for key in ["name", "arguments"] {
                        if let Some(value) = function.get_mut(key) {
                            wrap.wrap(value, true, &mut fields);
                        }
                    }
                }
            }
        }
        if fields.is_empty() {
            return None;
        }
        let spaced = fields.iter().any(|f| !f.head.is_empty() || !f.tail.is_empty());
        let messages: Vec<minijinja::Value> =
            messages.iter().filter_map(Value::as_object).map(context::message).collect();
        let Ok(marked) = self.render(&messages, false) else { return Some(Err(spaced)) };
        let (stripped, falls) = strip_fields(&marked, self.plane, &fields, space);
        // If the closing mark comes first, the template reversed the field or took it apart.
        let mut closed = std::collections::HashSet::new();
        let mut opened = std::collections::HashSet::new();
        for fall in &falls {
            if fall.close {
                closed.insert(fall.field);
            } else if opened.insert(fall.field) && closed.contains(&fall.field) {
                return Some(Err(spaced));
            }
        }
        let same = stripped == self.text;
        Some(same.then(|| Marks::new(fields, falls, which, space, messages)).ok_or(spaced))
    }

    /// True if a message has content.
    fn has_content(message: &Value) -> bool {
        match &message["content"] {
            Value::String(text) => !python::core(text).is_empty(),
            Value::Array(parts) => parts.iter().any(|part| match &part["text"] {
                Value::String(text) => !python::core(text).is_empty(),
                _ => false,
            }),
            _ => false,
        }
    }

    /// True if a prompt between answer `i` and the next may contain a stop token, or a part of one at an end.
    fn stop_follows(&self, i: usize, stops: &Stops) -> bool {
        fn types(value: &Value, stop: &str) -> bool {
            let part = |text: &str| {
                let mut cuts = (1..stop.len()).filter(|at| stop.is_char_boundary(*at));
                cuts.any(|at| text.ends_with(&stop[..at]) || text.starts_with(&stop[at..]))
            };
            match value {
                Value::String(text) => text.contains(stop) || part(text) || part(text.trim()),
                Value::Array(list) => list.iter().any(|value| types(value, stop)),
                Value::Object(map) => map.iter().any(|(key, value)| key != "role" && types(value, stop)),
                _ => false,
            }
        }
        let stops: Vec<&String> = stops.all.iter().filter(|stop| !stop.is_empty()).collect();
        let mut following = self.messages[i + 1..].iter().take_while(|message| !is_assistant(message));
        following.any(|message| stops.iter().any(|stop| types(message, stop)))
    }

    fn first_stop(&self, range: Range<usize>, stops: &Stops) -> Option<Range<usize>> {
        let text = self.text.get(range.clone())?;
        let all = stops.all.iter().filter(|s| !s.is_empty());
        all.filter_map(|s| text.find(s.as_str()).map(|at| (at, s.len())))
            .min_by_key(|&(at, len)| (at, std::cmp::Reverse(len)))
            .map(|(at, len)| range.start + at..range.start + at + len)
    }

    /// The end of the generation prompt, found from the last mark of message `i - 1`, which is at the same
    /// place in the rendering of the whole conversation.
    fn local_start(&self, i: usize, marks: Option<&Marks>, cursor: usize) -> Option<usize> {
        let marks = marks?;
        let before = i.checked_sub(1)?;
        let mark_end =
            marks.of(before).filter(|f| f.close).map(|f| f.outer).max().filter(|at| *at == cursor)?;
        let (marked, plain) = if self.is_far(i) {
            let window = self.window(i);
            let of = |messages: &[minijinja::Value]| -> Vec<_> {
                window.iter().map(|at| messages[*at].clone()).collect()
            };
            self.evidence.borrow_mut().others = true;
            (self.render(&of(&marks.messages), true).ok()?, self.render(&of(&self.plain), true).ok()?)
        } else {
            (self.render(&marks.messages[..i], true).ok()?, self.prefix(i, true)?)
        };
        let (text, falls) = strip_fields(&marked, self.plane, &marks.fields, marks.space);
        // This is what the model sees at inference, so the marks must not change it.
        if plain != text {
            return None;
        }
        let own = falls.iter().filter(|f| f.close && marks.fields[f.field].message == before);
        let tail = &text[own.map(|f| f.outer).max()?..];
        self.text[mark_end..].starts_with(tail).then_some(mark_end + tail.len())
    }

    /// The byte at which any answer in place of message `i` would start: the rendering with substituted content is
    /// equal up to that content.
    fn other_start(&self, i: usize) -> Option<usize> {
        let substitute = mark(self.plane, 0)?;
        let mut message = Map::new();
        message.insert("role".into(), self.messages[i]["role"].clone());
        message.insert("content".into(), substitute.to_string().into());
        let mut messages = self.plain.clone();
        messages[i] = context::message(&message);
        // The template may require a tool call before the messages that follow.
        let rendered = self.reworded(&messages).or_else(|_| self.reworded(&messages[..=i])).ok()?;
        let at = rendered.find(substitute)?;
        self.text.starts_with(&rendered[..at]).then_some(at)
    }

    /// True if the text after byte `end` also follows a substituted content of message `i`, so that none of
    /// the content is after it.
    fn ends_at(&self, i: usize, end: usize) -> bool {
        let other = || {
            let substitute = mark(self.plane, 0)?;
            let mut message = self.messages[i].as_object()?.clone();
            message.insert("content".into(), substitute.to_string().into());
            let mut messages = self.plain.clone();
            messages[i] = context::message(&message);
            let rendered = self.reworded(&messages).ok()?;
            let at = rendered.rfind(substitute)?;
            Some(rendered[at + substitute.len_utf8()..] == self.text[end..])
        };
        other().unwrap_or(false)
    }

    /// The length of the model's input before the answer of message `i`, if the conversation starts with it.
    pub fn given(&self, i: usize) -> Option<usize> {
        let with = self.prefix(i, true)?;
        (!with.is_empty() && self.text.starts_with(&with)).then_some(with.len())
    }

    /// Reports an answer before which the model will get a different input at inference (G001).
    fn find_unprompted(&mut self, turns: &[Turn]) {
        // There is no input before the first message.
        let mut learned = turns.iter().map(|turn| turn.message).filter(|i| *i > 0);
        let unprompted = |i: &usize| {
            self.weight(*i).is_some_and(|w| w > 0.0) && !self.is_far(*i) && self.given(*i).is_none()
        };
        let Some(i) = learned.find(unprompted) else {
            return;
        };
        let why = match self.prefix(i, true) {
            Some(_) => "are not the start of the conversation",
            None => "are rejected by the template",
        };
        let message = format!("message {i}: the messages before it with the generation prompt {why}");
        self.find(i, Code::G001, message);
    }

    /// The start of the answer of message `i`, which is the end of its generation prompt. `own`: its first mark.
    /// `None` if there is nothing to supervise.
    ///
    /// Each of these is a proof: the bytes before the start are those that the model sees at inference (from
    /// the start of the text, or from the last mark before it); or they are the same before any other answer;
    /// or the start is the opening mark of the answer's content.
    fn start(
        &self,
        i: usize,
        cursor: usize,
        own: Option<Own>,
        only_close: bool,
        marks: Option<&Marks>,
        stops: &Stops,
    ) -> Result<Option<usize>> {
        let upper = own.map_or(self.text.len(), |own| own.at);
        let inside = |at: &usize| (cursor..=upper).contains(at);
        let with = self.prefix(i, true).unwrap_or_default();
        let prompted = || self.setup.habits.prompts || with != self.prefix(i, false).unwrap_or_default();
        let whole = self.given(i).filter(|at| *at >= cursor);
        // The generation prompt may contain the beginning of the answer's text.
        if let Some(at) = whole.filter(|at| !inside(at) && prompted()) {
            return Ok(Some(at));
        }
        if let Some(at) = whole.or_else(|| self.local_start(i, marks, cursor)).filter(inside) {
            if own.is_some_and(|own| own.content && !only_close && at == own.outer) || prompted() {
                return Ok(Some(at));
            }
            // The template has no generation prompt: the text before the content may be a header.
            match own {
                Some(own) if own.content && !self.text[at..own.outer.max(at)].trim().is_empty() => {
                    return Ok(Some(own.outer));
                }
                // Only the end of the content is known: a header before it cannot be distinguished from it.
                Some(own) if only_close && !self.text[at..own.at].trim().is_empty() => {
                    return Err(
                        self.error(format!("message {i}: the template changes where its content starts"))
                    );
                }
                Some(_) => return Ok(Some(at)),
                None => {
                    let rest = self.text[at..].trim_start();
                    if stops.all.iter().any(|s| !s.is_empty() && rest.starts_with(s.as_str())) {
                        return Ok(Some(at));
                    }
                }
            }
        }
        match own {
            // What the generation prompt contains beyond the header (such as an opened thought) is not in the
            // history.
            Some(own) if own.content && !only_close => return Ok(Some(own.outer)),
            None if Self::has_content(&self.messages[i]) => {}
            _ => {
                // Some templates write more white space for the model than in the history.
                let shown = with.trim_end();
                let header = || shown.len() > self.prefix(i, false).unwrap_or_default().trim_end().len();
                let trimmed = || (self.text.starts_with(shown) && header()).then_some(shown.len());
                if let Some(at) = self.other_start(i).or_else(trimmed).filter(inside) {
                    return Ok(Some(at));
                }
                if own.is_none() {
                    return Ok(None);
                }
            }
        }
        let message = format!(
            "message {i}: its position cannot be proved. The template changes its text, and the rendering of the messages \
             before it with the generation prompt is not a prefix of the whole ({})",
            difference(&with, &self.text)
        );
        Err(self.error(message))
    }

    /// The responses of a template without `{% generation %}` blocks.
    pub fn turns(&mut self, marks: Option<&Marks>, stops: &Stops) -> Result<Vec<Turn>> {
        let mut turns = Vec::new();
        let mut cursor = 0;
        for i in 0..self.messages.len() {
            if !is_assistant(&self.messages[i]) {
                // The next answer comes after this message.
                if let Some(m) = marks {
                    let last = m.of(i).filter(|f| f.close).map(|f| f.outer).filter(|at| *at >= cursor).max();
                    // Mistral's template renders a system message later than its position, so these do not
                    // count.
                    if role(&self.messages[i]) != "system" {
                        cursor = cursor.max(last.unwrap_or(0));
                    }
                }
                continue;
            }
            let mut own: Vec<Fall> =
                marks.map_or(Vec::new(), |m| m.of(i).filter(|f| f.at >= cursor).copied().collect());
            // A field may be rendered again later (the name of a call with its result); only the first is the
            // answer's.
            let mut seen = std::collections::HashSet::new();
            own.retain(|f| seen.insert((f.field, f.close)));
            if marks.is_some() && own.is_empty() && Self::has_content(&self.messages[i]) {
                return Err(self.error(format!("message {i}: the template does not render its content")));
            }
            // If only the end of its content is marked, its start is searched before that.
            let only_close = own.first().is_some_and(|f| f.close);
            let first = own.first().map(|f| Own {
                at: f.at,
                outer: if f.close { f.at } else { f.outer.max(cursor) },
                content: !f.close && marks.is_some_and(|m| !m.fields[f.field].tool),
            });
            let Some(start) = self.start(i, cursor, first, only_close, marks, stops)? else { continue };
            if only_close && first.is_some_and(|f| f.at == start) {
                return Err(self.error(format!("message {i}: the template changes where its content starts")));
            }
            let inner = own.last().map_or(start, |f| f.at).max(start);
            let content_end = own.last().map_or(start, |f| if f.close { f.outer } else { f.at }).max(start);
            if only_close && !self.ends_at(i, content_end) {
                return Err(self.error(format!("message {i}: the template takes its content apart")));
            }
            let after = marks.and_then(|m| {
                // The falls are in the order of the text.
                let later = &m.falls[m.falls.partition_point(|f| f.at <= inner)..];
                later.iter().find(|f| m.fields[f.field].message > i).map(|f| f.at)
            });
            // Unmarked text may itself contain a stop token; then the first stop token proves nothing.
            let own_vouched =
                marks.is_some_and(|m| m.which.tools || self.messages[i]["tool_calls"].is_null());
            let stop_follows = !marks.is_some_and(|m| m.which.prompts) && self.stop_follows(i, stops);
            let vouched = own_vouched && !stop_follows;
            let whole = if vouched { None } else { self.prefix(i + 1, false) };
            let whole =
                whole.filter(|w| self.text.starts_with(w.as_str()) && w.len() >= start).map(|w| w.len());
            if !own_vouched {
                let message = self.messages[i].to_string();
                if stops.all.iter().any(|s| !s.is_empty() && message.contains(s.as_str())) {
                    let message = format!("message {i} types a stop token, and its end cannot be proved");
                    return Err(self.error(message));
                }
            }
            let last = i + 1 == self.messages.len();
            if !vouched && whole.is_none() && !last && (stop_follows || after.is_none()) {
                let shorter = self.prefix(i + 1, false).unwrap_or_default();
                let message = format!(
                    "message {i}: its end cannot be proved; the rendering up to it is not a prefix of the whole ({})",
                    difference(&shorter, &self.text)
                );
                return Err(self.error(message));
            }
            let upper = after.unwrap_or(self.text.len());
            let upper = whole.filter(|_| stop_follows).map_or(upper, |whole| whole.min(upper));
            let stop = self.first_stop(content_end.min(upper)..upper, stops);
            // A call ends in unmarked text: numbers, or brackets of the template. Without a stop token after
            // it, the rendering up to this message shows its end.
            let calls = whole.is_none() && stop.is_none() && !self.messages[i]["tool_calls"].is_null();
            let whole = match calls.then(|| self.prefix(i + 1, false)).flatten() {
                Some(up_to) if self.text.starts_with(up_to.as_str()) => {
                    Some(up_to.trim_end().len().max(content_end))
                }
                _ => whole,
            };
            let end = stop.as_ref().map_or_else(|| whole.unwrap_or(content_end).min(upper), |s| s.start);
            cursor = stop.as_ref().map_or(end, |s| s.end);
            let from = first.filter(|own| own.at < start).map_or(start, |own| own.outer.min(start));
            turns.push(Turn { message: i, from, start, end, stop });
        }
        self.find_unprompted(&turns);
        Ok(turns)
    }

    /// The responses of a template with `{% generation %}` blocks.
    pub fn generation(&mut self, marks: Option<&Marks>, stops: &Stops) -> Result<Vec<Turn>> {
        let pair = (mark(self.plane, 0), mark(self.plane, 1));
        let (Some(open), Some(close)) = pair else { return Err(self.error("no marks")) };
        let Setup { template, variables, .. } = self.setup;
        let marked = template
            .render_with(variables, self.c, &self.plain, false, Some((open, close)))
            .map_err(|e| self.error(e.to_string()))?;
        let (stripped, falls) = strip(&marked, self.plane);
        let paired = falls.chunks(2).all(|p| matches!(p, [(_, 0), (_, 1)]));
        if stripped != self.text || !paired {
            let what = difference(&stripped, &self.text);
            return Err(self.error(format!("the template alters its own {{% generation %}} blocks ({what})")));
        }
        self.evidence.borrow_mut().marked = Some((marked, (open, close)));
        let blocks: Vec<Range<usize>> = falls.chunks(2).map(|p| p[0].0..p[1].0).collect();
        let answers: Vec<usize> =
            (0..self.messages.len()).filter(|&i| is_assistant(&self.messages[i])).collect();
        let mut turns = Vec::new();
        for (k, block) in blocks.iter().enumerate() {
            let inside = marks.and_then(|m| {
                let first = m.falls.get(m.falls.partition_point(|f| f.at < block.start));
                first.filter(|f| f.at <= block.end).map(|f| m.fields[f.field].message)
            });
            let by_count = (blocks.len() == answers.len()).then(|| answers[k]);
            let inside = inside.filter(|i| is_assistant(&self.messages[*i]));
            let message = match by_count.or(inside) {
                Some(message) => message,
                None => self.message_of_block(&answers, turns.last().map(|t: &Turn| t.message))?,
            };
            // The stop token of the block is the last one in it; an earlier one is content.
            let text = &self.text[block.clone()];
            let found = stops.all.iter().filter(|s| !s.is_empty());
            let found = found.filter_map(|s| text.rfind(s.as_str()).map(|at| (at + s.len(), s.len()))).max();
            let content_end = marks.and_then(|m| {
                let own = &m.falls[m.falls.partition_point(|f| f.at < block.start)..];
                let own = own.iter().take_while(|f| f.at <= block.end).filter(|f| f.close);
                own.map(|f| f.at - block.start).max()
            });
            let found = found.filter(|(end, len)| content_end.is_none_or(|c| end - len >= c));
            let stop = found.map(|(end, len)| block.start + end - len..block.start + end);
            if stop.as_ref().is_some_and(|s| s.end < block.end) {
                let turn = message;
                let message = format!(
                    "message {message}: its {{% generation %}} block covers text after the stop token"
                );
                self.find(turn, Code::M007, message);
            }
            turns.push(Turn {
                message,
                from: block.start,
                start: block.start,
                end: stop.as_ref().map_or(block.end, |s| s.start),
                stop: stop.clone(),
            });
            if let Some(stop) = stop.filter(|s| s.end < block.end) {
                let (from, end) = (stop.end, block.end);
                turns.push(Turn { message, from, start: from, end, stop: None });
            }
        }
        // If marks changed the rendering, an answer without text in it has nothing in its blocks.
        let missing = |i: &usize| match marks {
            Some(marks) => marks.of(*i).next().is_none(),
            None => turns.iter().all(|t| t.message != *i || self.text[t.start..t.end].trim().is_empty()),
        };
        let unseen = |i: &&usize| Self::has_content(&self.messages[**i]) && missing(i);
        if let Some(i) = answers.iter().find(unseen) {
            return Err(self.error(format!("message {i}: the template does not render its content")));
        }
        if let Some(turn) = turns.first()
            && self.covers_header(turn, marks)
        {
            let i = turn.message;
            let message = format!("message {i}: its {{% generation %}} block covers the role header");
            self.find(i, Code::M007, message);
        }
        self.find_unprompted(&turns);
        Ok(turns)
    }

    /// The message of a block without text of any message, after the block of message `last`: that message again
    /// (a block for its EOS) or the next answer. The choice matters only if their weights differ.
    fn message_of_block(&self, answers: &[usize], last: Option<usize>) -> Result<usize> {
        let next = answers.iter().copied().find(|i| last.is_none_or(|last| *i > last));
        match (last, next) {
            (Some(last), Some(next)) if self.weight(last) != self.weight(next) => {
                let message = format!(
                    "a {{% generation %}} block may belong to message {last} or to message {next}, and these have different \
                     weights"
                );
                Err(self.error(message))
            }
            _ => last.or(next).ok_or_else(|| self.error("a {% generation %} block without an answer")),
        }
    }

    /// True if a response starts with text of its generation prompt.
    fn covers_header(&self, turn: &Turn, marks: Option<&Marks>) -> bool {
        let Some(with) = self.prefix(turn.message, true) else { return false };
        let own = marks.and_then(|m| m.of(turn.message).map(|f| f.outer).find(|at| *at >= turn.start));
        let limit = own.unwrap_or(turn.end).min(turn.end);
        let shared = with.bytes().zip(self.text.bytes()).take_while(|(a, b)| a == b).count();
        shared.min(limit) > turn.start
    }
}

/// The first byte at which two texts differ, and the text there, for messages.
fn difference(a: &str, b: &str) -> String {
    let at = a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
    let show = |text: &str| {
        let start = text.floor_char_boundary(at);
        text[start..].chars().take(24).collect::<String>()
    };
    format!("at byte {at}: {:?} against {:?}", show(a), show(b))
}

//! The ids before messages and after answers, derived from small conversations with proved turns.

use super::{BEGINS, CLOSES, Kind, OPENS, Opener, STOPS, Turns};
use crate::audit::foreign::WrittenStops;
use crate::example::Conversation;
use crate::policy::{Boundary, Policy};
use crate::render::Stops;
use crate::template::{ChatRenderer, ChatTemplate, TemplateOptions};
use crate::tokens::{Special, Tokenizer};
use crate::{Origin, RowId};
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

/// Starts and ends of the message texts; they vary so that the tokens at the edges do too.
const EDGES: [(&str, &str); 4] =
    [("Kiwi", "seven"), ("(2) vier", "noch eins!"), ("\"Quote", "end\"?"), ("日本", "語。")];

/// Starts that some tokenizers merge with the end of a header.
const ODD: [(&str, &str); 3] = [("\nnew", "x"), (" space", "x"), ("\n\nnew", "x")];

/// A conversation as ids.
struct Probe {
    ids: Vec<u32>,
    origins: Vec<Origin>,
    /// Its texts begin with ordinary characters.
    regular: bool,
}

/// A conversation with these roles: `s`ystem, `u`ser, `a`nswer, `r`easoned answer, tool `c`all, `t`ool.
fn conversation(
    roles: &str,
    (head, tail): (&str, &str),
    tools: bool,
    kwargs: Option<(&str, bool)>,
) -> Conversation {
    let message = |(i, role): (usize, char)| {
        let text = format!("{head} {role}{i} {tail}");
        let value = match role {
            's' => json!({"role": "system", "content": text}),
            'u' => json!({"role": "user", "content": text}),
            'r' => {
                json!({"role": "assistant", "content": text, "reasoning_content": format!("{head} thought {i}")})
            }
            'c' => {
                json!({"role": "assistant", "content": "", "tool_calls": [{"id": "call00000", "type": "function",
                "function": {"name": "look", "arguments": {"what": text}}}]})
            }
            't' => json!({"role": "tool", "content": text, "name": "look", "tool_call_id": "call00000"}),
            _ => json!({"role": "assistant", "content": text}),
        };
        value.as_object().cloned().unwrap_or_default()
    };
    let messages: Vec<Map<String, Value>> = roles.chars().enumerate().map(message).collect();
    let tool = json!({"type": "function", "function": {"name": "look", "description": "Looks.",
        "parameters": {"type": "object", "properties": {"what": {"type": "string"}}}}});
    Conversation {
        weights: vec![None; messages.len()],
        messages,
        tools: tools.then(|| vec![tool]),
        kwargs: kwargs.into_iter().map(|(name, value)| (name.to_string(), value.into())).collect(),
        ..Conversation::default()
    }
}

/// The conversations that the template renders and whose turns are proved.
fn probes(renderer: &ChatRenderer, tokenizer: &Tokenizer, policy: &Policy) -> Vec<Probe> {
    let shapes = [
        ("uaua", false, None),
        ("suaua", false, None),
        ("ua", false, None),
        ("aua", false, None),
        ("ucta", true, None),
        ("suctaua", true, None),
        ("ucta", false, None),
        ("ruru", false, None),
        ("urur", false, None),
        ("uaua", false, Some(("enable_thinking", false))),
        ("uaua", false, Some(("enable_thinking", true))),
    ];
    let mut out: Vec<Probe> = Vec::new();
    let id = RowId::new(Path::new("probe"), 0, None);
    for (roles, tools, kwargs) in shapes {
        let odd = ODD.iter().filter(|_| roles == "suaua" || roles == "uaua" && kwargs.is_none());
        let edges = EDGES.iter().map(|edge| (edge, true)).chain(odd.map(|edge| (edge, false)));
        for (edge, regular) in edges {
            let c = conversation(roles, *edge, tools, kwargs);
            let Ok(chat) = renderer.spans(id.clone(), &c) else { continue };
            for boundary in [Boundary::Split, Boundary::Joint] {
                let policy = Policy { boundary, ..policy.clone() };
                let Ok(encoded) = tokenizer.encode(&chat.rendered, &policy) else { continue };
                let mut probe = Probe { ids: encoded.tokens.ids, origins: encoded.tokens.origins, regular };
                demote(&mut probe.origins);
                if !out.iter().any(|other| other.ids == probe.ids && other.origins == probe.origins) {
                    out.push(probe);
                }
            }
        }
    }
    out
}

/// Changes the tokens of a `{% generation %}` block after its stop token to scaffold: no message begins there.
fn demote(origins: &mut [Origin]) {
    let mut ended = None;
    for origin in origins {
        match *origin {
            Origin::EndOfTurn { turn } => ended = Some(turn),
            Origin::Response { turn } if ended == Some(turn) => *origin = Origin::Scaffold,
            _ => {}
        }
    }
}

/// The kind of the message that begins at token `at`, or after scaffold there.
fn kind_at(probe: &Probe, at: usize) -> Option<Kind> {
    match probe.origins[at.min(probe.ids.len())..].iter().find(|origin| **origin != Origin::Scaffold)? {
        // An empty answer.
        Origin::EndOfTurn { .. } => Some(Kind::Answer),
        other => Kind::of(*other),
    }
}

/// For each message, its kind and the tokens before it.
fn befores(probe: &Probe) -> impl Iterator<Item = (Kind, &[u32])> {
    let begins = |i: &usize| {
        let kind = Kind::of(probe.origins[*i]);
        kind.is_some() && (*i == 0 || probe.origins[*i - 1] != probe.origins[*i])
    };
    (0..probe.ids.len()).filter(begins).filter_map(|i| {
        let outside = |origin: &&Origin| matches!(origin, Origin::Scaffold | Origin::EndOfTurn { .. });
        let length = probe.origins[..i].iter().rev().take_while(outside).count();
        Some((Kind::of(probe.origins[i])?, &probe.ids[i - length..i]))
    })
}

/// True if these ids always precede messages of this kind, and occur nowhere else.
fn distinctive(ids: &[u32], probes: &[Probe], is: impl Fn(Kind) -> bool) -> bool {
    !ids.is_empty()
        && probes.iter().all(|probe| {
            let mut places = probe.ids.windows(ids.len()).enumerate().filter(|(_, window)| *window == ids);
            places.all(|(at, _)| kind_at(probe, at + ids.len()).is_some_and(&is))
        })
}

/// The longest common suffix of these ids.
fn common_end(lists: &[&[u32]]) -> Vec<u32> {
    let Some((first, rest)) = lists.split_first() else { return Vec::new() };
    let shared =
        |other: &&&[u32]| first.iter().rev().zip(other.iter().rev()).take_while(|(a, b)| a == b).count();
    let length = rest.iter().map(|other| shared(&other)).min().unwrap_or(first.len());
    first[first.len() - length..].to_vec()
}

impl Turns {
    /// The turns of a template for a tokenizer.
    ///
    /// # Errors
    /// A sentence that explains why ids do not determine the turns.
    pub fn of(
        template: &Arc<ChatTemplate>,
        tokenizer: &Tokenizer,
        policy: &Policy,
        special: &Special,
        stops: &Stops,
    ) -> Result<Turns, String> {
        let policy = Policy {
            template_kwargs: policy.template_kwargs.clone(),
            template_date: policy.template_date.clone(),
            section_markers: policy.section_markers.clone(),
            ..Policy::default()
        };
        let options = TemplateOptions::of(&policy);
        let renderer = ChatRenderer::new(template.clone(), policy.clone(), stops, &options);
        let probes = probes(&renderer, tokenizer, &policy);
        if probes.is_empty() {
            return Err("the template renders none of the conversations that it was tried on".into());
        }
        let mut turns = Turns::default();
        turns.find_openers(&probes, tokenizer);
        turns.find_ends(&probes, tokenizer, special);
        turns.index(special);
        for probe in probes.iter().filter(|probe| probe.regular) {
            let learned = |i: usize| probe.origins[i].supervised();
            let found = turns.find(&probe.ids, |_| true, learned);
            let same = found.as_ref().is_some_and(|found| {
                found.origins.iter().zip(&probe.origins).all(|(a, b)| a.supervised() == b.supervised())
                    && found.part.restarts.is_empty()
                    && !found.part.inside
            });
            if !same {
                let text = tokenizer.decode(&probe.ids, false);
                let text: String = text.chars().take(160).collect();
                return Err(format!("its role headers are not told from text by ids (tried on {text:?})"));
            }
        }
        let header = |kind: Kind| {
            let opener = turns.openers.iter().rfind(|opener| opener.kind == kind && opener.exact)?;
            Some(tokenizer.decode(&opener.ids, false))
        };
        turns.headers = header(Kind::User).zip(header(Kind::Answer));
        Ok(turns)
    }

    /// Derives the headers: the shortest run of tokens that begins with a structural token and precedes messages
    /// of only one kind; if a template writes only text, the common suffix of all its headers of a kind.
    fn find_openers(&mut self, probes: &[Probe], tokenizer: &Tokenizer) {
        let structural = |id: &u32| tokenizer.is_structural(*id);
        let mut plain: Vec<(Kind, Vec<&[u32]>)> = Vec::new();
        let mut add = |ids: Vec<u32>, kind: Kind, exact: bool| {
            let begins = ids.first().is_some_and(structural);
            match self.openers.iter_mut().find(|opener| opener.ids == ids) {
                Some(known) => {
                    known.exact |= exact;
                    if known.kind != kind {
                        known.kind = Kind::Prompt;
                    }
                }
                None => self.openers.push(Opener { ids, kind, structural: begins, exact }),
            }
        };
        // Most messages have the same ids before them.
        let mut judged: HashMap<(Vec<u32>, Kind), bool> = HashMap::new();
        let mut fits = |ids: &[u32], kind: Kind| {
            let is = |other: Kind| if kind == Kind::Prompt { other != Kind::Answer } else { other == kind };
            *judged.entry((ids.to_vec(), kind)).or_insert_with(|| distinctive(ids, probes, is))
        };
        for probe in probes {
            for (kind, before) in befores(probe) {
                let cuts = (0..before.len()).rev().filter(|&at| structural(&before[at]));
                let all: Vec<&[u32]> = cuts.map(|at| &before[at..]).collect();
                if all.is_empty() {
                    match plain.iter_mut().find(|(other, _)| *other == kind) {
                        Some((_, list)) => list.push(before),
                        None => plain.push((kind, vec![before])),
                    }
                    continue;
                }
                let wider = if kind == Kind::Answer { kind } else { Kind::Prompt };
                let found = [kind, wider].into_iter().find_map(|kind| {
                    let ids = all.iter().find(|ids| fits(ids, kind))?;
                    Some((ids.to_vec(), kind))
                });
                if let Some((ids, kind)) = found {
                    add(ids, kind, probe.regular);
                }
            }
        }
        for (kind, list) in plain {
            let end = common_end(&list);
            let is = |other: Kind| other == kind;
            if distinctive(&end, probes, is) {
                add(end, kind, true);
            } else {
                for ids in list.into_iter().filter(|ids| distinctive(ids, probes, is)) {
                    add(ids.to_vec(), kind, true);
                }
            }
        }
        self.openers.sort_by(|a, b| b.ids.len().cmp(&a.ids.len()).then(a.ids.cmp(&b.ids)));
    }

    /// Derives the ends of answers and of prompt texts, and the starts of conversations.
    fn find_ends(&mut self, probes: &[Probe], tokenizer: &Tokenizer, special: &Special) {
        let mut written = WrittenStops { any: false, last: true };
        for probe in probes {
            let n = probe.ids.len();
            for i in 1..n {
                let (before, here) = (probe.origins[i - 1], probe.origins[i]);
                let stop = matches!(here, Origin::EndOfTurn { .. }) && before != here;
                if stop {
                    written.any = true;
                    let length = probe.origins[i..].iter().take_while(|origin| **origin == here).count();
                    self.stops.push(probe.ids[i..i + length].to_vec());
                }
                let closes = matches!(before, Origin::Prompt { .. }) && here == Origin::Scaffold;
                if let (true, Some(kind)) =
                    (closes && tokenizer.is_structural(probe.ids[i]), Kind::of(before))
                {
                    self.closers.push((kind, probe.ids[i]));
                    self.closers.push((Kind::Prompt, probe.ids[i]));
                }
            }
            let last = probe.origins.iter().rposition(|origin| origin.supervised());
            written.last &= last.is_none_or(|i| matches!(probe.origins[i], Origin::EndOfTurn { .. }));
            self.starts.extend(probe.ids.first());
            // A BOS that is missing because of the tools.
            if probe.ids.first().copied() == special.bos {
                self.starts.extend(probe.ids.get(1));
            }
        }
        self.starts.extend(special.bos);
        let known = special.stops.iter().filter(|id| tokenizer.is_structural(**id));
        self.stops.extend(known.map(|id| vec![*id]));
        self.stops.sort_unstable();
        self.stops.dedup();
        self.starts.sort_unstable();
        self.starts.dedup();
        self.closers.sort_unstable();
        self.closers.dedup();
        self.written = written;
        let inside = |probe: &Probe, bos: u32| probe.ids.iter().skip(1).any(|id| *id == bos);
        let bos = special.bos.filter(|bos| {
            probes.iter().any(|probe| probe.ids.first() == Some(bos))
                && !probes.iter().any(|p| inside(p, *bos))
        });
        if let Some(bos) = bos {
            self.flag(bos, BEGINS);
        }
    }

    fn index(&mut self, special: &Special) {
        let opens: Vec<u32> = self.openers.iter().filter_map(|opener| opener.ids.first().copied()).collect();
        opens.iter().for_each(|&id| self.flag(id, OPENS));
        self.closers.clone().iter().for_each(|&(_, id)| self.flag(id, CLOSES));
        self.stops.clone().iter().for_each(|stop| self.flag(stop[0], STOPS));
        // If BOS and a stop token are one id, it does not mark a beginning.
        if let Some(bos) = special.bos.filter(|bos| self.stops.contains(&vec![*bos])) {
            self.flags[bos as usize] &= !BEGINS;
        }
    }

    fn flag(&mut self, id: u32, flag: u8) {
        let at = id as usize;
        if self.flags.len() <= at {
            self.flags.resize(at + 1, 0);
        }
        self.flags[at] |= flag;
    }
}

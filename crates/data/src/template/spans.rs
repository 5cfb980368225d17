//! Proves the spans of one conversation.

use super::context::REASONING;
use super::marks::{PLANE, PLANES, SPACES};
use super::proof::{Chat, Evidence, Proof, Setup, near};
use crate::example::Conversation;
use crate::{Error, Result, RowId};
use serde_json::{Map, Value};
use std::cell::RefCell;

/// Messages as transformers passes them to the template.
fn normalise(messages: &[Map<String, Value>]) -> Vec<Value> {
    let one = |message: &Map<String, Value>| {
        let mut message: Map<String, Value> =
            message.iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.clone(), v.clone())).collect();
        let reasoning = REASONING.iter().find_map(|k| message.get(*k));
        if let Some(reasoning) = reasoning.cloned() {
            for key in &REASONING[..2] {
                message.entry(*key).or_insert_with(|| reasoning.clone());
            }
        }
        Value::Object(message)
    };
    messages.iter().map(one).collect()
}

/// Proves the spans of a conversation, given its messages as the template sees them and their rendering.
///
/// # Errors
/// [`Error::Row`] if there is no proof.
pub(super) fn prove(
    setup: &Setup,
    id: RowId,
    c: &Conversation,
    plain: Vec<minijinja::Value>,
    text: String,
) -> Result<Chat> {
    prove_with_evidence(setup, id, c, plain, text).map(|(chat, _)| chat)
}

/// As [`prove`], with the renderings that the proof relies on.
///
/// # Errors
/// As [`prove`].
pub(super) fn prove_with_evidence(
    setup: &Setup,
    id: RowId,
    c: &Conversation,
    plain: Vec<minijinja::Value>,
    text: String,
) -> Result<(Chat, Evidence)> {
    let messages = normalise(&c.messages);
    let all = serde_json::to_string(&messages).unwrap_or_default();
    let Some(plane) = PLANES.into_iter().find(|plane| {
        let used = |ch: char| (*plane..plane + PLANE).contains(&(ch as u32));
        !text.contains(used) && !all.contains(used)
    }) else {
        let message = "the conversation uses characters of both supplementary private-use planes";
        return Err(Error::row(id, message, "remove them"));
    };
    let space = SPACES.into_iter().find(|space| !text.contains(*space) && !all.contains(*space));
    let evidence = RefCell::default();
    let near = near(&messages);
    let mut work =
        Proof { setup, c, messages, plain, text, plane, space, id, evidence, findings: Vec::new(), near };
    let marks = work.marks();
    work.find_vanished(marks.as_ref())?;
    let turns = if setup.template.compiled(c).generation {
        work.generation(marks.as_ref(), &setup.stops)?
    } else {
        work.turns(marks.as_ref(), &setup.stops)?
    };
    let evidence = work.evidence.take();
    Ok((work.tile(turns, marks.as_ref())?, evidence))
}

//! The policy's `columns`: rows whose fields have other names.
//!
//! Each of our names is mapped to a path in the row: a field (`question`), a nested field (`data.question`,
//! `answers.0`), or a field of each entry of a list (`turns.human`). If `prompt` and `completion` are lists, they
//! are the turns of a conversation. Message keys (`role`, `content`, …) have paths in the messages.

use super::messages::LISTS;
use super::reader::shown_keys;
use super::tokenised::MASKS;
use crate::source::Row;
use crate::{Error, Result, RowId};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// Our names that `columns` may map.
pub const COLUMNS: [&str; 30] = [
    "prompt",
    "completion",
    "messages",
    "conversations",
    "system",
    "tools",
    "chat_template_kwargs",
    "instruction",
    "input",
    "output",
    "history",
    "input_text",
    "full_text",
    "segments",
    "chosen",
    "rejected",
    "text",
    "input_ids",
    "labels",
    "completion_mask",
    "assistant_masks",
    "attention_mask",
    "weights",
    "role",
    "content",
    "reasoning_content",
    "tool_calls",
    "tool_call_id",
    "train",
    "weight",
];

/// Those that are message keys.
const OF_MESSAGES: [&str; 7] =
    ["role", "content", "reasoning_content", "tool_calls", "tool_call_id", "train", "weight"];

/// The row with its fields renamed to our names.
pub(super) fn renamed(row: Row, columns: &BTreeMap<String, String>) -> Result<Row> {
    let Row { id, mut fields } = row;
    let labelled = ["labels"].iter().chain(&MASKS).any(|key| fields.contains_key(*key));
    if columns.is_empty()
        || fields.contains_key("input_ids") && labelled && !columns.contains_key("input_ids")
    {
        return Ok(Row { id, fields });
    }
    let (of_messages, own): (Vec<_>, Vec<_>) =
        columns.iter().partition(|(name, _)| OF_MESSAGES.contains(&name.as_str()));
    move_to(&mut fields, &own).map_err(|(name, path)| missing(&id, name, path, &fields))?;
    turns(&id, &mut fields, columns)?;
    if !of_messages.is_empty() {
        let sides = ["prompt", "completion", "chosen", "rejected"];
        for (_, list) in
            fields.iter_mut().filter(|(key, _)| LISTS.iter().chain(&sides).any(|list| key == list))
        {
            for message in list.as_array_mut().into_iter().flatten().filter_map(Value::as_object_mut) {
                // Not every message has every key; a missing role is reported when messages are read.
                let there: Vec<_> =
                    of_messages.iter().filter(|(_, path)| find(message, path).is_some()).copied().collect();
                let _ = move_to(message, &there);
            }
        }
    }
    Ok(Row { id, fields })
}

/// Moves the values at paths to their names, and removes the fields in which the paths begin. The error is the
/// name and the path that was not found.
fn move_to<'a>(
    fields: &mut Map<String, Value>,
    columns: &[(&'a String, &'a String)],
) -> Result<(), (&'a str, &'a str)> {
    let mut found = Vec::with_capacity(columns.len());
    for (name, path) in columns {
        let (root, value) = find(fields, path).ok_or((name.as_str(), path.as_str()))?;
        found.push((root.to_string(), (*name).clone(), value));
    }
    for (root, ..) in &found {
        fields.shift_remove(root);
    }
    for (_, name, value) in found {
        fields.insert(name, value);
    }
    Ok(())
}

/// The value at a path, and the field in which the path begins. A field whose own name contains dots takes precedence.
fn find<'a>(fields: &Map<String, Value>, path: &'a str) -> Option<(&'a str, Value)> {
    if let Some(value) = fields.get(path) {
        return Some((path, value.clone()));
    }
    let cuts = path.char_indices().filter(|(_, c)| matches!(c, '.' | '['));
    cuts.map(|(at, _)| (&path[..at], &path[at..]))
        .find_map(|(root, rest)| Some((root, inside(fields.get(root)?, rest)?)))
}

/// The value at the remaining path: `.name`, `.0`, `[0]`.
fn inside(value: &Value, rest: &str) -> Option<Value> {
    let Some(rest) = rest.strip_prefix(['.', '[']) else {
        return rest.is_empty().then(|| value.clone());
    };
    match value {
        Value::Object(map) => find(map, rest).map(|(_, value)| value),
        Value::Array(list) => {
            let end = rest.find(['.', '[', ']']).unwrap_or(rest.len());
            match rest[..end].parse::<usize>() {
                Ok(index) => inside(list.get(index)?, rest[end..].trim_start_matches(']')),
                Err(_) => {
                    let of = |item: &Value| find(item.as_object()?, rest).map(|(_, value)| value);
                    Some(list.iter().map(of).collect::<Option<_>>()?)
                }
            }
        }
        _ => None,
    }
}

/// Makes a conversation from `prompt` and `completion` that were found in each entry of a list.
fn turns(id: &RowId, fields: &mut Map<String, Value>, columns: &BTreeMap<String, String>) -> Result<()> {
    let texts = |key: &str| {
        let list = fields.get(key).filter(|_| columns.contains_key(key))?.as_array()?;
        list.iter().map(|text| text.as_str().map(str::to_string)).collect::<Option<Vec<_>>>()
    };
    let (Some(prompts), Some(completions)) = (texts("prompt"), texts("completion")) else { return Ok(()) };
    if prompts.len() != completions.len() {
        return Err(Error::row(
            id.clone(),
            format!("there are {} prompts and {} completions", prompts.len(), completions.len()),
            "columns.prompt and columns.completion have to find as many texts",
        ));
    }
    let messages = prompts.into_iter().zip(completions).flat_map(|(prompt, completion)| {
        [json!({"role": "user", "content": prompt}), json!({"role": "assistant", "content": completion})]
    });
    let messages = messages.collect();
    for key in ["prompt", "completion"] {
        fields.shift_remove(key);
    }
    fields.insert("messages".into(), messages);
    Ok(())
}

fn missing(id: &RowId, name: &str, path: &str, fields: &Map<String, Value>) -> Error {
    Error::row(
        id.clone(),
        format!("there is no {path:?}, which columns.{name} names; the row has {}", shown_keys(fields)),
        format!(
            "name the field that holds it: columns.{name}=FIELD; a field inside others is FIELD.INNER, one of a list FIELD.0"
        ),
    )
}

/// Names of prompt fields in published data sets; below, those of a completion, a role and a text.
const PROMPTS: [&str; 10] =
    ["question", "query", "instruction", "problem", "prompt", "input", "user", "human", "source", "request"];
const COMPLETIONS: [&str; 10] = [
    "answer",
    "response",
    "output",
    "completion",
    "assistant",
    "gpt",
    "solution",
    "reply",
    "target",
    "model",
];
const ROLES: [&str; 5] = ["role", "from", "speaker", "author", "sender"];
const TEXTS: [&str; 6] = ["content", "value", "text", "message", "utterance", "body"];

/// A mapping that `columns` could use to read a row of unknown format: our names with paths in the row. `None` if
/// its names are not recognised.
pub(super) fn proposed(fields: &Map<String, Value>) -> Option<Vec<(&'static str, String)>> {
    let pair = |map: &Map<String, Value>, prefix: &str| {
        let text = |names: &[&'static str]| {
            names.iter().copied().find(|name| map.get(*name).is_some_and(Value::is_string))
        };
        let (prompt, completion) = (text(&PROMPTS)?, text(&COMPLETIONS)?);
        Some(vec![("prompt", format!("{prefix}{prompt}")), ("completion", format!("{prefix}{completion}"))])
    };
    pair(fields, "").or_else(|| {
        fields.iter().find_map(|(key, value)| match value {
            Value::Object(map) => pair(map, &format!("{key}.")),
            Value::Array(list) => {
                let first = list.first()?.as_object()?;
                if let Some(found) = pair(first, &format!("{key}.")) {
                    return Some(found);
                }
                let named =
                    |names: &[&'static str]| names.iter().copied().find(|name| first.contains_key(*name));
                let (role, text) = (named(&ROLES)?, named(&TEXTS)?);
                let mut all = vec![("messages", key.clone())];
                if !matches!(role, "role" | "from") {
                    all.push(("role", role.into()));
                }
                if !matches!(text, "content" | "value") {
                    all.push(("content", text.into()));
                }
                Some(all)
            }
            _ => None,
        })
    })
}

/// [`proposed`] as help text.
pub(super) fn proposal(fields: &Map<String, Value>) -> Option<String> {
    let all = proposed(fields)?;
    let joined = |names: &[(&str, &String)]| {
        let keys: Vec<String> = names.iter().map(|(name, path)| format!("columns.{name}={path}")).collect();
        keys.join(" and ")
    };
    let named: Vec<(&str, &String)> = all.iter().map(|(name, path)| (*name, path)).collect();
    Some(match named.as_slice() {
        // A pair of texts, which may also be a conversation.
        [("prompt", prompt), ("completion", completion)] if fields.contains_key(*prompt) => format!(
            "{}; for a conversation under the chat template, {}",
            joined(&named),
            joined(&[("instruction", prompt), ("output", completion)])
        ),
        _ => joined(&named),
    })
}

//! The error for a row of unknown format: its fields, and the fields that it lacks for each format.

use super::columns;
use super::reader::shown_keys;
use super::tokenised::MASKS;
use crate::source::number_of;
use crate::{Error, RowId};
use serde_json::{Map, Value};

/// The fields that each format needs: one from each group.
const NEEDS: [(&str, &[&[&str]]); 9] = [
    ("prompt_completion", &[&["prompt"], &["completion"]]),
    ("messages", &[&["messages"]]),
    ("input_full", &[&["input_text"], &["full_text"]]),
    ("sharegpt", &[&["conversations", "conversation"]]),
    ("alpaca", &[&["instruction"], &["output"]]),
    ("segments", &[&["segments"]]),
    ("text", &[&["text"]]),
    ("preference", &[&["chosen"], &["rejected"]]),
    ("tokenised", &[&["input_ids"], &["labels", MASKS[0], MASKS[1]]]),
];

/// The maximal size of a shown value: characters of a text, entries of a list, fields of an object.
const SHOWN: (usize, usize, usize) = (40, 1, 8);

pub(super) fn unknown(id: &RowId, fields: &Map<String, Value>) -> Error {
    let has = |key: &&str| fields.contains_key(*key);
    let mut formats: Vec<(usize, usize, String)> = Vec::new();
    for (name, needs) in NEEDS {
        let lacking: Vec<String> =
            needs.iter().filter(|keys| !keys.iter().any(has)).map(|keys| one_of(keys)).collect();
        // Its only field is present but has another meaning.
        if lacking.is_empty() {
            continue;
        }
        let line = format!("{name} lacks {}", lacking.join(" and "));
        formats.push((needs.len() - lacking.len(), lacking.len(), line));
    }
    // The nearest format has the most fields present, then the fewest missing; the sort is stable.
    formats.sort_by_key(|(present, lacking, _)| (usize::MAX - present, *lacking));
    let lines: String = formats.iter().map(|(_, _, line)| format!("\n  {line}")).collect();
    let sample = sample(&Value::Object(fields.clone()), 0);
    let mapping = match columns::proposal(fields) {
        Some(columns) => format!("map its fields with {columns}, or name them"),
        None => "name its fields".into(),
    };
    let help =
        format!("the row is {sample}\n{mapping} as one of the formats does, the nearest first:{lines}");
    Error::row(id.clone(), format!("the row is not in a known format; it has {}", shown_keys(fields)), help)
}

fn one_of(keys: &[&str]) -> String {
    let quoted: Vec<String> = keys.iter().map(|key| format!("\"{key}\"")).collect();
    quoted.join(" or ")
}

/// A value as JSON, its texts, lists and objects shortened with `..`.
fn sample(value: &Value, depth: usize) -> String {
    let (characters, entries, keys) = SHOWN;
    let list = |shown: Vec<String>, whole: usize| {
        let more = if shown.len() < whole { ", .." } else { "" };
        shown.join(", ") + more
    };
    match value {
        Value::String(text) => match text.char_indices().nth(characters) {
            Some((cut, _)) => format!("{}..", Value::from(&text[..cut])),
            None => value.to_string(),
        },
        Value::Array(items) if depth > 2 && !items.is_empty() => "[..]".into(),
        Value::Array(items) => {
            let shown = items.iter().take(entries).map(|item| sample(item, depth + 1)).collect();
            format!("[{}]", list(shown, items.len()))
        }
        Value::Object(map) if number_of(map).is_some() => number_of(map).unwrap_or_default().into(),
        Value::Object(map) if depth > 2 && !map.is_empty() => "{..}".into(),
        Value::Object(map) => {
            let field = |(key, value): (&String, &Value)| {
                format!("{}: {}", Value::from(key.as_str()), sample(value, depth + 1))
            };
            let keys = if depth == 0 { keys } else { keys / 2 };
            format!("{{{}}}", list(map.iter().take(keys).map(field).collect(), map.len()))
        }
        other => other.to_string(),
    }
}

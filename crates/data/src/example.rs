//! Rows to examples. Whatever its format, a row becomes a prompt with a completion, a conversation, segments
//! of text, or token ids with labels.
//!
//! | format | fields |
//! |---|---|
//! | `input_full` | `input_text`, `full_text` |
//! | `prompt_completion` | `prompt`, `completion`: strings, or messages (only the completion is supervised) |
//! | `messages`, `sharegpt` | `messages`; `conversations`; optionally `tools`, `system`, `chat_template_kwargs` |
//! | `alpaca` | `instruction`, `output`, optionally `input`, `history`, `system` |
//! | `text` | `text`: all of it is supervised (`completion_only_loss=false`) |
//! | `segments` | `segments`: a list of `text` with `train` or `weight` |
//! | `preference` | `chosen`, with its prompt in `prompt`, `conversations` or `instruction`, or at its start: the chosen side is supervised |
//! | `tokenised` | `input_ids` with `labels`, `completion_mask` or `assistant_masks`; packs with `seq_lengths`, `position_ids` or a numbered `attention_mask` |

mod body;
mod boundaries;
pub mod chat;
mod columns;
mod masks;
mod messages;
mod plain;
mod reader;
mod tokenised;
mod unknown;

pub(crate) use body::pick;
pub use body::{Alpaca, Body, TextPiece, Tokenised};
pub use chat::{Conversation, Detail};
pub use columns::COLUMNS;

use crate::policy::Format;
use crate::source::{MEDIA, Projection, RawRow, Row};
use crate::{Error, Result, RowId};
use messages::LISTS;
use reader::Reader;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use tokenised::MASKS;
use unknown::unknown;

/// One example of a dataset.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    /// The row it was read from.
    pub id: RowId,
    /// Its content.
    pub body: Body,
}

impl Example {
    /// Reads an unparsed row. The result is that of [`Row::parse`] and [`Example::from_row`], but well-formed
    /// tokenised rows are read without a JSON value in between.
    ///
    /// # Errors
    /// As [`Row::parse`] and [`Example::from_row`].
    pub fn read(raw: RawRow, format: Format) -> Result<Example> {
        if matches!(format, Format::Auto | Format::Tokenised)
            && let Some(row) = tokenised::direct(&raw)
        {
            return Ok(Example { id: raw.id, body: Body::Tokenised(Box::new(row)) });
        }
        Example::from_row(Row::parse(raw)?, format)
    }

    /// Reads an unparsed row whose fields have other names: `columns` maps our names ([`COLUMNS`]) to paths in the
    /// row.
    ///
    /// # Errors
    /// As [`Example::read`], and if a path does not exist.
    pub fn read_renamed(raw: RawRow, format: Format, columns: &BTreeMap<String, String>) -> Result<Example> {
        if columns.is_empty() {
            return Example::read(raw, format);
        }
        Example::from_row(Example::renamed(Row::parse(raw)?, columns)?, format)
    }

    /// The row with its fields renamed to our names.
    ///
    /// # Errors
    /// [`Error::Row`] if a path does not exist.
    pub fn renamed(row: Row, columns: &BTreeMap<String, String>) -> Result<Row> {
        columns::renamed(row, columns)
    }

    /// Reads a row in the given format. [`Format::Auto`] chooses the format by the fields of the row.
    ///
    /// # Errors
    /// [`Error::Row`] if fields are missing, null, of the wrong type or length, or contradict each other.
    pub fn from_row(row: Row, format: Format) -> Result<Example> {
        let Row { id, fields } = row;
        let format = match format {
            Format::Auto => detect(&id, &fields)?,
            fixed => fixed,
        };
        if format != Format::Tokenised
            && let Some(key) = MEDIA
                .iter()
                .find(|key| fields.get(**key).is_some_and(|v| filled(v) && *v != Value::Bool(false)))
        {
            return Err(Error::row(
                id,
                format!("the row has {key:?}: images, audio and video cannot be trained on here"),
                format!("remove the column {key:?} to learn the text alone, or leave the row out"),
            ));
        }
        let mut reader = Reader { id: &id, fields };
        reader.refuse_masks(match format {
            Format::Tokenised => &tokenised::KNOWN,
            _ => &[],
        })?;
        let text = |key: &str| reader.fields.get(key).is_some_and(Value::is_string);
        // A field of any other type is left to the text reader, whose error names it.
        let messages = |key: &str| matches!(reader.fields.get(key), Some(Value::Array(_) | Value::Object(_)));
        let body = match format {
            Format::InputFull => reader.input_full()?,
            Format::PromptCompletion if messages("prompt") || messages("completion") => {
                Body::Chat(Box::new(reader.pair("completion")?))
            }
            Format::PromptCompletion => reader.prompt_completion("completion")?,
            Format::Tokenised => reader.tokenised()?,
            Format::Messages => Body::Chat(Box::new(reader.chat(&["messages"])?)),
            Format::Sharegpt => Body::Chat(Box::new(reader.chat(&["conversations", "conversation"])?)),
            Format::Alpaca => Body::Alpaca(Box::new(reader.alpaca("output")?)),
            Format::Segments => Body::Segments(reader.segments()?),
            Format::Text => Body::Whole(reader.string("text")?),
            Format::Preference if text("chosen") && text("instruction") => {
                Body::Alpaca(Box::new(reader.alpaca("chosen")?))
            }
            Format::Preference if text("chosen") && text("prompt") => reader.prompt_completion("chosen")?,
            Format::Preference
                if text("chosen") && !LISTS.iter().any(|key| messages(key)) && !messages("prompt") =>
            {
                return Err(Error::row(
                    id,
                    "\"chosen\" is a string, and there is no \"prompt\" before it",
                    "write the common start of both sides as \"prompt\"",
                ));
            }
            Format::Preference => Body::Chat(Box::new(reader.preferred()?)),
            Format::Auto => unreachable!("detect returns a format"),
        };
        Ok(Example { id, body })
    }
}

/// The format of a row, detected from its fields.
///
/// # Errors
/// [`Error::Row`] if the fields match no format, or several.
pub fn format_of(row: &Row) -> Result<Format> {
    detect(&row.id, &row.fields)
}

/// A proposal for [`Policy::columns`](crate::Policy::columns) for a row of unknown format: our names with paths in
/// the row. `None` if the row has a format, or its names are not recognised.
pub fn proposed_columns(row: &Row) -> Option<BTreeMap<String, String>> {
    let proposed = columns::proposed(&row.fields).filter(|_| format_of(row).is_err())?;
    Some(proposed.into_iter().map(|(name, path)| (name.to_string(), path)).collect())
}

/// The columns that [`Example::read`] needs for this format; `None` if it may need all of them. `text`:
/// whether the rendered text of tokenised rows is needed.
pub fn projection(format: Format, text: bool) -> Option<Projection> {
    matches!(format, Format::Auto | Format::Tokenised).then(|| tokenised::projection(text))
}

/// True for a value that is neither null nor empty.
fn filled(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Array(list) => !list.is_empty(),
        Value::String(text) => !text.is_empty(),
        _ => true,
    }
}

/// The error for a tokenised row without labels or a mask.
pub(crate) fn without_labels(id: &RowId) -> Error {
    Error::row(
        id.clone(),
        "a tokenised row without \"labels\", \"completion_mask\" or \"assistant_masks\"",
        "one of them is needed to tell the response from the prompt; to learn all tokens, set completion_only_loss=false",
    )
}

/// The format of a row, detected from its fields.
fn detect(id: &RowId, fields: &Map<String, Value>) -> Result<Format> {
    let has = |key: &str| fields.contains_key(key);
    let labelled = ["labels", "assistant_mask", "loss_mask"].iter().chain(&MASKS).any(|key| has(key));
    if has("input_ids") && labelled {
        return Ok(Format::Tokenised);
    }
    let filled = |key: &str| fields.get(key).is_some_and(filled);
    if has("chosen") && has("rejected") {
        return Ok(Format::Preference);
    }
    // Messages without roles have another shape, which `columns` may map.
    let first = |key: &&str| fields.get(*key)?.as_array()?.first()?.as_object();
    let odd = |message: &Map<String, Value>| !message.contains_key("role") && !message.contains_key("from");
    if LISTS.iter().find_map(first).is_some_and(odd) && columns::proposed(fields).is_some() {
        return Err(unknown(id, fields));
    }
    let complete: Vec<(Format, &str)> = [
        (has("input_text") && has("full_text"), Format::InputFull, "input_text+full_text"),
        (has("prompt") && has("completion"), Format::PromptCompletion, "prompt+completion"),
        (filled("messages"), Format::Messages, "messages"),
        (filled("conversations") || filled("conversation"), Format::Sharegpt, "conversations"),
        (has("instruction") && has("output"), Format::Alpaca, "instruction+output"),
        (filled("segments"), Format::Segments, "segments"),
    ]
    .into_iter()
    .filter_map(|(complete, format, name)| complete.then_some((format, name)))
    .collect();
    match complete.as_slice() {
        // The reader of the format reports an empty list.
        [] if has("messages") => Ok(Format::Messages),
        [] if has("conversations") || has("conversation") => Ok(Format::Sharegpt),
        [] if has("segments") => Ok(Format::Segments),
        [] if fields.get("text").is_some_and(Value::is_string) && !has("input_ids") => Ok(Format::Text),
        // Neither labels nor a mask: `verify` reports how a trainer would treat the row.
        [] if tokenised::is_bare(fields) => Ok(Format::Tokenised),
        [] => Err(unknown(id, fields)),
        [(format, _)] => {
            let sided = matches!(format, Format::PromptCompletion | Format::Messages | Format::Sharegpt);
            if sided && fields.get("label") == Some(&Value::Bool(false)) {
                return Err(Error::row(
                    id.clone(),
                    "the row is the rejected side of a preference: its \"label\" is false",
                    format!("leave such rows out; to learn from them anyway, set format={}", format.name()),
                ));
            }
            Ok(*format)
        }
        several => {
            let names: Vec<&str> = several.iter().map(|(_, name)| *name).collect();
            let formats: Vec<&str> = several.iter().map(|(format, _)| format.name()).collect();
            let number = match several.len() {
                2 => "two".to_string(),
                n => n.to_string(),
            };
            Err(Error::row(
                id.clone(),
                format!("the row has the fields of {number} formats: {}", names.join(" and ")),
                format!("set format to {}", formats.join(" or ")),
            ))
        }
    }
}

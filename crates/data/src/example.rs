//! What a row says, whatever its format: a prompt with its completion, a conversation, segments of text, or token
//! ids with their labels.
//!
//! | format | fields |
//! |---|---|
//! | `input_full` | `input_text`, `full_text` |
//! | `prompt_completion` | `prompt`, `completion`: strings, or messages (only the completion is learned) |
//! | `messages`, `sharegpt` | `messages`; `conversations`; with `tools`, `system`, `chat_template_kwargs` where given |
//! | `alpaca` | `instruction`, `output`, perhaps `input`, `history`, `system` |
//! | `segments` | `segments`: a list of `text` with `train` or `weight` |
//! | `preference` | `chosen`, with `prompt`, `conversations` or `instruction` before it or within it: the chosen side is learned |
//! | `tokenised` | `input_ids` with `labels`, `completion_mask` or `assistant_masks`; packs with `seq_lengths`, `position_ids` or a numbered `attention_mask` |

mod body;
mod boundaries;
pub mod chat;
mod messages;
mod plain;
mod reader;
mod tokenised;
mod unknown;

pub use body::{Alpaca, Body, TextPiece, Tokenised};
pub use chat::Conversation;

use crate::policy::Format;
use crate::source::Row;
use crate::{Error, Result, RowId};
use messages::LISTS;
use reader::Reader;
use serde_json::{Map, Value};
use tokenised::MASKS;
use unknown::unknown;

/// One example of the data set.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    /// The row that it was read from.
    pub id: RowId,
    /// What it says.
    pub body: Body,
}

impl Example {
    /// Reads a row by `format`, or by the fields it has where that is [`Format::Auto`].
    ///
    /// # Errors
    /// [`Error::Row`]: fields that are missing, null, of the wrong type or length, or that contradict each other.
    pub fn from_row(row: Row, format: Format) -> Result<Example> {
        let Row { id, fields } = row;
        let format = match format {
            Format::Auto => detect(&id, &fields)?,
            fixed => fixed,
        };
        let reader = Reader { id: &id, fields };
        let text = |key: &str| reader.fields.get(key).is_some_and(Value::is_string);
        // A field that is there and wrong is the text reader's error, which names it.
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
                    "write what both sides begin with as \"prompt\"",
                ));
            }
            Format::Preference => Body::Chat(Box::new(reader.preferred()?)),
            Format::Auto => unreachable!("detect returns a format"),
        };
        Ok(Example { id, body })
    }
}

/// The format that a row's fields make.
fn detect(id: &RowId, fields: &Map<String, Value>) -> Result<Format> {
    let has = |key: &str| fields.contains_key(key);
    let labelled = has("labels") || MASKS.iter().any(|m| has(m));
    if has("input_ids") && labelled {
        return Ok(Format::Tokenised);
    }
    let filled = |key: &str| match fields.get(key) {
        None | Some(Value::Null) => false,
        Some(Value::Array(list)) => !list.is_empty(),
        Some(Value::String(text)) => !text.is_empty(),
        Some(_) => true,
    };
    if has("chosen") && has("rejected") {
        return Ok(Format::Preference);
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
        // Of a list that is there and empty its own reader tells.
        [] if has("messages") => Ok(Format::Messages),
        [] if has("conversations") || has("conversation") => Ok(Format::Sharegpt),
        [] if has("segments") => Ok(Format::Segments),
        [] => Err(unknown(id, fields)),
        [(format, _)] => {
            let sided = matches!(format, Format::PromptCompletion | Format::Messages | Format::Sharegpt);
            if sided && fields.get("label") == Some(&Value::Bool(false)) {
                return Err(Error::row(
                    id.clone(),
                    "the row is the rejected side of a preference: its \"label\" is false",
                    format!(
                        "leave such rows out; to learn from them all the same set format={}",
                        format.name()
                    ),
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

//! Parsed rows: JSON objects with their position in the source.

use super::arrow_json;
use super::lenient;
use super::raw::{Content, RawRow};
use crate::{Error, Result, RowId};
use serde_json::{Map, Value};

/// One row of a source.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Its position in the source.
    pub id: RowId,
    /// Its fields, in the order of the source.
    pub fields: Map<String, Value>,
}

impl Row {
    /// Parses a row.
    ///
    /// # Errors
    /// [`Error::Row`] with the byte at which its UTF-8 or JSON is invalid, or with its type if it is not an
    /// object.
    pub fn parse(raw: RawRow) -> Result<Row> {
        let RawRow { id, content, .. } = raw;
        let (bytes, header) = match content {
            Ok(Content::Json(bytes)) => (bytes, None),
            Ok(Content::Record(header, bytes)) => (bytes, Some(header)),
            Ok(Content::Columns(batch, row)) => {
                return match arrow_json::fields(&batch, row) {
                    Ok(fields) => Ok(Row { id, fields }),
                    Err(message) => {
                        Err(Error::row(id, message, "write the column as another type, or remove it"))
                    }
                };
            }
            Err(message) => return Err(Error::row(id, message, "repair or remove the row")),
        };
        let text = match std::str::from_utf8(&bytes) {
            Ok(text) => text,
            Err(e) => {
                let at = e.valid_up_to();
                let message = format!("invalid UTF-8 at byte {at} of the row (0x{:02x})", bytes[at]);
                return Err(Error::row(id, message, "save the file as UTF-8, or repair or remove the row"));
            }
        };
        if let Some(header) = header {
            return match header.fields(text) {
                Ok(fields) => Ok(Row { id, fields }),
                Err(message) => {
                    let help = "quote cells that hold delimiters or line ends, or remove the row";
                    Err(Error::row(id, message, help))
                }
            };
        }
        match lenient::parse(text) {
            Ok(Value::Object(mut fields)) => {
                // pandas writes a missing cell of any type as NaN.
                let missing = |value: &&mut Value| lenient::number(value) == Some("NaN");
                fields.values_mut().filter(missing).for_each(|value| *value = Value::Null);
                Ok(Row { id, fields })
            }
            Ok(other) => {
                let message = format!("the row is {}, not an object", type_name(&other));
                Err(Error::row(
                    id,
                    message,
                    "a row is a JSON object such as {\"prompt\": \"..\", \"completion\": \"..\"}",
                ))
            }
            Err((at, e)) => {
                // serde_json appends a line and column within the row; without them the message cannot be
                // mistaken for a position in the file.
                let reason = e.to_string();
                let reason = reason.split(" at line ").next().unwrap_or(&reason);
                let message = format!("invalid JSON at byte {at} of the row: {reason}");
                Err(Error::row(id, message, "repair or remove the row"))
            }
        }
    }
}

/// The type of a JSON value with its article, for messages.
pub fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(map) if lenient::number_of(map).is_some() => "a number",
        Value::Object(_) => "an object",
    }
}

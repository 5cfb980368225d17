//! Reads the fields of a row, with errors that name them.

use crate::source::row::type_name;
use crate::source::shown;
use crate::{Error, Result, RowId};
use serde_json::{Map, Value};

/// The fields of a row; reading one removes it.
pub(super) struct Reader<'a> {
    pub id: &'a RowId,
    pub fields: Map<String, Value>,
}

impl Reader<'_> {
    pub(super) fn error(&self, message: String, help: &str) -> Error {
        Error::row(self.id.clone(), message, help)
    }

    pub(super) fn string(&mut self, key: &str) -> Result<String> {
        match self.fields.swap_remove(key) {
            Some(Value::String(text)) => Ok(text),
            Some(Value::Null) => {
                Err(self.error(format!("\"{key}\" is null"), "fill the field, or remove the row"))
            }
            Some(other) => {
                let found = type_name(&other);
                Err(self.error(format!("\"{key}\" is {found}, not a string"), "write the field as a string"))
            }
            None => Err(self.missing(key)),
        }
    }

    /// A string; `None` if the field is missing or null.
    pub(super) fn optional_string(&mut self, key: &str) -> Result<Option<String>> {
        match self.fields.get(key) {
            None | Some(Value::Null) => Ok(None),
            _ => self.string(key).map(Some),
        }
    }

    pub(super) fn missing(&self, key: &str) -> Error {
        let keys: Vec<&str> = self.fields.keys().map(String::as_str).take(12).collect();
        self.error(
            format!("\"{key}\" is missing; the row has: {}", keys.join(", ")),
            "fill the field, or set format=auto",
        )
    }

    /// A list; `None` if the field is missing or null.
    pub(super) fn list(&mut self, key: &str) -> Result<Option<Vec<Value>>> {
        match self.fields.swap_remove(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(other) => {
                let found = type_name(&other);
                Err(self.error(format!("\"{key}\" is {found}, not a list"), "write one entry per token"))
            }
        }
    }

    /// A list of `n` entries.
    pub(super) fn sized(&mut self, key: &str, n: usize) -> Result<Option<Vec<Value>>> {
        match self.list(key)? {
            Some(list) if list.len() != n => Err(self.length(key, list.len(), n)),
            other => Ok(other),
        }
    }

    pub(super) fn length(&self, key: &str, found: usize, n: usize) -> Error {
        self.error(
            format!("\"{key}\" has {found} entries, \"input_ids\" has {n}"),
            "write one entry per token",
        )
    }

    pub(super) fn integers(&self, key: &str, list: &[Value], least: i64, most: i64) -> Result<Vec<i64>> {
        let mut out = Vec::with_capacity(list.len());
        for (i, value) in list.iter().enumerate() {
            match value.as_i64() {
                Some(v) if (least..=most).contains(&v) => out.push(v),
                Some(v) => {
                    return Err(self.error(
                        format!("\"{key}\"[{i}] is {v}"),
                        &format!("its entries lie in {least}..={most}"),
                    ));
                }
                None => {
                    let found = type_name(value);
                    let found = if found == "a number" { shown(value) } else { found.to_string() };
                    return Err(self.error(
                        format!("\"{key}\"[{i}] is {found}, not an integer"),
                        "one flat list of integers per row",
                    ));
                }
            }
        }
        Ok(out)
    }

    /// A list of numbers in the range of `u32`.
    pub(super) fn unsigned(&self, key: &str, list: &[Value]) -> Result<Vec<u32>> {
        let numbers = self.integers(key, list, 0, i64::from(u32::MAX))?;
        Ok(numbers.into_iter().map(|number| number as u32).collect())
    }

    pub(super) fn booleans(&self, key: &str, list: &[Value]) -> Result<Vec<bool>> {
        let mut out = Vec::with_capacity(list.len());
        for (i, value) in list.iter().enumerate() {
            match (value.as_bool(), value.as_i64()) {
                (Some(b), _) => out.push(b),
                (None, Some(v @ (0 | 1))) => out.push(v == 1),
                _ => {
                    return Err(
                        self.error(format!("\"{key}\"[{i}] is {value}"), "a mask's entries are 0 or 1")
                    );
                }
            }
        }
        Ok(out)
    }
}

/// The keys of an object, for error messages.
pub(super) fn shown_keys(map: &Map<String, Value>) -> String {
    let mut keys: Vec<String> = map.keys().take(12).map(|k| format!("\"{k}\"")).collect();
    if map.len() > 12 {
        keys.push(format!("and {} more", map.len() - 12));
    }
    if keys.is_empty() { "no fields".into() } else { keys.join(", ") }
}

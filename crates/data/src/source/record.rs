//! Splits a record of a CSV or TSV file into fields.

use super::lenient;
use serde_json::{Map, Value};

/// Columns whose cells are lists or objects in JSON.
const NESTED: [&str; 16] = [
    "messages",
    "conversations",
    "conversation",
    "tools",
    "chat_template_kwargs",
    "history",
    "segments",
    "input_ids",
    "labels",
    "completion_mask",
    "assistant_masks",
    "attention_mask",
    "weights",
    "seq_lengths",
    "position_ids",
    "prefix_ranges",
];

/// The column names of a delimited file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    pub(super) names: Vec<String>,
    pub(super) delimiter: u8,
}

impl Header {
    /// The cells of a record as fields.
    ///
    /// # Errors
    /// A message if the record has more or fewer cells than the header.
    pub fn fields(&self, record: &str) -> Result<Map<String, Value>, String> {
        let cells = cells(record, self.delimiter)?;
        if cells.len() != self.names.len() {
            let (found, wanted) = (cells.len(), self.names.len());
            let s = if found == 1 { "" } else { "s" };
            return Err(format!("the record has {found} cell{s}, the header has {wanted} columns"));
        }
        let mut fields = Map::with_capacity(self.names.len());
        for (name, cell) in self.names.iter().zip(&cells) {
            if !name.is_empty()
                && let Some(value) = value(name, cell)
            {
                fields.insert(name.clone(), value);
            }
        }
        Ok(fields)
    }
}

fn value(name: &str, cell: &str) -> Option<Value> {
    if NESTED.contains(&name) {
        if cell.trim().is_empty() {
            return None;
        }
        if let Ok(nested @ (Value::Array(_) | Value::Object(_))) = lenient::parse(cell) {
            return Some(nested);
        }
    } else if name == "label" {
        // The label of a preference pair. As a string it would not count as rejected, and the row would be trained on.
        match cell.trim().to_ascii_lowercase().as_str() {
            "true" => return Some(Value::Bool(true)),
            "false" => return Some(Value::Bool(false)),
            _ => {}
        }
    }
    Some(Value::from(cell))
}

/// The cells of one record.
pub(super) fn cells(record: &str, delimiter: u8) -> Result<csv::StringRecord, String> {
    let mut reader = csv::ReaderBuilder::new()
        .has_headers(false)
        .delimiter(delimiter)
        // Line ends inside a record are quoted; a bare carriage return is an ordinary character.
        .terminator(csv::Terminator::Any(b'\n'))
        .buffer_capacity(record.len().clamp(1, 1 << 16))
        .from_reader(record.as_bytes());
    let mut cells = csv::StringRecord::new();
    reader.read_record(&mut cells).map_err(|e| e.to_string())?;
    Ok(cells)
}

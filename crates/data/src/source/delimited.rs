//! CSV and TSV: a line of names, then a record per row.
//!
//! Records are cut here by the quotes of RFC 4180, so that each knows its line and one that a lost quote swallows is
//! noticed; the `csv` crate takes them apart ([`Header::fields`]), in parallel with everything else about a row.
//!
//! | cell | becomes |
//! |---|---|
//! | any other | a string, the empty one too: CSV does not tell an empty text from none |
//! | under the name of a list (`messages`, `tools`, `input_ids`, ..) | the list or object where it is one in JSON; nothing where it is empty |
//! | `true` or `false` under `label` | a boolean |
//! | under no name | nothing |

use super::stream::{Broken, Stream};
use super::{Layout, MAX_ROW_BYTES, json, names_error, source_error};
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::path::Path;
use std::sync::Arc;

/// Fields whose cells are lists or objects, written as JSON.
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

/// The names over the columns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    names: Vec<String>,
    delimiter: u8,
}

impl Header {
    /// The cells of a record as fields.
    ///
    /// # Errors
    /// In words, where there are more or fewer cells than names.
    pub fn fields(&self, record: &str) -> Result<Map<String, Value>, String> {
        let cells = cells(record, self.delimiter)?;
        if cells.len() != self.names.len() {
            let (found, wanted) = (cells.len(), self.names.len());
            let s = if found == 1 { "" } else { "s" };
            return Err(format!("the record has {found} cell{s}, the first line names {wanted} columns"));
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
        if let Ok(nested @ (Value::Array(_) | Value::Object(_))) = serde_json::from_str(cell) {
            return Some(nested);
        }
    } else if name == "label" {
        // The side of a preference: text would pass as neither, and a rejected answer would be learned.
        match cell.trim().to_ascii_lowercase().as_str() {
            "true" => return Some(Value::Bool(true)),
            "false" => return Some(Value::Bool(false)),
            _ => {}
        }
    }
    Some(Value::from(cell))
}

/// The cells of one record.
fn cells(record: &str, delimiter: u8) -> Result<csv::StringRecord, String> {
    let mut reader = csv::ReaderBuilder::new()
        .has_headers(false)
        .delimiter(delimiter)
        // Line ends inside the record are quoted; a bare carriage return is a character like any other.
        .terminator(csv::Terminator::Any(b'\n'))
        .buffer_capacity(record.len().clamp(1, 1 << 16))
        .from_reader(record.as_bytes());
    let mut cells = csv::StringRecord::new();
    reader.read_record(&mut cells).map_err(|e| e.to_string())?;
    Ok(cells)
}

/// The layout of a file whose name says that it is delimited; the line of names says by what. Spreadsheets of
/// countries with a decimal comma write `;` into .csv files.
pub(super) fn sniff(name: &str, content: &[u8]) -> Option<Layout> {
    if name.ends_with(".tsv") || name.ends_with(".tab") {
        return Some(Layout::Delimited(b'\t'));
    }
    if !name.ends_with(".csv") {
        return None;
    }
    let names = &content[..memchr::memchr(b'\n', content).unwrap_or(content.len())];
    let has = |byte| memchr::memchr(byte, names).is_some();
    let delimiter = [b',', b';', b'\t'].into_iter().find(|&byte| has(byte)).unwrap_or(b',');
    Some(Layout::Delimited(delimiter))
}

/// A row per record.
pub(super) struct Delimited {
    pub(super) stream: Stream,
    pub(super) header: Arc<Header>,
    /// Lines read.
    line: u64,
}

impl Delimited {
    /// Reads the names.
    pub(super) fn new(stream: Stream, delimiter: u8, path: &Path) -> Result<Delimited> {
        let header = Header { names: Vec::new(), delimiter };
        let mut reader = Delimited { stream, header: Arc::new(header), line: 0 };
        let record = match reader.next() {
            Ok(Some((_, Ok(record)))) => record,
            Ok(Some((_, Err(message)))) => return Err(names_error(path, &message)),
            Ok(None) => return Err(super::empty(path)),
            Err(Broken::Io(e)) => return Err(Error::io(path, e)),
            Err(Broken::Structure(message)) => return Err(names_error(path, &message)),
        };
        let text = std::str::from_utf8(&record)
            .map_err(|e| names_error(path, &format!("invalid UTF-8 at byte {}", e.valid_up_to())))?;
        let names: Vec<String> = cells(text, delimiter)
            .map_err(|message| names_error(path, &message))?
            .iter()
            .map(|name| name.trim().to_string())
            .collect();
        let twice =
            names.iter().enumerate().find(|(at, name)| !name.is_empty() && names[..*at].contains(name));
        if let Some((_, name)) = twice {
            return Err(source_error(
                path,
                &format!("two columns are named {name:?}"),
                "give each column a name of its own on the first line",
            ));
        }
        reader.header = Arc::new(Header { names, delimiter });
        Ok(reader)
    }

    /// The next record that is not a blank line, with the 1-based line on which it starts.
    pub(super) fn next(&mut self) -> Result<Option<(u64, Result<Vec<u8>, String>)>, Broken> {
        loop {
            let (start, mut record, mut length) = (self.line + 1, Vec::new(), 0usize);
            let mut place = Place::CellStart;
            let mut ended = false;
            while !ended {
                let available = self.stream.fill()?;
                if available.is_empty() {
                    break;
                }
                let (take, lines, end) = place.advance(available, self.header.delimiter);
                if length + take <= MAX_ROW_BYTES {
                    record.extend_from_slice(&available[..take]);
                } else {
                    record = Vec::new();
                }
                length += take;
                self.line += lines;
                ended = end;
                self.stream.consume(take + usize::from(end));
            }
            if length == 0 && !ended {
                return Ok(None);
            }
            self.line += 1;
            if matches!(place, Place::Quoted) {
                let message =
                    "the file ends inside a quoted cell of this record: a quote is lost somewhere in it";
                return Ok(Some((start, Err(message.into()))));
            }
            if length > MAX_ROW_BYTES {
                return Ok(Some((start, Err(json::too_long(length)))));
            }
            if record.last() == Some(&b'\r') {
                record.pop();
            }
            if !record.is_empty() {
                return Ok(Some((start, Ok(record))));
            }
        }
    }
}

/// Where in a record the next byte stands.
#[derive(Clone, Copy)]
enum Place {
    CellStart,
    /// In a cell that is not quoted, or after the quotes of one that was: quotes mean themselves.
    Plain,
    Quoted,
    /// After a quote inside quotes: another one is a quote, anything else stands outside.
    Quote,
}

impl Place {
    /// Goes on to the end of the record. Returns the bytes of the record in `bytes`, the line ends among them, and
    /// whether the record's own line end stands after them.
    fn advance(&mut self, bytes: &[u8], delimiter: u8) -> (usize, u64, bool) {
        let (mut at, mut lines) = (0, 0);
        while at < bytes.len() {
            let rest = &bytes[at..];
            match self {
                Place::Quoted => {
                    let end = memchr::memchr(b'"', rest);
                    let inside = &rest[..end.unwrap_or(rest.len())];
                    lines += memchr::memchr_iter(b'\n', inside).count() as u64;
                    at += inside.len() + usize::from(end.is_some());
                    if end.is_some() {
                        *self = Place::Quote;
                    }
                }
                Place::Plain => match memchr::memchr2(b'\n', delimiter, rest) {
                    Some(n) if rest[n] == b'\n' => return (at + n, lines, true),
                    Some(n) => {
                        at += n + 1;
                        *self = Place::CellStart;
                    }
                    None => at = bytes.len(),
                },
                Place::CellStart | Place::Quote => {
                    *self = match rest[0] {
                        b'"' => Place::Quoted,
                        b'\n' => return (at, lines, true),
                        byte if byte == delimiter => Place::CellStart,
                        _ => Place::Plain,
                    };
                    at += 1;
                }
            }
        }
        (at, lines, false)
    }
}

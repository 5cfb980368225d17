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

use super::raw::{MAX_ROW_BYTES, too_long};
use super::record::{Header, cells};
use super::stream::{Broken, Stream};
use super::{names_error, source_error};
use crate::{Error, Result};
use std::path::Path;
use std::sync::Arc;

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
                return Ok(Some((start, Err(too_long(length)))));
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

//! CSV and TSV: a header line, then one record per row.
//!
//! Records are separated here by the quoting rules of RFC 4180, so that each has its line number and an
//! unbalanced quote is noticed. The `csv` crate splits a record into cells later, in parallel
//! ([`Header::fields`]).
//!
//! | cell | becomes |
//! |---|---|
//! | in a column of lists (`messages`, `tools`, `input_ids`, ..) | the list or object, if it is one in JSON; no field if it is empty |
//! | `true` or `false` in the column `label` | a boolean |
//! | in a column without a name | no field |
//! | any other | a string, also if empty: CSV does not distinguish an empty text from a missing one |

use super::raw::{MAX_ROW_BYTES, too_long};
use super::record::{Header, cells};
use super::stream::{Broken, Stream};
use super::{names_error, source_error};
use crate::{Error, Result};
use std::path::Path;
use std::sync::Arc;

/// Rows of a delimited file.
pub(super) struct Delimited {
    pub(super) stream: Stream,
    pub(super) header: Arc<Header>,
    /// Lines read so far.
    line: u64,
}

impl Delimited {
    /// Reads the header line.
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
                "give each column its own name in the header line",
            ));
        }
        reader.header = Arc::new(Header { names, delimiter });
        Ok(reader)
    }

    /// The next record that is not a blank line, with the 1-based number of its first line.
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
                let message = "the file ends inside a quoted cell of this record: it has an unbalanced quote";
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

/// The position of the next byte within a record.
#[derive(Clone, Copy)]
enum Place {
    CellStart,
    /// In an unquoted cell, or after the closing quote of a quoted one: quotes are ordinary characters.
    Plain,
    Quoted,
    /// After a quote in a quoted cell: a second quote is an escaped one, any other byte is outside of the
    /// quotes.
    Quote,
}

impl Place {
    /// Advances to the end of the record. Returns how many of `bytes` belong to it, the number of line ends
    /// among these, and whether the line end of the record follows.
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

//! JSON Lines, JSON arrays and consecutive JSON objects: rows separated by line ends or by brackets.

use super::raw::{MAX_ROW_BYTES, too_long};
use super::scan::Scan;
use super::sniff::LIST_KEYS;
use super::stream::{Broken, Stream};
use crate::Result;

/// Rows of JSON Lines.
pub(super) struct Lines {
    pub(super) stream: Stream,
    /// Lines read so far, including blank ones.
    line: u64,
}

impl Lines {
    pub(super) fn new(stream: Stream) -> Lines {
        Lines { stream, line: 0 }
    }

    /// The next non-blank line with its 1-based number.
    pub(super) fn next(&mut self) -> Result<Option<(u64, Result<Vec<u8>, String>)>, Broken> {
        loop {
            let mut line = Vec::new();
            let mut length = 0usize;
            let mut ended = false;
            while !ended {
                let available = self.stream.fill()?;
                if available.is_empty() {
                    break;
                }
                let end = memchr::memchr(b'\n', available);
                let take = end.unwrap_or(available.len());
                if length + take <= MAX_ROW_BYTES {
                    line.extend_from_slice(&available[..take]);
                } else {
                    line = Vec::new();
                }
                length += take;
                ended = end.is_some();
                self.stream.consume(take + usize::from(ended));
            }
            if length == 0 && !ended {
                return Ok(None);
            }
            self.line += 1;
            if length > MAX_ROW_BYTES {
                return Ok(Some((self.line, Err(too_long(length)))));
            }
            if line.last() == Some(&b'\r') {
                line.pop();
            }
            if !line.iter().all(u8::is_ascii_whitespace) {
                return Ok(Some((self.line, Ok(line))));
            }
        }
    }
}

/// Rows of a JSON array.
pub(super) struct Elements {
    pub(super) stream: Stream,
    /// True if the array is a member of an object.
    in_object: bool,
    /// The index of the last row.
    row: u64,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Start,
    Rows,
    Done,
}

impl Elements {
    pub(super) fn new(stream: Stream, in_object: bool) -> Elements {
        Elements { stream, in_object, row: 0, state: State::Start }
    }

    /// The next element of the array.
    pub(super) fn next(&mut self) -> Result<Option<Result<Vec<u8>, String>>, Broken> {
        if self.state == State::Done {
            return Ok(None);
        }
        let reader = &mut self.stream;
        let first = self.state == State::Start;
        if first {
            self.state = State::Rows;
            if self.in_object {
                enter_object(reader)?;
            }
            reader.skip_space()?;
            reader.expect(b'[')?;
        }
        let mut next = reader.skip_space()?;
        if !first {
            match next {
                Some(b',') => {
                    reader.consume(1);
                    next = reader.skip_space()?;
                }
                Some(b']') => {}
                None => return Err(Broken::cut()),
                Some(other) => {
                    let other = other.escape_ascii();
                    return Err(Broken::Structure(format!(
                        "expected \",\" or \"]\" after row {}, found \"{other}\"",
                        self.row
                    )));
                }
            }
        }
        match next {
            None => Err(Broken::cut()),
            Some(b']') => {
                reader.consume(1);
                leave(reader, self.in_object)?;
                Ok(None)
            }
            Some(_) => {
                self.row += u64::from(!first);
                let mut bytes = Vec::new();
                if element(reader, Some(&mut bytes))? {
                    return Ok(Some(Ok(bytes)));
                }
                // The file ends inside this row, which is reported as a bad row; nothing can follow it.
                self.state = State::Done;
                Ok(Some(Err("the file ends in the middle of this row".into())))
            }
        }
    }
}

/// Consecutive rows without a list around them, as `jq` prints them.
pub(super) struct Objects {
    pub(super) stream: Stream,
    /// Rows read so far.
    rows: u64,
}

impl Objects {
    pub(super) fn new(stream: Stream) -> Objects {
        Objects { stream, rows: 0 }
    }

    /// The next object.
    pub(super) fn next(&mut self) -> Result<Option<Result<Vec<u8>, String>>, Broken> {
        match self.stream.skip_space()? {
            None => return Ok(None),
            Some(b'{') => {}
            Some(other) => {
                return Err(Broken::Structure(match self.rows {
                    0 => format!("expected \"{{\", found \"{}\"", other.escape_ascii()),
                    n => format!("expected \"{{\" after row {}, found \"{}\"", n - 1, other.escape_ascii()),
                }));
            }
        }
        self.rows += 1;
        let (mut scan, mut row) = (Scan::default(), Vec::new());
        loop {
            let available = self.stream.fill()?;
            if available.is_empty() {
                return Ok(Some(Err("the file ends in the middle of this row".into())));
            }
            let end = available.iter().position(|byte| {
                scan.step(*byte);
                scan.depth == 0 && !scan.in_string
            });
            let take = end.map_or(available.len(), |at| at + 1);
            if row.len() + take > MAX_ROW_BYTES {
                return Err(Broken::Structure(format!("a row has more than {MAX_ROW_BYTES} bytes")));
            }
            row.extend_from_slice(&available[..take]);
            self.stream.consume(take);
            if end.is_some() {
                return Ok(Some(Ok(row)));
            }
        }
    }
}

/// Consumes one JSON value up to the `,`, `]` or `}` that ends it (not consumed), by brackets and strings
/// alone; the parser checks its validity later. False if the file ends first.
fn element(stream: &mut Stream, mut into: Option<&mut Vec<u8>>) -> Result<bool, Broken> {
    let mut scan = Scan::default();
    loop {
        let available = stream.fill()?;
        if available.is_empty() {
            // A bracketed value is complete even at the end of the file; what is missing is the structure
            // around it.
            let whole = into.is_some_and(|out| matches!(out.last(), Some(b'}' | b']')));
            return Ok(whole && scan.depth == 0 && !scan.in_string);
        }
        let mut n = 0;
        let mut ended = false;
        while n < available.len() {
            if scan.in_string && !scan.escaped {
                // Most bytes are inside strings, where only quotes and backslashes matter.
                let rest = &available[n..];
                n += memchr::memchr2(b'"', b'\\', rest).unwrap_or(rest.len());
                if n == available.len() {
                    break;
                }
            }
            let byte = available[n];
            if scan.depth == 0 && !scan.in_string && matches!(byte, b',' | b']' | b'}') {
                ended = true;
                break;
            }
            scan.step(byte);
            n += 1;
        }
        if let Some(out) = into.as_deref_mut() {
            if out.len() + n > MAX_ROW_BYTES {
                return Err(Broken::Structure(format!("a row has more than {MAX_ROW_BYTES} bytes")));
            }
            out.extend_from_slice(&available[..n]);
        }
        stream.consume(n);
        if ended {
            if let Some(out) = into {
                out.truncate(out.trim_ascii_end().len());
            }
            return Ok(true);
        }
    }
}

/// Advances to the list of rows of a JSON object: past `{` and every member that is not a list under one of
/// [`LIST_KEYS`].
fn enter_object(reader: &mut Stream) -> Result<(), Broken> {
    reader.skip_space()?;
    reader.expect(b'{')?;
    let mut seen = Vec::new();
    loop {
        match reader.skip_space()? {
            Some(b'"') => {}
            Some(b',') => {
                reader.consume(1);
                continue;
            }
            Some(b'}') => {
                let seen = if seen.is_empty() { "none".to_string() } else { seen.join(", ") };
                return Err(Broken::Structure(format!(
                    "a JSON object whose keys ({seen}) include no list of rows under \"data\", \"rows\" or \"train\""
                )));
            }
            Some(other) => {
                return Err(Broken::Structure(format!("expected a key, found \"{}\"", other.escape_ascii())));
            }
            None => return Err(Broken::cut()),
        }
        let key = read_key(reader)?;
        reader.skip_space()?;
        reader.expect(b':')?;
        if reader.skip_space()? == Some(b'[') && LIST_KEYS.contains(&key.as_str()) {
            return Ok(());
        }
        if !element(reader, None)? {
            return Err(Broken::cut());
        }
        if seen.len() < 12 {
            seen.push(key);
        }
    }
}

/// Reads a key; the stream is at its opening quote.
fn read_key(reader: &mut Stream) -> Result<String, Broken> {
    let mut scan = Scan::default();
    let mut text = Vec::new();
    loop {
        let Some(byte) = reader.peek()? else { return Err(Broken::cut()) };
        reader.consume(1);
        scan.step(byte);
        text.push(byte);
        if !scan.in_string {
            return Ok(
                serde_json::from_slice(&text).unwrap_or_else(|_| String::from_utf8_lossy(&text).into_owned())
            );
        }
        if text.len() > 1 << 16 {
            return Err(Broken::Structure("a key has more than 65536 bytes".into()));
        }
    }
}

/// Reads the text after the `]` of the list: the rest of the object, then the end of the file.
fn leave(reader: &mut Stream, in_object: bool) -> Result<(), Broken> {
    if in_object {
        loop {
            match reader.skip_space()? {
                Some(b',') => {
                    reader.consume(1);
                    element(reader, None)?;
                }
                Some(b'}') => {
                    reader.consume(1);
                    break;
                }
                Some(other) => {
                    return Err(Broken::Structure(format!(
                        "expected \",\" or \"}}\" after the list of rows, found \"{}\"",
                        other.escape_ascii()
                    )));
                }
                None => return Err(Broken::cut()),
            }
        }
    }
    match reader.skip_space()? {
        None => Ok(()),
        Some(other) => Err(Broken::Structure(format!(
            "expected the end of the file after the rows, found \"{}\"",
            other.escape_ascii()
        ))),
    }
}

//! JSON: rows cut out of the stream by line ends or by brackets.

use super::stream::{Broken, HEAD_BYTES, Stream};
use super::{Layout, MAX_ROW_BYTES, empty, plain_name, source_error};
use crate::Result;
use serde_json::Value;
use std::path::Path;

/// The keys under which a JSON object may hold its rows.
const LIST_KEYS: [&str; 3] = ["data", "rows", "train"];

/// A row per line.
pub(super) struct Lines {
    pub(super) stream: Stream,
    /// Lines read, blank ones among them.
    line: u64,
}

impl Lines {
    pub(super) fn new(stream: Stream) -> Lines {
        Lines { stream, line: 0 }
    }

    /// The next line that is not blank, with its 1-based number.
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

/// The reason why a row is not read.
pub(super) fn too_long(bytes: usize) -> String {
    format!("the row has {bytes} bytes; the limit is {MAX_ROW_BYTES}")
}

/// A row per element of an array.
pub(super) struct Elements {
    pub(super) stream: Stream,
    /// True where the array is a member of an object.
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
                // The file ends inside this row: say so here, and the stream is over.
                self.state = State::Done;
                Ok(Some(Err("the file ends in the middle of this row".into())))
            }
        }
    }
}

/// Passes one JSON value up to the `,`, `]` or `}` that ends it (not consumed), by brackets and strings
/// alone: whether it is valid is the parser's business. False where the file ends first.
fn element(stream: &mut Stream, mut into: Option<&mut Vec<u8>>) -> Result<bool, Broken> {
    let mut scan = Scan::default();
    loop {
        let available = stream.fill()?;
        if available.is_empty() {
            // A value in brackets is whole even so; what is missing is the structure around it.
            let whole = into.is_some_and(|out| matches!(out.last(), Some(b'}' | b']')));
            return Ok(whole && scan.depth == 0 && !scan.in_string);
        }
        let mut n = 0;
        let mut ended = false;
        while n < available.len() {
            if scan.in_string && !scan.escaped {
                // Most of a row is inside strings, where only two bytes matter.
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

/// Brackets and strings of JSON, byte by byte.
#[derive(Clone, Copy, Debug, Default)]
struct Scan {
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Scan {
    fn step(&mut self, byte: u8) {
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
        } else {
            match byte {
                b'"' => self.in_string = true,
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' => self.depth = self.depth.saturating_sub(1),
                _ => {}
            }
        }
    }
}

/// Goes to the array of a JSON object: past `{` and every member whose key is not one of [`LIST_KEYS`].
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

/// A JSON string as a key, the reader standing on its opening quote.
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

/// After the array's `]`: the rest of the object, then nothing.
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

/// The layout of decompressed content, from its first [`HEAD_BYTES`].
pub(super) fn sniff(path: &Path, head: &[u8]) -> Result<Layout> {
    if head.starts_with(b"\xff\xfe") || head.starts_with(b"\xfe\xff") {
        return Err(source_error(path, "the file is UTF-16", "save it as UTF-8"));
    }
    if super::columnar::kind(head).is_some() {
        return Err(source_error(
            path,
            "the file is Parquet or Arrow inside gzip or zstd",
            "decompress it: these formats compress their columns themselves",
        ));
    }
    let content = head.trim_ascii_start();
    if content.is_empty() {
        if head.len() >= HEAD_BYTES {
            return Err(source_error(
                path,
                "the file starts with 64 KiB of white space",
                "is this the right file?",
            ));
        }
        return Err(empty(path));
    }
    let name = plain_name(path);
    if let Some(layout) = super::delimited::sniff(&name, content) {
        return Ok(layout);
    }
    let named_lines = name.ends_with(".jsonl") || name.ends_with(".ndjson");
    match content[0] {
        b'[' => Ok(Layout::Array),
        b'{' => {
            let line_end = memchr::memchr(b'\n', content).unwrap_or(content.len());
            let (line, rest) = content.split_at(line_end);
            let second = rest.trim_ascii_start();
            if let Ok(Value::Object(object)) = serde_json::from_slice::<Value>(line) {
                // A whole object on the first line. It holds the rows only if it is alone; the "rows" of a pack are
                // numbers.
                let rows =
                    |list: &Value| list.as_array().is_some_and(|l| !l.first().is_some_and(Value::is_number));
                let holds = LIST_KEYS.iter().any(|k| object.get(*k).is_some_and(rows));
                return Ok(if holds && second.is_empty() { Layout::Object } else { Layout::Lines });
            }
            let mut scan = Scan::default();
            let mut innermost = Vec::new();
            for &byte in line {
                if !scan.in_string {
                    match byte {
                        b'{' | b'[' => innermost.push(byte),
                        b'}' | b']' => {
                            innermost.pop();
                        }
                        _ => {}
                    }
                }
                scan.step(byte);
            }
            if rest.is_empty() && !named_lines {
                // One line longer than what was looked at (or cut): it holds rows if such a key opens it.
                return Ok(if opens_list(line) { Layout::Object } else { Layout::Lines });
            }
            // A raw line end cannot stand in a JSON string, and after `{` or a comma in an object comes a key,
            // never `{`: where either happens, the first line is a bad row of JSON Lines.
            let ends_inside = scan.depth > 0 && !scan.in_string;
            let contradicts = second.first() == Some(&b'{') && innermost.last() == Some(&b'{');
            let opens = ends_inside && !contradicts;
            Ok(if opens && (!named_lines || opens_list(content)) { Layout::Object } else { Layout::Lines })
        }
        _ if named_lines => Ok(Layout::Lines),
        _ if content.split(|&b| b == b'\n').any(|line| line.trim_ascii_start().starts_with(b"{")) => {
            Ok(Layout::Lines)
        }
        _ => Err(source_error(
            path,
            "the file is no JSON, JSON Lines, CSV, Parquet or Arrow",
            "rows are JSON objects (one per line, or in one array), or lines of a .csv or .tsv file under a line of names, \
             also as .gz or .zst; or columns of a .parquet or .arrow file",
        )),
    }
}

/// True where one of the first keys of an object is a list of rows.
fn opens_list(content: &[u8]) -> bool {
    let text = String::from_utf8_lossy(content);
    LIST_KEYS.iter().any(|key| {
        let quoted = format!("\"{key}\"");
        text.find(&quoted).is_some_and(|at| {
            let after = text[at + quoted.len()..].trim_start();
            let list = after.strip_prefix(':').and_then(|v| v.trim_start().strip_prefix('['));
            list.is_some_and(|first| !first.trim_start().starts_with(|c: char| c.is_ascii_digit()))
        })
    })
}

//! Detects the format of a file from its name and its first bytes.

use super::scan::Scan;
use super::stream::HEAD_BYTES;
use super::{empty, source_error};
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

/// How rows are arranged in the decompressed bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// One JSON object per line.
    Lines,
    /// A JSON array of objects.
    Array,
    /// A JSON object with an array of objects under `data`, `rows` or `train`.
    Object,
    /// Consecutive JSON objects, each over several lines.
    Objects,
    /// Records whose cells are separated by this byte, below a header line.
    Delimited(u8),
    /// Columns of record batches.
    Columns(Kind),
    /// Not a file: rows that a program passes.
    Given,
}

/// Keys that may hold the list of rows in a JSON object.
pub(super) const LIST_KEYS: [&str; 3] = ["data", "rows", "train"];

/// The first bytes of every message of an Arrow stream.
pub(super) const CONTINUATION: [u8; 4] = [0xff; 4];

/// A columnar file format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Parquet.
    Parquet,
    /// The Arrow IPC file format (Feather 2).
    ArrowFile,
    /// The Arrow IPC stream format.
    ArrowStream,
}

/// The columnar format that a file's first bytes (8 suffice) identify; `None` if they identify none.
pub fn kind(head: &[u8]) -> Option<Kind> {
    if head.starts_with(b"PAR1") {
        Some(Kind::Parquet)
    } else if head.starts_with(b"ARROW1") {
        Some(Kind::ArrowFile)
    } else if head.starts_with(&CONTINUATION) {
        Some(Kind::ArrowStream)
    } else {
        None
    }
}

/// The columnar format of a file, by its first bytes. `None` for a pipe, which can only be read once.
pub(super) fn columns_in(path: &Path) -> Result<Option<Kind>> {
    let io_error = |e| Error::io(path, e);
    let file = File::open(path).map_err(io_error)?;
    if !file.metadata().map_err(io_error)?.is_file() {
        return Ok(None);
    }
    let mut head = Vec::new();
    file.take(8).read_to_end(&mut head).map_err(io_error)?;
    Ok(kind(&head))
}

/// The framing of decompressed content, from its first [`HEAD_BYTES`].
pub(super) fn sniff(path: &Path, head: &[u8]) -> Result<Framing> {
    if head.starts_with(b"\xff\xfe") || head.starts_with(b"\xfe\xff") {
        return Err(source_error(path, "the file is UTF-16", "save it as UTF-8"));
    }
    if kind(head).is_some() {
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
    if let Some(layout) = delimited(&name, content) {
        return Ok(layout);
    }
    let named_lines = name.ends_with(".jsonl") || name.ends_with(".ndjson");
    match content[0] {
        b'[' => Ok(Framing::Array),
        b'{' => {
            let line_end = memchr::memchr(b'\n', content).unwrap_or(content.len());
            let (line, rest) = content.split_at(line_end);
            let second = rest.trim_ascii_start();
            if let Ok(Value::Object(object)) = serde_json::from_slice::<Value>(line) {
                // The first line is a complete object. It holds the rows only if nothing follows it.
                let holds = holds_rows(&object) && second.is_empty();
                return Ok(if holds { Framing::Object } else { Framing::Lines });
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
                // A single line, longer than the head or cut off: it holds rows if one of its first keys is one of
                // these.
                return Ok(if opens_list(line) { Framing::Object } else { Framing::Lines });
            }
            // A JSON string cannot contain a raw line end, and inside an object a key follows `{` or a comma,
            // never `{`. If the text violates either, its first line is a bad row of JSON Lines.
            let ends_inside = scan.depth > 0 && !scan.in_string;
            let contradicts = second.first() == Some(&b'{') && innermost.last() == Some(&b'{');
            let opens = ends_inside && !contradicts;
            if opens
                && let Some((first, rest)) = first_value(content)
                && let Ok(Value::Object(object)) = serde_json::from_slice::<Value>(first)
            {
                let holds = holds_rows(&object) && rest.trim_ascii_start().is_empty();
                return Ok(if holds { Framing::Object } else { Framing::Objects });
            }
            Ok(if opens && (!named_lines || opens_list(content)) { Framing::Object } else { Framing::Lines })
        }
        _ if named_lines => Ok(Framing::Lines),
        _ if content.split(|&b| b == b'\n').any(|line| line.trim_ascii_start().starts_with(b"{")) => {
            Ok(Framing::Lines)
        }
        _ => Err(source_error(
            path,
            "the file is not JSON, JSON Lines, CSV, Parquet or Arrow",
            "rows are JSON objects (one per line, or in one array), or records of a .csv or .tsv file below a header line, \
             optionally .gz or .zst; or columns of a .parquet or .arrow file",
        )),
    }
}

/// True if an object has a list of rows. The "rows" of a pack are numbers, not rows.
fn holds_rows(object: &Map<String, Value>) -> bool {
    let rows = |list: &Value| list.as_array().is_some_and(|l| !l.first().is_some_and(Value::is_number));
    LIST_KEYS.iter().any(|key| object.get(*key).is_some_and(rows))
}

/// The first bracketed value, and the text after it.
fn first_value(content: &[u8]) -> Option<(&[u8], &[u8])> {
    let mut scan = Scan::default();
    let end = content.iter().position(|byte| {
        scan.step(*byte);
        scan.depth == 0 && !scan.in_string
    })?;
    Some(content.split_at(end + 1))
}

/// The framing of a file with the name of a delimited one. The header line shows the delimiter: spreadsheets
/// in locales with a decimal comma write `;` into .csv files.
fn delimited(name: &str, content: &[u8]) -> Option<Framing> {
    if name.ends_with(".tsv") || name.ends_with(".tab") {
        return Some(Framing::Delimited(b'\t'));
    }
    if !name.ends_with(".csv") {
        return None;
    }
    let names = &content[..memchr::memchr(b'\n', content).unwrap_or(content.len())];
    let has = |byte| memchr::memchr(byte, names).is_some();
    let delimiter = [b',', b';', b'\t'].into_iter().find(|&byte| has(byte)).unwrap_or(b',');
    Some(Framing::Delimited(delimiter))
}

/// True if one of the object's first keys holds a list of rows.
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

/// A file's name in lower case, without the extension of a compression.
fn plain_name(path: &Path) -> String {
    let name = path.file_name().map(|n| n.to_string_lossy().to_lowercase()).unwrap_or_default();
    let plain = name.strip_suffix(".gz").or(name.strip_suffix(".zst")).unwrap_or(&name);
    plain.to_string()
}

//! Bytes to raw rows: JSON Lines and JSON, plain or compressed, found by content and read as a stream.
//!
//! A row is cut out of the stream before it is parsed. So a row that is broken is one bad row with its
//! place, never the end of the file, and the parsing itself runs in parallel ([`crate::pipeline`]).
//!
//! | first bytes | taken as |
//! |---|---|
//! | `1f 8b` / `28 b5 2f fd` | gzip / zstd around any of the others |
//! | `[` | a JSON array, one row per element |
//! | `{`, and the first line is a whole object | JSON Lines; an object with a list under `data`, `rows` or `train`, alone in its file, is a JSON file |
//! | `{`, and the first line ends inside it | a JSON object with a list under `data`, `rows` or `train` |
//! | anything else in a `.jsonl` or `.ndjson` file, or before a line that starts with `{` | JSON Lines with bad rows |

pub mod columnar;

use crate::{Error, Result, RowId};
use serde_json::Value;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The longest row that is read, in bytes. Byte offsets inside a row are `u32`.
pub const MAX_ROW_BYTES: usize = 1 << 30;

/// How much of the content is looked at to find its format.
const SNIFF_BYTES: usize = 1 << 16;

/// The keys under which a JSON object may hold its rows.
const LIST_KEYS: [&str; 3] = ["data", "rows", "train"];

/// A row as it stands in the source, not yet parsed.
#[derive(Clone, Debug)]
pub struct RawRow {
    /// Where it stands.
    pub id: RowId,
    /// Its bytes, without the line end; or why it could not be cut out.
    pub bytes: Result<Vec<u8>, String>,
}

/// How the rows are laid out in the decompressed bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// One JSON object per line.
    Lines,
    /// A JSON array of objects.
    Array,
    /// A JSON object with an array of objects under `data`, `rows` or `train`.
    Object,
}

/// Hashes and counts the file's own bytes (before decompression) as they pass.
struct Tally {
    inner: File,
    hasher: blake3::Hasher,
    read: Arc<AtomicU64>,
}

impl Read for Tally {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..n]);
        self.read.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

/// The decompressor, kept by kind so that the file below it can be had back for its hash.
enum Decoder {
    Plain(BufReader<Tally>),
    Gzip(BufReader<flate2::bufread::MultiGzDecoder<BufReader<Tally>>>),
    Zstd(BufReader<zstd::stream::read::Decoder<'static, BufReader<Tally>>>),
}

impl Decoder {
    fn reader(&mut self) -> &mut dyn BufRead {
        match self {
            Decoder::Plain(r) => r,
            Decoder::Gzip(r) => r,
            Decoder::Zstd(r) => r,
        }
    }

    fn into_file(self) -> BufReader<Tally> {
        match self {
            Decoder::Plain(r) => r,
            Decoder::Gzip(r) => r.into_inner().into_inner(),
            Decoder::Zstd(r) => r.into_inner().finish(),
        }
    }
}

/// A source of rows, read once from front to back.
pub struct Source {
    path: Arc<Path>,
    /// What was read ahead to find the layout, then the rest.
    head: io::Cursor<Vec<u8>>,
    decoder: Decoder,
    layout: Layout,
    size: u64,
    read: Arc<AtomicU64>,
    row: u64,
    line: u64,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Start,
    Rows,
    Done,
}

/// What a whole source was: part of the fingerprint of everything made from it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SourceHash {
    /// The file as the user named it.
    pub path: String,
    /// blake3 of the file's bytes (as stored: compressed files are hashed compressed), in hex.
    pub blake3: String,
    /// The file's length in bytes.
    pub bytes: u64,
}

impl Source {
    /// Opens a file and finds its layout.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be read; [`Error::Source`] where it is empty or holds no JSON.
    pub fn open(path: impl AsRef<Path>) -> Result<Source> {
        let path: Arc<Path> = Arc::from(path.as_ref());
        let io_error = |e| Error::io(&*path, e);
        let file = File::open(&path).map_err(io_error)?;
        let meta = file.metadata().map_err(io_error)?;
        if meta.is_dir() {
            return Err(source_error(
                &path,
                "is a folder, not a file of rows",
                "name a .jsonl or .json file (also .gz or .zst)",
            ));
        }
        let read = Arc::new(AtomicU64::new(0));
        let tally = Tally { inner: file, hasher: blake3::Hasher::new(), read: read.clone() };
        let mut plain = BufReader::with_capacity(1 << 18, tally);
        let magic = peek(&mut plain, 4).map_err(io_error)?;
        let mut decoder = if magic.starts_with(&[0x1f, 0x8b]) {
            let gz = flate2::bufread::MultiGzDecoder::new(plain);
            Decoder::Gzip(BufReader::with_capacity(1 << 18, gz))
        } else if magic.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
            let zst = zstd::stream::read::Decoder::with_buffer(plain).map_err(io_error)?;
            Decoder::Zstd(BufReader::with_capacity(1 << 18, zst))
        } else {
            Decoder::Plain(plain)
        };
        let mut head = Vec::new();
        decoder.reader().take(SNIFF_BYTES as u64).read_to_end(&mut head).map_err(io_error)?;
        let bom = head.starts_with(b"\xef\xbb\xbf");
        let layout = sniff(&path, if bom { &head[3..] } else { &head })?;
        let mut head = io::Cursor::new(head);
        head.set_position(if bom { 3 } else { 0 });
        Ok(Source {
            path,
            head,
            decoder,
            layout,
            size: meta.len(),
            read,
            row: 0,
            line: 0,
            state: State::Start,
        })
    }

    /// The file as the user named it.
    pub fn path(&self) -> &Arc<Path> {
        &self.path
    }

    /// How the rows are laid out.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The file's length in bytes, as stored.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// A counter of the stored bytes read so far, for progress.
    pub fn bytes_read(&self) -> Arc<AtomicU64> {
        self.read.clone()
    }

    /// The next row, or `None` at the end.
    ///
    /// # Errors
    /// [`Error::Io`] where reading or decompressing fails; [`Error::Source`] where the structure around the
    /// rows is broken. Rows that are broken in themselves are returned with the reason in [`RawRow::bytes`].
    pub fn next_row(&mut self) -> Result<Option<RawRow>> {
        if self.state == State::Done {
            return Ok(None);
        }
        let path = self.path.clone();
        let result = match self.layout {
            Layout::Lines => self.next_line(),
            Layout::Array | Layout::Object => self.next_element(),
        };
        match result {
            Ok(Some(bytes)) => {
                let line = (self.layout == Layout::Lines).then_some(self.line);
                let id = RowId { file: path, row: self.row, line };
                self.row += 1;
                Ok(Some(RawRow { id, bytes }))
            }
            Ok(None) => {
                self.state = State::Done;
                if self.row == 0 {
                    return Err(empty(&path));
                }
                Ok(None)
            }
            Err(Broken::Io(e)) => {
                self.state = State::Done;
                Err(Error::io(&*path, e))
            }
            Err(Broken::Structure(message)) => {
                self.state = State::Done;
                Err(source_error(&path, &message, "check that the file is complete and is one JSON value"))
            }
        }
    }

    /// Reads what is left and returns the hash of the whole file.
    ///
    /// # Errors
    /// [`Error::Io`] where reading fails.
    pub fn finish(self) -> Result<SourceHash> {
        let mut file = self.decoder.into_file();
        io::copy(&mut file, &mut io::sink()).map_err(|e| Error::io(&*self.path, e))?;
        Ok(SourceHash {
            path: self.path.display().to_string(),
            blake3: file.into_inner().hasher.finalize().to_hex().to_string(),
            bytes: self.read.load(Ordering::Relaxed),
        })
    }

    /// The next line that is not blank.
    fn next_line(&mut self) -> Result<Option<Result<Vec<u8>, String>>, Broken> {
        let mut reader = Chained { head: &mut self.head, tail: self.decoder.reader() };
        loop {
            let mut line = Vec::new();
            let mut length = 0usize;
            let mut ended = false;
            while !ended {
                let available = reader.fill()?;
                if available.is_empty() {
                    break;
                }
                let (take, end) = match memchr_newline(available) {
                    Some(at) => (at, true),
                    None => (available.len(), false),
                };
                if length + take <= MAX_ROW_BYTES {
                    line.extend_from_slice(&available[..take]);
                } else {
                    line = Vec::new();
                }
                length += take;
                ended = end;
                let used = take + usize::from(end);
                reader.consume(used);
            }
            if length == 0 && !ended {
                return Ok(None);
            }
            self.line += 1;
            if length > MAX_ROW_BYTES {
                return Ok(Some(Err(format!("the row has {length} bytes; the limit is {MAX_ROW_BYTES}"))));
            }
            if line.last() == Some(&b'\r') {
                line.pop();
            }
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            return Ok(Some(Ok(line)));
        }
    }

    /// The next element of the array.
    fn next_element(&mut self) -> Result<Option<Result<Vec<u8>, String>>, Broken> {
        let mut reader = Chained { head: &mut self.head, tail: self.decoder.reader() };
        let first = self.state == State::Start;
        if first {
            self.state = State::Rows;
            if self.layout == Layout::Object {
                enter_object(&mut reader)?;
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
                        self.row - 1
                    )));
                }
            }
        }
        match next {
            None => Err(Broken::cut()),
            Some(b']') => {
                reader.consume(1);
                leave(&mut reader, self.layout)?;
                Ok(None)
            }
            Some(_) => {
                let mut element = Vec::new();
                if reader.element(Some(&mut element))? {
                    return Ok(Some(Ok(element)));
                }
                // The file ends inside this row: say so here, and the stream is over.
                self.state = State::Done;
                Ok(Some(Err("the file ends in the middle of this row".into())))
            }
        }
    }
}

/// Why the stream cannot go on.
enum Broken {
    Io(io::Error),
    Structure(String),
}

impl Broken {
    fn cut() -> Broken {
        Broken::Structure("the file ends before its rows do".into())
    }
}

impl From<io::Error> for Broken {
    fn from(e: io::Error) -> Broken {
        Broken::Io(e)
    }
}

/// The head that was read ahead, then the rest of the stream.
struct Chained<'a> {
    head: &'a mut io::Cursor<Vec<u8>>,
    tail: &'a mut dyn BufRead,
}

impl Chained<'_> {
    fn in_head(&self) -> bool {
        (self.head.position() as usize) < self.head.get_ref().len()
    }

    fn fill(&mut self) -> io::Result<&[u8]> {
        if self.in_head() { self.head.fill_buf() } else { self.tail.fill_buf() }
    }

    fn consume(&mut self, n: usize) {
        if self.in_head() { self.head.consume(n) } else { self.tail.consume(n) }
    }

    fn peek(&mut self) -> io::Result<Option<u8>> {
        Ok(self.fill()?.first().copied())
    }

    /// Skips white space and returns the byte that stands there, not consumed.
    fn skip_space(&mut self) -> io::Result<Option<u8>> {
        loop {
            let available = self.fill()?;
            if available.is_empty() {
                return Ok(None);
            }
            let n = available.iter().take_while(|b| b.is_ascii_whitespace()).count();
            let found = available.get(n).copied();
            self.consume(n);
            if found.is_some() {
                return Ok(found);
            }
        }
    }

    fn expect(&mut self, byte: u8) -> Result<(), Broken> {
        match self.peek()? {
            Some(b) if b == byte => {
                self.consume(1);
                Ok(())
            }
            Some(b) => {
                let (want, got) = (byte.escape_ascii(), b.escape_ascii());
                Err(Broken::Structure(format!("expected \"{want}\", found \"{got}\"")))
            }
            None => Err(Broken::cut()),
        }
    }

    /// Passes one JSON value up to the `,`, `]` or `}` that ends it (not consumed), by brackets and strings
    /// alone: whether it is valid is the parser's business. False where the file ends first.
    fn element(&mut self, mut into: Option<&mut Vec<u8>>) -> Result<bool, Broken> {
        let mut scan = Scan::default();
        loop {
            let available = self.fill()?;
            if available.is_empty() {
                // A value in brackets is whole even so; what is missing is the structure around it.
                let whole = into.is_some_and(|out| matches!(out.last(), Some(b'}' | b']')));
                return Ok(whole && scan.depth == 0 && !scan.in_string);
            }
            let mut n = 0;
            let mut ended = false;
            for &byte in available {
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
            self.consume(n);
            if ended {
                if let Some(out) = into {
                    out.truncate(out.trim_ascii_end().len());
                }
                return Ok(true);
            }
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
fn enter_object(reader: &mut Chained<'_>) -> Result<(), Broken> {
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
        if !reader.element(None)? {
            return Err(Broken::cut());
        }
        if seen.len() < 12 {
            seen.push(key);
        }
    }
}

/// A JSON string as a key, the reader standing on its opening quote.
fn read_key(reader: &mut Chained<'_>) -> Result<String, Broken> {
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
fn leave(reader: &mut Chained<'_>, layout: Layout) -> Result<(), Broken> {
    if layout == Layout::Object {
        loop {
            match reader.skip_space()? {
                Some(b',') => {
                    reader.consume(1);
                    reader.element(None)?;
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

fn peek(reader: &mut BufReader<Tally>, n: usize) -> io::Result<Vec<u8>> {
    // One read may return less than asked; the formats' marks need four bytes at most.
    let first = reader.fill_buf()?;
    Ok(first[..first.len().min(n)].to_vec())
}

fn memchr_newline(bytes: &[u8]) -> Option<usize> {
    bytes.iter().position(|&b| b == b'\n')
}

fn source_error(path: &Path, message: &str, help: &str) -> Error {
    Error::Source { path: path.to_path_buf(), message: message.into(), help: help.into() }
}

fn empty(path: &Path) -> Error {
    source_error(path, "the file has no rows", "a source needs at least one row; was the export interrupted?")
}

/// The layout of decompressed content, from its first [`SNIFF_BYTES`].
fn sniff(path: &Path, head: &[u8]) -> Result<Layout> {
    if head.starts_with(b"\xff\xfe") || head.starts_with(b"\xfe\xff") {
        return Err(source_error(path, "the file is UTF-16", "save it as UTF-8"));
    }
    if head.starts_with(b"PAR1") {
        return Err(source_error(
            path,
            "Parquet is not supported yet",
            "export the rows as JSON Lines (.jsonl)",
        ));
    }
    let content = head.trim_ascii_start();
    if content.is_empty() {
        if head.len() >= SNIFF_BYTES {
            return Err(source_error(
                path,
                "the file starts with 64 KiB of white space",
                "is this the right file?",
            ));
        }
        return Err(empty(path));
    }
    let named_lines = {
        let name = path.file_name().map(|n| n.to_string_lossy().to_lowercase()).unwrap_or_default();
        let name = name.strip_suffix(".gz").or(name.strip_suffix(".zst")).unwrap_or(&name);
        name.ends_with(".jsonl") || name.ends_with(".ndjson")
    };
    match content[0] {
        b'[' => Ok(Layout::Array),
        b'{' => {
            let line_end = memchr_newline(content).unwrap_or(content.len());
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
            "the file is neither JSON nor JSON Lines",
            "rows are JSON objects: one per line, or in one array; .gz and .zst of either are read too",
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

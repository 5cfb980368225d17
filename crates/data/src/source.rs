//! Sources of rows: JSON Lines, JSON, CSV and TSV, plain or compressed, Parquet and Arrow. A source is one file or
//! several files in order, read as a stream; formats are detected from the content.
//!
//! Rows are separated before they are parsed. A malformed row is therefore one bad row with its position, not
//! the end of the file, and parsing runs in parallel ([`crate::Pipeline::rows`]).
//!
//! | first bytes | read as |
//! |---|---|
//! | `1f 8b` / `28 b5 2f fd` | gzip / zstd around any of the formats below except Parquet and Arrow |
//! | `PAR1` / `ARROW1`, `ff ff ff ff` | Parquet / Arrow ([`ColumnarFile`]) |
//! | any other, in a `.csv` or `.tsv` file | records below a header line |
//! | `[` | a JSON array, one row per element |
//! | `{`, and the first line is a complete object | JSON Lines; a single object with a list under `data`, `rows` or `train` is a JSON file |
//! | `{`, and the first line ends inside the object | a JSON object with a list under `data`, `rows` or `train`; else objects one after the other, as `jq` prints them |
//! | anything else in a `.jsonl` or `.ndjson` file, or before a line that starts with `{` | JSON Lines with bad rows |

mod arrow_json;
mod arrow_stream;
mod columnar;
mod delimited;
mod digest;
mod given;
mod hash;
mod hybrid;
mod json;
mod lenient;
mod lists;
mod numbers;
mod parquet;
mod raw;
mod record;
pub mod row;
mod saved;
mod scan;
mod sniff;
mod stream;

pub use self::parquet::Projection;
pub(crate) use arrow_json::{MEDIA, fails, is_json};
pub use arrow_json::{column_names, fields};
pub use columnar::ColumnarFile;
pub use given::Part;
pub use hash::{FileHash, SourceHash};
pub(crate) use lenient::{as_f64, number_of, parse, shown};
pub use raw::{Content, MAX_ROW_BYTES, MAX_TEXT_BYTES, RawRow};
pub use record::Header;
pub use row::Row;
pub use saved::{Saved, saved_dataset};
pub use sniff::{Framing, Kind, kind};

use crate::error::{empty, names_error, source_error};
use crate::{Error, Result, RowId};
use columnar::Columns;
use delimited::Delimited;
use given::Given;
use hash::hash;
use json::{Elements, Lines, Objects};
use sniff::{columns_in, sniff};
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use stream::{Broken, Stream};

/// A source of rows, one file or several in order, read once from start to end.
pub struct Source {
    name: Arc<Path>,
    /// The file being read; `None` after the last.
    current: Option<OpenFile>,
    /// The files after it.
    rest: VecDeque<PathBuf>,
    /// The files before it.
    read: Vec<FileHash>,
    size: u64,
    bytes_read: Arc<AtomicU64>,
    /// Selects columns of Parquet files; `None` reads all.
    projection: Option<Projection>,
    /// Rows returned so far.
    row: u64,
    /// True after the last row, and after an error.
    ended: bool,
}

/// Refuses a device, and a named pipe: opening one waits for a writer, and it can only be read once. A pipe that
/// is already open has a path under `/dev` or `/proc`.
#[cfg(unix)]
fn check_kind(path: &Path, meta: &std::fs::Metadata) -> Result<()> {
    use std::os::unix::fs::FileTypeExt;
    let kind = meta.file_type();
    let is_open = ["/dev/stdin", "/dev/fd", "/proc"].iter().any(|place| path.starts_with(place));
    if kind.is_char_device() || kind.is_block_device() || kind.is_socket() {
        return Err(source_error(
            path,
            "is a device, not a file of rows",
            "name a file, or pipe rows to /dev/stdin",
        ));
    }
    if kind.is_fifo() && !is_open {
        return Err(source_error(
            path,
            "is a named pipe, not a file of rows",
            "give it as /dev/stdin: --data /dev/stdin < PIPE",
        ));
    }
    Ok(())
}

#[cfg(not(unix))]
fn check_kind(_: &Path, _: &std::fs::Metadata) -> Result<()> {
    Ok(())
}

impl Source {
    /// Opens a file and detects its framing.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read; [`Error::Source`] if it is empty or its format is not recognised.
    pub fn open(path: impl AsRef<Path>) -> Result<Source> {
        let path = path.as_ref();
        Source::of(path, [path.to_path_buf()])
    }

    /// Opens several files as one source with its own name. Their formats may differ.
    ///
    /// # Errors
    /// As [`Source::open`] for the first file; [`Error::Io`] if another is missing; [`Error::Source`] if the
    /// list is empty or names a folder.
    pub fn of(name: impl AsRef<Path>, files: impl IntoIterator<Item = PathBuf>) -> Result<Source> {
        let name: Arc<Path> = Arc::from(name.as_ref());
        let mut rest: VecDeque<PathBuf> = files.into_iter().collect();
        let mut size = 0;
        for path in &rest {
            let meta = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
            if meta.is_dir() {
                return Err(source_error(
                    path,
                    "is a folder, not a file of rows",
                    "name a file of rows: .jsonl, .json, .csv or .tsv (also .gz or .zst), .parquet or .arrow",
                ));
            }
            check_kind(path, &meta)?;
            size += meta.len();
        }
        let Some(first) = rest.pop_front() else {
            return Err(source_error(&name, "there are no files", "name at least one file of rows"));
        };
        let bytes_read = Arc::new(AtomicU64::new(0));
        let current = OpenFile::open(&first, &bytes_read, None)?;
        Ok(Source {
            name,
            current: Some(current),
            rest,
            read: Vec::new(),
            size,
            bytes_read,
            projection: None,
            row: 0,
            ended: false,
        })
    }

    /// Rows that a program passes in parts, under a name of its choice. They are counted as rows of one file;
    /// their hash depends on their content, not on the division into parts.
    pub fn given(
        name: impl AsRef<Path>,
        parts: impl Iterator<Item = Result<Part>> + Send + 'static,
    ) -> Source {
        let name: Arc<Path> = Arc::from(name.as_ref());
        let reader = Reader::Given(Box::new(Given::new(Box::new(parts))));
        Source {
            name: name.clone(),
            current: Some(OpenFile { path: name, framing: Framing::Given, reader, rows: 0 }),
            rest: VecDeque::new(),
            read: Vec::new(),
            size: 0,
            bytes_read: Arc::new(AtomicU64::new(0)),
            projection: None,
            row: 0,
            ended: false,
        }
    }

    /// The same source with `row` as the number of its next row, for a part of a longer source.
    #[must_use]
    pub fn numbered_from(mut self, row: u64) -> Source {
        self.row = row;
        self.current.iter_mut().for_each(|file| file.rows = row);
        self
    }

    /// The framing of the file being read; `None` after the last.
    pub fn framing(&self) -> Option<Framing> {
        self.current.as_ref().map(|file| file.framing)
    }

    /// Reads only the selected columns of Parquet files. Call it before the first row: a file whose rows were
    /// already read in part keeps all of its columns.
    pub fn project(&mut self, projection: Projection) {
        if let Some(OpenFile { reader: Reader::Columns(columns), .. }) = &mut self.current {
            columns.file.project(&projection);
        }
        self.projection = Some(projection);
    }

    /// The name of the source in errors.
    pub(crate) fn name(&self) -> &Arc<Path> {
        &self.name
    }

    /// Total size of all files in bytes, as stored.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The number of stored bytes read so far, for progress displays.
    pub fn bytes_read(&self) -> Arc<AtomicU64> {
        self.bytes_read.clone()
    }

    /// The next row, or `None` at the end.
    ///
    /// # Errors
    /// [`Error::Io`] if reading or decompressing fails; [`Error::Source`] if the structure around the rows is
    /// malformed or a file has no rows. A malformed row is not an error here: it is returned with the reason
    /// in [`RawRow::content`].
    pub fn next_row(&mut self) -> Result<Option<RawRow>> {
        if self.ended {
            return Ok(None);
        }
        let row = self.advance();
        self.ended = !matches!(row, Ok(Some(_)));
        row
    }

    fn advance(&mut self) -> Result<Option<RawRow>> {
        while let Some(file) = &mut self.current {
            let path = file.path.clone();
            if let Some((line, content, size)) = file.next()? {
                let id = RowId { file: path, row: self.row, line, in_file: file.rows };
                file.rows += 1;
                self.row += 1;
                return Ok(Some(RawRow { id, content, size }));
            }
            if file.rows == 0 {
                return Err(match file.framing {
                    Framing::Given => {
                        source_error(&path, "there are no rows", "a source needs at least one row")
                    }
                    _ => empty(&path),
                });
            }
            let Some(next) = self.rest.pop_front() else { return Ok(None) };
            let next = OpenFile::open(&next, &self.bytes_read, self.projection.as_ref())?;
            self.read.extend(self.current.replace(next).map(OpenFile::finish).transpose()?);
        }
        Ok(None)
    }

    /// Reads the remaining bytes and returns the hash of the whole source.
    ///
    /// # Errors
    /// [`Error::Io`] if reading fails.
    pub fn finish(self) -> Result<SourceHash> {
        let mut files = self.read;
        files.extend(self.current.map(OpenFile::finish).transpose()?);
        for path in self.rest {
            files.push(hash(&path)?);
        }
        let bytes = files.iter().map(|file| file.bytes).sum();
        let path = self.name.display().to_string();
        if let [file] = files.as_slice() {
            return Ok(SourceHash { path, blake3: file.blake3.clone(), bytes, files: Vec::new() });
        }
        let mut hasher = blake3::Hasher::new();
        for file in &files {
            hasher.update(file.blake3.as_bytes()).update(b"\n");
        }
        Ok(SourceHash { path, blake3: hasher.finalize().to_hex().to_string(), bytes, files })
    }
}

/// A file being read.
struct OpenFile {
    path: Arc<Path>,
    framing: Framing,
    reader: Reader,
    /// Rows returned so far from this file.
    rows: u64,
}

enum Reader {
    Lines(Lines),
    Elements(Elements),
    Objects(Objects),
    Delimited(Delimited),
    Columns(Box<Columns>),
    Given(Box<Given>),
}

impl OpenFile {
    fn open(path: &Path, bytes_read: &Arc<AtomicU64>, projection: Option<&Projection>) -> Result<OpenFile> {
        let (framing, reader) = if let Some(kind) = columns_in(path)? {
            let mut file = ColumnarFile::open(path)?;
            if let Some(projection) = projection {
                file.project(projection);
            }
            let columns = Columns::new(file, bytes_read.clone());
            (Framing::Columns(kind), Reader::Columns(Box::new(columns)))
        } else {
            let stream = Stream::open(path, bytes_read.clone())?;
            let framing = sniff(path, stream.head())?;
            let reader = match framing {
                Framing::Lines => Reader::Lines(Lines::new(stream)),
                Framing::Delimited(delimiter) => Reader::Delimited(Delimited::new(stream, delimiter, path)?),
                Framing::Objects => Reader::Objects(Objects::new(stream)),
                framing => Reader::Elements(Elements::new(stream, framing == Framing::Object)),
            };
            (framing, reader)
        };
        Ok(OpenFile { path: Arc::from(path), framing, reader, rows: 0 })
    }

    /// The next row as `(line, content, size in bytes)`; `line` is `None` in formats without lines.
    fn next(&mut self) -> Result<Option<(Option<u64>, Result<Content, String>, usize)>> {
        let next = match &mut self.reader {
            Reader::Lines(lines) => {
                lines.next().map(|next| next.map(|(line, bytes)| (Some(line), bytes.map(Content::Json))))
            }
            Reader::Elements(elements) => {
                elements.next().map(|next| next.map(|bytes| (None, bytes.map(Content::Json))))
            }
            Reader::Objects(objects) => {
                objects.next().map(|next| next.map(|bytes| (None, bytes.map(Content::Json))))
            }
            Reader::Delimited(records) => records.next().map(|next| {
                let content = |bytes| Content::Record(records.header.clone(), bytes);
                next.map(|(line, bytes)| (Some(line), bytes.map(content)))
            }),
            Reader::Columns(columns) => {
                let next = columns.next()?;
                return Ok(next.map(|(batch, row, size)| (None, Ok(Content::Columns(batch, row)), size)));
            }
            Reader::Given(given) => {
                return Ok(given.next()?.map(|(content, size)| (None, Ok(content), size)));
            }
        };
        match next {
            Ok(next) => Ok(next.map(|(line, content)| {
                let size = match &content {
                    Ok(Content::Json(bytes) | Content::Record(_, bytes)) => bytes.len(),
                    _ => 0,
                };
                (line, content, size)
            })),
            Err(Broken::Io(e)) => Err(Error::io(&*self.path, e)),
            Err(Broken::Structure(message)) => {
                let help = "check that the file is complete and is one JSON value";
                Err(source_error(&self.path, &message, help))
            }
        }
    }

    fn finish(self) -> Result<FileHash> {
        let stream = match self.reader {
            Reader::Lines(Lines { stream, .. })
            | Reader::Elements(Elements { stream, .. })
            | Reader::Objects(Objects { stream, .. })
            | Reader::Delimited(Delimited { stream, .. }) => stream,
            Reader::Columns(columns) => return columns.file.finish(),
            Reader::Given(given) => return Ok(given.finish(&self.path)),
        };
        stream.finish(&self.path)
    }
}

//! Bytes to raw rows: JSON Lines, JSON, CSV and TSV, plain or compressed, Parquet and Arrow, found by content and read
//! as a stream; one file, or several one after the other.
//!
//! A row is cut out of the stream before it is parsed. So a row that is broken is one bad row with its
//! place, never the end of the file, and the parsing itself runs in parallel ([`crate::pipeline`]).
//!
//! | first bytes | taken as |
//! |---|---|
//! | `1f 8b` / `28 b5 2f fd` | gzip / zstd around any of the others |
//! | `PAR1` / `ARROW1`, `ff ff ff ff` | Parquet / Arrow ([`columnar`]) |
//! | any other, in a `.csv` or `.tsv` file | records under a line of names |
//! | `[` | a JSON array, one row per element |
//! | `{`, and the first line is a whole object | JSON Lines; an object with a list under `data`, `rows` or `train`, alone in its file, is a JSON file |
//! | `{`, and the first line ends inside it | a JSON object with a list under `data`, `rows` or `train` |
//! | anything else in a `.jsonl` or `.ndjson` file, or before a line that starts with `{` | JSON Lines with bad rows |

pub mod columnar;
mod delimited;
mod json;
mod stream;

pub use delimited::Header;

use crate::error::{empty, names_error, source_error};
use crate::{Error, Result, RowId};
use arrow_array::RecordBatch;
use columnar::{ColumnarFile, Kind};
use delimited::Delimited;
use json::{Elements, Lines};
use std::collections::VecDeque;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use stream::{Broken, Stream};

/// The longest row that is read, in bytes. Byte offsets inside a row are `u32`.
pub const MAX_ROW_BYTES: usize = 1 << 30;

/// A row as it stands in the source, not yet parsed.
#[derive(Clone, Debug)]
pub struct RawRow {
    /// Where it stands.
    pub id: RowId,
    /// What stands there; or why it could not be cut out.
    pub content: Result<Content, String>,
    /// About how much memory it holds, in bytes.
    pub size: usize,
}

/// What a row is before it is parsed.
#[derive(Clone, Debug)]
pub enum Content {
    /// A JSON value, without the line end.
    Json(Vec<u8>),
    /// A record of a delimited file, and the names of its cells.
    Record(Arc<Header>, Vec<u8>),
    /// A row of a batch of columns, by its index in it.
    Columns(Arc<RecordBatch>, usize),
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
    /// Records of cells between this delimiter, under a line of names.
    Delimited(u8),
    /// Columns.
    Columns(Kind),
}

/// What a whole source was: part of the fingerprint of everything made from it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SourceHash {
    /// The source as the user named it.
    pub path: String,
    /// For one file, blake3 of its bytes (as stored: compressed files are hashed compressed), in hex. For several,
    /// blake3 of their hashes, each with a line end, in order.
    pub blake3: String,
    /// The length of all files together, in bytes.
    pub bytes: u64,
    /// The files, where there are several.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<FileHash>,
}

/// One file of a source.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct FileHash {
    /// The file.
    pub path: String,
    /// blake3 of its bytes as stored, in hex.
    pub blake3: String,
    /// Its length in bytes.
    pub bytes: u64,
}

/// A source of rows, read once from front to back: a file, or several one after the other.
pub struct Source {
    name: Arc<Path>,
    /// The file that is being read; none after the last.
    current: Option<OpenFile>,
    /// The files after it.
    rest: VecDeque<PathBuf>,
    /// The files before it.
    read: Vec<FileHash>,
    size: u64,
    bytes_read: Arc<AtomicU64>,
    /// Rows handed out.
    row: u64,
    /// True after the last row, and after an error.
    ended: bool,
}

impl Source {
    /// Opens a file and finds its layout.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be read; [`Error::Source`] where it is empty or of no known layout.
    pub fn open(path: impl AsRef<Path>) -> Result<Source> {
        let path = path.as_ref();
        Source::of(path, [path.to_path_buf()])
    }

    /// Opens files that are one source under a name of its own. They need not be of one layout.
    ///
    /// # Errors
    /// As [`Source::open`] for the first of them; [`Error::Io`] where one of the others is not there;
    /// [`Error::Source`] where there is none.
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
            size += meta.len();
        }
        let Some(first) = rest.pop_front() else {
            return Err(source_error(&name, "there are no files", "name at least one file of rows"));
        };
        let bytes_read = Arc::new(AtomicU64::new(0));
        let current = OpenFile::open(&first, &bytes_read)?;
        Ok(Source {
            name,
            current: Some(current),
            rest,
            read: Vec::new(),
            size,
            bytes_read,
            row: 0,
            ended: false,
        })
    }

    /// How the rows of the file that is being read are laid out; `None` after the last.
    pub fn layout(&self) -> Option<Layout> {
        self.current.as_ref().map(|file| file.layout)
    }

    /// The length of all files together in bytes, as stored.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// A counter of the stored bytes read so far, for progress.
    pub fn bytes_read(&self) -> Arc<AtomicU64> {
        self.bytes_read.clone()
    }

    /// The next row, or `None` at the end.
    ///
    /// # Errors
    /// [`Error::Io`] where reading or decompressing fails; [`Error::Source`] where the structure around the
    /// rows is broken, or a file has none. Rows that are broken in themselves are returned with the reason in
    /// [`RawRow::content`].
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
                return Err(empty(&path));
            }
            let Some(next) = self.rest.pop_front() else { return Ok(None) };
            let next = OpenFile::open(&next, &self.bytes_read)?;
            self.read.extend(self.current.replace(next).map(OpenFile::finish).transpose()?);
        }
        Ok(None)
    }

    /// Reads what is left and returns the hash of the whole source.
    ///
    /// # Errors
    /// [`Error::Io`] where reading fails.
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
    layout: Layout,
    reader: Reader,
    /// Rows read.
    rows: u64,
}

enum Reader {
    Lines(Lines),
    Elements(Elements),
    Delimited(Delimited),
    Columns(Box<Columns>),
}

impl OpenFile {
    fn open(path: &Path, bytes_read: &Arc<AtomicU64>) -> Result<OpenFile> {
        let (layout, reader) = if let Some(kind) = columns_in(path)? {
            let columns = Columns::new(ColumnarFile::open(path)?, bytes_read.clone());
            (Layout::Columns(kind), Reader::Columns(Box::new(columns)))
        } else {
            let stream = Stream::open(path, bytes_read.clone())?;
            let layout = json::sniff(path, stream.head())?;
            let reader = match layout {
                Layout::Lines => Reader::Lines(Lines::new(stream)),
                Layout::Delimited(delimiter) => Reader::Delimited(Delimited::new(stream, delimiter, path)?),
                layout => Reader::Elements(Elements::new(stream, layout == Layout::Object)),
            };
            (layout, reader)
        };
        Ok(OpenFile { path: Arc::from(path), layout, reader, rows: 0 })
    }

    /// The next row and its size, with its line where there are lines.
    fn next(&mut self) -> Result<Option<(Option<u64>, Result<Content, String>, usize)>> {
        let next = match &mut self.reader {
            Reader::Lines(lines) => {
                lines.next().map(|next| next.map(|(line, bytes)| (Some(line), bytes.map(Content::Json))))
            }
            Reader::Elements(elements) => {
                elements.next().map(|next| next.map(|bytes| (None, bytes.map(Content::Json))))
            }
            Reader::Delimited(records) => records.next().map(|next| {
                let content = |bytes| Content::Record(records.header.clone(), bytes);
                next.map(|(line, bytes)| (Some(line), bytes.map(content)))
            }),
            Reader::Columns(columns) => {
                let next = columns.next()?;
                return Ok(next.map(|(batch, row, size)| (None, Ok(Content::Columns(batch, row)), size)));
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
            | Reader::Delimited(Delimited { stream, .. }) => stream,
            Reader::Columns(columns) => return columns.file.finish(),
        };
        stream.finish(&self.path)
    }
}

/// The kind of columns that a file's first bytes say it holds. A pipe can be read only once and is not asked.
fn columns_in(path: &Path) -> Result<Option<Kind>> {
    let io_error = |e| Error::io(path, e);
    let file = File::open(path).map_err(io_error)?;
    if !file.metadata().map_err(io_error)?.is_file() {
        return Ok(None);
    }
    let mut head = Vec::new();
    file.take(8).read_to_end(&mut head).map_err(io_error)?;
    Ok(columnar::kind(&head))
}

/// A row per row of a columnar file.
struct Columns {
    file: ColumnarFile,
    /// Rows being handed out, the next of them, and the mean size of one in bytes.
    batch: Option<(Arc<RecordBatch>, usize, usize)>,
    /// Bytes of this file that the source's counter has.
    counted: u64,
    bytes_read: Arc<AtomicU64>,
}

impl Columns {
    fn new(file: ColumnarFile, bytes_read: Arc<AtomicU64>) -> Columns {
        Columns { file, batch: None, counted: 0, bytes_read }
    }

    fn next(&mut self) -> Result<Option<(Arc<RecordBatch>, usize, usize)>> {
        loop {
            if let Some((batch, next, size)) = &mut self.batch
                && *next < batch.num_rows()
            {
                *next += 1;
                return Ok(Some((batch.clone(), *next - 1, *size)));
            }
            let batch = self.file.next_batch()?;
            let read = self.file.bytes_read().load(Ordering::Relaxed);
            self.bytes_read.fetch_add(read.saturating_sub(self.counted), Ordering::Relaxed);
            self.counted = read;
            let Some(batch) = batch else { return Ok(None) };
            let bytes = |column: &Arc<dyn arrow_array::Array>| column.to_data().get_slice_memory_size();
            let bytes: usize = batch.columns().iter().filter_map(|column| bytes(column).ok()).sum();
            let size = bytes / batch.num_rows().max(1);
            self.batch = Some((batch, 0, size));
        }
    }
}

/// The hash of a file that is not read otherwise.
fn hash(path: &Path) -> Result<FileHash> {
    let io_error = |e| Error::io(path, e);
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(File::open(path).map_err(io_error)?).map_err(io_error)?;
    let blake3 = hasher.finalize().to_hex().to_string();
    Ok(FileHash { path: path.display().to_string(), blake3, bytes: hasher.count() })
}

/// A file's name in lower case without what says that it is compressed.
fn plain_name(path: &Path) -> String {
    let name = path.file_name().map(|n| n.to_string_lossy().to_lowercase()).unwrap_or_default();
    let plain = name.strip_suffix(".gz").or(name.strip_suffix(".zst")).unwrap_or(&name);
    plain.to_string()
}

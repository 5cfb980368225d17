//! The Arrow IPC stream format, message by message.
//!
//! Messages are separated here, and only decoded by arrow-ipc. So every length in the file is checked against the
//! available bytes before memory is allocated for it.

use super::sniff::{CONTINUATION, Kind};
use super::source_error;
use crate::Error;
use crate::guard::guard;
use arrow_array::RecordBatch;
use arrow_buffer::Buffer;
use arrow_ipc::reader::StreamDecoder;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The longest buffer that is decompressed, in bytes. The file states its length, which is allocated before
/// decompression. The 32-bit offsets of a longer column would overflow anyway.
const MAX_BUFFER: i64 = 1 << 31;

/// Why a message of an Arrow file cannot be read.
pub(super) enum Broken {
    Io(io::Error),
    Content(String),
}

impl Broken {
    pub fn name(self, path: &Path, kind: Kind) -> Error {
        match self {
            Broken::Io(e) => Error::io(path, e),
            Broken::Content(message) => broken(path, kind, &message),
        }
    }

    fn cut() -> Broken {
        Broken::Content("it ends inside a message".into())
    }
}

/// The end of the stream in an Arrow IPC file: `.. stream, footer, i32 length of the footer, "ARROW1"`.
pub(super) fn footer(file: &mut File, size: u64) -> Result<u64, Broken> {
    let mut tail = [0; 10];
    if size < 8 + 10 {
        return Err(Broken::Content("it has no footer".into()));
    }
    file.seek(SeekFrom::End(-10)).map_err(Broken::Io)?;
    file.read_exact(&mut tail).map_err(Broken::Io)?;
    file.rewind().map_err(Broken::Io)?;
    let length = u64::from(u32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]));
    match size.checked_sub(10 + length) {
        Some(end) if &tail[4..] == b"ARROW1" && end >= 8 => Ok(end),
        _ => Err(Broken::Content("it has no footer".into())),
    }
}

/// The messages of an Arrow stream, one at a time.
pub(super) struct Messages {
    file: BufReader<File>,
    pub hasher: blake3::Hasher,
    read: Arc<AtomicU64>,
    /// Bytes read so far, and the last possible end of the stream.
    at: u64,
    end: u64,
    file_kind: bool,
    decoder: StreamDecoder,
    /// Bytes that the decoder has not consumed yet.
    buffer: Buffer,
    done: bool,
}

impl Messages {
    pub fn new(file: File, end: u64, read: Arc<AtomicU64>) -> Messages {
        Messages {
            file: BufReader::with_capacity(1 << 16, file),
            hasher: blake3::Hasher::new(),
            read,
            at: 0,
            end,
            file_kind: false,
            decoder: StreamDecoder::new(),
            buffer: Buffer::default(),
            done: false,
        }
    }

    /// Skips the magic number of the file format and reads the schema.
    pub fn start(&mut self, kind: Kind) -> Result<(), Broken> {
        self.file_kind = kind == Kind::ArrowFile;
        if self.file_kind {
            // "ARROW1" and padding.
            self.take(8, &mut Vec::new())?;
        }
        let mut message = Vec::new();
        if !self.message(&mut message)? {
            return Err(Broken::Content("it describes no columns".into()));
        }
        self.buffer = Buffer::from_vec(message);
        self.decode().map(|_| ())
    }

    /// The next batch.
    pub fn next(&mut self) -> Result<Option<RecordBatch>, Broken> {
        loop {
            // The decoder handles a message without a body only when the next one arrives, and then leaves
            // that one in the buffer.
            if !self.buffer.is_empty() {
                if let Some(batch) = self.decode()? {
                    return Ok(Some(batch));
                }
                continue;
            }
            if self.done {
                return Ok(None);
            }
            let mut message = Vec::new();
            if !self.message(&mut message)? {
                self.done = true;
                message = [CONTINUATION, [0; 4]].concat();
            }
            self.buffer = Buffer::from_vec(message);
        }
    }

    fn decode(&mut self) -> Result<Option<RecordBatch>, Broken> {
        let decoded = guard(|| self.decoder.decode(&mut self.buffer));
        if decoded.is_err() {
            self.done = true;
            self.buffer = Buffer::default();
        }
        decoded.map_err(Broken::Content)
    }

    /// Appends the next message to `out`; false at the end of the stream.
    fn message(&mut self, out: &mut Vec<u8>) -> Result<bool, Broken> {
        if self.file_kind && self.at == self.end {
            return Ok(false);
        }
        if self.at == self.end {
            return Err(Broken::Content("it has no end mark".into()));
        }
        self.take(8, out)?;
        if out[..4] != CONTINUATION {
            return Err(Broken::Content("a message does not start with ff ff ff ff".into()));
        }
        let length = u32::from_le_bytes([out[4], out[5], out[6], out[7]]);
        if length == 0 {
            return Ok(false);
        }
        self.take(u64::from(length), out)?;
        let body = {
            let message =
                arrow_ipc::root_as_message(&out[8..]).map_err(|e| Broken::Content(e.to_string()))?;
            u64::try_from(message.bodyLength()).map_err(|_| Broken::cut())?
        };
        let start = out.len();
        self.take(body, out)?;
        let (head, body) = out.split_at(start);
        let message = arrow_ipc::root_as_message(&head[8..]).map_err(|e| Broken::Content(e.to_string()))?;
        let dictionary = message.header_as_dictionary_batch().and_then(|d| d.data());
        match message.header_as_record_batch().or(dictionary) {
            Some(batch) => check_buffers(&batch, body).map(|()| true),
            None => Ok(true),
        }
    }

    /// Appends the next `n` bytes to `out`.
    fn take(&mut self, n: u64, out: &mut Vec<u8>) -> Result<(), Broken> {
        if n > self.end - self.at {
            return Err(Broken::cut());
        }
        let from = out.len();
        // The file may be shorter than its metadata states.
        out.reserve(n as usize);
        let got = self.file.by_ref().take(n).read_to_end(out).map_err(Broken::Io)?;
        self.hasher.update(&out[from..]);
        self.at += got as u64;
        self.read.fetch_add(got as u64, Ordering::Relaxed);
        if got as u64 == n { Ok(()) } else { Err(Broken::cut()) }
    }

    /// Hashes the remaining bytes of the file.
    pub fn drain(&mut self) -> io::Result<()> {
        self.hasher.update_reader(&mut self.file).map(|_| ())
    }
}

/// Checks the buffers of a batch against its body: their ranges (arrow-ipc panics on a buffer outside of the
/// body), and the lengths that compressed buffers state in their first 8 bytes.
fn check_buffers(batch: &arrow_ipc::RecordBatch<'_>, body: &[u8]) -> Result<(), Broken> {
    let compressed = batch.compression().is_some();
    for buffer in batch.buffers().into_iter().flatten() {
        let place = usize::try_from(buffer.offset()).ok().zip(usize::try_from(buffer.length()).ok());
        // The format requires multiples of 8.
        let bytes = place.filter(|(at, _)| at % 8 == 0).and_then(|(at, n)| body.get(at..at.checked_add(n)?));
        let Some(bytes) = bytes else {
            return Err(Broken::Content("a buffer is outside of its message".into()));
        };
        let stated = bytes.first_chunk().map_or(0, |first| i64::from_le_bytes(*first));
        if compressed && stated > MAX_BUFFER {
            return Err(Broken::Content(format!("a buffer states a length of {stated} bytes")));
        }
    }
    Ok(())
}

pub(super) fn broken(path: &Path, kind: Kind, message: &str) -> Error {
    let name = match kind {
        Kind::Parquet => "Parquet file",
        Kind::ArrowFile | Kind::ArrowStream => "Arrow file",
    };
    source_error(
        path,
        &format!("the {name} is truncated or malformed: {message}"),
        "was the download or export interrupted? fetch or write the file again",
    )
}

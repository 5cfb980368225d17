//! The decompressed bytes of a file. The file is hashed as stored while it is read.

use super::hash::FileHash;
use crate::{Error, Result};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of decompressed content read ahead to detect the format.
pub(super) const HEAD_BYTES: usize = 1 << 16;

/// Why a stream cannot be read further.
pub(super) enum Broken {
    Io(io::Error),
    Structure(String),
}

impl Broken {
    pub(super) fn cut() -> Broken {
        Broken::Structure("the file ends before its rows do".into())
    }
}

impl From<io::Error> for Broken {
    fn from(e: io::Error) -> Broken {
        Broken::Io(e)
    }
}

/// Hashes and counts the bytes of the file, before decompression.
struct Tally {
    inner: File,
    hasher: blake3::Hasher,
    bytes: u64,
    /// Bytes read from all files of the source, for progress displays.
    total: Arc<AtomicU64>,
}

impl Read for Tally {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..n]);
        self.bytes += n as u64;
        self.total.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

/// The decompressor. An enum, so that the file below it can be recovered for its hash.
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

/// The decompressed content of a file: the head, which was read ahead, then the rest.
pub(super) struct Stream {
    head: io::Cursor<Vec<u8>>,
    decoder: Decoder,
}

impl Stream {
    /// Opens a file, detects its compression by its first bytes, reads the head and skips a byte order mark.
    pub(super) fn open(path: &Path, total: Arc<AtomicU64>) -> Result<Stream> {
        let io_error = |e| Error::io(path, e);
        let inner = File::open(path).map_err(io_error)?;
        let tally = Tally { inner, hasher: blake3::Hasher::new(), bytes: 0, total };
        let mut plain = BufReader::with_capacity(1 << 18, tally);
        // A read may return few bytes; the longest magic number has four bytes.
        let magic = plain.fill_buf().map_err(io_error)?;
        let (gzip, zstd) = (magic.starts_with(b"\x1f\x8b"), magic.starts_with(b"\x28\xb5\x2f\xfd"));
        let mut decoder = if gzip {
            let gz = flate2::bufread::MultiGzDecoder::new(plain);
            Decoder::Gzip(BufReader::with_capacity(1 << 18, gz))
        } else if zstd {
            let zst = zstd::stream::read::Decoder::with_buffer(plain).map_err(io_error)?;
            Decoder::Zstd(BufReader::with_capacity(1 << 18, zst))
        } else {
            Decoder::Plain(plain)
        };
        let mut head = Vec::new();
        decoder.reader().take(HEAD_BYTES as u64).read_to_end(&mut head).map_err(io_error)?;
        let bom = head.starts_with(b"\xef\xbb\xbf");
        let mut head = io::Cursor::new(head);
        head.set_position(if bom { 3 } else { 0 });
        Ok(Stream { head, decoder })
    }

    /// The part of the head that is not consumed yet.
    pub(super) fn head(&self) -> &[u8] {
        &self.head.get_ref()[self.head.position() as usize..]
    }

    /// Reads the remaining bytes and returns the hash of the whole file.
    pub(super) fn finish(self, path: &Path) -> Result<FileHash> {
        let mut file = self.decoder.into_file();
        io::copy(&mut file, &mut io::sink()).map_err(|e| Error::io(path, e))?;
        let tally = file.into_inner();
        Ok(FileHash {
            path: path.display().to_string(),
            blake3: tally.hasher.finalize().to_hex().to_string(),
            bytes: tally.bytes,
        })
    }

    fn in_head(&self) -> bool {
        (self.head.position() as usize) < self.head.get_ref().len()
    }

    /// The next bytes; empty only at the end.
    pub(super) fn fill(&mut self) -> io::Result<&[u8]> {
        if self.in_head() { self.head.fill_buf() } else { self.decoder.reader().fill_buf() }
    }

    pub(super) fn consume(&mut self, n: usize) {
        if self.in_head() { self.head.consume(n) } else { self.decoder.reader().consume(n) }
    }

    pub(super) fn peek(&mut self) -> io::Result<Option<u8>> {
        Ok(self.fill()?.first().copied())
    }

    /// Skips white space and returns the next byte without consuming it.
    pub(super) fn skip_space(&mut self) -> io::Result<Option<u8>> {
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

    pub(super) fn expect(&mut self, byte: u8) -> Result<(), Broken> {
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
}

//! Files that are whole or not there.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use tempfile::NamedTempFile;

/// A file that appears under its name only when it is complete.
///
/// Bytes go to a temporary name in the same folder. [`AtomicFile::commit`] brings them to the disk and renames;
/// dropped before that, nothing is left and what stood under the name before stays as it was. A name that ends
/// in `.gz` or `.zst` is compressed.
pub struct AtomicFile {
    target: std::path::PathBuf,
    writer: Writer,
}

enum Writer {
    Plain(BufWriter<Tally>),
    Gzip(flate2::write::GzEncoder<BufWriter<Tally>>),
    Zstd(zstd::stream::write::Encoder<'static, BufWriter<Tally>>),
}

/// What was written, as it is stored (compressed where the file is).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    /// The file's length in bytes.
    pub bytes: u64,
    /// blake3 of its bytes, in hex.
    pub blake3: String,
}

impl Written {
    /// What a file holds.
    ///
    /// # Errors
    /// [`Error::Io`] where it cannot be read.
    pub fn of(path: &Path) -> Result<Written> {
        let mut hasher = blake3::Hasher::new();
        let bytes = File::open(path).and_then(|mut file| io::copy(&mut file, &mut hasher));
        let bytes = bytes.map_err(|e| Error::io(path, e))?;
        Ok(Written { bytes, blake3: hasher.finalize().to_hex().to_string() })
    }
}

/// The file below the compressor: counts and hashes its bytes as they pass.
struct Tally {
    file: NamedTempFile,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl Write for Tally {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.file.write(bytes)?;
        self.hasher.update(&bytes[..n]);
        self.bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// A file that is complete and on the disk, and not yet under its name.
pub struct Complete {
    target: std::path::PathBuf,
    file: NamedTempFile,
    /// What it holds.
    pub written: Written,
}

impl Complete {
    /// Gives the file its name.
    ///
    /// # Errors
    /// [`Error::Io`]; then nothing is left behind.
    pub fn publish(self) -> Result<Written> {
        let Complete { target, file, written } = self;
        file.persist(&target).map_err(|e| Error::io(&target, e.error))?;
        sync_folder(&target);
        Ok(written)
    }
}

/// Makes a rename durable: it is, once its folder is. Not every file system lets a folder be synced.
pub(crate) fn sync_folder(target: &Path) {
    if let Some(folder) = target.parent() {
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        if let Ok(folder) = File::open(folder) {
            let _ = folder.sync_all();
        }
    }
}

impl AtomicFile {
    /// Starts a file.
    ///
    /// # Errors
    /// [`Error::Io`] where its folder is not there or cannot be written to.
    pub fn create(path: impl AsRef<Path>) -> Result<AtomicFile> {
        let target = path.as_ref().to_path_buf();
        let folder = match target.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let name = target.file_name().map(|n| n.to_string_lossy().into_owned());
        let Some(name) = name.filter(|_| !target.is_dir()) else {
            return Err(Error::io(
                &target,
                io::Error::new(io::ErrorKind::IsADirectory, "is a folder, not a file"),
            ));
        };
        let mut builder = tempfile::Builder::new();
        let prefix = format!(".suasion-tmp-{name}.");
        builder.prefix(&prefix).suffix(".part");
        #[cfg(unix)]
        {
            // The mode of an ordinary file (the umask applies), not a temporary file's private one.
            use std::os::unix::fs::PermissionsExt;
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        let file = builder.tempfile_in(folder).map_err(|e| Error::io(&target, e))?;
        let tally = Tally { file, hasher: blake3::Hasher::new(), bytes: 0 };
        let buffered = BufWriter::with_capacity(1 << 18, tally);
        let writer = if name.ends_with(".gz") {
            Writer::Gzip(flate2::write::GzEncoder::new(buffered, flate2::Compression::default()))
        } else if name.ends_with(".zst") {
            Writer::Zstd(zstd::stream::write::Encoder::new(buffered, 3).map_err(|e| Error::io(&target, e))?)
        } else {
            Writer::Plain(buffered)
        };
        Ok(AtomicFile { target, writer })
    }

    /// Completes the file: to the disk, then under its name.
    ///
    /// # Errors
    /// [`Error::Io`], a full disk among them; then nothing is left behind.
    pub fn commit(self) -> Result<Written> {
        self.complete()?.publish()
    }

    /// Brings the whole file to the disk, still under its temporary name.
    ///
    /// # Errors
    /// As [`AtomicFile::commit`].
    pub fn complete(self) -> Result<Complete> {
        let AtomicFile { target, writer } = self;
        let flushed = match writer {
            Writer::Plain(w) => Ok(w),
            Writer::Gzip(w) => w.finish(),
            Writer::Zstd(w) => w.finish(),
        };
        let tally = flushed.and_then(|w| w.into_inner().map_err(|e| e.into_error()));
        let synced = tally.and_then(|tally| tally.file.as_file().sync_all().map(|()| tally));
        let Tally { file, hasher, bytes } = synced.map_err(|e| Error::io(&target, e))?;
        let written = Written { bytes, blake3: hasher.finalize().to_hex().to_string() };
        Ok(Complete { target, file, written })
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.writer {
            Writer::Plain(w) => w.write(bytes),
            Writer::Gzip(w) => w.write(bytes),
            Writer::Zstd(w) => w.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.writer {
            Writer::Plain(w) => w.flush(),
            Writer::Gzip(w) => w.flush(),
            Writer::Zstd(w) => w.flush(),
        }
    }
}

/// Writes a whole file, atomically and compressed by its name ([`AtomicFile`]).
///
/// # Errors
/// [`Error::Io`]; then nothing is left behind.
///
/// ```
/// # let dir = tempfile::tempdir().unwrap();
/// let path = dir.path().join("note.txt");
/// suasion_data::atomic::write_atomic(&path, |w| w.write_all(b"whole")).unwrap();
/// assert_eq!(std::fs::read(&path).unwrap(), b"whole");
/// ```
pub fn write_atomic(
    path: impl AsRef<Path>,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<()> {
    let path = path.as_ref();
    let mut file = AtomicFile::create(path)?;
    write(&mut file).map_err(|e| Error::io(path, e))?;
    file.commit().map(drop)
}

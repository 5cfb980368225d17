//! Single files: a temporary name, a sync, a rename.

use crate::folder::beside;
use crate::{Error, Result, TEMPORARY, parent, sync_folder};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// A file that appears under its name only when it is complete.
///
/// Bytes go to a temporary name in the same folder. [`AtomicFile::commit`] syncs and renames; dropped before that,
/// nothing is left and the file that had the name before is unchanged. A name that ends in `.gz` or `.zst` is
/// compressed.
pub struct AtomicFile {
    target: PathBuf,
    writer: Writer,
}

enum Writer {
    Plain(BufWriter<Tally>),
    Gzip(flate2::write::GzEncoder<BufWriter<Tally>>),
    Zstd(zstd::stream::write::Encoder<'static, BufWriter<Tally>>),
}

/// Length and hash of a file as stored (compressed where the file is).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    /// Length in bytes.
    pub bytes: u64,
    /// blake3 of the bytes, in hex.
    pub blake3: String,
}

impl Written {
    /// Length and hash of an existing file.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn of(path: &Path) -> Result<Written> {
        let mut hasher = blake3::Hasher::new();
        let bytes = File::open(path).and_then(|mut file| io::copy(&mut file, &mut hasher));
        let bytes = bytes.map_err(|e| Error::new(path, e))?;
        Ok(Written { bytes, blake3: hasher.finalize().to_hex().to_string() })
    }

    /// Length and hash of bytes.
    pub fn of_bytes(bytes: &[u8]) -> Written {
        Written { bytes: bytes.len() as u64, blake3: blake3::hash(bytes).to_hex().to_string() }
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
        // Not by `NamedTempFile`, whose errors name the temporary file.
        let n = self.file.as_file_mut().write(bytes)?;
        self.hasher.update(&bytes[..n]);
        self.bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.as_file_mut().flush()
    }
}

/// A file that is complete and synced, still under its temporary name.
pub struct Complete {
    target: PathBuf,
    file: NamedTempFile,
    /// Its length and hash.
    pub written: Written,
}

impl Complete {
    /// Renames the file to its target.
    ///
    /// # Errors
    /// If the rename fails; then the temporary file is removed.
    pub fn publish(self) -> Result<Written> {
        let Complete { target, file, written } = self;
        file.persist(&target).map_err(|e| Error::new(&target, e.error))?;
        sync_folder(&target);
        Ok(written)
    }
}

impl AtomicFile {
    /// Starts a file.
    ///
    /// # Errors
    /// If its folder does not exist or cannot be written to, or the name is a folder's.
    pub fn create(path: impl AsRef<Path>) -> Result<AtomicFile> {
        let target = path.as_ref().to_path_buf();
        let file = temporary(&target)?;
        let tally = Tally { file, hasher: blake3::Hasher::new(), bytes: 0 };
        let buffered = BufWriter::with_capacity(1 << 18, tally);
        let writer = match target.extension().and_then(|e| e.to_str()) {
            Some("gz") => {
                Writer::Gzip(flate2::write::GzEncoder::new(buffered, flate2::Compression::default()))
            }
            Some("zst") => Writer::Zstd(
                zstd::stream::write::Encoder::new(buffered, 3).map_err(|e| Error::new(&target, e))?,
            ),
            _ => Writer::Plain(buffered),
        };
        Ok(AtomicFile { target, writer })
    }

    /// Syncs the file and renames it to its target.
    ///
    /// # Errors
    /// If writing, syncing or renaming fails (a full disk, say); then nothing is left behind.
    pub fn commit(self) -> Result<Written> {
        self.complete()?.publish()
    }

    /// Syncs the whole file under its temporary name.
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
        let Tally { file, hasher, bytes } = synced.map_err(|e| Error::new(&target, e))?;
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
/// Whatever `write` returns, and as [`AtomicFile::commit`]; then nothing is left behind.
///
/// ```
/// # let dir = tempfile::tempdir().unwrap();
/// let path = dir.path().join("note.txt");
/// suasion_files::write_atomic(&path, |w| w.write_all(b"whole")).unwrap();
/// assert_eq!(std::fs::read(&path).unwrap(), b"whole");
/// ```
pub fn write_atomic(
    path: impl AsRef<Path>,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<()> {
    let path = path.as_ref();
    let mut file = AtomicFile::create(path)?;
    write(&mut file).map_err(|e| Error::new(path, e))?;
    file.commit().map(drop)
}

/// Writes `bytes` as a whole file ([`write_atomic`]).
///
/// # Errors
/// As [`AtomicFile::commit`]; then nothing is left behind.
pub fn write_bytes(path: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
    write_atomic(path, |file| file.write_all(bytes))
}

/// Writes a whole file by a function that wants a path: `fill` gets one in a temporary folder, where it may leave
/// other files.
///
/// # Errors
/// Whatever `fill` returns, and as [`AtomicFile::commit`]; then nothing is left behind.
pub fn write_at(path: &Path, fill: impl FnOnce(&Path) -> io::Result<()>) -> Result<()> {
    // Created for the check of the name, and for the permissions of an ordinary file.
    let permissions = temporary(path)?.as_file().metadata().map_err(|e| Error::new(path, e))?.permissions();
    let folder = beside(path, "folder");
    let go = || {
        std::fs::create_dir_all(&folder)?;
        let temporary = folder.join("file");
        fill(&temporary)?;
        // `fill` may have created a file that only the user can read, and through its own handle.
        std::fs::set_permissions(&temporary, permissions)?;
        File::options().write(true).open(&temporary)?.sync_all()?;
        std::fs::rename(&temporary, path)
    };
    let written = go();
    let _ = std::fs::remove_dir_all(&folder);
    written.map_err(|e| Error::new(path, e))?;
    sync_folder(path);
    Ok(())
}

/// A temporary file beside `target` with the permissions of an ordinary file.
fn temporary(target: &Path) -> Result<NamedTempFile> {
    let name = target.file_name().map(|n| n.to_string_lossy().into_owned());
    let Some(name) = name.filter(|_| !target.is_dir()) else {
        return Err(Error::new(
            target,
            io::Error::new(io::ErrorKind::IsADirectory, "is a folder, not a file"),
        ));
    };
    let mut builder = tempfile::Builder::new();
    let prefix = format!("{TEMPORARY}{name}.");
    builder.prefix(&prefix).suffix(".part");
    #[cfg(unix)]
    {
        // The umask applies; `tempfile`'s own mode would make the file private to the user.
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(parent(target)).map_err(|e| Error::new(target, e))
}

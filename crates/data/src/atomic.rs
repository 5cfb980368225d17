//! Files that are whole or not there.

use crate::{Error, Result};
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
    Plain(BufWriter<NamedTempFile>),
    Gzip(flate2::write::GzEncoder<BufWriter<NamedTempFile>>),
    Zstd(zstd::stream::write::Encoder<'static, BufWriter<NamedTempFile>>),
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
        let buffered = BufWriter::with_capacity(1 << 18, file);
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
    pub fn commit(self) -> Result<()> {
        let AtomicFile { target, writer } = self;
        commit(&target, writer).map_err(|e| Error::io(&target, e))
    }
}

fn commit(target: &Path, writer: Writer) -> io::Result<()> {
    let buffered = match writer {
        Writer::Plain(w) => w,
        Writer::Gzip(w) => w.finish()?,
        Writer::Zstd(w) => w.finish()?,
    };
    let file = buffered.into_inner().map_err(|e| e.into_error())?;
    file.as_file().sync_all()?;
    file.persist(target).map_err(|e| e.error)?;
    // The rename itself is durable once the folder is; not every file system lets a folder be synced.
    if let Some(folder) = target.parent() {
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        if let Ok(folder) = File::open(folder) {
            let _ = folder.sync_all();
        }
    }
    Ok(())
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
    file.commit()
}

//! TensorBoard's event files: records of TFRecord, each an `Event` protocol buffer.
//!
//! Only what scalars and texts need is written by hand: five fields of `event.proto` and `summary.proto`. The crates for
//! it bring all of TensorFlow's definitions, or are no longer maintained.

use crate::metrics::Record;
use crate::{Error, Result};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// What the names of event files begin with; TensorBoard looks for it.
const PREFIX: &str = "events.out.tfevents.";
/// What ours end with.
const SUFFIX: &str = ".suasion";

/// An event file of a run. It is created with the first [`Events::flush`].
pub(crate) struct Events {
    dir: PathBuf,
    file: Option<(PathBuf, File)>,
    /// What is not written yet.
    pending: Vec<u8>,
}

impl Events {
    /// A file in `dir` for a run that starts or resumes after `step` steps.
    pub(crate) fn new(dir: PathBuf, step: u64) -> Events {
        let mut events = Events { dir, file: None, pending: Vec::new() };
        let mut version = Message::default();
        version.double(1, now()).text(3, "brain.Event:2");
        events.record(&version.0);
        if step > 0 {
            // SessionLog.START: TensorBoard forgets what an earlier file has from this step on.
            let mut start = Message::default();
            start.double(1, now()).number(2, step + 1).message(7, Message::default().number(1, 1));
            events.record(&start.0);
        }
        events
    }

    /// Adds a line of metrics, under the tags that the Trainer's callback gives them.
    pub(crate) fn push(&mut self, record: &Record) {
        let mut summary = Message::default();
        let step = match record {
            Record::Step(step) => {
                for (tag, value) in [
                    ("train/loss", step.loss),
                    ("train/learning_rate", Some(step.learning_rate)),
                    ("train/grad_norm", Some(step.grad_norm)),
                    ("train/mean_token_accuracy", step.mean_token_accuracy),
                    ("train/entropy", step.entropy),
                    ("train/aux_loss", step.aux_loss),
                    ("train/epoch", Some(step.epoch)),
                    ("train/tokens_per_second", Some(step.tokens_per_second)),
                    ("train/peak_memory_bytes", step.peak_memory_bytes.map(|bytes| bytes as f64)),
                ] {
                    value.into_iter().for_each(|value| summary.scalar(tag, value));
                }
                step.step
            }
            Record::Eval(eval) => {
                summary.scalar("eval/loss", eval.eval_loss);
                summary.scalar("eval/mean_token_accuracy", eval.eval_mean_token_accuracy);
                summary.scalar("eval/entropy", eval.eval_entropy);
                for (name, section) in &eval.eval_sections {
                    summary.scalar(&format!("eval_sections/{name}"), section.loss);
                }
                for sample in &eval.eval_samples {
                    let text = format!("{}\n\n---\n\n{}", sample.prompt, sample.reply);
                    summary.words(&format!("eval_samples/row_{}", sample.row), &text);
                }
                eval.step
            }
        };
        let mut event = Message::default();
        event.double(1, now()).number(2, step).message(5, &summary);
        self.record(&event.0);
    }

    /// Writes what is not written yet.
    pub(crate) fn flush(&mut self) -> Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let (path, file) = match &mut self.file {
            Some((path, file)) if path.exists() => (path, file),
            place => {
                fs::create_dir_all(&self.dir).map_err(|source| Error::io(&self.dir, source))?;
                let name = format!("{PREFIX}{}.{:010}{SUFFIX}", now() as u64, std::process::id());
                let path = self.dir.join(name);
                let file = File::options().create(true).append(true).open(&path);
                let file = file.map_err(|source| Error::io(&path, source))?;
                let (path, file) = place.insert((path, file));
                (path, file)
            }
        };
        file.write_all(&self.pending).map_err(|source| Error::io(&*path, source))?;
        self.pending.clear();
        Ok(())
    }

    /// A TFRecord: the length, its checksum, the bytes, their checksum.
    fn record(&mut self, bytes: &[u8]) {
        let length = (bytes.len() as u64).to_le_bytes();
        self.pending.extend(length);
        self.pending.extend(masked(crc32c(&length)).to_le_bytes());
        self.pending.extend(bytes);
        self.pending.extend(masked(crc32c(bytes)).to_le_bytes());
    }
}

/// Removes the event files that runs wrote into the folders of `dir`, and folders that are empty then.
pub(crate) fn remove(dir: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(dir) else { return Ok(()) };
    for folder in entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()) {
        for file in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let name = file.file_name().to_string_lossy().into_owned();
            if name.starts_with(PREFIX) && name.ends_with(SUFFIX) {
                fs::remove_file(file.path()).map_err(|source| Error::io(file.path(), source))?;
            }
        }
        // Fails where something of others is left.
        let _ = fs::remove_dir(&folder);
    }
    let _ = fs::remove_dir(dir);
    Ok(())
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// A protocol buffer under construction.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn key(&mut self, field: u64, wire: u64) {
        self.varint((field << 3) | wire);
    }

    fn number(&mut self, field: u64, value: u64) -> &mut Message {
        self.key(field, 0);
        self.varint(value);
        self
    }

    fn double(&mut self, field: u64, value: f64) -> &mut Message {
        self.key(field, 1);
        self.0.extend(value.to_le_bytes());
        self
    }

    fn text(&mut self, field: u64, text: &str) -> &mut Message {
        self.key(field, 2);
        self.varint(text.len() as u64);
        self.0.extend(text.as_bytes());
        self
    }

    fn message(&mut self, field: u64, inner: &Message) -> &mut Message {
        self.key(field, 2);
        self.varint(inner.0.len() as u64);
        self.0.extend(&inner.0);
        self
    }

    /// `Summary.value { tag, simple_value }`.
    fn scalar(&mut self, tag: &str, number: f64) {
        let mut value = Message::default();
        value.text(1, tag).key(2, 5);
        value.0.extend((number as f32).to_le_bytes());
        self.message(1, &value);
    }

    /// `Summary.value` of the text plugin: a tensor of one string.
    fn words(&mut self, tag: &str, text: &str) {
        const STRING: u64 = 7;
        let mut value = Message::default();
        let (mut plugin, mut metadata, mut tensor) = Default::default();
        Message::text(&mut plugin, 1, "text");
        Message::message(&mut metadata, 1, &plugin);
        Message::number(&mut tensor, 1, STRING).message(2, &Message::default()).text(8, text);
        value.text(1, tag).message(9, &metadata).message(8, &tensor);
        self.message(1, &value);
    }
}

/// CRC-32C (Castagnoli), reflected.
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 & 0u32.wrapping_sub(crc & 1)))
    };
    !bytes.iter().fold(!0, step)
}

/// TFRecord's mask, which keeps checksums of checksums apart.
fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The check value of the catalogue of CRCs, and those of RFC 3720, B.4.
    #[test]
    fn the_checksum_is_castagnolis() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    }
}

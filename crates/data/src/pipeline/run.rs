//! Runs the pipeline over a source: parallel over rows, results in source order, bounded memory.

use super::duplicates::{Duplicates, Seen};
use super::outcome::Outcome;
use super::row::{Processed, RowProcessor};
use super::summary::{Progress, Summary};
use super::{Mode, Pipeline};
use crate::BAD_ROWS_LISTED;
use crate::example;
use crate::guard::start_thread;
use crate::policy::OnBadRow;
use crate::source::{RawRow, Source, SourceHash};
use crate::{Code, Error, Finding, Result};
use std::any::Any;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

/// Rows per chunk, which is one thread's task: enough to make the cost of handing it over negligible.
const CHUNK_ROWS: usize = 64;

/// Bytes per chunk, unless one row is larger.
const CHUNK_BYTES: usize = 1 << 20;

/// How long a thread of the pool sleeps if it can only wait.
const IDLE: Duration = Duration::from_millis(1);

/// The outcomes of a source's rows, in source order ([`Pipeline::rows`]).
pub struct Rows {
    chunks: Chunks<()>,
    ready: std::vec::IntoIter<Done<()>>,
}

impl Rows {
    pub(super) fn new(chunks: Chunks<()>) -> Rows {
        Rows { chunks, ready: Vec::new().into_iter() }
    }

    /// The summary of the rows so far, up to the end of a chunk; of all rows once the iterator has ended.
    pub fn summary(&self) -> &Summary {
        &self.chunks.summary
    }

    /// [`Rows::summary`] by value.
    pub fn into_summary(self) -> Summary {
        self.chunks.summary
    }

    /// The progress of the run.
    pub fn progress(&self) -> Progress {
        self.chunks.progress()
    }
}

impl Iterator for Rows {
    type Item = Result<Outcome>;

    fn next(&mut self) -> Option<Result<Outcome>> {
        loop {
            if let Some(row) = self.ready.next() {
                return Some(Ok(row.outcome));
            }
            match self.chunks.next()? {
                Ok(rows) => self.ready = rows.into_iter(),
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

/// A processed row.
pub(crate) struct Done<T> {
    pub outcome: Outcome,
    /// The hash of its ids.
    pub hash: u64,
    /// The result of [`Chunks::new`]'s `work`.
    pub made: T,
}

/// A chunk of rows that a task of the pool has processed.
struct Chunk<T> {
    rows: Vec<Done<T>>,
    summary: Summary,
}

/// The message of a task: its chunk, or the panic that ended it.
type Sent<T> = Result<Result<Chunk<T>>, Box<dyn Any + Send>>;

/// The outcomes of a source's rows, chunk by chunk. Chunk boundaries depend only on the rows.
pub(crate) struct Chunks<T> {
    processor: Arc<RowProcessor>,
    work: Arc<dyn Fn(&mut Outcome) -> T + Send + Sync>,
    /// The reader thread and the chunks it has read; `None` after the end.
    reader: Option<(mpsc::Receiver<Vec<RawRow>>, JoinHandle<Result<Option<SourceHash>>>)>,
    /// Chunks in the pool. Each result has its own channel; the channels are in source order.
    pending: VecDeque<mpsc::Receiver<Sent<T>>>,
    seen: Duplicates,
    /// Errors of bad rows that will end the run.
    bad: Vec<Error>,
    stop_on_bad: bool,
    bytes_read: Arc<AtomicU64>,
    size: u64,
    pub summary: Summary,
}

impl<T: Send + 'static> Chunks<T> {
    /// Starts reading the rest of a source; `seen` are the rows before it. `work` processes each outcome on the
    /// thread that made it (for example into bytes to write), before other rows are known, and may free data of
    /// the outcome that is no longer needed.
    pub fn new(
        pipeline: &Pipeline,
        mut source: Source,
        seen: Duplicates,
        work: impl Fn(&mut Outcome) -> T + Send + Sync + 'static,
    ) -> Result<Chunks<T>> {
        let processor = Arc::new(pipeline.processor()?);
        if let Some(projection) = example::projection(pipeline.policy.format, pipeline.keep_text)
            && pipeline.policy.columns.is_empty()
        {
            source.project(projection);
        }
        let (bytes_read, size) = (source.bytes_read(), source.size());
        let (sender, receiver) = mpsc::sync_channel(2);
        let name = source.name().clone();
        let reader = start_thread(move || read_chunks(source, &sender)).map_err(|e| Error::io(name, e))?;
        Ok(Chunks {
            processor,
            work: Arc::new(work),
            reader: Some((receiver, reader)),
            pending: VecDeque::new(),
            seen,
            bad: Vec::new(),
            stop_on_bad: pipeline.mode != Mode::Verify && pipeline.policy.on_bad_row == OnBadRow::Error,
            bytes_read,
            size,
            summary: Summary::default(),
        })
    }

    /// Submits chunks that were read to the pool: two per thread, so that threads stay busy while the consumer
    /// works on another.
    fn submit(&mut self) {
        let Some((receiver, _)) = &self.reader else { return };
        while self.pending.len() < 2 * rayon::current_num_threads() + 1 {
            let next = match self.pending.is_empty() {
                true => receiver.recv().ok(),
                false => receiver.try_recv().ok(),
            };
            let Some(rows) = next else { return };
            let (sender, result) = mpsc::sync_channel(1);
            let (processor, work) = (self.processor.clone(), self.work.clone());
            rayon::spawn(move || {
                let chunk = catch_unwind(AssertUnwindSafe(|| chunk(&processor, rows, &*work)));
                // The consumer may have stopped in the meantime.
                let _ = sender.send(chunk);
            });
            self.pending.push_back(result);
        }
    }

    /// Decides what needs the order of rows: duplicates, and the bad row that exceeds the limit.
    fn in_order(&mut self, mut chunk: Chunk<T>) -> Vec<Done<T>> {
        for (i, row) in chunk.rows.iter_mut().enumerate() {
            if let Some(finding) = self.duplicate(row) {
                chunk.summary.add_finding(&finding);
            }
            if self.stop_on_bad
                && let Outcome::Failed { error, .. } = &mut row.outcome
            {
                // The error is needed twice: the consumer gets a copy of its messages.
                let copy = error.restate();
                self.bad.push(std::mem::replace(error, copy));
                if self.bad.len() == BAD_ROWS_LISTED {
                    chunk.rows.truncate(i + 1);
                    break;
                }
            }
        }
        self.summary.merge(&chunk.summary);
        self.processor.describe(&mut self.summary);
        chunk.rows
    }

    /// D001, first kind: the row has the same ids as an earlier row.
    fn duplicate(&mut self, row: &mut Done<T>) -> Option<Finding> {
        let Outcome::Kept(kept) = &mut row.outcome else { return None };
        if !self.processor.accepts(Code::D001) {
            return None;
        }
        let number = kept.sample.id.row;
        match self.seen.look(row.hash, number) {
            Seen::New => None,
            Seen::Before(first) => {
                let finding = Finding::new(number, Code::D001, format!("the same tokens as row {first}"));
                kept.findings.push(finding.clone());
                Some(finding)
            }
            Seen::Forgotten => {
                self.summary.not_remembered += 1;
                None
            }
        }
    }

    /// Ends the run, with the error of the reader or of the bad rows.
    fn end(&mut self) -> Result<()> {
        let Some((receiver, reader)) = self.reader.take() else { return Ok(()) };
        self.pending.clear();
        // If the run stops early, the reader ends at its next chunk; the rest of the source is not read.
        drop(receiver);
        let read = reader.join().unwrap_or_else(|panic| resume_unwind(panic));
        let stopped = self.bad.len() >= BAD_ROWS_LISTED;
        let hash = if stopped { None } else { read? };
        let mut bad = std::mem::take(&mut self.bad).into_iter();
        if let Some(first) = bad.next() {
            return Err(Error::bad_rows(first, bad.collect(), stopped));
        }
        self.summary.source = hash;
        Ok(())
    }
}

impl<T> Chunks<T> {
    /// The progress of the run.
    pub fn progress(&self) -> Progress {
        Progress {
            rows: self.summary.rows,
            bytes: self.bytes_read.load(Ordering::Relaxed),
            size: self.size,
            tokens: self.summary.tokens,
        }
    }
}

impl<T: Send + 'static> Iterator for Chunks<T> {
    type Item = Result<Vec<Done<T>>>;

    /// The next chunk. [`Error::BadRows`] comes after all chunks.
    fn next(&mut self) -> Option<Result<Vec<Done<T>>>> {
        self.reader.as_ref()?;
        if self.bad.len() < BAD_ROWS_LISTED {
            self.submit();
            if let Some(result) = self.pending.pop_front() {
                return match wait(&result) {
                    Ok(Ok(chunk)) => Some(Ok(self.in_order(chunk))),
                    Ok(Err(error)) => {
                        self.reader = None;
                        self.pending.clear();
                        Some(Err(error))
                    }
                    Err(panic) => resume_unwind(panic),
                };
            }
        }
        self.end().err().map(Err)
    }
}

/// Processes a chunk of rows, in order.
fn chunk<T>(
    processor: &RowProcessor,
    rows: Vec<RawRow>,
    work: &dyn Fn(&mut Outcome) -> T,
) -> Result<Chunk<T>> {
    let mut chunk = Chunk { rows: Vec::with_capacity(rows.len()), summary: Summary::default() };
    for raw in rows {
        let Processed { mut outcome, hash, runs } = processor.process(raw)?;
        chunk.summary.add_with(&outcome, &runs);
        let made = work(&mut outcome);
        chunk.rows.push(Done { outcome, hash, made });
    }
    Ok(chunk)
}

/// Sends a source in chunks of rows, until the source ends or the receiver is dropped. Returns the hash of the
/// whole source.
fn read_chunks(mut source: Source, sender: &mpsc::SyncSender<Vec<RawRow>>) -> Result<Option<SourceHash>> {
    let (mut chunk, mut bytes) = (Vec::new(), 0);
    while let Some(row) = source.next_row()? {
        bytes += row.size;
        chunk.push(row);
        if chunk.len() == CHUNK_ROWS || bytes >= CHUNK_BYTES {
            bytes = 0;
            if sender.send(std::mem::take(&mut chunk)).is_err() {
                return Ok(None);
            }
        }
    }
    if !chunk.is_empty() && sender.send(chunk).is_err() {
        return Ok(None);
    }
    source.finish().map(Some)
}

/// Waits for a task's result. A thread of the pool runs other tasks while it waits: it may be the only one.
fn wait<T>(result: &mpsc::Receiver<Sent<T>>) -> Sent<T> {
    use mpsc::RecvTimeoutError::Timeout;
    // A task always sends; a pool that shuts down drops its tasks with their channels.
    let ended = || -> Box<dyn Any + Send> { Box::new("the thread pool has ended") };
    loop {
        let nap = match rayon::yield_now() {
            None => return result.recv().unwrap_or_else(|_| Err(ended())),
            Some(rayon::Yield::Executed) => Duration::ZERO,
            Some(rayon::Yield::Idle) => IDLE,
        };
        match result.recv_timeout(nap) {
            Err(Timeout) => {}
            received => return received.unwrap_or_else(|_| Err(ended())),
        }
    }
}

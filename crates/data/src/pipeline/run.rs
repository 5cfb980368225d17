//! The pipeline over a whole source: parallel over rows, results in source order, bounded memory.

use super::duplicates::{Duplicates, Seen};
use super::outcome::Outcome;
use super::row::RowProcessor;
use super::summary::Summary;
use super::{BAD_ROWS_LISTED, Mode, Pipeline};
use crate::policy::OnBadRow;
use crate::source::{RawRow, Source, SourceHash};
use crate::template::ChatRenderer;
use crate::{Code, Error, Finding, Result, Sample};
use std::collections::VecDeque;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::mpsc;

/// Rows in one chunk, which is one thread's task: enough that handing it over costs nothing.
const CHUNK_ROWS: usize = 64;

/// Bytes in one chunk, unless one row has more.
const CHUNK_BYTES: usize = 1 << 20;

/// How far a run is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Rows handed on.
    pub rows: u64,
    /// Bytes of the source read, as stored.
    pub bytes: u64,
    /// The source's size in bytes, as stored.
    pub size: u64,
    /// Tokens of kept rows.
    pub tokens: u64,
}

/// A chunk of rows that is done.
#[derive(Debug)]
pub struct Done<'a, T> {
    /// Outcomes in source order, with what was made of each.
    pub rows: Vec<(Outcome, T)>,
    /// Every row of the run up to here, in numbers.
    pub summary: &'a Summary,
    /// How far the run is.
    pub progress: Progress,
}

impl Pipeline<'_> {
    /// Runs over a whole source. `each` gets every outcome in source order; an error that it returns ends the run.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Source`] and [`Error::Tokenizer`] end the run. Under `on_bad_row = error`, and not
    /// in [`Mode::Verify`], bad rows end it with [`Error::BadRows`], after all of them, or
    /// [`BAD_ROWS_LISTED`], were found and handed to `each`.
    pub fn run(
        &self,
        path: impl AsRef<Path>,
        progress: impl FnMut(Progress),
        each: impl FnMut(Outcome) -> Result<()>,
    ) -> Result<Summary> {
        self.run_source(Source::open(path)?, progress, each)
    }

    /// [`Pipeline::run`] over a source that is open.
    ///
    /// # Errors
    /// As [`Pipeline::run`].
    pub fn run_source(
        &self,
        source: Source,
        mut progress: impl FnMut(Progress),
        mut each: impl FnMut(Outcome) -> Result<()>,
    ) -> Result<Summary> {
        let mut seen = Duplicates::default();
        self.over(
            source,
            &mut seen,
            |_| (),
            |chunk| {
                chunk.rows.into_iter().try_for_each(|(outcome, ())| each(outcome))?;
                progress(chunk.progress);
                Ok(())
            },
        )
    }

    /// Runs over what is left of an open source; `seen` are the rows before it. `work` makes something of each outcome
    /// on the thread that made it (the bytes to write, say), before anything is known of other rows; `each` then gets
    /// chunks of both, in source order. Where chunks end depends on the rows alone.
    ///
    /// # Errors
    /// As [`Pipeline::run`].
    pub fn over<T: Send>(
        &self,
        source: Source,
        seen: &mut Duplicates,
        work: impl Fn(&Outcome) -> T + Sync,
        mut each: impl FnMut(Done<'_, T>) -> Result<()>,
    ) -> Result<Summary> {
        let processor = RowProcessor::new(self)?;
        let (read, size) = (source.bytes_read(), source.size());
        let mut summary = Summary::default();
        let mut bad: Vec<Error> = Vec::new();
        let stop_on_bad = self.mode != Mode::Verify && self.policy.on_bad_row == OnBadRow::Error;
        let mut stopped = false;

        let hash = std::thread::scope(|scope| -> Result<Option<SourceHash>> {
            let (sender, receiver) = mpsc::sync_channel::<Vec<RawRow>>(2);
            let reader = scope.spawn(move || read_chunks(source, &sender));
            let (processor, work) = (&processor, &work);
            rayon::in_place_scope(|pool| -> Result<()> {
                // Each chunk's result has a channel of its own; the channels are in source order. The pool has
                // two chunks per thread to go on with while this thread hands on the results of another.
                let mut pending: VecDeque<mpsc::Receiver<Result<Chunk<T>>>> = VecDeque::new();
                let most = 2 * rayon::current_num_threads() + 1;
                loop {
                    while pending.len() < most {
                        let next = match pending.is_empty() {
                            true => receiver.recv().ok(),
                            false => receiver.try_recv().ok(),
                        };
                        let Some(rows) = next else { break };
                        let (done, result) = mpsc::sync_channel(1);
                        // Where the run has ended meanwhile, nobody wants the result.
                        pool.spawn(move |_| drop(done.send(processor.chunk(rows, work))));
                        pending.push_back(result);
                    }
                    // A task that panicked ends the loop; its panic goes on where the pool's scope ends.
                    let Some(chunk) = pending.pop_front().and_then(|result| wait(&result)) else {
                        return Ok(());
                    };
                    let mut chunk = chunk?;
                    let mut rows = Vec::with_capacity(chunk.rows.len());
                    for (mut outcome, hash, made) in std::mem::take(&mut chunk.rows) {
                        if let Some(finding) = self.duplicate(&mut outcome, hash, seen, &mut chunk.summary) {
                            chunk.summary.add_finding(&finding);
                        }
                        if stop_on_bad && let Outcome::Failed { error, .. } = &mut outcome {
                            // The error is needed twice: `each` gets a copy in words.
                            let copy = error.restate();
                            bad.push(std::mem::replace(error, copy));
                        }
                        rows.push((outcome, made));
                        if bad.len() == BAD_ROWS_LISTED {
                            stopped = true;
                            break;
                        }
                    }
                    summary.merge(&chunk.summary);
                    summary.untemplated = processor.untemplated.load(Ordering::Relaxed);
                    if processor.templated.load(Ordering::Relaxed) {
                        summary.template = self.template.map(|template| template.fingerprint().to_string());
                        let today = processor.chats.as_ref().and_then(ChatRenderer::today);
                        summary.template_date = today.map(|date| date.to_string());
                    }
                    let bytes = read.load(Ordering::Relaxed);
                    let progress = Progress { rows: summary.rows, bytes, size, tokens: summary.tokens };
                    each(Done { rows, summary: &summary, progress })?;
                    if stopped {
                        return Ok(());
                    }
                }
            })?;
            // Where the run stopped early, the reader ends at its next chunk, and its source stays unread.
            drop(receiver);
            let hash = reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            if stopped { Ok(None) } else { hash }
        })?;
        if !bad.is_empty() {
            let first = Box::new(bad.remove(0));
            let help = match first.help() {
                Some(help) if help.contains('\n') => {
                    format!("{help}\nor leave bad rows out with on_bad_row=skip")
                }
                Some(help) => format!("{help}; or leave bad rows out with on_bad_row=skip"),
                None => "leave bad rows out with on_bad_row=skip".to_string(),
            };
            return Err(Error::BadRows { first, others: bad, stopped, help });
        }
        summary.source = hash;
        Ok(summary)
    }

    /// Runs over a whole source and keeps the samples.
    ///
    /// # Errors
    /// As [`Pipeline::run`].
    pub fn samples(&self, path: impl AsRef<Path>) -> Result<(Vec<Sample>, Summary)> {
        let mut samples = Vec::new();
        let summary = self.run(
            path,
            |_| {},
            |outcome| {
                if let Outcome::Kept(kept) = outcome {
                    samples.push(kept.sample);
                }
                Ok(())
            },
        )?;
        Ok((samples, summary))
    }

    /// D001, first kind: the row has the same ids as an earlier one.
    fn duplicate(
        &self,
        outcome: &mut Outcome,
        hash: u128,
        seen: &mut Duplicates,
        summary: &mut Summary,
    ) -> Option<Finding> {
        let Outcome::Kept(kept) = outcome else { return None };
        if !self.filter.accepts(Code::D001) {
            return None;
        }
        let row = kept.sample.id.row;
        let first = match seen.look(hash, row) {
            Seen::New => return None,
            Seen::Before(first) => first,
            Seen::Forgotten => {
                summary.not_remembered += 1;
                return None;
            }
        };
        let finding = Finding::new(row, Code::D001, format!("the same tokens as row {first}"));
        kept.findings.push(finding.clone());
        Some(finding)
    }
}

/// What became of a chunk of rows.
struct Chunk<T> {
    /// Outcomes, with the hash of their ids, and what was made of each.
    rows: Vec<(Outcome, u128, T)>,
    summary: Summary,
}

impl RowProcessor<'_> {
    /// A chunk of rows, in order.
    fn chunk<T>(&self, rows: Vec<RawRow>, work: impl Fn(&Outcome) -> T) -> Result<Chunk<T>> {
        let mut chunk = Chunk { rows: Vec::with_capacity(rows.len()), summary: Summary::default() };
        for raw in rows {
            let (outcome, hash) = self.outcome(raw)?;
            chunk.summary.add(&outcome);
            let made = work(&outcome);
            chunk.rows.push((outcome, hash, made));
        }
        Ok(chunk)
    }
}

/// Cuts a source into chunks of rows, as long as somebody takes them. The hash of the whole source.
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

/// How long a thread of the pool sleeps where there is nothing to do but wait.
const IDLE: std::time::Duration = std::time::Duration::from_millis(1);

/// A task's result, or `None` where it panicked. A thread of the pool works on other tasks while it waits: it may be
/// the only one.
fn wait<T>(result: &mpsc::Receiver<T>) -> Option<T> {
    use mpsc::RecvTimeoutError::Timeout;
    loop {
        let nap = match rayon::yield_now() {
            None => return result.recv().ok(),
            Some(rayon::Yield::Executed) => std::time::Duration::ZERO,
            Some(rayon::Yield::Idle) => IDLE,
        };
        match result.recv_timeout(nap) {
            Err(Timeout) => {}
            received => return received.ok(),
        }
    }
}

//! A preparation: checks an existing output, or reads, labels and writes the source.

use super::columnar::Columns;
use super::folder;
use super::journal::Journal;
use super::manifest::{Inputs, Manifest};
use super::names::{Form, Shape, name_and_ending, partial_path, replaces, without_shard};
use super::output::Output;
use super::sink::{Plan, encode};
use crate::pipeline::{Chunks, Duplicates, Pipeline, Progress, Summary};
use crate::source::Source;
use crate::{Error, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use suasion_files::{Lock, LockError, remove_leftovers_of};

/// A source and the output to prepare from it.
pub struct Job<'a> {
    /// How rows become samples.
    pub pipeline: &'a Pipeline,
    /// The source as the user gave it.
    pub name: &'a Path,
    /// Its files, in order.
    pub files: &'a [PathBuf],
    /// The file or folder to write; the names of shards are made from it.
    pub output: &'a Path,
    /// Options that affect the files' bytes apart from the labels.
    pub shape: Shape,
    /// Prepare again even if the existing output is up to date.
    pub rebuild: bool,
    /// Cancellation flag, polled between chunks of rows.
    pub stop: &'a AtomicBool,
}

/// How a preparation begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// There is no output yet.
    Anew,
    /// The output is up to date: nothing is written.
    UpToDate,
    /// The output is replaced, for these reasons.
    Rebuild(Vec<String>),
    /// An earlier run was interrupted; this one continues after its finished shards.
    Resume {
        /// Number of finished shards.
        shards: usize,
        /// Number of rows of the source that they were made from.
        rows: u64,
    },
}

/// Prepares a source, unless its output is up to date. `begin` is called before any long work.
///
/// # Errors
/// As [`Pipeline::rows`]; [`Error::Io`] if the output cannot be written; [`Error::Source`] if its format is
/// unknown or it would replace a file of the source; [`Error::Interrupted`] if `stop` was set.
pub fn prepare(
    job: &Job<'_>,
    begin: impl FnOnce(&Start),
    mut progress: impl FnMut(Progress),
) -> Result<Manifest> {
    let Job { pipeline, output, .. } = *job;
    let form = Form::of(output).ok_or_else(|| Error::Source {
        path: output.to_path_buf(),
        message: "unknown output format".into(),
        help: "name a .jsonl, .jsonl.gz, .jsonl.zst or .parquet file, or a folder (a name without an ending)"
            .into(),
    })?;
    let refuse = |message: String| {
        Err(Error::Source { path: output.to_path_buf(), message, help: "write to another name".into() })
    };
    let (name, _) = name_and_ending(output);
    if without_shard(&name).is_some() {
        return refuse(format!("{name} is the name of a single shard; suasion names shards itself"));
    }
    if let Some(file) = job.files.iter().find(|file| replaces(output, file)) {
        return refuse(format!("would replace {}, which belongs to the source", file.display()));
    }
    let mut shape = job.shape;
    // If nothing needs to be written, a folder that is not writable is not an error.
    let lock = match Lock::name(output) {
        Err(error @ LockError::Held { .. }) => {
            let help = "wait until it has ended, stop it, or write to another name".into();
            return Err(Error::Source { path: output.to_path_buf(), message: held(&error), help });
        }
        lock => lock,
    };
    if lock.is_ok() {
        remove_leftovers_of(output);
    }
    if form == Form::Folder {
        folder::recover(output, &partial_path(output))?;
        folder::replaceable(output)?;
        shape.max_shard_bytes.get_or_insert(folder::SHARD_BYTES);
    }
    let policy = pipeline.policy.clone();
    let weights = Columns::of(&policy).weights;
    let plan = Plan { target: output.to_path_buf(), form, shape, policy, weights };
    let inputs = Inputs::of(pipeline, shape);
    // Other data with the same name is left alone.
    let former = Manifest::of_output(output).filter(|former| former.is_of(output, form));
    let mut start = Start::Anew;
    if let Some(former) = &former {
        let mut reasons = former.changed(&inputs, job.name, job.files, output)?;
        if job.rebuild {
            reasons.push("a rebuild was requested".into());
        }
        if reasons.is_empty() {
            begin(&Start::UpToDate);
            return Ok(former.clone());
        }
        start = Start::Rebuild(reasons);
    }
    let _lock = match lock {
        Err(LockError::File(error)) => return Err(error.into()),
        lock => lock,
    };
    let mut begin = Some(begin);
    let mut begin = |resumed: Option<Start>| {
        if let Some(begin) = begin.take() {
            begin(resumed.as_ref().unwrap_or(&start));
        }
    };
    match write(job, plan.clone(), &inputs, former.as_ref(), &mut begin, &mut progress)? {
        Written::Whole(manifest) => Ok(*manifest),
        Written::LacksWeights => {
            let plan = Plan { weights: true, ..plan };
            match write(job, plan, &inputs, former.as_ref(), &mut begin, &mut progress)? {
                Written::Whole(manifest) => Ok(*manifest),
                Written::LacksWeights => unreachable!("there is a column for them"),
            }
        }
    }
}

/// The holder of the lock, without the name of the output.
fn held(error: &LockError) -> String {
    match error {
        LockError::Held { process: Some(id), .. } => format!("process {id} is preparing it"),
        _ => "another process is preparing it".into(),
    }
}

/// The result of an attempt to write.
enum Written {
    Whole(Box<Manifest>),
    /// A row has weights, but the files have no column for them: columns are fixed before the first row is known.
    LacksWeights,
}

/// Runs the pipeline and writes its output, after that of an earlier run.
fn write(
    job: &Job<'_>,
    plan: Plan,
    inputs: &Inputs,
    former: Option<&Manifest>,
    begin: &mut impl FnMut(Option<Start>),
    progress: &mut impl FnMut(Progress),
) -> Result<Written> {
    let Job { pipeline, output, .. } = *job;
    let mut source = Source::of(job.name, job.files.iter().cloned())?;
    let (mut journal, mut resumed) = (None, None);
    if plan.shape.max_shard_bytes.is_some() {
        let (opened, others) =
            Journal::open(partial_path(output), inputs.job(job.files, output, plan.weights)?)?;
        journal = Some(opened);
        if others > 0 {
            let shards = if others == 1 { "a shard" } else { "shards" };
            resumed = Some(Start::Rebuild(vec![format!("removed {shards} of another job")]));
        }
    }
    let mut seen = Duplicates::default();
    let mut done = Summary::default();
    if let Some(journal) = journal.as_ref().filter(|journal| !journal.shards.is_empty()) {
        done = journal.summary();
        resumed = Some(Start::Resume { shards: journal.shards.len(), rows: done.rows });
        seen = journal.duplicates()?;
    }
    begin(resumed);
    for _ in 0..done.rows {
        source.next_row()?;
    }
    let plan = Arc::new(plan);
    let mut files = Output::new(plan.clone(), journal);
    let mut chunks = Chunks::new(pipeline, source, seen, move |outcome| encode(&plan, outcome))?;
    let mut run = || -> Result<Summary> {
        while let Some(rows) = chunks.next() {
            rows?.into_iter().try_for_each(|row| files.write(row))?;
            files.between(&chunks.summary)?;
            let now = chunks.progress();
            progress(Progress { rows: done.rows + now.rows, tokens: done.tokens + now.tokens, ..now });
            if job.stop.load(Ordering::Relaxed) {
                return Err(Error::Interrupted { path: output.to_path_buf(), message: files.kept() });
            }
        }
        files.end_shard(&chunks.summary)?;
        Ok(std::mem::take(&mut chunks.summary))
    };
    let run = match run() {
        Ok(run) => run,
        Err(_) if files.lacks_weights => {
            files.give_up(false);
            return Ok(Written::LacksWeights);
        }
        Err(error) => {
            // After an interruption or a full disk the same job can be run again; bad rows must be corrected first.
            files.give_up(matches!(error, Error::Interrupted { .. } | Error::Io { .. }));
            return Err(error);
        }
    };
    let mut summary = done;
    summary.merge(&run);
    let unread = || Error::io(job.name, std::io::ErrorKind::UnexpectedEof.into());
    let manifest = Manifest::new(&summary, inputs, &pipeline.policy, run.source.clone().ok_or_else(unread)?);
    let manifest = files.finish(manifest, former)?;
    // The shards of an interrupted run.
    Journal::discard(&partial_path(output));
    Ok(Written::Whole(Box::new(manifest)))
}

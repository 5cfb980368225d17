//! Preparing a source: is what is there still right, else read, label and write.

use super::folder;
use super::journal::Journal;
use super::manifest::{Inputs, Manifest};
use super::names::{Form, Shape, name_and_ending, partial_path, replaces, without_shard};
use super::output::Output;
use super::sink::{Plan, encode};
use crate::pipeline::{Duplicates, Pipeline, Progress, Summary};
use crate::source::Source;
use crate::{Error, Result};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// What to prepare, and where to.
pub struct Job<'a> {
    /// The rooms.
    pub pipeline: &'a Pipeline<'a>,
    /// What the user calls the rows.
    pub name: &'a Path,
    /// Their files, in order.
    pub files: &'a [PathBuf],
    /// The file to write; with shards, the name from which theirs are made.
    pub output: &'a Path,
    /// What decides the files' bytes beside the labels.
    pub shape: Shape,
    /// Prepare again even where what is there is right.
    pub rebuild: bool,
    /// Set by somebody who wants the work to stop.
    pub stop: &'a AtomicBool,
}

/// How a preparation begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// Nothing is there yet.
    Anew,
    /// What is there is right: there is nothing to do.
    UpToDate,
    /// What is there is replaced, for these reasons.
    Rebuild(Vec<String>),
    /// An earlier run was stopped; this one goes on behind its finished shards.
    Resume {
        /// Shards that are finished.
        shards: usize,
        /// Rows of the source that they were made from.
        rows: u64,
    },
}

/// Prepares a source, or finds that it is prepared already. `begin` is told which, before anything long happens.
///
/// # Errors
/// As [`Pipeline::run`]; [`Error::Io`] where the output cannot be written; [`Error::Interrupted`] where `stop` was set.
pub fn prepare(
    job: &Job<'_>,
    begin: impl FnOnce(&Start),
    mut progress: impl FnMut(Progress),
) -> Result<Manifest> {
    let Job { pipeline, output, .. } = *job;
    let form = Form::of(output).ok_or_else(|| Error::Source {
        path: output.to_path_buf(),
        message: "the output's form is told by its name, and this is none that can be written".into(),
        help: "write .jsonl (also .jsonl.gz, .jsonl.zst), .parquet, or a folder, which has no ending".into(),
    })?;
    let refuse = |message: String| {
        Err(Error::Source { path: output.to_path_buf(), message, help: "write to another name".into() })
    };
    let (name, _) = name_and_ending(output);
    if without_shard(&name).is_some() {
        return refuse(format!("{name} is the name of one shard; shards are named by suasion"));
    }
    if let Some(file) = job.files.iter().find(|file| replaces(output, file)) {
        return refuse(format!("would replace {}, which is read", file.display()));
    }
    let mut shape = job.shape;
    if form == Form::Folder {
        folder::recover(output, &partial_path(output))?;
        folder::replaceable(output)?;
        shape.max_shard_bytes.get_or_insert(folder::SHARD_BYTES);
    }
    let weighs = |weight: f32| weight != 0.0 && weight != 1.0;
    let policy = pipeline.policy;
    let weights = weighs(policy.prompt_loss_weight) || policy.loss_weights.values().any(|w| weighs(*w));
    let plan = Plan { target: output, form, shape, policy, weights };
    let inputs = Inputs::of(pipeline, shape);
    // Data of another form under the same name is somebody's still.
    let former = Manifest::of_output(output).filter(|former| former.is_of(output, form));
    let mut start = Start::Anew;
    if let Some(former) = &former {
        let mut reasons = former.changed(&inputs, job.name, job.files, output)?;
        if job.rebuild {
            reasons.push("it was asked for".into());
        }
        if reasons.is_empty() {
            begin(&Start::UpToDate);
            return Ok(former.clone());
        }
        start = Start::Rebuild(reasons);
    }
    let mut begin = Some(begin);
    let mut begin = |resumed: Option<Start>| {
        if let Some(begin) = begin.take() {
            begin(resumed.as_ref().unwrap_or(&start));
        }
    };
    match write(job, plan, &inputs, former.as_ref(), &mut begin, &mut progress)? {
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

/// What became of an attempt to write.
enum Written {
    Whole(Box<Manifest>),
    /// A row has weights, and the files no column for them: columns are fixed before the first row is known.
    LacksWeights,
}

/// Runs the pipeline and writes, behind what an earlier run has finished.
fn write(
    job: &Job<'_>,
    plan: Plan<'_>,
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
            let reason = format!("{shards} that another job had finished there went");
            resumed = Some(Start::Rebuild(vec![reason]));
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
    let mut files = Output::new(plan, journal);
    let run = pipeline.over(
        source,
        &mut seen,
        |outcome| encode(&plan, outcome),
        |chunk| {
            chunk.rows.into_iter().try_for_each(|(outcome, encoded)| files.write(outcome, &encoded))?;
            files.between(chunk.summary)?;
            let Progress { rows, tokens, .. } = chunk.progress;
            progress(Progress { rows: done.rows + rows, tokens: done.tokens + tokens, ..chunk.progress });
            if job.stop.load(Ordering::Relaxed) {
                return Err(Error::Interrupted { path: output.to_path_buf(), message: files.kept() });
            }
            Ok(())
        },
    );
    let run = match run.and_then(|run| files.end_shard(&run).map(|()| run)) {
        Ok(run) => run,
        Err(_) if files.lacks_weights => {
            files.give_up(false);
            return Ok(Written::LacksWeights);
        }
        Err(error) => {
            // Whoever stopped it, or has made room on the disk, asks for the same again; bad rows do not mend themselves.
            files.give_up(matches!(error, Error::Interrupted { .. } | Error::Io { .. }));
            return Err(error);
        }
    };
    let mut summary = done;
    summary.merge(&run);
    let unread = || Error::io(job.name, std::io::ErrorKind::UnexpectedEof.into());
    let manifest = Manifest::new(&summary, inputs, pipeline.policy, run.source.clone().ok_or_else(unread)?);
    files.finish(manifest, former).map(|manifest| Written::Whole(Box::new(manifest)))
}

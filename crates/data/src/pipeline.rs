//! Rows to labelled samples: one at a time, or a whole source in parallel.
//!
//! One thread reads rows from the source, rayon's current pool turns chunks of them into outcomes, and the
//! iterator yields these in source order. A row's outcome depends on the row alone, and chunk boundaries depend
//! only on the rows, so the result is the same for any number of threads. Findings that depend on earlier rows
//! (D001) are made in order.

mod duplicates;
mod foreign;
mod outcome;
mod pairing;
mod reference;
mod row;
mod run;
mod summary;

pub(crate) use duplicates::Duplicates;
pub use outcome::{Cut, DropReason, Kept, Outcome};
pub use pairing::Pairing;
pub use reference::Reference;
pub use row::RowProcessor;
pub use run::Rows;
pub(crate) use run::{Chunks, Done};
pub use summary::{CodeCount, Progress, ROWS_LISTED, SECTION_ORDER, SectionStats, Summary};

use crate::audit::Filter;
use crate::source::Source;
use crate::{Code, ModelFolder, Policy, Result, Sample};
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;

/// The purpose of the rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// To be written or evaluated: labels are taken unchanged, findings are reported, bad rows are subject to
    /// `on_bad_row`, and padding is removed (by attention mask, never by id).
    #[default]
    Prepare,
    /// To be trained on: as `Prepare`, and rows with an error of [a rule that refuses](crate::audit::Rule::refuses)
    /// are bad rows too.
    Train,
    /// To be inspected: every row with tokens is kept unchanged, whatever its findings, and bad rows never stop
    /// the run.
    Verify,
}

/// How rows become samples. It is cheap to clone and may be used from many threads.
///
/// ```
/// use serde_json::json;
/// use suasion_data::{ModelFolder, Outcome, Pipeline, Policy};
///
/// // Rows that came as tokens need no tokenizer.
/// let pipeline = Pipeline::new(ModelFolder::default(), Policy::default());
/// let row = [("input_ids", json!([5, 6, 7])), ("completion_mask", json!([0, 1, 1]))];
/// let Outcome::Kept(kept) = pipeline.row(row)? else { panic!("a good row") };
/// assert_eq!(kept.sample.labels, [-100, 6, 7]);
/// # Ok::<(), suasion_data::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Pipeline {
    /// The tokenizer and the chat template. For rows that came as tokens they are only used by the audits.
    pub folder: Arc<ModelFolder>,
    /// The options that determine labels.
    pub policy: Arc<Policy>,
    /// The policy that labels must follow, if it is not `policy`: prepared rows follow that of their manifest
    /// ([`Manifest::labelled_under`](crate::prepared::Manifest::labelled_under)).
    pub labelled_under: Option<Arc<Policy>>,
    /// True for rows that were prepared with a chat template: the last user turn is the task of a row.
    pub prepared_chats: bool,
    /// The purpose of the rows.
    pub mode: Mode,
    /// Keep texts and byte ranges in [`Kept`].
    pub keep_text: bool,
    /// Codes whose findings do not refuse a row in [`Mode::Train`]; they are still reported.
    pub allowed: Vec<Code>,
    /// The findings that count. An ignored finding does not refuse its row either.
    pub filter: Filter,
    /// In [`Mode::Verify`]: the source rows of rows that came as tokens, to compare these with.
    pub reference: Option<Arc<Reference>>,
}

impl Pipeline {
    /// A pipeline in [`Mode::Prepare`] that keeps no texts and counts all findings.
    pub fn new(folder: impl Into<Arc<ModelFolder>>, policy: impl Into<Arc<Policy>>) -> Pipeline {
        Pipeline {
            folder: folder.into(),
            policy: policy.into(),
            labelled_under: None,
            prepared_chats: false,
            mode: Mode::default(),
            keep_text: false,
            allowed: Vec::new(),
            filter: Filter::default(),
            reference: None,
        }
    }

    /// Iterates over the outcomes of a source's rows, in source order.
    ///
    /// ```
    /// use suasion_data::{ModelFolder, Outcome, Pipeline, Policy, source::Source};
    ///
    /// # let folder = tempfile::tempdir().unwrap();
    /// # let path = folder.path().join("rows.jsonl");
    /// # std::fs::write(&path, r#"{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}"#).unwrap();
    /// let pipeline = Pipeline::new(ModelFolder::default(), Policy::default());
    /// let mut rows = pipeline.rows(Source::open(path)?)?;
    /// for outcome in &mut rows {
    ///     match outcome? {
    ///         Outcome::Kept(kept) => println!("{} tokens", kept.sample.len()),
    ///         other => println!("{} is left out", other.id()),
    ///     }
    /// }
    /// assert_eq!(rows.summary().targets, 2);
    /// # Ok::<(), suasion_data::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Tokenizer`](crate::Error::Tokenizer) if a stop token of the policy is not in the vocabulary. The
    /// iterator ends after its first error: [`Error::Io`](crate::Error::Io) and
    /// [`Error::Source`](crate::Error::Source) if reading the source fails; and under `on_bad_row = error`, but
    /// not in [`Mode::Verify`], [`Error::BadRows`](crate::Error::BadRows) after all bad rows, or
    /// [`BAD_ROWS_LISTED`](crate::BAD_ROWS_LISTED) of them, were yielded.
    pub fn rows(&self, source: Source) -> Result<Rows> {
        self.rows_in_brief(source, |_| true)
    }

    /// [`Pipeline::rows`] for a caller that needs the findings of all rows and the tokens of few: a kept row has
    /// its tokens, text and cuts only if `whole` is true for its number. The summary counts all rows. The memory
    /// of a row's tokens is reused for the next, which is faster than passing it to another thread.
    ///
    /// # Errors
    /// As [`Pipeline::rows`].
    pub fn rows_in_brief(
        &self,
        source: Source,
        whole: impl Fn(u64) -> bool + Send + Sync + 'static,
    ) -> Result<Rows> {
        let brief = move |outcome: &mut Outcome| match outcome {
            Outcome::Kept(kept) if !whole(kept.sample.id.row) => kept.forget_tokens(),
            _ => {}
        };
        Ok(Rows::new(Chunks::new(self, source, Duplicates::default(), brief)?))
    }

    /// The samples of a file, and its summary.
    ///
    /// # Errors
    /// As [`Pipeline::rows`].
    pub fn samples(&self, path: impl AsRef<Path>) -> Result<(Vec<Sample>, Summary)> {
        let mut rows = self.rows(Source::open(path)?)?;
        let samples = rows.by_ref().filter_map(|outcome| outcome.map(Outcome::into_sample).transpose());
        Ok((samples.collect::<Result<_>>()?, rows.into_summary()))
    }

    /// The outcome of one row, given by its fields. To process many rows, keep a [`Pipeline::processor`].
    ///
    /// # Errors
    /// As [`RowProcessor::row`].
    pub fn row<N: Into<String>>(&self, fields: impl IntoIterator<Item = (N, Value)>) -> Result<Outcome> {
        self.processor()?.row(fields)
    }

    /// A processor of single rows. It may be used from many threads, and learns from each conversation how the
    /// chat template renders others of the same shape.
    ///
    /// # Errors
    /// [`Error::Tokenizer`](crate::Error::Tokenizer) if a stop token of the policy is not in the vocabulary.
    pub fn processor(&self) -> Result<RowProcessor> {
        RowProcessor::new(self.clone())
    }
}

//! The rooms over a whole source: parallel over rows, results in source order, bounded memory.
//!
//! One thread reads and cuts rows out of the stream, rayon's current pool turns chunks of them into outcomes,
//! and the calling thread hands these on in order. A row's outcome depends on the row alone, and chunks are cut
//! where the rows say, so the result is the same for any number of threads; what depends on earlier rows (D001)
//! happens in order.

mod duplicates;
mod outcome;
mod row;
mod run;
mod summary;

pub use duplicates::Duplicates;
pub(crate) use duplicates::hash_ids;
pub use outcome::{Cut, DropReason, Kept, Outcome};
pub use run::{Done, Progress};
pub use summary::{CodeCount, ROWS_LISTED, SECTION_ORDER, SectionStats, Summary};

use crate::audit::Filter;
use crate::source::RawRow;
use crate::template::ChatTemplate;
use crate::tokens::Tokenizer;
use crate::{Policy, Result};
use row::RowProcessor;

/// Under `on_bad_row = error` the search for further bad rows stops at this many.
pub const BAD_ROWS_LISTED: usize = 20;

/// What the run is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// To write or to evaluate: labels are taken as they are, findings are reported, bad rows are subject to
    /// `on_bad_row`, and padding is removed (by attention mask, never by id).
    #[default]
    Prepare,
    /// To train: as `Prepare`, and rows with a finding of [`audit::REFUSED`] are bad rows, too.
    Train,
    /// To look: every row that has tokens is handed on as it is, whatever its findings, and bad rows never stop the run.
    Verify,
}

/// The rooms with their settings.
#[derive(Clone)]
pub struct Pipeline<'a> {
    /// Needed for text rows; for tokenised rows it only serves the audits.
    pub tokenizer: Option<&'a Tokenizer>,
    /// The model's chat template: needed for conversations, and what instructions are rendered by where there is one.
    pub template: Option<&'a ChatTemplate>,
    /// Every choice that decides labels.
    pub policy: &'a Policy,
    /// The policy that the audits hold rows against, where it is not `policy`: prepared rows carry weights that
    /// their own manifest asked for ([`crate::prepared::Manifest::asked`]).
    pub asked: Option<&'a Policy>,
    /// What the run is for.
    pub mode: Mode,
    /// The model's number of embeddings: ids beyond it are an error of their row.
    pub vocab_size: Option<usize>,
    /// The positions that the model was made for: longer rows are a finding (T003).
    pub positions: Option<usize>,
    /// Keep texts and byte ranges in [`Kept`], for views and `--with-text`.
    pub keep_text: bool,
    /// Findings that are wanted. One that is ignored does not refuse its row either.
    pub filter: Filter,
}

impl<'a> Pipeline<'a> {
    /// A pipeline that prepares, without a vocabulary limit, keeping no texts.
    pub fn new(tokenizer: Option<&'a Tokenizer>, policy: &'a Policy) -> Pipeline<'a> {
        Pipeline {
            tokenizer,
            template: None,
            policy,
            asked: None,
            mode: Mode::default(),
            vocab_size: None,
            positions: None,
            keep_text: false,
            filter: Filter::default(),
        }
    }

    /// One row through all rooms (D001 for duplicates apart, which needs the other rows).
    ///
    /// # Errors
    /// What would end a whole run: a missing tokenizer, a stop token that is none.
    pub fn row(&self, raw: RawRow) -> Result<Outcome> {
        Ok(RowProcessor::new(self)?.outcome(raw)?.0)
    }
}

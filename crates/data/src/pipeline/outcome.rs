//! What became of a row.

use crate::{Error, Finding, Origin, RowId, Sample};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// A row that became a sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Kept {
    /// The sample.
    pub sample: Sample,
    /// What is worth knowing about it.
    pub findings: Vec<Finding>,
    /// What truncation cut, in order; empty for a whole row.
    pub cuts: Vec<Cut>,
    /// The whole rendered text (before truncation), where `keep_text` asks for it and the row has one.
    pub text: Option<String>,
    /// The bytes of `text` that each token of `sample` stands for; only for rows that came as text.
    pub bytes: Option<Vec<Range<u32>>>,
}

/// A run of tokens that truncation cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The index in the sample before which they stood.
    pub at: usize,
    /// How many there were.
    pub tokens: usize,
    /// Their bytes in the text; empty where there is none.
    pub bytes: Range<u32>,
    /// The origin of the first of them.
    pub origin: Origin,
}

/// Why a row is left out though nothing is wrong with it as data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DropReason {
    /// Longer than `max_length`, and the mode is `drop`.
    TooLong,
    /// Truncation left it without a target.
    NoTarget,
}

impl DropReason {
    /// Every reason.
    pub const ALL: [DropReason; 2] = [DropReason::TooLong, DropReason::NoTarget];

    /// In words, for summaries.
    pub fn meaning(self) -> &'static str {
        match self {
            DropReason::TooLong => "longer than max_length",
            DropReason::NoTarget => "without a target",
        }
    }

    /// The key used in JSON.
    pub fn name(self) -> &'static str {
        match self {
            DropReason::TooLong => "too_long",
            DropReason::NoTarget => "no_target",
        }
    }
}

/// What became of a row.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // almost all are Kept
pub enum Outcome {
    /// It is a sample.
    Kept(Kept),
    /// It is left out, and counted.
    Dropped {
        /// Which row.
        id: RowId,
        /// Why.
        reason: DropReason,
        /// The findings that say so.
        findings: Vec<Finding>,
    },
    /// It cannot be a sample.
    Failed {
        /// Which row.
        id: RowId,
        /// Why, with help.
        error: Error,
        /// The same as findings; the first is the reason.
        findings: Vec<Finding>,
    },
}

impl Outcome {
    /// The row that it is about.
    pub fn id(&self) -> &RowId {
        match self {
            Outcome::Kept(kept) => &kept.sample.id,
            Outcome::Dropped { id, .. } | Outcome::Failed { id, .. } => id,
        }
    }

    /// What was found about the row.
    pub fn findings(&self) -> &[Finding] {
        match self {
            Outcome::Kept(Kept { findings, .. })
            | Outcome::Dropped { findings, .. }
            | Outcome::Failed { findings, .. } => findings,
        }
    }
}

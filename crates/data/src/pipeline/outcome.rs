//! The outcome of a row.

use crate::{Error, Finding, Origin, RowId, Sample};
use serde::{Deserialize, Serialize};
use std::ops::Range;
use strum::VariantArray as _;

/// A row that became a sample.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Kept {
    /// The labelled tokens.
    pub sample: Sample,
    /// Its findings.
    pub findings: Vec<Finding>,
    /// The tokens that truncation cut, in order; empty for a whole row.
    pub cuts: Vec<Cut>,
    /// The rendered text before truncation, if the pipeline keeps texts and the row has one.
    pub text: Option<String>,
    /// The bytes of `text` that each token of `sample` covers; only for rows that came as text.
    pub bytes: Option<Vec<Range<u32>>>,
}

impl Kept {
    /// Frees the data of its tokens.
    pub(super) fn forget_tokens(&mut self) {
        let Sample { input_ids, labels, origins, weights, pack, .. } = &mut self.sample;
        (*input_ids, *labels, *origins) = (Vec::new(), Vec::new(), Vec::new());
        (*weights, *pack) = (None, None);
        (self.cuts, self.text, self.bytes) = (Vec::new(), None, None);
    }
}

/// A run of tokens that truncation cut.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Cut {
    /// The index in the sample of the token after them.
    pub at: usize,
    /// Number of tokens.
    pub tokens: usize,
    /// Their bytes in the text; empty without a text.
    pub bytes: Range<u32>,
    /// The origin of the first token.
    pub origin: Origin,
}

/// Why a good row is left out.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    strum::IntoStaticStr,
    strum::VariantArray,
)]
#[serde(rename_all = "snake_case")]
#[strum(serialize_all = "snake_case")]
#[non_exhaustive]
pub enum DropReason {
    /// The row is longer than `max_length`, and the mode is `drop`.
    TooLong,
    /// Truncation left no target.
    NoTarget,
}

impl DropReason {
    /// Every reason.
    pub const ALL: &'static [DropReason] = DropReason::VARIANTS;

    /// A description for summaries.
    pub fn meaning(self) -> &'static str {
        match self {
            DropReason::TooLong => "longer than max_length",
            DropReason::NoTarget => "without a target",
        }
    }

    /// The key used in JSON.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// The outcome of a row.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // Almost all are Kept.
pub enum Outcome {
    /// The row became a sample.
    Kept(Kept),
    /// The row is left out and counted.
    Dropped {
        /// The row's id.
        id: RowId,
        /// Why it is left out.
        reason: DropReason,
        /// Its findings.
        findings: Vec<Finding>,
    },
    /// The row cannot become a sample.
    Failed {
        /// The row's id.
        id: RowId,
        /// The reason, with help.
        error: Error,
        /// Its findings; the first is the reason of the failure.
        findings: Vec<Finding>,
    },
}

impl Outcome {
    /// The row's id.
    pub fn id(&self) -> &RowId {
        match self {
            Outcome::Kept(kept) => &kept.sample.id,
            Outcome::Dropped { id, .. } | Outcome::Failed { id, .. } => id,
        }
    }

    /// The sample, if there is one.
    pub fn into_sample(self) -> Option<Sample> {
        match self {
            Outcome::Kept(kept) => Some(kept.sample),
            _ => None,
        }
    }

    /// The row's findings.
    pub fn findings(&self) -> &[Finding] {
        match self {
            Outcome::Kept(Kept { findings, .. })
            | Outcome::Dropped { findings, .. }
            | Outcome::Failed { findings, .. } => findings,
        }
    }
}

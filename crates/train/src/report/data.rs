//! What the command line knows and the reports show: the data's summary, and generated replies.

use serde::{Deserialize, Serialize};

/// What is known of the data: the command line fills it from the preparation's summary.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DataCard {
    /// Heading of the card; empty = the base model's name with `-suasion`.
    pub title: String,
    /// The model that training started from: a hub id, a path, or words (random weights).
    pub base_model: String,
    /// Training sources.
    pub data: Vec<String>,
    /// Held-out sources, in words where they were split off.
    pub eval_data: Vec<String>,
    /// Rows read.
    pub rows_read: u64,
    /// Rows trained on.
    pub rows_kept: u64,
    /// Rows of those that were cut.
    pub rows_cut: u64,
    /// Rows left out (too long, or no target).
    pub rows_dropped: u64,
    /// Rows that could not become samples.
    pub rows_failed: u64,
    /// Held-out rows.
    pub eval_rows: u64,
    /// Tokens of the rows trained on.
    pub tokens: u64,
    /// Supervised tokens among them.
    pub supervised_tokens: u64,
    /// What each section is of the training signal.
    pub sections: Vec<SectionShare>,
    /// Findings by code.
    pub findings: Vec<FindingCount>,
    /// The resolved configuration, as text.
    pub configuration: String,
}

/// A section's share of the training signal; shares are between 0 and 1.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SectionShare {
    /// The section.
    pub name: String,
    /// Its tokens.
    pub tokens: u64,
    /// Its share if all tokens were learned.
    pub share_before: f64,
    /// Its share in this run.
    pub share_after: f64,
}

/// How often a finding occurs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FindingCount {
    /// Its code.
    pub code: String,
    /// Its level.
    pub level: String,
    /// How often.
    pub count: u64,
    /// One of them, in words.
    pub example: String,
}

/// A generated reply to show.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SampleReply {
    /// What the model was given.
    pub prompt: String,
    /// What it said.
    pub reply: String,
    /// What the row says, where there is one.
    pub reference: Option<String>,
    /// Why it ended, in words.
    pub stopped: String,
}

//! What the caller supplies for the reports: a summary of the data, and generated replies.

use serde::{Deserialize, Serialize};
use suasion_data::report::RowView;

/// A summary of the data.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DataCard {
    /// Heading of the card; if empty, the base model's name with `-suasion`.
    pub title: String,
    /// The model that training started from: a hub id or a name. Empty where it started from random weights.
    pub base_model: String,
    /// What training started from, if not a model.
    pub start: String,
    /// True if the run has trained an adapter.
    #[serde(default)]
    pub adapter: bool,
    /// True if the model has a chat template.
    pub chat: bool,
    /// Training sources: ids on the hub, or names of files.
    pub data: Vec<String>,
    /// Held-out sources, or a description if they are a share of the training sources.
    pub eval_data: Vec<String>,
    /// Rows read.
    pub rows_read: u64,
    /// Rows trained on.
    pub rows_kept: u64,
    /// Truncated rows among them.
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
    /// Each section's share of the training signal.
    pub sections: Vec<SectionShare>,
    /// Findings by code.
    pub findings: Vec<FindingCount>,
    /// The resolved configuration, as text.
    pub configuration: String,
    /// The machine, for readers.
    #[serde(default)]
    pub machine: String,
    /// A few of the rows trained on, for the page.
    #[serde(skip)]
    pub rows: Vec<RowView>,
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

/// The number of findings of one code.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FindingCount {
    /// The code.
    pub code: String,
    /// The level.
    pub level: String,
    /// The number of findings.
    pub count: u64,
    /// The message of one of them.
    pub example: String,
}

/// A generated reply to show.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SampleReply {
    /// The prompt.
    pub prompt: String,
    /// The reply of the model before training, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<String>,
    /// The model's reply.
    pub reply: String,
    /// The reply in the data, if there is one.
    pub reference: Option<String>,
    /// Why the generation ended, for readers.
    pub stopped: String,
}

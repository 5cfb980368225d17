//! Findings: problems and notable facts about a row, under stable codes.

use serde::{Deserialize, Serialize};
use std::ops::Range;
use strum::VariantArray as _;

/// The severity of a finding. `verify` exits with 1 on errors.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, strum::Display,
)]
#[serde(rename_all = "lowercase")]
#[strum(serialize_all = "lowercase")]
pub enum Level {
    /// For information.
    Note,
    /// Something was lost or looks wrong.
    Warning,
    /// The row must not be trained on as it is.
    Error,
}

/// A stable code of a finding. Its meaning and its check are in its [`Rule`](crate::audit::Rule).
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
    strum::Display,
    strum::IntoStaticStr,
    strum::VariantArray,
)]
#[allow(missing_docs)] // Their meanings are in the table of rules.
#[non_exhaustive]
pub enum Code {
    #[serde(rename = "E-ROW")]
    #[strum(serialize = "E-ROW")]
    Row,
    M001,
    M002,
    M003,
    M004,
    M005,
    M006,
    M007,
    M008,
    M009,
    M010,
    L001,
    L002,
    T001,
    T002,
    T003,
    S001,
    C001,
    C002,
    G001,
    D001,
    P001,
}

impl Code {
    /// Every code, in the order of reports.
    pub const ALL: &'static [Code] = Code::VARIANTS;

    /// The code as text: `M001`.
    pub fn as_str(self) -> &'static str {
        self.into()
    }

    /// The level of its findings, unless a finding says otherwise.
    pub fn level(self) -> Level {
        match self {
            Code::M003 | Code::D001 => Level::Note,
            Code::M007
            | Code::L002
            | Code::T001
            | Code::T002
            | Code::T003
            | Code::S001
            | Code::C001
            | Code::G001 => Level::Warning,
            _ => Level::Error,
        }
    }
}

/// One finding about one row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Finding {
    /// 0-based index of the row in the source.
    pub row: u64,
    /// The stable code.
    pub code: Code,
    /// Its level: usually the code's own (M002 is a warning under `append_eos = false`).
    pub level: Level,
    /// What was found, with its values.
    pub message: String,
    /// The tokens that it concerns, from the first to the last, counted before truncation; `None` if it concerns
    /// no tokens, or text. It is not written to files.
    #[serde(skip)]
    pub tokens: Option<Range<u32>>,
}

impl Finding {
    /// A finding with the code's own level.
    pub fn new(row: u64, code: Code, message: impl Into<String>) -> Finding {
        Finding { row, code, level: code.level(), message: message.into(), tokens: None }
    }
}

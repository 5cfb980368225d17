//! Findings: what is wrong or worth knowing about a row, under stable codes (MASKING.md, "Findings").

use serde::{Deserialize, Serialize};
use std::fmt;

/// How bad a finding is. `verify` exits with 1 on errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Worth knowing.
    Note,
    /// Something was lost or looks wrong.
    Warning,
    /// The row must not be trained on as it is.
    Error,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Level::Note => "note",
            Level::Warning => "warning",
            Level::Error => "error",
        })
    }
}

macro_rules! codes {
    ($($code:ident $text:literal $level:ident $meaning:literal;)*) => {
        /// A stable code of a finding.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        pub enum Code { $(#[doc = $meaning] #[serde(rename = $text)] $code,)* }

        impl Code {
            /// Every code, in the order of the specification.
            pub const ALL: &'static [Code] = &[$(Code::$code),*];
            /// The code as it is written, e.g. `M001`.
            pub fn as_str(self) -> &'static str { match self { $(Code::$code => $text),* } }
            /// The level it has unless the finding says otherwise.
            pub fn level(self) -> Level { match self { $(Code::$code => Level::$level),* } }
            /// One line of meaning.
            pub fn meaning(self) -> &'static str { match self { $(Code::$code => $meaning),* } }
        }
    };
}

codes! {
    Row "E-ROW" Error "the row cannot become a sample";
    M001 "M001" Error "no supervised token";
    M002 "M002" Error "a response without a supervised stop token";
    M003 "M003" Note "a token straddles the boundary";
    M004 "M004" Error "a token wholly inside the prompt is supervised";
    M005 "M005" Error "a padding token is supervised";
    M006 "M006" Error "double BOS";
    M007 "M007" Warning "role header or text after the stop token is supervised";
    M008 "M008" Error "everything is supervised: labels equal input_ids";
    M009 "M009" Error "a real EOS at the end of a response is masked";
    L001 "L001" Error "a label that is neither -100 nor the input id at its place";
    T001 "T001" Warning "supervised tokens lost by truncation";
    T002 "T002" Warning "prompt cut by truncation";
    T003 "T003" Warning "a row longer than the model's positions";
    S001 "S001" Warning "a structural token came from content";
    C001 "C001" Warning "the template altered the content";
    D001 "D001" Note "duplicate of another row, or response copied from its prompt";
    P001 "P001" Error "a pack without boundaries, or a target across one";
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One finding about one row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    /// 0-based index of the row in the source.
    pub row: u64,
    /// The stable code.
    pub code: Code,
    /// Its level here (M002 is a warning where `append_eos = false` was asked for).
    pub level: Level,
    /// What was found, in words.
    pub message: String,
}

impl Finding {
    /// A finding at its code's own level.
    pub fn new(row: u64, code: Code, message: impl Into<String>) -> Finding {
        Finding { row, code, level: code.level(), message: message.into() }
    }
}

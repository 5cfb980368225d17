//! Why a token is supervised or masked: the origin that every byte and every token carries.

use std::fmt;
use strum::VariantArray as _;

/// The part of a prompt that a byte belongs to.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, strum::IntoStaticStr, strum::VariantArray,
)]
#[strum(serialize_all = "snake_case")]
pub enum Section {
    /// General instructions: `[SYSTEM]`, or a system turn.
    System,
    /// The conversation so far: `[CONTEXT]`, or earlier user turns.
    Context,
    /// The current request: `[TASK]`.
    Task,
    /// The current request of a conversation: its last user turn.
    User,
    /// The result of a tool.
    Tool,
    /// Prompt text without a marker.
    #[strum(serialize = "prompt")]
    Other,
}

impl Section {
    /// All sections, in the order of reports.
    pub const ALL: &'static [Section] = Section::VARIANTS;

    /// The lower-case name used in configuration and JSON.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// Where a byte or token comes from. Supervision is derived from this alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Origin {
    /// Role headers, markers, separators, generation prompt, BOS, text after the stop token.
    Scaffold,
    /// Input of the model.
    Prompt {
        /// The turn's index, from 0.
        turn: u16,
        /// The section of the prompt.
        section: Section,
    },
    /// Output of the assistant: content, reasoning, tool calls.
    Response {
        /// The turn's index, from 0.
        turn: u16,
    },
    /// The stop token after a response, or the EOS appended to a plain completion.
    EndOfTurn {
        /// The turn's index, from 0.
        turn: u16,
    },
    /// Padding; determined by position, never by id.
    Padding,
}

impl Origin {
    /// True if the token is supervised by default (weight 1).
    pub fn supervised(self) -> bool {
        matches!(self, Origin::Response { .. } | Origin::EndOfTurn { .. })
    }

    /// The letter of `origins` strings (CLI.md): `BSCKUTORE-`.
    pub fn letter(self) -> char {
        match self {
            Origin::Scaffold => 'B',
            Origin::Prompt { section, .. } => match section {
                Section::System => 'S',
                Section::Context => 'C',
                Section::Task | Section::User => 'K',
                Section::Tool => 'T',
                Section::Other => 'O',
            },
            Origin::Response { .. } => 'R',
            Origin::EndOfTurn { .. } => 'E',
            Origin::Padding => '-',
        }
    }

    /// The inverse of [`Origin::letter`]. The letter does not hold the turn, which becomes 0, and a last user turn
    /// becomes a task.
    pub fn from_letter(letter: char) -> Option<Origin> {
        let prompt = |section| Some(Origin::Prompt { turn: 0, section });
        match letter {
            'B' => Some(Origin::Scaffold),
            'S' => prompt(Section::System),
            'C' => prompt(Section::Context),
            'K' => prompt(Section::Task),
            'U' => prompt(Section::User),
            'T' => prompt(Section::Tool),
            'O' => prompt(Section::Other),
            'R' => Some(Origin::Response { turn: 0 }),
            'E' => Some(Origin::EndOfTurn { turn: 0 }),
            '-' => Some(Origin::Padding),
            _ => None,
        }
    }

    /// The name used in JSON and reports: a section's name, `scaffold`, `response`, `end_of_turn` or `padding`.
    pub fn name(self) -> &'static str {
        match self {
            Origin::Scaffold => "scaffold",
            Origin::Prompt { section, .. } => section.name(),
            Origin::Response { .. } => "response",
            Origin::EndOfTurn { .. } => "end_of_turn",
            Origin::Padding => "padding",
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

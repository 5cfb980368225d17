#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod audit;
pub mod convert;
mod error;
pub mod example;
mod finding;
mod folder;
mod guard;
mod id;
pub mod label;
mod origin;
pub mod pack;
mod pipeline;
mod policy;
pub mod prepared;
pub mod render;
pub mod report;
mod sample;
pub mod source;
mod split;
pub mod template;
pub mod tokens;

pub use error::{BAD_ROWS_LISTED, Error, Result};
pub use finding::{Code, Finding, Level};
pub use folder::ModelFolder;
pub use guard::{hush_guarded_panics, start_thread};
pub use id::RowId;
pub use origin::{Origin, Section};
pub use pipeline::{
    CodeCount, Cut, DropReason, Kept, Mode, Outcome, Pairing, Pipeline, Progress, ROWS_LISTED, Reference,
    RowProcessor, Rows, SECTION_ORDER, SectionStats, Summary,
};
pub use policy::{
    Boundary, ContentSpecialTokens, Format, Objective, OnBadRow, Policy, Supervise, TruncationMode,
};
pub use sample::{Pack, Sample, Segment};
pub use split::split;

/// The version of the rules that turn rows into labels: part of every fingerprint, raised whenever a rule changes.
pub const MASKING_VERSION: u32 = 4;

/// The label of a masked token (PyTorch's `ignore_index`).
pub const IGNORE: i32 = -100;

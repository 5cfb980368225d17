#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod audit;
pub mod error;
pub mod example;
pub mod finding;
mod folder;
mod guard;
mod id;
pub mod label;
pub mod origin;
pub mod pack;
pub mod pipeline;
pub mod policy;
pub mod prepared;
pub mod render;
pub mod report;
pub mod sample;
pub mod source;
mod split;
pub mod template;
pub mod tokens;

pub use error::{Error, Result};
pub use example::chat;
pub use finding::{Code, Finding, Level};
pub use folder::ModelFolder;
pub use id::RowId;
pub use origin::{Origin, Section};
pub use pack::Packer;
pub use pipeline::{Kept, Mode, Outcome, Pipeline, Summary};
pub use policy::Policy;
pub use render::{Rendered, Span};
pub use sample::{Pack, Sample};
pub use source::row;
pub use split::split;

/// The version of the rules that turn rows into labels: part of every fingerprint, raised whenever a rule changes.
pub const MASKING_VERSION: u32 = 2;

/// The label of a token that is not learned (the convention of PyTorch's `ignore_index`).
pub const IGNORE: i32 = -100;

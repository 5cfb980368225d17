//! From bytes to labelled samples: everything before a weight is touched.
//!
//! Data flows one way, a module per room: [`source`] (bytes) → [`row`] → [`example`] → [`render`]
//! (text and the spans that tile it) → [`tokens`] (ids, bytes, origins) → [`label`] and [`truncate`]
//! (a [`Sample`]) → [`pack`] → [`prepared`] (files), with [`audit`] and [`report`] looking on. [`pipeline`] runs
//! the rooms over a whole source, in parallel and in source order, and [`summary`] counts.
#![forbid(unsafe_code)]

pub mod audit;
mod duplicates;
pub mod error;
pub mod example;
pub mod finding;
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
pub mod split;
pub mod summary;
pub mod template;
pub mod tokens;
pub mod truncate;

pub use error::{Error, Result};
pub use example::chat;
pub use finding::{Code, Finding, Level};
pub use origin::{Origin, Section};
pub use pack::{Pack, Packer};
pub use pipeline::{Kept, Mode, Outcome, Pipeline};
pub use policy::Policy;
pub use render::{Rendered, Span};
pub use sample::{RowId, Sample};
pub use source::row;
pub use summary::Summary;

/// The version of the rules that turn rows into labels: part of every fingerprint, raised whenever a rule changes.
pub const MASKING_VERSION: u32 = 2;

/// The label of a token that is not learned (the convention of PyTorch's `ignore_index`).
pub const IGNORE: i32 = -100;

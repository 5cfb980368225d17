//! From bytes to labelled samples: everything before a weight is touched.
//!
//! Data flows one way, a module per room: [`source`] (bytes) → [`row`] → [`example`] → [`render`]
//! (text and the spans that tile it) → [`tokens`] (ids, bytes, origins) → [`label`] and [`truncate`]
//! (a [`Sample`]) → [`prepared`] (files), with [`audit`] and [`report`] looking on. [`pipeline`] runs
//! the rooms over a whole source, in parallel and in source order.
#![forbid(unsafe_code)]

pub mod error;
pub mod finding;
pub mod origin;
pub mod policy;
pub mod render;
pub mod sample;
pub mod tokens;

pub use error::{Error, Result};
pub use finding::{Code, Finding, Level};
pub use origin::{Origin, Section};
pub use policy::Policy;
pub use sample::{RowId, Sample};

/// The label of a token that is not learned (the convention of PyTorch's `ignore_index`).
pub const IGNORE: i32 = -100;

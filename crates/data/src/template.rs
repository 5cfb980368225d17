//! Chat templates: conversations to text, as transformers 5 renders them, with proven spans (MASKING.md).
//!
//! A template is compiled once and used from many threads. It is untrusted: it has no access to files, and its
//! work and output are bounded.

mod blind;
mod charges;
mod compiled;
mod context;
mod counted;
mod details;
mod engine;
mod filters;
mod given;
mod habits;
mod limits;
mod marks;
mod options;
mod proof;
mod python;
mod renderer;
mod rewrite;
mod shape;
mod spans;
mod tile;
mod turns;
mod vanished;
mod watch;

pub(crate) use compiled::Sources;
pub use compiled::{ChatTemplate, TemplateError};
pub use options::{TemplateOptions, is_reserved};
pub use proof::Chat;
pub use renderer::ChatRenderer;
pub use watch::RenderingWatch;

#[cfg(test)]
mod tests;

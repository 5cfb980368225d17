//! What was made of the rows, for people and machines: pure functions from data to text.
//!
//! [`terminal`] for eyes at a terminal or behind a pipe, [`html`] for a page, [`json`] for programs. All three
//! say in words what they say in colour.

pub mod format;
pub mod html;
pub mod json;
pub mod terminal;
mod text;
mod view;

pub use format::thousands;
pub use terminal::Style;
pub use text::visible;
pub use view::{RowView, Run, TokenView};

//! Reports on rows, as pure functions from data to text: [`terminal`] output, an [`html`] page, [`json`] for programs.
//!
//! Text repeats everything that colour shows.

pub mod advice;
pub mod format;
mod gallery;
pub mod github;
pub mod html;
pub mod json;
mod losses;
pub mod page;
pub mod sarif;
mod spool;
pub mod terminal;
mod text;
mod view;

pub use gallery::{Chosen, Gallery};
pub use losses::Losses;
pub use spool::{Findings, Located, Quotas, content};
pub use text::{printable, visible};
pub use view::{RowView, Run, TokenView};

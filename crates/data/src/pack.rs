//! Packs: several rows in one flat run of tokens, with who sees whom.
//!
//! A pack is a [`Sample`] with boundaries. Its segments tile its tokens; a segment sees itself and, where it has
//! one, the earlier segment that is its prefix: a prompt that several rows share, the trunk, with one branch per
//! row. Positions restart with each segment and go on after a prefix. No target crosses a boundary: the first
//! token of a segment is predicted by the last token of its prefix, or by nothing.
//!
//! [`Packer`] makes packs of rows; [`Sample::unpack`] gives the rows back.

mod packer;

pub use packer::{Fill, Packer, WINDOW_TOKENS};

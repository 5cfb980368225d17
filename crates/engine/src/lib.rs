//! Decoder-only language models with explicit forward and backward passes.
//!
//! The engine knows nothing of rows, spans or files of examples. It is given [`Batch`]es: flat runs of tokens,
//! segments that say who sees whom, and [`Target`]s, the `(row, token, weight)` triples of the loss. Masked
//! labels are simply not in the list, so the head and the loss never meet them.
//!
//! Rooms: [`arch`] reads `config.json` into a value; [`params`] lays parameters out; `weights` and `init`
//! fill them; [`model`] runs forward and backward over an arena planned in advance; [`kernels`] computes.
#![deny(unsafe_code)]

pub mod arch;
pub mod batch;
pub mod error;
mod init;
pub mod kernels;
mod map;
pub mod model;
pub mod params;
mod weights;

pub use arch::Architecture;
pub use batch::{Batch, Segment, Target};
pub use error::{Error, Result};
pub use kernels::{AdamW, Backend, Outcome, cpu::Cpu, reference::Reference};
pub use model::{Budget, KvCache, MemoryPlan, Model};
pub use weights::Tensor;

//! Decoder-only language models with explicit forward and backward passes.
//!
//! The engine does not know rows, spans or data files. Its input is [`Batch`]es: tokens
//! concatenated into one sequence, segments that attention respects, and [`Target`]s, the
//! `(row, token, weight)` triples of the loss. Masked labels are not in the list, so the head and the loss
//! never compute them.
//!
//! [`arch`] describes a model as a value and [`families`] reads it from `config.json`; [`params`] lays
//! parameters out; `weights` and `init` fill them; [`model`] runs forward and backward over an arena planned
//! in advance; [`kernels`] computes.
#![deny(unsafe_code)]

mod abort;
pub mod arch;
pub mod batch;
pub mod collective;
mod dtype;
pub mod error;
pub mod families;
mod init;
pub mod kernels;
pub mod lora;
mod map;
pub mod model;
pub mod params;
pub mod peft;
pub mod rope;
mod weights;

pub use abort::on_abort;
pub use arch::{AddedRows, Architecture};
pub use batch::{Batch, Prepared, Segment, Target};
pub use collective::{Collective, SingleRank, Watch};
pub use dtype::{Packing, WeightType};
pub use error::{Error, Result};
pub use kernels::cuda::{Cuda, Precision};
pub use kernels::{AdamW, Backend, TargetLoss, cpu::Cpu, device::Device, reference::Reference};
pub use lora::{Lora, LoraInit, Targets};
pub use model::{
    Budget, CardRun, KvCache, Losses, MemoryPlan, Model, Optimizer, Rates, Regularisation, Update,
};
pub use params::{Base, Trainable};
pub use peft::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterFolder};
pub use weights::Tensor;

//! The training loop and what surrounds it: schedules, sampling order, the optimizer step, checkpoints that resume
//! to the same bytes, evaluation per section, generation, the comparison of both objectives, and the reports.
//!
//! A run flows through [`plan`] (what will happen, before a weight is loaded) → [`sampler`] (which rows make which
//! step) → [`pack`] (rows to a flat batch) → [`step`] (gradients, clipping, AdamW) → [`checkpoint`] and [`card`]
//! (what it leaves behind), all held together by [`trainer`]. Nothing here prints: events go to an [`Observer`].
#![forbid(unsafe_code)]

pub mod card;
pub mod checkpoint;
pub mod compare;
pub mod error;
pub mod evaluate;
pub mod generate;
mod html;
pub mod memory;
pub mod metrics;
pub mod observer;
pub mod pack;
pub mod plan;
mod rng;
pub mod sampler;
pub mod schedule;
pub mod settings;
pub mod step;
pub mod trainer;

pub use card::{DataCard, FindingCount, SampleReply, SectionShare, write_report};
pub use checkpoint::{ModelFiles, OutputFile, Resume};
pub use compare::{CompareSettings, Comparison, compare};
pub use error::{Error, Result};
pub use evaluate::{Evaluation, evaluate};
pub use generate::{Generated, Sampling, Stopped, generate, prompt_ids};
pub use metrics::{EvalRecord, StepRecord};
pub use observer::{Event, Observer, Silent, StepEvent};
pub use plan::Plan;
pub use settings::{Scheduler, Settings, Strategy};
pub use trainer::{Best, Identity, Report, Run, train};

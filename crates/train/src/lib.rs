//! Training: schedules, the order of the rows, the optimizer step, checkpoints that resume to the same bytes,
//! evaluation per section, generation, the comparison of the two objectives, and reports.
//!
//! [`trainer`] runs a training through these stages: [`plan`] (sizes and steps, before a weight is loaded) →
//! [`sampler`] (which rows make which step) → [`batches`] (rows to a flat batch) → [`step`] (gradients,
//! clipping, the optimizer) → [`checkpoint`] and [`report`]. The crate prints nothing: events go to an [`Observer`].
#![forbid(unsafe_code)]

pub mod batches;
pub mod checkpoint;
pub mod compare;
pub mod diagnose;
pub mod divergence;
pub mod error;
pub mod evaluate;
pub mod generate;
pub mod groups;
pub mod interval;
mod json;
pub mod logits;
pub mod memory;
pub mod metrics;
pub mod model_files;
pub mod observer;
mod output_dir;
pub mod plan;
pub mod preference;
pub mod probe;
pub mod ranks;
pub mod repeats;
pub mod report;
mod rng;
pub mod run;
pub mod sampler;
mod samples;
pub mod schedule;
pub mod settings;
pub mod state;
pub mod statistics;
pub mod step;
mod steps;
mod tensorboard;
mod token_losses;
pub mod trainer;
mod trainer_state;

pub use checkpoint::SAVED_CONFIG;
pub use compare::{CompareSettings, Comparison, compare};
pub use divergence::Divergence;
pub use error::{Error, Result};
pub use evaluate::{Evaluation, evaluate, evaluate_over};
pub use generate::{Generated, Stopped, generate, prompt_ids};
pub use groups::{ParamGroup, Patterns};
pub use interval::Interval;
pub use logits::Sampling;
pub use metrics::{EvalRecord, StepRecord};
pub use model_files::{ModelFiles, OutputFile, TEMPLATES};
pub use observer::{Event, Observer, Silent, StepEvent};
pub use output_dir::{EVENTS, check_output_dir, lock, replaces};
pub use plan::Plan;
pub use probe::ProbeSettings;
pub use ranks::{Mesh, Place};
pub use report::data::{DataCard, FindingCount, SampleReply, SectionShare};
pub use report::write_report;
pub use run::{Best, Identity, Report, Resume, Run};
pub use schedule::Scheduler;
pub use settings::{OnSaveError, Optim, Settings, Strategy};
pub use token_losses::token_losses;
pub use trainer::{train, train_from};

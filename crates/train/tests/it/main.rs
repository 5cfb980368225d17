//! Tests of training against what others computed and against its own promises.

mod best;
mod cards;
mod common;
mod compare;
mod diagnose;
mod evaluate;
mod extras;
mod fuzz;
mod fuzzed;
mod generate;
mod mesh;
mod not_finite;
mod packing;
mod pytorch;
mod ranks;
mod reports;
mod resume;
mod run_folder;
mod sampler_and_schedule;
mod settings;
mod steps;

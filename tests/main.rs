//! End-to-end tests of the binary, in one test program: command lines, their output, and the files they
//! write.
//!
//! `util` has their helpers. Tests that need the test material (golden values of real models) return early without it,
//! and are counted as skipped (`suasion-test-support`).

mod util;

mod adapters;
mod bad_input;
mod chat;
mod commands;
mod configuration;
mod convert;
mod demo;
mod devices;
mod evidence;
mod folders;
mod fuzzed;
mod goldens;
#[cfg(feature = "hub")]
mod hub;
mod newcomer;
mod packing;
mod pages;
mod prepare;
mod quantised;
mod ranks;
mod readme;
mod resume;
mod runs;
mod sources;
mod training;
mod verify;
mod vocabulary;

//! Tests of the training loop against what others computed and against its own promises.

mod common;
mod compare;
mod evaluate;
mod generate;
mod loop_;
mod order;
mod packing;
mod ranks;
mod reports;
mod resume;
mod trajectories;

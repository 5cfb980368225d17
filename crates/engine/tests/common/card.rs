//! A card for tests: the kernels' source runs on the CPU, behind the same driver interface as a real card. With
//! `SUASION_CARD=N` it is the real card with this number, and the same tests run there (`benches/gpu.sh`).

use super::emulation;
use std::path::PathBuf;
use std::sync::OnceLock;
use suasion_engine::kernels::cuda::Fault;
use suasion_engine::kernels::cuda::found::Found;
use suasion_engine::{Cuda, Precision};

/// Bytes of its memory.
pub const MEMORY: usize = 1 << 30;

/// The number of the real card on which tests run.
pub fn real() -> Option<usize> {
    let number = std::env::var("SUASION_CARD").ok()?;
    Some(number.parse().expect("SUASION_CARD is the number of a card"))
}

/// A card; an emulated one runs threads in an order that depends on `seed`. `None` without g++.
pub fn card(precision: Precision, seed: u32) -> Option<Cuda> {
    let Some(number) = real() else { return emulated(precision, seed, MEMORY) };
    static FOUND: OnceLock<Found> = OnceLock::new();
    let card = FOUND.get_or_init(Found::look).card(Some(number)).unwrap_or_else(|e| panic!("{e}"));
    Some(Cuda::open(card, precision).unwrap_or_else(|e| panic!("{e}")))
}

/// An emulated card with `memory` bytes.
pub fn emulated(precision: Precision, seed: u32, memory: usize) -> Option<Cuda> {
    faulty(precision, seed, memory, Fault::None)
}

/// An emulated card with a fault.
pub fn faulty(precision: Precision, seed: u32, memory: usize, fault: Fault) -> Option<Cuda> {
    static LIBRARY: OnceLock<Option<PathBuf>> = OnceLock::new();
    let library = LIBRARY.get_or_init(emulation::library).as_ref()?;
    // SAFETY: the library is the emulation of the repository's kernels.
    Some(unsafe { Cuda::emulated(library, precision, seed, memory, fault) }.unwrap())
}

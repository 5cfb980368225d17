//! The whole CUDA backend, on an emulation of the card: the kernels' own source runs on the CPU, matrix products are
//! plain loops. What a card adds, the driver's and cuBLASLt's calls, is `benches/gpu.sh`'s to test.

mod common;

use common::golden::{check_gradients, check_trajectory, for_each, load};
use common::golden_batch;
use std::path::PathBuf;
use suasion_engine::{Cuda, Precision};

fn emulation() -> Option<PathBuf> {
    Some(PathBuf::from(std::env::var_os("SUASION_EMULATION")?))
}

fn card(precision: Precision, seed: u32) -> Option<Cuda> {
    // SAFETY: the library is the one that was just built.
    Some(unsafe { Cuda::emulated(&emulation()?, precision, seed, 1 << 30) }.unwrap())
}

#[test]
fn losses_and_gradients_equal_pytorch() {
    for_each(|family, dir, arch, golden| {
        let Some(card) = card(Precision::F32, 1) else { return };
        let start = std::time::Instant::now();
        let (batch, want) = (golden_batch(&golden["batches"]["a"]), &golden["fp32"]["a"]);
        let what = format!("{family}/a on the card");
        check_gradients(load(arch, dir, card, &[&batch], true), &batch, want, &what);
        eprintln!("{what}: {:?}", start.elapsed());
    });
}

#[test]
fn five_steps_of_adamw_equal_pytorch() {
    for_each(|family, dir, arch, golden| {
        let Some(card) = card(Precision::F32, 1) else { return };
        let start = std::time::Instant::now();
        let batch = golden_batch(&golden["batches"]["a"]);
        let mut model = load(arch, dir, card, &[&batch], true);
        check_trajectory(&mut model, &batch, &golden["adamw_5"], family);
        eprintln!("{family}: {:?}", start.elapsed());
    });
}

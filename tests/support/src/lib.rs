//! Code shared by the tests of every crate: the larger test material, the peers, and a record of skipped tests.
//!
//! The tests that must always run use files in the repository (`tests/goldens`). The material and the peers are a
//! second, larger source that few machines have; a test that needs them returns early elsewhere and records that here,
//! so that `.ci/run` can count it.
#![forbid(unsafe_code)]

pub mod fuzz;

use std::fmt::Display;
use std::io::Write;
use std::path::{Path, PathBuf};

/// The models of `tests/goldens/models`, whose reference runs were computed by PyTorch.
pub const MODELS: [&str; 20] = [
    "llama",
    "llama_tied",
    "llama_bias",
    "llama_yarn",
    "llama_dynamic",
    "qwen2",
    "qwen2_window",
    "gpt2",
    "qwen3",
    "mistral",
    "phi3",
    "phi3_longrope",
    "olmo2",
    "granite",
    "smollm3",
    "gpt_neox",
    "gpt_neox_serial",
    "gemma2",
    "gemma3",
    "qwen3_moe",
];

/// The root of the repository.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The folder of the test material: `SUASION_MATERIAL`, else `../shared/material` beside the repository.
pub fn material_folder() -> Option<PathBuf> {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/material");
    Some(std::env::var_os("SUASION_MATERIAL").map_or_else(beside, PathBuf::from)).filter(|path| path.is_dir())
}

/// The folder of the test material, for a test that needs it: without it, the running test is recorded as skipped.
pub fn material() -> Option<PathBuf> {
    let found = material_folder();
    if found.is_none() {
        skipped("no test material (SUASION_MATERIAL)");
    }
    found
}

/// The Python with PyTorch, transformers, TRL and datasets: `SUASION_PEERS_PYTHON`. If it is not set, the running test
/// is recorded as skipped.
pub fn peers_python() -> Option<PathBuf> {
    let python = std::env::var_os("SUASION_PEERS_PYTHON").map(PathBuf::from);
    if python.is_none() {
        skipped("no Python with TRL and datasets (SUASION_PEERS_PYTHON)");
    }
    python
}

/// The tensors of a safetensors file by name, each with its `dtype` and `shape`.
pub fn tensors(path: &Path) -> serde_json::Map<String, serde_json::Value> {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: serde_json::Map<_, _> = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    header.remove("__metadata__");
    header
}

/// The data types of a safetensors file, in the order of its tensors, without repetitions.
pub fn tensor_types(path: &Path) -> Vec<String> {
    let header = tensors(path);
    let mut types: Vec<String> = header.values().map(|t| t["dtype"].as_str().unwrap().into()).collect();
    types.dedup();
    types
}

/// Records that the running test is skipped: prints a line that starts with `skipped: ` to stderr, and appends a line
/// with the test's name and the reason, separated by a tab, to the file that `SUASION_SKIPPED` names.
pub fn skipped(reason: impl Display) {
    eprintln!("skipped: {reason}");
    let Some(path) = std::env::var_os("SUASION_SKIPPED") else { return };
    // The test harness names each test's thread after the test.
    let line = format!("{}\t{reason}\n", std::thread::current().name().unwrap_or("?"));
    let file = std::fs::File::options().create(true).append(true).open(&path);
    let written = file.and_then(|mut file| file.write_all(line.as_bytes()));
    written.unwrap_or_else(|e| panic!("{}: {e}", Path::new(&path).display()));
}

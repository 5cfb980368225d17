//! Coverage-guided fuzzing of every parser of foreign bytes. What is parsed, and good inputs to begin with, are those of the
//! seeded tests in each crate; `fuzz/run` runs the targets.

#[path = "../tests/fuzzed/mod.rs"]
pub mod cli;
#[path = "../crates/train/tests/it/common.rs"]
#[allow(dead_code)]
pub mod common;
#[path = "../crates/data/tests/fuzzed/mod.rs"]
pub mod data;
#[path = "../crates/engine/tests/fuzzed/mod.rs"]
pub mod engine;
#[path = "../crates/train/tests/it/fuzzed.rs"]
pub mod train;

pub use libfuzzer_sys;
pub use suasion_test_support::fuzz::{Both, Parser, parse};

/// What a model's folder and an adapter's hold.
pub type Models = Both<engine::Configurations, engine::Weights>;
/// What a run's folder holds, and configurations of runs.
pub type Runs = Both<train::RunFiles, cli::Keys>;

/// Where `SUASION_FUZZ_SEEDS` names a folder, writes the good inputs there and ends.
pub fn seeds<P: Parser>() {
    let Some(folder) = std::env::var_os("SUASION_FUZZ_SEEDS") else { return };
    for (i, input) in suasion_test_support::fuzz::inputs::<P>().into_iter().enumerate() {
        std::fs::write(std::path::Path::new(&folder).join(format!("seed-{i}")), input).expect("a writable folder");
    }
    std::process::exit(0);
}

/// A fuzz target.
#[macro_export]
macro_rules! target {
    ($parser:ty) => {
        thread_local! {
            static PARSER: std::cell::RefCell<$parser> = <$parser as $crate::Parser>::new().into();
        }
        $crate::libfuzzer_sys::fuzz_target!(
            init: $crate::seeds::<$parser>(),
            |bytes: &[u8]| PARSER.with_borrow_mut(|parser| $crate::parse(parser, bytes))
        );
    };
}

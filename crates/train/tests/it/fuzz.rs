//! Damaged files of a run: errors are fine, panics are not.

use suasion_test_support::fuzz::run;

#[test]
fn states_and_metrics() {
    run::<crate::fuzzed::RunFiles>();
}

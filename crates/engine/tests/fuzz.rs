//! Damaged configurations, weights, indices and adapters: errors are fine, panics are not.

mod fuzzed;

use suasion_test_support::fuzz::run;

#[test]
fn configurations() {
    run::<fuzzed::Configurations>();
}

#[test]
fn weights() {
    run::<fuzzed::Weights>();
}

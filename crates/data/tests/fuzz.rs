//! Damaged inputs for every parser of foreign bytes in this crate: errors are allowed, panics are not.

mod fuzzed;

use suasion_test_support::fuzz::{Numbers, damaged, run};

#[test]
fn rows_as_text() {
    run::<fuzzed::Rows>();
}

#[test]
fn rows_as_columns() {
    run::<fuzzed::Columns>();
}

#[test]
fn rows_through_the_pipeline() {
    run::<fuzzed::Stages>();
}

#[test]
fn templates() {
    run::<fuzzed::Templates>();
}

#[test]
fn tokenizers() {
    run::<fuzzed::Tokenizers>();
}

#[test]
fn corpora() {
    run::<fuzzed::Corpora>();
}

#[test]
fn damage_is_damage() {
    let mut numbers = Numbers(3);
    let input = b"{\"a\": [1, 2, 3]}".repeat(4);
    let changed = (0..200).filter(|_| damaged(&input, &input, &mut numbers) != input).count();
    assert!(changed > 150, "{changed}");
}

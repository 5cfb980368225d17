//! P001: targets across the boundaries of a pack.

use super::subject::{Found, Subject};
use crate::sample::Segment;

/// P001, second kind: a label on the first token of a sequence that no prompt stands before. It is no target here; a
/// trainer that shifts the whole pack would learn it from the sequence before.
pub(super) fn target_across_boundary(s: &Subject<'_>) -> Vec<Found> {
    let Some(pack) = &s.sample.pack else { return Vec::new() };
    let alone = |segment: &&Segment| segment.prefix.is_empty() && segment.own.start > 0;
    let first = pack.segments.iter().filter(alone).map(|segment| segment.own.start as usize);
    let wrong: Vec<usize> = first.filter(|&i| s.learned(i)).collect();
    Found::about(&wrong, |places| format!("{places} supervised across the boundary before a sequence"))
}

//! P001: targets across the boundaries of a pack.

use super::subject::{Subject, places};
use crate::sample::Segment;
use crate::{Code, Finding};

/// P001, second kind: a label on the first token of a sequence that no prompt stands before. It is no target here; a trainer
/// that shifts the whole pack would learn it from the sequence before.
pub fn p001(s: &Subject<'_>) -> Option<Finding> {
    let first = |segment: Segment| segment.own.start as usize;
    let alone = s.sample.segments().filter(|segment| segment.prefix.is_empty()).map(first);
    let wrong: Vec<usize> = alone.filter(|&i| s.sample.pack.is_some() && i > 0 && s.learned(i)).collect();
    if wrong.is_empty() {
        return None;
    }
    s.finding(Code::P001, format!("{} supervised across the boundary before a sequence", places(&wrong)))
}

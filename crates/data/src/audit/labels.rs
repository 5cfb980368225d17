//! L001: labels that do not match the ids.

use super::subject::{Found, Subject};
use crate::IGNORE;

/// L001: a label that is neither -100 nor the id at its position (shifted labels, another ignore index).
pub(super) fn wrong_labels(s: &Subject<'_>) -> Vec<Found> {
    let (ids, labels) = (&s.sample.input_ids, &s.sample.labels);
    let is_for = |label: i32, id: u32| label == IGNORE || i64::from(label) == i64::from(id);
    // A branch-free loop first, which the compiler vectorises: nearly all rows pass.
    if labels.iter().zip(ids).fold(true, |all, (&label, &id)| all & is_for(label, id)) {
        return Vec::new();
    }
    let wrong = s.tokens(|i| !is_for(labels[i], ids[i]));
    let shifted = s.n() > 1 && (0..s.n() - 1).all(|i| is_for(labels[i], ids[i + 1]));
    let hint = if shifted { "; the labels look shifted by one, which the model does itself" } else { "" };
    Found::about(s, &wrong, |places| {
        let (label, id) = (labels[wrong[0]], ids[wrong[0]]);
        format!("{places}: the label is {label}, the input id is {id}{hint}")
    })
}

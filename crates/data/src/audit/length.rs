//! T003: rows that reach beyond the model's positions.

use super::subject::{Found, Subject};

/// T003: more tokens than the model has positions, if `max_length` does not cut the row to fit.
pub(super) fn beyond_positions(s: &Subject<'_>) -> Vec<Found> {
    let n = s.n();
    match s.positions {
        Some(positions) if n > positions => {
            let message = format!("the row has {n} tokens, the model was made for {positions}");
            vec![Found::within(positions..n, message)]
        }
        _ => Vec::new(),
    }
}

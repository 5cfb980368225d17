//! T003: rows that reach beyond the model's positions.

use super::subject::Subject;
use crate::{Code, Finding};

/// T003: more tokens than the model has positions for, where `max_length` does not cut the row to fit them.
pub fn t003(s: &Subject<'_>) -> Option<Finding> {
    let (n, positions) = (s.n(), s.positions.filter(|&positions| s.n() > positions)?);
    s.finding(Code::T003, format!("the row has {n} tokens, the model was made for {positions}"))
}

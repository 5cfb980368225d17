//! L001: labels that are not labels of these ids.

use super::subject::{Subject, places};
use crate::{Code, Finding, IGNORE};

/// L001: a label that is neither -100 nor the id at its place (shifted labels, another ignore index).
pub fn l001(s: &Subject<'_>) -> Option<Finding> {
    let (ids, labels) = (&s.sample.input_ids, &s.sample.labels);
    let wrong: Vec<usize> =
        (0..s.n()).filter(|&i| labels[i] != IGNORE && i64::from(labels[i]) != i64::from(ids[i])).collect();
    let first = *wrong.first()?;
    let shifted = s.n() > 1
        && (0..s.n() - 1).all(|i| labels[i] == IGNORE || i64::from(labels[i]) == i64::from(ids[i + 1]));
    let hint = if shifted { "; the labels look shifted by one, which the model does itself" } else { "" };
    let (label, id) = (labels[first], ids[first]);
    s.finding(Code::L001, format!("{}: the label is {label}, the input id is {id}{hint}", places(&wrong)))
}

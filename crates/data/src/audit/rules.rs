//! The checks in their order, and what their findings do.

use super::copies::d001_copy;
use super::labels::l001;
use super::length::t003;
use super::mask::{m001, m002, m004, m005, m006, m007, m008, m009};
use super::packs::p001;
use super::subject::Subject;
use crate::{Code, Finding};

/// Findings with these codes mean that a wrong token would be learned, or a right one not: such a row is not
/// trained on unless the finding is ignored by name.
pub const REFUSED: [Code; 6] = [Code::M004, Code::M005, Code::M006, Code::M008, Code::M009, Code::L001];

/// All checks that look at one row's tokens, in the order of the specification. The rows of a pack are looked at one by
/// one; what is found says in which sequence, counted from 0.
pub fn audit(subject: &Subject<'_>) -> Vec<Finding> {
    let checks: [fn(&Subject<'_>) -> Option<Finding>; 11] =
        [m001, m002, m004, m005, m006, m007, m008, m009, l001, t003, d001_copy];
    let Some(pack) = &subject.sample.pack else {
        return checks.iter().filter_map(|check| check(subject)).collect();
    };
    let mut findings = Vec::new();
    for (i, (row, tokens)) in subject.sample.unpack().iter().zip(pack.row_tokens()).enumerate() {
        let given = subject.given.map(|given| {
            let mut part = given.part(&tokens);
            // A weight that a shared prompt has for all of its rows is not the row's own.
            part.weights = part.weights.and_then(|_| row.weights.clone());
            part
        });
        let row = Subject { sample: row, given: given.as_ref(), ..*subject };
        findings.extend(checks.iter().filter_map(|check| check(&row)).map(|mut finding| {
            finding.row = subject.row();
            finding.message = format!("sequence {i}: {}", finding.message);
            finding
        }));
    }
    findings.extend(p001(subject));
    findings
}

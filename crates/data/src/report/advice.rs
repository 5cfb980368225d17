//! Advice about findings, for the terminal.

use super::format::thousands;
use super::text::{visible, wrap};
use crate::audit::foreign::{Maker, remedies};
use crate::pipeline::Summary;
use crate::{Code, Finding, Level};
use std::collections::BTreeMap;
use std::fmt::Write;

/// The first finding of each code, in row order.
#[derive(Clone, Debug, Default)]
pub struct Firsts(BTreeMap<Code, Finding>);

impl Firsts {
    /// Records the findings of a row.
    pub fn note(&mut self, findings: &[Finding]) {
        for finding in findings {
            self.0.entry(finding.code).or_insert_with(|| finding.clone());
        }
    }
}

/// For each code with a level above note: its first finding, what to do, and the settings of the program that
/// tokenised the rows. Empty if there is none. `headers`: the role headers of a user's message and of an answer.
pub fn advice(
    summary: &Summary,
    firsts: &Firsts,
    maker: Option<Maker>,
    headers: Option<(&str, &str)>,
    width: usize,
) -> String {
    let mut out = String::new();
    for (code, found) in summary.findings.iter().filter(|(_, found)| found.level > Level::Note) {
        if out.is_empty() {
            out.push_str("\nwhat to do\n");
        }
        let mut entry = |head: &str, text: &str| {
            for (i, line) in wrap(text, width.saturating_sub(8).max(16)).iter().enumerate() {
                let _ = writeln!(out, "  {:<5} {}", if i == 0 { head } else { "" }, line.trim_end());
            }
        };
        if let Some(first) = firsts.0.get(code) {
            let more = match found.count {
                0 | 1 => String::new(),
                n => format!(" (the first of {})", thousands(n)),
            };
            entry(code.as_str(), &format!("row {}: {}{more}", first.row, visible(&first.message)));
        }
        entry("", &format!("fix: {}", code.rule().help));
        for text in maker.map(|maker| remedies(*code, maker, headers)).unwrap_or_default() {
            entry("", &format!("- {text}"));
        }
    }
    out
}

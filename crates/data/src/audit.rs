//! Findings about labelled rows: a registry of rules, each with its check.
//!
//! Checks run on the whole row, before truncation, so that what truncation removes is reported as such (T001,
//! T002) and not as a fault of the data.

mod copies;
pub mod foreign;
mod labels;
mod length;
mod mask;
mod packs;
mod rules;
mod subject;
pub mod turns;

pub use rules::{Check, Example, RULES, Rule, audit};
pub use subject::{Found, Subject};

use crate::Code;

/// The codes that count (`--select` and `--ignore`).
///
/// A pattern is a code or a prefix of codes: `M` covers M001 to M009. Without `select` every code is selected;
/// `ignore` takes precedence.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    select: Vec<String>,
    ignore: Vec<String>,
}

impl Filter {
    /// A filter with these patterns; each may be a comma-separated list.
    ///
    /// # Errors
    /// A message with the pattern that matches no code.
    pub fn new<S: AsRef<str>>(select: &[S], ignore: &[S]) -> Result<Filter, String> {
        let parse = |patterns: &[S]| -> Result<Vec<String>, String> {
            let mut out = Vec::new();
            for part in patterns.iter().flat_map(|p| p.as_ref().split(',')) {
                let part = part.trim().to_uppercase();
                if part.is_empty() {
                    continue;
                }
                if !Code::ALL.iter().any(|c| c.as_str().starts_with(&part)) {
                    let all: Vec<&str> = Code::ALL.iter().map(|c| c.as_str()).collect();
                    return Err(format!("no finding has the code {part:?}; there are {}", all.join(", ")));
                }
                out.push(part);
            }
            Ok(out)
        };
        Ok(Filter { select: parse(select)?, ignore: parse(ignore)? })
    }

    /// True if findings with this code count.
    pub fn accepts(&self, code: Code) -> bool {
        let fits = |patterns: &[String]| patterns.iter().any(|p| code.as_str().starts_with(p.as_str()));
        (self.select.is_empty() || fits(&self.select)) && !fits(&self.ignore)
    }
}

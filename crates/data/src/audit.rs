//! What is wrong with a row, found by looking at its tokens: one small function per code.
//!
//! Audits look at the whole row, before truncation, so that what a cut removes is told once (T001, T002) and
//! not as a fault of the data.

mod copies;
mod labels;
mod length;
mod mask;
mod packs;
mod rules;
mod subject;

pub use rules::{REFUSED, audit};
pub use subject::Subject;

use crate::Code;

/// Which codes are shown and count: `--select` and `--ignore`.
///
/// A pattern is a code or its beginning: `M` covers M001 to M009. Without `select` every code is selected;
/// `ignore` wins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    select: Vec<String>,
    ignore: Vec<String>,
}

impl Filter {
    /// A filter of these patterns, each possibly a comma-separated list.
    ///
    /// # Errors
    /// The pattern that fits no code.
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

    /// True where findings with this code are shown and count.
    pub fn accepts(&self, code: Code) -> bool {
        let fits = |patterns: &[String]| patterns.iter().any(|p| code.as_str().starts_with(p.as_str()));
        (self.select.is_empty() || fits(&self.select)) && !fits(&self.ignore)
    }
}

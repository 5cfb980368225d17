//! A run in numbers.

use crate::pipeline::{DropReason, Outcome};
use crate::policy::Policy;
use crate::source::SourceHash;
use crate::{Code, IGNORE, Level, Origin, Sample};
use std::collections::BTreeMap;

/// Row numbers kept per code in a [`Summary`].
pub const ROWS_LISTED: usize = 10;

/// The tokens of one origin, over all kept rows.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SectionStats {
    /// Tokens.
    pub tokens: u64,
    /// Those of them that are supervised.
    pub supervised: u64,
    /// Targets that they would be if the loss were on all tokens (all but padding and each row's first).
    pub targets_before: u64,
    /// The loss weight of the targets that they are.
    pub weight_after: f64,
}

/// How often a code was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CodeCount {
    /// Number of findings.
    pub count: u64,
    /// The highest level among them.
    pub level: Level,
    /// The first rows, at most [`ROWS_LISTED`].
    pub rows: Vec<u64>,
}

/// A run in numbers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Summary {
    /// Rows of the source.
    pub rows: u64,
    /// Rows that became samples.
    pub kept: u64,
    /// Kept rows that were cut.
    pub cut: u64,
    /// Rows left out, by reason.
    pub dropped: BTreeMap<DropReason, u64>,
    /// Rows that cannot be samples.
    pub failed: u64,
    /// Tokens of kept rows.
    pub tokens: u64,
    /// Supervised tokens of kept rows: labels that are not -100.
    pub supervised_tokens: u64,
    /// Targets of kept rows, after the shift by one.
    pub targets: u64,
    /// Kept rows with at least one target.
    pub trainable_rows: u64,
    /// Tokens of the longest kept row.
    pub longest: u64,
    /// Per origin, by [`Origin::name`].
    pub sections: BTreeMap<&'static str, SectionStats>,
    /// Findings, after the filter.
    pub findings: BTreeMap<Code, CodeCount>,
    /// What the source was.
    pub source: Option<SourceHash>,
    /// The fingerprint of the chat template, where a row went through it.
    pub template: Option<String>,
    /// The day that the rows were rendered on, `YYYY-MM-DD`, where the template writes the date and the policy pins none.
    pub template_date: Option<String>,
}

impl Summary {
    /// The policy with the day that the rows were rendered on: what their labels depend on.
    pub fn pinned(&self, policy: &Policy) -> Policy {
        let template_date = policy.template_date.clone().or_else(|| self.template_date.clone());
        Policy { template_date, ..policy.clone() }
    }
}

/// Section names in the order of reports.
pub const SECTION_ORDER: [&str; 10] =
    ["system", "context", "task", "user", "tool", "other", "scaffold", "response", "end_of_turn", "padding"];

impl Summary {
    /// Rows left out, for any reason.
    pub fn dropped_rows(&self) -> u64 {
        self.dropped.values().sum()
    }

    /// The sections that have tokens, in the order of reports.
    pub fn sections(&self) -> impl Iterator<Item = (&'static str, &SectionStats)> {
        SECTION_ORDER.iter().filter_map(|name| self.sections.get(name).map(|s| (*name, s)))
    }

    /// The share of a section among all targets, if the loss were on all tokens. The shares sum to 1.
    pub fn share_before(&self, name: &str) -> f64 {
        let total: u64 = self.sections.values().map(|s| s.targets_before).sum();
        self.sections.get(name).map_or(0.0, |s| ratio(s.targets_before as f64, total as f64))
    }

    /// The share of a section in the loss weight as it is. The shares sum to 1.
    pub fn share_after(&self, name: &str) -> f64 {
        let total: f64 = self.sections.values().map(|s| s.weight_after).sum();
        self.sections.get(name).map_or(0.0, |s| ratio(s.weight_after, total))
    }

    /// True where some finding is at level error: `verify` then exits with 1.
    pub fn has_errors(&self) -> bool {
        self.findings.values().any(|c| c.level == Level::Error)
    }

    /// Adds one outcome.
    pub fn add(&mut self, outcome: &Outcome) {
        self.rows += 1;
        for finding in outcome.findings() {
            let entry = self.findings.entry(finding.code).or_insert(CodeCount {
                count: 0,
                level: finding.level,
                rows: Vec::new(),
            });
            entry.count += 1;
            entry.level = entry.level.max(finding.level);
            if entry.rows.len() < ROWS_LISTED && entry.rows.last() != Some(&finding.row) {
                entry.rows.push(finding.row);
            }
        }
        match outcome {
            Outcome::Failed { .. } => self.failed += 1,
            Outcome::Dropped { reason, .. } => *self.dropped.entry(*reason).or_default() += 1,
            Outcome::Kept(kept) => {
                self.kept += 1;
                self.cut += u64::from(!kept.cuts.is_empty());
                self.add_sample(&kept.sample);
            }
        }
    }

    /// The summary of samples that are kept: what is known of rows that are trained on, without what was read,
    /// cut, dropped or found.
    pub fn of(samples: &[Sample]) -> Summary {
        let mut summary = Summary::default();
        for sample in samples {
            summary.kept += 1;
            summary.add_sample(sample);
        }
        summary
    }

    fn add_sample(&mut self, sample: &Sample) {
        let n = sample.len() as u64;
        self.tokens += n;
        self.longest = self.longest.max(n);
        let mut targets = 0;
        let mut at = 0;
        while at < sample.len() {
            // Origins come in runs: one look-up for each.
            let name = sample.origins[at].name();
            let end = at + sample.origins[at..].iter().take_while(|o| o.name() == name).count();
            let stats = self.sections.entry(name).or_default();
            for i in at..end {
                stats.tokens += 1;
                let supervised = sample.labels[i] != IGNORE;
                stats.supervised += u64::from(supervised);
                self.supervised_tokens += u64::from(supervised);
                if i == 0 {
                    continue;
                }
                stats.targets_before += u64::from(sample.origins[i] != Origin::Padding);
                if supervised {
                    let weight = sample.weights.as_ref().map_or(1.0, |w| w[i]);
                    targets += u64::from(weight != 0.0);
                    stats.weight_after += f64::from(weight);
                }
            }
            at = end;
        }
        self.targets += targets;
        self.trainable_rows += u64::from(targets > 0);
    }
}

fn ratio(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}

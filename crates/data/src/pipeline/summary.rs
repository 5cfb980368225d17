//! Summary numbers of the rows of a source.

use super::outcome::{DropReason, Outcome};
use crate::policy::Policy;
use crate::sample::Run;
use crate::source::SourceHash;
use crate::{Code, Finding, IGNORE, Level, Origin, Sample};
use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The progress of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Rows processed.
    pub rows: u64,
    /// Bytes of the source read, as stored.
    pub bytes: u64,
    /// The source's size in bytes, as stored.
    pub size: u64,
    /// Tokens of kept rows.
    pub tokens: u64,
}

/// The maximal number of row numbers per code in a [`Summary`].
pub const ROWS_LISTED: usize = 10;

/// Numbers of the tokens of one origin, over all kept rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct SectionStats {
    /// Number of tokens.
    pub tokens: u64,
    /// Number of supervised tokens.
    pub supervised: u64,
    /// The number of targets if all tokens were supervised: all except padding and each row's first token. A
    /// shared token counts once for each of its rows.
    pub targets_before: u64,
    /// The sum of the loss weights of the targets.
    pub weight_after: f64,
}

/// Counts of the findings of one code.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct CodeCount {
    /// Number of findings.
    pub count: u64,
    /// The highest level among them.
    pub level: Level,
    /// The numbers of the first rows with it, in source order and without repetition; at most [`ROWS_LISTED`].
    pub rows: Vec<u64>,
}

/// Summary numbers of the rows of a source.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Summary {
    /// Rows of the source; a pack counts as one.
    pub rows: u64,
    /// Rows that became samples.
    pub kept: u64,
    /// Kept rows that were cut.
    pub cut: u64,
    /// Kept rows that were read as packs.
    #[serde(default)]
    pub packs: u64,
    /// Rows in those packs.
    #[serde(default)]
    pub packed_rows: u64,
    /// Rows left out, by reason.
    pub dropped: BTreeMap<DropReason, u64>,
    /// Rows that cannot become samples.
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
    /// The tokens of each origin, by [`Origin::name`].
    #[serde(deserialize_with = "sections")]
    pub sections: BTreeMap<&'static str, SectionStats>,
    /// The findings of each code, after the filter.
    pub findings: BTreeMap<Code, CodeCount>,
    /// Kept rows that later rows were not compared with (D001), because the table of rows was full.
    #[serde(default)]
    pub not_remembered: u64,
    /// The hash of the source; `None` if it was not read to its end.
    pub source: Option<SourceHash>,
    /// The fingerprint of the chat template, if it rendered a row.
    pub template: Option<String>,
    /// True if instructions were rendered without a chat template, because there is none.
    #[serde(default)]
    pub untemplated: bool,
    /// The date that the chat template wrote, as YYYY-MM-DD, if the policy does not pin one.
    pub template_date: Option<String>,
    /// The texts before a user's message and before an answer, if rows that came as tokens were compared with the
    /// chat template.
    #[serde(skip)]
    pub headers: Option<(String, String)>,
    /// Why the turns of the chat template cannot be determined from ids.
    #[serde(skip)]
    pub no_turns: Option<String>,
}

impl Summary {
    /// The policy with the date that the chat template wrote, since labels depend on it.
    pub fn pinned(&self, policy: &Policy) -> Policy {
        let template_date = policy.template_date.clone().or_else(|| self.template_date.clone());
        Policy { template_date, ..policy.clone() }
    }
}

/// Section names in report order.
pub const SECTION_ORDER: [&str; 10] =
    ["system", "context", "task", "user", "tool", "prompt", "scaffold", "response", "end_of_turn", "padding"];

impl Summary {
    /// The noun for a row of the source: a line, if some rows are packs.
    pub(crate) fn unit(&self) -> &'static str {
        if self.packs > 0 { "line" } else { "row" }
    }

    /// Rows left out, for any reason.
    pub fn dropped_rows(&self) -> u64 {
        self.dropped.values().sum()
    }

    /// The sections that have tokens, in the order of reports.
    pub fn sections(&self) -> impl Iterator<Item = (&'static str, &SectionStats)> {
        SECTION_ORDER.iter().filter_map(|name| self.sections.get(name).map(|s| (*name, s)))
    }

    /// The share of a section in the loss if all tokens were supervised with weight 1. The shares sum to 1.
    pub fn share_before(&self, name: &str) -> f64 {
        let total: u64 = self.sections.values().map(|s| s.targets_before).sum();
        self.sections.get(name).map_or(0.0, |s| ratio(s.targets_before as f64, total as f64))
    }

    /// The share of a section in the loss, by weight. The shares sum to 1.
    pub fn share_after(&self, name: &str) -> f64 {
        let total: f64 = self.sections.values().map(|s| s.weight_after).sum();
        self.sections.get(name).map_or(0.0, |s| ratio(s.weight_after, total))
    }

    /// True if a finding is an error.
    pub fn has_errors(&self) -> bool {
        self.findings.values().any(|c| c.level == Level::Error)
    }

    /// Adds one outcome.
    pub fn add(&mut self, outcome: &Outcome) {
        let runs = match outcome {
            Outcome::Kept(kept) => kept.sample.runs(),
            _ => Vec::new(),
        };
        self.add_with(outcome, &runs);
    }

    /// Adds one outcome whose sample has these runs.
    pub(super) fn add_with(&mut self, outcome: &Outcome, runs: &[Run]) {
        self.rows += 1;
        outcome.findings().iter().for_each(|finding| self.add_finding(finding));
        match outcome {
            Outcome::Failed { .. } => self.failed += 1,
            Outcome::Dropped { reason, .. } => *self.dropped.entry(*reason).or_default() += 1,
            Outcome::Kept(kept) => {
                self.kept += 1;
                self.cut += u64::from(!kept.cuts.is_empty());
                self.add_sample(&kept.sample, runs);
            }
        }
    }

    /// Adds a finding.
    pub(crate) fn add_finding(&mut self, finding: &Finding) {
        let (code, level, row) = (finding.code, finding.level, finding.row);
        self.add_count(code, &CodeCount { count: 1, level, rows: vec![row] });
    }

    fn add_count(&mut self, code: Code, found: &CodeCount) {
        let entry =
            self.findings.entry(code).or_insert(CodeCount { count: 0, level: found.level, rows: Vec::new() });
        entry.count += found.count;
        entry.level = entry.level.max(found.level);
        for &row in &found.rows {
            // Duplicates are found after the findings of later rows of their chunk.
            if let Err(at) = entry.rows.binary_search(&row)
                && at < ROWS_LISTED
            {
                entry.rows.insert(at, row);
                entry.rows.truncate(ROWS_LISTED);
            }
        }
    }

    /// Adds the summary of later rows.
    pub(crate) fn merge(&mut self, next: &Summary) {
        self.rows += next.rows;
        self.kept += next.kept;
        self.cut += next.cut;
        self.packs += next.packs;
        self.not_remembered += next.not_remembered;
        self.packed_rows += next.packed_rows;
        self.failed += next.failed;
        self.tokens += next.tokens;
        self.supervised_tokens += next.supervised_tokens;
        self.targets += next.targets;
        self.trainable_rows += next.trainable_rows;
        self.longest = self.longest.max(next.longest);
        for (reason, count) in &next.dropped {
            *self.dropped.entry(*reason).or_default() += count;
        }
        for (name, stats) in &next.sections {
            let sum = self.sections.entry(name).or_default();
            sum.tokens += stats.tokens;
            sum.supervised += stats.supervised;
            sum.targets_before += stats.targets_before;
            sum.weight_after += stats.weight_after;
        }
        for (code, found) in &next.findings {
            self.add_count(*code, found);
        }
        self.untemplated |= next.untemplated;
        for (mine, theirs) in
            [(&mut self.template, &next.template), (&mut self.template_date, &next.template_date)]
        {
            if theirs.is_some() {
                mine.clone_from(theirs);
            }
        }
    }

    /// The summary of samples: only kept rows are counted, and no findings.
    pub fn of(samples: &[Sample]) -> Summary {
        let mut summary = Summary::default();
        for sample in samples {
            summary.kept += 1;
            summary.add_sample(sample, &sample.runs());
        }
        summary
    }

    fn add_sample(&mut self, sample: &Sample, runs: &[Run]) {
        let n = sample.len() as u64;
        self.tokens += n;
        self.longest = self.longest.max(n);
        if sample.pack.is_some() {
            self.packs += 1;
            self.packed_rows += sample.rows() as u64;
        }
        let mut targets = 0;
        let mut runs = runs.iter().peekable();
        for segment in sample.segments() {
            while let Some(Run { origin, tokens, supervised }) =
                runs.next_if(|run| run.tokens.end <= segment.own.end as usize)
            {
                let first = tokens.start + usize::from(segment.predictor(tokens.start as u32).is_none());
                let learned = |i: &usize| sample.labels[*i] != IGNORE;
                let supervised = *supervised as u64;
                let mut weights = 0.0;
                match &sample.weights {
                    // Each label weighs 1, except on a token without a predictor.
                    None => {
                        let predicted = supervised - (tokens.start..first).filter(learned).count() as u64;
                        targets += predicted;
                        weights = predicted as f64;
                    }
                    Some(given) => {
                        for i in (first..tokens.end).filter(learned) {
                            targets += u64::from(given[i] != 0.0);
                            weights += f64::from(given[i]);
                        }
                    }
                }
                let stats = self.sections.entry(origin.name()).or_default();
                stats.tokens += tokens.len() as u64;
                stats.supervised += supervised;
                stats.weight_after += weights;
                self.supervised_tokens += supervised;
                if *origin != Origin::Padding {
                    // A shared token would be supervised in each of its rows.
                    stats.targets_before += u64::from(segment.copies()) * (tokens.end - first) as u64;
                }
            }
        }
        self.targets += targets;
        self.trainable_rows += u64::from(targets > 0);
    }
}

/// Reads sections with known names.
fn sections<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<&'static str, SectionStats>, D::Error> {
    let found = BTreeMap::<String, SectionStats>::deserialize(from)?;
    let known = |(name, stats): (String, SectionStats)| {
        let known = SECTION_ORDER.iter().find(|known| **known == name);
        known.map(|known| (*known, stats)).ok_or_else(|| D::Error::custom(format!("no section {name:?}")))
    };
    found.into_iter().map(known).collect()
}

fn ratio(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_rows_are_listed_whatever_the_order() {
        let code = Code::ALL[0];
        // 0, 7, 14, ... modulo 40: all rows below 40, each twice, in mixed order.
        let rows: Vec<u64> = (0..80).map(|i| i * 7 % 40).collect();
        let of = |rows: &[u64]| {
            let mut summary = Summary::default();
            for &row in rows {
                summary.add_count(code, &CodeCount { count: 1, level: Level::Note, rows: vec![row] });
            }
            summary
        };
        let mut merged = of(&rows[50..]);
        merged.merge(&of(&rows[..50]));
        for summary in [of(&rows), merged] {
            assert_eq!(summary.findings[&code].rows, (0..ROWS_LISTED as u64).collect::<Vec<_>>());
            assert_eq!(summary.findings[&code].count, 80);
        }
    }
}

//! Which keys each query attends to.

use crate::{Error, Result};
use std::ops::Range;

/// An attention plan. Query row `i` belongs to the token whose keys are in row `rows[i]`; it attends to the
/// whole prefix of its range and to the range's own rows up to and including `rows[i]`.
#[derive(Clone, Debug, Default)]
pub struct AttentionPlan {
    /// Key row of each query row; ascending within a range (repeats are allowed).
    pub rows: Vec<u32>,
    /// Independent ranges.
    pub ranges: Vec<AttentionRange>,
    /// Ranges, by index, that read the same keys (a shared prefix and what follows it). Gradients of one group's keys
    /// are summed in order by one worker; two groups never share a key.
    pub groups: Vec<Vec<usize>>,
}

/// One segment as attention sees it; all ranges are ranges of rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttentionRange {
    /// Keys that every query of the range attends to; empty without a shared prefix.
    pub prefix: Range<usize>,
    /// The range's own keys.
    pub own: Range<usize>,
    /// The range's query rows.
    pub queries: Range<usize>,
}

impl AttentionRange {
    /// The keys of the range, as non-empty runs.
    fn keys(&self) -> impl Iterator<Item = Range<usize>> {
        [self.prefix.clone(), self.own.clone()].into_iter().filter(|run| run.start < run.end)
    }
}

impl AttentionPlan {
    /// Key rows that the plan reaches: one past the largest.
    pub fn keys(&self) -> usize {
        self.ranges.iter().flat_map(|range| [range.prefix.end, range.own.end]).max().unwrap_or(0)
    }

    /// Rejects a plan that would be unsafe for backends writing in parallel. Queries must tile `0..rows.len()`, rows
    /// must ascend within their range's own keys, every range must be in exactly one group, and no key may belong to
    /// two groups.
    pub fn check(&self) -> Result<()> {
        let fail = |message: String| Err(Error::Operands { operation: "attention plan", message });
        let mut next = 0;
        for range in &self.ranges {
            let queries = &range.queries;
            if queries.start != next || queries.end <= next || queries.end > self.rows.len() {
                return fail(format!("queries do not tile: {range:?} follows query {next}"));
            }
            next = queries.end;
            let rows = &self.rows[queries.clone()];
            if !rows.is_sorted() || !rows.iter().all(|row| range.own.contains(&(*row as usize))) {
                return fail(format!("rows do not ascend within {range:?}"));
            }
        }
        if next != self.rows.len() {
            return fail(format!("{next} of {} queries are planned", self.rows.len()));
        }
        let mut grouped = vec![false; self.ranges.len()];
        let mut runs = Vec::new();
        for (group, members) in self.groups.iter().enumerate() {
            for &member in members {
                match grouped.get_mut(member) {
                    Some(seen) if !*seen => *seen = true,
                    Some(_) => return fail(format!("range {member} is in two groups")),
                    None => return fail(format!("range {member} of {}", self.ranges.len())),
                }
                runs.extend(self.ranges[member].keys().map(|run| (run, group)));
            }
        }
        if let Some(range) = grouped.iter().position(|seen| !seen) {
            return fail(format!("range {range} is in no group"));
        }
        // Sorted by start: all previous runs that reach beyond `end` are of one group.
        runs.sort_by_key(|(run, _)| run.start);
        let (mut end, mut owner) = (0, 0);
        for (run, group) in runs {
            if run.start < end && group != owner {
                return fail(format!("key {} belongs to two groups", run.start));
            }
            if run.end > end {
                (end, owner) = (run.end, group);
            }
        }
        Ok(())
    }
}

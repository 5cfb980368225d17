//! The rows that a page shows of a source of any size, chosen in one pass and in bounded memory.

use super::view::RowView;
use crate::pipeline::{Kept, Outcome};
use crate::tokens::Tokenizer;
use crate::{Code, Finding, IGNORE, Level, RowId, Sample};
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::sync::Arc;

/// Rows kept per code.
const OF_CODE: usize = 6;
/// Rows kept per extreme.
const OF_EXTREME: usize = 2;
/// The default number of examples.
const EXAMPLES: usize = 40;
/// The number of ranges of the supervised share.
const SHARES: usize = 20;

/// Chooses the most informative rows: the first ones, those with findings, the extremes of length and of the
/// supervised share, and a sample of all.
#[derive(Debug)]
pub struct Gallery {
    /// The requested rows.
    asked: std::ops::Range<u64>,
    first: Vec<Item>,
    by_code: BTreeMap<Code, Vec<Item>>,
    extremes: [(&'static str, Vec<(f64, Item)>); 4],
    /// The rows with the lowest hashes of their numbers, the highest on top: a pseudo-random sample, the same in
    /// each run.
    examples: BinaryHeap<Example>,
    number_of_examples: usize,
    /// The number of kept rows by their number of tokens.
    pub(super) lengths: HashMap<u64, u64>,
    /// The number of kept rows by their supervised share.
    pub(super) shares: [u64; SHARES],
    /// The number of rows whose worst finding is an error, and a warning.
    pub(super) rows_with: [u64; 2],
    /// True if a row came as tokens.
    pub(super) tokenised: bool,
}

/// A row that was added.
#[derive(Debug)]
enum Item {
    Kept(Arc<Kept>),
    /// A row without a sample.
    Bare(RowId, Arc<Vec<Finding>>),
}

impl Item {
    fn id(&self) -> &RowId {
        match self {
            Item::Kept(kept) => &kept.sample.id,
            Item::Bare(id, _) => id,
        }
    }

    fn again(&self) -> Item {
        match self {
            Item::Kept(kept) => Item::Kept(kept.clone()),
            Item::Bare(id, findings) => Item::Bare(id.clone(), findings.clone()),
        }
    }
}

#[derive(Debug)]
struct Example(u64, Arc<Kept>);

impl PartialEq for Example {
    fn eq(&self, other: &Example) -> bool {
        self.0 == other.0
    }
}

impl Eq for Example {}

impl PartialOrd for Example {
    fn partial_cmp(&self, other: &Example) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Example {
    fn cmp(&self, other: &Example) -> std::cmp::Ordering {
        self.0.cmp(&other.0)
    }
}

/// A row of the page.
#[derive(Debug)]
pub struct Chosen {
    /// The row.
    pub view: RowView,
    /// Why the page has it, apart from its findings; may be empty.
    pub why: String,
    /// True for one of the first rows, or a requested one.
    pub asked: bool,
}

impl Gallery {
    /// A gallery of the rows to be added: `asked` are kept in any case, and `examples` is the number of sampled
    /// rows; `None` for the default number.
    pub fn new(asked: std::ops::Range<u64>, examples: Option<usize>) -> Gallery {
        Gallery {
            asked,
            first: Vec::new(),
            by_code: BTreeMap::new(),
            extremes: ["longest", "shortest", "most learned", "least learned"].map(|name| (name, Vec::new())),
            examples: BinaryHeap::new(),
            number_of_examples: examples.unwrap_or(EXAMPLES),
            lengths: HashMap::new(),
            shares: [0; SHARES],
            rows_with: [0; 2],
            tokenised: false,
        }
    }

    /// Adds a row; rows are added in source order.
    pub fn add(&mut self, outcome: Outcome) {
        let worst = outcome.findings().iter().map(|finding| finding.level).max();
        match worst {
            Some(Level::Error) => self.rows_with[0] += 1,
            Some(Level::Warning) => self.rows_with[1] += 1,
            _ => {}
        }
        let item = match outcome {
            Outcome::Kept(kept) => Item::Kept(Arc::new(kept)),
            Outcome::Dropped { id, findings, .. } | Outcome::Failed { id, findings, .. } => {
                Item::Bare(id, Arc::new(findings))
            }
        };
        let (row, findings) = match &item {
            Item::Kept(kept) => (kept.sample.id.row, &kept.findings),
            Item::Bare(id, findings) => (id.row, &**findings),
        };
        if self.asked.contains(&row) {
            self.first.push(item.again());
        }
        for finding in findings {
            let rows = self.by_code.entry(finding.code).or_default();
            if rows.len() < OF_CODE && rows.last().is_none_or(|last| last.id().row != row) {
                rows.push(item.again());
            }
        }
        let Item::Kept(kept) = item else { return };
        self.tokenised |= kept.bytes.is_none();
        let tokens = kept.sample.len();
        let supervised = kept.sample.labels.iter().filter(|label| **label != IGNORE).count();
        let share = supervised as f64 / tokens.max(1) as f64;
        *self.lengths.entry(tokens as u64).or_default() += 1;
        self.shares[((share * SHARES as f64) as usize).min(SHARES - 1)] += 1;
        let values = [tokens as f64, -(tokens as f64), share, -share];
        for ((_, rows), value) in self.extremes.iter_mut().zip(values) {
            // Of equal rows the first are kept.
            if rows.len() < OF_EXTREME || rows.last().is_some_and(|(least, _)| value > *least) {
                let at = rows.partition_point(|(other, _)| *other >= value);
                rows.insert(at, (value, Item::Kept(kept.clone())));
                rows.truncate(OF_EXTREME);
            }
        }
        let example = Example(hash(row), kept);
        if self.examples.len() < self.number_of_examples {
            self.examples.push(example);
        } else if self.examples.peek().is_some_and(|top| example < *top) {
            self.examples.pop();
            self.examples.push(example);
        }
    }

    /// The sample of all rows, in source order.
    pub fn samples(&self) -> Vec<&Sample> {
        let mut samples: Vec<&Sample> = self.examples.iter().map(|example| &example.1.sample).collect();
        samples.sort_by_key(|sample| sample.id.row);
        samples
    }

    /// The chosen rows, those with the worst findings first, without repetition.
    pub fn chosen(&self, tokenizer: Option<&Tokenizer>) -> Vec<Chosen> {
        let mut rows: BTreeMap<u64, (&Item, Vec<&'static str>)> = BTreeMap::new();
        let examples: Vec<Item> = self.examples.iter().map(|example| Item::Kept(example.1.clone())).collect();
        for item in self.first.iter().chain(self.by_code.values().flatten()) {
            rows.entry(item.id().row).or_insert((item, Vec::new()));
        }
        for (i, (name, extreme)) in self.extremes.iter().enumerate() {
            // If all rows are equal, there is no extreme.
            let best = |i: usize| self.extremes[i].1.first().map(|(value, _)| *value);
            if best(i) == best(i ^ 1).map(|value| -value) {
                continue;
            }
            for (_, item) in extreme {
                rows.entry(item.id().row).or_insert((item, Vec::new())).1.push(name);
            }
        }
        for item in &examples {
            rows.entry(item.id().row).or_insert((item, Vec::new()));
        }
        let view = |item: &Item| match item {
            Item::Kept(kept) => RowView::new(kept, tokenizer),
            Item::Bare(id, findings) => RowView::bare(id.clone(), findings.to_vec()),
        };
        let mut chosen: Vec<Chosen> = rows
            .iter()
            .map(|(row, (item, why))| Chosen {
                view: view(item),
                why: why.join(", "),
                asked: self.asked.contains(row),
            })
            .collect();
        let worst = |chosen: &Chosen| chosen.view.findings.iter().map(|finding| finding.level).max();
        chosen.sort_by_key(|chosen| (std::cmp::Reverse(worst(chosen)), chosen.view.id.row));
        chosen
    }
}

/// SplitMix64: spreads row numbers over all values.
fn hash(row: u64) -> u64 {
    let mut z = row.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

//! How much of prompts a model reproduces when it is given the beginning of a section.

use crate::generate::{capacity, generate_with};
use crate::{Error, Result, Sampling, prompt_ids};
use indexmap::IndexMap;
use serde::Serialize;
use std::collections::{HashMap, HashSet};
use std::ops::{ControlFlow, Range};
use std::sync::atomic::{AtomicBool, Ordering};
use suasion_data::{Origin, Sample};
use suasion_engine::{Backend, Model};

/// Which sections are continued, and how far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProbeSettings {
    /// Prompts to probe (8), of the held-out and of the training rows each.
    pub rows: usize,
    /// Tokens of a section that are given (8).
    pub given: usize,
    /// Most tokens to continue (32).
    pub new: usize,
    /// Tokens of an n-gram (4).
    pub ngram: usize,
}

impl Default for ProbeSettings {
    fn default() -> Self {
        ProbeSettings { rows: 8, given: 8, new: 32, ngram: 4 }
    }
}

impl ProbeSettings {
    /// Refuses probes that could measure nothing.
    pub fn validate(&self) -> Result<()> {
        if self.given == 0 || self.ngram == 0 || self.new < self.ngram {
            let message = "the probes need a token to begin with and room for an n-gram";
            return Err(Error::setting("probe_new", message, "use at least probe_ngram"));
        }
        Ok(())
    }
}

/// How much of prompts a model reproduces when it is given the beginning of a section.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Reproduction {
    /// Sections continued.
    pub probes: u64,
    /// Tokens generated.
    pub tokens: u64,
    /// Share of the sections' n-grams that the continuations contain.
    pub ngram_share: Option<f64>,
    /// Mean number of tokens before the first difference.
    pub exact_tokens: Option<f64>,
    /// The same per section.
    pub sections: IndexMap<String, SectionReproduction>,
}

/// A section's part of a [`Reproduction`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct SectionReproduction {
    /// Sections continued.
    pub probes: u64,
    /// n-grams in what was left of them.
    pub ngrams: u64,
    /// Those that the continuations contain.
    pub ngrams_reproduced: u64,
    /// Tokens generated.
    pub tokens: u64,
    /// Tokens before the first difference, summed.
    pub exact_tokens: u64,
}

/// The runs of one prompt section that are long enough to be continued, with the section's name.
fn probed_runs(sample: &Sample, settings: &ProbeSettings) -> Vec<(&'static str, Range<usize>)> {
    let mut runs = Vec::new();
    let mut start = 0;
    for run in sample.origins.chunk_by(|a, b| a == b) {
        let range = start..start + run.len();
        start = range.end;
        if matches!(run[0], Origin::Prompt { .. }) && run.len() >= settings.given + settings.ngram {
            runs.push((run[0].name(), range));
        }
    }
    runs
}

/// The first rows with different prompts that have something to probe.
fn probed_rows<'a>(samples: &'a [Sample], settings: &ProbeSettings) -> Vec<&'a Sample> {
    let mut seen = HashSet::new();
    samples
        .iter()
        .filter(|sample| !probed_runs(sample, settings).is_empty() && seen.insert(prompt_ids(sample)))
        .take(settings.rows)
        .collect()
}

/// One cache for all probes of a model.
pub(crate) struct Probe {
    cache: suasion_engine::KvCache,
}

impl Probe {
    pub(crate) fn new<B: Backend>(
        model: &mut Model<B>,
        a: &[Sample],
        b: &[Sample],
        settings: &ProbeSettings,
    ) -> Result<Probe> {
        let longest =
            [a, b].iter().flat_map(|rows| probed_rows(rows, settings)).map(Sample::len).max().unwrap_or(1);
        let capacity = capacity(model, longest, 1);
        Ok(Probe { cache: model.cache(capacity)? })
    }

    pub(crate) fn run<B: Backend>(
        &mut self,
        model: &mut Model<B>,
        samples: &[Sample],
        settings: &ProbeSettings,
        stop: &AtomicBool,
    ) -> Result<Reproduction> {
        let mut sections: IndexMap<String, SectionReproduction> = IndexMap::new();
        for sample in probed_rows(samples, settings) {
            for (name, run) in probed_runs(sample, settings) {
                if stop.load(Ordering::Relaxed) {
                    return Err(Error::Interrupted);
                }
                let given = &sample.input_ids[..run.start + settings.given];
                let left = &sample.input_ids[given.len()..run.end];
                let truth = &left[..left.len().min(settings.new)];
                let sampling = Sampling { max_new_tokens: truth.len(), ..Sampling::default() };
                let mut go_on = |_| ControlFlow::Continue(());
                let made = generate_with(model, &mut self.cache, given, &sampling, &mut go_on)?.ids;
                let sum = sections.entry(name.to_string()).or_default();
                sum.probes += 1;
                sum.tokens += made.len() as u64;
                sum.exact_tokens += truth.iter().zip(&made).take_while(|(a, b)| a == b).count() as u64;
                let (reproduced, all) = ngrams_reproduced(truth, &made, settings.ngram);
                sum.ngrams += all;
                sum.ngrams_reproduced += reproduced;
            }
        }
        let total = |pick: fn(&SectionReproduction) -> u64| sections.values().map(pick).sum::<u64>();
        let (probes, ngrams) = (total(|s| s.probes), total(|s| s.ngrams));
        Ok(Reproduction {
            probes,
            tokens: total(|s| s.tokens),
            ngram_share: (ngrams > 0).then(|| total(|s| s.ngrams_reproduced) as f64 / ngrams as f64),
            exact_tokens: (probes > 0).then(|| total(|s| s.exact_tokens) as f64 / probes as f64),
            sections,
        })
    }
}

/// How many of `truth`'s n-grams `made` contains, each counted at most as often as it occurs in `made`; and how many
/// there are.
pub fn ngrams_reproduced(truth: &[u32], made: &[u32], n: usize) -> (u64, u64) {
    let mut available: HashMap<&[u32], u64> = HashMap::new();
    made.windows(n).for_each(|gram| *available.entry(gram).or_default() += 1);
    let mut reproduced = 0;
    for gram in truth.windows(n) {
        if let Some(left) = available.get_mut(gram).filter(|left| **left > 0) {
            *left -= 1;
            reproduced += 1;
        }
    }
    (reproduced, truth.windows(n).count() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ngrams_are_clipped() {
        // truth has 5 bigrams: 12 23 31 12 23; made has 12 twice, 23 once, 21 once.
        assert_eq!(ngrams_reproduced(&[1, 2, 3, 1, 2, 3], &[1, 2, 1, 2, 3], 2), (3, 5));
        assert_eq!(ngrams_reproduced(&[1, 2, 3], &[4, 5, 6], 2), (0, 2));
        assert_eq!(ngrams_reproduced(&[1], &[1], 2), (0, 0));
    }
}

//! Probes for memorised prompts: how much of a prompt section a model reproduces from the section's first
//! tokens.
//!
//! A probe is a run of tokens of one prompt section. The model reads everything up to and including the
//! section's first `given` tokens, and continues greedily for as many tokens as the section has left, at most
//! `new`.

use crate::generate::{capacity, generate_with};
use crate::{Error, Result, Sampling, prompt_ids};
use indexmap::IndexMap;
use serde::Serialize;
use std::collections::{HashMap, HashSet};
use std::ops::{ControlFlow, Range};
use std::sync::atomic::{AtomicBool, Ordering};
use suasion_data::{Origin, Sample};
use suasion_engine::{Backend, Model};

/// The settings of the probes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProbeSettings {
    /// Prompts to probe (8): the first rows with distinct prompts.
    pub rows: usize,
    /// Tokens of a section that the model reads (8).
    pub given: usize,
    /// The maximum number of tokens to generate (32).
    pub new: usize,
    /// Tokens per n-gram (4).
    pub ngram: usize,
}

impl Default for ProbeSettings {
    fn default() -> Self {
        ProbeSettings { rows: 8, given: 8, new: 32, ngram: 4 }
    }
}

impl ProbeSettings {
    /// Refuses settings under which no n-gram could be reproduced.
    pub fn validate(&self) -> Result<()> {
        if self.given == 0 || self.ngram == 0 || self.new < self.ngram {
            let problem =
                format!("tokens cannot hold an n-gram of {} after {} given tokens", self.ngram, self.given);
            return Err(Error::setting(
                "probe.new",
                self.new,
                problem,
                "give at least 1 token, and continue at least ngram",
            ));
        }
        Ok(())
    }
}

/// How much of the probed sections a model reproduces.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Reproduction {
    /// Number of probes.
    pub probes: u64,
    /// Tokens generated.
    pub tokens: u64,
    /// Share of the sections' n-grams that the continuations contain, clipped as in ROUGE-n recall; `None`
    /// without one.
    pub ngram_share: Option<f64>,
    /// Mean number of tokens before the first difference; `None` without a probe.
    pub exact_tokens: Option<f64>,
    /// The counts per section.
    pub sections: IndexMap<String, SectionReproduction>,
}

/// The counts of one section in a [`Reproduction`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct SectionReproduction {
    /// Number of probes.
    pub probes: u64,
    /// n-grams of the rest of the sections.
    pub ngrams: u64,
    /// n-grams of these that the continuations contain.
    pub ngrams_reproduced: u64,
    /// Tokens generated.
    pub tokens: u64,
    /// Sum of the tokens before the first difference.
    pub exact_tokens: u64,
}

/// The runs of tokens of one prompt section that are long enough to probe, with the section's name.
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

/// The first rows with distinct prompts that have a section to probe.
fn probed_rows<'a>(samples: &'a [Sample], settings: &ProbeSettings) -> Vec<&'a Sample> {
    let mut seen = HashSet::new();
    samples
        .iter()
        .filter(|sample| !probed_runs(sample, settings).is_empty() && seen.insert(prompt_ids(sample)))
        .take(settings.rows)
        .collect()
}

/// The probes of a model, which share one cache.
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
                let generated = generate_with(model, &mut self.cache, given, &sampling, &mut go_on)?.ids;
                let sum = sections.entry(name.to_string()).or_default();
                sum.probes += 1;
                sum.tokens += generated.len() as u64;
                sum.exact_tokens += truth.iter().zip(&generated).take_while(|(a, b)| a == b).count() as u64;
                let (reproduced, all) = ngrams_reproduced(truth, &generated, settings.ngram);
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

/// How many n-grams of `truth` occur in `generated`, each counted at most as often as it occurs there, and
/// how many n-grams `truth` has.
pub fn ngrams_reproduced(truth: &[u32], generated: &[u32], n: usize) -> (u64, u64) {
    let mut available: HashMap<&[u32], u64> = HashMap::new();
    generated.windows(n).for_each(|gram| *available.entry(gram).or_default() += 1);
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
        // 5 bigrams: 12 23 31 12 23; generated are 12 twice, 23 once and 21 once.
        assert_eq!(ngrams_reproduced(&[1, 2, 3, 1, 2, 3], &[1, 2, 1, 2, 3], 2), (3, 5));
        assert_eq!(ngrams_reproduced(&[1, 2, 3], &[4, 5, 6], 2), (0, 2));
        assert_eq!(ngrams_reproduced(&[1], &[1], 2), (0, 0));
    }
}

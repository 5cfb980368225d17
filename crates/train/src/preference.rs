//! Does a model prefer the reply that won? Its log-likelihood of both replies to the same prompt, pair by pair.

use crate::evaluate::RowLoss;
use crate::statistics::{ConfidenceInterval, bootstrap, wilson};
use indexmap::IndexMap;
use serde::Serialize;
use suasion_data::report::format::{count, percent};

/// One pair, measured.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Pair {
    /// The row, counted from 0.
    pub row: u64,
    /// The prompt, numbered in the order of the rows: pairs to the same prompt are one cluster.
    pub prompt: usize,
    /// The winning reply.
    pub won: Side,
    /// The losing one.
    pub lost: Side,
}

/// A reply, measured.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Side {
    /// Tokens, the stop token among them.
    pub tokens: u64,
    /// Sum of their log-likelihoods in nats.
    pub log_likelihood: f64,
}

impl Side {
    /// Of the loss of a row.
    pub fn of(loss: &RowLoss) -> Side {
        Side { tokens: loss.targets, log_likelihood: -loss.nll }
    }

    fn mean(&self) -> f64 {
        self.log_likelihood / self.tokens as f64
    }
}

/// How often a score prefers the winner.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Preference {
    /// Pairs where it does; a tie is half a pair.
    pub preferred: f64,
    /// The share of the pairs.
    pub share: f64,
    /// Wilson's interval, as if all pairs were independent.
    pub wilson: Option<ConfidenceInterval>,
    /// The bootstrap's interval over prompts; `None` below two prompts.
    pub bootstrap: Option<ConfidenceInterval>,
}

/// How much the length of the replies explains.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LengthBias {
    /// Mean tokens of the replies that won.
    pub won_tokens: f64,
    /// Mean tokens of those that lost.
    pub lost_tokens: f64,
    /// Share of the pairs in which the winner is the longer one; what preferring the longer reply would score.
    pub winner_longer: f64,
    /// Share of the pairs in which the total prefers the shorter reply.
    pub total_prefers_shorter: f64,
    /// Share of the pairs in which the mean prefers the shorter reply.
    pub mean_prefers_shorter: f64,
}

/// The result of `eval --pairs`; it serialises to the object that `--json` prints.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Preferences {
    /// Pairs measured.
    pub pairs: u64,
    /// Distinct prompts.
    pub prompts: u64,
    /// By the total log-likelihood of the reply, which favours short ones.
    pub total: Preference,
    /// By its mean per token.
    pub mean: Preference,
    /// How much the length explains.
    pub length: LengthBias,
    /// The result in sentences.
    pub verdict: Vec<String>,
    /// Every pair.
    #[serde(skip)]
    pub all: Vec<Pair>,
}

/// Judges pairs. `seed` is that of the bootstrap. `None` without a pair.
pub fn preferences(all: Vec<Pair>, seed: u64) -> Option<Preferences> {
    let pairs = all.len();
    if pairs == 0 {
        return None;
    }
    let share = |of: &dyn Fn(&Pair) -> f64| all.iter().map(of).sum::<f64>() / pairs as f64;
    let total = |pair: &Pair| half(pair.won.log_likelihood, pair.lost.log_likelihood);
    let mean = |pair: &Pair| half(pair.won.mean(), pair.lost.mean());
    // A score of the shorter reply, where they are not equally long: such pairs count half.
    let shorter = |pair: &Pair, won: f64| {
        let winner_shorter = half(pair.lost.tokens as f64, pair.won.tokens as f64);
        winner_shorter * won + (1.0 - winner_shorter) * (1.0 - won)
    };
    let length = LengthBias {
        won_tokens: share(&|pair| pair.won.tokens as f64),
        lost_tokens: share(&|pair| pair.lost.tokens as f64),
        winner_longer: share(&|pair| half(pair.won.tokens as f64, pair.lost.tokens as f64)),
        total_prefers_shorter: share(&|pair| shorter(pair, total(pair))),
        mean_prefers_shorter: share(&|pair| shorter(pair, mean(pair))),
    };
    let prompts: usize = all.iter().map(|pair| pair.prompt).collect::<std::collections::HashSet<_>>().len();
    let (total, mean) = (preference(&all, total, seed), preference(&all, mean, seed));
    let mut result = Preferences {
        pairs: pairs as u64,
        prompts: prompts as u64,
        total,
        mean,
        length,
        verdict: Vec::new(),
        all,
    };
    result.verdict = verdict(&result);
    Some(result)
}

/// 1 where `a` is the larger, 0 where `b` is, a half for equals.
fn half(a: f64, b: f64) -> f64 {
    match a.partial_cmp(&b) {
        Some(std::cmp::Ordering::Greater) => 1.0,
        Some(std::cmp::Ordering::Less) => 0.0,
        _ => 0.5,
    }
}

fn preference(pairs: &[Pair], prefers: impl Fn(&Pair) -> f64, seed: u64) -> Preference {
    let mut clusters: IndexMap<usize, (f64, f64)> = IndexMap::new();
    for pair in pairs {
        let cluster = clusters.entry(pair.prompt).or_default();
        cluster.0 += prefers(pair);
        cluster.1 += 1.0;
    }
    let preferred: f64 = clusters.values().map(|(won, _)| won).sum();
    let resampled = |draws: &[u32]| {
        let sum = |pick: fn(&(f64, f64)) -> f64| {
            clusters.values().zip(draws).map(|(c, n)| pick(c) * f64::from(*n)).sum::<f64>()
        };
        Some(sum(|c| c.0) / sum(|c| c.1))
    };
    Preference {
        preferred,
        share: preferred / pairs.len() as f64,
        wilson: wilson(preferred, pairs.len() as f64),
        bootstrap: bootstrap(clusters.len(), seed, resampled),
    }
}

fn verdict(p: &Preferences) -> Vec<String> {
    let mut lines = Vec::new();
    for (name, preference) in
        [("the total log-likelihood", &p.total), ("the mean log-likelihood per token", &p.mean)]
    {
        // Both intervals have to exclude chance: Wilson's takes pairs to the same prompt for independent ones.
        let intervals = [preference.wilson, preference.bootstrap];
        let certain = |above: bool| {
            intervals.iter().all(|i| i.is_some_and(|i| if above { i.low > 0.5 } else { i.high < 0.5 }))
        };
        let conclusion = match (certain(true), certain(false)) {
            (true, _) => "the model prefers the replies that won",
            (_, true) => "the model prefers the replies that lost",
            _ => "no preference found",
        };
        let interval = intervals.iter().flatten().fold(None::<ConfidenceInterval>, |wide, i| {
            Some(wide.map_or(*i, |w| ConfidenceInterval { low: w.low.min(i.low), high: w.high.max(i.high) }))
        });
        let interval = interval.map(|i| format!(", 95 % interval {} to {}", percent(i.low), percent(i.high)));
        lines.push(format!(
            "By {name} the winner is preferred in {} of {} to {}{}: {conclusion}.",
            percent(preference.share),
            count(p.pairs, "pair"),
            count(p.prompts, "prompt"),
            interval.unwrap_or_default()
        ));
    }
    let l = &p.length;
    lines.push(format!(
        "Length: replies that won have {:.0} tokens on average, those that lost {:.0}, and the winner is the longer one in \
         {} of the pairs. The total prefers the shorter reply in {} of the pairs, the mean in {}.",
        l.won_tokens,
        l.lost_tokens,
        percent(l.winner_longer),
        percent(l.total_prefers_shorter),
        percent(l.mean_prefers_shorter)
    ));
    if l.total_prefers_shorter > 0.75 || l.total_prefers_shorter < 0.25 {
        lines.push(
            "The total follows the length more than the content here: read the mean, and mind that it has the opposite \
             bias where long replies repeat themselves."
                .into(),
        );
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(row: u64, prompt: usize, won: (u64, f64), lost: (u64, f64)) -> Pair {
        let side = |(tokens, log_likelihood)| Side { tokens, log_likelihood };
        Pair { row, prompt, won: side(won), lost: side(lost) }
    }

    #[test]
    fn totals_means_and_lengths_are_counted() {
        let all = vec![
            pair(0, 0, (10, -20.0), (5, -15.0)), // total: lost; mean −2 > −3: won
            pair(1, 0, (4, -8.0), (4, -8.0)),    // ties
            pair(2, 1, (2, -1.0), (8, -9.0)),    // total: won; mean −0.5 > −1.1: won
        ];
        let found = preferences(all, 3).unwrap();
        assert_eq!((found.pairs, found.prompts), (3, 2));
        assert_eq!((found.total.preferred, found.mean.preferred), (1.5, 2.5));
        assert_eq!(found.mean.wilson, wilson(2.5, 3.0));
        // Pair 1 counts half everywhere; the total prefers the shorter reply in the others, the mean in one.
        assert_eq!(found.length.winner_longer, 0.5);
        assert!((found.length.total_prefers_shorter - 2.5 / 3.0).abs() < 1e-12);
        assert!((found.length.mean_prefers_shorter - 1.5 / 3.0).abs() < 1e-12);
        assert!(found.verdict[0].contains("no preference found"), "{:?}", found.verdict);
        assert_eq!(preferences(Vec::new(), 3), None);
    }

    #[test]
    fn a_preference_needs_more_than_one_prompt() {
        let many = |prompts: usize| {
            let all = (0..40).map(|i| pair(i, i as usize % prompts, (4, -4.0), (4, -5.0))).collect();
            preferences(all, 3).unwrap().verdict[0].contains("prefers the replies that won")
        };
        assert!(many(40) && !many(1));
    }
}

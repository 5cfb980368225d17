//! A comparison of the two objectives over several seeds: what differs between runs by chance alone is part of its
//! interval.

use crate::Comparison;
use crate::compare::ratio;
use crate::rng::{Purpose, Rng};
use crate::statistics::{ConfidenceInterval, percentiles, quantile};
use serde::Serialize;
use suasion_data::report::format::{count, loss, loss_difference, percent};

/// Comparisons from several seeds over the same rows.
#[derive(Clone, Debug, Serialize)]
pub struct Repeats {
    /// The seeds, each of a comparison in `runs`.
    pub seeds: Vec<u64>,
    /// The difference on held-out responses over all of them.
    pub response_difference: Overall,
    /// The results in sentences.
    pub verdict: Vec<String>,
    /// The comparison of each seed.
    pub runs: Vec<Comparison>,
}

/// A difference over seeds and prompts.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Overall {
    /// `all_tokens − response_only` in nats per target; above 0, response-only is better.
    pub mean: f64,
    /// The same for each seed.
    pub by_seed: Vec<f64>,
    /// Its standard error over prompts, of the mean over seeds.
    pub error_over_prompts: f64,
    /// Its standard error over seeds.
    pub error_over_seeds: f64,
    /// Degrees of freedom of both together (Satterthwaite 1946).
    pub degrees_of_freedom: f64,
    /// Its 95 % interval by Student's t, with both errors.
    pub interval: ConfidenceInterval,
    /// Its 95 % interval by the bootstrap over seeds and prompts, drawn independently.
    pub bootstrap: ConfidenceInterval,
    /// Distinct held-out prompts.
    pub prompts: u64,
}

/// Samples of the bootstrap.
const SAMPLES: usize = 4000;

/// Puts comparisons of the same rows together; `None` for fewer than two, or fewer than two prompts.
pub fn repeats(runs: Vec<Comparison>) -> Option<Repeats> {
    let tables: Vec<&[(f64, f64)]> = runs.iter().map(|run| run.by_prompt.as_slice()).collect();
    let overall = overall(&tables, runs.first()?.seed)?;
    let seeds = runs.iter().map(|run| run.seed).collect();
    let mut repeats = Repeats { seeds, response_difference: overall, verdict: Vec::new(), runs };
    repeats.verdict = verdict(&repeats);
    Some(repeats)
}

/// The difference over tables of `(difference, targets)`, one a seed with an entry a prompt.
fn overall(tables: &[&[(f64, f64)]], seed: u64) -> Option<Overall> {
    let (seeds, prompts) = (tables.len(), tables.first()?.len());
    if seeds < 2 || prompts < 2 || tables.iter().any(|table| table.len() != prompts) {
        return None;
    }
    let by_seed: Vec<f64> = tables.iter().map(|table| ratio(table).0).collect();
    let averaged = |p: usize| {
        let mean = tables.iter().map(|table| table[p].0).sum::<f64>() / seeds as f64;
        (mean, tables[0][p].1)
    };
    let (mean, error) = ratio(&(0..prompts).map(averaged).collect::<Vec<_>>());
    let error_over_prompts = error?;
    let squares: f64 = by_seed.iter().map(|d| (d - mean).powi(2)).sum();
    let error_over_seeds = (squares / (seeds as f64 - 1.0) / seeds as f64).sqrt();
    let (a, b) = (error_over_prompts.powi(2), error_over_seeds.powi(2));
    let freedom = match a + b > 0.0 {
        true => (a + b).powi(2) / (a * a / (prompts as f64 - 1.0) + b * b / (seeds as f64 - 1.0)),
        false => (seeds.min(prompts) - 1) as f64,
    };
    let half = (a + b).sqrt() * quantile(freedom);
    let mut rng = Rng::new(seed, Purpose::Bootstrap, 1);
    let mut values: Vec<f64> = (0..SAMPLES)
        .map(|_| {
            let drawn: Vec<usize> = (0..seeds).map(|_| rng.below(seeds as u64) as usize).collect();
            let (mut difference, mut targets) = (0.0, 0.0);
            for _ in 0..prompts {
                let prompt = rng.below(prompts as u64) as usize;
                difference += drawn.iter().map(|s| tables[*s][prompt].0).sum::<f64>();
                targets += seeds as f64 * tables[0][prompt].1;
            }
            difference / targets
        })
        .collect();
    Some(Overall {
        mean,
        by_seed,
        error_over_prompts,
        error_over_seeds,
        degrees_of_freedom: freedom,
        interval: ConfidenceInterval { low: mean - half, high: mean + half },
        bootstrap: percentiles(&mut values)?,
        prompts: prompts as u64,
    })
}

fn verdict(r: &Repeats) -> Vec<String> {
    let d = &r.response_difference;
    let mean = |of: &dyn Fn(&Comparison) -> f64| r.runs.iter().map(of).sum::<f64>() / r.runs.len() as f64;
    let mut lines = vec![format!(
        "Held-out responses, {} over {}: loss {} before training, {} after training on responses only, {} after training \
         on all tokens.",
        count(r.runs.len() as u64, "seed"),
        count(d.prompts, "prompt"),
        loss(mean(&|c| c.before.evaluation.loss)),
        loss(mean(&|c| c.response_only.evaluation.loss)),
        loss(mean(&|c| c.all_tokens.evaluation.loss))
    )];
    let better = if d.mean > 0.0 { "responses only" } else { "all tokens" };
    let ahead = d.by_seed.iter().filter(|s| (**s > 0.0) == (d.mean > 0.0)).count();
    // The wider of both ends: neither interval is exact for a few seeds.
    let (low, high) = (d.interval.low.min(d.bootstrap.low), d.interval.high.max(d.bootstrap.high));
    let interval = format!(
        "95 % interval over seeds and prompts from {} to {}",
        loss_difference(low),
        loss_difference(high)
    );
    lines.push(match d.interval.excludes(0.0) && d.bootstrap.excludes(0.0) {
        true => format!(
            "Training on {better} predicts them better, by {} nats per token ({interval}), with {ahead} of {} seeds.",
            loss(d.mean.abs()),
            d.by_seed.len()
        ),
        false => format!(
            "No difference found: {} nats per token ({interval}) is what chance can give; training on {better} is ahead with \
             {ahead} of {} seeds.",
            loss_difference(d.mean),
            d.by_seed.len()
        ),
    });
    let share = |of: fn(&Comparison) -> Option<f64>| {
        let shares: Vec<f64> = r.runs.iter().filter_map(of).collect();
        (!shares.is_empty()).then(|| shares.iter().sum::<f64>() / shares.len() as f64)
    };
    if let (Some(ours), Some(theirs)) = (
        share(|c| c.response_only.reproduction_train.ngram_share),
        share(|c| c.all_tokens.reproduction_train.ngram_share),
    ) {
        lines.push(format!(
            "The models trained on all tokens reproduce {} of the n-grams of training prompts, those trained on responses \
             only {}.",
            percent(theirs),
            percent(ours)
        ));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Differences of prompts and seeds around a mean, one target a prompt.
    fn table(mean: f64, of_seed: f64) -> Vec<(f64, f64)> {
        (0..40).map(|p| (mean + of_seed + 0.1 * f64::from(p % 5) - 0.2, 1.0)).collect()
    }

    #[test]
    fn seeds_that_disagree_widen_the_interval() {
        let of = |mean: f64, seeds: &[f64]| {
            let tables: Vec<Vec<(f64, f64)>> = seeds.iter().map(|s| table(mean, *s)).collect();
            overall(&tables.iter().map(Vec::as_slice).collect::<Vec<_>>(), 1).unwrap()
        };
        let agree = of(0.3, &[0.0, 0.01, -0.01]);
        let disagree = of(0.3, &[0.0, 0.5, -0.5]);
        assert!((agree.mean - 0.3).abs() < 1e-12 && (disagree.mean - 0.3).abs() < 1e-12);
        assert!(agree.interval.excludes(0.0) && agree.bootstrap.excludes(0.0), "{agree:?}");
        assert!(!disagree.interval.excludes(0.0), "{disagree:?}");
        // The error over prompts: the standard deviation of 0.1·(p % 5), over the root of 40.
        let error = (0.02f64 * 40.0 / 39.0 / 40.0).sqrt();
        assert!((agree.error_over_prompts - error).abs() < 1e-12, "{agree:?}");
        // Seeds of standard deviation 0.5.
        assert!((disagree.error_over_seeds - 0.5 / 3f64.sqrt()).abs() < 1e-12);
        assert!(disagree.degrees_of_freedom < 2.1 && agree.degrees_of_freedom > 30.0);
        assert_eq!(overall(&[&table(0.1, 0.0)], 1), None);
    }
}

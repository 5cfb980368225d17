//! Intervals: of a share (Wilson), of a mean over clusters (Student's t, and the bootstrap).

use crate::rng::{Purpose, Rng};
use serde::Serialize;

/// A two-sided 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ConfidenceInterval {
    /// Its lower end.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
}

impl ConfidenceInterval {
    /// True if a value lies outside.
    pub fn excludes(&self, value: f64) -> bool {
        value < self.low || value > self.high
    }
}

/// The 97.5 % quantile of the normal distribution.
const NORMAL: f64 = 1.959963984540054;

/// The interval of Wilson (1927) for `successes` of `trials`, which may be half ones; `None` without a trial.
pub fn wilson(successes: f64, trials: f64) -> Option<ConfidenceInterval> {
    if trials <= 0.0 {
        return None;
    }
    let (share, z) = (successes / trials, NORMAL);
    let centre = share + z * z / (2.0 * trials);
    let half = z * (share * (1.0 - share) / trials + z * z / (4.0 * trials * trials)).sqrt();
    let scale = 1.0 + z * z / trials;
    Some(ConfidenceInterval {
        low: ((centre - half) / scale).max(0.0),
        high: ((centre + half) / scale).min(1.0),
    })
}

/// The 97.5 % quantile of Student's t with at least these degrees of freedom (from the tables), which bounds a
/// two-sided 95 % interval.
pub fn quantile(freedom: f64) -> f64 {
    const TABLE: [(f64, f64); 16] = [
        (1.0, 12.706),
        (2.0, 4.303),
        (3.0, 3.182),
        (4.0, 2.776),
        (5.0, 2.571),
        (6.0, 2.447),
        (7.0, 2.365),
        (8.0, 2.306),
        (9.0, 2.262),
        (10.0, 2.228),
        (12.0, 2.179),
        (15.0, 2.131),
        (20.0, 2.086),
        (30.0, 2.042),
        (60.0, 2.000),
        (120.0, 1.980),
    ];
    let row = TABLE.iter().rev().find(|(of, _)| *of <= freedom);
    row.map_or(f64::INFINITY, |(_, quantile)| *quantile)
}

/// Bootstrap samples of an interval.
const SAMPLES: usize = 4000;

/// The percentile interval of a statistic over clusters that are drawn with replacement (Efron 1979): `statistic` gets
/// how often each cluster was drawn, and returns `None` if it has no value. `None` below two clusters.
///
/// The draws depend on `seed` alone.
pub fn bootstrap(
    clusters: usize,
    seed: u64,
    mut statistic: impl FnMut(&[u32]) -> Option<f64>,
) -> Option<ConfidenceInterval> {
    if clusters < 2 {
        return None;
    }
    let mut rng = Rng::new(seed, Purpose::Bootstrap, 0);
    let mut draws = vec![0u32; clusters];
    let mut values: Vec<f64> = (0..SAMPLES)
        .filter_map(|_| {
            draws.fill(0);
            (0..clusters).for_each(|_| draws[rng.below(clusters as u64) as usize] += 1);
            statistic(&draws)
        })
        .collect();
    percentiles(&mut values)
}

/// The interval between the 2.5 % and the 97.5 % percentile of values.
pub(crate) fn percentiles(values: &mut [f64]) -> Option<ConfidenceInterval> {
    values.sort_by(f64::total_cmp);
    let at = |share: f64| values.get(((values.len() as f64 - 1.0) * share).round() as usize).copied();
    Some(ConfidenceInterval { low: at(0.025)?, high: at(0.975)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wilsons_interval_is_that_of_its_formula() {
        // Computed from the formula in Python.
        for (successes, trials, low, high) in [
            (8.0, 10.0, 0.4901624715, 0.9433178485),
            (0.0, 10.0, 0.0, 0.2775327999),
            (50.0, 100.0, 0.4038315303, 0.5961684697),
        ] {
            let found = wilson(successes, trials).unwrap();
            assert!((found.low - low).abs() < 1e-9 && (found.high - high).abs() < 1e-9, "{found:?}");
        }
        assert_eq!(wilson(0.0, 0.0), None);
    }

    /// For the mean of many draws the bootstrap's interval is the normal one.
    #[test]
    fn the_bootstrap_of_a_mean_is_near_its_normal_interval() {
        let values: Vec<f64> = (0..400).map(|i| f64::from((i * 7919) % 1000) / 1000.0).collect();
        let mean = values.iter().sum::<f64>() / 400.0;
        let error = (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 400.0 / 400.0).sqrt();
        let of = |draws: &[u32]| {
            Some(values.iter().zip(draws).map(|(v, n)| v * f64::from(*n)).sum::<f64>() / 400.0)
        };
        let found = bootstrap(400, 1, of).unwrap();
        assert!((found.low - (mean - NORMAL * error)).abs() < 0.1 * error, "{found:?}");
        assert!((found.high - (mean + NORMAL * error)).abs() < 0.1 * error, "{found:?}");
        assert_eq!(bootstrap(400, 1, of), bootstrap(400, 1, of));
        assert_eq!(bootstrap(1, 1, |_| Some(0.0)), None);
    }
}

//! The distribution of a model's loss over sections.

use crate::pipeline::SECTION_ORDER;
use crate::{IGNORE, Origin, Sample};
use std::collections::BTreeMap;

/// The loss of a model on some rows: the part of each section, if all tokens are supervised and as labelled.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Losses {
    /// Number of rows measured.
    pub rows: u64,
    /// The mean loss of each row over its targets, in nats; rows without a target are left out.
    pub per_row: Vec<f64>,
    sections: BTreeMap<&'static str, Sum>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Sum {
    tokens: u64,
    nll: f64,
    weighted: f64,
}

/// A section's part of the loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SectionLoss {
    /// The section.
    pub name: &'static str,
    /// Number of tokens measured.
    pub tokens: u64,
    /// Their mean loss in nats.
    pub mean: f64,
    /// The section's share of the loss over all tokens.
    pub before: f64,
    /// Its share of the loss as labelled.
    pub after: f64,
}

impl Losses {
    /// Adds a row with the loss of each of its tokens, `None` for a token without a predecessor; returns the mean
    /// over its targets.
    pub fn add(&mut self, sample: &Sample, tokens: &[Option<f32>]) -> Option<f64> {
        self.rows += 1;
        let (mut nll, mut targets) = (0.0, 0.0);
        for segment in sample.segments() {
            let copies = u64::from(segment.copies());
            for i in segment.own.start as usize..segment.own.end as usize {
                let Some(loss) = tokens.get(i).copied().flatten().map(f64::from) else { continue };
                if sample.origins[i] == Origin::Padding {
                    continue;
                }
                let sum = self.sections.entry(sample.origins[i].name()).or_default();
                sum.tokens += copies;
                sum.nll += copies as f64 * loss;
                if sample.labels[i] != IGNORE {
                    let weight = sample.weights.as_ref().map_or(1.0, |weights| f64::from(weights[i]));
                    sum.weighted += weight * loss;
                    if weight != 0.0 {
                        nll += loss;
                        targets += 1.0;
                    }
                }
            }
        }
        let mean = (targets > 0.0).then(|| nll / targets);
        self.per_row.extend(mean);
        mean
    }

    /// The sections that were measured, in report order.
    pub fn sections(&self) -> Vec<SectionLoss> {
        let total = |pick: fn(&Sum) -> f64| self.sections.values().map(pick).sum::<f64>();
        let (all, labelled) = (total(|sum| sum.nll), total(|sum| sum.weighted));
        let part = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
        let section = |name: &&'static str| {
            let sum = self.sections.get(*name)?;
            Some(SectionLoss {
                name,
                tokens: sum.tokens,
                mean: part(sum.nll, sum.tokens as f64),
                before: part(sum.nll, all),
                after: part(sum.weighted, labelled),
            })
        };
        SECTION_ORDER.iter().filter_map(section).collect()
    }
}

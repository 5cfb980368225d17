//! Tokens to labels.

pub mod truncate;

use crate::example::{Tokenised, pick};
use crate::policy::{Objective, Policy};
use crate::sample::column;
use crate::tokens::{Special, Tokens};
use crate::{IGNORE, Origin, RowId, Sample, Section};

/// The sample of a tokenised text. Labels follow from the weight of each token; a weight of 0 masks.
///
/// [`Objective::AllTokens`] gives every token except padding the weight 1; origins are unchanged.
pub fn label(id: RowId, tokens: Tokens, policy: &Policy) -> Sample {
    let Tokens { ids, origins, weights, .. } = tokens;
    finish(id, ids, origins, weights, policy)
}

fn finish(
    id: RowId,
    input_ids: Vec<u32>,
    origins: Vec<Origin>,
    mut weights: Vec<f32>,
    policy: &Policy,
) -> Sample {
    if policy.objective == Objective::AllTokens {
        for (weight, origin) in weights.iter_mut().zip(&origins) {
            *weight = if *origin == Origin::Padding { 0.0 } else { 1.0 };
        }
    }
    let labels =
        input_ids.iter().zip(&weights).map(|(&id, &w)| if w == 0.0 { IGNORE } else { id as i32 }).collect();
    Sample { id, input_ids, labels, origins, weights: column(weights), pack: None }
}

/// The fields of a row that came as tokens, apart from those in its sample.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Given {
    /// Its labels, if [`Objective::AllTokens`] overrides them.
    pub overridden: Option<Vec<i32>>,
    /// `completion_mask` or `assistant_masks`: true on the response, which both mark.
    pub mask: Option<Vec<bool>>,
    /// True if it has an `attention_mask`.
    pub attention: bool,
    /// True if it has loss weights.
    pub weights: bool,
    /// True if it gives its origins.
    pub origins: bool,
    /// Their runs, for a single row.
    pub(crate) runs: Vec<(Origin, usize)>,
    /// The index at which padding begins that its `attention_mask` does not mask.
    pub counted_padding: Option<usize>,
}

impl Given {
    /// The fields of the row that consists of these tokens of a pack.
    pub(crate) fn part(&self, tokens: &[usize]) -> Given {
        Given {
            overridden: self.overridden.as_ref().map(|labels| pick(labels, tokens)),
            mask: self.mask.as_ref().map(|mask| pick(mask, tokens)),
            counted_padding: None,
            runs: Vec::new(),
            ..*self
        }
    }
}

/// The sample of a row that came as tokens, and its other fields.
///
/// Labels are taken unchanged, even wrong ones: audits report them. Without labels the mask decides, and the
/// policy's section weights apply to masked tokens.
///
/// Origins are the row's own. Otherwise they follow from the mask, else from the labels: supervised tokens are
/// response, up to and including the first stop token; a BOS at the start and the tokens after the last response
/// are scaffold; the rest is prompt of the section Other. Tokens that `attention_mask` masks are padding.
///
/// In a pack each sequence is a separate row. Labels that follow from a mask are limited to their row ([`confine`]).
pub fn label_tokenised(id: RowId, mut row: Tokenised, special: &Special, policy: &Policy) -> (Sample, Given) {
    let mut given = Given {
        overridden: None,
        mask: None,
        attention: row.attention.is_some(),
        weights: row.weights.is_some(),
        origins: row.origins.is_some(),
        runs: row.origins.take().unwrap_or_default(),
        counted_padding: row.counted_padding,
    };
    let origins = match given.runs.as_slice() {
        [] => origins(&row, special),
        runs => {
            let mut origins = Vec::with_capacity(row.input_ids.len());
            runs.iter().for_each(|&(origin, length)| origins.resize(origins.len() + length, origin));
            origins
        }
    };
    let Tokenised { input_ids, labels, mask, assistant, weights, pack, .. } = row;
    let pack = pack.map(Box::new);
    let sample = match (labels, weights) {
        (labels, _) if policy.objective == Objective::AllTokens => {
            let weights = vec![0.0; input_ids.len()];
            let mut sample = finish(id, input_ids, origins, weights, policy);
            // As in TRL, `assistant_masks` applies whatever the objective, unless the row has labels.
            if let Some(mask) = assistant.filter(|_| labels.is_none()) {
                let mut weights: Vec<f32> =
                    sample.labels.iter().map(|l| f32::from(u8::from(*l != IGNORE))).collect();
                for (i, _) in mask.iter().enumerate().filter(|(_, bit)| !**bit) {
                    (sample.labels[i], weights[i]) = (IGNORE, 0.0);
                }
                sample.weights = column(weights);
            }
            given.overridden = labels;
            confine(Sample { pack, ..sample })
        }
        // Without weights each label weighs 1.
        (Some(labels), None) => Sample { id, input_ids, labels, origins, weights: None, pack },
        (Some(mut labels), Some(mut weights)) => {
            for (label, weight) in labels.iter_mut().zip(&mut weights) {
                if *label == IGNORE || *weight == 0.0 {
                    (*label, *weight) = (IGNORE, 0.0);
                }
            }
            Sample { id, input_ids, labels, origins, weights: column(weights), pack }
        }
        (None, weights) => {
            let weight = |(i, origin): (usize, &Origin)| {
                let given = weights.as_ref().map(|weights| weights[i]);
                match origin {
                    _ if mask.as_ref().is_some_and(|mask| mask[i]) => given.unwrap_or(1.0),
                    Origin::Prompt { section, .. } => given.unwrap_or(policy.section_weight(*section)),
                    _ => 0.0,
                }
            };
            let of_labels = origins.iter().enumerate().map(weight).collect();
            let sample = Sample { pack, ..finish(id, input_ids, origins, of_labels, policy) };
            if weights.is_none() { confine(sample) } else { sample }
        }
    };
    given.mask = mask;
    (sample, given)
}

/// Adapts labels that were decided token by token to the rows of a pack: the first token of a row has no label,
/// and the weight of a shared token is the sum of its weights in all of its rows. A single row is unchanged.
pub fn confine(mut sample: Sample) -> Sample {
    let Some(pack) = &sample.pack else { return sample };
    let mut weights = sample.weights.take().unwrap_or_else(|| {
        sample.labels.iter().map(|label| if *label == IGNORE { 0.0 } else { 1.0 }).collect()
    });
    for segment in &pack.segments {
        let own = segment.own.start as usize..segment.own.end as usize;
        if segment.prefix.is_empty() {
            sample.labels[own.start] = IGNORE;
            weights[own.start] = 0.0;
        }
        weights[own].iter_mut().for_each(|weight| *weight *= segment.copies() as f32);
    }
    sample.weights = column(weights);
    sample
}

/// The origins of a row that gives none; in a pack, of each sequence separately.
fn origins(row: &Tokenised, special: &Special) -> Vec<Origin> {
    match &row.pack {
        None => origins_of(row, special),
        Some(pack) => {
            let part = |tokens: Vec<usize>| origins_of(&row.part(&tokens), special);
            let segments = pack.segments.iter().map(|s| s.own.clone().map(|i| i as usize).collect());
            segments.flat_map(part).collect()
        }
    }
}

fn origins_of(row: &Tokenised, special: &Special) -> Vec<Origin> {
    let n = row.input_ids.len();
    let real = |i: usize| row.attention.as_ref().is_none_or(|a| a[i]);
    let response = |i: usize| match (&row.mask, &row.labels) {
        (Some(mask), _) => mask[i],
        (None, Some(labels)) => labels[i] != IGNORE,
        (None, None) => false,
    };
    let mut out = Vec::with_capacity(n);
    let mut turn = 0u16;
    let mut inside = false;
    let mut stopped = false;
    for i in 0..n {
        if !real(i) {
            out.push(Origin::Padding);
        } else if response(i) {
            if !inside {
                (inside, stopped) = (true, false);
            }
            if !stopped && special.stops.contains(&row.input_ids[i]) {
                stopped = true;
                out.push(Origin::EndOfTurn { turn });
            } else {
                out.push(Origin::Response { turn });
            }
            continue;
        } else {
            out.push(Origin::Prompt {
                turn: turn.saturating_add(u16::from(inside)),
                section: Section::Other,
            });
        }
        if inside {
            inside = false;
            turn = turn.saturating_add(1);
        }
    }
    let first = out.iter().position(|o| *o != Origin::Padding).unwrap_or(0);
    if special.bos.is_some() && row.input_ids.get(first).copied() == special.bos && !response(first) {
        out[first] = Origin::Scaffold;
    }
    if let Some(last) = out.iter().rposition(|o| o.supervised()) {
        for origin in &mut out[last + 1..] {
            if *origin != Origin::Padding {
                *origin = Origin::Scaffold;
            }
        }
    }
    out
}

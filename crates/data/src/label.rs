//! Tokens to a labelled sample.

pub mod truncate;

use crate::example::Tokenised;
use crate::policy::{Objective, Policy};
use crate::sample::column;
pub use crate::tokens::Special;
use crate::tokens::Tokens;
use crate::{IGNORE, Origin, RowId, Sample, Section};

/// Labels and weights from ids, origins and weights per token; a weight of 0 masks.
///
/// [`Objective::AllTokens`] gives every token that is not padding the weight 1; origins stay true.
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

/// A tokenised row to a sample.
///
/// Labels are taken as they are given, wrong ones too: the audits speak of them. Where there are none, the
/// mask decides, and the policy's section weights apply to what it masks.
/// Origins are the row's own. Where it has none they follow from the mask, else from the labels:
/// masked-in tokens are the response, up to and including its first stop token; a BOS in front and what
/// stands after the last response are scaffold; the rest is prompt of the section Other.
/// Padding is what `attention_mask` says.
///
/// In a pack each sequence is a row of its own: its first token gets no label of ours, and a token of a shared prompt
/// gets the weight that it has in all of its rows together.
pub fn label_tokenised(id: RowId, row: &Tokenised, special: &Special, policy: &Policy) -> Sample {
    let n = row.input_ids.len();
    let origins = row.origins.clone().unwrap_or_else(|| origins(row, special));
    let pack = row.pack.clone().map(Box::new);
    if policy.objective == Objective::AllTokens {
        let sample = finish(id, row.input_ids.clone(), origins, vec![0.0; n], policy);
        return confine(Sample { pack, ..sample });
    }
    let given = |i: usize| row.weights.as_ref().map(|w| w[i]);
    match (&row.labels, &row.mask) {
        (Some(labels), _) => {
            let weights: Vec<f32> = labels
                .iter()
                .enumerate()
                .map(|(i, &l)| if l == IGNORE { 0.0 } else { given(i).unwrap_or(1.0) })
                .collect();
            let labels =
                labels.iter().zip(&weights).map(|(&l, &w)| if w == 0.0 { IGNORE } else { l }).collect();
            Sample { id, input_ids: row.input_ids.clone(), labels, origins, weights: column(weights), pack }
        }
        (None, mask) => {
            let weights = (0..n)
                .map(|i| match origins[i] {
                    _ if mask.as_ref().is_some_and(|m| m[i]) => given(i).unwrap_or(1.0),
                    Origin::Prompt { section, .. } => given(i).unwrap_or(policy.section_weight(section)),
                    _ => 0.0,
                })
                .collect();
            let sample = finish(id, row.input_ids.clone(), origins, weights, policy);
            match row.weights {
                None => confine(Sample { pack, ..sample }),
                Some(_) => Sample { pack, ..sample },
            }
        }
    }
}

/// Labels of a pack that were decided token by token, made those of its rows: none across a boundary, and in a shared prompt
/// the weight that its tokens have in all rows together. A row by itself is left as it is.
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

/// Origins of a row that does not name them; in a pack, of each sequence by itself.
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

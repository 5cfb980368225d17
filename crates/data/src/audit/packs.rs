//! P001: targets across the boundaries of a pack, and samples that attend to each other.

use super::subject::{Found, Subject};
use crate::Level;
use crate::sample::Segment;

/// P001 for a pack as a whole: [`target_across_boundary`] and [`unconfined`].
pub(super) fn pack(s: &Subject<'_>) -> Vec<Found> {
    let mut found = target_across_boundary(s);
    found.extend(unconfined(s));
    found
}

/// P001, fourth kind: the positions restart, but the attention mask is 1 on all tokens and on the padding. Whether
/// samples attend to each other then depends on the trainer's attention kernel.
fn unconfined(s: &Subject<'_>) -> Option<Found> {
    let (start, sequences) = (s.given?.counted_padding?, s.sample.pack.as_ref()?.segments.len());
    let message = format!(
        "\"position_ids\" start again for {sequences} sequences, and \"attention_mask\" is 1 throughout, on the padding from \
         token {start} too: each sequence sees those before it, unless attention follows the positions"
    );
    let found = Found::within(start..s.n(), message);
    (sequences > 1).then_some(Found { level: Some(Level::Warning), ..found })
}

/// P001, second kind: a label on the first token of a sequence without a prefix. It is not a target here; a
/// trainer that shifts the whole pack would predict it from the previous sequence.
fn target_across_boundary(s: &Subject<'_>) -> Vec<Found> {
    let Some(pack) = &s.sample.pack else { return Vec::new() };
    let alone = |segment: &&Segment| segment.prefix.is_empty() && segment.own.start > 0;
    let first = pack.segments.iter().filter(alone).map(|segment| segment.own.start as usize);
    let wrong: Vec<usize> = first.filter(|&i| s.learned(i)).collect();
    Found::about(s, &wrong, |places| format!("{places} supervised across the boundary before a sequence"))
}

/// P001, third kind: a row in which a conversation restarts without a boundary there, or which begins inside a
/// message.
pub(super) fn sees_across(s: &Subject<'_>) -> Vec<Found> {
    let Some(part) = s.part() else { return Vec::new() };
    let restarts: Vec<usize> = part.restarts.iter().map(|restart| restart.at).collect();
    let sure = part.restarts.iter().any(|restart| restart.sure);
    let what = if s.sample.pack.is_some() || s.sequence > 0 { "sequence" } else { "row" };
    let mut found = Found::about(s, &restarts, |places| {
        format!(
            "{places} begin{} a conversation anew inside the {what}, and no boundary is named: each sees those before it",
            if restarts.len() == 1 { "s" } else { "" }
        )
    });
    found.iter_mut().for_each(|found| found.level = (!sure).then_some(Level::Warning));
    if part.inside {
        let message =
            format!("the {what} begins inside a message: it was cut where a pack was full, or at its start");
        found.push(Found { level: Some(Level::Warning), ..Found::within(0..1, message) });
    }
    found
}

//! P001: targets across the boundaries of a pack, and samples that see each other.

use super::subject::{Found, Subject};
use crate::Level;
use crate::sample::Segment;

/// P001, of a pack as a whole: [`target_across_boundary`] and [`unconfined`].
pub(super) fn pack(s: &Subject<'_>) -> Vec<Found> {
    let mut found = target_across_boundary(s);
    found.extend(unconfined(s));
    found
}

/// P001, fourth kind: the positions start again, and the attention mask does not: it is 1 on all tokens and on the padding.
/// Whether samples see each other is up to the kernel that a trainer takes.
fn unconfined(s: &Subject<'_>) -> Option<Found> {
    let (start, sequences) = (s.given?.counted_padding?, s.sample.pack.as_ref()?.segments.len());
    let message = format!(
        "\"position_ids\" start again for {sequences} sequences, and \"attention_mask\" is 1 throughout, on the padding from \
         token {start} too: each sequence sees those before it, unless attention follows the positions"
    );
    let found = Found::within(start..s.n(), message);
    (sequences > 1).then_some(Found { level: Some(Level::Warning), ..found })
}

/// P001, second kind: a label on the first token of a sequence that no prompt stands before. It is no target here; a
/// trainer that shifts the whole pack would learn it from the sequence before.
fn target_across_boundary(s: &Subject<'_>) -> Vec<Found> {
    let Some(pack) = &s.sample.pack else { return Vec::new() };
    let alone = |segment: &&Segment| segment.prefix.is_empty() && segment.own.start > 0;
    let first = pack.segments.iter().filter(alone).map(|segment| segment.own.start as usize);
    let wrong: Vec<usize> = first.filter(|&i| s.learned(i)).collect();
    Found::about(s, &wrong, |places| format!("{places} supervised across the boundary before a sequence"))
}

/// P001, third kind: a row that begins a conversation anew and names no boundary there; or begins inside a message.
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

//! M001 to M010: tokens that are supervised and should not be, or the reverse.

use super::labels::wrong_labels;
use super::subject::{Found, Subject};
use crate::label::Given;
use crate::sample::Run;
use crate::{IGNORE, Level, Origin, Section};
use std::ops::Range;

/// M001: no target remains after the shift by one.
pub(super) fn no_target(s: &Subject<'_>) -> Vec<Found> {
    if s.sample.has_target() {
        return Vec::new();
    }
    let message = if s.n() > 0 && s.learned(0) {
        "the only supervised token is the first of the row: nothing stands before it that could predict it"
            .into()
    } else {
        format!("none of the {} tokens is supervised", s.n())
    };
    vec![Found::within(0..s.n(), message)]
}

/// M002: no supervised stop token follows a response. A stop token that is present but masked is M009. It is a
/// warning under `append_eos = false`, and for prepared rows, whose preparation has reported the reason.
pub(super) fn no_stop(s: &Subject<'_>) -> Vec<Found> {
    // Without known stop tokens, rows that came as tokens cannot be judged.
    if s.all_tokens() || (s.given.is_some() && s.special.stops.is_empty()) {
        return Vec::new();
    }
    let missing = if s.given.is_none() || s.known() { unstopped_turns(s) } else { unstopped_runs(s) };
    if missing.is_empty() || (s.found() && is_mislabelled(s)) {
        return Vec::new();
    }
    // Text that is supervised as a whole has no answers.
    if (s.foreign.unlabelled || s.part().is_some_and(|part| !part.known)) && s.all_supervised() {
        return Vec::new();
    }
    // A template may write no stop token at all, or none after the last answer.
    let at_end = missing.iter().all(|&i| (i + 1..s.n()).all(|after| s.is_padding(after)));
    let (never, not_last) = (s.found() && !s.foreign.stops.any, s.found() && !s.foreign.stops.last && at_end);
    if never {
        return Vec::new();
    }
    let cut = s.given.is_some() && at_end;
    let why = if !s.policy.append_eos {
        " (append_eos is false)"
    } else if s.given.is_none() && s.special.eos.is_none() {
        " (the tokenizer has no EOS to append)"
    } else if not_last {
        " (the template writes none after the last answer: append one)"
    } else if cut {
        " (the row ends there: was it cut?)"
    } else {
        ""
    };
    let warning = !s.policy.append_eos || s.origins_are_given() || not_last;
    let warning = warning.then_some(Level::Warning);
    let mut found = Found::about(s, &missing, |places| {
        format!("no supervised stop token after {places}: the model does not learn to stop{why}")
    });
    found.iter_mut().for_each(|found| found.level = warning);
    found
}

/// The last token of each supervised response without a stop token after it, by origins.
fn unstopped_turns(s: &Subject<'_>) -> Vec<usize> {
    let mut missing = Vec::new();
    for (at, run) in s.runs.iter().enumerate() {
        let Origin::Response { turn } = run.origin else { continue };
        let before = at.checked_sub(1).map(|before| s.runs[before].origin);
        let stopped = matches!(s.runs.get(at + 1), Some(Run { origin: Origin::EndOfTurn { .. }, .. }));
        // Text of a turn after its stop token is M007.
        if before != Some(Origin::EndOfTurn { turn }) && !stopped && s.learned(run.tokens.end - 1) {
            missing.push(run.tokens.end - 1);
        }
    }
    missing
}

/// The last token of each run of supervised tokens with no stop token in it or after it, masked or not.
fn unstopped_runs(s: &Subject<'_>) -> Vec<usize> {
    let mask = s.given.and_then(|given| given.mask.as_ref());
    let mut missing = Vec::new();
    for run in s.supervised_runs() {
        let masked_stop = run.end < s.n() && s.is_stop(run.end) && !s.is_padding(run.end);
        let mask_goes_on = mask.is_some_and(|mask| mask.get(run.end) == Some(&true));
        // A stop token inside the run ends the response: what follows is M007.
        if !run.clone().any(|i| s.is_stop(i)) && !masked_stop && !mask_goes_on {
            missing.push(run.end - 1);
        }
    }
    missing
}

/// M004: a prompt token is supervised although its weight is 0. Needs a row that gives the position of its prompt
/// apart from its labels.
pub(super) fn prompt_supervised(s: &Subject<'_>) -> Vec<Found> {
    let judged = |given: &Given| !given.weights && (s.known() || given.mask.is_some());
    if s.all_tokens() || !s.given.is_none_or(judged) || (s.found() && s.all_supervised()) {
        return Vec::new();
    }
    let wrong = s.supervised(|origin| match origin {
        Origin::Prompt { section, .. } => s.policy.section_weight(section) == 0.0,
        _ => false,
    });
    if wrong.is_empty() || (s.found() && is_mislabelled(s)) {
        return Vec::new();
    }
    let whose = match (s.found(), s.sample.origins[wrong[0]]) {
        (true, Origin::Prompt { section, .. }) if section != Section::Other => {
            format!(" (section {})", section.name())
        }
        _ => String::new(),
    };
    Found::about(s, &wrong, |places| format!("{places} of the prompt{whose} supervised"))
}

/// M005: padding is supervised. Padding is given by the attention mask or the origins, else it is the pad ids at
/// the end.
pub(super) fn padding_supervised(s: &Subject<'_>) -> Vec<Found> {
    let end = s.content_end();
    let labels = s.given.and_then(|given| given.overridden.as_ref());
    let wrong = if s.all_tokens() || end < s.n() {
        // AllTokens overrides the row's labels, except on padding.
        let learned = |i: usize| {
            s.learned(i) || (s.all_tokens() && labels.is_some_and(|l| l[i] != IGNORE && s.is_padding(i)))
        };
        s.tokens(|i| learned(i) && (s.is_padding(i) || i >= end))
    } else {
        s.supervised(|origin| origin == Origin::Padding)
    };
    Found::about(s, &wrong, |places| format!("{places} of padding supervised"))
}

/// M006: two BOS at the start of a text.
pub(super) fn double_bos(s: &Subject<'_>) -> Vec<Found> {
    let (Some(bos), ids) = (s.special.bos, &s.sample.input_ids) else { return Vec::new() };
    // If BOS and EOS are one id, a foreign row may start with padding or with the end of another text.
    if s.given.is_some() && s.special.stops.contains(&bos) {
        return Vec::new();
    }
    let Some(first) = (0..s.n()).find(|&i| !s.is_padding(i)) else { return Vec::new() };
    if ids.get(first..first + 2) != Some(&[bos, bos]) || s.is_padding(first + 1) {
        return Vec::new();
    }
    vec![Found::within(first..first + 2, format!("the row starts with two BOS tokens (id {bos})"))]
}

/// M007: scaffold, or tokens after the stop token of a response, are supervised.
pub(super) fn scaffold_supervised(s: &Subject<'_>) -> Vec<Found> {
    if s.all_tokens() || s.given.is_none() || (s.found() && (s.all_supervised() || is_mislabelled(s))) {
        return Vec::new();
    }
    let mut scaffold = s.supervised(|origin| origin == Origin::Scaffold);
    // The first token is never predicted; padding at the end is M005.
    let end = s.content_end();
    scaffold.retain(|&i| i > 0 && (!s.found() || i < end));
    if !scaffold.is_empty() {
        return Found::about(s, &scaffold, |places| format!("{places} of scaffold supervised"));
    }
    if s.known() || !everything_supervised(s).is_empty() {
        return Vec::new();
    }
    let end = s.content_end();
    let after_stop = |run: Range<usize>| run.clone().find(|&i| s.is_stop(i)).map(|stop| stop + 1..run.end);
    let after = s.supervised_runs().into_iter().filter_map(after_stop).flatten();
    let after: Vec<usize> = after.filter(|&i| !s.is_padding(i) && i < end).collect();
    Found::about(s, &after, |places| format!("{places} after the stop token supervised"))
}

/// M008: the labels of a row that came as tokens equal its ids, whether it has labels or a mask. A prepared row
/// whose origins are all response is correct.
pub(super) fn everything_supervised(s: &Subject<'_>) -> Vec<Found> {
    if s.given.is_none_or(|given| given.weights) {
        return Vec::new();
    }
    let only_response = || s.runs.iter().all(|r| r.origin.supervised() || r.origin == Origin::Padding);
    let weighted = |r: &Run| matches!(r.origin, Origin::Prompt { section, .. } if s.policy.section_weight(section) > 0.0);
    let equal = |i: usize| i64::from(s.sample.labels[i]) == i64::from(s.sample.input_ids[i]);
    let mut real = (0..s.n()).filter(|&i| !s.is_padding(i)).peekable();
    if s.all_tokens()
        || real.peek().is_none()
        || !real.all(equal)
        || (s.known() && only_response())
        || s.runs.iter().any(weighted)
    {
        return Vec::new();
    }
    let n = s.n();
    // Text without turns may be intended to be supervised as a whole.
    let plain = s.part().is_some_and(|part| !part.known) && s.given.is_some_and(|given| given.mask.is_none());
    let message = match (s.foreign.unlabelled, plain) {
        (true, false) if s.found() => format!(
            "the row has neither labels nor a mask: a trainer learns all of its {n} tokens, prompt included"
        ),
        (true, _) => format!(
            "the row has neither labels nor a mask: a trainer learns all of its {n} tokens, and no prompt can be told apart"
        ),
        (false, true) => format!(
            "all {n} tokens are supervised, and no turn of the chat template is among them: right for plain text, \
             wrong for prompts with answers"
        ),
        (false, false) => {
            format!("all {n} tokens are supervised: the labels equal the input ids, prompt included")
        }
    };
    let warning = plain || (s.foreign.unlabelled && !s.found());
    let level = warning.then_some(Level::Warning);
    vec![Found { level, ..Found::within(0..n, message) }]
}

/// True if a label is not the id at its position: that is L001, and other rules would only repeat it.
fn is_mislabelled(s: &Subject<'_>) -> bool {
    !wrong_labels(s).is_empty()
}

/// Up to this many masked tokens at the start of an answer are taken as an off-by-a-few error; more are only a
/// warning.
const SLIP: usize = 32;

/// M010: an answer that is only partly supervised. The answers must be known apart from the labels.
pub(super) fn answer_in_part(s: &Subject<'_>) -> Vec<Found> {
    let judged = |given: &Given| !given.weights && !given.origins;
    if s.all_tokens() || !s.found() || !s.given.is_some_and(judged) {
        return Vec::new();
    }
    let mut out = Vec::new();
    for run in s.runs.iter().filter(|run| matches!(run.origin, Origin::Response { .. })) {
        if run.supervised == run.tokens.len() {
            continue;
        }
        let masked: Vec<usize> = run.tokens.clone().filter(|&i| !s.learned(i)).collect();
        let Some(first) = run.tokens.clone().find(|&i| s.learned(i)) else {
            if s.foreign.expected {
                let found = Found::about(s, &masked, |places| {
                    format!("{places} of an answer masked, all of it, and its source row says to learn it")
                });
                out.extend(found.into_iter().map(|found| Found { level: Some(Level::Warning), ..found }));
            }
            continue;
        };
        let last = run.tokens.clone().rfind(|&i| s.learned(i)).unwrap_or(first);
        let (head, tail) = (first - run.tokens.start, run.tokens.end - 1 - last);
        let inside = masked.len() - head - tail;
        if inside == 0
            && tail == 0
            && s.foreign.is_given_or_thought(&s.sample.input_ids[run.tokens.start..first])
        {
            continue;
        }
        let parts = [(head, "at its start"), (inside, "inside"), (tail, "at its end")];
        let parts: Vec<String> =
            parts.iter().filter(|(n, _)| *n > 0).map(|(n, place)| format!("{n} {place}")).collect();
        let level = (inside == 0 && tail == 0 && head > SLIP).then_some(Level::Warning);
        let found = Found::about(s, &masked, |places| {
            format!("{places} of an answer masked and the rest learned: {}", parts.join(", "))
        });
        out.extend(found.into_iter().map(|found| Found { level, ..found }));
    }
    if !out.is_empty() && is_mislabelled(s) {
        out.clear();
    }
    out
}

/// M009: the stop token at the end of a response is present and masked.
pub(super) fn stop_masked(s: &Subject<'_>) -> Vec<Found> {
    if s.all_tokens() || s.given.is_none() {
        return Vec::new();
    }
    let masked: Vec<usize> = if s.known() {
        let ends = s.runs.windows(2).filter_map(|runs| match [runs[0].origin, runs[1].origin] {
            [Origin::Response { .. }, Origin::EndOfTurn { .. }] => Some(runs[1].tokens.start),
            _ => None,
        });
        ends.filter(|&i| !s.learned(i) && s.learned(i - 1)).collect()
    } else {
        let ends = s
            .supervised_runs()
            .into_iter()
            .filter(|run| !run.clone().any(|i| s.is_stop(i)))
            .map(|run| run.end);
        // Without a tokenizer: the id of padding, if there is an attention mask.
        let pads = || {
            let padding = s.runs.iter().rfind(|run| run.origin == Origin::Padding)?;
            Some(s.sample.input_ids[padding.tokens.start])
        };
        let pad = if s.special.stops.is_empty() { pads() } else { None };
        let is_stop = |i: usize| s.is_stop(i) || pad == Some(s.sample.input_ids[i]);
        ends.filter(|&i| i < s.n() && is_stop(i) && !s.is_padding(i)).collect()
    };
    // Shifted labels are beside their stop tokens: that is L001.
    if masked.is_empty() || !wrong_labels(s).is_empty() {
        return Vec::new();
    }
    let same_id = s.special.pad.is_some() && s.special.pad == s.special.eos;
    let cause = if same_id { " (pad and EOS are one id)" } else { "" };
    Found::about(s, &masked, |places| {
        format!("the stop token at the end of a response is masked: {places}{cause}")
    })
}

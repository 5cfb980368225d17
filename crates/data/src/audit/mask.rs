//! M001 to M009: what is supervised and should not be, or the reverse.

use super::labels::l001;
use super::subject::{Subject, places};
use crate::{Code, Finding, IGNORE, Level, Origin};

/// M001: no target is left after the shift by one.
pub fn m001(s: &Subject<'_>) -> Option<Finding> {
    if s.sample.targets().next().is_some() {
        return None;
    }
    let message = if s.n() > 0 && s.learned(0) {
        "the only supervised token is the first of the row: nothing stands before it that could predict it"
            .into()
    } else {
        format!("none of the {} tokens is supervised", s.n())
    };
    s.finding(Code::M001, message)
}

/// M002: a response that no supervised stop token follows. A warning where `append_eos = false` was asked for,
/// and for prepared rows, whose preparation has told why. A stop token that is there but masked is M009.
pub fn m002(s: &Subject<'_>) -> Option<Finding> {
    if s.all_tokens() {
        return None;
    }
    // Rows that came as tokens, prepared ones among them, say nothing of a stop where none is known.
    if s.given.is_some() && s.special.stops.is_empty() {
        return None;
    }
    let ids = &s.sample.input_ids;
    let mut missing = Vec::new();
    if s.given.is_none_or(|g| g.origins.is_some()) {
        // Text after a stop token is M007's business, and answers that are not learned are nobody's.
        let mut trails = false;
        for i in 0..s.n() {
            let Origin::Response { turn } = s.sample.origins[i] else { continue };
            match i.checked_sub(1).map(|before| s.sample.origins[before]) {
                Some(Origin::Response { turn: before }) if before == turn => {}
                before => trails = before == Some(Origin::EndOfTurn { turn }),
            }
            if trails || !s.learned(i) {
                continue;
            }
            match s.sample.origins.get(i + 1) {
                Some(Origin::Response { turn: next }) if *next == turn => {}
                Some(Origin::EndOfTurn { .. }) => {}
                _ => missing.push(i),
            }
        }
    } else {
        for run in s.runs() {
            // Any stop token inside the run ends it: what follows is M007's business.
            let stopped = run.clone().any(|i| s.is_stop(i));
            let masked_stop = ids.get(run.end).is_some_and(|_| s.is_stop(run.end) && !is_padding(s, run.end));
            let mask_goes_on =
                s.given.and_then(|g| g.mask.as_ref()).is_some_and(|m| m.get(run.end) == Some(&true));
            if !stopped && !masked_stop && !mask_goes_on {
                missing.push(run.end - 1);
            }
        }
    }
    if missing.is_empty() {
        return None;
    }
    let after = places(&missing);
    let why = if !s.policy.append_eos {
        " (append_eos is false)"
    } else if s.given.is_none() && s.special.eos.is_none() {
        " (the tokenizer has no EOS to append)"
    } else {
        ""
    };
    let message = format!("no supervised stop token after {after}: the model does not learn to stop{why}");
    let mut finding = Finding::new(s.row(), Code::M002, message);
    if !s.policy.append_eos || s.given.is_some_and(|g| g.origins.is_some()) {
        finding.level = Level::Warning;
    }
    Some(finding)
}

/// M004: a prompt token is supervised though no weight asks for it. Needs a row that says where its prompt is.
pub fn m004(s: &Subject<'_>) -> Option<Finding> {
    if s.all_tokens() || !s.origins_are_known() || s.given.is_some_and(|g| g.weights.is_some()) {
        return None;
    }
    let wrong: Vec<usize> = (0..s.n())
        .filter(|&i| match s.sample.origins[i] {
            Origin::Prompt { section, .. } => s.learned(i) && s.policy.section_weight(section) == 0.0,
            _ => false,
        })
        .collect();
    if wrong.is_empty() {
        return None;
    }
    s.finding(Code::M004, format!("{} of the prompt supervised", places(&wrong)))
}

/// M005: padding is supervised: what the attention mask or the origins call padding, else the pad ids at the end of a row.
pub fn m005(s: &Subject<'_>) -> Option<Finding> {
    let tail = s.tail_padding().unwrap_or(s.n());
    let labels = s.given.and_then(|g| g.labels.as_ref());
    // AllTokens overrides the row's labels, padding stays out of it.
    let learned = |i: usize| {
        s.learned(i) || (s.all_tokens() && labels.is_some_and(|l| l[i] != IGNORE && is_padding(s, i)))
    };
    let wrong: Vec<usize> = (0..s.n()).filter(|&i| learned(i) && (is_padding(s, i) || i >= tail)).collect();
    if wrong.is_empty() {
        return None;
    }
    s.finding(Code::M005, format!("{} of padding supervised", places(&wrong)))
}

/// M006: two BOS where a text starts.
pub fn m006(s: &Subject<'_>) -> Option<Finding> {
    let bos = s.special.bos?;
    // Where BOS and EOS are one id, a foreign row may start with padding or with the end of another text.
    if s.given.is_some() && s.special.stops.contains(&bos) {
        return None;
    }
    let ids = &s.sample.input_ids;
    let first = s.sample.origins.iter().position(|o| *o != Origin::Padding)?;
    let doubled = ids.get(first) == Some(&bos) && ids.get(first + 1) == Some(&bos);
    if !doubled || s.sample.origins[first + 1] == Origin::Padding {
        return None;
    }
    s.finding(Code::M006, format!("the row starts with two BOS tokens (id {bos})"))
}

/// M007: scaffold is supervised, or tokens after the stop token of a response are.
pub fn m007(s: &Subject<'_>) -> Option<Finding> {
    if s.all_tokens() || s.given.is_none() {
        return None;
    }
    let scaffold: Vec<usize> =
        (0..s.n()).filter(|&i| s.sample.origins[i] == Origin::Scaffold && s.learned(i)).collect();
    if !scaffold.is_empty() {
        return s.finding(Code::M007, format!("{} of scaffold supervised", places(&scaffold)));
    }
    if m008(s).is_some() || s.given.is_some_and(|g| g.origins.is_some()) {
        return None;
    }
    let tail = s.tail_padding().unwrap_or(s.n());
    let after: Vec<usize> = s
        .runs()
        .into_iter()
        .filter_map(|run| run.clone().find(|&i| s.is_stop(i)).map(|stop| stop + 1..run.end))
        .flatten()
        .filter(|&i| !is_padding(s, i) && i < tail)
        .collect();
    if after.is_empty() {
        return None;
    }
    s.finding(Code::M007, format!("{} after the stop token supervised", places(&after)))
}

/// M008: the labels of a foreign row equal its ids, whether it gave labels or a mask. A prepared row whose
/// origins say that it is a response and nothing else is what it says.
pub fn m008(s: &Subject<'_>) -> Option<Finding> {
    let given = s.given?;
    if s.all_tokens() || given.weights.is_some() {
        return None;
    }
    let equal = |i: usize| i64::from(s.sample.labels[i]) == i64::from(s.sample.input_ids[i]);
    let mut real = (0..s.n()).filter(|&i| !is_padding(s, i)).peekable();
    real.peek()?;
    if !real.all(equal) {
        return None;
    }
    let only_response = || s.sample.origins.iter().all(|o| o.supervised() || *o == Origin::Padding);
    let weighted =
        |o: &Origin| matches!(o, Origin::Prompt { section, .. } if s.policy.section_weight(*section) > 0.0);
    if given.origins.is_some() && only_response() || s.sample.origins.iter().any(weighted) {
        return None;
    }
    s.finding(
        Code::M008,
        format!("all {} tokens are supervised: the labels equal the input ids, prompt included", s.n()),
    )
}

/// M009: a stop token at the end of a response is there and masked, as happens when pad and EOS are one id.
pub fn m009(s: &Subject<'_>) -> Option<Finding> {
    // Labels that are shifted stand beside their stop tokens: that is L001's business.
    if s.all_tokens() || l001(s).is_some() {
        return None;
    }
    let given = s.given?;
    let masked: Vec<usize> = if given.origins.is_some() {
        (1..s.n())
            .filter(|&i| {
                let ends = matches!(s.sample.origins[i], Origin::EndOfTurn { .. }) && !s.learned(i);
                ends && matches!(s.sample.origins[i - 1], Origin::Response { .. }) && s.learned(i - 1)
            })
            .collect()
    } else {
        let runs = s.runs();
        let ends = runs.iter().filter(|run| !(run.start..run.end).any(|i| s.is_stop(i))).map(|run| run.end);
        ends.filter(|&i| i < s.n() && s.is_stop(i) && !is_padding(s, i)).collect()
    };
    if masked.is_empty() {
        return None;
    }
    let cause = if s.special.pad.is_some() && s.special.pad == s.special.eos {
        " (pad and EOS are one id)"
    } else {
        ""
    };
    s.finding(
        Code::M009,
        format!("the stop token at the end of a response is masked: {}{cause}", places(&masked)),
    )
}

fn is_padding(s: &Subject<'_>, i: usize) -> bool {
    s.sample.origins[i] == Origin::Padding
}

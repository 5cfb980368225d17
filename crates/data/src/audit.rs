//! What is wrong with a row, found by looking at its tokens: one small function per code.
//!
//! Audits look at the whole row, before truncation, so that what a cut removes is told once (T001, T002) and
//! not as a fault of the data.

use crate::example::Tokenised;
use crate::label::Special;
use crate::pack::Segment;
use crate::policy::{Objective, Policy};
use crate::{Code, Finding, IGNORE, Level, Origin, Sample};

/// A labelled row, before truncation, with what is known about it.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// Its ids, labels, origins and weights.
    pub sample: &'a Sample,
    /// Where the row came as tokens: what it said itself. `None` for rows that we made from text.
    pub given: Option<&'a Tokenised>,
    /// The tokenizer's special ids; empty without a tokenizer.
    pub special: &'a Special,
    /// What was asked for.
    pub policy: &'a Policy,
}

/// Findings with these codes mean that a wrong token would be learned, or a right one not: such a row is not
/// trained on unless the finding is ignored by name.
pub const REFUSED: [Code; 6] = [Code::M004, Code::M005, Code::M006, Code::M008, Code::M009, Code::L001];

/// Rows that repeat at least this many tokens of their prompt as the response are reported.
const COPY_TOKENS: usize = 16;

/// All checks that look at one row's tokens, in the order of the specification. The rows of a pack are looked at one by
/// one; what is found says in which sequence, counted from 0.
pub fn audit(subject: &Subject<'_>) -> Vec<Finding> {
    let checks: [fn(&Subject<'_>) -> Option<Finding>; 10] =
        [m001, m002, m004, m005, m006, m007, m008, m009, l001, d001_copy];
    let Some(pack) = &subject.sample.pack else {
        return checks.iter().filter_map(|check| check(subject)).collect();
    };
    let mut findings = Vec::new();
    for (i, (row, tokens)) in subject.sample.unpack().iter().zip(pack.row_tokens()).enumerate() {
        let given = subject.given.map(|given| {
            let mut part = given.part(&tokens);
            // A weight that a shared prompt has for all of its rows is not the row's own.
            part.weights = part.weights.and_then(|_| row.weights.clone());
            part
        });
        let row = Subject { sample: row, given: given.as_ref(), ..*subject };
        findings.extend(checks.iter().filter_map(|check| check(&row)).map(|mut finding| {
            finding.row = subject.row();
            finding.message = format!("sequence {i}: {}", finding.message);
            finding
        }));
    }
    findings.extend(p001(subject));
    findings
}

impl Subject<'_> {
    fn n(&self) -> usize {
        self.sample.input_ids.len()
    }

    fn row(&self) -> u64 {
        self.sample.id.row
    }

    fn learned(&self, i: usize) -> bool {
        self.sample.labels[i] != IGNORE
    }

    fn is_stop(&self, i: usize) -> bool {
        self.special.stops.contains(&self.sample.input_ids[i])
    }

    fn all_tokens(&self) -> bool {
        self.policy.objective == Objective::AllTokens
    }

    /// True where the row itself says which tokens are prompt and which response, apart from its labels.
    fn origins_are_known(&self) -> bool {
        self.given.is_none_or(|g| g.origins.is_some() || g.mask.is_some())
    }

    /// Runs of supervised tokens: `start..end`.
    fn runs(&self) -> Vec<std::ops::Range<usize>> {
        let mut out: Vec<std::ops::Range<usize>> = Vec::new();
        for i in (0..self.n()).filter(|&i| self.learned(i)) {
            match out.last_mut() {
                Some(run) if run.end == i => run.end = i + 1,
                _ => out.push(i..i + 1),
            }
        }
        out
    }

    /// First index of the padding at the end of a row that has no attention mask: the trailing run of pad ids.
    /// Where pad and EOS are one id, the first of the run is the EOS.
    fn tail_padding(&self) -> Option<usize> {
        let pad = self.special.pad?;
        if self.given?.attention.is_some() || self.given?.origins.is_some() {
            return None;
        }
        let ids = &self.sample.input_ids;
        let start = ids.iter().rposition(|&id| id != pad).map_or(0, |i| i + 1);
        let start = start + usize::from(self.special.stops.contains(&pad));
        (start < ids.len()).then_some(start)
    }

    fn finding(&self, code: Code, message: String) -> Option<Finding> {
        Some(Finding::new(self.row(), code, message))
    }
}

/// `3 tokens (first at 17)`.
fn places(places: &[usize]) -> String {
    match places {
        [one] => format!("token {one}"),
        [first, ..] => format!("{} tokens (the first is token {first})", places.len()),
        [] => "no token".into(),
    }
}

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

fn is_padding(s: &Subject<'_>, i: usize) -> bool {
    s.sample.origins[i] == Origin::Padding
}

/// M003: tokens that straddle a boundary, from the tokenizer's own report (joint mode).
pub fn m003(row: u64, straddles: &[String]) -> Vec<Finding> {
    straddles.iter().map(|text| Finding::new(row, Code::M003, text.clone())).collect()
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

/// L001: a label that is neither -100 nor the id at its place (shifted labels, another ignore index).
pub fn l001(s: &Subject<'_>) -> Option<Finding> {
    let (ids, labels) = (&s.sample.input_ids, &s.sample.labels);
    let wrong: Vec<usize> =
        (0..s.n()).filter(|&i| labels[i] != IGNORE && i64::from(labels[i]) != i64::from(ids[i])).collect();
    let first = *wrong.first()?;
    let shifted = s.n() > 1
        && (0..s.n() - 1).all(|i| labels[i] == IGNORE || i64::from(labels[i]) == i64::from(ids[i + 1]));
    let hint = if shifted { "; the labels look shifted by one, which the model does itself" } else { "" };
    let (label, id) = (labels[first], ids[first]);
    s.finding(Code::L001, format!("{}: the label is {label}, the input id is {id}{hint}", places(&wrong)))
}

/// P001, second kind: a label on the first token of a sequence that no prompt stands before. It is no target here; a trainer
/// that shifts the whole pack would learn it from the sequence before.
pub fn p001(s: &Subject<'_>) -> Option<Finding> {
    let first = |segment: Segment| segment.own.start as usize;
    let alone = s.sample.segments().filter(|segment| segment.prefix.is_empty()).map(first);
    let wrong: Vec<usize> = alone.filter(|&i| s.sample.pack.is_some() && i > 0 && s.learned(i)).collect();
    if wrong.is_empty() {
        return None;
    }
    s.finding(Code::P001, format!("{} supervised across the boundary before a sequence", places(&wrong)))
}

/// D001, second kind: the response stands in the prompt, token by token.
pub fn d001_copy(s: &Subject<'_>) -> Option<Finding> {
    let origins = &s.sample.origins;
    let is_response = |o: &Origin| matches!(o, Origin::Response { .. });
    let start = origins.iter().position(is_response)?;
    let length = origins[start..].iter().take_while(|o| is_response(o)).count();
    if length <= COPY_TOKENS || length > start {
        return None;
    }
    let ids = &s.sample.input_ids;
    // The first token may differ by the space in front of it.
    let at = find(&ids[..start], &ids[start + 1..start + length])?;
    s.finding(Code::D001, format!("the response ({length} tokens) is copied from the prompt (token {at})"))
}

/// The first place of `needle` in `hay` (Knuth, Morris, Pratt: linear also where tokens repeat).
fn find(hay: &[u32], needle: &[u32]) -> Option<usize> {
    let mut fail = vec![0usize; needle.len()];
    let mut k = 0;
    for i in 1..needle.len() {
        while k > 0 && needle[i] != needle[k] {
            k = fail[k - 1];
        }
        k += usize::from(needle[i] == needle[k]);
        fail[i] = k;
    }
    let mut matched = 0;
    for (i, id) in hay.iter().enumerate() {
        while matched > 0 && *id != needle[matched] {
            matched = fail[matched - 1];
        }
        matched += usize::from(*id == needle[matched]);
        if matched == needle.len() {
            return Some(i + 1 - matched);
        }
    }
    None
}

/// Which codes are shown and count: `--select` and `--ignore`.
///
/// A pattern is a code or its beginning: `M` covers M001 to M009. Without `select` every code is selected;
/// `ignore` wins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    select: Vec<String>,
    ignore: Vec<String>,
}

impl Filter {
    /// A filter of these patterns, each possibly a comma-separated list.
    ///
    /// # Errors
    /// The pattern that fits no code.
    pub fn new<S: AsRef<str>>(select: &[S], ignore: &[S]) -> Result<Filter, String> {
        let parse = |patterns: &[S]| -> Result<Vec<String>, String> {
            let mut out = Vec::new();
            for part in patterns.iter().flat_map(|p| p.as_ref().split(',')) {
                let part = part.trim().to_uppercase();
                if part.is_empty() {
                    continue;
                }
                if !Code::ALL.iter().any(|c| c.as_str().starts_with(&part)) {
                    let all: Vec<&str> = Code::ALL.iter().map(|c| c.as_str()).collect();
                    return Err(format!("no finding has the code {part:?}; there are {}", all.join(", ")));
                }
                out.push(part);
            }
            Ok(out)
        };
        Ok(Filter { select: parse(select)?, ignore: parse(ignore)? })
    }

    /// True where findings with this code are shown and count.
    pub fn accepts(&self, code: Code) -> bool {
        let fits = |patterns: &[String]| patterns.iter().any(|p| code.as_str().starts_with(p.as_str()));
        (self.select.is_empty() || fits(&self.select)) && !fits(&self.ignore)
    }
}

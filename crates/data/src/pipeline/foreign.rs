//! The origin of each token of rows that other programs have tokenised: from the source rows, else from the turns
//! of the chat template.

use super::reference::{Match, Reference};
use crate::audit::foreign::{Foreign, Part};
use crate::audit::turns::Turns;
use crate::example::Tokenised;
use crate::tokens::Tokenizer;
use crate::{Code, Finding, IGNORE, Origin, RowId};
use std::ops::Range;
use std::sync::Arc;

/// What rows are compared with.
#[derive(Clone, Copy)]
pub(super) struct Against<'a> {
    pub turns: Option<&'a Turns>,
    pub reference: Option<&'a Reference>,
    pub tokenizer: Option<&'a Tokenizer>,
}

impl<'a> Against<'a> {
    /// What is known of a row apart from its labels, the origins of its tokens if known, and findings about its ids.
    pub fn read(
        self,
        id: &RowId,
        row: &Tokenised,
        unlabelled: bool,
    ) -> (Foreign<'a>, Option<Vec<Origin>>, Vec<Finding>) {
        let mut foreign = Foreign { unlabelled, tokenizer: self.tokenizer, ..Foreign::default() };
        if let Some(turns) = self.turns {
            foreign.stops = turns.written();
        }
        // Rows that give their origins need no others, and only our own packs have shared prompts.
        let shares = |pack: &crate::Pack| pack.segments.iter().any(|segment| segment.branches > 0);
        if row.origins.is_some() || row.pack.as_ref().is_some_and(shares) {
            return (foreign, None, Vec::new());
        }
        let sequences: Vec<Range<usize>> = match &row.pack {
            None => std::iter::once(0..row.input_ids.len()).collect(),
            Some(pack) => pack.segments.iter().map(|s| s.own.start as usize..s.own.end as usize).collect(),
        };
        let (mut origins, mut findings) = (vec![None; sequences.len()], Vec::new());
        let mut parts: Vec<Part> = Vec::with_capacity(sequences.len());
        let real = |i: usize| row.attention.as_ref().is_none_or(|attention| attention[i]);
        for (nth, tokens) in sequences.iter().enumerate() {
            let learned = |i: usize| match (&row.labels, &row.mask) {
                (Some(labels), _) => labels[tokens.start + i] != IGNORE,
                (None, Some(mask)) => mask[tokens.start + i],
                (None, None) => true,
            };
            let ids = &row.input_ids[tokens.clone()];
            let found = self.turns.and_then(|turns| turns.find(ids, |i| real(tokens.start + i), learned));
            let mut part = found.as_ref().map(|found| found.part.clone()).unwrap_or_default();
            origins[nth] = found.map(|found| found.origins);
            if let Some(reference) = self.reference {
                let sequence = row.pack.is_some().then_some(nth);
                let (own, finding) = self.by_source(reference, id, row, tokens.clone(), sequence);
                if let Some(own) = own {
                    (origins[nth], part.known) = (Some(own), true);
                    foreign.expected = true;
                }
                findings.extend(finding.map(|mut finding| {
                    if row.pack.is_some() {
                        finding.message = format!("sequence {nth}: {}", finding.message);
                    }
                    finding
                }));
            }
            parts.push(part);
        }
        // Nothing was searched for, or the search had a result, even an empty one.
        if self.turns.is_some() || origins.iter().any(Option::is_some) {
            foreign.parts = Arc::new(parts);
        }
        if origins.iter().all(Option::is_none) {
            return (foreign, None, findings);
        }
        // A sequence without any match keeps the origins derived from its labels.
        let known = origins.iter().all(Option::is_some);
        let all = if known {
            origins.into_iter().flatten().flatten().collect()
        } else {
            let by_labels = |tokens: &Range<usize>| {
                tokens.clone().map(|i| match (real(i), &row.labels, &row.mask) {
                    (false, ..) => Origin::Padding,
                    (_, Some(labels), _) if labels[i] != IGNORE => Origin::Response { turn: 0 },
                    (_, None, Some(mask)) if mask[i] => Origin::Response { turn: 0 },
                    _ => Origin::Prompt { turn: 0, section: crate::Section::Other },
                })
            };
            let one = |(own, tokens): (Option<Vec<Origin>>, &Range<usize>)| {
                own.unwrap_or_else(|| by_labels(tokens).collect())
            };
            origins.into_iter().zip(&sequences).flat_map(one).collect()
        };
        (foreign, Some(all), findings)
    }

    /// The origins of a sequence according to its source row, or the difference.
    fn by_source(
        self,
        reference: &Reference,
        id: &RowId,
        row: &Tokenised,
        tokens: Range<usize>,
        sequence: Option<usize>,
    ) -> (Option<Vec<Origin>>, Option<Finding>) {
        let real = |i: &usize| row.attention.as_ref().is_none_or(|attention| attention[*i]);
        let places: Vec<usize> = tokens.clone().filter(real).collect();
        let ids: Vec<u32> = places.iter().map(|&i| row.input_ids[i]).collect();
        let spread = |own: Vec<Origin>| {
            let mut all = vec![Origin::Padding; tokens.len()];
            places.iter().zip(own).for_each(|(&i, origin)| all[i - tokens.start] = origin);
            all
        };
        let text = |id: u32| {
            self.tokenizer.map_or_else(|| id.to_string(), |t| format!("{id} {:?}", t.token_text(id)))
        };
        let finding = |message: String| Some(Finding::new(id.row, Code::L002, message));
        let by = reference.column().map_or(String::new(), |column| format!(" (of the same {column:?})"));
        match reference.of(&ids, id.row, sequence) {
            Match::Same(own) => (Some(spread(own)), None),
            Match::Cut(own, number, whole) => {
                let message = format!(
                    "the row is the first {} of the {whole} tokens that source row {number}{by} gives: it was cut",
                    ids.len()
                );
                (Some(spread(own)), finding(message))
            }
            Match::Differs { number, at, theirs } => {
                let ours = theirs.map_or("ends there".to_string(), |id| format!("has {}", text(id)));
                let message =
                    format!("token {} is {}, and source row {number}{by} {ours}", places[at], text(ids[at]));
                (None, finding(message))
            }
            Match::NoId(own) => {
                let column = reference.column().unwrap_or_default();
                (None, finding(format!("no source row has the {column:?} {own:?}")))
            }
            Match::None => (None, finding("no source row has these tokens".into())),
        }
    }
}

/// The value for a row in which nothing was searched for.
pub(super) fn nothing(tokenizer: Option<&Tokenizer>) -> Foreign<'_> {
    Foreign { tokenizer, ..Foreign::default() }
}

//! Boundaries of packs that came as tokens, from suasion or other tools.

use crate::{Pack, RowId};
use std::collections::HashSet;
use std::ops::Range;

/// The fields of a row that describe its boundaries. Fields with a value per token have the length of the
/// row.
#[derive(Debug, Default)]
pub(super) struct Given<'a> {
    /// `rows`: the numbers of the source rows in it.
    pub rows: Option<Vec<u64>>,
    /// `seq_lengths`, as suasion and TRL write them.
    pub lengths: Option<Vec<u32>>,
    /// `position_ids`, which restart with each sequence.
    pub positions: Option<Vec<u32>>,
    /// `prefix_ranges`, which suasion writes for shared prompts.
    pub prefixes: Option<Vec<Range<u32>>>,
    /// `attention_mask`, if it numbers the sequences (1, 1, 2, 2, 2, 0); 0 is padding.
    pub numbers: Option<Vec<u32>>,
    /// False on padding.
    pub attention: Option<&'a [bool]>,
}

/// The boundaries of a row of `n` tokens; `None` if it is not a pack.
///
/// # Errors
/// A message that says why the boundaries are invalid.
pub(super) fn boundaries(id: &RowId, n: usize, given: &Given<'_>) -> Result<Option<Pack>, String> {
    let real = |i: usize| given.attention.is_none_or(|attention| attention[i]);
    if u32::try_from(n).is_err() {
        return Err(format!("it has {n} tokens; the limit is {}", u32::MAX));
    }
    let lengths = match (&given.lengths, &given.numbers, &given.positions) {
        (Some(lengths), ..) => Some(with_padding(lengths, n, real)?),
        (None, Some(numbers), _) => Some(by_number(numbers)?),
        (None, None, Some(positions)) => Some(by_position(positions, real)).filter(|l| l.len() > 1),
        (None, None, None) => None,
    };
    let Some(lengths) = lengths else {
        return match (&given.rows, &given.prefixes) {
            (Some(rows), _) if rows.len() > 1 => Err(format!(
                "it holds {} rows, but neither \"seq_lengths\" nor \"position_ids\" says where each starts",
                rows.len()
            )),
            (_, Some(prefixes)) if !prefixes.is_empty() => {
                Err("it has \"prefix_ranges\" but no \"seq_lengths\"".into())
            }
            _ => match &given.positions {
                Some(positions) => {
                    check_positions(positions, real, std::iter::once((0, 0..n))).map(|()| None)
                }
                None => Ok(None),
            },
        };
    };
    let row = |row: u64| RowId { row, ..id.clone() };
    let prefixes = given.prefixes.as_deref();
    let rows = match &given.rows {
        Some(rows) => rows.iter().map(|&number| row(number)).collect(),
        // The source rows are unknown: each sequence gets the id of this row.
        None => {
            let shared = prefixes.unwrap_or_default().iter().filter(|prefix| !prefix.is_empty());
            let shared: HashSet<u64> = shared.map(|prefix| u64::from(prefix.start)).collect();
            let starts = lengths.iter().scan(0, |end, &length| {
                let start = *end;
                *end += u64::from(length);
                Some(start)
            });
            starts.filter(|start| !shared.contains(start)).map(|_| id.clone()).collect()
        }
    };
    let pack = Pack::new(rows, &lengths, prefixes)?;
    let runs = || {
        let tokens = |s: &crate::sample::Segment| s.own.start as usize..s.own.end as usize;
        pack.segments.iter().map(move |s| (s.prefix.end - s.prefix.start, tokens(s)))
    };
    if let Some(positions) = &given.positions {
        check_positions(positions, real, runs())?;
    }
    if let (Some(_), Some(numbers)) = (&given.lengths, &given.numbers) {
        let mixed = |(_, tokens): &(u32, Range<usize>)| {
            let mut own = numbers[tokens.clone()].iter().filter(|&&number| number != 0);
            let first = own.next();
            own.any(|number| Some(number) != first)
        };
        if let Some((_, tokens)) = runs().find(mixed) {
            return Err(format!(
                "\"attention_mask\" starts a sequence within tokens {} to {}, which are one sequence by \"seq_lengths\"",
                tokens.start,
                tokens.end - 1
            ));
        }
    }
    Ok(Some(pack))
}

/// The start of padding that no mask marks: the last tokens, all of one id, whose positions are all 0
/// (LLaMA-Factory's packs) or count from 0 (axolotl's). If such tokens are supervised they may be a separate
/// sequence, unless several are at position 0.
pub(super) fn counted_padding(
    ids: &[u32],
    given: &Given<'_>,
    learned: impl Fn(usize) -> bool,
) -> Option<usize> {
    let (Some(positions), None, None) = (&given.positions, &given.lengths, &given.numbers) else {
        return None;
    };
    let last = ids.len().checked_sub(1)?;
    if given.attention.is_some_and(|attention| !attention[last]) {
        return None;
    }
    let zeros = (0..ids.len()).rev().take_while(|&i| positions[i] == 0 && ids[i] == ids[last]).count();
    let start = match zeros {
        0 => positions.iter().rposition(|&position| position == 0)?,
        _ => ids.len() - zeros,
    };
    let one_id = ids[start..].iter().all(|&id| id == ids[last]);
    // A row that is a single sequence also begins at position 0.
    (start > 0 && one_id && (zeros > 1 || !(start..ids.len()).any(learned))).then_some(start)
}

/// Lengths that cover all `n` tokens; padding at the end belongs to the last sequence.
fn with_padding(lengths: &[u32], n: usize, real: impl Fn(usize) -> bool) -> Result<Vec<u32>, String> {
    let sum: usize = lengths.iter().map(|&length| length as usize).sum();
    let mut lengths = lengths.to_vec();
    match lengths.last_mut() {
        Some(last) if sum < n && !(sum..n).any(real) => *last += (n - sum) as u32,
        Some(_) if sum == n => {}
        _ => return Err(format!("\"seq_lengths\" sum to {sum}, \"input_ids\" has {n} entries")),
    }
    Ok(lengths)
}

/// Lengths of the runs of equal numbers; padding belongs to the sequence before it.
fn by_number(numbers: &[u32]) -> Result<Vec<u32>, String> {
    let (mut lengths, mut last) = (vec![0u32], 0);
    for (i, &number) in numbers.iter().enumerate() {
        if number != 0 && number != last {
            if number < last {
                return Err(format!("\"attention_mask\"[{i}] goes back from sequence {last} to {number}"));
            }
            if last != 0 {
                lengths.push(0);
            }
            last = number;
        }
        *lengths.last_mut().expect("has one") += 1;
    }
    Ok(lengths)
}

/// Lengths of the runs that start at position 0; padding belongs to the sequence before it.
fn by_position(positions: &[u32], real: impl Fn(usize) -> bool) -> Vec<u32> {
    let (mut lengths, mut begun) = (vec![0u32], false);
    for (i, &position) in positions.iter().enumerate() {
        if real(i) {
            if begun && position == 0 {
                lengths.push(0);
            }
            begun = true;
        }
        *lengths.last_mut().expect("has one") += 1;
    }
    lengths
}

/// Checks that the non-padding tokens of each run have consecutive positions. A run is its first position and
/// its tokens.
fn check_positions(
    positions: &[u32],
    real: impl Fn(usize) -> bool,
    runs: impl Iterator<Item = (u32, Range<usize>)>,
) -> Result<(), String> {
    for (first, tokens) in runs {
        for (i, expected) in tokens.filter(|&i| real(i)).zip(first..) {
            if positions[i] != expected {
                return Err(format!(
                    "\"position_ids\"[{i}] is {}, but token {i} is at position {expected} of its sequence",
                    positions[i]
                ));
            }
        }
    }
    Ok(())
}

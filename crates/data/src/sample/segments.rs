//! The boundaries of a pack: which tokens attend to which.

use crate::RowId;
use std::ops::Range;

/// A run of tokens that does not attend to the rest of its pack, except to its prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Its tokens.
    pub own: Range<u32>,
    /// The tokens of an earlier segment that this one attends to: the shared prompt. Empty if there is none.
    pub prefix: Range<u32>,
    /// For a shared prompt, the number of segments that continue it, one for each row; 0 for other segments.
    pub branches: u32,
}

impl Segment {
    /// A segment that is a whole row.
    pub(crate) fn whole(own: Range<u32>) -> Segment {
        Segment { own, prefix: 0..0, branches: 0 }
    }

    /// The number of rows that contain its tokens.
    pub fn copies(&self) -> u32 {
        self.branches.max(1)
    }

    /// The position of the hidden state that predicts token `i` of the segment; `None` for the first token of a row.
    pub fn predictor(&self, i: u32) -> Option<u32> {
        if i > self.own.start { Some(i - 1) } else { self.prefix.end.checked_sub(1) }
    }

    /// Number of its own tokens: at least one.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u32 {
        self.own.end - self.own.start
    }

    /// Number of tokens of the row: prefix and own.
    pub fn row_len(&self) -> u32 {
        self.len() + (self.prefix.end - self.prefix.start)
    }
}

/// The boundaries of a pack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pack {
    /// The rows, in the order of their responses: one for each segment that is not a shared prompt.
    pub rows: Vec<RowId>,
    /// The segments, which tile the tokens in order.
    pub segments: Vec<Segment>,
}

impl Pack {
    /// A pack of segments of these lengths. `prefixes` has the prefix of each segment: empty, or the tokens of an
    /// earlier segment that has no prefix itself.
    ///
    /// # Errors
    /// A message that names the list and the invalid entry.
    pub fn new(rows: Vec<RowId>, lengths: &[u32], prefixes: Option<&[Range<u32>]>) -> Result<Pack, String> {
        let mut segments: Vec<Segment> = Vec::with_capacity(lengths.len());
        let mut at = 0u32;
        for (i, &length) in lengths.iter().enumerate() {
            let end = at.checked_add(length).filter(|_| length > 0);
            let end = end.ok_or_else(|| format!("\"seq_lengths\"[{i}] is {length}"))?;
            segments.push(Segment::whole(at..end));
            at = end;
        }
        if let Some(found) = prefixes.map(<[_]>::len).filter(|found| *found != lengths.len()) {
            return Err(format!("\"prefix_ranges\" has {found} entries for {} sequences", lengths.len()));
        }
        for (i, prefix) in prefixes.unwrap_or_default().iter().enumerate() {
            if prefix.is_empty() {
                continue;
            }
            // Segments are in token order.
            let trunk = segments[..i].binary_search_by_key(&prefix.start, |s| s.own.start);
            let alone = |&trunk: &usize| segments[trunk].own == *prefix && segments[trunk].prefix.is_empty();
            match trunk.ok().filter(alone) {
                Some(trunk) => {
                    segments[trunk].branches += 1;
                    segments[i].prefix = prefix.clone();
                }
                None => {
                    return Err(format!(
                        "\"prefix_ranges\"[{i}] is {}..{}, which is not an earlier sequence without a prefix",
                        prefix.start, prefix.end
                    ));
                }
            }
        }
        let pack = Pack { rows, segments };
        let (named, found) = (pack.rows.len(), pack.ends().count());
        if named != found {
            return Err(format!("\"rows\" names {named} rows, and the boundaries make {found}"));
        }
        Ok(pack)
    }

    /// The segments that are a row or the end of one, in the order of [`Pack::rows`].
    pub fn ends(&self) -> impl Iterator<Item = &Segment> {
        self.segments.iter().filter(|segment| segment.branches == 0)
    }

    /// The position of each token: restarts with each segment, continues after a prefix.
    pub fn positions(&self) -> Vec<u32> {
        let of = |s: &Segment| s.prefix.end - s.prefix.start..s.row_len();
        self.segments.iter().flat_map(of).collect()
    }

    /// The boundaries after these cuts. A segment without tokens is removed, with its row.
    pub(crate) fn cut(&self, cuts: &[Range<usize>]) -> Pack {
        let kept = |range: &Range<u32>| {
            let before = |i: u32| {
                let cut = |c: &Range<usize>| c.end.min(i as usize).saturating_sub(c.start) as u32;
                i - cuts.iter().map(cut).sum::<u32>()
            };
            before(range.start)..before(range.end)
        };
        let (mut rows, mut segments) = (Vec::new(), Vec::new());
        let mut ids = self.rows.iter();
        for segment in &self.segments {
            let id = if segment.branches == 0 { ids.next() } else { None };
            let prefix = kept(&segment.prefix);
            let cut = Segment {
                own: kept(&segment.own),
                prefix: if prefix.is_empty() { 0..0 } else { prefix },
                branches: segment.branches,
            };
            if !cut.own.is_empty() {
                rows.extend(id.cloned());
                segments.push(cut);
            }
        }
        Pack { rows, segments }
    }

    /// For each row, the indices of its tokens in the pack, in row order.
    pub(crate) fn row_tokens(&self) -> impl Iterator<Item = Vec<usize>> {
        let tokens = |s: &Segment| s.prefix.clone().chain(s.own.clone()).map(|i| i as usize).collect();
        self.ends().map(tokens)
    }
}

//! A record of prepared data, also as a line of JSON.

use crate::sample::{Pack, Segment};
use crate::{Origin, Sample};
use std::fmt::Write as _;
use std::ops::Range;

/// A record of prepared data, in any format. All lists have one entry per token.
#[derive(Clone, Debug, PartialEq)]
pub struct Record<'a> {
    /// The source rows that it was made from.
    pub rows: Rows,
    /// Token ids.
    pub input_ids: &'a [u32],
    /// Labels, not shifted; -100 where masked.
    pub labels: &'a [i32],
    /// The origin of each token.
    pub origins: &'a [Origin],
    /// A loss weight per token; `None` if all are 0 or 1.
    pub weights: Option<&'a [f32]>,
    /// The rendered text.
    pub text: Option<&'a str>,
}

/// The rows of a [`Record`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rows {
    /// A single row: its 0-based number in the source.
    One(u64),
    /// A pack.
    Pack(Boundaries),
}

/// The boundaries of a pack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Boundaries {
    /// The 0-based numbers of the rows, in the order of their responses.
    pub rows: Vec<u64>,
    /// Number of tokens of each segment, in order.
    pub seq_lengths: Vec<u32>,
    /// The position of each token; it restarts with each segment and continues after a shared prefix.
    pub position_ids: Vec<u32>,
    /// The shared prefix of each segment, as a range of the pack's tokens (empty for a segment without one);
    /// `None` if no prompt is shared.
    pub prefix_ranges: Option<Vec<Range<u32>>>,
}

impl Boundaries {
    /// The boundaries of a pack.
    pub fn of(pack: &Pack) -> Boundaries {
        let shares = pack.segments.iter().any(|segment| segment.branches > 0);
        let prefixes = || pack.segments.iter().map(|s| s.prefix.clone()).collect();
        Boundaries {
            rows: pack.rows.iter().map(|id| id.row).collect(),
            seq_lengths: pack.segments.iter().map(Segment::len).collect(),
            position_ids: pack.positions(),
            prefix_ranges: shares.then(prefixes),
        }
    }
}

impl<'a> Record<'a> {
    /// The record of a sample. A pack has no text.
    pub fn of(sample: &'a Sample, text: Option<&'a str>) -> Record<'a> {
        let (rows, text) = match &sample.pack {
            Some(pack) => (Rows::Pack(Boundaries::of(pack)), None),
            None => (Rows::One(sample.id.row), text),
        };
        Record {
            rows,
            input_ids: &sample.input_ids,
            labels: &sample.labels,
            origins: &sample.origins,
            weights: sample.weights.as_deref(),
            text,
        }
    }

    /// Appends the record as a line of JSON, with its line end.
    pub fn write_json(&self, out: &mut Vec<u8>) {
        out.reserve(self.input_ids.len() * 16 + 64);
        match &self.rows {
            Rows::One(row) => {
                out.extend_from_slice(b"{\"row\": ");
                push_integer(out, false, *row);
            }
            Rows::Pack(pack) => {
                out.extend_from_slice(b"{\"rows\": ");
                integers(out, pack.rows.iter().copied());
                out.extend_from_slice(b", \"seq_lengths\": ");
                integers(out, pack.seq_lengths.iter().map(|&n| u64::from(n)));
                out.extend_from_slice(b", \"position_ids\": ");
                integers(out, pack.position_ids.iter().map(|&p| u64::from(p)));
                if let Some(ranges) = &pack.prefix_ranges {
                    out.extend_from_slice(b", \"prefix_ranges\": ");
                    list(out, ranges.iter(), |out, range| {
                        integers(out, [range.start, range.end].into_iter().map(u64::from));
                    });
                }
            }
        }
        out.extend_from_slice(b", \"input_ids\": ");
        integers(out, self.input_ids.iter().map(|&id| u64::from(id)));
        out.extend_from_slice(b", \"labels\": ");
        list(out, self.labels.iter(), |out, &label| {
            push_integer(out, label < 0, u64::from(label.unsigned_abs()));
        });
        out.extend_from_slice(b", \"origins\": \"");
        out.extend(self.origins.iter().map(|o| o.letter() as u8));
        out.push(b'"');
        if let Some(weights) = self.weights {
            out.extend_from_slice(b", \"weights\": ");
            let mut text = String::new();
            list(out, weights.iter(), |out, &weight| {
                // `{}` of an f32 is the shortest text that reads back as the same f32.
                text.clear();
                let _ = write!(text, "{weight}");
                out.extend_from_slice(text.as_bytes());
            });
        }
        if let Some(text) = self.text {
            out.extend_from_slice(b", \"text\": ");
            // Writing a string to memory does not fail.
            let _ = serde_json::to_writer(&mut *out, text);
        }
        out.extend_from_slice(b"}\n");
    }
}

fn integers(out: &mut Vec<u8>, values: impl Iterator<Item = u64>) {
    list(out, values, |out, value| push_integer(out, false, value));
}

fn list<T>(out: &mut Vec<u8>, values: impl Iterator<Item = T>, mut each: impl FnMut(&mut Vec<u8>, T)) {
    out.push(b'[');
    for (i, value) in values.enumerate() {
        if i > 0 {
            out.extend_from_slice(b", ");
        }
        each(out, value);
    }
    out.push(b']');
}

/// Writes a decimal integer. This takes a tenth of the time of `fmt`, which would dominate the writing of a row.
fn push_integer(out: &mut Vec<u8>, negative: bool, mut value: u64) {
    let mut digits = [0u8; 20];
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + (value % 10) as u8;
        value /= 10;
        if value == 0 {
            break;
        }
    }
    if negative {
        out.push(b'-');
    }
    out.extend_from_slice(&digits[at..]);
}

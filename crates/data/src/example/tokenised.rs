//! Tokenised rows.
//!
//! A well-formed row is read directly into the vectors of [`Tokenised`], from Arrow arrays ([`columns`]) or JSON
//! text ([`json`]). The direct readers reject every other row, which is then read as a JSON object by the general
//! [`Reader`]. Only that one has error messages, so the readers cannot disagree about them.

mod columns;
mod fields;
mod json;
#[cfg(test)]
mod tests;

use super::body::{Body, Tokenised};
use super::boundaries::{self, Given};
use super::reader::Reader;
use crate::source::{Content, Projection, RawRow, as_f64, shown};
use crate::{Origin, Result};
use fields::Key;
use serde_json::Value;
use std::sync::Arc;

/// Fields that mark the response; a token is response if all fields that are present mark it.
pub(super) const MASKS: [&str; 2] = ["completion_mask", "assistant_masks"];

/// Known fields with names like those of masks.
pub(super) const KNOWN: [&str; 7] =
    [MASKS[0], MASKS[1], "attention_mask", "weights", "assistant_mask", "loss_mask", "loss_scale"];

/// Reads a well-formed tokenised row; `None` for any other row.
pub(super) fn direct(raw: &RawRow) -> Option<Tokenised> {
    let fields = match raw.content.as_ref().ok()? {
        Content::Columns(batch, row) => columns::read(batch, *row)?,
        Content::Json(row) => json::read(row)?,
        Content::Record(..) => return None,
    };
    fields.tokenised(&raw.id)
}

/// Selects the columns of tokenised rows, if the file has tokenised rows; else all columns.
pub(super) fn projection(text: bool) -> Projection {
    Arc::new(move |names| {
        let has = |key: &str| names.contains(&key);
        let tokenised = has("input_ids") && (has("labels") || MASKS.iter().any(|mask| has(mask)));
        let wanted = |name| match Key::of(name) {
            Some(Key::Text) => text,
            key => key.is_some(),
        };
        names.iter().map(|name| !tokenised || wanted(name)).collect()
    })
}

/// The intersection of both masks, as in TRL; a missing mask is ignored.
fn both(completion: Option<Vec<bool>>, assistant: Option<&[bool]>) -> Option<Vec<bool>> {
    match (completion, assistant) {
        (Some(mut mask), Some(assistant)) => {
            mask.iter_mut().zip(assistant).for_each(|(bit, other)| *bit &= other);
            Some(mask)
        }
        (mask, assistant) => mask.or_else(|| assistant.map(<[bool]>::to_vec)),
    }
}

/// Names of our fields in other programs. A row with both names is refused.
pub(super) const ALIASES: [(&str, &str); 3] =
    [("assistant_mask", MASKS[1]), ("loss_mask", MASKS[0]), ("loss_scale", "weights")];

/// True for a row of ids without labels or masks, and without text in any field.
pub(super) fn is_bare(fields: &serde_json::Map<String, Value>) -> bool {
    fields
        .get("input_ids")
        .is_some_and(|ids| ids.as_array().is_some_and(|ids| !ids.is_empty() && ids.iter().all(Value::is_u64)))
}

impl Reader<'_> {
    pub(super) fn tokenised(mut self) -> Result<Body> {
        for (alias, name) in ALIASES {
            let Some(value) = self.fields.swap_remove(alias).filter(|value| !value.is_null()) else {
                continue;
            };
            if self.fields.get(name).is_some_and(|own| !own.is_null()) {
                return Err(self.error(
                    format!("the row has both {name:?} and {alias:?}, which mean the same"),
                    "leave one of the two columns out",
                ));
            }
            self.fields.insert(name.into(), value);
        }
        let input_ids = match self.list("input_ids")? {
            Some(list) => self
                .integers("input_ids", &list, 0, i64::from(i32::MAX))?
                .into_iter()
                .map(|v| v as u32)
                .collect::<Vec<u32>>(),
            None => {
                return Err(
                    self.error("\"input_ids\" is missing".into(), "tokenised rows need \"input_ids\"")
                );
            }
        };
        if input_ids.is_empty() {
            return Err(self.error("\"input_ids\" is empty".into(), "remove the row"));
        }
        let n = input_ids.len();
        let mut row = Tokenised { input_ids, ..Tokenised::default() };
        if let Some(list) = self.sized("labels", n)? {
            let labels = self.integers("labels", &list, i64::from(i32::MIN), i64::from(i32::MAX))?;
            row.labels = Some(labels.into_iter().map(|v| v as i32).collect());
        }
        let mut mask = |key| match self.sized(key, n)? {
            Some(list) => self.booleans(key, &list).map(Some),
            None => Ok(None),
        };
        let completion = mask(MASKS[0])?;
        row.assistant = mask(MASKS[1])?;
        row.mask = both(completion, row.assistant.as_deref());
        let mut numbers = None;
        if let Some(list) = self.sized("attention_mask", n)? {
            // A mask with values above 1 numbers the sequences of a pack.
            if list.iter().any(|value| value.as_u64().is_some_and(|number| number > 1)) {
                let given = self.unsigned("attention_mask", &list)?;
                row.attention = Some(given.iter().map(|&number| number != 0).collect());
                numbers = Some(given);
            } else {
                row.attention = Some(self.booleans("attention_mask", &list)?);
            }
        }
        self.boundaries(&mut row, numbers)?;
        if let Some(list) = self.sized("weights", n)? {
            let mut weights = Vec::with_capacity(n);
            for (i, value) in list.iter().enumerate() {
                match as_f64(value).and_then(fields::weight) {
                    Some(w) => weights.push(w),
                    None => {
                        return Err(self.error(
                            format!("\"weights\"[{i}] is {}", shown(value)),
                            "weights are finite numbers of 0 or more",
                        ));
                    }
                }
            }
            row.weights = Some(weights);
        }
        if self.fields.get("origins").is_some_and(|v| !v.is_null()) {
            let letters = self.string("origins")?;
            let unknown = letters.chars().find(|letter| Origin::from_letter(*letter).is_none());
            let (None, Some(origins)) = (unknown, fields::origins(&letters)) else {
                return Err(self.error(
                    format!("\"origins\" has the letter {:?}", unknown.unwrap_or_default()),
                    "its letters are B S C K U T O R E and -",
                ));
            };
            if letters.len() != n {
                return Err(self.length("origins", letters.len(), n));
            }
            row.origins = Some(origins);
        }
        if let Some(Value::String(text)) = self.fields.swap_remove("text") {
            row.text = Some(text);
        }
        Ok(Body::Tokenised(Box::new(row)))
    }

    /// Reads the fields that describe boundaries.
    fn boundaries(&mut self, row: &mut Tokenised, numbers: Option<Vec<u32>>) -> Result<()> {
        let n = row.input_ids.len();
        let mut given = Given { numbers, attention: row.attention.as_deref(), ..Given::default() };
        // A field of this name that is not a list of numbers has another meaning.
        let rows = self.fields.swap_remove("rows");
        given.rows = rows.as_ref().and_then(json::numbers);
        if let Some(list) = self.list("seq_lengths")? {
            given.lengths = Some(self.unsigned("seq_lengths", &list)?);
        }
        if let Some(list) = self.sized("position_ids", n)? {
            given.positions = Some(self.unsigned("position_ids", &list)?);
        }
        if let Some(list) = self.list("prefix_ranges")? {
            let range = |(i, value): (usize, &Value)| match value.as_array().map(Vec::as_slice) {
                Some([start, end]) => {
                    let ends = self.unsigned("prefix_ranges", &[start.clone(), end.clone()])?;
                    Ok(ends[0]..ends[1])
                }
                _ => Err(self.error(
                    format!("\"prefix_ranges\"[{i}] is {value}"),
                    "its entries are [first token, token after the last], [0, 0] for none",
                )),
            };
            given.prefixes = Some(list.iter().enumerate().map(range).collect::<Result<_>>()?);
        }
        let padding = fields::unmasked(&row.input_ids, &given, row.labels.as_deref(), row.mask.as_deref());
        let masked = padding.map(|start| (0..n).map(|i| i < start).collect::<Vec<bool>>());
        if masked.is_some() {
            given.attention = masked.as_deref();
        }
        row.counted_padding = padding.filter(|_| row.attention.is_some());
        match boundaries::boundaries(self.id, n, &given) {
            Ok(pack) => row.pack = pack,
            Err(why) => row.broken = Some(why),
        }
        if masked.is_some() {
            row.attention = masked;
        }
        Ok(())
    }
}

//! Matches each row of tokens to its source row, by a column that both have.

use crate::source::{Row, Source, shown};
use crate::{Error, Result, RowId};
use serde_json::Value;
use std::collections::HashMap;
use std::sync::Arc;

/// The source rows of rows of tokens, matched by the ids in a column of both.
#[derive(Debug)]
pub struct Pairing {
    column: String,
    /// For each row of tokens, what its ids refer to: one entry, or one for each sequence of a pack.
    rows: Vec<Vec<Named>>,
}

/// What an id refers to.
#[derive(Debug)]
pub(super) enum Named {
    /// The source row of this number.
    Row(u64),
    /// No source row has this id.
    Nothing(Box<str>),
}

/// Usual names of such a column, tried if none is given.
const USUAL: [&str; 5] = ["id", "row_id", "example_id", "uid", "uuid"];

impl Pairing {
    /// The first usual name of an id column that the first rows of both sources have.
    ///
    /// # Errors
    /// As [`Source::next_row`].
    pub fn usual_column(mut rows: Source, mut source: Source) -> Result<Option<&'static str>> {
        let first = |source: &mut Source| -> Result<_> {
            Ok(source.next_row()?.and_then(|raw| Row::parse(raw).ok()))
        };
        let (Some(row), Some(other)) = (first(&mut rows)?, first(&mut source)?) else { return Ok(None) };
        let has = |row: &Row, name: &str| row.fields.get(name).is_some_and(|value| !texts(value).is_empty());
        Ok(USUAL.into_iter().find(|name| has(&row, name) && has(&other, name)))
    }

    /// Pairs rows of tokens with source rows by a column that both have. An id is a text or a number; a pack may
    /// have a list of ids, one for each of its sequences.
    ///
    /// # Errors
    /// [`Error::Row`] for a row without an id, and for one whose id occurs in another row of the same data; and as
    /// [`Source::next_row`].
    pub fn by(column: &str, rows: Source, source: Source) -> Result<Pairing> {
        let mut numbers = HashMap::new();
        for_each(column, source, |id, ids| match ids.as_slice() {
            [] => Ok(()),
            [one] => unique(column, &mut numbers, id, one),
            _ => Err(Error::row(
                id.clone(),
                format!("its {column:?} is a list of {} ids, and a source row has one", ids.len()),
                remedy(),
            )),
        })?;
        let (mut seen, mut pairs) = (HashMap::new(), Vec::new());
        for_each(column, rows, |id, ids| {
            ids.iter().try_for_each(|text| unique(column, &mut seen, id, text))?;
            let named = |text: String| match numbers.get(&text) {
                Some(row) => Named::Row(*row),
                None => Named::Nothing(text.into()),
            };
            pairs.push(ids.into_iter().map(named).collect());
            Ok(())
        })?;
        Ok(Pairing { column: column.to_string(), rows: pairs })
    }

    /// The column.
    pub fn column(&self) -> &str {
        &self.column
    }

    /// What the id of a row, or of a sequence of a pack, refers to; `None` for a sequence of a pack that has a
    /// single id, and for a row that has a list of ids.
    pub(super) fn named(&self, row: u64, sequence: Option<usize>) -> Option<&Named> {
        let ids = self.rows.get(usize::try_from(row).ok()?)?;
        match (sequence, ids.as_slice()) {
            (None, [one]) => Some(one),
            (Some(nth), [_, _, ..]) => ids.get(nth),
            _ => None,
        }
    }
}

/// Calls `with` for each row's ids; a row that cannot be read has none.
fn for_each(
    column: &str,
    mut source: Source,
    mut with: impl FnMut(&RowId, Vec<String>) -> Result<()>,
) -> Result<()> {
    let wanted = column.to_string();
    source.project(Arc::new(move |names| {
        let all = !names.contains(&wanted.as_str());
        names.iter().map(|name| all || *name == wanted).collect()
    }));
    while let Some(raw) = source.next_row()? {
        let id = raw.id.clone();
        // Unreadable rows are reported by the audit.
        let Ok(Row { fields, .. }) = Row::parse(raw) else {
            with(&id, Vec::new())?;
            continue;
        };
        let ids = fields.get(column).map(texts).unwrap_or_default();
        if ids.is_empty() {
            let what = match fields.get(column) {
                None => format!("the row has no {column:?}, which pairs rows with source rows"),
                Some(value) => format!("its {column:?} is {}, and ids are texts or numbers", shown(value)),
            };
            return Err(Error::row(id, what, remedy()));
        }
        with(&id, ids)?;
    }
    Ok(())
}

/// The ids of a value as texts; none if it is not a text, a number or a list of these. A whole number is the same
/// with and without a decimal point: pandas writes 7 as 7.0 in a column with missing values.
fn texts(value: &Value) -> Vec<String> {
    let one = |value: &Value| match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => {
            let whole = number.as_f64().filter(|x| number.is_f64() && x.fract() == 0.0 && x.abs() < 1e15);
            Some(whole.map_or_else(|| number.to_string(), |x| format!("{x:.0}")))
        }
        _ => None,
    };
    match value {
        Value::Array(list) => list.iter().map(one).collect::<Option<_>>().unwrap_or_default(),
        other => one(other).into_iter().collect(),
    }
}

/// Records the row of an id.
fn unique(column: &str, rows: &mut HashMap<String, u64>, id: &RowId, text: &str) -> Result<()> {
    match rows.insert(text.to_string(), id.row) {
        None => Ok(()),
        Some(first) => Err(Error::row(
            id.clone(),
            format!(
                "its {column:?} is {text:?}, as that of row {first}: ids pair rows only where each is there once"
            ),
            remedy(),
        )),
    }
}

fn remedy() -> &'static str {
    "pair by a column whose ids are unique in both, --id COLUMN, or by the order of the rows, --by-order"
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn ids_are_texts_or_numbers() {
        assert_eq!(texts(&json!("a")), ["a"]);
        assert_eq!(texts(&json!(7)), ["7"]);
        assert_eq!(texts(&json!(7.0)), ["7"]);
        assert_eq!(texts(&json!(["a", 7])), ["a", "7"]);
        for none in [json!(null), json!({"a": 1}), json!([1, null]), json!([]), json!(true)] {
            assert_eq!(texts(&none), [""; 0], "{none}");
        }
    }
}

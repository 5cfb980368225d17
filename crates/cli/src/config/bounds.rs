//! The values of its type that a key may have: one description that checks, documents and makes the schema.

use serde_json::{Value as Json, json};

/// Bounds of a key. They concern numbers and texts; null, where the type has it, is always within.
#[derive(Clone, Copy, Debug)]
pub enum Bounds {
    /// Every value.
    None,
    /// Numbers from here on.
    AtLeast(f64),
    /// Numbers from the first on, and the second.
    AtLeastOr(f64, f64),
    /// Numbers above.
    Above(f64),
    /// Numbers between, both included.
    FromTo(f64, f64),
    /// Numbers from the first to below the second.
    FromBelow(f64, f64),
    /// A day of the calendar as YYYY-MM-DD.
    Date,
    /// Every value, with a remark.
    Note(&'static str),
}

impl Bounds {
    /// What is expected of a value: its type's phrase with the bounds.
    pub fn phrase(self, of_type: String) -> String {
        let bounds = match self {
            Bounds::None => return of_type,
            Bounds::AtLeast(low) => format!("at least {low}"),
            Bounds::AtLeastOr(low, other) => format!("at least {low}, or {other}"),
            Bounds::Above(low) => format!("more than {low}"),
            Bounds::FromTo(low, high) => format!("from {low} to {high}"),
            Bounds::FromBelow(low, high) => format!("from {low} to below {high}"),
            Bounds::Date => "as YYYY-MM-DD".into(),
            Bounds::Note(note) => note.into(),
        };
        format!("{of_type}, {bounds}")
    }

    /// True where a value, as it is printed, is within.
    pub fn holds(self, value: &Json) -> bool {
        if let (Bounds::Date, Some(text)) = (self, value.as_str()) {
            return text
                .parse::<jiff::civil::Date>()
                .is_ok_and(|date| date.year() > 0 && date.to_string() == text);
        }
        let Some(number) = value.as_f64() else { return true };
        match self {
            Bounds::None | Bounds::Date | Bounds::Note(_) => true,
            Bounds::AtLeast(low) => number >= low,
            Bounds::AtLeastOr(low, other) => number >= low || number == other,
            Bounds::Above(low) => number > low,
            Bounds::FromTo(low, high) => (low..=high).contains(&number),
            Bounds::FromBelow(low, high) => (low..high).contains(&number),
        }
    }

    /// The type's JSON Schema with the bounds. Keywords for numbers do not concern null.
    pub fn schema(self, of_type: Json) -> Json {
        let keywords = match self {
            Bounds::None | Bounds::Note(_) => json!({}),
            Bounds::AtLeast(low) => json!({ "minimum": low }),
            Bounds::AtLeastOr(low, other) => json!({ "anyOf": [{ "minimum": low }, { "const": other }] }),
            Bounds::Above(low) => json!({ "exclusiveMinimum": low }),
            Bounds::FromTo(low, high) => json!({ "minimum": low, "maximum": high }),
            Bounds::FromBelow(low, high) => json!({ "minimum": low, "exclusiveMaximum": high }),
            Bounds::Date => json!({ "format": "date", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$" }),
        };
        let mut schema = of_type;
        if let (Json::Object(schema), Json::Object(keywords)) = (&mut schema, keywords) {
            schema.extend(keywords);
        }
        schema
    }
}

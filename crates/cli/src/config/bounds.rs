//! The values of its type that a key may have: one description that checks, documents and makes the schema.

use super::value::{NOT_NEGATIVE, OR_NULL};
use serde_json::{Value as Json, json};
use suasion_train::settings::{self, Range};

/// Bounds of a key. They concern numbers and texts; null, where the type has it, is always within.
#[derive(Clone, Copy, Debug)]
pub enum Bounds {
    /// Those that the training loop has for the setting of this name, if any.
    Setting(&'static str),
    /// Numbers of a range.
    Within(Range),
    /// Numbers of a range, and another number.
    WithinOr(Range, f64),
    /// Every name of the type but this one.
    Without(&'static str),
    /// A day of the calendar as YYYY-MM-DD.
    Date,
    /// Every value, with a remark.
    Note(&'static str),
}

impl Bounds {
    /// The numbers of a range, for a key that has one.
    fn range(self) -> Option<Range> {
        match self {
            Bounds::Setting(name) => settings::KEYS.iter().find(|key| key.name == name)?.range,
            Bounds::Within(range) | Bounds::WithinOr(range, _) => Some(range),
            Bounds::Without(_) | Bounds::Date | Bounds::Note(_) => None,
        }
    }

    /// What is expected of a value: its type's phrase with the bounds.
    pub fn phrase(self, of_type: String) -> String {
        let bounds = match (self, self.range()) {
            (Bounds::WithinOr(range, other), _) => format!("{range}, or {other}"),
            (_, Some(range)) => range.to_string(),
            (Bounds::Without(name), _) => return of_type.replace(&format!(", {name}"), ""),
            (Bounds::Date, _) => "as YYYY-MM-DD".into(),
            (Bounds::Note(note), _) => note.into(),
            _ => return of_type,
        };
        // `a whole number, not negative, or null` becomes `a whole number, at least 2, or null`.
        let (of_type, null) = match of_type.strip_suffix(OR_NULL) {
            Some(of_type) => (of_type, OR_NULL),
            None => (of_type.as_str(), ""),
        };
        format!("{}, {bounds}{null}", of_type.trim_end_matches(NOT_NEGATIVE))
    }

    /// True if a value, as it is printed, is within.
    pub fn holds(self, value: &Json) -> bool {
        match (self, value.as_str(), value.as_f64()) {
            (Bounds::Date, Some(text), _) => text
                .parse::<jiff::civil::Date>()
                .is_ok_and(|date| date.year() > 0 && date.to_string() == text),
            (Bounds::Without(name), Some(text), _) => name != text,
            (Bounds::WithinOr(range, other), _, Some(number)) => range.holds(number) || number == other,
            (_, _, Some(number)) => self.range().is_none_or(|range| range.holds(number)),
            _ => true,
        }
    }

    /// The type's JSON Schema with the bounds. Keywords for numbers do not concern null.
    pub fn schema(self, of_type: Json) -> Json {
        let keywords = match (self, self.range()) {
            (Bounds::WithinOr(range, other), _) => json!({ "anyOf": [keywords(range), { "const": other }] }),
            (_, Some(range)) => keywords(range),
            (Bounds::Date, _) => json!({ "format": "date", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$" }),
            _ => json!({}),
        };
        let mut schema = of_type;
        if let (Bounds::Without(name), Some(Json::Array(names))) = (self, schema.get_mut("enum")) {
            names.retain(|of_type| of_type != name);
        }
        if let (Json::Object(schema), Json::Object(keywords)) = (&mut schema, keywords) {
            schema.extend(keywords);
        }
        schema
    }
}

fn keywords(range: Range) -> Json {
    match range {
        Range::AtLeast(low) => json!({ "minimum": low }),
        Range::FromBelow(low, high) => json!({ "minimum": low, "exclusiveMaximum": high }),
        Range::FromTo(low, high) => json!({ "minimum": low, "maximum": high }),
        Range::AboveTo(low, high) => json!({ "exclusiveMinimum": low, "maximum": high }),
        Range::WholeOrShare(high) => json!({ "anyOf": [
            { "minimum": 0, "exclusiveMaximum": 1 },
            { "type": "integer", "minimum": 1, "maximum": high },
        ] }),
        Range::StepsOrShare(high) => json!({ "anyOf": [
            { "exclusiveMinimum": 0, "exclusiveMaximum": 1 },
            { "type": "integer", "minimum": 1, "maximum": high },
        ] }),
    }
}

//! Types of configuration values: how each is read from YAML, TOML or `--set`, and printed.

use crate::paths::expanded;
use indexmap::IndexMap;
use serde_json::{Value as Json, json};
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use suasion_data::Objective;
use suasion_train::Interval;

/// Ends the phrase of a type that has null.
pub const OR_NULL: &str = ", or null";

/// Ends the phrase of whole numbers without a sign; bounds take its place.
pub const NOT_NEGATIVE: &str = ", not negative";

/// A type that a configuration key can have.
pub trait Value: Sized {
    /// What is accepted, as a phrase that follows "expected".
    fn expected() -> String;

    /// A JSON Schema of the values, as a file should have them; more spellings are read.
    fn schema() -> Json;

    /// Reads a parsed value; `None` if it is not of this type.
    fn from_json(json: &Json) -> Option<Self>;

    /// Reads the text after `--set key=`. Keys of type text take it verbatim, so that
    /// `section_markers.TASK=[ASK]` and a path with a colon need no quotes; for other keys it is a YAML
    /// scalar or flow collection.
    fn from_text(text: &str) -> Option<Self> {
        Self::from_json(&serde_saphyr::from_str::<Json>(text).ok()?)
    }

    /// The value as it is printed and saved; reads back to the same value.
    fn to_json(&self) -> Json;

    /// Sets one entry of a mapping (`loss_weights.system=0.1`); `None` if the type is not a mapping.
    fn set_entry(&mut self, _entry: &str, _text: &str) -> Option<Result<(), String>> {
        None
    }
}

/// Text of a scalar: YAML reads `1e3` and `no` as numbers and booleans where a name was meant.
fn scalar_text(json: &Json) -> Option<String> {
    match json {
        Json::String(text) => Some(text.clone()),
        Json::Number(number) => Some(number.to_string()),
        Json::Bool(flag) => Some(flag.to_string()),
        _ => None,
    }
}

/// `--set key="quoted"` means what is inside the quotes.
pub fn unquoted(text: &str) -> &str {
    let text = text.trim();
    for quote in ['"', '\''] {
        if let Some(inner) = text.strip_prefix(quote).and_then(|rest| rest.strip_suffix(quote)) {
            return inner;
        }
    }
    text
}

fn is_null(text: &str) -> bool {
    // Python users write None; YAML users null or ~.
    matches!(text.trim(), "" | "null" | "Null" | "NULL" | "~" | "None" | "none")
}

/// A quoted or Python-style truth value is one too.
fn truth(json: &Json) -> Option<bool> {
    match json {
        Json::Bool(flag) => Some(*flag),
        Json::String(text) if text.eq_ignore_ascii_case("true") => Some(true),
        Json::String(text) if text.eq_ignore_ascii_case("false") => Some(false),
        _ => None,
    }
}

/// `1e3`, `"1e-4"` (PyYAML reads an exponent without a dot as text, so such files are common) and plain
/// numbers.
fn number(json: &Json) -> Option<f64> {
    match json {
        Json::Number(number) => number.as_f64(),
        Json::String(text) => text.trim().parse().ok(),
        _ => None,
    }
    .filter(|number: &f64| number.is_finite())
}

fn whole(json: &Json) -> Option<i64> {
    match json {
        Json::Number(number) if !number.is_f64() => number.as_i64(),
        // 2.0 and 1e3 are whole numbers too; 0.5 is not.
        _ => number(json).filter(|n| n.fract() == 0.0 && n.abs() < 9e15).map(|n| n as i64),
    }
}

/// Types of one scalar: what is expected, the schema, how it is read, and how it is written.
macro_rules! scalars {
    ($($type:ty: $expected:expr, $schema:expr, |$json:ident| $read:expr, |$value:ident| $written:expr;)*) => { $(
        impl Value for $type {
            fn expected() -> String {
                $expected.into()
            }

            fn schema() -> Json {
                $schema
            }

            fn from_json($json: &Json) -> Option<$type> {
                $read
            }

            fn to_json(&self) -> Json {
                let $value = self;
                $written
            }
        }
    )* };
}

scalars! {
    bool: "true or false", json!({ "type": "boolean" }), |json| truth(json), |flag| Json::Bool(*flag);
    f64: "a number", json!({ "type": "number" }), |json| number(json), |number| Json::from(*number);
    Interval: f64::expected(), f64::schema(), |json| number(json).map(Interval), |interval| json!(interval);
    f32: f64::expected(), f64::schema(),
        |json| number(json).map(|number| number as f32).filter(|number| number.is_finite()),
        // The shortest decimal that reads back: 0.1, not 0.10000000149011612.
        |number| format!("{number:?}").parse().map_or(Json::Null, Json::Number);
    i64: "a whole number", json!({ "type": "integer" }), |json| whole(json), |number| Json::from(*number);
    usize: format!("a whole number{NOT_NEGATIVE}"), json!({ "type": "integer", "minimum": 0 }),
        |json| whole(json).and_then(|n| usize::try_from(n).ok()), |number| Json::from(*number);
    // Seeds may use all 64 bits.
    u64: usize::expected(), usize::schema(),
        |json| json.as_u64().or_else(|| u64::try_from(whole(json)?).ok()), |number| Json::from(*number);
    // `completion_only_loss`: true trains on responses, false on all tokens; null is true, the default.
    Objective: Option::<bool>::expected(), Option::<bool>::schema(),
        |json| match Option::<bool>::from_json(json)?.unwrap_or(true) {
            true => Some(Objective::ResponseOnly),
            false => Some(Objective::AllTokens),
        },
        |objective| Json::Bool(*objective == Objective::ResponseOnly);
}

impl Value for String {
    fn expected() -> String {
        "text".into()
    }

    fn schema() -> Json {
        json!({ "type": "string" })
    }

    fn from_json(json: &Json) -> Option<String> {
        scalar_text(json)
    }

    fn from_text(text: &str) -> Option<String> {
        Some(unquoted(text).to_string())
    }

    fn to_json(&self) -> Json {
        Json::from(self.as_str())
    }
}

impl Value for PathBuf {
    fn expected() -> String {
        "a path".into()
    }

    fn schema() -> Json {
        json!({ "type": "string", "minLength": 1 })
    }

    fn from_json(json: &Json) -> Option<PathBuf> {
        scalar_text(json).filter(|text| !text.is_empty()).map(expanded)
    }

    fn from_text(text: &str) -> Option<PathBuf> {
        Some(unquoted(text)).filter(|text| !text.is_empty()).map(expanded)
    }

    fn to_json(&self) -> Json {
        Json::from(self.to_string_lossy())
    }
}

/// One path, or several that belong together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths(pub Vec<PathBuf>);

impl From<PathBuf> for Paths {
    fn from(path: PathBuf) -> Paths {
        Paths(vec![path])
    }
}

impl fmt::Display for Paths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.0.iter().map(|path| path.to_string_lossy()).collect();
        f.write_str(&names.join(", "))
    }
}

impl Value for Paths {
    fn expected() -> String {
        "a path, or a list of them".into()
    }

    fn schema() -> Json {
        json!({ "anyOf": [PathBuf::schema(), { "type": "array", "items": PathBuf::schema(), "minItems": 1 }] })
    }

    fn from_json(json: &Json) -> Option<Paths> {
        match json {
            Json::Array(items) if !items.is_empty() => {
                items.iter().map(PathBuf::from_json).collect::<Option<_>>().map(Paths)
            }
            Json::Array(_) => None,
            _ => PathBuf::from_json(json).map(Paths::from),
        }
    }

    fn from_text(text: &str) -> Option<Paths> {
        // `[a, b]` is a list; anything else, `shards/[0-9].jsonl` too, is one path, verbatim.
        let text = text.trim();
        if text.starts_with('[') && text.ends_with(']') {
            Self::from_json(&serde_saphyr::from_str::<Json>(text).ok()?)
        } else {
            PathBuf::from_text(text).map(Paths::from)
        }
    }

    fn to_json(&self) -> Json {
        match self.0.as_slice() {
            [one] => one.to_json(),
            several => several.iter().map(PathBuf::to_json).collect(),
        }
    }
}

impl<T: Value> Value for Option<T> {
    fn expected() -> String {
        format!("{}{OR_NULL}", T::expected())
    }

    fn schema() -> Json {
        let mut schema = T::schema();
        match schema.get_mut("type") {
            Some(of) => {
                *of = json!([of, "null"]);
                schema
            }
            None => json!({ "anyOf": [schema, { "type": "null" }] }),
        }
    }

    fn from_json(json: &Json) -> Option<Option<T>> {
        match json {
            Json::Null => Some(None),
            Json::String(text) if text == "None" => Some(None),
            _ => T::from_json(json).map(Some),
        }
    }

    fn from_text(text: &str) -> Option<Option<T>> {
        if is_null(text) { Some(None) } else { T::from_text(text).map(Some) }
    }

    fn to_json(&self) -> Json {
        self.as_ref().map_or(Json::Null, T::to_json)
    }
}

impl Value for Vec<String> {
    fn expected() -> String {
        "a list of texts".into()
    }

    fn schema() -> Json {
        json!({ "type": ["array", "string", "null"], "items": String::schema() })
    }

    fn from_json(json: &Json) -> Option<Vec<String>> {
        match json {
            Json::Null => Some(Vec::new()),
            Json::Array(items) => items.iter().map(scalar_text).collect(),
            _ => scalar_text(json).map(|one| vec![one]),
        }
    }

    fn from_text(text: &str) -> Option<Vec<String>> {
        let text = text.trim();
        // `[a, b]` is a list; anything else (`<|im_end|>`, which is not valid YAML) is one entry, verbatim.
        if text.starts_with('[') && text.ends_with(']') {
            Self::from_json(&serde_saphyr::from_str::<Json>(text).ok()?)
        } else if is_null(text) {
            Some(Vec::new())
        } else {
            Some(vec![unquoted(text).to_string()])
        }
    }

    fn to_json(&self) -> Json {
        Json::from(self.as_slice())
    }
}

impl Value for Vec<usize> {
    fn expected() -> String {
        "a list of whole numbers".into()
    }

    fn schema() -> Json {
        json!({ "type": ["array", "integer", "null"], "items": usize::schema(), "minimum": 0 })
    }

    fn from_json(json: &Json) -> Option<Vec<usize>> {
        match json {
            Json::Null => Some(Vec::new()),
            Json::Array(items) => items.iter().map(usize::from_json).collect(),
            one => usize::from_json(one).map(|one| vec![one]),
        }
    }

    fn to_json(&self) -> Json {
        Json::from(self.as_slice())
    }
}

/// A value of any type, for a template's variable: YAML where it is valid YAML, else text.
impl Value for Json {
    fn expected() -> String {
        "any value".into()
    }

    fn schema() -> Json {
        json!({})
    }

    fn from_json(json: &Json) -> Option<Json> {
        Some(json.clone())
    }

    fn from_text(text: &str) -> Option<Json> {
        Some(serde_saphyr::from_str::<Json>(text).unwrap_or_else(|_| Json::from(text)))
    }

    fn to_json(&self) -> Json {
        self.clone()
    }
}

/// Mappings: sorted, or in the order in which they were written.
macro_rules! mapping {
    ($($map:ident),*) => { $(impl<T: Value> Value for $map<String, T> {
    fn expected() -> String {
        format!("a mapping from names to {}", T::expected())
    }

    fn schema() -> Json {
        json!({ "type": ["object", "null"], "additionalProperties": T::schema() })
    }

    fn from_json(json: &Json) -> Option<Self> {
        match json {
            Json::Null => Some($map::new()),
            Json::Object(map) => map.iter().map(|(k, v)| Some((k.clone(), T::from_json(v)?))).collect(),
            _ => None,
        }
    }

    fn to_json(&self) -> Json {
        Json::Object(self.iter().map(|(k, v)| (k.clone(), v.to_json())).collect())
    }

    fn set_entry(&mut self, entry: &str, text: &str) -> Option<Result<(), String>> {
        Some(match T::from_text(text) {
            Some(value) => {
                self.insert(entry.to_string(), value);
                Ok(())
            }
            None => Err(T::expected()),
        })
    }
})* };
}

mapping!(BTreeMap, IndexMap);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_verbatim_and_numbers_may_be_quoted() {
        assert_eq!(String::from_text("[ASK]").unwrap(), "[ASK]");
        assert_eq!(String::from_text("\"a b\"").unwrap(), "a b");
        assert_eq!(f64::from_text("1e-4"), Some(1e-4));
        assert_eq!(f64::from_json(&Json::from("2e-5")), Some(2e-5));
        assert_eq!(f64::from_text(".inf"), None);
        assert_eq!(usize::from_text("1e3"), Some(1000));
        assert_eq!(usize::from_text("1.5"), None);
        assert_eq!(usize::from_text("-1"), None);
        assert_eq!(u64::from_text("18446744073709551615"), Some(u64::MAX));
    }

    #[test]
    fn null_has_the_spellings_of_yaml_and_python() {
        for text in ["null", "None", "~", ""] {
            assert_eq!(Option::<usize>::from_text(text), Some(None), "{text:?}");
        }
        assert_eq!(Option::<usize>::from_text("7"), Some(Some(7)));
        assert_eq!(Option::<usize>::from_text("seven"), None);
    }

    #[test]
    fn lists_take_one_verbatim_entry_or_a_flow_sequence() {
        assert_eq!(Vec::<String>::from_text("<|im_end|>").unwrap(), ["<|im_end|>"]);
        assert_eq!(Vec::<String>::from_text("[a, 'b c']").unwrap(), ["a", "b c"]);
    }

    #[test]
    fn paths_are_one_or_a_list() {
        let one = Paths::from(PathBuf::from("shards/[0-9].jsonl"));
        assert_eq!(Paths::from_text("shards/[0-9].jsonl").unwrap(), one);
        assert_eq!(one.to_json(), "shards/[0-9].jsonl");
        let several = Paths(vec!["a.jsonl".into(), "b c.csv".into()]);
        assert_eq!(Paths::from_text("[a.jsonl, 'b c.csv']").unwrap(), several);
        assert_eq!(Paths::from_json(&several.to_json()).unwrap(), several);
        assert_eq!(Paths::from_json(&Json::Array(Vec::new())), None);
    }

    #[test]
    fn mappings_take_entries() {
        let mut weights: BTreeMap<String, f64> = BTreeMap::new();
        assert_eq!(weights.set_entry("system", "0.1"), Some(Ok(())));
        assert_eq!(weights["system"], 0.1);
        assert!(weights.set_entry("system", "much").unwrap().is_err());
        assert!(3usize.set_entry("x", "1").is_none());
    }
}

//! JSON as Python reads it: integers of any size, `NaN` and `Infinity`.
//!
//! A [`Value`] cannot hold such numbers. They become an object with one private key, `{KEY: "<digits>"}`: readers
//! of numbers refuse it, and templates get the number ([`number`]).

use serde_json::{Map, Value};

/// The key of the object that represents a number.
const KEY: &str = "$suasion::number";

/// The text of a number that a [`Value`] cannot hold, as Python writes it in JSON: the digits of an integer,
/// `NaN`, `Infinity` or `-Infinity`. `None` for every other value.
pub fn number(value: &Value) -> Option<&str> {
    value.as_object().and_then(number_of)
}

/// As [`number`], for an object.
pub fn number_of(map: &Map<String, Value>) -> Option<&str> {
    let text = map.get(KEY)?.as_str().filter(|_| map.len() == 1)?;
    let digits = text.strip_prefix('-').unwrap_or(text);
    let whole = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    (whole || matches!(text, "NaN" | "Infinity" | "-Infinity")).then_some(text)
}

/// As [`Value::as_f64`], also for these numbers.
pub fn as_f64(value: &Value) -> Option<f64> {
    value.as_f64().or_else(|| number(value)?.parse().ok())
}

/// A value for messages.
pub fn shown(value: &Value) -> String {
    number(value).map_or_else(|| value.to_string(), str::to_string)
}

/// The value for a number that is not finite.
pub(super) fn not_finite(value: f64) -> Value {
    let text = match value {
        x if x.is_nan() => "NaN",
        x if x < 0.0 => "-Infinity",
        _ => "Infinity",
    };
    carrier(text)
}

fn carrier(text: &str) -> Value {
    Value::Object(Map::from_iter([(KEY.to_string(), text.into())]))
}

/// A JSON value, also with the numbers that Python reads and writes in addition to JSON's.
///
/// # Errors
/// As [`serde_json::from_str`], with the byte offset of the error.
pub fn parse(text: &str) -> Result<Value, (usize, serde_json::Error)> {
    match serde_json::from_str::<Value>(text) {
        Ok(value) if !is_rounded(&value) => Ok(value),
        strict => {
            let (strict_json, moved) = rewritten(text);
            match (serde_json::from_str(&strict_json), strict) {
                (Ok(value), _) => Ok(value),
                (Err(_), Ok(value)) => Ok(value),
                (Err(error), Err(_)) => {
                    let at = match error.is_eof() {
                        true => strict_json.len(),
                        false => byte_of(&strict_json, error.line(), error.column()),
                    };
                    // A rewritten number is longer than the original.
                    let before = moved.iter().take_while(|(end, _)| *end <= at).last();
                    Err((at - before.map_or(0, |(_, longer)| *longer), error))
                }
            }
        }
    }
}

/// The 0-based byte offset of serde_json's 1-based line and column.
fn byte_of(text: &str, line: usize, column: usize) -> usize {
    let start: usize = text.split_inclusive('\n').take(line.saturating_sub(1)).map(str::len).sum();
    (start + column.saturating_sub(1)).min(text.len())
}

/// True if the value contains a float that may have been an integer in the text: one beyond 64 bits, or `-0`.
fn is_rounded(value: &Value) -> bool {
    match value {
        Value::Number(n) if n.is_f64() => {
            n.as_f64().is_some_and(|x| x.abs() >= 9e18 || x == 0.0 && x.is_sign_negative())
        }
        Value::Array(list) => list.iter().any(is_rounded),
        Value::Object(map) => map.values().any(is_rounded),
        _ => false,
    }
}

/// The text with every such number replaced; and for each, its end in the new text, and by how much the new text
/// up to there is longer than the old one.
fn rewritten(text: &str) -> (String, Vec<(usize, usize)>) {
    let bytes = text.as_bytes();
    let mut out = String::with_capacity(text.len() + 64);
    let (mut moved, mut longer) = (Vec::new(), 0);
    let (mut at, mut copied) = (0, 0);
    while at < bytes.len() {
        match bytes[at] {
            b'"' => {
                at += 1;
                while at < bytes.len() && bytes[at] != b'"' {
                    at += 1 + usize::from(bytes[at] == b'\\');
                }
                at += 1;
            }
            b'N' | b'I' | b'-' | b'0'..=b'9' => {
                let is_part = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'+' | b'.');
                let end = at + bytes[at..].iter().take_while(|b| is_part(b)).count();
                if let Some(new) = beyond(&text[at..end]) {
                    out.push_str(&text[copied..at]);
                    out.push_str(&new);
                    longer += new.len().saturating_sub(end - at);
                    moved.push((out.len(), longer));
                    copied = end;
                }
                at = end;
            }
            _ => at += 1,
        }
    }
    out.push_str(&text[copied..]);
    (out, moved)
}

/// Strict JSON for a number that a [`Value`] cannot hold; `None` for anything else.
fn beyond(token: &str) -> Option<String> {
    let stand_in = |text: &str| Some(carrier(text).to_string());
    let digits = token.strip_prefix('-').unwrap_or(token);
    match token {
        "NaN" | "Infinity" | "-Infinity" => stand_in(token),
        "-0" => Some("0 ".into()),
        _ if !digits.starts_with(|c: char| c.is_ascii_digit()) => None,
        _ if digits.bytes().all(|b| b.is_ascii_digit()) => {
            let fits = token.parse::<i64>().is_ok() || token.parse::<u64>().is_ok();
            let leading_zero = digits.len() > 1 && digits.starts_with('0');
            if fits || leading_zero { None } else { stand_in(token) }
        }
        _ => match token.parse::<f64>() {
            Ok(x) if x.is_infinite() => Some(not_finite(x).to_string()),
            _ => None,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// The values that Python's `json.loads` returns for the texts.
    #[test]
    fn numbers_are_those_of_python() {
        let value = parse(
            r#"{"a": NaN, "b": [-Infinity, 123456789012345678901234567890, -0, 1e999], "c": "NaN -0"}"#,
        )
        .unwrap();
        assert_eq!(number(&value["a"]), Some("NaN"));
        assert_eq!(number(&value["b"][0]), Some("-Infinity"));
        assert_eq!(number(&value["b"][1]), Some("123456789012345678901234567890"));
        assert_eq!(value["b"][2], json!(0));
        assert_eq!(number(&value["b"][3]), Some("Infinity"));
        assert_eq!(value["c"], "NaN -0");
        // Floats stay floats, and 64-bit integers are unchanged.
        for text in ["1e30", "-0.0", "18446744073709551615", "-9223372036854775808", "1.5"] {
            assert_eq!(parse(text).unwrap(), serde_json::from_str::<Value>(text).unwrap());
        }
        assert_eq!(number(&json!({"a": "12"})), None);
        assert_eq!(number(&json!({KEY: "12x"})), None);
    }

    #[test]
    fn errors_name_the_byte_of_the_text() {
        let text = r#"{"a": NaN, "b": nan}"#;
        assert_eq!(parse(text).unwrap_err().0, text.find("nan").unwrap() + 1);
        for text in ["-", "01", "-Infinit", "NaNs", "1.", "[-0", "00000000000000000000000"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}

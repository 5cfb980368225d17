//! Values formatted as Python formats them (`str`, `repr`, `json.dumps`), and Python's idea of white space.

use minijinja::value::{Object, ObjectRepr, Tuple, ValueKind};
use minijinja::{Error, ErrorKind, Value};
use std::collections::HashSet;
use std::fmt::{self, Write};
use std::ops::Range;
use std::sync::Arc;

/// Maximum nesting of a value; a deeper one is an error.
const DEPTH: usize = 100;

/// The error of an operation that Python or Jinja refuses, or that exceeds a limit.
pub(super) fn bad(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

/// The characters that `str.strip` removes: Unicode white space and four separators.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// The range of a text without the white space at its ends: the result of `str.strip()`.
pub(super) fn core(text: &str) -> Range<usize> {
    let rest = strip(text, None, true, false);
    let start = text.len() - rest.len();
    start..start + strip(rest, None, false, true).len()
}

/// `str.strip(chars)`, `lstrip`, `rstrip`.
pub(super) fn strip<'a>(text: &'a str, chars: Option<&str>, left: bool, right: bool) -> &'a str {
    let many = chars.filter(|chars| chars.len() > 64).map(|chars| chars.chars().collect::<HashSet<char>>());
    let cut = |c: char| match (&many, chars) {
        (Some(set), _) => set.contains(&c),
        (None, Some(few)) => few.contains(c),
        (None, None) => is_space(c),
    };
    let text = if left { text.trim_start_matches(cut) } else { text };
    if right { text.trim_end_matches(cut) } else { text }
}

/// The characters at which `str.splitlines` splits.
pub(super) fn is_line_end(c: char) -> bool {
    matches!(c, '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}')
}

/// `str.splitlines()`.
pub(super) fn splitlines(text: &str) -> Vec<Value> {
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(is_line_end) {
        lines.push(Value::from(&rest[..at]));
        let tail = &rest[at..];
        let len = if tail.starts_with("\r\n") { 2 } else { tail.chars().next().map_or(1, char::len_utf8) };
        rest = &tail[len..];
    }
    if !rest.is_empty() {
        lines.push(Value::from(rest));
    }
    lines
}

/// `str(value)`; undefined is the empty string, as in Jinja.
pub(super) fn str(value: &Value) -> Result<String, Error> {
    if let Some(text) = value.as_str() {
        return Ok(text.to_string());
    }
    let mut out = String::new();
    if !value.is_undefined() {
        repr(&mut out, value, 0)?;
    }
    Ok(out)
}

/// Maximum length of the text of one value. MiniJinja's fuel does not count this text.
const LENGTH: usize = 8 << 20;

/// Rejects values that are nested too deeply or whose text would be too long.
fn check(out: &str, depth: usize) -> Result<(), Error> {
    if depth > DEPTH || out.len() > LENGTH {
        return Err(bad("a value is nested too deeply or too long to write"));
    }
    Ok(())
}

fn repr(out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
    check(out, depth)?;
    match value.kind() {
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => out.push_str(&number(value, "inf", "nan")),
        ValueKind::String => repr_str(out, value.as_str().unwrap_or_default()),
        // MiniJinja's lazy lists (`[1] * n`) are iterables.
        ValueKind::Seq | ValueKind::Iterable => {
            let tuple = value.downcast_object_ref::<Tuple>().map(|tuple| tuple.len());
            out.push_str(if tuple.is_some() { "(" } else { "[" });
            for (i, item) in value.try_iter()?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                repr(out, &item, depth + 1)?;
            }
            out.push_str(match tuple {
                Some(1) => ",)",
                Some(_) => ")",
                None => "]",
            });
        }
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter()?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                repr(out, &key, depth + 1)?;
                out.push_str(": ");
                repr(out, &value.get_item(&key)?, depth + 1)?;
            }
            out.push('}');
        }
        _ => {
            let _ = write!(out, "{value}");
        }
    }
    Ok(())
}

fn repr_str(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if (c as u32) < 0x20 || (0x7f..=0xa0).contains(&(c as u32)) || c == '\u{ad}' => {
                let _ = write!(out, "\\x{:02x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push(quote);
}

/// A number in the format of Python's `repr`.
fn number(value: &Value, infinite: &str, nan: &str) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let Ok(x) = f64::try_from(value.clone()) else { return value.to_string() };
    if x.is_nan() {
        return nan.to_string();
    }
    if x.is_infinite() {
        return format!("{}{infinite}", if x < 0.0 { "-" } else { "" });
    }
    // Rust and Python produce the same shortest digits, but choose differently between fixed and scientific
    // notation.
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let fixed = format!("{x}");
        if fixed.contains('.') { fixed } else { format!("{fixed}.0") }
    } else {
        let sign = if exponent < 0 { '-' } else { '+' };
        format!("{digits}e{sign}{:02}", exponent.abs())
    }
}

/// An integer of more than 128 bits.
#[derive(Debug)]
struct Digits(String);

impl Object for Digits {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A number given as text: an integer of any size, `NaN`, `Infinity` or `-Infinity`.
pub(super) fn beyond(text: &str) -> Value {
    match text {
        "NaN" => f64::NAN.into(),
        "Infinity" => f64::INFINITY.into(),
        "-Infinity" => f64::NEG_INFINITY.into(),
        digits => match digits.parse::<i128>() {
            Ok(integer) => integer.into(),
            Err(_) => Value::from_object(Digits(digits.to_string())),
        },
    }
}

/// True for an integer of more than 128 bits.
pub(super) fn is_digits(value: &Value) -> bool {
    value.downcast_object_ref::<Digits>().is_some()
}

/// The options of `json.dumps`.
pub(super) struct Json {
    pub indent: Option<String>,
    pub item: String,
    pub key: String,
    pub ascii: bool,
    pub sort: bool,
}

impl Json {
    pub fn write(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
        check(out, depth)?;
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&number(value, "Infinity", "NaN")),
            ValueKind::String => self.string(out, value.as_str().unwrap_or_default()),
            ValueKind::Seq => {
                let items: Vec<Value> = value.try_iter()?.take(LENGTH / 4).collect();
                self.list(out, "[", "]", depth, items.len(), |out, i| self.write(out, &items[i], depth + 1))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.take(LENGTH / 4).collect();
                if self.sort {
                    keys.sort();
                }
                self.list(out, "{", "}", depth, keys.len(), |out, i| {
                    match keys[i].as_str() {
                        Some(key) => self.string(out, key),
                        None => {
                            out.push('"');
                            self.write(out, &keys[i], depth + 1)?;
                            out.push('"');
                        }
                    }
                    out.push_str(&self.key);
                    self.write(out, &value.get_item(&keys[i])?, depth + 1)
                })?;
            }
            _ if is_digits(value) => {
                let _ = write!(out, "{value}");
            }
            // Python cannot serialise generators or Jinja's undefined either.
            kind => {
                let message = format!("object of type {kind} is not JSON serializable");
                return Err(Error::new(ErrorKind::BadSerialization, message));
            }
        }
        Ok(())
    }

    fn list(
        &self,
        out: &mut String,
        open: &str,
        close: &str,
        depth: usize,
        len: usize,
        mut item: impl FnMut(&mut String, usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let line = |out: &mut String, depth: usize| {
            if let Some(indent) = &self.indent {
                out.push('\n');
                out.push_str(&indent.repeat(depth));
            }
        };
        out.push_str(open);
        for i in 0..len {
            if i > 0 {
                out.push_str(&self.item);
            }
            line(out, depth + 1);
            item(out, i)?;
        }
        if len > 0 {
            line(out, depth);
        }
        out.push_str(close);
        Ok(())
    }

    fn string(&self, out: &mut String, text: &str) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if (c as u32) < 0x20 || (self.ascii && !c.is_ascii()) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

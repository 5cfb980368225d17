//! Jinja's filters and tests that MiniJinja lacks or implements differently, and Python's `%` on strings.

use super::python::{self, bad};
use minijinja::value::{ArgType, Kwargs, Rest, Tuple, ValueKind};
use minijinja::{Environment, Error, State, Value};
use std::fmt::Write;

/// The filter that replaces `'..' % value` ([`super::rewrite`]).
pub(super) const PERCENT: &str = "__suasion_percent";

/// MiniJinja's own `format`.
const PRINTF: &str = "__suasion_printf";

/// Maximum width of a centred or padded text, in characters.
const WIDTH: usize = 1 << 20;

/// Adds the filters and tests to an environment.
pub(super) fn add(env: &mut Environment<'static>) {
    for name in ["default", "d"] {
        env.add_filter(name, default);
    }
    env.add_filter("wordcount", |value: &Value| -> Result<usize, Error> {
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        Ok(python::str(value)?.split(|c| !is_word(c)).filter(|word| !word.is_empty()).count())
    });
    env.add_filter("truncate", truncate);
    env.add_filter(
        "center",
        |value: &Value, width: Option<usize>, kwargs: Kwargs| -> Result<String, Error> {
            let width = argument(width, "width", &kwargs)?;
            kwargs.assert_all_used()?;
            center(&python::str(value)?, width.unwrap_or(80), " ")
        },
    );
    env.add_filter("urlencode", urlencode);
    env.add_filter(PRINTF, minijinja::filters::format);
    env.add_filter("format", |state: &mut State, value: &Value, args: Rest<Value>| {
        printf(state, value, &args)
    });
    env.add_filter(PERCENT, |state: &mut State, value: &Value, given: Value| {
        match given.downcast_object_ref::<Tuple>() {
            Some(tuple) if conversions(value) != tuple.len() => {
                Err(bad(format!("the format has {} places for {} values", conversions(value), tuple.len())))
            }
            Some(tuple) => printf(state, value, tuple),
            None if given.kind() == ValueKind::Map
                && value.as_str().is_some_and(|text| text.contains("%(")) =>
            {
                let pair = |key: Value| Ok((key.to_string(), given.get_item(&key)?));
                let named: Result<Vec<(String, Value)>, Error> = given.try_iter()?.map(pair).collect();
                printf(state, value, &[Kwargs::from_iter(named?).into()])
            }
            None => printf(state, value, &[given]),
        }
    });
    // In Python, Jinja's undefined is callable (the call raises).
    env.add_test("callable", |value: &Value| -> bool {
        let is_macro = || {
            let keys =
                value.try_iter().is_ok_and(|keys| keys.eq(["name", "arguments", "caller"].map(Value::from)));
            keys && value.to_string().starts_with("<macro ")
        };
        value.is_undefined()
            || value.kind() == ValueKind::Plain && !python::is_digits(value)
            || value.kind() == ValueKind::Map && is_macro()
    });
}

/// An argument passed by position or by name.
pub(super) fn argument<'a, T>(given: Option<T>, name: &'a str, kwargs: &'a Kwargs) -> Result<Option<T>, Error>
where
    Option<T>: ArgType<'a, Output = Option<T>>,
{
    if given.is_some() { Ok(given) } else { kwargs.get(name) }
}

/// `default(value, default_value='', boolean=false)`.
fn default(
    value: &Value,
    other: Option<Value>,
    boolean: Option<bool>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let other = argument(other, "default_value", &kwargs)?;
    let boolean = argument(boolean, "boolean", &kwargs)?;
    kwargs.assert_all_used()?;
    let missing = value.is_undefined() || boolean.unwrap_or(false) && !value.is_true();
    Ok(if missing { other.unwrap_or_else(|| "".into()) } else { value.clone() })
}

/// `truncate(text, length=255, killwords=false, end='...', leeway=5)`.
fn truncate(
    value: &Value,
    length: Option<usize>,
    killwords: Option<bool>,
    end: Option<String>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let text = python::str(value)?;
    let length = argument(length, "length", &kwargs)?;
    let killwords = argument(killwords, "killwords", &kwargs)?;
    let end = argument(end, "end", &kwargs)?;
    let leeway = kwargs.get::<Option<usize>>("leeway")?;
    kwargs.assert_all_used()?;
    let (length, end) = (length.unwrap_or(255), end.unwrap_or_else(|| "...".into()));
    let kept = length.checked_sub(end.chars().count());
    let kept =
        kept.ok_or_else(|| bad(format!("expected length >= {}, got {length}", end.chars().count())))?;
    if text.chars().count() <= length.saturating_add(leeway.unwrap_or(5)) {
        return Ok(text);
    }
    let cut: String = text.chars().take(kept).collect();
    let words = if killwords.unwrap_or(false) {
        &cut
    } else {
        cut.rsplit_once(' ').map_or(&*cut, |(words, _)| words)
    };
    Ok(format!("{words}{end}"))
}

/// `str.center(width, fill)`.
pub(super) fn center(text: &str, width: usize, fill: &str) -> Result<String, Error> {
    let missing = missing(text, width, fill)?;
    // Rounds as Python does.
    let left = missing / 2 + (missing & width & 1);
    Ok(format!("{}{text}{}", fill.repeat(left), fill.repeat(missing - left)))
}

/// The number of characters by which a text is shorter than a width.
fn missing(text: &str, width: usize, fill: &str) -> Result<usize, Error> {
    if width > WIDTH || fill.chars().count() != 1 {
        return Err(bad("a text is padded with one character, to at most a million"));
    }
    Ok(width.saturating_sub(text.chars().count()))
}

/// Percent-encoding of a text, or of the pairs of a mapping or list as a query.
fn urlencode(value: &Value) -> Result<String, Error> {
    fn quote(value: &Value, query: bool) -> Result<String, Error> {
        let mut out = String::new();
        for byte in python::str(value)?.bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' => out.push(byte as char),
                b'/' if !query => out.push('/'),
                b' ' if query => out.push('+'),
                byte => {
                    let _ = write!(out, "%{byte:02X}");
                }
            }
        }
        Ok(out)
    }
    let pairs = match value.kind() {
        ValueKind::Map => minijinja::filters::items(value)?,
        ValueKind::Seq | ValueKind::Iterable => value.clone(),
        _ => return quote(value, false),
    };
    let query = |pair: Value| {
        let (name, value) = (pair.get_item_by_index(0)?, pair.get_item_by_index(1)?);
        Ok(format!("{}={}", quote(&name, true)?, quote(&value, true)?))
    };
    Ok(pairs.try_iter()?.map(query).collect::<Result<Vec<_>, Error>>()?.join("&"))
}

/// The number of values that a format takes.
fn conversions(format: &Value) -> usize {
    let mut rest = format.as_str().unwrap_or_default();
    let mut n = 0;
    while let Some(at) = rest.find('%') {
        let spec = &rest[at + 1..];
        let end = spec.find(|c: char| c.is_ascii_alphabetic() || c == '%').unwrap_or(spec.len());
        n += spec[..end].matches('*').count() + usize::from(!spec[end..].starts_with('%'));
        rest = spec.get(end + 1..).unwrap_or_default();
    }
    n
}

/// `format % args`, with values printed as Python prints them.
fn printf(state: &mut State, format: &Value, args: &[Value]) -> Result<Value, Error> {
    let mut all = vec![format.clone()];
    for value in args {
        all.push(match value.kind() {
            ValueKind::Number | ValueKind::String => value.clone(),
            _ if value.is_kwargs() => value.clone(),
            _ => python::str(value)?.into(),
        });
    }
    state.apply_filter(PRINTF, &all)
}

/// Python's string methods that pad a text, and others that MiniJinja and its `pycompat` lack; `None` for all
/// other methods.
pub(super) fn method(text: &str, name: &str, args: &[Value]) -> Option<Result<Value, Error>> {
    let width = || args.first().and_then(Value::as_usize).ok_or_else(|| bad(format!("{name} needs a width")));
    let fill = args.get(1).and_then(Value::as_str).unwrap_or(" ");
    let pad = |left: bool| {
        let pad = fill.repeat(missing(text, width()?, fill)?);
        Ok(if left { format!("{pad}{text}") } else { format!("{text}{pad}") }.into())
    };
    Some(match (name, args.len()) {
        ("center", 1 | 2) => width().and_then(|width| center(text, width, fill)).map(Value::from),
        ("rjust", 1 | 2) => pad(true),
        ("ljust", 1 | 2) => pad(false),
        ("zfill", 1) => width().and_then(|width| {
            let zeros = "0".repeat(missing(text, width, "0")?);
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['+', '-'])));
            Ok(format!("{sign}{zeros}{digits}").into())
        }),
        ("swapcase", 0) => {
            let mut out = String::with_capacity(text.len());
            for c in text.chars() {
                if c.is_uppercase() { out.extend(c.to_lowercase()) } else { out.extend(c.to_uppercase()) }
            }
            Ok(out.into())
        }
        ("index", 1) => match args[0].as_str().and_then(|part| text.find(part)) {
            Some(at) => Ok(text[..at].chars().count().into()),
            None => Err(bad("substring not found")),
        },
        _ => return None,
    })
}

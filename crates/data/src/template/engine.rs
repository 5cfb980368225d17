//! Jinja as transformers 5 configures it: environment, filters, methods and limits.

use super::filters::argument;
use super::python::bad;
use super::{charges, filters, python};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Environment, Error, State, UndefinedBehavior, Value};
use std::borrow::Cow;

/// The template's name in error messages.
pub(super) const NAME: &str = "chat_template";

/// Internal variables, invisible to templates.
pub(super) const OPEN: &str = "__suasion_open";

pub(super) const CLOSE: &str = "__suasion_close";

pub(super) const NOW: &str = "__suasion_now";

/// Internal filters, which [`super::rewrite`] inserts.
pub(super) const GENERATION: &str = "__suasion_generation";

pub(super) const ITER: &str = "__suasion_iter";

/// Fuel of one rendering: one unit per instruction and per 64 bytes produced. It stops an endless loop in well
/// under a second.
const FUEL: u64 = 3_000_000;

/// The number of messages that this fuel suffices for. Most templates need a tenth of it for a thousand messages;
/// Gemma 4's, with a thought in each answer, all of it.
const MESSAGES: usize = 250;

/// Maximum nesting of macros and loops; it fits the stack of a worker thread.
const RECURSION: usize = 120;

/// Maximum length of the text that one method call may insert, in bytes.
const STRING: usize = 16 << 20;

/// From this length of a text, in bytes, its parts are counted before they are created.
const MANY: usize = 1 << 20;

/// The syntax of chat templates.
pub(super) fn syntax() -> Result<SyntaxConfig, Error> {
    SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()
}

/// An environment with one template.
pub(super) fn environment(source: String) -> Result<Environment<'static>, Error> {
    let mut env = Environment::new();
    env.set_syntax(syntax()?);
    env.set_undefined_behavior(UndefinedBehavior::Lenient);
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env.set_fuel(Some(FUEL));
    env.set_recursion_limit(RECURSION);
    env.set_formatter(|out, _state, value| match value.as_str() {
        Some(text) => out.write_str(text).map_err(Error::from),
        None => out.write_str(&python::str(value)?).map_err(Error::from),
    });
    env.set_unknown_method_callback(method);
    env.add_filter("tojson", tojson);
    env.add_filter("indent", indent);
    env.add_filter("join", join);
    env.add_filter("string", |value: &Value| -> Result<Value, Error> {
        match value.as_str() {
            Some(_) => Ok(value.clone()),
            None => python::str(value).map(Value::from),
        }
    });
    env.add_filter("trim", |value: &Value, chars: Option<String>| -> Result<String, Error> {
        let text = python::str(value)?;
        Ok(python::strip(&text, chars.as_deref(), true, true).to_string())
    });
    env.add_filter(GENERATION, |state: &State, body: String| -> String {
        let mark = |key| state.lookup(key).and_then(|v| v.as_str().map(str::to_string)).unwrap_or_default();
        format!("{}{body}{}", mark(OPEN), mark(CLOSE))
    });
    // Python cannot iterate over None; MiniJinja treats it as an empty list.
    env.add_filter(ITER, |value: Value| -> Result<Value, Error> {
        if value.is_none() { Err(bad("None is not iterable")) } else { Ok(value) }
    });
    env.add_test("iterable", |value: &Value| -> bool {
        !value.is_none()
            && (value.is_undefined() || value.kind() == ValueKind::String || value.try_iter().is_ok())
    });
    // In Python, anything with a length and items: texts and mappings too.
    env.add_test("sequence", |value: &Value| -> bool {
        use ValueKind::{Map, Seq, String, Undefined};
        matches!(value.kind(), Seq | String | Map | Undefined)
    });
    generators(&mut env);
    filters::add(&mut env);
    charges::add(&mut env);
    env.add_function("raise_exception", |message: &Value| -> Result<Value, Error> {
        Err(bad(python::str(message)?))
    });
    env.add_function("strftime_now", |state: &State, format: String| -> Result<String, Error> {
        let now = state.lookup(NOW).and_then(|v| v.as_str().map(str::to_string)).unwrap_or_default();
        let now: jiff::civil::DateTime = now.parse().map_err(|e| bad(format!("strftime_now: {e}")))?;
        jiff::fmt::strtime::format(&format, now).map_err(|e| bad(format!("strftime_now: {e}")))
    });
    env.add_template_owned(NAME, source)?;
    Ok(env)
}

/// An environment with more fuel, for a conversation of more messages than usual.
pub(super) fn roomy(env: &Environment<'static>, messages: usize) -> Option<Environment<'static>> {
    (messages > MESSAGES).then(|| {
        let mut env = env.clone();
        env.set_fuel(Some(FUEL * (1 + (messages / MESSAGES) as u64)));
        env
    })
}

/// The filters that return generators in Jinja: these have no length, are always true, and cannot be written as JSON.
fn generators(env: &mut Environment<'static>) {
    use minijinja::filters;
    fn lazy(values: Vec<Value>) -> Value {
        Value::make_iterable(move || values.clone().into_iter())
    }
    env.add_filter("map", |state: &mut State, value: Value, args: Rest<_>| {
        filters::map(state, value, args).map(lazy)
    });
    env.add_filter("select", |state: &mut State, value: Value, test: Option<Cow<'_, str>>, args: Rest<_>| {
        filters::select(state, value, test, args).map(lazy)
    });
    env.add_filter("reject", |state: &mut State, value: Value, test: Option<Cow<'_, str>>, args: Rest<_>| {
        filters::reject(state, value, test, args).map(lazy)
    });
    env.add_filter(
        "selectattr",
        |state: &mut State, value: Value, attr: Cow<'_, str>, test: Option<Cow<'_, str>>, args: Rest<_>| {
            filters::selectattr(state, value, attr, test, args).map(lazy)
        },
    );
    env.add_filter(
        "rejectattr",
        |state: &mut State, value: Value, attr: Cow<'_, str>, test: Option<Cow<'_, str>>, args: Rest<_>| {
            filters::rejectattr(state, value, attr, test, args).map(lazy)
        },
    );
}

/// Jinja's `join`. MiniJinja's does not bound the text that it builds.
fn join(
    state: &mut State,
    value: &Value,
    sep: Option<Value>,
    attribute: Option<Value>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let sep = argument(sep, "d", &kwargs)?.filter(|sep| !sep.is_none() && !sep.is_undefined());
    let attribute = argument(attribute, "attribute", &kwargs)?.filter(|attribute| !attribute.is_none());
    kwargs.assert_all_used()?;
    let sep = sep.map_or_else(|| Ok(String::new()), |sep| python::str(&sep))?;
    let mut out = String::new();
    if value.is_undefined() {
        return Ok(out);
    }
    let items: Box<dyn Iterator<Item = Value>> = match value.as_str() {
        Some(text) => Box::new(text.chars().map(Value::from)),
        None => Box::new(value.try_iter()?),
    };
    for (i, item) in items.enumerate() {
        let item = match attribute.as_ref().and_then(Value::as_str) {
            Some(path) => path.split('.').try_fold(item, |item, key| item.get_attr(key))?,
            None => item,
        };
        let text = python::str(&item)?;
        if out.len() + sep.len() + text.len() > STRING {
            return Err(bad("join: the text would be too long"));
        }
        state.consume_fuel(1 + (sep.len() + text.len()) as u64 / 64)?;
        if i > 0 {
            out.push_str(&sep);
        }
        out.push_str(&text);
    }
    Ok(out)
}

/// Jinja's `indent`. Unlike MiniJinja's it keeps a trailing line end.
fn indent(
    value: &Value,
    width: Option<Value>,
    first: Option<bool>,
    blank: Option<bool>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let text = python::str(value)?;
    let width = argument(width, "width", &kwargs)?;
    let first = argument(first, "first", &kwargs)?;
    let blank = argument(blank, "blank", &kwargs)?;
    kwargs.assert_all_used()?;
    let (first, blank) = (first.unwrap_or(false), blank.unwrap_or(false));
    let space = match width.filter(|width| !width.is_undefined()) {
        None => " ".repeat(4),
        Some(width) => match width.as_str() {
            Some(text) => text.to_string(),
            None => {
                let width = width.as_i64().ok_or_else(|| bad("indent: the width is not a number"))?;
                let width = usize::try_from(width).unwrap_or(0);
                if width > STRING {
                    return Err(bad("indent: the text would be too long"));
                }
                " ".repeat(width)
            }
        },
    };
    // An additional line end, so that an empty last line counts.
    let lines = python::splitlines(&format!("{text}\n"));
    if text.len() + lines.len().saturating_mul(space.len() + 1) > STRING {
        return Err(bad("indent: the text would be too long"));
    }
    let mut out = String::with_capacity(text.len() + lines.len() * space.len());
    for (i, line) in lines.iter().filter_map(Value::as_str).enumerate() {
        if i > 0 {
            out.push('\n');
        }
        if if i == 0 { first } else { blank || !line.is_empty() } {
            out.push_str(&space);
        }
        out.push_str(line);
    }
    Ok(out)
}

/// `json.dumps(value, ensure_ascii=False, indent=.., separators=.., sort_keys=..)`.
fn tojson(value: &Value, indent: Option<&Value>, kwargs: Kwargs) -> Result<String, Error> {
    let indent = match argument(indent.cloned(), "indent", &kwargs)? {
        Some(v) if v.is_none() || v.is_undefined() => None,
        Some(v) => Some(match v.as_str() {
            Some(text) => text.to_string(),
            None => " ".repeat(v.as_i64().unwrap_or(0).clamp(0, 64) as usize),
        }),
        None => None,
    };
    let ascii: Option<bool> = kwargs.get("ensure_ascii")?;
    let sort: Option<bool> = kwargs.get("sort_keys")?;
    let separators: Option<Value> = kwargs.get("separators")?;
    kwargs.assert_all_used()?;
    let (mut item, mut key) = (if indent.is_some() { "," } else { ", " }.to_string(), ": ".to_string());
    if let Some(pair) = separators.filter(|v| !v.is_none()) {
        item = pair.get_item_by_index(0)?.to_string();
        key = pair.get_item_by_index(1)?.to_string();
    }
    let style =
        python::Json { indent, item, key, ascii: ascii.unwrap_or(false), sort: sort.unwrap_or(false) };
    let mut out = String::new();
    style.write(&mut out, value, 0)?;
    Ok(out)
}

/// Python's string methods that MiniJinja lacks or implements differently; the others are those of
/// `pycompat`.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    charges::charge(state, args, 1)?;
    if value.kind() == ValueKind::String
        && let Some(text) = value.as_str()
    {
        if let Some(done) = filters::method(text, name, args) {
            return done;
        }
        let one = |at: usize| args.get(at).and_then(Value::as_str);
        match name {
            "strip" | "lstrip" | "rstrip" if args.len() <= 1 => {
                return Ok(python::strip(text, one(0), name != "rstrip", name != "lstrip").into());
            }
            "split" | "rsplit" => return split(state, text, name == "rsplit", args),
            "splitlines" if args.is_empty() => {
                parts(state, text.len(), || text.matches(python::is_line_end).count())?;
                return Ok(python::splitlines(text).into());
            }
            "removeprefix" => {
                let prefix = one(0).ok_or_else(|| bad("removeprefix needs a string"))?;
                return Ok(text.strip_prefix(prefix).unwrap_or(text).into());
            }
            "removesuffix" => {
                let suffix = one(0).ok_or_else(|| bad("removesuffix needs a string"))?;
                return Ok(text.strip_suffix(suffix).unwrap_or(text).into());
            }
            "partition" | "rpartition" => {
                let at =
                    one(0).filter(|s| !s.is_empty()).ok_or_else(|| bad("partition needs a separator"))?;
                let found = if name == "partition" { text.split_once(at) } else { text.rsplit_once(at) };
                let parts = match (found, name) {
                    (Some((a, b)), _) => [a, at, b],
                    (None, "partition") => [text, "", ""],
                    _ => ["", "", text],
                };
                return Ok(parts.map(Value::from).to_vec().into());
            }
            // The fuel does not count the text that these two build, so it is limited here.
            "format" => {
                let widths = text.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
                let widths = widths.map(|digits| digits.parse::<usize>().unwrap_or(usize::MAX));
                let grown = widths.fold(0, usize::saturating_add);
                if grown > STRING {
                    return Err(bad("format: the result is too long"));
                }
                state.consume_fuel((grown / 64) as u64)?;
            }
            "replace" if args.len() >= 2 => {
                if let (Some(old), Some(new)) = (one(0), one(1)) {
                    let times = if old.is_empty() { text.len() + 1 } else { text.matches(old).count() };
                    let grown = times.saturating_mul(new.len());
                    if grown > STRING {
                        return Err(bad("replace: the result is too long"));
                    }
                    state.consume_fuel((grown / 64) as u64)?;
                }
            }
            "join" if args.len() == 1 => {
                let mut out = String::new();
                for (i, part) in args[0].try_iter()?.enumerate() {
                    let part = part.as_str().map(str::to_string);
                    let part = part.ok_or_else(|| bad(format!("join: item {i} is not a string")))?;
                    if i > 0 {
                        out.push_str(text);
                    }
                    out.push_str(&part);
                    state.consume_fuel(1 + (part.len() + text.len()) as u64 / 64)?;
                }
                return Ok(out.into());
            }
            _ => {}
        }
    }
    if let ("index" | "count", ValueKind::Seq) = (name, value.kind()) {
        charges::charge(state, std::slice::from_ref(value), 1)?;
    }
    if let ("index", ValueKind::Seq, [item]) = (name, value.kind(), args) {
        let at = value.try_iter()?.position(|other| other == *item);
        return at.map(Value::from).ok_or_else(|| bad("the item is not in the list"));
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

/// Charges for the parts of a text before they are created, if there may be many.
fn parts(state: &State, len: usize, count: impl FnOnce() -> usize) -> Result<(), Error> {
    if len < MANY { Ok(()) } else { state.consume_fuel(count() as u64 / 2) }
}

fn split(state: &State, text: &str, right: bool, args: &[Value]) -> Result<Value, Error> {
    let (sep, max, _rest): (Option<Value>, Option<Value>, Rest<Value>) = minijinja::value::from_args(args)?;
    let mut max = max;
    let mut sep = sep;
    // Keyword arguments are the last value.
    if let Some(Some(kwargs)) = args.last().map(|v| v.is_kwargs().then(|| v.clone())) {
        let get = |key: &str| kwargs.get_attr(key).ok().filter(|v| !v.is_undefined());
        if args.len() == 1 {
            sep = get("sep");
        }
        max = get("maxsplit");
    }
    let max = max.filter(|v| !v.is_none()).map_or(-1, |v| v.as_i64().unwrap_or(-1));
    let limit = if max < 0 { usize::MAX } else { (max as usize).saturating_add(1) };
    parts(state, text.len(), || match sep.as_ref().and_then(Value::as_str) {
        Some(sep) => text.matches(sep).take(limit).count(),
        None => text.split(python::is_space).take(limit).count(),
    })?;
    let parts: Vec<&str> = match sep.as_ref().and_then(Value::as_str) {
        Some("") => return Err(bad("split: empty separator")),
        Some(sep) if right => {
            let mut parts: Vec<&str> = text.rsplitn(limit, sep).collect();
            parts.reverse();
            parts
        }
        Some(sep) => text.splitn(limit, sep).collect(),
        None if max < 0 => text.split(python::is_space).filter(|p| !p.is_empty()).collect(),
        None => {
            let mut parts = Vec::new();
            let mut rest = text.trim_start_matches(python::is_space);
            while !rest.is_empty() && parts.len() + 1 < limit {
                let end = rest.find(python::is_space).unwrap_or(rest.len());
                parts.push(&rest[..end]);
                rest = rest[end..].trim_start_matches(python::is_space);
            }
            if !rest.is_empty() {
                parts.push(rest);
            }
            parts
        }
    };
    Ok(parts.into_iter().map(Value::from).collect::<Vec<_>>().into())
}

//! Rewrites the source of a template: constructs of transformers and Python that MiniJinja lacks.

use super::counted::{counted, operand_end, string_end};
use super::engine::{GENERATION, ITER};
use super::filters::PERCENT;
use std::borrow::Cow;

/// Rewrites `{% generation %}` blocks to blocks that MiniJinja supports. In transformers they are call blocks with
/// their own scope, hence the `with` inside. The dashes of the tags, which control white space, stay in place.
///
/// `count`: operators are charged for their operands. Returns the source, whether it has such blocks, and whether
/// the template might read their output: it might if it captures output in a variable, a macro, a filter or a
/// recursive loop.
pub(super) fn rewrite_generation(source: &str, count: bool) -> (String, bool, bool) {
    // Jinja normalises line ends.
    let source = &source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut rest = source.as_str();
    let (mut found, mut captures) = (false, false);
    while let Some(at) = rest.find('{') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        // Comments, expressions and raw blocks are copied unchanged: they contain no tags.
        if rest.starts_with("{#") {
            let end = rest.find("#}").map_or(rest.len(), |e| e + 2);
            out.push_str(&rest[..end]);
            rest = &rest[end..];
            continue;
        }
        if rest.starts_with("{{") {
            let end = 2 + tag_end(&rest[2..], "}}");
            out.push_str(&formatted(&prepared(&rest[..end], count)));
            rest = &rest[end..];
            continue;
        }
        if !rest.starts_with("{%") {
            out.push('{');
            rest = &rest[1..];
            continue;
        }
        let end = 2 + tag_end(&rest[2..], "%}");
        let tag = &rest[..end];
        let inner = tag[2..].strip_suffix("%}").unwrap_or(&tag[2..]);
        let left = if inner.starts_with(['-', '+']) { &inner[..1] } else { "" };
        let body = &inner[left.len()..];
        let right = if body.ends_with(['-', '+']) { &body[body.len() - 1..] } else { "" };
        match body[..body.len() - right.len()].trim() {
            "generation" => {
                found = true;
                out.push_str(&format!("{{%{left} filter {GENERATION} %}}{{% with {right}%}}"));
            }
            "endgeneration" => out.push_str(&format!("{{%{left} endwith %}}{{% endfilter {right}%}}")),
            "raw" => {
                let close = rest.find("endraw").and_then(|e| rest[e..].find("%}").map(|f| e + f + 2));
                let close = close.unwrap_or(rest.len());
                out.push_str(&rest[..close]);
                rest = &rest[close..];
                continue;
            }
            inner => {
                captures |= captured(inner);
                match iterated(inner) {
                    // `for x in xs`: a filter around `xs` rejects None.
                    Some(xs) => {
                        let at = body[..body.len() - right.len()].trim_end().len() - xs.len();
                        out.push_str(&format!("{{%{left}{}({xs}) | {ITER}", &body[..at]));
                        out.push_str(&format!("{}%}}", &body[at + xs.len()..]));
                    }
                    None => out.push_str(&formatted(&prepared(tag, count))),
                }
            }
        }
        rest = &rest[end..];
    }
    out.push_str(rest);
    (out, found, captures)
}

fn prepared(tag: &str, count: bool) -> Cow<'_, str> {
    if count { Cow::Owned(counted(tag)) } else { Cow::Borrowed(tag) }
}

/// A tag with `'..' % value` replaced by a filter, since MiniJinja's `%` only supports numbers.
fn formatted(tag: &str) -> Cow<'_, str> {
    let mut out = String::new();
    let mut copied = 0;
    let mut at = 0;
    while let Some(open) = tag[at..].find(['\'', '"']).map(|found| at + found) {
        let close = open + 1 + string_end(&tag[open + 1..], tag.as_bytes()[open]);
        let after = tag[close..].trim_start();
        at = close;
        if let Some(operand) = after.strip_prefix('%').filter(|rest| !rest.starts_with('}')) {
            let operand = operand.trim_start();
            let start = tag.len() - operand.len();
            let end = start + operand_end(operand);
            out.push_str(&tag[copied..close]);
            out.push_str(&format!(" | {PERCENT}({})", &tag[start..end]));
            (copied, at) = (end, end);
        }
    }
    if copied == 0 {
        return Cow::Borrowed(tag);
    }
    out.push_str(&tag[copied..]);
    Cow::Owned(out)
}

/// True for a tag that may capture the output of its body.
fn captured(tag: &str) -> bool {
    let (word, rest) = tag.split_at(tag.find(|c: char| !c.is_alphabetic()).unwrap_or(tag.len()));
    match word {
        "if" | "elif" | "else" | "endif" | "endfor" | "break" | "continue" => false,
        "for" => rest.contains("recursive"),
        // `set x = ..` assigns a value; `set x` captures the output of its block.
        "set" => {
            !rest.trim_start_matches(|c: char| c.is_alphanumeric() || " \t\n_.,".contains(c)).starts_with('=')
        }
        _ => true,
    }
}

/// The expression of a plain `for` tag; `None` for other tags, and for loops with a condition or recursion.
fn iterated(tag: &str) -> Option<&str> {
    let rest = tag.strip_prefix("for ")?;
    let (_, xs) = rest.split_once(" in ")?;
    let xs = xs.trim();
    let plain = |c: char| c.is_alphanumeric() || matches!(c, '_' | '.');
    (!xs.is_empty() && xs.chars().all(plain)).then_some(&tag[tag.len() - xs.len()..])
}

/// The end of a tag, ignoring string literals.
pub(super) fn tag_end(text: &str, close: &str) -> usize {
    let mut quote = None;
    let mut escaped = false;
    for (i, c) in text.char_indices() {
        match quote {
            Some(_) if escaped => escaped = false,
            Some(_) if c == '\\' => escaped = true,
            Some(q) if c == q => quote = None,
            Some(_) => {}
            None if text[i..].starts_with(close) => return i + close.len(),
            None if c == '"' || c == '\'' => quote = Some(c),
            None => {}
        }
    }
    text.len()
}

//! Rewrites the source of a template: constructs of transformers and Python that MiniJinja lacks.

use super::engine::{GENERATION, ITER};
use super::filters::PERCENT;
use std::borrow::Cow;

/// Rewrites `{% generation %}` blocks to blocks that MiniJinja knows. In transformers they are call blocks
/// with their own scope, hence the `with` inside. The dashes of the tags, which control white space, stay in
/// place.
///
/// Returns the source, whether it has such blocks, and whether the template might read their output: it might
/// if it captures output in a variable, a macro, a filter or a recursive loop.
pub(super) fn rewrite_generation(source: &str) -> (String, bool, bool) {
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
            out.push_str(&formatted(&rest[..end]));
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
                    None => out.push_str(&formatted(tag)),
                }
            }
        }
        rest = &rest[end..];
    }
    out.push_str(rest);
    (out, found, captures)
}

/// A tag in which `'..' % value` is a filter, since MiniJinja's `%` knows numbers only.
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

/// The end of a string literal after its opening quote, with its closing quote.
fn string_end(text: &str, quote: u8) -> usize {
    let mut escaped = false;
    for (i, byte) in text.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            byte if byte == quote => return i + 1,
            _ => {}
        }
    }
    text.len()
}

/// The end of an operand of `%`: a literal or a name with what is called, looked up and filtered after it.
fn operand_end(text: &str) -> usize {
    let bytes = text.as_bytes();
    let is_name = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_' || *byte >= 0x80;
    let spaces = |at: usize| bytes[at..].iter().take_while(|byte| byte.is_ascii_whitespace()).count();
    let mut at = bytes.iter().take_while(|byte| matches!(byte, b'-' | b'+' | b' ')).count();
    loop {
        match bytes.get(at) {
            Some(quote @ (b'\'' | b'"')) => at += 1 + string_end(&text[at + 1..], *quote),
            Some(b'(' | b'[' | b'{') => {
                let mut depth = 0;
                while let Some(&byte) = bytes.get(at) {
                    at += 1;
                    match byte {
                        b'\'' | b'"' => at += string_end(&text[at..], byte),
                        b'(' | b'[' | b'{' => depth += 1,
                        b')' | b']' | b'}' => depth -= 1,
                        _ => {}
                    }
                    if depth == 0 {
                        break;
                    }
                }
            }
            _ => at += bytes[at..].iter().take_while(|byte| is_name(byte)).count(),
        }
        // What follows belongs to the operand where it looks something up in it, calls it or filters it.
        let next = at + spaces(at);
        match bytes.get(next) {
            Some(b'.' | b'|') if bytes.get(next + 1) != Some(&b'|') => at = next + 1 + spaces(next + 1),
            Some(b'(' | b'[') => at = next,
            _ => return at,
        }
    }
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

/// The end of a tag, ignoring the text of strings.
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

//! Rewrites expressions so that operators are charged for the texts that they inspect.
//!
//! MiniJinja (3.1) charges one instruction for a comparison or a subscript, whose work grows with the text: a loop
//! over `x == y` with texts of 16 MB takes hours. The operand of a comparison, and the base of a computed
//! subscript or slice, is passed through an identity filter, and filters are charged ([`super::charges`]). Factors
//! are passed through it too, because MiniJinja evaluates constants at compile time, when nothing is counted
//! (`1 in [2] * 99999999999`).

use super::charges::{COMPARED, SEEN};

/// Words that are not operands.
const WORDS: [&str; 12] =
    ["and", "or", "not", "in", "is", "if", "else", "elif", "set", "none", "true", "false"];

/// A tag with the filter inserted where needed.
pub(super) fn counted(tag: &str) -> String {
    let bytes = tag.as_bytes();
    let mut out = String::with_capacity(tag.len() + 32);
    // The end of the copied text, and the start of the current name.
    let (mut copied, mut at) = (0, 0);
    while at < bytes.len() {
        let two = bytes.get(at + 1).copied().unwrap_or_default();
        match bytes[at] {
            quote @ (b'\'' | b'"') => at += 1 + string_end(&tag[at + 1..], quote),
            b'[' => {
                let name = name_before(tag, at).filter(|start| *start >= copied);
                if let Some(start) = name.filter(|_| is_computed(&tag[at + 1..])) {
                    out.push_str(&format!("{}({} | {SEEN})", &tag[copied..start], &tag[start..at]));
                    copied = at;
                }
                at += 1;
            }
            b'*' if two == b'*' => at += 2,
            b'=' | b'!' if two == b'=' => (copied, at) = operand(tag, copied, at + 2, COMPARED, &mut out),
            b'<' | b'>' => {
                (copied, at) = operand(tag, copied, at + 1 + usize::from(two == b'='), COMPARED, &mut out);
            }
            b'*' => (copied, at) = operand(tag, copied, at + 1, SEEN, &mut out),
            b'i' if ["in [", "in ("].iter().any(|start| tag[at..].starts_with(start))
                && bytes[..at].ends_with(b" ") =>
            {
                (copied, at) = operand(tag, copied, at + 2, COMPARED, &mut out);
            }
            _ => at += 1,
        }
    }
    out.push_str(&tag[copied..]);
    out
}

/// Passes the operand after `at` through the filter. Returns the end of the copied text, and where to continue:
/// inside the operand, which is copied unchanged, no further filter is needed.
fn operand(tag: &str, copied: usize, at: usize, filter: &str, out: &mut String) -> (usize, usize) {
    let rest = &tag[at..];
    let start = at + rest.len() - rest.trim_start().len();
    let end = start + operand_end(&tag[start..]);
    let text = tag[start..end].trim_end();
    let simple = text.starts_with(['\'', '"', '-', '+']) || text.parse::<f64>().is_ok();
    if text.is_empty() || simple || WORDS.contains(&text.to_lowercase().as_str()) {
        return (copied, at);
    }
    out.push_str(&format!("{}({text} | {filter})", &tag[copied..start]));
    (start + text.len(), start + text.len())
}

/// The start of the name, with its attributes, that ends directly before byte `at`.
fn name_before(tag: &str, at: usize) -> Option<usize> {
    let is_name = |c: char| c.is_alphanumeric() || matches!(c, '_' | '.');
    let start = tag[..at]
        .rfind(|c: char| !is_name(c))
        .map_or(0, |i| i + tag[i..].chars().next().map_or(1, char::len_utf8));
    let name = &tag[start..at];
    let starts = name.chars().next().is_some_and(|c| c.is_alphabetic() || c == '_');
    // The name of a filter or test, and names after another operand, are not operands themselves.
    let before = tag[..start].trim_end();
    let other = before.ends_with(['|', ')', ']', '.']) || before.ends_with(" is") || before.ends_with(" not");
    (starts && !other && !WORDS.contains(&name)).then_some(start)
}

/// True for a subscript that is not a constant key or a small index.
fn is_computed(subscript: &str) -> bool {
    let rest = subscript.trim_start();
    match rest.as_bytes().first() {
        Some(quote @ (b'\'' | b'"')) => {
            !rest[1 + string_end(&rest[1..], *quote)..].trim_start().starts_with(']')
        }
        Some(digit) if digit.is_ascii_digit() => {
            let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
            end > 3 || !rest[end..].trim_start().starts_with(']')
        }
        _ => true,
    }
}

/// The end of a string literal after its opening quote, with its closing quote.
pub(super) fn string_end(text: &str, quote: u8) -> usize {
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

/// The end of an operand of `%`: a literal or a name with the calls, look-ups and filters after it.
pub(super) fn operand_end(text: &str) -> usize {
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
        // A look-up, a call or a filter belongs to the operand before it.
        let next = at + spaces(at);
        match bytes.get(next) {
            Some(b'.' | b'|') if bytes.get(next + 1) != Some(&b'|') => at = next + 1 + spaces(next + 1),
            Some(b'(' | b'[') => at = next,
            _ => return at,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operands_go_through_the_filter() {
        for (tag, want) in [
            ("{% if m.role == 'user' %}", "{% if m.role == 'user' %}"),
            ("{% if a.b == c.d and e %}", "{% if a.b == (c.d | ?) and e %}"),
            ("{% if a == b + c %}", "{% if a == (b | ?) + c %}"),
            (
                "{% if a != none or b < 3 or c >= f(d)[1] | x %}",
                "{% if a != none or b < 3 or c >= (f(d)[1] | x | ?) %}",
            ),
            ("{{ messages[0]['content'] }}", "{{ messages[0]['content'] }}"),
            ("{{ messages[-1].content[i:] }}", "{{ (messages | ?)[-1].content[i:] }}"),
            ("{{ m.content[-1] }}", "{{ (m.content | ?)[-1] }}"),
            ("{% if a in ['b', c] %}", "{% if a in (['b', c] | ?) %}"),
            ("{% if a in (b + c) %}", "{% if a in ((b + c) | ?) %}"),
            ("{% for a in b[1:] %}", "{% for a in (b | ?)[1:] %}"),
            ("{{ [x]*9*n }}", "{{ [x]*9*(n | ?) }}"),
            ("{{ 1 in [2] * 9 }}", "{{ 1 in ([2] | ?) * 9 }}"),
            ("{{ f(*a, **b) }}", "{{ f(*(a | ?), **b) }}"),
            ("{{ x | list[1:] }}{{ '==' ~ \"<\" }}", "{{ x | list[1:] }}{{ '==' ~ \"<\" }}"),
        ] {
            assert_eq!(counted(tag).replace(SEEN, "?").replace(COMPARED, "?"), want);
        }
    }
}

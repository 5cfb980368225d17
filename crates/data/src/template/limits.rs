//! Limits of a template's source, checked before it is parsed.
//!
//! MiniJinja (3.1) limits the nesting of brackets and blocks, but not chains: `a ~ b ~ ..`, `a.b.c ..`,
//! `not not ..` and `elif` become a tree as deep as they are long, on which its compiler recurses, and constant operands
//! are joined again at each link.

use super::rewrite::tag_end;
use std::io;

/// The longest source, in bytes. The largest published templates have some 50,000.
const SOURCE: usize = 1 << 20;

/// The most operators, attributes, filters and brackets in a tag, and the most `elif` in a template. Published
/// templates have up to about 100.
const LINKS: usize = 1000;

/// The stack size for compiling a source within the limits, in bytes.
const STACK: usize = 64 << 20;

/// Checks a source. The error says which limit it exceeds.
pub(super) fn check(source: &str) -> Result<(), String> {
    if source.len() > SOURCE {
        return Err(format!("it has {} bytes; the limit is {SOURCE}", source.len()));
    }
    let mut rest = source;
    let mut branches = 0;
    while let Some(at) = rest.find('{') {
        rest = &rest[at..];
        let close = match rest.as_bytes().get(1) {
            Some(b'{') => "}}",
            Some(b'%') => "%}",
            _ => {
                rest = &rest[1..];
                continue;
            }
        };
        let end = 2 + tag_end(&rest[2..], close);
        let tag = &rest[2..end];
        branches += usize::from(tag.trim_start_matches(['-', '+']).trim_start().starts_with("elif"));
        let links = links(tag);
        if links > LINKS || branches > LINKS {
            let what = if branches > LINKS { "elif" } else { "operators in one tag" };
            let line = 1 + source[..source.len() - rest.len()].matches('\n').count();
            return Err(format!("it has more than {LINKS} {what} (line {line})"));
        }
        rest = &rest[end..];
    }
    Ok(())
}

/// The number of operators, attributes, filters, opening brackets and keywords of an expression, outside string
/// literals.
fn links(tag: &str) -> usize {
    let (mut links, mut quote, mut word, mut escaped) = (0, None, String::new(), false);
    for c in tag.chars() {
        if let Some(q) = quote {
            match c {
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                _ if c == q => quote = None,
                _ => {}
            }
            continue;
        }
        if c.is_alphanumeric() || c == '_' {
            word.push(c);
            continue;
        }
        links += usize::from(matches!(word.as_str(), "not" | "and" | "or" | "if" | "else" | "in" | "is"));
        word.clear();
        match c {
            '"' | '\'' => quote = Some(c),
            '.' | '|' | '~' | '+' | '-' | '*' | '/' | '%' | '<' | '>' | '=' | '!' | '(' | '[' | '{' => {
                links += 1
            }
            _ => {}
        }
    }
    links
}

/// Runs a compilation with a stack that is deep enough.
pub(super) fn with_deep_stack<T: Send, E: Send + From<io::Error>>(
    work: impl FnOnce() -> Result<T, E> + Send,
) -> Result<T, E> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, work)?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("its compiler panicked").into()))
    })
}

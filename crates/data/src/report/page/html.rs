//! Markup in which all data is escaped.

use crate::report::text::{printable, visible};
use std::fmt::Write;

/// A piece of a page. Markup is text of the program (`&'static str`); everything else is data, and is escaped.
///
/// ```
/// use suasion_data::report::page::Html;
/// let mut html = Html::new();
/// html.raw("<p").attr("title", "a \"name\"").raw(">").text("<script> & more").raw("</p>");
/// assert_eq!(html.as_str(), "<p title=\"a &quot;name&quot;\">&lt;script&gt; &amp; more</p>");
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Html(String);

impl Html {
    /// An empty piece.
    pub fn new() -> Html {
        Html::default()
    }

    /// A text of one line.
    pub fn of(data: &str) -> Html {
        let mut html = Html::new();
        html.text(data);
        html
    }

    /// Adds markup.
    pub fn raw(&mut self, markup: &'static str) -> &mut Html {
        self.0.push_str(markup);
        self
    }

    /// Adds data as text of one line: line ends, control characters, direction marks and other invisible
    /// characters are replaced by visible signs.
    pub fn text(&mut self, data: &str) -> &mut Html {
        self.0.push_str(&escape(&visible(data)));
        self
    }

    /// Adds data as text in which line ends and tabs are kept; everything else as in [`Html::text`].
    pub fn lines(&mut self, data: &str) -> &mut Html {
        self.0.push_str(&escape(&printable(data)));
        self
    }

    /// Adds data as text in which line ends are kept, with a sign before each.
    pub fn signed_lines(&mut self, data: &str) -> &mut Html {
        for (i, line) in data.split('\n').enumerate() {
            if i > 0 {
                self.0.push_str("↵\n");
            }
            self.text(line);
        }
        self
    }

    /// Adds an attribute: ` name="value"`.
    pub fn attr(&mut self, name: &'static str, value: &str) -> &mut Html {
        let _ = write!(self.0, " {name}=\"");
        self.text(value).raw("\"")
    }

    /// Adds an attribute with a number, with at most two decimals; 0 if it is not finite.
    pub fn attr_number(&mut self, name: &'static str, value: f64) -> &mut Html {
        let _ = write!(self.0, " {name}=\"{}\"", short(value));
        self
    }

    /// Adds an element with a text.
    pub fn element(&mut self, tag: &'static str, data: &str) -> &mut Html {
        let _ = write!(self.0, "<{tag}>");
        self.text(data);
        let _ = write!(self.0, "</{tag}>");
        self
    }

    /// Adds an element with a class and a text.
    pub fn classed(&mut self, tag: &'static str, class: &'static str, data: &str) -> &mut Html {
        let _ = write!(self.0, "<{tag} class=\"{class}\">");
        self.text(data);
        let _ = write!(self.0, "</{tag}>");
        self
    }

    /// Adds another piece.
    pub fn add(&mut self, other: &Html) -> &mut Html {
        self.0.push_str(&other.0);
        self
    }

    /// Its markup.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The length in bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True if it is empty.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A number with at most two decimals.
pub(super) fn short(value: f64) -> String {
    let value = if value.is_finite() { value } else { 0.0 };
    let text = format!("{value:.2}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".into() } else { text.into() }
}

/// Text as HTML text, with its line ends. Control characters, which HTML does not even allow as references, become
/// the replacement character.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\0'..='\x08' | '\x0b' | '\x0e'..='\x1f' | '\x7f' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// A command-line word quoted for a POSIX shell. Invisible characters are written as bash and zsh escape them.
///
/// ```
/// use suasion_data::report::page::shell_word;
/// assert_eq!(shell_word("rows.jsonl"), "rows.jsonl");
/// assert_eq!(shell_word("my rows; rm -rf"), "'my rows; rm -rf'");
/// assert_eq!(shell_word("it's"), r"'it'\''s'");
/// assert_eq!(shell_word("a\nb\u{202e}"), r"$'a\nb\u202e'");
/// ```
pub fn shell_word(word: &str) -> String {
    let plain = |c: char| {
        c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '/' | '=' | ':' | ',' | '@' | '+' | '%')
    };
    if !word.is_empty() && word.chars().all(plain) {
        return word.into();
    }
    if visible(word) == word {
        return format!("'{}'", word.replace('\'', r"'\''"));
    }
    let mut out = String::from("$'");
    for c in word.chars() {
        match c {
            '\n' => out.push_str(r"\n"),
            '\t' => out.push_str(r"\t"),
            '\'' | '\\' => out.extend(['\\', c]),
            c if visible(c.encode_utf8(&mut [0; 4])) != c.to_string() => {
                let code = c as u32;
                let _ = if code < 0x80 {
                    write!(out, r"\x{code:02x}")
                } else if code < 0x1_0000 {
                    write!(out, r"\u{code:04x}")
                } else {
                    write!(out, r"\U{code:08x}")
                };
            }
            c => out.push(c),
        }
    }
    out.push('\'');
    out
}

/// Words joined to a command line.
pub fn shell_line<'a>(words: impl IntoIterator<Item = &'a str>) -> String {
    words.into_iter().map(shell_word).collect::<Vec<_>>().join(" ")
}

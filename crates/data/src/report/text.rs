//! Text from data, made safe to print and wrapped to columns.

use unicode_width::UnicodeWidthStr;

/// Data as one line that is safe to print: line ends, tabs and other control characters, terminal escapes, direction
/// marks and invisible characters are replaced by visible signs.
///
/// ```
/// assert_eq!(suasion_data::report::visible("a\tb\r\n\x1b[31m\u{202e}"), "a⇥b␍↵␛[31m<U+202E>");
/// ```
pub fn visible(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    text.chars().for_each(|c| push_visible(&mut out, c));
    out
}

/// Text of several lines that is safe to print: as [`visible`], but line ends and tabs are kept.
///
/// ```
/// assert_eq!(suasion_data::report::printable("a\tb\n\x1b[31m"), "a\tb\n␛[31m");
/// ```
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' | '\t' => out.push(c),
            other => push_visible(&mut out, other),
        }
    }
    out
}

/// Appends the visible form of a character.
fn push_visible(out: &mut String, c: char) {
    match c {
        '\n' => out.push('↵'),
        '\t' => out.push('⇥'),
        '\u{7f}' => out.push('␡'),
        // Unicode has a picture for each C0 control, 0x2400 above it.
        '\0'..='\u{1f}' => out.extend(char::from_u32(0x2400 + c as u32)),
        _ if is_hidden(c) => {
            out.push_str("<U+");
            out.push_str(&format!("{:04X}", c as u32));
            out.push('>');
        }
        _ => out.push(c),
    }
}

/// C1 controls, direction marks, and invisible characters. The joiners (U+200C, U+200D) and variation selectors
/// are kept: emoji and several scripts are written with them.
fn is_hidden(c: char) -> bool {
    matches!(c,
        '\u{80}'..='\u{9f}' | '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}' | '\u{200e}' | '\u{200f}'
        | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
        | '\u{e0000}'..='\u{e007f}')
}

/// A unit that a line break must not split: a character with its combining marks, an emoji sequence, a flag, or
/// the visible form of a control character.
struct Cluster {
    text: String,
    width: usize,
    /// The text continues on a new line after it.
    line_end: bool,
    /// A line may end after it.
    space: bool,
}

fn clusters(text: &str) -> Vec<Cluster> {
    let mut out: Vec<Cluster> = Vec::new();
    let mut joined = false;
    let mut flag_open = false;
    for c in text.chars() {
        let regional = ('\u{1f1e6}'..='\u{1f1ff}').contains(&c);
        let attaches = joined
            || c == '\u{200d}'
            || c == '\u{200c}'
            || ('\u{1f3fb}'..='\u{1f3ff}').contains(&c)
            || (regional && flag_open)
            || (!c.is_control() && !is_hidden(c) && unicode_width::UnicodeWidthChar::width(c) == Some(0));
        joined = c == '\u{200d}';
        flag_open = regional && !flag_open;
        let attachable = out.last().is_some_and(|last| !last.line_end && !last.space);
        if attaches && attachable && !c.is_control() && !is_hidden(c) {
            if let Some(last) = out.last_mut() {
                last.text.push(c);
                last.width = last.text.width();
            }
            continue;
        }
        let mut shown = String::new();
        push_visible(&mut shown, c);
        let width = shown.width();
        out.push(Cluster { text: shown, width, line_end: c == '\n', space: c == ' ' });
    }
    out
}

/// Breaks data into lines of at most `width` columns, at spaces if possible, and after each line end (shown as
/// `↵`). A single cluster wider than `width` is a separate line. Spaces at the ends of the text are shown as `·`:
/// at the edge of a run they affect its tokenisation.
pub(crate) fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut pieces = clusters(text);
    let edge = |pieces: &mut dyn Iterator<Item = &mut Cluster>| {
        for piece in pieces.take_while(|p| p.space) {
            piece.text = "·".into();
        }
    };
    edge(&mut pieces.iter_mut());
    edge(&mut pieces.iter_mut().rev());
    let width = width.max(1);
    let mut lines = Vec::new();
    let mut start = 0;
    let mut columns = 0;
    let mut last_space = None;
    let mut i = 0;
    let join =
        |range: std::ops::Range<usize>| pieces[range].iter().map(|p| p.text.as_str()).collect::<String>();
    while i < pieces.len() {
        let piece = &pieces[i];
        if columns + piece.width > width && i > start {
            let end = last_space.map_or(i, |s: usize| s + 1);
            lines.push(join(start..end));
            (start, i, columns, last_space) = (end, end, 0, None);
            continue;
        }
        columns += piece.width;
        if piece.space {
            last_space = Some(i);
        }
        i += 1;
        if piece.line_end {
            lines.push(join(start..i));
            (start, columns, last_space) = (i, 0, None);
        }
    }
    if start < pieces.len() || lines.is_empty() {
        lines.push(join(start..pieces.len()));
    }
    lines
}

/// The first and last lines of a long text, and between them the number of omitted lines.
pub(crate) fn shorten(lines: Vec<String>, most: usize) -> Vec<String> {
    if lines.len() <= most {
        return lines;
    }
    let head = most / 2;
    let tail = most - head - 1;
    let hidden = lines.len() - head - tail;
    let mut out = lines[..head].to_vec();
    out.push(format!("(.. {hidden} lines ..)"));
    out.extend_from_slice(&lines[lines.len() - tail..]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_never_exceed_their_columns_and_lose_nothing() {
        let text = "日本語のテキスト and 👩‍👩‍👧‍👦 families, 🇩🇪🇫🇷 flags, e\u{301}te\u{301}, 👍🏽 thumbs, ❤\u{fe0f} hearts averyveryverylongwordindeed end";
        for width in 2..40 {
            let lines = wrap(text, width);
            for line in &lines {
                assert!(line.width() <= width, "{line:?} has {} of {width} columns", line.width());
            }
            assert_eq!(lines.concat(), text, "width {width}");
        }
    }

    #[test]
    fn sequences_are_never_broken() {
        // A family is one cluster of two columns; two of them do not fit into three columns.
        assert_eq!(wrap("👩‍👩‍👧‍👦👩‍👩‍👧‍👦", 3), ["👩‍👩‍👧‍👦", "👩‍👩‍👧‍👦"]);
        assert_eq!(wrap("🇩🇪🇫🇷", 3), ["🇩🇪", "🇫🇷"]);
        assert_eq!(wrap("e\u{301}e\u{301}", 1), ["e\u{301}", "e\u{301}"]);
    }

    #[test]
    fn words_stay_whole_where_they_fit() {
        assert_eq!(wrap("one two three", 8), ["one two ", "three"]);
        assert_eq!(wrap("a\nb", 8), ["a↵", "b"]);
        assert_eq!(wrap(" a b ", 8), ["·a b·"]);
        assert_eq!(wrap("", 8), [""]);
    }

    #[test]
    fn nothing_in_data_reaches_the_terminal_as_a_command() {
        let hostile: String =
            (0..0xa0).chain([0x200b, 0x2028, 0x202e, 0x2066, 0xfeff]).filter_map(char::from_u32).collect();
        let shown = visible(&hostile);
        assert!(!shown.chars().any(|c| c.is_control() || is_hidden(c)), "{shown:?}");
        assert!(wrap(&hostile, 10).concat().chars().all(|c| !c.is_control() && !is_hidden(c)));
        assert_eq!(visible("\u{9b}31m"), "<U+009B>31m");
    }
}

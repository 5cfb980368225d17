//! Cleans the text of a comment: removes everything that is not its author's argument.

/// The beginning of a moderators' footnote on r/changemyview.
const FOOTNOTE: &str = "Hello, users of CMV! This is a footnote from your moderators";

/// Counts of what is removed from a text before it becomes part of a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Lines that quote someone else (`>`).
    pub quotes: u64,
    /// Moderators' footnotes.
    pub footnotes: u64,
    /// Paragraphs that begin with `Edit:` or the like.
    pub edits: u64,
    /// Words that look like a section marker, `[TASK]`; their brackets are replaced.
    pub markers: u64,
}

impl Removed {
    /// Adds the counts of another text.
    pub fn add(&mut self, other: Removed) {
        self.quotes += other.quotes;
        self.footnotes += other.footnotes;
        self.edits += other.edits;
        self.markers += other.markers;
    }
}

/// True for the text of a deleted comment.
pub fn is_deleted(text: &str) -> bool {
    matches!(
        text.trim().trim_matches(['*', '_']),
        "" | "[deleted]" | "[removed]" | "[deleted by user]" | "[ Removed by Reddit ]"
    )
}

/// True for a comment by a bot or a moderator about a thread, by its author or its text.
pub fn is_service(author: &str, text: &str) -> bool {
    if ["deltabot", "automoderator", "changemyviewbot"].iter().any(|bot| author.eq_ignore_ascii_case(bot)) {
        return true;
    }
    let text = text.trim_start_matches(['>', '*', '_', ' ', '\n']);
    [
        "Confirmed: 1 delta awarded",
        "Confirmed - 1 delta awarded",
        "This delta has been rejected",
        "This delta is currently disallowed",
        "Note:** Your thread has",
        "Note: Your thread has",
        "Your comment has been removed",
        "Your submission has been removed",
        "Sorry, your submission has been removed",
        "Sorry, your comment has been removed",
    ]
    .iter()
    .any(|start| text.starts_with(start))
        || (text.starts_with("Sorry ")
            && text.lines().next().is_some_and(|line| line.contains("has been removed")))
}

/// True if a reply awards a delta: the sign, or the command, outside quotes.
pub fn awards_delta(text: &str) -> bool {
    let text = entities(text);
    text.lines()
        .filter(|line| !is_quote(line))
        .any(|line| line.contains(['∆', 'Δ']) || line.to_lowercase().contains("!delta"))
}

/// The text without quotes, footnotes and edits, with entities decoded and white space normalised.
pub fn clean(text: &str, removed: &mut Removed) -> String {
    let mut text = entities(text).replace("\r\n", "\n").replace('\r', "\n");
    if let Some(at) = text.find(FOOTNOTE) {
        // The footnote ends a post, below a rule; a quote sign and emphasis come before its first word.
        text.truncate(text[..at].rfind('\n').unwrap_or(0));
        let rule = |line: &str| line.chars().all(|c| matches!(c, '_' | '-' | '*' | '>' | ' '));
        while let Some(last) = text.lines().next_back().filter(|line| rule(line)) {
            text.truncate(text.trim_end_matches('\n').len() - last.len());
            text.truncate(text.trim_end().len());
        }
        removed.footnotes += 1;
    }
    let mut paragraphs = Vec::new();
    for paragraph in text.split("\n\n") {
        let mut lines = Vec::new();
        for line in paragraph.lines() {
            if is_quote(line) {
                removed.quotes += 1;
            } else {
                lines.push(line.trim_end());
            }
        }
        // An edit continues to the end of its paragraph.
        if let Some(edit) = lines.iter().position(|line| is_edit(line)) {
            lines.truncate(edit);
            removed.edits += 1;
        }
        let joined = lines.join("\n");
        let joined = joined.trim();
        if !joined.is_empty() {
            paragraphs.push(joined.to_string());
        }
    }
    let text = paragraphs.join("\n\n");
    unmarked(&text, removed)
}

/// True for a line that quotes.
fn is_quote(line: &str) -> bool {
    line.trim_start().starts_with('>')
}

/// True for a line that begins an edit: `Edit:`, `**EDIT 2**:`, `ETA -`, `Update:`.
fn is_edit(line: &str) -> bool {
    let line = line.trim_start_matches(['*', '_', '#', ' ', '[', '(']).to_ascii_lowercase();
    ["edit", "eta", "update"].iter().any(|word| {
        let Some(rest) = line.strip_prefix(word) else { return false };
        let rest = rest.trim_start_matches(|c: char| c == ' ' || c == '#' || c.is_ascii_digit());
        let rest = rest.trim_start_matches(['*', '_', ']', ')', ' ']);
        rest.starts_with([':', '-', '–', ';'])
    })
}

/// The text with different brackets around its section markers, which would otherwise begin a section of the row.
fn unmarked(text: &str, removed: &mut Removed) -> String {
    let mut text = text.to_string();
    for name in ["SYSTEM", "CONTEXT", "TASK", "RESPONSE"] {
        let marker = format!("[{name}]");
        let found = text.matches(&marker).count();
        if found > 0 {
            removed.markers += found as u64;
            text = text.replace(&marker, &format!("({name})"));
        }
    }
    text
}

/// The text with the entities that Reddit's interface writes decoded.
fn entities(text: &str) -> String {
    if !text.contains('&') {
        return text.to_string();
    }
    // `&amp;` last, so that its result is not decoded again.
    [
        ("&gt;", ">"),
        ("&lt;", "<"),
        ("&quot;", "\""),
        ("&#39;", "'"),
        ("&nbsp;", " "),
        ("&#8710;", "∆"),
        ("&#916;", "Δ"),
        ("&amp;", "&"),
    ]
    .iter()
    .fold(text.to_string(), |text, (entity, sign)| text.replace(entity, sign))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cleaned(text: &str) -> (String, Removed) {
        let mut removed = Removed::default();
        (clean(text, &mut removed), removed)
    }

    #[test]
    fn quotes_footnotes_and_edits_go() {
        let (text, removed) = cleaned(
            "I like rain.\r\n\r\n&gt; You said sun.\n\nIt waters &amp; cools.\n\n**EDIT 2:** thanks all\nreally\n\n_____\n\n> *Hello, users of \
             CMV! This is a footnote from your moderators. Happy CMVing!*",
        );
        assert_eq!(text, "I like rain.\n\nIt waters & cools.");
        assert_eq!(removed, Removed { quotes: 1, footnotes: 1, edits: 1, markers: 0 });
        // Words with the same beginning are kept, and so is an edit within a sentence.
        for same in ["Editors: they edit.", "Etaples - a town", "I edit: often.", "a > b"] {
            assert_eq!(cleaned(same).0, same);
        }
        // A section marker in a row is not one in a text.
        let (text, removed) = cleaned("do the [TASK] now");
        assert_eq!((text.as_str(), removed.markers), ("do the (TASK) now", 1));
    }

    #[test]
    fn deltas_bots_and_deleted_comments_are_told() {
        assert!(awards_delta("Fair. ∆") && awards_delta("!Delta thanks") && awards_delta("&#8710; ok"));
        assert!(!awards_delta("> ∆\n\nno") && !awards_delta("the delta of the Nile"));
        assert!(
            is_deleted(" [deleted] ")
                && is_deleted("")
                && is_deleted("*[removed]*")
                && !is_deleted("removed")
        );
        assert!(is_service("DeltaBot", "x") && is_service("u1", "Confirmed: 1 delta awarded to /u/a"));
        assert!(
            is_service("mod", "Sorry /u/a, your comment has been removed:")
                && !is_service("u1", "Sorry for you.")
        );
    }
}

//! Text for a terminal or a pipe: a row, and the summary of a data set.

use super::format::{count, percent, thousands};
use super::text::{shorten, wrap};
use super::view::{RowView, Run};
use super::visible;
use crate::pipeline::{ROWS_LISTED, Summary};
use crate::{Level, Origin};
use std::fmt::Write;

/// A sentence that says that not every duplicate was looked for.
pub fn not_remembered(rows: u64) -> String {
    format!("duplicates of {} were not looked for: the table of rows was full", count(rows, "row"))
}

/// The style of rows and summaries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Style {
    /// Use colour. Everything it shows is also in the text.
    pub color: bool,
    /// Width of the terminal in columns.
    pub width: usize,
    /// Show every token with its id.
    pub ids: bool,
    /// Show every token with its origin letter.
    pub origins: bool,
}

impl Default for Style {
    fn default() -> Self {
        Style { color: false, width: 80, ids: false, origins: false }
    }
}

/// Width of the label `LEARNED end_of_turn 12345 > `, in columns.
const GUTTER: usize = 29;

/// The maximal number of lines shown of a cut run.
const CUT_LINES: usize = 3;

impl Style {
    fn paint(&self, code: &str, text: &str) -> String {
        if self.color && !text.is_empty() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_string() }
    }

    /// Supervised runs are green and bold, cut ones red and struck through, scaffold and padding dim, prompts blue.
    fn run_code(&self, run: &Run) -> &'static str {
        match (run.cut, run.weight != 0.0, run.origin) {
            (true, ..) => "9;31",
            (_, true, Origin::Response { .. } | Origin::EndOfTurn { .. }) => "1;32",
            (_, true, _) => "1;33",
            (_, _, Origin::Scaffold | Origin::Padding) => "2",
            _ => "34",
        }
    }
}

/// A row: its counts, each run with its state and the reason, the supervised text, the findings.
pub fn row(view: &RowView, style: &Style) -> String {
    let mut out = String::new();
    let masked = view.tokens - view.supervised;
    let share = if view.tokens > 0 { view.supervised as f64 / view.tokens as f64 } else { 0.0 };
    let head = format!(
        "{} (row {}): {}, {} masked, {} supervised ({}), {}",
        visible(&view.id.to_string()),
        view.id.row,
        count(view.tokens as u64, "token"),
        thousands(masked as u64),
        thousands(view.supervised as u64),
        percent(share),
        count(view.targets as u64, "target"),
    );
    for line in wrap(&head, style.width) {
        let _ = writeln!(out, "{}", style.paint("1", line.trim_end()));
    }
    out.push('\n');
    // On a narrow terminal the text is printed below its label instead of beside it.
    let beside = style.width >= GUTTER + 20;
    for run in &view.runs {
        if let Some(begins) = &run.begins {
            let _ = writeln!(out, "{}", style.paint("1", &format!("-- {begins}")));
        }
        let code = style.run_code(run);
        let bar = match run.state() {
            "LEARNED" => '>',
            "cut" => '/',
            _ => '|',
        };
        let indent = if beside { GUTTER } else { 2 };
        let mut lines = wrap(&run.text, style.width.saturating_sub(indent).max(4));
        if run.cut {
            lines = shorten(lines, CUT_LINES);
        }
        let label =
            format!("{:<7} {:<11} {:>6}", run.state(), run.origin.name(), thousands(run.count as u64));
        for (i, line) in lines.iter().enumerate() {
            let text = style.paint(code, line);
            match (beside, i) {
                (true, 0) => _ = writeln!(out, "{} {bar} {text}", style.paint(code, &label)),
                (true, _) => _ = writeln!(out, "{:26} {bar} {text}", ""),
                (false, 0) => _ = writeln!(out, "{}\n{bar} {text}", style.paint(code, &label)),
                (false, _) => _ = writeln!(out, "{bar} {text}"),
            }
        }
        if (style.ids || style.origins) && !run.cut {
            tokens(&mut out, run, style);
        }
    }
    learned(&mut out, view, style);
    let mut reasons: Vec<(String, String)> = Vec::new();
    for run in &view.runs {
        let entry = (format!("{} {}", run.state(), run.origin.name()), run.reason());
        if !reasons.contains(&entry) {
            reasons.push(entry);
        }
    }
    out.push_str("\nwhy\n");
    for (what, why) in reasons {
        hang(&mut out, &format!("  {what:<20} "), &why, style.width);
    }
    if !view.findings.is_empty() {
        out.push_str("\nfindings\n");
        for finding in &view.findings {
            let head = format!("  {:<5} {:<8} ", finding.code.as_str(), finding.level.to_string());
            hang(&mut out, &head, &finding.message, style.width);
        }
    }
    out
}

/// Writes `head` and beside it a text that is wrapped in its own column.
fn hang(out: &mut String, head: &str, text: &str, width: usize) {
    let columns = head.chars().count();
    for (i, line) in wrap(text, width.saturating_sub(columns).max(16)).iter().enumerate() {
        let line = line.trim_end();
        let _ = if i == 0 { writeln!(out, "{head}{line}") } else { writeln!(out, "{:columns$}{line}", "") };
    }
}

/// Writes the tokens of a run: `12 R 791 "The"`.
fn tokens(out: &mut String, run: &Run, style: &Style) {
    let mut line = String::new();
    let mut columns = 0;
    let indent = "      ";
    for token in &run.tokens {
        let mut text = token.index.to_string();
        if style.origins {
            text.push(' ');
            text.push(run.origin.letter());
        }
        if style.ids {
            let _ = write!(text, " {}", token.id);
        }
        if !token.text.is_empty() {
            let _ = write!(text, " \"{}\"", visible(&token.text));
        }
        let width = unicode_width::UnicodeWidthStr::width(text.as_str());
        if columns > 0 && indent.len() + columns + 2 + width > style.width {
            let _ = writeln!(out, "{indent}{}", style.paint("2", &line));
            line.clear();
            columns = 0;
        }
        if columns > 0 {
            line.push_str("  ");
            columns += 2;
        }
        line.push_str(&text);
        columns += width;
    }
    if !line.is_empty() {
        let _ = writeln!(out, "{indent}{}", style.paint("2", &line));
    }
}

/// Writes the supervised text, between « and ».
fn learned(out: &mut String, view: &RowView, style: &Style) {
    let mut spans: Vec<String> = Vec::new();
    let mut previous = None;
    for (i, run) in view.runs.iter().enumerate() {
        if run.cut || run.weight == 0.0 {
            continue;
        }
        // A response and its stop token are shown together.
        match spans.last_mut() {
            Some(last) if previous == Some(i.wrapping_sub(1)) => last.push_str(&run.text),
            _ => spans.push(run.text.clone()),
        }
        previous = Some(i);
    }
    if spans.is_empty() {
        out.push_str("\nthe model is trained on nothing in this row\n");
        return;
    }
    out.push_str("\nthe model is trained on\n");
    for span in spans {
        for line in wrap(&format!("«{span}»"), style.width.saturating_sub(2).max(4)) {
            let _ = writeln!(out, "  {}", style.paint("1;32", &line));
        }
    }
}

/// A data set: its rows and tokens, the share of each section in the loss before and after masking, the findings.
pub fn summary(summary: &Summary, style: &Style) -> String {
    let mut out = String::new();
    let share =
        if summary.tokens > 0 { summary.supervised_tokens as f64 / summary.tokens as f64 } else { 0.0 };
    let unit = summary.unit();
    let units = format!("{unit}s");
    let mut facts = vec![(
        units.as_str(),
        format!(
            "{}: {} kept ({} cut), {} left out, {} failed",
            thousands(summary.rows),
            thousands(summary.kept),
            thousands(summary.cut),
            thousands(summary.dropped_rows()),
            thousands(summary.failed)
        ),
    )];
    for (reason, n) in &summary.dropped {
        facts.push(("", format!("left out: {} {}", thousands(*n), reason.meaning())));
    }
    if summary.packs > 0 {
        facts.push((
            "packs",
            format!("{} of {}", thousands(summary.packs), count(summary.packed_rows, "row")),
        ));
    }
    facts.push((
        "tokens",
        format!(
            "{}: {} masked, {} supervised ({})",
            thousands(summary.tokens),
            thousands(summary.tokens - summary.supervised_tokens),
            thousands(summary.supervised_tokens),
            percent(share)
        ),
    ));
    facts.push((
        "targets",
        format!(
            "{} in {}; the longest {unit} has {}",
            thousands(summary.targets),
            count(summary.trainable_rows, &format!("trainable {unit}")),
            count(summary.longest, "token")
        ),
    ));
    if summary.not_remembered > 0 {
        facts.push(("D001", not_remembered(summary.not_remembered)));
    }
    for (name, text) in facts {
        hang(&mut out, &format!("{name:<9}"), &text, style.width);
    }
    if !summary.sections.is_empty() {
        let bar = style.width.saturating_sub(48).clamp(0, 32) / 2;
        let bars = if bar >= 4 { bar } else { 0 };
        let column = bars + usize::from(bars > 0) + 7;
        let _ = writeln!(out, "\n{:<12} {:>12}  {:<column$}  now", "share of", "tokens", "loss on all");
        for (name, stats) in summary.sections() {
            let (before, after) = (summary.share_before(name), summary.share_after(name));
            let mut line = format!("{name:<12} {:>12}  ", thousands(stats.tokens));
            line.push_str(&bar_of(before, bars));
            let _ = write!(line, "{:>7}  {}{:>7}", percent(before), bar_of(after, bars), percent(after));
            let _ = writeln!(out, "{}", if after > 0.0 { style.paint("1;32", &line) } else { line });
        }
    }
    if !summary.findings.is_empty() {
        out.push_str("\nfindings\n");
        for (code, found) in &summary.findings {
            let color = match found.level {
                Level::Error => "1;31",
                Level::Warning => "33",
                Level::Note => "2",
            };
            let rows: Vec<String> = found.rows.iter().map(u64::to_string).collect();
            let more = found.count.saturating_sub(found.rows.len() as u64);
            let more = if more > 0 && found.rows.len() == ROWS_LISTED {
                format!(" and {} more", thousands(more))
            } else {
                String::new()
            };
            let head = format!(
                "  {:<5} {:<7} {:>7}  ",
                code.as_str(),
                found.level.to_string(),
                thousands(found.count)
            );
            let plural = if rows.len() == 1 { unit } else { units.as_str() };
            let text = format!("{}: {plural} {}{more}", code.rule().meaning, rows.join(", "));
            let mut block = String::new();
            hang(&mut block, &head, &text, style.width);
            for line in block.lines() {
                let _ = writeln!(out, "{}", style.paint(color, line));
            }
        }
    }
    out
}

/// A bar of `width` columns and a space; empty for a width of 0.
fn bar_of(share: f64, width: usize) -> String {
    if width == 0 {
        return String::new();
    }
    let eighths = (share.clamp(0.0, 1.0) * (width * 8) as f64).round() as usize;
    // A share above 0 is never shown as empty.
    let eighths = if share > 0.0 { eighths.max(1) } else { 0 };
    let mut bar = "█".repeat(eighths / 8);
    if eighths % 8 > 0 {
        bar.push(['▏', '▎', '▍', '▌', '▋', '▊', '▉'][eighths % 8 - 1]);
    }
    let used = eighths.div_ceil(8);
    format!("{bar}{} ", " ".repeat(width - used))
}

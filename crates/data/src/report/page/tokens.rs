//! A row of tokens, each with its state.

use super::Html;
use crate::Origin;
use crate::report::format::{count, percent, thousands};
use crate::report::view::{RowView, Run, TokenView};
use std::collections::BTreeSet;

/// The maximal number of tokens shown of one run; of a longer run, its beginning and its end.
const RUN_TOKENS: usize = 400;
/// The maximal number of tokens shown of one row.
const ROW_TOKENS: usize = 4000;
/// The same in a preview, for masked and for supervised runs.
const PREVIEW: [usize; 2] = [16, 40];
/// The maximal number of runs in a preview.
const PREVIEW_RUNS: usize = 24;
/// The maximal number of characters shown of one token.
const PIECE: usize = 200;
/// The maximal number of findings shown for one row, and of characters of each.
const FINDINGS: usize = 20;
const MESSAGE: usize = 1000;

impl Run {
    /// The CSS class of the run.
    fn class(&self) -> &'static str {
        match (self.cut, self.weight != 0.0, self.origin) {
            (true, ..) => "run cut",
            (_, true, Origin::Response { .. }) => "run learned",
            (_, true, Origin::EndOfTurn { .. }) => "run learned end",
            (_, true, _) => "run learned odd",
            (_, false, Origin::Padding) => "run padding",
            (_, false, Origin::Scaffold) => "run scaffold",
            (_, false, _) => "run masked",
        }
    }

    /// Its state and its origin: `learned`, `response`.
    fn words(&self) -> (&'static str, String) {
        let state = match self.state() {
            "LEARNED" => "learned",
            state => state,
        };
        (state, self.origin.name().replace('_', " "))
    }
}

/// The row as shown on the first screen: its runs in the flow of the text, each with its first and last tokens.
pub fn preview(view: &RowView) -> Html {
    let mut html = Html::new();
    html.raw("<article class=\"preview\">").add(&heading(view, "p"));
    html.raw("<p class=\"flow\">");
    for run in view.runs.iter().take(PREVIEW_RUNS) {
        html.raw("<span").attr("class", run.class()).attr("title", &run.reason()).raw(">");
        // Markers are self-explanatory: only supervised ones have a tag.
        let (state, origin) = run.words();
        match state {
            "masked" if run.origin == Origin::Scaffold => {}
            "masked" => _ = html.element("b", &origin),
            state => _ = html.element("b", &format!("{state} {origin}")),
        }
        let most = PREVIEW[usize::from(run.weight != 0.0)];
        match run.tokens.len() {
            0 => html.text(&run.text.chars().take(PIECE).collect::<String>()),
            n if n <= most + 4 => pieces(&mut html, &run.tokens),
            _ => {
                pieces(&mut html, &run.tokens[..most / 2]);
                let left_out = run.tokens.len() - most / 2 * 2;
                html.raw(" <em>").text(&format!("… {} …", count(left_out as u64, "token"))).raw("</em> ");
                pieces(&mut html, &run.tokens[run.tokens.len() - most / 2..])
            }
        };
        html.raw("</span>");
    }
    if view.runs.len() > PREVIEW_RUNS {
        html.classed(
            "em",
            "soft",
            &format!("… {} more parts", thousands((view.runs.len() - PREVIEW_RUNS) as u64)),
        );
    }
    html.raw("</p></article>\n");
    html
}

fn pieces<'a>(html: &'a mut Html, tokens: &[TokenView]) -> &'a mut Html {
    let text: String = tokens.iter().map(|token| short(&token.piece)).collect();
    html.text(&text)
}

fn short(piece: &str) -> std::borrow::Cow<'_, str> {
    match piece.char_indices().nth(PIECE) {
        Some((end, _)) => format!("{}…", &piece[..end]).into(),
        None => piece.into(),
    }
}

/// A row's number, its counts, and a strip of its parts.
fn heading(view: &RowView, tag: &'static str) -> Html {
    let mut html = Html::new();
    let share = if view.tokens > 0 { view.supervised as f64 / view.tokens as f64 } else { 0.0 };
    html.raw(if tag == "summary" { "<summary>" } else { "<p class=\"head\">" });
    html.element("b", &format!("Row {}", view.id.row)).raw(" ").add(&strip(view)).raw("<span>");
    match view.runs.is_empty() {
        true => html.text("no sample"),
        false => html.text(&format!(
            "{}, {} learned ({})",
            count(view.tokens as u64, "token"),
            thousands(view.supervised as u64),
            percent(share)
        )),
    };
    if let Some(loss) = view.loss {
        html.text(&format!(", loss {loss:.3}"));
    }
    html.raw("</span>");
    let codes: BTreeSet<&str> = view.findings.iter().map(|finding| finding.code.as_str()).collect();
    for code in codes.iter().filter(|_| tag != "summary") {
        html.raw(" <a class=\"code\"").attr("href", &format!("#{code}")).raw(">").text(code).raw("</a>");
    }
    html.raw(if tag == "summary" { "" } else { "</p>\n" });
    html
}

/// The parts of a row in proportion: supervised parts are filled, masked ones are pale.
fn strip(view: &RowView) -> Html {
    let mut html = Html::new();
    html.raw("<svg class=\"strip\" viewBox=\"0 0 100 8\" preserveAspectRatio=\"none\" aria-hidden=\"true\" focusable=\"false\">");
    let total = view.tokens.max(1) as f64;
    let (mut at, mut from, mut state) = (0usize, 0usize, None);
    let runs = view.runs.iter().filter(|run| !run.cut);
    for (count, class) in runs.map(|run| (run.count, Some(run.weight != 0.0))).chain([(0, None)]) {
        if class != state {
            if let Some(learned) = state.filter(|_| at > from) {
                html.raw("<rect height=\"8\"").attr_number("x", 100.0 * from as f64 / total);
                html.attr_number("width", 100.0 * (at - from) as f64 / total);
                html.raw(if learned { " class=\"accent\"/>" } else { "/>" });
            }
            (from, state) = (at, class);
        }
        at += count;
    }
    html.raw("</svg>");
    html
}

/// A row's tokens, collapsible. `why` says why the page has it. Attributes carry the data for the filters: the
/// codes of its findings, its sections and its number of tokens.
pub fn row(view: &RowView, why: &str, open: bool) -> Html {
    let mut html = Html::new();
    let codes: BTreeSet<&str> = view.findings.iter().map(|finding| finding.code.as_str()).collect();
    let sections: BTreeSet<&str> = view.runs.iter().map(|run| run.origin.name()).collect();
    html.raw("<details class=\"row\"").attr("id", &format!("row-{}", view.id.row));
    html.attr("data-codes", &joined(&codes)).attr("data-sections", &joined(&sections));
    html.attr("data-tokens", &view.tokens.to_string()).raw(if open { " open>" } else { ">" });
    html.add(&heading(view, "summary"));
    for code in &codes {
        html.raw(" ").classed("span", "code", code);
    }
    if !why.is_empty() {
        html.raw(" ").classed("span", "soft", why);
    }
    html.raw("</summary>\n").classed("p", "soft place", &view.id.to_string());
    if !view.findings.is_empty() {
        html.raw("<ul class=\"found\">");
        for finding in view.findings.iter().take(FINDINGS) {
            html.raw("<li><a")
                .attr("href", &format!("#{}", finding.code))
                .raw(">")
                .text(finding.code.as_str());
            let message: String = finding.message.chars().take(MESSAGE).collect();
            let cut = if message.len() < finding.message.len() { "…" } else { "" };
            html.raw("</a> ").text(&format!("{}: {message}{cut}", finding.level)).raw("</li>");
        }
        if let Some(more) = view.findings.len().checked_sub(FINDINGS).filter(|more| *more > 0) {
            html.classed("li", "soft", &format!("{} more", count(more as u64, "finding")));
        }
        html.raw("</ul>\n");
    }
    if view.runs.is_empty() {
        html.raw("</details>\n");
        return html;
    }
    html.raw("<div class=\"tokens\" role=\"group\"")
        .attr("aria-label", &format!("Tokens of row {}", view.id.row));
    html.raw(">\n");
    let mut left = ROW_TOKENS;
    for (i, run) in view.runs.iter().enumerate() {
        if left == 0 {
            let rest = &view.runs[i..];
            let tokens: usize = rest.iter().map(|run| run.count).sum();
            let text =
                format!("{} more parts of {} are not shown", rest.len(), count(tokens as u64, "token"));
            html.classed("p", "soft", &text);
            break;
        }
        if let Some(begins) = &run.begins {
            html.element("h4", begins);
        }
        left = left.saturating_sub(run.count.clamp(1, RUN_TOKENS));
        run_of(&mut html, run);
    }
    html.raw("</div>\n</details>\n");
    html
}

fn joined(words: &BTreeSet<&str>) -> String {
    words.iter().copied().collect::<Vec<_>>().join(" ")
}

fn run_of(html: &mut Html, run: &Run) {
    let (state, origin) = run.words();
    html.raw("<div").attr("class", run.class()).attr("data-why", &run.reason());
    if let Some(first) = run.tokens.first() {
        html.attr("data-at", &first.index.to_string());
    }
    html.raw("><p class=\"what\"")
        .attr("title", &run.reason())
        .raw("><b>")
        .text(state)
        .raw("</b> ")
        .text(&origin);
    html.raw(" <small>×").text(&thousands(run.count as u64)).raw("</small></p><p class=\"text\">");
    match run.tokens.len() {
        0 => {
            html.signed_lines(&run.text.chars().take(PIECE).collect::<String>());
        }
        n if n <= RUN_TOKENS => tokens(html, &run.tokens),
        n => {
            tokens(html, &run.tokens[..RUN_TOKENS / 2]);
            let left_out = n - RUN_TOKENS / 2 * 2;
            html.raw(" <em").attr("data-n", &left_out.to_string()).raw(">");
            html.text(&format!("… {} not shown …", count(left_out as u64, "token"))).raw("</em> ");
            tokens(html, &run.tokens[n - RUN_TOKENS / 2..]);
        }
    }
    html.raw("</p></div>\n");
}

/// Each token as an element. Tokens that form a character only together share one.
fn tokens(html: &mut Html, tokens: &[TokenView]) {
    let mut start = 0;
    while start < tokens.len() {
        let end = start + 1 + tokens[start + 1..].iter().take_while(|token| token.joined).count();
        let group = &tokens[start..end];
        let ids: Vec<String> = group.iter().map(|token| token.id.to_string()).collect();
        html.raw("<i").attr("data-id", &ids.join(" "));
        let losses: Vec<String> =
            group.iter().filter_map(|token| Some(format!("{:.2}", token.loss?))).collect();
        if !losses.is_empty() {
            html.attr("data-loss", &losses.join(" "));
        }
        html.raw(">");
        for token in group {
            html.signed_lines(&short(&token.piece));
        }
        html.raw("</i>");
        start = end;
    }
}

//! A self-contained HTML page: no script, nothing loaded from elsewhere.

use super::format::{percent, thousands};
use super::text::visible;
use super::view::RowView;
use crate::Origin;
use crate::pipeline::{ROWS_LISTED, Summary};
use std::fmt::Write;

const STYLE: &str = "\
:root{color-scheme:light dark;--fg:#1b1b1f;--bg:#fff;--soft:#5c5f66;--line:#d5d7dc;--learn:#d9f2df;--learnline:#1a7f37;--cut:#fbe3e1;--odd:#fff3cd;--bar:#4a7fd6}\
@media(prefers-color-scheme:dark){:root{--fg:#e6e6ea;--bg:#16171a;--soft:#a2a6b0;--line:#3a3d45;--learn:#12351d;--learnline:#4ac26b;--cut:#47211f;--odd:#443a12;--bar:#7aa7f0}}\
body{font:16px/1.5 system-ui,sans-serif;color:var(--fg);background:var(--bg);max-width:60rem;margin:2rem auto;padding:0 1rem}\
table{border-collapse:collapse;width:100%}th,td{text-align:left;padding:.25rem .6rem;border-bottom:1px solid var(--line);vertical-align:top}\
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}\
.text{white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid var(--line);border-radius:.4rem;padding:.8rem;font:14px/1.7 ui-monospace,monospace}\
.run{border-radius:.2rem;color:var(--soft)}\
.learned{background:var(--learn);color:var(--fg);border-bottom:2px solid var(--learnline);font-weight:600}\
.odd{background:var(--odd)}.cut{background:var(--cut);text-decoration:line-through}\
.tag{font:11px/1 system-ui,sans-serif;font-weight:600;border:1px solid currentColor;border-radius:.2rem;padding:0 .25rem;margin:0 .15rem;text-decoration:none;display:inline-block}\
meter{width:8rem}.soft{color:var(--soft)}";

/// A page with the summary of a data set and some of its rows.
pub fn page(title: &str, rows: &[RowView], summary: &Summary) -> String {
    let title = shown(title);
    let mut out = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n"
    );
    summary_section(&mut out, summary);
    for view in rows {
        row_section(&mut out, view);
    }
    out.push_str("</main>\n</body>\n</html>\n");
    out
}

fn summary_section(out: &mut String, summary: &Summary) {
    let share =
        if summary.tokens > 0 { summary.supervised_tokens as f64 / summary.tokens as f64 } else { 0.0 };
    let unit = summary.unit();
    let packs = match summary.packs {
        0 => String::new(),
        packs => format!(" {} packs of {} rows.", thousands(packs), thousands(summary.packed_rows)),
    };
    let _ = write!(
        out,
        "<section>\n<h2>The data set</h2>\n<p>{} {unit}s: {} kept ({} cut), {} left out, {} failed.{packs}<br>\n\
         {} tokens: {} masked, <strong>{} supervised ({})</strong>, {} targets in {} trainable {unit}s.</p>\n",
        thousands(summary.rows),
        thousands(summary.kept),
        thousands(summary.cut),
        thousands(summary.dropped_rows()),
        thousands(summary.failed),
        thousands(summary.tokens),
        thousands(summary.tokens - summary.supervised_tokens),
        thousands(summary.supervised_tokens),
        percent(share),
        thousands(summary.targets),
        thousands(summary.trainable_rows),
    );
    out.push_str(
        "<table>\n<caption>Share of each section in the loss</caption>\n<thead><tr><th scope=\"col\">section</th>\
         <th scope=\"col\" class=\"n\">tokens</th><th scope=\"col\">if the loss were on all tokens</th>\
         <th scope=\"col\">now</th></tr></thead>\n<tbody>\n",
    );
    for (name, stats) in summary.sections() {
        let cell = |share: f64| {
            format!(
                "<td><meter min=\"0\" max=\"1\" value=\"{share:.4}\" aria-hidden=\"true\"></meter> {}</td>",
                shown(&percent(share))
            )
        };
        let _ = writeln!(
            out,
            "<tr><th scope=\"row\">{name}</th><td class=\"n\">{}</td>{}{}</tr>",
            thousands(stats.tokens),
            cell(summary.share_before(name)),
            cell(summary.share_after(name)),
        );
    }
    out.push_str("</tbody>\n</table>\n");
    if !summary.findings.is_empty() {
        out.push_str(
            "<h3>Findings</h3>\n<table>\n<thead><tr><th scope=\"col\">code</th><th scope=\"col\">level</th>\
             <th scope=\"col\" class=\"n\">count</th><th scope=\"col\">meaning</th><th scope=\"col\">rows</th></tr></thead>\n<tbody>\n",
        );
        for (code, found) in &summary.findings {
            let mut rows: String = found.rows.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
            let more = found.count.saturating_sub(found.rows.len() as u64);
            if more > 0 && found.rows.len() == ROWS_LISTED {
                let _ = write!(rows, " and {} more", thousands(more));
            }
            let _ = writeln!(
                out,
                "<tr><th scope=\"row\">{code}</th><td>{}</td><td class=\"n\">{}</td><td>{}</td><td>{rows}</td></tr>",
                found.level,
                thousands(found.count),
                shown(code.rule().meaning),
            );
        }
        out.push_str("</tbody>\n</table>\n");
    }
    out.push_str("</section>\n");
}

fn row_section(out: &mut String, view: &RowView) {
    let _ = write!(
        out,
        "<section>\n<h2>Row {} <span class=\"soft\">{}</span></h2>\n<p>{} tokens: {} masked, \
         <strong>{} supervised</strong>, {} targets. What is learned is bold, underlined and tagged \u{201c}LEARNED\u{201d}.</p>\n<div class=\"text\">",
        view.id.row,
        shown(&view.id.to_string()),
        thousands(view.tokens as u64),
        thousands((view.tokens - view.supervised) as u64),
        thousands(view.supervised as u64),
        thousands(view.targets as u64),
    );
    for run in &view.runs {
        if let Some(begins) = &run.begins {
            let _ = write!(out, "<h3>{}</h3>", shown(begins));
        }
        let expected = matches!(run.origin, Origin::Response { .. } | Origin::EndOfTurn { .. });
        let class = match (run.cut, run.weight != 0.0) {
            (true, _) => "run cut",
            (false, true) if expected => "run learned",
            (false, true) => "run learned odd",
            (false, false) => "run",
        };
        let _ = write!(
            out,
            "<span class=\"{class}\" title=\"{}\"><span class=\"tag\">{} {} \u{d7}{}</span>{}</span>",
            shown(&run.reason()),
            run.state(),
            run.origin,
            thousands(run.count as u64),
            shown_lines(&run.text),
        );
    }
    out.push_str("</div>\n");
    if !view.findings.is_empty() {
        out.push_str("<ul>\n");
        for finding in &view.findings {
            let _ = writeln!(
                out,
                "<li><strong>{} {}</strong>: {}</li>",
                finding.code,
                finding.level,
                shown(&finding.message)
            );
        }
        out.push_str("</ul>\n");
    }
    out.push_str("</section>\n");
}

/// Data as HTML text on one line, with control and direction characters made visible.
fn shown(text: &str) -> String {
    escape(&visible(text))
}

/// Text as HTML text, with its line ends. Control characters, which HTML does not allow even as references, become the
/// replacement character.
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

/// As [`shown`], with line ends and a sign for each.
fn shown_lines(text: &str) -> String {
    text.split('\n').map(shown).collect::<Vec<_>>().join("↵\n")
}

//! `report.html`: one page without scripts and without external resources.

use crate::report::data::{FindingCount, SectionShare};
use crate::report::input::{Input, Losses};
use std::fmt::Write;
use suasion_data::report::format::{duration, loss, percent, thousands};
use suasion_data::report::html::escape;

/// The most points drawn of a curve; longer curves are averaged over runs of equal length.
const POINTS: usize = 600;

const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1d2330; --soft: #5a6474; --page: #fff; --line: #d5dae2; --card: #f5f6f9; --train: #0b62b5; --eval: #b3470a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #a3acba; --page: #14171d; --line: #363d49; --card: #1d222b; --train: #6fb3ff; --eval: #ffa05c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 60rem; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p.soft, caption, .soft { color: var(--soft); }
table { border-collapse: collapse; width: 100%; } caption { text-align: left; padding-bottom: .3rem; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.scroll { overflow-x: auto; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .8rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .9rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
.grid { stroke: var(--line); } .train { stroke: var(--train); fill: none; stroke-width: 1.8; } .eval { stroke: var(--eval); fill: none; stroke-width: 1.8; stroke-dasharray: 5 4; } .dot { fill: var(--eval); }
.bar { display: block; height: .55rem; background: var(--train); border-radius: 3px; min-width: 1px; } .track { background: var(--line); border-radius: 3px; min-width: 8rem; }
";

/// The whole page.
pub(super) fn page(input: &Input<'_>) -> String {
    let title = escape(&input.title());
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n\
         <style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n<p>Trained on {}.</p>\n",
        escape(input.objective())
    );
    if let Some(divergence) = &input.report.diverged {
        let _ = writeln!(page, "<p><strong>{}</strong></p>", escape(&divergence.to_string()));
    }
    curve(&mut page, input);
    shares(&mut page, input);
    sections(&mut page, input);
    comparison(&mut page, input);
    findings(&mut page, input);
    replies(&mut page, input);
    page.push_str("<h2>The run</h2>\n");
    let rows =
        input.facts().into_iter().map(|(name, value)| vec![Cell::Head(name.to_string()), Cell::Text(value)]);
    table(&mut page, "", &[], rows.collect());
    page.push_str("<h2>Configuration</h2>\n");
    let (_, configuration) = input.configuration();
    let _ = write!(page, "<pre>{}</pre>\n</main>\n</body>\n</html>\n", escape(&configuration));
    page
}

enum Cell {
    /// The head of its row.
    Head(String),
    Text(String),
    Number(String),
    /// A share as a number and a bar.
    Share(f64),
}

fn table(page: &mut String, caption: &str, heads: &[(&str, bool)], rows: Vec<Vec<Cell>>) {
    page.push_str("<div class=\"scroll\"><table>\n");
    if !caption.is_empty() {
        let _ = writeln!(page, "<caption>{}</caption>", escape(caption));
    }
    if !heads.is_empty() {
        page.push_str("<thead><tr>");
        for (head, numeric) in heads {
            let class = if *numeric { " class=\"n\"" } else { "" };
            let _ = write!(page, "<th scope=\"col\"{class}>{}</th>", escape(head));
        }
        page.push_str("</tr></thead>\n");
    }
    page.push_str("<tbody>\n");
    for row in rows {
        page.push_str("<tr>");
        for cell in row {
            let _ = match cell {
                Cell::Head(text) => write!(page, "<th scope=\"row\">{}</th>", escape(&text)),
                Cell::Text(text) => write!(page, "<td>{}</td>", escape(&text)),
                Cell::Number(text) => write!(page, "<td class=\"n\">{}</td>", escape(&text)),
                Cell::Share(share) => write!(
                    page,
                    "<td>{}<span class=\"track\" style=\"display:block\" aria-hidden=\"true\"><span class=\"bar\" style=\"width:{:.2}%\"></span></span></td>",
                    percent(share),
                    100.0 * share.clamp(0.0, 1.0)
                ),
            };
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</tbody>\n</table></div>\n");
}

/// A curve in at most [`POINTS`] points.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let size = points.len().div_ceil(POINTS).max(1);
    let mean = |run: &[(f64, f64)]| {
        let n = run.len() as f64;
        (run.iter().map(|p| p.0).sum::<f64>() / n, run.iter().map(|p| p.1).sum::<f64>() / n)
    };
    points.chunks(size).map(mean).collect()
}

/// Round values that divide `low..=high` into about `count` parts.
fn ticks(low: f64, high: f64, count: f64) -> Vec<f64> {
    let rough = ((high - low) / count).max(f64::MIN_POSITIVE);
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= rough).unwrap_or(rough);
    let first = (low / step).ceil() as i64;
    (first..).map(|i| i as f64 * step).take_while(|tick| *tick <= high + step * 1e-9).take(20).collect()
}

fn curve(page: &mut String, input: &Input<'_>) {
    let report = input.report;
    let train: Vec<(f64, f64)> = report.steps.iter().filter_map(|s| Some((s.step as f64, s.loss?))).collect();
    let eval: Vec<(f64, f64)> = report.evals.iter().map(|e| (e.step as f64, e.eval_loss)).collect();
    let all: Vec<(f64, f64)> = thinned(&train).into_iter().chain(eval.iter().copied()).collect();
    page.push_str("<h2>Loss</h2>\n");
    if all.is_empty() {
        page.push_str("<p class=\"soft\">No step was logged.</p>\n");
        return;
    }
    let (width, height, left, right, top, bottom) = (760.0, 300.0, 56.0, 16.0, 16.0, 40.0);
    let last = (report.total_steps as f64).max(1.0);
    let low = all.iter().map(|p| p.1).fold(f64::INFINITY, f64::min);
    let high = all.iter().map(|p| p.1).fold(f64::NEG_INFINITY, f64::max);
    // A flat curve still needs a height.
    let margin = ((high - low) * 0.05).max(1e-3);
    let (low, high) = (low - margin, high + margin);
    let x = |step: f64| left + step / last * (width - left - right);
    let y = |loss: f64| top + (high - loss) / (high - low) * (height - top - bottom);

    let ends = |name: &str, points: &[(f64, f64)]| match (points.first(), points.last()) {
        (Some(a), Some(b)) if points.len() > 1 => {
            format!("{name} goes from {} at step {} to {} at step {}.", loss(a.1), a.0, loss(b.1), b.0)
        }
        (Some(a), _) => format!("{name} is {} at step {}.", loss(a.1), a.0),
        _ => String::new(),
    };
    let description = [ends("The training loss", &train), ends("The held-out loss", &eval)].join(" ");
    let description = description.trim();
    let _ = write!(
        page,
        "<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-labelledby=\"loss-title loss-desc\">\n\
         <title id=\"loss-title\">Loss over steps</title>\n<desc id=\"loss-desc\">{}</desc>\n",
        escape(description)
    );
    for tick in ticks(low, high, 5.0) {
        let at = y(tick);
        let label = if high - low < 0.5 { format!("{tick:.3}") } else { format!("{tick:.1}") };
        let _ = writeln!(
            page,
            "<line class=\"grid\" x1=\"{left}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/><text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
            width - right,
            left - 8.0,
            at + 4.0
        );
    }
    for tick in ticks(0.0, last, 6.0).into_iter().filter(|tick| tick.fract() == 0.0) {
        let _ = writeln!(
            page,
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{tick}</text>",
            x(tick),
            height - bottom + 18.0
        );
    }
    let _ = writeln!(
        page,
        "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">step</text>",
        x(last / 2.0),
        height - 4.0
    );
    let line = |points: &[(f64, f64)]| {
        points
            .iter()
            .map(|(step, loss)| format!("{:.1},{:.1}", x(*step), y(*loss)))
            .collect::<Vec<_>>()
            .join(" ")
    };
    let _ = writeln!(page, "<polyline class=\"train\" points=\"{}\"/>", line(&thinned(&train)));
    let _ = writeln!(page, "<polyline class=\"eval\" points=\"{}\"/>", line(&eval));
    for (step, loss) in &eval {
        let (at, over) = (x(*step), y(*loss));
        let _ = writeln!(
            page,
            "<path class=\"dot\" d=\"M{at:.1} {:.1}L{:.1} {over:.1}L{at:.1} {:.1}L{:.1} {over:.1}Z\"/>",
            over - 5.0,
            at + 5.0,
            over + 5.0,
            at - 5.0
        );
    }
    page.push_str("</svg>\n");
    let _ = writeln!(
        page,
        "<p class=\"soft\">Solid line: training loss of the logged steps. Dashed line with diamonds: held-out loss. {}</p>",
        escape(description)
    );
    if !eval.is_empty() {
        page.push_str("<details><summary>Held-out losses as a table</summary>\n");
        let row =
            |e: &crate::EvalRecord| vec![Cell::Number(e.step.to_string()), Cell::Number(loss(e.eval_loss))];
        let rows = report.evals.iter().map(row).collect();
        table(page, "", &[("step", true), ("loss", true)], rows);
        page.push_str("</details>\n");
    }
}

fn shares(page: &mut String, input: &Input<'_>) {
    if input.card.sections.is_empty() {
        return;
    }
    page.push_str("<h2>Training signal by section</h2>\n");
    let row = |s: &SectionShare| {
        let name = Cell::Head(s.name.clone());
        vec![name, Cell::Number(thousands(s.tokens)), Cell::Share(s.share_before), Cell::Share(s.share_after)]
    };
    let caption = "Each section's share of the training signal, for training on all tokens and in this run.";
    let heads = [("section", false), ("tokens", true), ("all tokens", false), ("this run", false)];
    table(page, caption, &heads, input.card.sections.iter().map(row).collect());
}

fn sections(page: &mut String, input: &Input<'_>) {
    let losses = input.losses();
    if losses.is_empty() {
        return;
    }
    page.push_str("<h2>Held-out loss by section</h2>\n");
    let row = |Losses { name, tokens, before, after }: Losses| {
        let numbers = [thousands(tokens), loss(before), loss(after)].map(Cell::Number);
        std::iter::once(Cell::Head(name.into())).chain(numbers).collect()
    };
    let rows = losses.into_iter().map(row).collect();
    let caption = "Mean negative log-likelihood in nats per token, before and after training.";
    table(page, caption, &[("section", false), ("tokens", true), ("before", true), ("after", true)], rows);
}

fn comparison(page: &mut String, input: &Input<'_>) {
    let Some(c) = input.comparison else { return };
    page.push_str("<h2>Responses only compared with all tokens</h2>\n<ul>\n");
    for line in &c.verdict {
        let _ = writeln!(page, "<li>{}</li>", escape(line));
    }
    page.push_str("</ul>\n");
    let rows = crate::evaluate::SECTIONS.iter().filter_map(|name| {
        let of = |arm: &crate::compare::Arm| arm.evaluation.sections.get(*name).map(|s| s.loss);
        let tokens = c.before.evaluation.sections.get(*name)?.targets;
        let numbers = [of(&c.before), of(&c.response_only), of(&c.all_tokens)].map(|v| Cell::Number(loss(v)));
        let start = [Cell::Head(name.to_string()), Cell::Number(thousands(tokens))];
        Some(start.into_iter().chain(numbers).collect())
    });
    let caption = format!(
        "Held-out loss by section. Training took {} steps: {} on responses only, {} on all tokens.",
        thousands(c.steps),
        duration(c.response_only.seconds),
        duration(c.all_tokens.seconds)
    );
    let heads = [
        ("section", false),
        ("tokens", true),
        ("before", true),
        ("responses only", true),
        ("all tokens", true),
    ];
    table(page, &caption, &heads, rows.collect());
}

fn findings(page: &mut String, input: &Input<'_>) {
    page.push_str("<h2>Findings</h2>\n");
    if input.card.findings.is_empty() {
        page.push_str("<p>There are no findings in the data.</p>\n");
    } else {
        let row = |f: &FindingCount| {
            let code = Cell::Head(f.code.clone());
            vec![
                code,
                Cell::Text(f.level.clone()),
                Cell::Number(thousands(f.count)),
                Cell::Text(f.example.clone()),
            ]
        };
        let heads = [("code", false), ("level", false), ("count", true), ("example", false)];
        table(page, "", &heads, input.card.findings.iter().map(row).collect());
    }
    if !input.report.warnings.is_empty() {
        page.push_str("<h3>Warnings</h3>\n<ul>\n");
        for warning in &input.report.warnings {
            let _ = writeln!(page, "<li>{}</li>", escape(warning));
        }
        page.push_str("</ul>\n");
    }
}

fn replies(page: &mut String, input: &Input<'_>) {
    for (i, reply) in input.replies.iter().enumerate() {
        if i == 0 {
            page.push_str("<h2>Generated replies</h2>\n");
        }
        let mut part = |name: &str, text: &str| {
            let _ = writeln!(page, "<h3>{}</h3>\n<pre>{}</pre>", escape(name), escape(text));
        };
        part("Prompt", &reply.prompt);
        part(&format!("Reply ({})", reply.stopped), &reply.reply);
        if let Some(reference) = &reply.reference {
            part("Reference reply", reference);
        }
    }
}

//! The page of `verify`: whether the data is masked correctly, why, and what to do next.

mod verdict;

use super::Losses;
use super::format::{count, thousands};
use super::gallery::{Chosen, Gallery};
use super::page::{self, Cell, Histogram, Html, Page, Share, Table, details, paragraph, shares};
use crate::pipeline::{CodeCount, ROWS_LISTED, Summary};
use crate::{Code, Level, Objective};
use std::collections::{BTreeMap, BTreeSet};
use verdict::{command, next, reasons, verdict};

/// The maximal size of the rows of a page, in bytes; the rest of the page takes some 100 kB.
const ROW_BYTES: usize = 3_500_000;
/// The number of rows on the first screen.
const FIRST: usize = 3;

/// The content of the page.
#[derive(Debug)]
pub struct Verified<'a> {
    /// The source, as the user gave it.
    pub name: String,
    /// The summary of its rows.
    pub summary: &'a Summary,
    /// The gallery of rows kept for the page.
    pub gallery: &'a Gallery,
    /// The chosen rows.
    pub rows: Vec<Chosen>,
    /// A model's losses on the gallery's sample, if they were measured.
    pub losses: Option<Losses>,
    /// The training objective.
    pub objective: Objective,
    /// The flags that give data, model and configuration, for the commands of the page; empty if the page has no
    /// commands.
    pub flags: Vec<String>,
    /// True if the rows were prepared by suasion.
    pub prepared: bool,
    /// True if a tokenizer is known.
    pub tokenizer: bool,
}

/// The page.
pub fn page(verified: &Verified<'_>) -> String {
    let mut page = Page::new("suasion verify", &verified.name);
    let (tone, sentence) = verdict(verified);
    page.verdict(tone, &sentence, &reasons(verified));

    let mut previews = paragraph("What has a green tag and a line under it is learned; the rest is masked.");
    let asked = verified.rows.iter().filter(|row| row.asked && !row.view.runs.is_empty());
    let mut asked: Vec<&Chosen> = asked.collect();
    // A row with a finding is more useful than one without.
    asked.sort_by_key(|row| (row.view.findings.is_empty(), row.view.id.row));
    let others = verified.rows.iter().filter(|row| !row.asked && !row.view.runs.is_empty());
    for row in asked.into_iter().chain(others).take(FIRST) {
        previews.add(&page::preview(&row.view));
    }
    if verified.rows.iter().any(|row| !row.view.runs.is_empty()) {
        page.lead("What is learned, in three rows", &previews);
    }
    page.lead("Next", &page::steps(&next(verified)));

    let (list, kept) = render(&verified.rows);
    page.section("shares", "Where the loss goes", &where_the_loss_goes(verified));
    page.section("findings", "Findings", &findings(verified, &kept));
    page.section("lengths", "Lengths and shares", &histograms(verified));
    page.section("rows", "Rows", &rows(verified, &list, &kept));
    page.section("numbers", "In numbers", &numbers(verified.summary).html());
    page.finish()
}

/// Findings of a level, by code.
fn of_level(summary: &Summary, level: Level) -> impl Iterator<Item = (&Code, &CodeCount)> {
    summary.findings.iter().filter(move |(_, found)| found.level == level)
}

fn where_the_loss_goes(verified: &Verified<'_>) -> Html {
    let summary = verified.summary;
    let share = |(name, stats): (&str, &crate::SectionStats)| Share {
        name: name.replace('_', " "),
        tokens: stats.tokens,
        before: summary.share_before(name),
        after: summary.share_after(name),
    };
    let sections: Vec<Share> = summary.sections().map(share).collect();
    let mut html = Html::new();
    if sections.is_empty() {
        return html;
    }
    let caption = "Each section’s share of the loss, by its number of tokens: if all tokens were learned, and with these labels.";
    html.add(&shares(caption, ["section", "tokens", "all tokens", "these labels"], &sections));
    let Some(losses) = verified.losses.as_ref().filter(|losses| losses.rows > 0) else { return html };
    html.element("h3", "In the model’s own loss");
    let row = |s: super::losses::SectionLoss| {
        vec![
            Cell::Head(s.name.replace('_', " ")),
            Cell::Number(format!("{:.3}", s.mean)),
            Cell::Share(s.before),
            Cell::Accent(s.after),
        ]
    };
    let table = Table {
        caption: format!(
            "A token that the model predicts well counts little. Measured on {}: the mean loss of each section in nats \
             per token, and its share of the whole.",
            match losses.rows == summary.kept {
                true => format!("all {}", count(losses.rows, summary.unit())),
                false => format!("a sample of {}", count(losses.rows, summary.unit())),
            }
        ),
        heads: vec!["section", "loss", "all tokens", "these labels"],
        rows: losses.sections().into_iter().map(row).collect(),
    };
    html.add(&table.html());
    html
}

fn histograms(verified: &Verified<'_>) -> Html {
    let Verified { summary, gallery, losses, .. } = verified;
    let mut html = Html::new();
    if summary.kept == 0 {
        return html;
    }
    let unit = summary.unit();
    let lengths: BTreeMap<u64, u64> = gallery.lengths.iter().map(|(length, n)| (*length, *n)).collect();
    let width = 100.0 / gallery.shares.len() as f64;
    let bin = |(i, n): (usize, &u64)| (i as f64 * width, (i + 1) as f64 * width, *n);
    let share = Histogram {
        title: "Share of a row that is learned.".into(),
        noun: unit.into(),
        unit: "%".into(),
        bins: gallery.shares.iter().enumerate().map(bin).collect(),
        whole: false,
        span: None,
    };
    let mut pieces =
        vec![Histogram::of_counts("Length of a row.", unit, "tokens", &lengths).html(), share.html()];
    if let Some(losses) = losses {
        let title = "Loss of a row over what it learns.";
        pieces.push(Histogram::of_values(title, unit, "nats per token", &losses.per_row).html());
    }
    html.add(&page::columns(&pieces));
    html
}

fn findings(verified: &Verified<'_>, in_page: &BTreeSet<u64>) -> Html {
    let summary = verified.summary;
    let mut html = Html::new();
    if summary.findings.is_empty() {
        return paragraph("Nothing was found. Every rule was checked on every row.");
    }
    let unit = summary.unit();
    for level in [Level::Error, Level::Warning, Level::Note] {
        for (code, found) in of_level(summary, level) {
            let rule = code.rule();
            html.raw("<article")
                .attr("class", &format!("finding {level}"))
                .attr("id", code.as_str())
                .raw(">\n<h3>");
            html.classed("span", "code", code.as_str())
                .raw(" ")
                .text(rule.meaning)
                .raw("</h3>\n<p class=\"soft\">");
            html.text(&format!("{level}, {} ×, {unit}", thousands(found.count)));
            html.raw(if found.rows.len() == 1 { " " } else { "s " });
            for (i, row) in found.rows.iter().enumerate() {
                html.raw(if i == 0 { "" } else { ", " });
                match in_page.contains(row) {
                    true => html
                        .raw("<a")
                        .attr("href", &format!("#row-{row}"))
                        .raw(">")
                        .text(&row.to_string())
                        .raw("</a>"),
                    false => html.text(&row.to_string()),
                };
            }
            let more = found.count.saturating_sub(found.rows.len() as u64);
            if more > 0 && found.rows.len() == ROWS_LISTED {
                html.text(&format!(" and {} more", thousands(more)));
            }
            html.raw(" · <a href=\"#rows\"")
                .attr("data-filter", code.as_str())
                .raw(">show its rows</a></p>\n<p>");
            html.element("b", "Remedy:").raw(" ").text(rule.help).raw(".</p>\n");
            html.add(&details("What it means", &prose(rule.doc))).raw("</article>\n");
        }
    }
    html
}

/// The text of a rule: paragraphs and lists with `code`, in the Markdown that docs/findings.md is generated from.
fn prose(markdown: &str) -> Html {
    let mut html = Html::new();
    let inline = |html: &mut Html, text: &str| {
        for (i, part) in text.split('`').enumerate() {
            match i % 2 {
                // Only the names of links; their targets are files of the repository.
                0 => html.text(&part.replace("](", "\u{1}").split('[').map(link_name).collect::<String>()),
                _ => html.element("code", part),
            };
        }
    };
    for part in markdown.split("\n\n") {
        let items: Vec<&str> = part.split('\n').filter_map(|line| line.strip_prefix("- ")).collect();
        if items.is_empty() {
            html.raw("<p>");
            inline(&mut html, part);
            html.raw("</p>\n");
            continue;
        }
        html.raw("<ul>");
        for item in items {
            html.raw("<li>");
            inline(&mut html, item);
            html.raw("</li>");
        }
        html.raw("</ul>\n");
    }
    html
}

/// `name\u{1}target) rest` as `name rest`; other text unchanged.
fn link_name(text: &str) -> String {
    let Some((name, rest)) = text.split_once('\u{1}') else { return text.to_string() };
    format!("{name}{}", rest.split_once(')').map_or("", |(_, rest)| rest))
}

/// As many rows as fit, and their numbers.
fn render(rows: &[Chosen]) -> (Html, BTreeSet<u64>) {
    let (mut list, mut kept) = (Html::new(), BTreeSet::new());
    for row in rows {
        let one = page::row(&row.view, &row.why, row.asked && kept.is_empty());
        if kept.is_empty() || list.len() + one.len() <= ROW_BYTES {
            list.add(&one);
            kept.insert(row.view.id.row);
        }
    }
    (list, kept)
}

fn rows(verified: &Verified<'_>, list: &Html, kept: &BTreeSet<u64>) -> Html {
    let summary = verified.summary;
    let unit = summary.unit();
    let mut html = Html::new();
    let (mut codes, mut sections, mut lengths) = (BTreeSet::new(), BTreeSet::new(), Vec::new());
    for row in verified.rows.iter().filter(|row| kept.contains(&row.view.id.row)) {
        codes.extend(row.view.findings.iter().map(|finding| finding.code));
        sections.extend(row.view.runs.iter().map(|run| run.origin.name()));
        lengths.extend((row.view.tokens > 0).then_some(row.view.tokens as u64));
    }
    let in_page = kept.len() as u64;
    if in_page == 0 {
        return html;
    }
    let rest = summary.rows.saturating_sub(in_page);
    if rest > 0 {
        html.raw("<p>").text(&format!(
            "{} of {} are here: those with findings (of each code the first), the longest and shortest, those of which \
             most and least is learned, and a sample of the others. To see another:",
            thousands(in_page),
            count(summary.rows, unit)
        ));
        html.raw("</p>\n");
        if let Some(line) = command(verified, "verify", &["--row", "N"]) {
            html.raw("<div class=\"command\"><code>").text(&line).raw("</code></div>\n");
        }
    }
    html.raw("<p class=\"soft\">Keys: <code>[</code> <code>]</code> for rows, <code>j</code> <code>k</code> or arrows for \
              what is learned and masked, arrows for tokens.</p>\n");
    html.raw("<form class=\"filters\" hidden>");
    let mut select =
        |label: &'static str, name: &'static str, any: &'static str, options: Vec<(String, String)>| {
            if options.len() < 2 && name != "codes" || options.is_empty() {
                return;
            }
            html.raw("<label>")
                .text(label)
                .raw(" <select")
                .attr("name", name)
                .raw("><option value=\"\">")
                .raw(any);
            html.raw("</option>");
            for (value, text) in options {
                html.raw("<option").attr("value", &value).raw(">").text(&text).raw("</option>");
            }
            html.raw("</select></label>");
        };
    let text = |code: &Code| (code.to_string(), format!("{code} {}", code.rule().meaning));
    select("Finding", "codes", "any or none", codes.iter().map(text).collect());
    let known = crate::SECTION_ORDER.iter().filter(|name| sections.contains(**name));
    select(
        "Section",
        "sections",
        "any",
        known.map(|name| (name.to_string(), name.replace('_', " "))).collect(),
    );
    select("Length", "tokens", "any", length_ranges(lengths));
    html.raw("<output></output></form>\n").add(list);
    html
}

/// Four ranges of lengths with similar numbers of rows, as `from-to` and as text.
fn length_ranges(mut lengths: Vec<u64>) -> Vec<(String, String)> {
    lengths.sort_unstable();
    let Some(last) = lengths.last().copied() else { return Vec::new() };
    let mut bounds: Vec<u64> =
        (1..4).map(|quarter| lengths[(lengths.len() - 1) * quarter / 4]).chain([last]).collect();
    bounds.dedup();
    let mut from = 0;
    let range = |to: u64| {
        let words = match from {
            0 => format!("up to {} tokens", thousands(to)),
            from => format!("{} to {} tokens", thousands(from), thousands(to)),
        };
        let value = format!("{from}-{to}");
        from = to + 1;
        (value, words)
    };
    bounds.into_iter().map(range).collect()
}

fn numbers(summary: &Summary) -> Table {
    let unit = summary.unit();
    let mut facts = vec![
        (format!("{unit}s"), thousands(summary.rows)),
        ("kept".into(), thousands(summary.kept)),
        ("cut".into(), thousands(summary.cut)),
        ("left out".into(), thousands(summary.dropped_rows())),
        ("failed".into(), thousands(summary.failed)),
        (
            "tokens".into(),
            format!("{}, the longest {unit} has {}", thousands(summary.tokens), thousands(summary.longest)),
        ),
        ("supervised tokens".into(), thousands(summary.supervised_tokens)),
        (
            "targets".into(),
            format!(
                "{} in {}",
                thousands(summary.targets),
                count(summary.trainable_rows, &format!("trainable {unit}"))
            ),
        ),
    ];
    if summary.packs > 0 {
        facts.push((
            "packs".into(),
            format!("{} of {}", thousands(summary.packs), count(summary.packed_rows, "row")),
        ));
    }
    if let Some(source) = &summary.source {
        facts.push(("BLAKE3 of the source".into(), source.blake3.clone()));
    }
    Table::facts(facts)
}

//! Tables, and shares as bars.

use super::Html;
use super::html::short;
use crate::report::format::{percent, thousands};

/// A cell of a [`Table`].
#[derive(Clone, Debug, PartialEq)]
pub enum Cell {
    /// The head of its row.
    Head(String),
    /// Text.
    Text(String),
    /// A number, right-aligned.
    Number(String),
    /// A share of 1 as a number and a bar.
    Share(f64),
    /// The same in the accent colour: the actual share, beside a hypothetical one.
    Accent(f64),
    /// Markup.
    Html(Html),
}

/// A table. It scrolls separately if the page is narrower.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table {
    /// A description in a sentence; may be empty.
    pub caption: String,
    /// The heads of its columns; none for a list of facts. A column of numbers is right-aligned.
    pub heads: Vec<&'static str>,
    /// Its rows.
    pub rows: Vec<Vec<Cell>>,
}

impl Table {
    /// A list of facts: a name and a text in each row.
    pub fn facts(facts: impl IntoIterator<Item = (String, String)>) -> Table {
        let row = |(name, text)| vec![Cell::Head(name), Cell::Text(text)];
        Table { rows: facts.into_iter().map(row).collect(), ..Table::default() }
    }

    /// Its markup.
    pub fn html(&self) -> Html {
        let mut html = Html::new();
        html.raw("<div class=\"scroll\"><table");
        if self.heads.is_empty() {
            html.attr("class", "facts");
        }
        html.raw(">\n");
        if !self.caption.is_empty() {
            html.element("caption", &self.caption);
        }
        if !self.heads.is_empty() {
            html.raw("<thead><tr>");
            for (i, head) in self.heads.iter().enumerate() {
                let class = match self.rows.first().and_then(|row| row.get(i)) {
                    Some(Cell::Number(_)) => "n",
                    Some(Cell::Share(_) | Cell::Accent(_)) => "b",
                    _ => "t",
                };
                html.raw("<th scope=\"col\"").attr("class", class).raw(">").text(head).raw("</th>");
            }
            html.raw("</tr></thead>\n");
        }
        html.raw("<tbody>\n");
        for row in &self.rows {
            html.raw("<tr>");
            for cell in row {
                match cell {
                    Cell::Head(text) => html.raw("<th scope=\"row\">").text(text).raw("</th>"),
                    Cell::Text(text) => html.raw("<td>").text(text).raw("</td>"),
                    Cell::Number(text) => html.raw("<td class=\"n\">").text(text).raw("</td>"),
                    Cell::Share(share) => html.raw("<td class=\"b\">").add(&bar(*share, false)).raw("</td>"),
                    Cell::Accent(share) => html.raw("<td class=\"b\">").add(&bar(*share, true)).raw("</td>"),
                    Cell::Html(inner) => html.raw("<td>").add(inner).raw("</td>"),
                };
            }
            html.raw("</tr>\n");
        }
        html.raw("</tbody>\n</table></div>\n");
        html
    }
}

/// The minimal width of a bar, in percent: a share above 0 must be visible.
const LEAST: f64 = 0.8;

/// A share of 1 as a number over a bar; a share of 0 has no bar.
pub fn bar(share: f64, accent: bool) -> Html {
    let mut html = Html::new();
    html.raw("<span class=\"share\">").text(&percent(share)).raw("</span>");
    html.raw("<svg class=\"bar\" aria-hidden=\"true\" focusable=\"false\">");
    if share > 0.0 {
        let width = format!("{}%", short((100.0 * share).clamp(LEAST, 100.0)));
        html.raw("<rect height=\"8\" rx=\"1.5\"").attr("width", &width);
        html.raw(if accent { " class=\"accent\"/>" } else { "/>" });
    }
    html.raw("</svg>");
    html
}

/// A section with its tokens and two shares of the loss.
#[derive(Clone, Debug, PartialEq)]
pub struct Share {
    /// The section.
    pub name: String,
    /// Its tokens.
    pub tokens: u64,
    /// Its share if all tokens were supervised.
    pub before: f64,
    /// Its share as labelled.
    pub after: f64,
}

/// Each section's share of the loss, over all tokens and as labelled. `heads` are the names of the four columns.
pub fn shares(caption: &str, heads: [&'static str; 4], sections: &[Share]) -> Html {
    let row = |s: &Share| {
        vec![
            Cell::Head(s.name.clone()),
            Cell::Number(thousands(s.tokens)),
            Cell::Share(s.before),
            Cell::Accent(s.after),
        ]
    };
    Table { caption: caption.into(), heads: heads.into(), rows: sections.iter().map(row).collect() }.html()
}

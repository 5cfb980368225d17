//! The common parts of all commands' pages: one self-contained file, in which all data is escaped.
//!
//! A page is a [`Page`]: a verdict with its reasons, then sections. The content of a section is [`Html`], made by
//! the functions here ([`Table`], [`shares`], [`LineChart`], [`Histogram`], [`intervals`], [`steps`], [`row`],
//! [`preview`]) or piece by piece.
//!
//! ```
//! use suasion_data::report::page::{Cell, Html, Page, Step, Table, Tone, steps};
//! let mut page = Page::new("suasion diagnose", "base → tuned");
//! page.verdict(Tone::Bad, "Retrain: the model was trained on its prompts.", &["the loss of the context fell".into()]);
//! page.lead("Next", &steps(&[Step::run("Train again from the base:", "suasion train --model base --data rows.jsonl")]));
//! let table = Table {
//!     caption: "Loss in nats per token.".into(),
//!     heads: vec!["section", "base", "tuned"],
//!     rows: vec![vec![Cell::Head("context".into()), Cell::Number("2.31".into()), Cell::Number("0.42".into())]],
//! };
//! page.section("losses", "What the training changed", &table.html());
//! page.fact("seed 0");
//! let text: String = page.finish();
//! assert!(text.starts_with("<!DOCTYPE html>") && text.contains("default-src 'none'"));
//! ```
//!
//! The page's style and script are files beside this one. A Content-Security-Policy allows exactly these two, by
//! their hashes: nothing is loaded, and injected code would not run. There is no `style` attribute for the same
//! reason; bars and charts are SVG, whose sizes are attributes. Without JavaScript the page only lacks filters,
//! copying and keyboard navigation.

mod chart;
mod html;
mod table;
mod tokens;

pub use chart::{Histogram, Interval, Line, LineChart, Stroke, intervals};
pub use html::{Html, escape, shell_line, shell_word};
pub use table::{Cell, Share, Table, bar, shares};
pub use tokens::{preview, row};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};

const STYLE: &str = include_str!("page/page.css");
const SCRIPT: &str = include_str!("page/page.js");

/// The tone of a verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tone {
    /// All is well.
    Good,
    /// Something should be checked.
    Check,
    /// Something is wrong.
    Bad,
}

/// A next step: what to do, and the command that does it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// What it does, in a sentence.
    pub text: String,
    /// The command, with its arguments quoted for the shell ([`shell_line`]).
    pub command: Option<String>,
}

impl Step {
    /// A step with a command.
    pub fn run(text: impl Into<String>, command: impl Into<String>) -> Step {
        Step { text: text.into(), command: Some(command.into()) }
    }

    /// A step without a command.
    pub fn text(text: impl Into<String>) -> Step {
        Step { text: text.into(), command: None }
    }
}

/// Numbered steps.
pub fn steps(steps: &[Step]) -> Html {
    let mut html = Html::new();
    html.raw("<ol class=\"steps\">\n");
    for step in steps {
        html.raw("<li>").element("p", &sentence(&step.text));
        if let Some(command) = &step.command {
            html.raw("<div class=\"command\"><code>").text(command).raw("</code></div>");
        }
        html.raw("</li>\n");
    }
    html.raw("</ol>\n");
    html
}

/// A sentence in which a number and its percent sign are never separated.
fn sentence(text: &str) -> String {
    text.replace(" %", "\u{a0}%")
}

/// A list of sentences.
pub fn list(items: &[String]) -> Html {
    let mut html = Html::new();
    html.raw("<ul>\n");
    for item in items {
        html.element("li", &sentence(item)).raw("\n");
    }
    html.raw("</ul>\n");
    html
}

/// A paragraph.
pub fn paragraph(text: &str) -> Html {
    let mut html = Html::new();
    html.element("p", &sentence(text)).raw("\n");
    html
}

/// A text of several lines, unchanged, in a box: a prompt, a reply, a configuration.
pub fn block(text: &str) -> Html {
    let mut html = Html::new();
    html.raw("<pre>").lines(text).raw("</pre>\n");
    html
}

/// A collapsible part, closed at first; when printed it is open.
pub fn details(summary: &str, inner: &Html) -> Html {
    let mut html = Html::new();
    html.raw("<details class=\"more\">").element("summary", summary).raw("\n").add(inner).raw("</details>\n");
    html
}

/// Pieces side by side if there is room.
pub fn columns(pieces: &[Html]) -> Html {
    let mut html = Html::new();
    html.raw("<div class=\"columns\">\n");
    pieces.iter().filter(|piece| !piece.is_empty()).for_each(|piece| {
        html.raw("<div>").add(piece).raw("</div>\n");
    });
    html.raw("</div>\n");
    html
}

/// The current time, for the foot of a page: `2026-11-26 04:10 UTC`.
pub fn now() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%d %H:%M UTC").to_string()
}

/// A page under construction: the verdict and the leads, which are the first screen, then the contents and the
/// sections.
#[derive(Clone, Debug, Default)]
pub struct Page {
    command: String,
    subject: String,
    verdict: Html,
    leads: Html,
    main: Html,
    contents: Vec<(&'static str, String)>,
    facts: Vec<String>,
}

impl Page {
    /// A page that `command` (`suasion verify`) writes about `subject` (a file, a model).
    pub fn new(command: &str, subject: &str) -> Page {
        Page { command: command.into(), subject: subject.into(), ..Page::default() }
    }

    /// The verdict in one sentence, and its reasons.
    pub fn verdict(&mut self, tone: Tone, sentence: &str, reasons: &[String]) {
        let mut html = Html::new();
        let (class, sign, word) = match tone {
            Tone::Good => ("verdict good", "M3 8.5 6.5 12 13 4.5", "Good"),
            Tone::Check => ("verdict check", "M8 3V9.2M8 12V12.8", "Look at it"),
            Tone::Bad => ("verdict bad", "M4 4 12 12M12 4 4 12", "Wrong"),
        };
        html.raw("<div")
            .attr("class", class)
            .raw(">\n<h1><svg class=\"sign\" viewBox=\"0 0 16 16\" role=\"img\"");
        html.attr("aria-label", word)
            .raw("><path")
            .attr("d", sign)
            .raw("/></svg>")
            .text(&self::sentence(sentence))
            .raw("</h1>\n");
        html.add(&list(reasons)).raw("</div>\n");
        self.verdict = html;
    }

    /// Adds a part of the first screen, which is not listed in the contents.
    pub fn lead(&mut self, heading: &str, inner: &Html) {
        self.leads
            .raw("<section class=\"lead\">\n")
            .element("h2", heading)
            .raw("\n")
            .add(inner)
            .raw("</section>\n");
    }

    /// Adds a section; a section without markup is left out. `id` is unique in the page.
    pub fn section(&mut self, id: &'static str, heading: &str, inner: &Html) {
        if inner.is_empty() {
            return;
        }
        self.contents.push((id, heading.into()));
        self.main.raw("<section").attr("id", id).raw(">\n").element("h2", heading).raw("\n");
        self.main.add(inner).raw("</section>\n");
    }

    /// Adds a fact to the foot of the page: a machine, a seed. Version and date are always there.
    pub fn fact(&mut self, fact: impl Into<String>) {
        self.facts.push(fact.into());
    }

    /// The whole page.
    pub fn finish(self) -> String {
        let (style, script) = (STYLE.replace('\r', ""), SCRIPT.replace('\r', ""));
        let hash = |text: &str| STANDARD.encode(Sha256::digest(text.as_bytes()));
        let mut title = Html::new();
        title.text(&self.command).text(": ").text(&self.subject);
        let mut contents = Html::new();
        for (id, heading) in &self.contents {
            contents.raw("<li><a").attr("href", &format!("#{id}")).raw(">").text(heading).raw("</a></li>");
        }
        let mut foot = Html::new();
        let version = format!("suasion {}", env!("CARGO_PKG_VERSION"));
        for fact in [version, now()].iter().chain(&self.facts) {
            foot.element("li", fact);
        }
        let mut head = Html::new();
        head.raw("<b>").text(&self.command).raw("</b> <span>").text(&self.subject).raw("</span>");
        format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'sha256-{}'; \
             script-src 'sha256-{}'; base-uri 'none'; form-action 'none'\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <meta name=\"color-scheme\" content=\"light dark\">\n<title>{}</title>\n<style>{style}</style>\n</head>\n<body>\n\
             <header>\n<p>{}</p>\n<button type=\"button\" id=\"theme\" hidden>Dark</button>\n</header>\n<main>\n{}{}\
             <nav aria-label=\"Contents\"><ul>{}</ul></nav>\n{}</main>\n<footer><ul>{}</ul></footer>\n\
             <script>{script}</script>\n</body>\n</html>\n",
            hash(&style),
            hash(&script),
            title.as_str(),
            head.as_str(),
            self.verdict.as_str(),
            self.leads.as_str(),
            contents.as_str(),
            self.main.as_str(),
            foot.as_str(),
        )
    }
}

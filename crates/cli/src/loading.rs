//! Rows of a file to samples, with what there is to say about them.

use crate::failure::Exit;
use crate::rows::DataFiles;
use crate::ui::{self, Ui};
use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::time::Duration;
use suasion_data::pipeline::{BAD_ROWS_LISTED, DropReason, Outcome, Pipeline, Progress, Summary};
use suasion_data::prepared::Counts;
use suasion_data::template::{ChatTemplate, RenderingWatch};
use suasion_data::tokens::Tokenizer;
use suasion_data::{Code, Finding, Level, Mode, Policy, Sample};

/// What is read and kept of a source of rows.
pub struct RowSet {
    /// What the user named.
    pub name: PathBuf,
    /// The rows that became samples, in their order.
    pub samples: Vec<Sample>,
    /// The source in numbers.
    pub summary: Summary,
    /// The first finding of each code.
    pub examples: BTreeMap<Code, Finding>,
    /// The first rows that failed, with the reason (`on_bad_row: skip` goes on after them).
    pub failures: Vec<String>,
}

/// Reads rows through the rooms of the data crate; `mode` says what the rows are for.
pub fn load(
    ui: &Ui,
    data: &DataFiles,
    tokenizer: Option<&Tokenizer>,
    template: Option<&ChatTemplate>,
    policy: &Policy,
    vocab_size: Option<usize>,
    mode: Mode,
) -> anyhow::Result<RowSet> {
    let manifest = data.manifest()?;
    let asked = manifest.as_ref().map(|manifest| manifest.asked(policy));
    let pipeline =
        Pipeline { vocab_size, mode, template, asked: asked.as_ref(), ..Pipeline::new(tokenizer, policy) };
    let mut samples = Vec::new();
    let mut examples = BTreeMap::new();
    let mut failures = Vec::new();
    let mut meter = Meter::new(ui, &data.name);
    let summary = pipeline.run_source(
        data.open()?,
        |progress| meter.show(progress),
        |outcome| {
            for finding in outcome.findings() {
                examples.entry(finding.code).or_insert_with(|| finding.clone());
            }
            match outcome {
                Outcome::Kept(kept) => samples.push(kept.sample),
                Outcome::Failed { error, .. } if failures.len() < BAD_ROWS_LISTED => {
                    failures.push(error.to_string())
                }
                _ => {}
            }
            Ok(())
        },
    );
    meter.clear();
    let summary = summary?;
    if let (Some(manifest), Some(source)) = (&manifest, &summary.source)
        && !manifest.describes(source)
    {
        ui.warn(format_args!(
            "{}: not as its manifest says it was written; what the manifest says of it may be wrong",
            data.name.display()
        ));
    }
    tell_date(ui, policy.template_date.as_deref(), summary.template_date.as_deref());
    Ok(RowSet { name: data.name.clone(), samples, summary, examples, failures })
}

/// Says that the chat template wrote the date of the day, where none was pinned.
pub fn tell_date(ui: &Ui, pinned: Option<&str>, used: Option<&str>) {
    if let (None, Some(date)) = (pinned, used) {
        ui.warn(format_args!(
            "the chat template writes today's date into each conversation; pin it with template_date={date}"
        ));
    }
}

/// The tokenizer of a model folder; `None` where the folder has no tokenizer.json, as tokenised rows need none.
pub fn tokenizer(dir: &Path) -> anyhow::Result<Option<Tokenizer>> {
    if dir.join("tokenizer.json").exists() { Ok(Some(Tokenizer::from_dir(dir)?)) } else { Ok(None) }
}

/// The chat template of a model folder, where it has one. A template that cannot be used is told and left aside: rows
/// of plain text need none.
pub fn template(ui: &Ui, dir: &Path, tokenizer: Option<&Tokenizer>) -> Option<ChatTemplate> {
    let text = |token: Option<&suasion_data::tokens::SpecialToken>| token.map(|t| t.content.clone());
    let tokenizer = tokenizer?;
    match ChatTemplate::from_dir(dir, text(tokenizer.bos()).as_deref(), text(tokenizer.eos()).as_deref()) {
        Ok(template) => {
            if template.is_some() {
                watch_templates();
            }
            template
        }
        Err(error) => {
            ui.warn(format_args!("the chat template is not used: {error}"));
            None
        }
    }
}

/// One conversation takes a template microseconds; its fuel ends what takes half a second.
const LONGEST_RENDERING: Duration = Duration::from_secs(5);

/// How often the watcher looks in that time.
const LOOKS: u32 = 10;

/// Ends the program where a template has found the one way to go on for ever ([`RenderingWatch`]).
fn watch_templates() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        std::thread::spawn(|| {
            let mut watch = RenderingWatch::default();
            // Its own looks are the clock: time in which the process was stopped is none.
            while watch.look() < LOOKS {
                std::thread::sleep(LONGEST_RENDERING / LOOKS);
            }
            let _ = writeln!(
                std::io::stderr(),
                "error[E-TEMPLATE]: the chat template has been at one conversation for {} s: it does not come to an \
                 end\nhelp: compare it with the template of the model's repository",
                LONGEST_RENDERING.as_secs()
            );
            std::process::exit(Exit::RunTime as i32);
        });
    });
}

/// The number of embeddings that config.json names, where there is one: for commands that need no model otherwise.
pub fn vocab_size(dir: &Path) -> Option<usize> {
    let text = std::fs::read_to_string(dir.join("config.json")).ok()?;
    let config: serde_json::Value = serde_json::from_str(&text).ok()?;
    usize::try_from(config.get("vocab_size")?.as_u64()?).ok()
}

/// The updating line while rows are read; only on a terminal, and only once it takes long enough to be seen.
pub struct Meter<'a> {
    ui: &'a Ui,
    name: String,
    started: std::time::Instant,
    shown: bool,
}

impl<'a> Meter<'a> {
    /// A meter for what is read.
    pub fn new(ui: &'a Ui, path: &Path) -> Meter<'a> {
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        Meter { ui, name, started: std::time::Instant::now(), shown: false }
    }

    /// Shows how far it is.
    pub fn show(&mut self, progress: Progress) {
        if self.ui.quiet || !self.ui.live || self.started.elapsed().as_secs_f64() < 0.3 {
            return;
        }
        self.shown = true;
        let done = ui::percent(progress.bytes, progress.size);
        self.ui.overwrite(&format!(
            "reading {}: {done}, {}, {} tokens",
            self.name,
            ui::plural(progress.rows, "row"),
            ui::count(progress.tokens)
        ));
    }

    /// Takes the line away.
    pub fn clear(&mut self) {
        if std::mem::take(&mut self.shown) {
            self.ui.overwrite("");
        }
    }
}

/// `160 rows: 158 kept (3 of them cut), 2 dropped (2 longer than max_length), 0 failed`.
pub fn rows_line(counts: &Counts) -> String {
    let mut line = format!("{}: {} kept", ui::plural(counts.rows, "row"), ui::count(counts.kept));
    if counts.cut > 0 {
        line += &format!(" ({} of them cut)", ui::count(counts.cut));
    }
    let dropped: u64 = counts.dropped.values().sum();
    line += &format!(", {} dropped", ui::count(dropped));
    if dropped > 0 {
        let meaning =
            |name: &str| DropReason::ALL.iter().find(|r| r.name() == name).map_or("", |r| r.meaning());
        let reasons: Vec<String> =
            counts.dropped.iter().map(|(name, n)| format!("{} {}", ui::count(*n), meaning(name))).collect();
        line += &format!(" ({})", reasons.join(", "));
    }
    line += &format!(", {} failed", ui::count(counts.failed));
    line
}

/// Says what was found at warning or above: how often, what, and where first; and every row that failed.
pub fn tell_findings(ui: &Ui, rows: &RowSet, indent: usize) {
    for (code, found) in &rows.summary.findings {
        if found.level == Level::Note || *code == Code::Row {
            continue;
        }
        let example = rows
            .examples
            .get(code)
            .map(|finding| format!("; first: row {}: {}", finding.row, finding.message))
            .unwrap_or_default();
        ui.say(format_args!(
            "{:indent$} {code} {} × {}{example}",
            "",
            ui::count(found.count),
            code.meaning()
        ));
    }
    for failure in &rows.failures {
        ui.warn(format_args!("left out: {failure}"));
    }
    let more = rows.summary.failed - rows.failures.len() as u64;
    if more > 0 {
        ui.warn(format_args!("left out: {} more", ui::plural(more, "row")));
    }
}

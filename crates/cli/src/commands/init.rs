//! `suasion init`: a commented configuration for rows and a model, from what a first look at both finds.

use super::ConfigArgs;
use crate::config::{Config, Init, KEYS, Key, Loaded};
use crate::failure::{Exit, Failure};
use crate::inputs::model;
use crate::inputs::rows::{self, DataFiles};
use crate::inputs::vocabulary::Vocabulary;
use crate::paths;
use crate::progress::Meter;
use crate::tables;
use crate::ui::{self, Ui};
use serde_json::Value as Json;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use suasion_data::example::{Example, format_of, proposed_columns};
use suasion_data::prepared::Counts;
use suasion_data::report::format::{count, percent, thousands};
use suasion_data::report::visible;
use suasion_data::source::Row;
use suasion_data::{Level, Mode, ModelFolder, OnBadRow, Outcome, Pipeline, Policy, Summary};
use suasion_train::Strategy;

/// Flags of the command.
#[derive(clap::Args, Debug)]
pub struct InitArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// The file to write; - prints it
    #[arg(short, long, value_name = "FILE", default_value = "suasion.yaml", value_parser = paths::parser())]
    output: PathBuf,
}

/// Rows that are looked at.
const LOOKED_AT: usize = 10_000;

/// Below this many rows, none are held out.
const ENOUGH: u64 = 50;

/// The share of the rows that is held out.
const HELD_OUT: f64 = 0.1;

/// Keys that most runs change.
const USUAL: [&str; 6] = [
    "output_dir",
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "save_steps",
];

/// What was found.
#[derive(Default)]
struct Found {
    /// How many rows have each format.
    formats: BTreeMap<&'static str, usize>,
    /// Lengths of the rows in tokens, ascending.
    lengths: Vec<usize>,
    summary: Summary,
    /// True if the source has more rows.
    more: bool,
    /// The date that the chat template wrote.
    template_date: Option<String>,
}

/// Runs the command.
pub fn run(args: &InitArgs, ui: &Ui) -> anyhow::Result<Exit> {
    let stdout = args.output == Path::new("-");
    if !stdout && args.output.exists() {
        return Err(Failure::usage(
            format!("{}: there is such a file, and it is not replaced", args.output.display()),
            "give another name with -o FILE, or - to print the configuration",
        )
        .into());
    }
    let mut loaded = args.config.load(ui)?;
    let source = rows::training(&loaded.config, ui)?;
    let vocabulary = Vocabulary::of(&loaded.config, ui)?;
    let folder = Arc::new(vocabulary.open(&model::named(&loaded.config, false, ui)?, ui)?);
    let held_out = rows::evaluation(&loaded.config, ui)?;
    if loaded.config.data.columns.is_empty() && !loaded.places.contains_key("format") {
        loaded.config.data.columns = columns(&source, &folder)?;
    }
    let found = look(&source, &folder, &loaded.config, ui)?;
    for (code, found) in &found.summary.findings {
        let meaning = code.rule().meaning;
        ui.finding(found.level, 0, format_args!("{code} {} × {meaning}", thousands(found.count)));
    }
    let text = page(&loaded, &found, &folder, held_out.as_ref(), &args.output)?;
    if stdout {
        let mut out = ui.out();
        std::io::Write::write_all(&mut out, text.as_bytes())?;
        std::io::Write::flush(&mut out)?;
        return Ok(Exit::Done);
    }
    suasion_files::write_bytes(&args.output, text.as_bytes()).map_err(suasion_data::Error::from)?;
    let path = args.output.display();
    ui.log(format_args!("wrote {path}; next:\n  suasion check {path}\n  suasion train {path} --dry-run"));
    Ok(Exit::Done)
}

/// The mapping of the first row's fields, if it has no known format: under a chat template, a pair of texts
/// is an instruction with its output.
fn columns(source: &DataFiles, folder: &ModelFolder) -> anyhow::Result<BTreeMap<String, String>> {
    let first = source.open()?.next_row()?.and_then(|raw| Row::parse(raw).ok());
    let Some((row, proposed)) = first.and_then(|row| Some((row.clone(), proposed_columns(&row)?))) else {
        return Ok(BTreeMap::new());
    };
    if let (Some(prompt), Some(completion), true) =
        (proposed.get("prompt"), proposed.get("completion"), folder.template.is_some())
    {
        let pair = [("instruction", prompt), ("output", completion)];
        let pair = pair.map(|(name, path)| (name.to_string(), path.clone())).into_iter().collect();
        let texts = Example::renamed(row, &pair)
            .is_ok_and(|row| ["instruction", "output"].iter().all(|key| row.fields[*key].is_string()));
        if texts {
            return Ok(pair);
        }
    }
    Ok(proposed)
}

/// Looks at the first rows of a source, whole.
///
/// # Errors
/// If none of them can become a sample: the reason of the first.
fn look(source: &DataFiles, folder: &Arc<ModelFolder>, config: &Config, ui: &Ui) -> anyhow::Result<Found> {
    let mut found = Found::default();
    let mut raws = source.open()?;
    for _ in 0..LOOKED_AT {
        let Some(raw) = raws.next_row()? else { break };
        // A row that cannot be read is counted below, with its reason.
        let row = Row::parse(raw).and_then(|row| Example::renamed(row, &config.data.columns));
        if let Ok(format) = row.and_then(|row| format_of(&row)) {
            *found.formats.entry(format.name()).or_default() += 1;
        }
    }
    let policy = Policy { max_length: None, on_bad_row: OnBadRow::Skip, packing: false, ..config.policy() };
    let pipeline = Pipeline { mode: Mode::Verify, ..Pipeline::new(folder.clone(), policy) };
    let mut first = None;
    let mut meter = Meter::new(ui, &source.name);
    let mut outcomes = pipeline.rows(source.open()?)?;
    while let Some(outcome) = outcomes.next() {
        if found.summary.rows as usize == LOOKED_AT {
            found.more = true;
            break;
        }
        meter.show(outcomes.progress());
        let outcome = outcome?;
        found.summary.add(&outcome);
        match outcome {
            Outcome::Kept(kept) => found.lengths.push(kept.sample.len()),
            Outcome::Failed { error, .. } => first = first.or(Some(error)),
            Outcome::Dropped { .. } => {}
        }
    }
    found.template_date = outcomes.into_summary().template_date;
    found.lengths.sort_unstable();
    match first {
        Some(error) if found.lengths.is_empty() => Err(error.into()),
        _ => Ok(found),
    }
}

/// The configuration.
fn page(
    loaded: &Loaded,
    found: &Found,
    folder: &ModelFolder,
    held_out: Option<&DataFiles>,
    output: &Path,
) -> anyhow::Result<String> {
    let mut config = loaded.config.clone();
    let given = |name: &str| loaded.places.contains_key(name);
    let mut page = Page::default();
    let name = if output == Path::new("-") { Path::new("suasion.yaml") } else { output }.display();
    page.comment(&format!(
        "Written by suasion init from a look at {}{} and at the model. Check it with: suasion check {name}; see the \
         plan with: suasion train {name} --dry-run. suasion check --explain KEY describes a key.",
        if found.more { "the first " } else { "" },
        count(found.summary.rows, "row")
    ));

    page.gap();
    page.key(&config, "model_name_or_path");
    let weights = std::fs::read_dir(&folder.path).is_ok_and(|entries| {
        entries.flatten().any(|entry| entry.file_name().to_string_lossy().ends_with(".safetensors"))
    });
    if !weights && !given("init") {
        config.init = Init::Random;
        page.comment("The folder has no weights: the model starts from random ones.");
    }
    if config.init == Init::Random {
        page.key(&config, "init");
    }

    page.gap();
    page.comment(&tables::rows(&Counts::of(&found.summary)));
    page.key(&config, "dataset_name");
    let formats: Vec<String> = found
        .formats
        .iter()
        .map(|(name, rows)| format!("{name} in {}", count(*rows as u64, "row")))
        .collect();
    if let ([_, ..], false) = (formats.as_slice(), given("format")) {
        page.comment(&format!("The format, by the fields of the rows: {}.", formats.join(", ")));
        if let [format] = found.formats.keys().collect::<Vec<_>>().as_slice() {
            config.data.format = serde_json::from_value(Json::from(**format))?;
        }
    }
    page.key(&config, "format");
    if !config.data.columns.is_empty() {
        page.comment("Where the rows have what this format names otherwise.");
        page.key(&config, "columns");
    }
    match held_out {
        Some(files) => page.comment(&format!("Evaluated on {}.", files.name.display())),
        None if given("eval_fraction") || found.summary.kept >= ENOUGH => {
            if !given("eval_fraction") {
                config.eval_fraction = HELD_OUT;
            }
            page.comment("Rows are held out, so that the run can tell learning from memorising.");
            page.key(&config, "eval_fraction");
        }
        None => page.comment(&format!(
            "Fewer than {ENOUGH} rows: none are held out. Name others with eval_dataset_name."
        )),
    }
    if held_out.is_some() || config.eval_fraction > 0.0 {
        if !given("eval_strategy") {
            config.train.eval_strategy = Strategy::Epoch;
        }
        page.key(&config, "eval_strategy");
    }

    page.gap();
    page.labels(&config, found, folder)?;
    let (length, text) = max_length(&found.lengths, folder.positions);
    if !given("max_length") {
        config.data.max_length = Some(length);
    }
    page.comment(&text);
    let longer = found.lengths.iter().filter(|n| config.data.max_length.is_some_and(|max| **n > max)).count();
    if longer > 0 {
        page.comment(&format!("{} longer: see truncation_mode.", count(longer as u64, "row")));
    }
    page.key(&config, "max_length");
    if let (Some(date), false) = (&found.template_date, given("template_date")) {
        page.comment("The chat template writes today's date; pinned, a row is the same on any day.");
        config.data.template_date = Some(date.clone());
    }
    if config.data.template_date.is_some() {
        page.key(&config, "template_date");
    }

    page.gap();
    for name in USUAL {
        page.explained(&config, name);
    }
    let rest = KEYS.iter().filter(|key| !page.written.contains(&key.name));
    let (set, rest): (Vec<&Key>, Vec<&Key>) = rest.partition(|key| given(key.name));
    set.iter().for_each(|key| page.explained(&config, key.name));
    page.gap();
    page.comment("Every other key, at its default.");
    for key in rest {
        let line = format!("# {}: {}", key.name, key.default());
        let values = (key.expected)();
        let values = if values.starts_with("one of") { format!(" ({values})") } else { String::new() };
        let _ = writeln!(page.text, "{line:<44}  # {}{values}", key.doc.trim().trim_end_matches('.'));
    }
    Ok(page.text)
}

/// A page of YAML.
#[derive(Default)]
struct Page {
    text: String,
    written: Vec<&'static str>,
}

impl Page {
    fn gap(&mut self) {
        self.text.push('\n');
    }

    fn comment(&mut self, text: &str) {
        for line in ui::wrap(&visible(text), 98).lines() {
            let _ = writeln!(self.text, "# {line}");
        }
    }

    /// A key with its value.
    fn key(&mut self, config: &Config, name: &str) {
        if let Some(key) = KEYS.iter().find(|key| key.name == name) {
            let _ = writeln!(self.text, "{}: {}", key.name, key.yaml(config));
            self.written.push(key.name);
        }
    }

    /// A key with its meaning and its value.
    fn explained(&mut self, config: &Config, name: &str) {
        if let Some(key) = KEYS.iter().find(|key| key.name == name) {
            self.comment(&format!("{} Values: {}.", key.doc.trim(), (key.expected)()));
            self.key(config, name);
        }
    }

    /// What is learned, and where responses end.
    fn labels(&mut self, config: &Config, found: &Found, folder: &ModelFolder) -> anyhow::Result<()> {
        let (tokens, supervised) = (found.summary.tokens, found.summary.supervised_tokens);
        self.comment(&format!(
            "{} of the {} are learned ({}).",
            count(supervised, "token"),
            thousands(tokens),
            percent(supervised as f64 / tokens.max(1) as f64)
        ));
        for (code, found) in found.summary.findings.iter().filter(|(_, found)| found.level != Level::Note) {
            let meaning = code.rule().meaning;
            self.comment(&format!("{}: {code} {} × {meaning}.", found.level, thousands(found.count)));
        }
        let Some(tokenizer) = &folder.tokenizer else { return Ok(()) };
        let stops = tokenizer.stop_ids(&config.policy())?;
        let stops: Vec<String> =
            stops.iter().map(|id| format!("{} (id {id})", tokenizer.token_text(*id))).collect();
        self.comment(&match stops.as_slice() {
            [] => "No token of the model ends a response: name one in stop_tokens.".into(),
            stops => format!("Responses end with {}.", stops.join(" or ")),
        });
        self.key(config, "stop_tokens");
        Ok(())
    }
}

/// A length that suits rows, and what it was chosen by. `lengths` is ascending.
fn max_length(lengths: &[usize], positions: Option<usize>) -> (usize, String) {
    let at = |share: f64| {
        let index = (lengths.len() as f64 * share).ceil() as usize;
        lengths.get(index.clamp(1, lengths.len().max(1)) - 1).copied().unwrap_or(0)
    };
    let (median, most, longest) = (at(0.5), at(0.99), at(1.0));
    // One long row in a hundred should not decide about the memory of all batches.
    let rounded = if round_up(longest) > 2 * round_up(most) { round_up(most) } else { round_up(longest) };
    let text = format!(
        "Lengths in tokens: the median is {}, 99 % have at most {}, the longest has {}.{}",
        thousands(median as u64),
        thousands(most as u64),
        thousands(longest as u64),
        positions.map_or(String::new(), |n| format!(" The model has {} positions.", thousands(n as u64)))
    );
    (positions.map_or(rounded, |positions| rounded.min(positions)), text)
}

/// The next power of two, or the value halfway to it.
fn round_up(length: usize) -> usize {
    let above = length.next_power_of_two().max(64);
    if length <= above / 4 * 3 { above / 4 * 3 } else { above }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_long_row_in_a_hundred_does_not_decide() {
        let lengths: Vec<usize> = (1..=100).collect();
        assert_eq!(max_length(&lengths, None).0, 128);
        let with = |longest| [&lengths[..99], &[longest]].concat();
        assert_eq!(max_length(&with(240), None).0, 256);
        assert_eq!(max_length(&with(5000), None).0, 128);
        assert_eq!(max_length(&with(240), Some(200)).0, 200);
        assert_eq!(max_length(&[], None).0, 48);
        assert_eq!(
            [round_up(64), round_up(65), round_up(96), round_up(97), round_up(1024)],
            [64, 96, 96, 128, 1024]
        );
        assert!(
            max_length(&lengths, Some(512))
                .1
                .contains("median is 50, 99 % have at most 99, the longest has 100.")
        );
    }
}

//! `suasion convert`: corpora of persuasion to four-section rows, or to pairs of replies.

use crate::failure::{Exit, Failure};
use crate::inputs::kept;
use crate::paths;
use crate::ui::Ui;
use clap::ValueEnum;
use std::io::Write;
use std::path::{Path, PathBuf};
use suasion_data::convert::output::{Output, names};
use suasion_data::convert::{self, Corpus, Counts, Keep, Options, Persuader};
use suasion_data::report::format::{count, thousands};

/// Flags of the command.
#[derive(clap::Args, Debug)]
pub struct ConvertArgs {
    /// The corpus: a ConvoKit folder or its utterances.jsonl, a file of CMV threads, or PersuasionForGood's
    /// full_dialog.csv
    #[arg(value_name = "CORPUS", value_parser = paths::parser(), conflicts_with = "data", required_unless_present = "data")]
    corpus: Option<PathBuf>,
    /// Another way to name the corpus
    #[arg(short = 'D', long, value_name = "CORPUS", value_parser = paths::parser())]
    data: Option<PathBuf>,
    /// What the corpus is
    #[arg(long, value_enum, value_name = "KIND")]
    from: From,
    /// Output: .jsonl (also .jsonl.gz, .jsonl.zst), .parquet, or a folder for train.jsonl and test.jsonl
    #[arg(short, long, value_name = "F", value_parser = paths::parser())]
    output: PathBuf,
    /// Who speaks as the persuader: challenger (everybody but the post's author; in p4g the persuader), op (the post's
    /// author; in p4g the persuadee), or the id of a speaker
    #[arg(long, value_name = "WHO", default_value = "challenger")]
    persuader: String,
    /// Which replies become rows: those that earned a delta (in p4g a donation), or all with their outcome [default:
    /// won; for p4g without --information all]
    #[arg(long, value_enum, value_name = "WHICH")]
    outcome: Option<Which>,
    /// Turns before a reply that its context shows beside the post [default: all]
    #[arg(long, value_name = "N")]
    context_depth: Option<usize>,
    /// Write pairs of a winning and a losing first reply to the same post ("prompt", "chosen", "rejected")
    #[arg(long, conflicts_with = "outcome")]
    pairs: bool,
    /// Share of the threads to hold out, in rows.test.jsonl beside rows.jsonl; no thread is on both sides
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    split: f64,
    /// The seed of the split
    #[arg(long, value_name = "N", default_value_t = 42)]
    seed: u64,
    /// The text of the section [SYSTEM]
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// The text of the section [TASK]
    #[arg(long, value_name = "TEXT")]
    task: Option<String>,
    /// For p4g: the file of the donations, full_info.csv
    #[arg(long, value_name = "FILE", value_parser = paths::parser())]
    information: Option<PathBuf>,
}

/// The kinds of corpora.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum From {
    /// A ConvoKit corpus, such as winning-args-corpus.
    Convokit,
    /// Threads of r/changemyview, a post and a chain of replies a line.
    Cmv,
    /// PersuasionForGood's dialogues.
    P4g,
}

/// Which replies become rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Which {
    /// Those that earned a delta, or a donation.
    Won,
    /// All, with what is known of their outcome.
    All,
}

/// Runs the command.
pub fn run(args: &ConvertArgs, ui: &Ui) -> anyhow::Result<Exit> {
    let Some(path) = args.corpus.as_ref().or(args.data.as_ref()) else {
        return Err(Failure::usage("no corpus is named", "give --data CORPUS").into());
    };
    check(args)?;
    let corpus = match args.from {
        From::Convokit => convert::convokit(path)?,
        From::Cmv => convert::cmv(path)?,
        From::P4g => convert::p4g(path, args.information.as_deref())?,
    };
    let options = options(args, &corpus);
    let (train, test) = names(&args.output)?;
    let read = || corpus.files.iter().map(PathBuf::as_path);
    for output in [&train, &test] {
        kept::check_output("-o", output, read(), std::iter::empty::<&Path>())?;
    }
    if train.parent() == Some(args.output.as_path()) {
        std::fs::create_dir_all(&args.output).map_err(|e| suasion_data::Error::io(&args.output, e))?;
    }
    let mut rows = Output::create(&train)?;
    let mut held_out = if options.split > 0.0 { Some(Output::create(&test)?) } else { None };
    let counts = if args.pairs {
        convert::pairs(&corpus, &options, |row, out| of(out, &mut rows, &mut held_out).write(row))?
    } else {
        convert::rows(&corpus, &options, |row, out| of(out, &mut rows, &mut held_out).write(row))?
    };
    if counts.rows + counts.held_out == 0 {
        let reasons: Vec<String> = reasons(&counts);
        return Err(Failure::run_time(
            "E-SOURCE",
            format!(
                "{}: no row is left of {}: {}",
                path.display(),
                count(counts.comments, "comment"),
                reasons.join("; ")
            ),
            "keep more with --outcome all, or name another speaker with --persuader",
        )
        .into());
    }
    // Both are whole before either has its name.
    let test_file = held_out.filter(|_| counts.held_out > 0).map(Output::complete).transpose()?;
    let train_file = (counts.rows > 0).then(|| rows.complete()).transpose()?;
    let mut wrote = Vec::new();
    for (name, file) in [(&train, train_file), (&test, test_file)] {
        if let Some(file) = file {
            file.publish().map_err(suasion_data::Error::from)?;
            wrote.push(name.display().to_string());
        }
    }
    if options.split > 0.0 && (counts.held_out == 0 || counts.rows == 0) {
        let side = if counts.held_out == 0 { "held out" } else { "left to train on" };
        ui.warn(format_args!(
            "--split {}: no thread with rows is {side}; try another --seed or share",
            options.split
        ));
    }
    if ui.json {
        ui.print_json(&counts)?;
    } else {
        print(&counts, args.pairs, ui)?;
    }
    ui.note(format_args!("wrote {}", wrote.join(" and ")));
    Ok(Exit::Done)
}

/// Refuses flags that do not go together.
fn check(args: &ConvertArgs) -> anyhow::Result<()> {
    if !(0.0..1.0).contains(&args.split) {
        return Err(Failure::usage(
            format!("--split {}: not a share", args.split),
            "give one from 0 to below 1: 0.05",
        )
        .into());
    }
    if args.from != From::P4g && args.information.is_some() {
        return Err(Failure::usage(
            "--information is for --from p4g",
            "other corpora say themselves what won",
        )
        .into());
    }
    if args.from == From::P4g && args.pairs {
        return Err(Failure::usage(
            "--pairs: dialogues answer no common post",
            "leave it out for --from p4g",
        )
        .into());
    }
    if args.from == From::P4g && args.information.is_none() && args.outcome == Some(Which::Won) {
        return Err(Failure::usage(
            "--outcome won: the dialogues do not say who donated",
            "give the file that does, --information full_info.csv, or --outcome all",
        )
        .into());
    }
    for (name, text) in [("--system", &args.system), ("--task", &args.task)] {
        if text
            .as_ref()
            .is_some_and(|text| ["[CONTEXT]", "[TASK]", "[RESPONSE]"].iter().any(|m| text.contains(m)))
        {
            return Err(Failure::usage(
                format!("{name}: the text holds a section's marker"),
                "leave the marker out",
            )
            .into());
        }
    }
    Ok(())
}

fn options(args: &ConvertArgs, corpus: &Corpus) -> Options {
    let mut options = Options::new(corpus.dialogues);
    options.persuader = match args.persuader.as_str() {
        "challenger" => Persuader::Challenger,
        "op" => Persuader::Op,
        id => Persuader::Speaker(id.into()),
    };
    options.keep = match args.outcome {
        Some(Which::All) => Keep::All,
        Some(Which::Won) => Keep::Won,
        // Without the donations nothing is known to have won.
        None if args.from == From::P4g && args.information.is_none() => Keep::All,
        None => Keep::Won,
    };
    options.context_depth = args.context_depth;
    options.split = args.split;
    options.seed = args.seed;
    options.system = args.system.clone().unwrap_or(options.system);
    options.task = args.task.clone().unwrap_or(options.task);
    options
}

/// The file of a row.
fn of<'a>(out: bool, rows: &'a mut Output, held_out: &'a mut Option<Output>) -> &'a mut Output {
    match held_out {
        Some(held_out) if out => held_out,
        _ => rows,
    }
}

fn reasons(counts: &Counts) -> Vec<String> {
    counts.dropped.iter().map(|(reason, n)| format!("{} {reason}", thousands(*n))).collect()
}

fn print(counts: &Counts, pairs: bool, ui: &Ui) -> anyhow::Result<()> {
    let noun = if pairs { "pair" } else { "row" };
    let mut out = ui.out();
    writeln!(
        out,
        "{} with {}: {}, {}{} held out",
        count(counts.threads, "thread"),
        count(counts.comments, "comment"),
        count(counts.rows, noun),
        thousands(counts.held_out),
        if counts.held_out > 0 { " more" } else { "" }
    )?;
    for (reason, n) in &counts.dropped {
        writeln!(out, "{:>9}  left out: {reason}", thousands(*n))?;
    }
    for (what, n) in &counts.removed {
        writeln!(out, "{:>9}  removed from replies: {what}", thousands(*n))?;
    }
    out.flush()?;
    Ok(())
}

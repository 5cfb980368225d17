//! `suasion`: train the response, not the prompt, and prove the mask.
//!
//! A thin layer over the libraries: flags and configuration in, text and exit codes out. `commands/` has a
//! file per command with its flags and its printing; `job` is a planned run; `inputs/` finds and opens rows,
//! model folders and weights. [`main_from`] is the program; `embed` is what the Python package shares with it.
#![forbid(unsafe_code)]

mod bar;
mod commands;
mod config;
pub mod embed;
mod export;
mod failure;
mod inputs;
mod interrupt;
mod job;
mod limits;
mod machine;
mod paths;
mod progress;
mod ranks;
mod reply;
mod tables;
mod ui;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use commands::{
    chat, check, compare, completions, convert, demo, diagnose, env, eval, generate, init, man, merge,
    prepare, train, verify,
};
use config::flags;
use failure::Exit;
use ranks::Role;
use std::ffi::OsString;
use std::io::Write;
use std::num::NonZeroUsize;
use ui::{ColorChoice, Ui};

/// The heading of the flags that every command has; headings follow a command's own flags.
const GLOBAL: &str = "Global options";

/// Train the response, not the prompt: supervised fine-tuning with masks that are proven.
#[derive(Parser, Debug)]
#[command(name = "suasion", version, about, max_term_width = 100)]
#[command(
    after_help = "Exit codes: 0 done, 1 findings or a failed check, 2 usage or configuration, 3 run time."
)]
struct Cli {
    /// Print results as JSON
    #[arg(long, global = true, help_heading = GLOBAL)]
    json: bool,
    /// Print results, warnings and errors only: no progress, no notes
    #[arg(short, long, global = true, help_heading = GLOBAL)]
    quiet: bool,
    /// When to use colour
    #[arg(long, global = true, value_enum, default_value_t, value_name = "WHEN", help_heading = GLOBAL)]
    color: ColorChoice,
    /// Threads, at most one per core; results are the same for any number [env: RAYON_NUM_THREADS]
    #[arg(long, global = true, value_name = "N", help_heading = GLOBAL)]
    threads: Option<NonZeroUsize>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Train a model on rows, with evaluation, checkpoints and a report
    #[command(
        after_help = "Examples:\n  suasion train --data rows.jsonl --model MODEL -o out\n  suasion train run.yaml --learning_rate 1e-4 --dry-run\n  suasion train run.yaml --ranks 2\n  suasion train --resume out"
    )]
    Train(train::TrainArgs),
    /// Render, tokenise, label and truncate rows, and write them as training data
    #[command(
        after_help = "Examples:\n  suasion prepare --data rows.jsonl --model MODEL -o prepared.parquet\n  suasion prepare --data rows.jsonl --model MODEL --packing -o prepared/"
    )]
    Prepare(prepare::PrepareArgs),
    /// Show which tokens are supervised and why, and check every row
    #[command(
        after_help = "Examples:\n  suasion verify --data rows.jsonl --model MODEL --rows 5\n  suasion verify --data prepared.jsonl --model MODEL --html page.html"
    )]
    Verify(verify::VerifyArgs),
    /// Measure loss and perplexity on responses, loss per section, and calibration of the first token and of the stop
    #[command(
        after_help = "Examples:\n  suasion eval --model out --data held_out.jsonl\n  suasion eval --model out --data pairs.jsonl --pairs"
    )]
    Eval(eval::EvalArgs),
    /// Train with both objectives (all tokens, response only) from the same seed, and compare them on
    /// held-out responses
    #[command(
        after_help = "Examples:\n  suasion compare --data rows.jsonl --model MODEL --max_steps 200\n  suasion compare --data rows.jsonl --model MODEL --seeds 5"
    )]
    Compare(compare::CompareArgs),
    /// Say what a checkpoint was trained on (its prompts? its stop token?), from its base and rows like its own
    #[command(after_help = "Examples:\n  suasion diagnose --base MODEL --tuned out --data rows.jsonl")]
    Diagnose(diagnose::DiagnoseArgs),
    /// Generate replies to a prompt, or to the prompts of rows
    #[command(
        after_help = "Examples:\n  suasion generate --model out --prompt \"[TASK] Reply.\\n[RESPONSE]\"\n  suasion generate --model out --data held_out.jsonl --rows 3 --temperature 0.7"
    )]
    Generate(generate::GenerateArgs),
    /// Talk to a model: a line is a message, and the conversation is kept
    #[command(
        after_help = "Examples:\n  suasion chat --model out\n  echo \"What is a mask?\" | suasion chat --model out"
    )]
    Chat(chat::ChatArgs),
    /// Write a commented configuration for the rows and the model given
    #[command(
        after_help = "Examples:\n  suasion init --data rows.jsonl --model MODEL\n  suasion init --data rows.jsonl --model MODEL -o run.yaml --learning_rate 1e-4"
    )]
    Init(init::InitArgs),
    /// Add an adapter to the weights of its base, and write a model that needs no adapter
    #[command(
        after_help = "Examples:\n  suasion merge --model BASE --adapter out -o merged\n  suasion merge --adapter out -o merged --dtype float16"
    )]
    Merge(merge::MergeArgs),
    /// Turn corpora of persuasion into four-section rows, or pairs of replies that won and lost
    #[command(
        after_help = "Examples:\n  suasion convert --from convokit winning-args-corpus -o rows.jsonl --split 0.05\n  suasion convert --from cmv threads.jsonl -o pairs.jsonl --pairs"
    )]
    Convert(convert::ConvertArgs),
    /// Validate a configuration and print it resolved
    #[command(
        after_help = "Examples:\n  suasion check run.yaml\n  suasion check --explain learning_rate\n  suasion check --schema > suasion.schema.json"
    )]
    Check(check::CheckArgs),
    /// Show this machine's cores, instruction sets and memory
    Env,
    /// Print shell completions
    #[command(
        after_help = "Examples:\n  suasion completions bash > ~/.local/share/bash-completion/completions/suasion"
    )]
    Completions(completions::CompletionsArgs),
    /// Write manual pages
    #[command(after_help = "Examples:\n  suasion man ~/.local/share/man/man1")]
    Man(man::ManArgs),
}

/// The command line: what is declared here, and a flag per configuration key.
pub fn command() -> clap::Command {
    flags::with_keys(Cli::command())
}

/// Runs the program on its arguments, the first of which is its own name, and returns its exit code.
pub fn main_from(args: impl IntoIterator<Item = OsString>) -> u8 {
    suasion_data::hush_guarded_panics();
    limits::watch();
    let mut command = command();
    let args = flags::respelled(&command, args.into_iter().collect());
    let parsed = command.try_get_matches_from_mut(args).and_then(|matches| {
        Ok((Cli::from_arg_matches(&matches)?, matches.subcommand_name().unwrap_or_default().to_string()))
    });
    let (cli, name) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => return usage(&error),
    };
    let ui = Ui::new(cli.json, cli.quiet, cli.color);
    let role = match &cli.command {
        Command::Train(args) => Role::of(args.ranks, args.demo),
        // Of each machine.
        Command::Env => Ok(Role::Alone),
        _ => match ranks::leave_to_first(&name) {
            Ok(Some(note)) => {
                ui.log(note);
                return Exit::Done as u8;
            }
            other => other.map(|_| Role::Alone),
        },
    };
    let role = match role {
        Ok(role) => role,
        Err(error) => return ui.report(&error) as u8,
    };
    let ui = ui.of_rank(role.rank());
    if let Err(refused) = machine::start_threads(cli.threads, role.threads(), &ui) {
        return ui.report(&refused.into()) as u8;
    }
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| match &cli.command {
        Command::Train(args) if args.demo => demo::run(args, &ui),
        Command::Train(args) => train::run(args, &role, &ui),
        Command::Prepare(args) => prepare::run(args, &ui),
        Command::Verify(args) => verify::run(args, &ui),
        Command::Eval(args) => eval::run(args, &ui),
        Command::Compare(args) => compare::run(args, &ui),
        Command::Diagnose(args) => diagnose::run(args, &ui),
        Command::Generate(args) => generate::run(args, &ui),
        Command::Chat(args) => chat::run(args, &ui),
        Command::Convert(args) => convert::run(args, &ui),
        Command::Init(args) => init::run(args, &ui),
        Command::Merge(args) => merge::run(args, &ui),
        Command::Check(args) => check::run(args, &ui),
        Command::Env => env::run(&ui),
        Command::Completions(args) => completions::run(args, &ui),
        Command::Man(args) => man::run(args, &ui),
    }));
    // The panic has been printed.
    let Ok(result) = result else { return ui.report(&failure::panicked().into()) as u8 };
    match result {
        // An interrupted run ends without an error and has not finished.
        Ok(Exit::Done) if interrupt::raised() => interrupt::INTERRUPTED,
        Ok(exit) => exit as u8,
        Err(error) if is_interruption(&error) => {
            if error.is::<suasion_data::Error>() {
                ui.log(&error);
            }
            interrupt::INTERRUPTED
        }
        Err(error) => ui.report(&error) as u8,
    }
}

/// True if the stop flag is the reason. An error on the way to a stop (a full disk) is reported like any
/// other.
fn is_interruption(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(suasion_train::Error::Interrupted))
        || matches!(error.downcast_ref(), Some(suasion_data::Error::Interrupted { .. }))
}

/// A flag that clap does not accept because only other commands use the key.
fn key_of_another_command(error: &clap::Error) -> Option<failure::Failure> {
    use clap::error::{ContextKind, ContextValue};
    let Some(ContextValue::String(flag)) = error.get(ContextKind::InvalidArg) else { return None };
    if error.kind() != clap::error::ErrorKind::UnknownArgument {
        return None;
    }
    let key = config::KEYS.iter().find(|key| flag.strip_prefix("--") == Some(key.name))?;
    Some(failure::Failure::usage(
        format!("{flag}: this command does not use {}", key.name),
        format!("it is a key of {}; --set {}=.. is accepted everywhere", key.commands().join(", "), key.name),
    ))
}

/// clap's own errors in the contract's form: `error[E-USAGE]: …`, then `help:`.
fn usage(error: &clap::Error) -> u8 {
    use clap::error::ErrorKind;
    if !error.use_stderr() {
        // --help and --version.
        let _ = error.print();
        return Exit::Done as u8;
    }
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = error.print();
        return Exit::Usage as u8;
    }
    if let Some(error) = key_of_another_command(error) {
        return ui::Ui::new(false, false, ColorChoice::Auto).report(&error.into()) as u8;
    }
    let text = error.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let text = text.split("\n\nFor more information").next().unwrap_or(text).trim_end();
    let mut stderr = std::io::stderr().lock();
    let _ = writeln!(
        stderr,
        "error[E-USAGE]: {text}\nhelp: `suasion --help` lists the commands, `suasion COMMAND --help` their flags"
    );
    Exit::Usage as u8
}

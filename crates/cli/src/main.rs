//! `suasion`: train the response, not the prompt, and prove the mask.
//!
//! A thin layer over the libraries: flags and configuration in, text and exit codes out. `commands/` has a
//! file per command with its flags and its printing; `job` is a planned run; `inputs/` finds and opens rows,
//! model folders and weights.
#![forbid(unsafe_code)]

mod commands;
mod config;
mod failure;
mod inputs;
mod interrupt;
mod job;
mod limits;
mod machine;
mod paths;
mod progress;
mod reply;
mod tables;
mod ui;

use clap::{Parser, Subcommand};
use commands::{ConfigArgs, check, compare, completions, demo, env, eval, generate, prepare, train, verify};
use failure::Exit;
use std::io::Write;
use std::process::ExitCode;
use ui::{ColorChoice, Ui};

/// Train the response, not the prompt: supervised fine-tuning with masks that are proven.
#[derive(Parser, Debug)]
#[command(name = "suasion", version, about, max_term_width = 100)]
#[command(
    after_help = "Exit codes: 0 done, 1 findings or a failed check, 2 usage or configuration, 3 run time."
)]
struct Cli {
    /// Print results as JSON
    #[arg(long, global = true)]
    json: bool,
    /// Print results, warnings and errors only: no progress, no notes
    #[arg(short, long, global = true)]
    quiet: bool,
    /// When to use colour
    #[arg(long, global = true, value_enum, default_value_t, value_name = "WHEN")]
    color: ColorChoice,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Train a model on rows, with evaluation, checkpoints and a report
    Train(train::TrainArgs),
    /// Render, tokenise, label and truncate rows, and write them as training data
    Prepare(prepare::PrepareArgs),
    /// Show which tokens are supervised and why, and check every row
    Verify(verify::VerifyArgs),
    /// Measure loss and perplexity on responses, loss per section, and calibration of the first token and of the stop
    Eval(eval::EvalArgs),
    /// Train with both objectives (all tokens, response only) from the same seed, and compare them on
    /// held-out responses
    Compare(compare::CompareArgs),
    /// Generate replies to a prompt, or to the prompts of rows
    Generate(generate::GenerateArgs),
    /// Validate a configuration and print it resolved
    Check(ConfigArgs),
    /// Show this machine's cores, instruction sets and memory
    Env,
    /// Print shell completions
    Completions(completions::CompletionsArgs),
}

fn main() -> ExitCode {
    limits::watch();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let ui = Ui::new(cli.json, cli.quiet, cli.color);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| match &cli.command {
        Command::Train(args) if args.demo => demo::run(args, &ui),
        Command::Train(args) => train::run(args, &ui),
        Command::Prepare(args) => prepare::run(args, &ui),
        Command::Verify(args) => verify::run(args, &ui),
        Command::Eval(args) => eval::run(args, &ui),
        Command::Compare(args) => compare::run(args, &ui),
        Command::Generate(args) => generate::run(args, &ui),
        Command::Check(args) => check::run(args, &ui),
        Command::Env => env::run(&ui),
        Command::Completions(args) => completions::run(args, &ui),
    }));
    // What has panicked has said so: a thread that the system refuses, or a bug.
    let Ok(result) = result else { return ExitCode::from(Exit::RunTime as u8) };
    match result {
        // An interrupted run ends without an error and has not finished.
        Ok(Exit::Done) if interrupt::raised() => ExitCode::from(interrupt::INTERRUPTED),
        Ok(exit) => ExitCode::from(exit as u8),
        Err(error) if is_interruption(&error) => {
            if error.is::<suasion_data::Error>() {
                ui.log(&error);
            }
            ExitCode::from(interrupt::INTERRUPTED)
        }
        Err(error) => ExitCode::from(ui.report(&error) as u8),
    }
}

/// True where the stop flag is the reason. An error on the way to a stop (a full disk) is reported like any
/// other.
fn is_interruption(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(suasion_train::Error::Interrupted))
        || matches!(error.downcast_ref(), Some(suasion_data::Error::Interrupted { .. }))
}

/// clap's own errors in the contract's form: `error[E-USAGE]: …`, then `help:`.
fn usage(error: &clap::Error) -> ExitCode {
    use clap::error::ErrorKind;
    if !error.use_stderr() {
        // --help and --version.
        let _ = error.print();
        return ExitCode::from(Exit::Done as u8);
    }
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = error.print();
        return ExitCode::from(Exit::Usage as u8);
    }
    let text = error.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let text = text.split("\n\nFor more information").next().unwrap_or(text).trim_end();
    let mut stderr = std::io::stderr().lock();
    let _ = writeln!(
        stderr,
        "error[E-USAGE]: {text}\nhelp: `suasion --help` lists the commands, `suasion COMMAND --help` their flags"
    );
    ExitCode::from(Exit::Usage as u8)
}

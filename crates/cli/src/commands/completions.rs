//! `suasion completions SHELL`: completions from the definition of the flags.

use crate::failure::Exit;
use crate::ui::Ui;
use std::io::Write;

/// Flags of the command.
#[derive(clap::Args, Debug)]
pub struct CompletionsArgs {
    /// The shell to write completions for
    pub shell: clap_complete::Shell,
}

/// Runs the command.
pub fn run(args: &CompletionsArgs, ui: &Ui) -> anyhow::Result<Exit> {
    // Into memory first: the generator panics where its writer fails, and a closed pipe must not panic.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut crate::command(), "suasion", &mut script);
    let mut out = ui.out();
    out.write_all(&script)?;
    out.flush()?;
    Ok(Exit::Done)
}

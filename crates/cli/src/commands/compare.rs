//! `suasion compare`: both objectives from the same seed and budget, measured on held-out responses.

use super::ConfigArgs;
use crate::failure::{Exit, Failure};
use crate::inputs::rows;
use crate::job::{Begin, Job};
use crate::tables;
use crate::ui::Ui;
use std::io::Write;
use suasion_data::Objective;

/// Flags of the command.
#[derive(clap::Args, Debug)]
pub struct CompareArgs {
    #[command(flatten)]
    config: ConfigArgs,
}

/// The share of the rows that is held out where no evaluation rows are named: a comparison needs some.
const HELD_OUT: f64 = 0.1;

/// Runs the command.
pub fn run(args: &CompareArgs, ui: &Ui) -> anyhow::Result<Exit> {
    let mut loaded = args.config.load(ui)?;
    if loaded.config.data.objective == Objective::AllTokens {
        return Err(Failure::config(
            "completion_only_loss=false: compare trains both objectives",
            "leave completion_only_loss out",
        )
        .into());
    }
    if rows::evaluation(&loaded.config, ui)?.is_none() && loaded.config.eval_fraction == 0.0 {
        loaded.config.eval_fraction = HELD_OUT;
    }
    // Both models are discarded and nothing is written, so output_dir is not checked.
    let job = Job::new(loaded.config, Begin::default(), ui)?;
    job.announce(ui);
    let comparison = job.compare(ui)?;
    if ui.json {
        ui.print_json(&comparison)?;
    } else {
        let mut out = ui.out();
        write!(out, "{}", tables::comparison(&comparison, ui.width))?;
        out.flush()?;
    }
    Ok(Exit::Done)
}

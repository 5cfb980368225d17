//! `suasion compare`: both objectives from the same seed and budget, measured on held-out responses.

use super::ConfigArgs;
use super::train::Job;
use crate::failure::{Exit, Failure};
use crate::interrupt;
use crate::progress::Progress;
use crate::ui::{self, Ui};
use std::io::Write;
use suasion_data::policy::Objective;
use suasion_train::Resume;
use suasion_train::compare::{Arm, CompareSettings, Comparison, compare};
use suasion_train::evaluate::SectionLoss;

/// Flags of the command.
#[derive(clap::Args, Debug)]
pub struct CompareArgs {
    #[command(flatten)]
    config: ConfigArgs,
}

/// Where no evaluation rows are named, this share of the rows is held out: a comparison needs some.
const HELD_OUT: f64 = 0.1;

/// Runs the command.
pub fn run(args: &CompareArgs, ui: &Ui) -> anyhow::Result<Exit> {
    let mut loaded = args.config.load(ui)?;
    if loaded.config.completion_only_loss == Some(false) {
        return Err(Failure::config(
            "completion_only_loss=false: compare trains both objectives by itself",
            "leave completion_only_loss out",
        )
        .into());
    }
    if crate::rows::evaluation(&loaded.config, ui)?.is_none() && loaded.config.eval_fraction == 0.0 {
        loaded.config.eval_fraction = HELD_OUT;
    }
    // Both arms are thrown away: nothing is written, so what lies in output_dir does not matter.
    let job = Job::new(loaded.config, Resume::No, ui)?;
    job.announce(ui);
    let comparison = both(&job, ui)?;
    if ui.json {
        ui.print_json(&comparison)?;
    } else {
        let mut out = ui.out();
        write!(out, "{}", text(&comparison, ui.width))?;
        out.flush()?;
    }
    Ok(Exit::Done)
}

/// Trains and measures both arms of a job.
pub fn both(job: &Job, ui: &Ui) -> anyhow::Result<Comparison> {
    let settings = CompareSettings { train: job.settings.clone(), ..CompareSettings::default() };
    let mut start = job.start(ui);
    let mut make = |budget| start.build(budget);
    let mut progress = Progress::new(ui);
    Ok(compare(&mut make, &job.train, &job.eval, &settings, &mut progress, interrupt::flag())?)
}

/// A comparison as a table, with its verdict.
pub fn text(comparison: &Comparison, width: usize) -> String {
    use std::fmt::Write;
    let mut out = String::new();
    let _ = writeln!(
        out,
        "{} steps each from the same weights, seed {}; measured on {} that neither has seen",
        ui::count(comparison.steps),
        comparison.seed,
        ui::plural(comparison.held_out_rows, "row"),
    );
    let arms = [&comparison.before, &comparison.response_only, &comparison.all_tokens];
    let _ = writeln!(
        out,
        "\n{:<34} {:>12} {:>14} {:>12}",
        "",
        "before",
        name(Objective::ResponseOnly),
        name(Objective::AllTokens)
    );
    let mut line = |what: &str, value: &dyn Fn(&Arm) -> String| {
        let values = arms.map(value);
        let _ = writeln!(out, "{what:<34} {:>12} {:>14} {:>12}", values[0], values[1], values[2]);
    };
    let loss = |section: Option<&SectionLoss>| section.map_or("-".into(), |s| format!("{:.4}", s.loss));
    let share = |value: Option<f64>| value.map_or("-".into(), |v| format!("{:.1}%", v * 100.0));
    line("targets trained on", &|arm| ui::count(arm.targets_trained));
    line("held-out loss: response", &|arm| loss(arm.response.as_ref()));
    line("held-out loss: prompt", &|arm| loss(arm.prompt.as_ref()));
    line("prompt reproduced (n-grams)", &|arm| share(arm.reproduction.ngram_share));
    line("training prompts reproduced", &|arm| share(arm.reproduction_train.ngram_share));
    line("seconds", &|arm| format!("{:.1}", arm.seconds));
    let sections: Vec<String> = comparison.response_only.evaluation.sections.keys().cloned().collect();
    for section in sections {
        line(&format!("  {section}"), &|arm| loss(arm.evaluation.sections.get(&section)));
    }
    out.push('\n');
    for sentence in &comparison.verdict {
        let _ = writeln!(out, "{}", ui::wrap(sentence, width));
    }
    out
}

fn name(objective: Objective) -> &'static str {
    match objective {
        Objective::ResponseOnly => "response only",
        Objective::AllTokens => "all tokens",
    }
}

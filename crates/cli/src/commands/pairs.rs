//! `suasion eval --pairs`: does the model prefer the reply that won?

use crate::config::Config;
use crate::failure::{Exit, Failure};
use crate::inputs::loading;
use crate::inputs::opened::Opened;
use crate::inputs::rows::DataFiles;
use crate::interrupt;
use crate::progress::share_of;
use crate::ui::{Ui, wrap};
use std::collections::HashMap;
use std::io::Write;
use suasion_data::report::format::percent;
use suasion_data::{Format, Mode, Policy, Sample};
use suasion_train::plan::{check_row, eval_budget};
use suasion_train::preference::{Pair, Preference, Preferences, Side, preferences};
use suasion_train::statistics::ConfidenceInterval;
use suasion_train::{evaluate, prompt_ids};

/// Measures both sides of every pair.
pub fn run(config: &Config, files: &DataFiles, ui: &Ui) -> anyhow::Result<Exit> {
    let opened = Opened::of(config, ui)?;
    let (folder, arch) = (&opened.folder, &opened.arch);
    let policy = Policy { format: Format::Preference, packing: false, ..config.policy() };
    let batch = config.train.per_device_eval_batch_size;
    // Duplicates and similar findings are about training rows: here a prompt occurs in many pairs.
    let side = |policy: &Policy| loading::load(ui, files, folder, policy, Mode::Prepare, &[]);
    let won = side(&policy)?;
    let lost = side(&swapped(&policy))?;
    let by_row: HashMap<u64, &Sample> = lost.samples.iter().map(|sample| (sample.id.row, sample)).collect();
    let both: Vec<(&Sample, &Sample)> = (won.samples.iter())
        .filter_map(|sample| Some((sample, *by_row.get(&sample.id.row)?)))
        .filter(|(won, lost)| won.has_target() && lost.has_target())
        .collect();
    if both.is_empty() {
        return Err(Failure::run_time(
            "E-ROW",
            format!("{}: no row has two replies to measure", files.name.display()),
            "a row is {\"prompt\": \"..\", \"chosen\": \"..\", \"rejected\": \"..\"}; map other names with columns.chosen=..",
        )
        .into());
    }
    let left_out = won.summary.rows - both.len() as u64;
    if left_out > 0 {
        ui.warn(format_args!("{left_out} of {} rows have no two replies to measure", won.summary.rows));
    }
    let samples: Vec<Sample> =
        both.iter().flat_map(|(won, lost)| [(*won).clone(), (*lost).clone()]).collect();
    samples.iter().try_for_each(|sample| check_row(arch, sample))?;
    let mut model = opened.start(ui, config).build(eval_budget(&samples, batch))?;
    let total = samples.len() as u64;
    let result = evaluate(&mut model, &samples, batch, Some(interrupt::flag()), &mut |done| {
        ui.overwrite(&share_of("evaluating", done, total, ui.columns()));
    });
    ui.overwrite("");
    let losses = result?.per_row;
    let mut prompts: HashMap<&[u32], usize> = HashMap::new();
    let pairs = losses.chunks_exact(2).zip(&both).map(|(losses, (won, _))| {
        let next = prompts.len();
        Pair {
            row: won.id.row,
            prompt: *prompts.entry(prompt_ids(won)).or_insert(next),
            won: Side::of(&losses[0]),
            lost: Side::of(&losses[1]),
        }
    });
    let Some(result) = preferences(pairs.collect(), config.train.seed) else { return Ok(Exit::Done) };
    if ui.json {
        ui.print_json(&result)?;
    } else {
        print(&result, ui)?;
    }
    Ok(Exit::Done)
}

/// The policy under which a row's rejected side is its chosen one.
fn swapped(policy: &Policy) -> Policy {
    let mut policy = policy.clone();
    let path = |name: &str| policy.columns.get(name).cloned().unwrap_or_else(|| name.to_string());
    let (chosen, rejected) = (path("chosen"), path("rejected"));
    policy.columns.insert("chosen".into(), rejected);
    policy.columns.insert("rejected".into(), chosen);
    policy
}

fn print(result: &Preferences, ui: &Ui) -> anyhow::Result<()> {
    let mut out = ui.out();
    let interval = |i: Option<ConfidenceInterval>| {
        i.map_or("–".into(), |i| format!("{} to {}", percent(i.low), percent(i.high)))
    };
    writeln!(
        out,
        "{:<22} {:>10} {:>20} {:>24}",
        "winner preferred by", "share", "Wilson, 95 %", "bootstrap over prompts"
    )?;
    let mut line = |name: &str, p: &Preference| {
        let share = percent(p.share);
        writeln!(out, "{name:<22} {share:>10} {:>20} {:>24}", interval(p.wilson), interval(p.bootstrap))
    };
    line("total log-likelihood", &result.total)?;
    line("mean per token", &result.mean)?;
    writeln!(out)?;
    for sentence in &result.verdict {
        writeln!(out, "{}", wrap(sentence, ui.width))?;
    }
    out.flush()?;
    Ok(())
}

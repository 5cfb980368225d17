//! `suasion eval`: what a model makes of held-out responses.

use super::train::{Start, check_manifest, check_vocabulary};
use super::{ConfigArgs, need_data, need_model};
use crate::config::{Init, Loaded};
use crate::failure::Exit;
use crate::rows::{self, DataFiles};
use crate::ui::{self, Ui};
use crate::{interrupt, loading};
use std::io::Write;
use suasion_data::Mode;
use suasion_data::prepared::Counts;
use suasion_engine::Architecture;
use suasion_train::evaluate::{Calibration, Evaluation};
use suasion_train::plan::{check_row, eval_budget};

/// Flags of the command.
#[derive(clap::Args, Debug)]
pub struct EvalArgs {
    #[command(flatten)]
    config: ConfigArgs,
}

/// Runs the command.
pub fn run(args: &EvalArgs, ui: &Ui) -> anyhow::Result<Exit> {
    let mut loaded = args.config.load(ui)?;
    let files = evaluation_rows(args, &mut loaded, ui)?;
    let config = &loaded.config;
    let dir = need_model(&loaded, config.init == Init::Weights, ui)?;
    let arch = Architecture::from_dir(&dir)?;
    let tokenizer = loading::tokenizer(&dir)?;
    check_vocabulary(&dir, &arch, tokenizer.as_ref())?;
    let policy = config.policy();
    let template = loading::template(ui, &dir, tokenizer.as_ref());
    check_manifest(&files, tokenizer.as_ref(), template.as_ref(), &policy)?;
    let vocab = Some(arch.vocab_size);
    let (words, chat) = (tokenizer.as_ref(), template.as_ref());
    let data = loading::load(ui, &files, words, chat, &policy, vocab, Mode::Prepare)?;
    ui.say(format_args!("{}: {}", files.name.display(), loading::rows_line(&Counts::of(&data.summary))));
    loading::tell_findings(ui, &data, 0);
    data.samples.iter().try_for_each(|sample| check_row(&arch, sample))?;

    let batch = config.per_device_eval_batch_size;
    let mut start = Start { ui, dir: &dir, arch: &arch, init: config.init, seed: config.seed, told: false };
    let mut model = start.build(eval_budget(&data.samples, batch))?;
    let total = data.samples.len() as u64;
    let result =
        suasion_train::evaluate(&mut model, &data.samples, batch, Some(interrupt::flag()), &mut |done| {
            ui.overwrite(&format!("evaluating: {done}/{total} rows"));
        });
    ui.overwrite("");
    let evaluation = result?;
    if ui.json {
        ui.print_json(&evaluation)?;
    } else {
        let mut out = ui.out();
        write!(out, "{}", text(&evaluation))?;
        out.flush()?;
    }
    Ok(Exit::Done)
}

/// `--data` names the rows to evaluate on (the held-out split of a folder); without it CONFIG's evaluation rows.
fn evaluation_rows(args: &EvalArgs, loaded: &mut Loaded, ui: &Ui) -> anyhow::Result<DataFiles> {
    if !args.config.data.is_empty() {
        loaded.config.eval_dataset_name.clone_from(&loaded.config.dataset_name);
    }
    match rows::evaluation(&loaded.config, ui)? {
        Some(data) => Ok(data),
        None => rows::resolve(need_data(loaded)?, &loaded.config.dataset_train_split, ui),
    }
}

/// An evaluation as a table.
pub fn text(evaluation: &Evaluation) -> String {
    use std::fmt::Write;
    let mut out = String::new();
    let _ = writeln!(
        out,
        "{}, {}: loss {:.4} nats, perplexity {:.2}",
        ui::plural(evaluation.rows, "row"),
        ui::plural(evaluation.targets, "target"),
        evaluation.loss,
        evaluation.perplexity
    );
    let _ = writeln!(out, "\n{:<14} {:>10} {:>9} {:>7}", "section", "targets", "loss", "top-1");
    for (name, section) in &evaluation.sections {
        let _ = writeln!(
            out,
            "{name:<14} {:>10} {:>9.4} {:>6.1}%",
            ui::count(section.targets),
            section.loss,
            section.top1 * 100.0
        );
    }
    let _ = writeln!(
        out,
        "\n{:<14} {:>10} {:>9} {:>12} {:>7}",
        "calibration", "targets", "loss", "probability", "top-1"
    );
    let mut line = |name: &str, c: &Calibration| {
        let number = |value: Option<f64>| value.map_or("-".to_string(), |v| format!("{v:.4}"));
        let top1 = c.top1.map_or("-".to_string(), |v| format!("{:.1}%", v * 100.0));
        let _ = writeln!(
            out,
            "{name:<14} {:>10} {:>9} {:>12} {top1:>7}",
            ui::count(c.targets),
            number(c.loss),
            number(c.probability)
        );
    };
    line("first token", &evaluation.first_token);
    line("stop", &evaluation.stop);
    for bucket in &evaluation.positions {
        let name = match bucket.to {
            Some(to) if to == bucket.from + 1 => format!("token {}", bucket.from),
            Some(to) => format!("tokens {}-{}", bucket.from, to - 1),
            None => format!("tokens {}+", bucket.from),
        };
        line(&name, &bucket.calibration);
    }
    out
}

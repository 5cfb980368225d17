//! `suasion eval`: loss and calibration of a model on held-out responses.

use super::ConfigArgs;
use crate::config::Loaded;
use crate::failure::Exit;
use crate::inputs::loading;
use crate::inputs::opened::Opened;
use crate::inputs::rows::{self, DataFiles};
use crate::interrupt;
use crate::progress::share_of;
use crate::tables;
use crate::ui::Ui;
use std::io::Write;
use suasion_data::Mode;
use suasion_data::prepared::Counts;
use suasion_train::plan::{check_row, eval_budget};

/// Flags of the command.
#[derive(clap::Args, Debug)]
pub struct EvalArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Rows are pairs ("prompt", "chosen", "rejected"): how often does the model prefer the chosen reply?
    #[arg(long)]
    pairs: bool,
}

/// Runs the command.
pub fn run(args: &EvalArgs, ui: &Ui) -> anyhow::Result<Exit> {
    let mut loaded = args.config.load(ui)?;
    let files = evaluation_rows(args, &mut loaded, ui)?;
    let config = &loaded.config;
    if args.pairs {
        return super::pairs::run(config, &files, ui);
    }
    let opened = Opened::of(config, ui)?;
    let (folder, arch) = (&opened.folder, &opened.arch);
    let policy = config.policy();
    loading::check_manifest(&files, folder, &policy)?;
    let data = loading::load(ui, &files, folder, &policy, Mode::Prepare, &[])?;
    ui.log(format_args!("{}: {}", files.name.display(), tables::rows(&Counts::of(&data.summary))));
    loading::print_findings(ui, &data, 0);
    data.samples.iter().try_for_each(|sample| check_row(arch, sample))?;

    let batch = config.train.per_device_eval_batch_size;
    let budget = eval_budget(&data.samples, batch);
    let mut model = opened.start(ui, config).build(budget)?;
    let total = data.samples.len() as u64;
    let result =
        suasion_train::evaluate(&mut model, &data.samples, batch, Some(interrupt::flag()), &mut |done| {
            ui.overwrite(&share_of("evaluating", done, total, ui.columns()));
        });
    ui.overwrite("");
    let evaluation = result?;
    if ui.json {
        ui.print_json(&evaluation)?;
    } else {
        let mut out = ui.out();
        write!(out, "{}", tables::evaluation(&evaluation))?;
        out.flush()?;
    }
    Ok(Exit::Done)
}

/// The rows to evaluate on: `--data` (of a folder, its held-out split), else the evaluation rows of CONFIG.
fn evaluation_rows(args: &EvalArgs, loaded: &mut Loaded, ui: &Ui) -> anyhow::Result<DataFiles> {
    if !args.config.data.is_empty() {
        loaded.config.eval_dataset_name.clone_from(&loaded.config.dataset_name);
    }
    match rows::evaluation(&loaded.config, ui)? {
        Some(data) => Ok(data),
        None => rows::training(&loaded.config, ui),
    }
}

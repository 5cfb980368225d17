//! `suasion check`: validates a configuration and prints it resolved, each key with the place that set it.

use super::ConfigArgs;
use crate::config::{Init, KEYS, Loaded};
use crate::failure::Exit;
use crate::inputs::hub::{Access, ToDownload};
use crate::inputs::{model, rows};
use crate::ui::Ui;
use std::io::Write;

/// Runs the command.
pub fn run(args: &ConfigArgs, ui: &Ui) -> anyhow::Result<Exit> {
    let loaded = args.load(ui)?;
    loaded.config.settings().validate(true)?;
    let problems = problems(&loaded, ui);
    if ui.json {
        ui.print_json(&serde_json::json!({
            "config": loaded.config.to_json(),
            "set_by": loaded.places,
            "problems": problems,
        }))?;
    } else {
        let mut out = ui.out();
        for key in KEYS {
            let line = format!("{}: {}", key.name, (key.get)(&loaded.config));
            match loaded.places.get(key.name) {
                Some(place) => writeln!(out, "{line:<44}  # set by {place}")?,
                None => writeln!(out, "{line:<44}  # {}", first_sentence(key.doc))?,
            }
        }
        out.flush()?;
        for problem in &problems {
            ui.warn(problem);
        }
        if problems.is_empty() {
            ui.log("the configuration is valid");
        }
    }
    Ok(if problems.is_empty() { Exit::Done } else { Exit::Findings })
}

fn first_sentence(doc: &str) -> &str {
    doc.trim().trim_end_matches('.')
}

/// Problems of a well-formed configuration on this machine: models and rows that are missing. Nothing is
/// downloaded; what a run would download is a note, not a problem.
fn problems(loaded: &Loaded, ui: &Ui) -> Vec<String> {
    let (config, cache) = (&loaded.config, Access::cache(ui));
    let mut problems = Vec::new();
    let mut add = |key: &str, error: anyhow::Error| match error.downcast_ref::<ToDownload>() {
        Some(note) => ui.log(format_args!("note: {key}: {note}")),
        None => problems.push(format!("{key}: {error}")),
    };
    if let Some(name) = &config.model_name_or_path
        && let Err(error) = model::resolve(name, config.init == Init::Weights, cache)
    {
        add("model_name_or_path", error);
    }
    let training = config.dataset_name.is_some().then(|| rows::training(config, cache));
    let evaluation = rows::evaluation(config, cache).transpose();
    for (key, data) in [("dataset_name", training), ("evaluation rows", evaluation)] {
        match data {
            Some(Ok(data)) => {
                let missing = data.files.iter().filter(|path| !path.is_file());
                missing.for_each(|path| add(key, anyhow::anyhow!("{}: no such file", path.display())));
            }
            Some(Err(error)) => add(key, error),
            _ => {}
        }
    }
    problems
}

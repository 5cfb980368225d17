//! `suasion check`: validates a configuration and prints it resolved, each key with the place that set it.

use super::{ConfigArgs, print_notes};
use crate::config::flags::Named;
use crate::config::{Init, KEYS, Loaded, docs, suggestion};
use crate::failure::{Exit, Failure, Failures, Outcome};
use crate::inputs::hub::{Access, ToDownload};
use crate::inputs::{model, rows};
use crate::ui::Ui;
use std::io::Write;

/// Flags of the command.
#[derive(clap::Args, Debug)]
pub struct CheckArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Describe a key: its values, default, meaning and an example; without KEY, every key
    #[arg(long, value_name = "KEY", num_args = 0..=1, conflicts_with = "schema", hide_possible_values = true)]
    #[arg(value_parser = Named(KEYS.iter().map(|key| key.name.to_string()).collect()))]
    explain: Option<Option<String>>,
    /// With --explain: every key, as docs/configuration.md
    #[arg(long, hide = true, requires = "explain")]
    markdown: bool,
    /// Print a JSON Schema of configurations, for editors
    #[arg(long)]
    schema: bool,
}

/// Runs the command.
pub fn run(args: &CheckArgs, ui: &Ui) -> anyhow::Result<Exit> {
    if args.schema {
        ui.print_json(&docs::schema())?;
        return Ok(Exit::Done);
    }
    if args.markdown {
        let mut out = ui.out();
        write!(out, "{}", docs::markdown())?;
        out.flush()?;
        return Ok(Exit::Done);
    }
    if let Some(name) = &args.explain {
        return explain(name.as_deref(), ui);
    }
    let mut loaded = args.config.read();
    print_notes(&loaded, ui);
    let mut errors = loaded.problems();
    if let Err(error) = loaded.config.settings().validate(true) {
        let message = error.to_string();
        let error = anyhow::Error::from(error);
        let Outcome { tag, help, exit } = Outcome::of(&error);
        errors.push(Failure { tag, message, help, exit });
    }
    let problems = problems(&loaded, ui);
    if ui.json {
        let errors: Vec<_> = errors
            .iter()
            .map(|error| serde_json::json!({ "message": error.message, "help": error.help }))
            .collect();
        ui.print_json(&serde_json::json!({
            "config": loaded.config.to_json(),
            "set_by": loaded.places,
            "errors": errors,
            "problems": problems,
        }))?;
    } else {
        if errors.is_empty() {
            print_resolved(&loaded, ui)?;
        }
        for problem in &problems {
            ui.warn(problem);
        }
        if problems.is_empty() && errors.is_empty() {
            ui.log("the configuration is valid");
        }
    }
    Failures::none(errors)?;
    Ok(if problems.is_empty() { Exit::Done } else { Exit::Findings })
}

/// Describes one key, or all.
fn explain(name: Option<&str>, ui: &Ui) -> anyhow::Result<Exit> {
    let name = name.map(|name| name.trim_start_matches('-').replace('-', "_"));
    let selected = KEYS.iter().filter(|key| name.as_deref().is_none_or(|name| name == key.name));
    if ui.json {
        let keys: Vec<_> = selected.map(|key| key.to_json()).collect();
        if !keys.is_empty() {
            ui.print_json(&keys)?;
            return Ok(Exit::Done);
        }
    }
    let text = match &name {
        None => KEYS.iter().map(|key| key.explain()).collect::<Vec<_>>().join("\n"),
        Some(name) => docs::explain(name)
            .ok_or_else(|| Failure::usage(format!("{name:?} is not a key"), suggestion(name)))?,
    };
    let mut out = ui.out();
    write!(out, "{text}")?;
    out.flush()?;
    Ok(Exit::Done)
}

/// Prints the resolved tree, as YAML that reads back to it.
fn print_resolved(loaded: &Loaded, ui: &Ui) -> anyhow::Result<()> {
    let mut out = ui.out();
    for key in KEYS {
        let line = format!("{}: {}", key.name, (key.get)(&loaded.config));
        match loaded.places.get(key.name) {
            Some(place) => writeln!(out, "{line:<44}  # set by {place}")?,
            None => writeln!(out, "{line:<44}  # {}", first_sentence(key.doc))?,
        }
    }
    out.flush()?;
    Ok(())
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

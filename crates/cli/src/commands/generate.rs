//! `suasion generate`: replies, printed as they are generated.

use super::ConfigArgs;
use crate::config::Init;
use crate::failure::{Exit, Failure};
use crate::inputs::model;
use crate::inputs::weights::Start;
use crate::inputs::{loading, rows};
use crate::interrupt;
use crate::reply::{SamplingArgs, reference, reply};
use crate::ui::Ui;
use std::io::{Read, Write};
use suasion_data::Mode;
use suasion_data::report::printable;
use suasion_train::generate::capacity;
use suasion_train::prompt_ids;

/// Flags of the command.
#[derive(clap::Args, Debug)]
pub struct GenerateArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// The text to continue; - reads it from stdin
    #[arg(short, long, value_name = "P", conflicts_with = "data")]
    prompt: Option<String>,
    /// With --data: only the first N rows
    #[arg(long, value_name = "N")]
    rows: Option<usize>,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// Something to continue.
struct Prompt {
    ids: Vec<u32>,
    /// The number of the row that it comes from, and the row's response.
    row: Option<(u64, String)>,
}

/// Runs the command.
pub fn run(args: &GenerateArgs, ui: &Ui) -> anyhow::Result<Exit> {
    let loaded = args.config.load(ui)?;
    let config = &loaded.config;
    let dir = model::named(config, config.init == Init::Weights, ui)?;
    let (folder, arch) = model::with_architecture(&dir, config.init, ui)?;
    let tokenizer = model::need_tokenizer(&folder)?;
    let policy = config.policy();
    let sampling = args.sampling.of(config.train.seed, tokenizer.stop_ids(&policy)?);
    sampling.validate()?;

    let prompts = match (&args.prompt, &config.dataset_name) {
        (Some(text), _) => {
            let text = if text == "-" {
                let mut text = String::new();
                std::io::stdin().read_to_string(&mut text)?;
                text
            } else {
                text.clone()
            };
            vec![Prompt { ids: tokenizer.encode_prompt(&text)?, row: None }]
        }
        (None, Some(data)) => {
            let file = rows::resolve(
                data,
                config.dataset_test_split.as_deref().unwrap_or(&config.dataset_train_split),
                ui,
            )?;
            let data = loading::load(ui, &file, &folder, &policy, Mode::Prepare, &[])?;
            data.samples
                .iter()
                .take(args.rows.unwrap_or(usize::MAX))
                .map(|sample| Prompt {
                    ids: prompt_ids(sample).to_vec(),
                    row: Some((sample.id.row, reference(sample, tokenizer))),
                })
                .collect()
        }
        (None, None) => {
            return Err(Failure::usage("no prompt is given", "give --prompt P or --data D").into());
        }
    };

    let longest = prompts.iter().map(|prompt| prompt.ids.len()).max().unwrap_or(0);
    let budget = suasion_train::generate::budget(longest);
    let mut model = Start::new(ui, &folder.path, &arch, config).build(budget)?;
    // One cache for all prompts.
    let mut cache = model.cache(capacity(&model, longest, sampling.max_new_tokens))?;
    let mut out = ui.out();
    for (index, prompt) in prompts.iter().enumerate() {
        if let (Some((row, _)), false) = (&prompt.row, ui.json) {
            writeln!(out, "{}--- row {row}", if index > 0 { "\n" } else { "" })?;
        }
        let reply = reply(&mut model, &mut cache, 0, tokenizer, &prompt.ids, &sampling, &mut |piece| {
            if ui.json {
                return Ok(());
            }
            write!(out, "{}", printable(piece))?;
            out.flush()
        })?;
        if ui.json {
            let mut line = serde_json::json!({
                "prompt": tokenizer.decode(&prompt.ids, false),
                "reply": reply.text,
                "stopped": reply.stopped_name(),
                "prompt_tokens": prompt.ids.len(),
                "new_tokens": reply.ids.len(),
                "ids": reply.ids,
            });
            if let (Some((row, reference)), Some(object)) = (&prompt.row, line.as_object_mut()) {
                object.insert("row".into(), (*row).into());
                object.insert("reference".into(), reference.as_str().into());
            }
            // A line per reply, so that replies can be read while others are generated.
            writeln!(out, "{line}")?;
        } else {
            writeln!(out)?;
            out.flush()?;
            ui.note(format_args!("[{} tokens; {}]", reply.ids.len(), reply.why()));
        }
        out.flush()?;
        if interrupt::raised() {
            break;
        }
    }
    Ok(Exit::Done)
}

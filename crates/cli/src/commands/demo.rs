//! `suasion train --demo`: verify, train, evaluate and compare on embedded rows.

use super::print_notes;
use super::train::TrainArgs;
use crate::config::{Config, Init, Loaded};
use crate::failure::{Exit, Failure};
use crate::inputs::demo::Files;
use crate::inputs::model::need_tokenizer;
use crate::inputs::weights::Start;
use crate::interrupt;
use crate::job::{Begin, Job};
use crate::reply::{Manner, reference, reply};
use crate::tables;
use crate::ui::{self, Ui};
use std::io::Write;
use std::path::PathBuf;
use suasion_data::report::format::{duration, thousands};
use suasion_data::report::terminal::Style;
use suasion_data::report::{self, RowView};
use suasion_data::source::Source;
use suasion_data::{Mode, ModelFolder, Outcome, Pipeline, Policy};
use suasion_train::generate::capacity;
use suasion_train::{Report, SampleReply, Sampling, Scheduler, Settings, Strategy, prompt_ids, write_report};

/// The demo's folder where output_dir is not set.
const FOLDER: &str = "suasion-demo";

/// Keys that the demo sets: its rows, its model, and both objectives.
const ITS_OWN: [&str; 9] = [
    "model_name_or_path",
    "init",
    "dataset_name",
    "dataset_train_split",
    "dataset_test_split",
    "eval_dataset_name",
    "eval_fraction",
    "completion_only_loss",
    "overwrite_output_dir",
];

/// The longest reply that is shown, in tokens.
const REPLY_TOKENS: usize = 128;

/// Runs the demo.
pub fn run(args: &TrainArgs, ui: &Ui) -> anyhow::Result<Exit> {
    let loaded = Loaded::over(defaults(), None, &args.config.set, &args.config.keys.0).checked()?;
    print_notes(&loaded, ui);
    if let Some(key) = ITS_OWN.iter().find(|key| loaded.places.contains_key(**key)) {
        return Err(Failure::usage(
            format!("{key} is set by the demo"),
            "leave it out, or train without --demo: suasion train --data D --model M",
        )
        .into());
    }
    let folder = loaded.config.output_dir.clone();
    // A dry run leaves nothing behind, and its rows must be somewhere while they are read.
    let passing = args.dry_run.then(Passing::new);
    let files = match &passing {
        Some(passing) => Files::write(&passing.0)?,
        None => Files::write(&folder)?,
    };
    let mut config = loaded.config;
    config.model_name_or_path = Some(files.model.clone());
    config.dataset_name = Some(files.data.clone().into());
    config.output_dir = files.run.clone();
    // Files::write has refused any folder that is not an earlier demo's, so a second demo may replace the
    // first.
    config.overwrite_output_dir = true;

    if !args.dry_run {
        ui.log(format_args!(
            "wrote the demo's {} rows ({} to train on, {} held out), tokenizer and model configuration to {}",
            files.train_rows + files.held_out_rows,
            files.train_rows,
            files.held_out_rows,
            folder.display()
        ));
    }
    let shares = verify(&files, &config.policy(), ui)?;

    heading(ui, "Training on the responses only, from random weights");
    let mut job = Job::new(config, Begin::default(), ui)?;
    if args.dry_run {
        job.print(ui)?;
        return Ok(Exit::Done);
    }
    job.announce(ui);
    let report = job.train(ui)?;
    if report.interrupted {
        job.farewell(&report, ui)?;
        return Ok(Exit::Done);
    }

    heading(ui, "Training on all tokens, from the same initial weights over the same rows, to compare");
    let comparison = job.compare_with(Some(&report), ui)?;
    let reply = sample(&job, ui)?;
    write_report(
        &job.config.output_dir,
        &report,
        &job.settings,
        &job.identity,
        &job.card,
        std::slice::from_ref(&reply),
        Some(&comparison),
    )?;

    if ui.json {
        ui.print_json(&serde_json::json!({
            "verify": shares, "report": report, "comparison": comparison, "reply": reply,
        }))?;
        return Ok(Exit::Done);
    }
    let mut out = ui.out();
    writeln!(out, "\n== Held-out responses, before and after training\n")?;
    write!(out, "{}", before_and_after(&report))?;
    writeln!(out, "\n== Response only against all tokens\n")?;
    write!(out, "{}", tables::comparison(&comparison, ui.width))?;
    writeln!(out, "\n== A reply to a view that was not trained on\n")?;
    // Line by line: `visible` shows line ends as marks.
    for text in [&reply.prompt, &reply.reply] {
        for line in text.trim().lines() {
            writeln!(out, "{}", ui::wrap(&report::visible(line), ui.width))?;
        }
        writeln!(out)?;
    }
    let note = format!(
        "({}; {} parameters, trained for {} on {} rows: expect no sense from a model of this size)",
        reply.stopped,
        thousands(report.parameters),
        duration(report.seconds),
        thousands(job.plan.rows)
    );
    writeln!(out, "{}", ui::wrap(&note, ui.width))?;
    let dir = &job.config.output_dir;
    writeln!(out, "\nreport: {}", dir.join("report.html").display())?;
    writeln!(out, "model:  {}", dir.display())?;
    writeln!(out, "\nthe same with your own rows and model:")?;
    writeln!(out, "  suasion verify --data rows.jsonl --model MODEL")?;
    writeln!(out, "  suasion train  --data rows.jsonl --model MODEL -o out")?;
    writeln!(out, "or, with a configuration that is written for them:")?;
    writeln!(out, "  suasion init   --data rows.jsonl --model MODEL")?;
    out.flush()?;
    Ok(Exit::Done)
}

/// A folder that is removed in the end.
struct Passing(PathBuf);

impl Passing {
    fn new() -> Passing {
        Passing(std::env::temp_dir().join(format!("{FOLDER}-{}", std::process::id())))
    }
}

impl Drop for Passing {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The demo's configuration, which flags and `--set` override.
fn defaults() -> Config {
    Config {
        init: Init::Random,
        output_dir: PathBuf::from(FOLDER),
        train: Settings {
            per_device_train_batch_size: 4,
            num_train_epochs: 8.0,
            learning_rate: 2e-3,
            lr_scheduler_type: Scheduler::Cosine,
            warmup_ratio: 0.1,
            weight_decay: 0.1,
            logging_steps: 1.into(),
            eval_strategy: Strategy::Epoch,
            // The run is short, and Ctrl-C writes a checkpoint.
            save_strategy: Strategy::No,
            ..Settings::default()
        },
        ..Config::default()
    }
}

fn heading(ui: &Ui, text: &str) {
    ui.log(format_args!("\n== {text}\n"));
}

/// Prints the first row with its mask, and the summary; returns the summary as JSON.
fn verify(files: &Files, policy: &Policy, ui: &Ui) -> anyhow::Result<serde_json::Value> {
    heading(ui, "The mask, by verify");
    let pipeline = Pipeline {
        mode: Mode::Verify,
        keep_text: true,
        ..Pipeline::new(ModelFolder::open(&files.model)?, policy.clone())
    };
    let tokenizer = pipeline.folder.tokenizer.as_deref();
    let mut findings = report::Findings::default();
    let mut first = None;
    let mut rows = pipeline.rows(Source::open(files.data.join("train.jsonl"))?)?;
    for outcome in &mut rows {
        let outcome = outcome?;
        findings.add(&outcome)?;
        if let (None, Outcome::Kept(kept)) = (&first, &outcome) {
            first = Some(RowView::new(kept, tokenizer));
        }
    }
    let summary = rows.into_summary();
    if !ui.json {
        let style = Style { color: ui.color, width: ui.width, ids: false, origins: false };
        let mut out = ui.out();
        if let Some(view) = &first {
            writeln!(out, "{}", report::terminal::row(view, &style))?;
        }
        write!(out, "{}", report::terminal::summary(&summary, &style))?;
        out.flush()?;
    }
    Ok(serde_json::to_value(report::json::verify(&summary, &findings))?)
}

fn before_and_after(report: &Report) -> String {
    match (&report.before, &report.after) {
        (Some(before), Some(after)) => {
            let change = after.loss - before.loss;
            let verb = if change < 0.0 { "fell" } else { "did not fall" };
            format!(
                "the held-out response loss {verb}: {:.4} before, {:.4} after ({change:+.4} nats a token)\n\n{}",
                before.loss,
                after.loss,
                tables::evaluation(after)
            )
        }
        _ => "there were no rows to evaluate on\n".into(),
    }
}

/// A reply of the trained model to the first held-out row.
fn sample(job: &Job, ui: &Ui) -> anyhow::Result<SampleReply> {
    let tokenizer = need_tokenizer(&job.folder)?;
    let row = job.eval.first().ok_or_else(|| anyhow::anyhow!("the demo has no held-out rows"))?;
    let prompt = prompt_ids(row);
    let sampling = Sampling {
        do_sample: true,
        temperature: 0.7,
        top_k: 40,
        seed: job.settings.seed,
        max_new_tokens: REPLY_TOKENS,
        stop_ids: tokenizer.stop_ids(&job.config.policy())?,
        ..Sampling::default()
    };
    let manner = Manner { sampling, stop_strings: Vec::new() };
    let budget = suasion_train::generate::budget(prompt.len());
    let say = |mut start: Start<'_>| {
        let mut model = start.build(budget)?;
        let mut cache = model.cache(capacity(&model, prompt.len(), REPLY_TOKENS))?;
        reply(&mut model, &mut cache, 0, tokenizer, prompt, &manner, &mut |_| Ok(()))
    };
    let before = say(job.start(ui))?;
    let after = say(Start::from_dir(ui, &job.config.output_dir, &job.arch).on(job.config.device()))?;
    if interrupt::raised() {
        return Err(suasion_train::Error::Interrupted.into());
    }
    Ok(SampleReply {
        prompt: tokenizer.decode(prompt, false),
        before: Some(before.text),
        stopped: format!("{} tokens, {}", after.ids.len(), after.why()),
        reply: after.text,
        reference: Some(reference(row, tokenizer)),
    })
}

//! `suasion train --demo`: the whole way on embedded rows. What it says is what it measured.

use super::tell_notes;
use super::train::TrainArgs;
use crate::config::{Config, Init, Loaded};
use crate::failure::{Exit, Failure};
use crate::inputs::model::need_tokenizer;
use crate::inputs::weights::Start;
use crate::interrupt;
use crate::job::Job;
use crate::reply::{reference, reply};
use crate::tables;
use crate::ui::{self, Ui};
use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};
use suasion_data::ModelFolder;
use suasion_data::pipeline::{Mode, Outcome, Pipeline};
use suasion_data::policy::Policy;
use suasion_data::report::format::{duration, thousands};
use suasion_data::report::{self, RowView, Style};
use suasion_data::source::Source;
use suasion_train::generate::capacity;
use suasion_train::{Report, Resume, SampleReply, Sampling, Scheduler, prompt_ids, write_report};

const ROWS: &str = include_str!("../../../../examples/persuasion/rows.jsonl");

/// The model folder: configuration and tokenizer, no weights.
const MODEL_FILES: [(&str, &[u8]); 3] = [
    ("config.json", include_bytes!("../../../../examples/persuasion/config.json")),
    ("tokenizer.json", include_bytes!("../../../../examples/persuasion/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../../../../examples/persuasion/tokenizer_config.json")),
];

/// Where the demo works unless output_dir says otherwise.
const FOLDER: &str = "suasion-demo";

/// Keys that the demo answers itself: its rows, its model, and both objectives.
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

/// One view in this many is held out, with all its replies.
const HELD_OUT_ONE_IN: usize = 10;

/// Tokens of the reply that is shown.
const REPLY_TOKENS: usize = 128;

/// Runs the demo.
pub fn run(args: &TrainArgs, ui: &Ui) -> anyhow::Result<Exit> {
    let loaded = Loaded::over(defaults(), &args.config.set)?;
    tell_notes(&loaded, ui);
    if let Some(key) = ITS_OWN.iter().find(|key| loaded.places.contains_key(**key)) {
        return Err(Failure::usage(
            format!("{key} is the demo's own"),
            "leave it out, or train without --demo: suasion train --data D --model M",
        )
        .into());
    }
    let folder = loaded.config.output_dir.clone();
    let files = Files::write(&folder)?;
    let mut config = loaded.config;
    config.model_name_or_path = Some(files.model.clone());
    config.dataset_name = Some(files.data.clone().into());
    config.output_dir = files.run.clone();
    // The folder is the demo's own (Files::write has seen to it): a second demo replaces the first.
    config.overwrite_output_dir = true;

    ui.say(format_args!("wrote the demo's rows, tokenizer and model configuration to {}", folder.display()));
    let shares = verify(&files, &config.policy(), ui)?;

    heading(ui, "Training on the responses only, from random weights");
    let job = Job::new(config, Resume::No, ui)?;
    job.announce(ui);
    if args.dry_run {
        return Ok(Exit::Done);
    }
    let report = job.train(ui)?;
    if report.interrupted {
        job.farewell(&report, ui)?;
        return Ok(Exit::Done);
    }

    heading(ui, "Both objectives from the same start, to compare");
    let comparison = job.compare(ui)?;
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
    writeln!(out, "\n== A reply to a view that it has never seen\n")?;
    // Line by line: `visible` would show the prompt's own line ends as marks.
    for text in [&reply.prompt, &reply.reply] {
        for line in text.trim().lines() {
            writeln!(out, "{}", ui::wrap(&report::visible(line), ui.width))?;
        }
        writeln!(out)?;
    }
    let note = format!(
        "({}; {} parameters trained for {} on {} rows show the way, not what a real model writes)",
        reply.stopped,
        thousands(report.parameters),
        duration(report.seconds),
        thousands(job.plan.rows)
    );
    writeln!(out, "{}", ui::wrap(&note, ui.width))?;
    let dir = &job.config.output_dir;
    writeln!(out, "\nreport: {}", dir.join("report.html").display())?;
    writeln!(out, "model:  {}", dir.display())?;
    writeln!(out, "\nthe same with rows and a model of your own:")?;
    writeln!(out, "  suasion verify --data rows.jsonl --model MODEL")?;
    writeln!(out, "  suasion train  --data rows.jsonl --model MODEL --set output_dir=out")?;
    out.flush()?;
    Ok(Exit::Done)
}

/// The demo's settings; `--set` goes over them.
fn defaults() -> Config {
    Config {
        init: Init::Random,
        output_dir: PathBuf::from(FOLDER),
        per_device_train_batch_size: 4,
        num_train_epochs: 8.0,
        learning_rate: 2e-3,
        lr_scheduler_type: Scheduler::Cosine,
        warmup_ratio: 0.1,
        weight_decay: 0.1,
        eval_strategy: suasion_train::Strategy::Epoch,
        // Small runs need no checkpoint on the way; Ctrl-C leaves one.
        save_strategy: suasion_train::Strategy::No,
        ..Config::default()
    }
}

fn heading(ui: &Ui, text: &str) {
    ui.say(format_args!("\n== {text}\n"));
}

/// The demo's working folder.
struct Files {
    model: PathBuf,
    data: PathBuf,
    run: PathBuf,
}

impl Files {
    /// Writes rows, tokenizer and configuration.
    fn write(folder: &Path) -> anyhow::Result<Files> {
        let files = Files { model: folder.join("model"), data: folder.join("data"), run: folder.join("run") };
        let filled = std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some());
        // Only what looks like an earlier demo is replaced.
        if filled && !files.data.join("train.jsonl").is_file() {
            return Err(Failure {
                tag: "E-OUTPUT",
                message: format!("{}: the output folder is not empty, and no demo made it", folder.display()),
                help: Some("choose another: --set output_dir=FOLDER".into()),
                exit: Exit::Usage,
            }
            .into());
        }
        let put = |path: PathBuf, bytes: &[u8]| -> suasion_data::Result<()> {
            let parent = path.parent().unwrap_or(folder);
            std::fs::create_dir_all(parent).map_err(|e| suasion_data::Error::io(parent, e))?;
            std::fs::write(&path, bytes).map_err(|e| suasion_data::Error::io(&path, e))
        };
        for (name, bytes) in MODEL_FILES {
            put(files.model.join(name), bytes)?;
        }
        let (train, test) = split(ROWS);
        put(files.data.join("train.jsonl"), train.as_bytes())?;
        put(files.data.join("test.jsonl"), test.as_bytes())?;
        Ok(files)
    }
}

/// Training rows and held-out rows: whole views, chosen by the hash of their name.
fn split(rows: &str) -> (String, String) {
    let view = |line: &str| -> String {
        let row: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
        row["view"].as_str().unwrap_or_default().to_string()
    };
    let views: BTreeSet<String> = rows.lines().map(view).collect();
    let mut order: Vec<&String> = views.iter().collect();
    order.sort_by_cached_key(|view| *blake3::hash(view.as_bytes()).as_bytes());
    let held_out: BTreeSet<&String> =
        order[order.len() - order.len().div_ceil(HELD_OUT_ONE_IN)..].iter().copied().collect();
    let (mut train, mut test) = (String::new(), String::new());
    for line in rows.lines().filter(|line| !line.trim().is_empty()) {
        let file = if held_out.contains(&view(line)) { &mut test } else { &mut train };
        file.push_str(line);
        file.push('\n');
    }
    (train, test)
}

/// The first row with its mask, and the shares before and after.
fn verify(files: &Files, policy: &Policy, ui: &Ui) -> anyhow::Result<serde_json::Value> {
    heading(ui, "What is learned: verify");
    let pipeline = Pipeline {
        mode: Mode::Verify,
        keep_text: true,
        ..Pipeline::new(ModelFolder::open(&files.model)?, policy.clone())
    };
    let tokenizer = pipeline.folder.tokenizer.as_deref();
    let mut findings = report::json::Findings::default();
    let mut first = None;
    let mut rows = pipeline.rows(Source::open(files.data.join("train.jsonl"))?)?;
    for outcome in &mut rows {
        let outcome = outcome?;
        outcome.findings().iter().try_for_each(|finding| findings.push(finding))?;
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
            let word = if change < 0.0 { "fell" } else { "did not fall" };
            format!(
                "the held-out response loss {word}: {:.4} before, {:.4} after ({change:+.4} nats a token)\n\n{}",
                before.loss,
                after.loss,
                tables::evaluation(after)
            )
        }
        _ => "there was nothing to measure on\n".into(),
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
        seed: job.config.seed,
        max_new_tokens: REPLY_TOKENS,
        stop_ids: tokenizer.stop_ids(&job.config.policy())?,
        ..Sampling::default()
    };
    let budget = suasion_train::generate::budget(prompt.len());
    let mut model = Start::from_dir(ui, &job.config.output_dir, &job.arch).build(budget)?;
    let mut cache = model.cache(capacity(&model, prompt.len(), sampling.max_new_tokens))?;
    let reply = reply(&mut model, &mut cache, tokenizer, prompt, &sampling, &mut |_| Ok(()))?;
    if interrupt::raised() {
        return Err(suasion_train::Error::Interrupted.into());
    }
    Ok(SampleReply {
        prompt: tokenizer.decode(prompt, false),
        stopped: format!("{} tokens, {}", reply.ids.len(), reply.why()),
        reply: reply.text,
        reference: Some(reference(row, tokenizer)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_views_are_held_out() {
        let (train, test) = split(ROWS);
        let views = |text: &str| -> BTreeSet<String> {
            text.lines()
                .map(|line| {
                    serde_json::from_str::<serde_json::Value>(line).unwrap()["view"]
                        .as_str()
                        .unwrap()
                        .to_string()
                })
                .collect()
        };
        let (train_views, test_views) = (views(&train), views(&test));
        assert!(train_views.is_disjoint(&test_views));
        assert!(test_views.len() >= 4 && test_views.len() * 5 < train_views.len());
        assert_eq!(train.lines().count() + test.lines().count(), ROWS.lines().count());
    }

    #[test]
    fn there_are_enough_rows_and_none_is_copied_from_another() {
        let mut texts = BTreeSet::new();
        let mut views = BTreeSet::new();
        for line in ROWS.lines() {
            let row: serde_json::Value = serde_json::from_str(line).unwrap();
            let (input, full) = (row["input_text"].as_str().unwrap(), row["full_text"].as_str().unwrap());
            let response = full.strip_prefix(input).expect("full_text starts with input_text");
            assert!(texts.insert(response.to_string()), "{response}");
            for marker in ["[SYSTEM]", "[CONTEXT]", "[TASK]", "[RESPONSE]"] {
                assert_eq!(input.matches(marker).count(), 1, "{input}");
            }
            views.insert(row["view"].as_str().unwrap().to_string());
        }
        assert!(texts.len() >= 160 && views.len() >= 40);
    }
}

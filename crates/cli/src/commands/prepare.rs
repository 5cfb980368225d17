//! `suasion prepare`: rows to a file of training data, its findings and its manifest.

use super::{ConfigArgs, need_data, need_model};
use crate::failure::{Exit, Failure};
use crate::loading::{self, Meter};
use crate::rows;
use crate::ui::{self, Ui};
use std::path::{Path, PathBuf};
use suasion_data::pipeline::Pipeline;
use suasion_data::prepared::{Manifest, PreparedWriter, findings_path, manifest_path};

/// Flags of the command.
#[derive(clap::Args, Debug)]
pub struct PrepareArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// The file to write: .jsonl (also .jsonl.gz, .jsonl.zst)
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    /// Add the rendered text to each line
    #[arg(long)]
    with_text: bool,
}

/// Runs the command.
pub fn run(args: &PrepareArgs, ui: &Ui) -> anyhow::Result<Exit> {
    let loaded = args.config.load(ui)?;
    check_output(&args.output)?;
    let config = &loaded.config;
    let source = rows::resolve(need_data(&loaded)?, &config.dataset_train_split)?;
    let model = need_model(&loaded)?;
    if same_file(&source, &args.output) {
        return Err(Failure::usage(
            format!("{} is both the source and the output", args.output.display()),
            "write to another file",
        )
        .into());
    }
    let tokenizer = loading::tokenizer(&model)?;
    let policy = config.policy();
    let template = loading::template(ui, &model, tokenizer.as_ref());
    let mut pipeline = Pipeline::new(tokenizer.as_ref(), &policy);
    pipeline.template = template.as_ref();
    pipeline.vocab_size = loading::vocab_size(&model);
    pipeline.keep_text = args.with_text;

    let mut writer = PreparedWriter::create(&args.output, args.with_text)?;
    let mut meter = Meter::new(ui, &source);
    let summary = pipeline.run(&source, |progress| meter.show(progress), |outcome| writer.write(&outcome));
    meter.clear();
    let summary = summary?;
    loading::tell_date(ui, &summary);
    let hash = summary.source.clone().ok_or_else(|| anyhow::anyhow!("the source was not read to its end"))?;
    let manifest = Manifest::new(&summary, hash, tokenizer.as_ref(), &policy);
    writer.finish(&manifest)?;

    if ui.json {
        ui.print_json(&manifest)?;
        return Ok(Exit::Done);
    }
    ui.say(loading::rows_line(&summary));
    ui.say(format_args!(
        "{} tokens, {} supervised ({})",
        ui::count(summary.tokens),
        ui::count(summary.supervised_tokens),
        ui::percent(summary.supervised_tokens, summary.tokens)
    ));
    for (code, found) in &summary.findings {
        ui.say(format_args!("{code} {} × {}", ui::count(found.count), code.meaning()));
    }
    if summary.kept == 0 {
        ui.warn("no row is left: the file is empty");
    }
    ui.say(format_args!(
        "wrote {}, {} and {}",
        args.output.display(),
        findings_path(&args.output).display(),
        manifest_path(&args.output).display()
    ));
    Ok(Exit::Done)
}

/// The outputs of the contract that this version does not write are refused by name.
fn check_output(path: &Path) -> anyhow::Result<()> {
    let name = path.file_name().map(|n| n.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
    let plain = name.strip_suffix(".gz").or(name.strip_suffix(".zst")).unwrap_or(&name);
    let refused = |what: &str| {
        let message = format!("{}: {what}", path.display());
        Err(Failure::usage(message, "write a .jsonl file (also .jsonl.gz or .jsonl.zst)").into())
    };
    if plain.ends_with(".jsonl") && !path.is_dir() {
        Ok(())
    } else if plain.ends_with(".parquet") {
        refused("parquet output is not supported yet")
    } else if path.is_dir() || !plain.contains('.') {
        refused("a folder for datasets.load_from_disk is not supported yet")
    } else {
        refused("the output's format is told by its name, and this is none that can be written")
    }
}

fn same_file(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

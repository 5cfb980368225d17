//! `suasion merge`: a model with an adapter added to its weights.

use crate::config::{Config, Init};
use crate::export;
use crate::failure::{Exit, Failure};
use crate::inputs::opened::Opened;
use crate::inputs::vocabulary::Vocabulary;
use crate::paths;
use crate::ui::Ui;
use clap::ValueEnum;
use std::path::PathBuf;
use suasion_data::Policy;
use suasion_data::report::format::thousands;
use suasion_engine::{Budget, WeightType};
use suasion_files::NewFolder;
use suasion_train::ModelFiles;

/// Flags of the command.
#[derive(clap::Args, Debug)]
pub struct MergeArgs {
    /// The base: a folder in the Hugging Face layout, or a hub id; without it, the one that the adapter names
    #[arg(short = 'M', long, value_name = "BASE", value_parser = paths::parser())]
    model: Option<PathBuf>,
    /// The adapter: a folder in PEFT's layout
    #[arg(long, value_name = "A", value_parser = paths::parser())]
    adapter: Option<PathBuf>,
    /// The folder for the merged model; it must not exist, or be empty
    #[arg(short, long, value_name = "OUT", value_parser = paths::parser())]
    output: PathBuf,
    /// The type that the weights are written in; without it, that of the base
    #[arg(long, value_enum, value_name = "TYPE")]
    dtype: Option<DtypeName>,
}

/// A type of weights by its name in PyTorch.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum DtypeName {
    Float32,
    Float16,
    Bfloat16,
}

/// Runs the command.
pub fn run(args: &MergeArgs, ui: &Ui) -> anyhow::Result<Exit> {
    let out = &args.output;
    if std::fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_some()) || out.is_file() {
        return Err(Failure::usage(
            format!("{}: there is something already", out.display()),
            "name a folder that does not exist: merge replaces nothing",
        )
        .into());
    }
    let opened = Opened::named(
        args.model.as_deref(),
        args.adapter.as_deref(),
        Init::Weights,
        &Vocabulary::default(),
        ui,
    )?;
    if opened.adapter.is_none() {
        return Err(Failure::usage(
            "no adapter is named",
            "give --adapter A, or with --model a folder that holds an adapter",
        )
        .into());
    }
    // The passes of the model are not used: the smallest arena will do.
    let budget = Budget { tokens: 1, targets: 1, train: false, recompute: false };
    let model = opened.start(ui, &Config::default()).build(budget)?;
    let kind = match args.dtype {
        None => model.weight_type(),
        Some(DtypeName::Float32) => WeightType::F32,
        Some(DtypeName::Float16) => WeightType::F16,
        Some(DtypeName::Bfloat16) => WeightType::BF16,
    };
    let folder = NewFolder::create(out)?;
    let untied = model.save_merged(folder.path(), kind)?;
    let mut files = ModelFiles::from_dir(&opened.base)?;
    // Tokenizer and templates are those that the adapter was trained with.
    for file in ModelFiles::from_dir(&opened.folder.path)?.files {
        files.push(&file.name, file.bytes);
    }
    let tied = opened.arch.head.tied && !untied;
    files.beside(kind, tied, opened.arch.vocab_size).write(folder.path())?;
    export::of_model(folder.path(), &opened.folder, &Policy::default(), None)?;
    folder.commit()?;
    ui.note(format_args!(
        "wrote {}: {} parameters in {}",
        out.display(),
        thousands(opened.arch.parameter_count()),
        kind.name()
    ));
    Ok(Exit::Done)
}

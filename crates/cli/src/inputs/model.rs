//! Model folders: found by path or hub id, and opened, without the weights.

use super::hub::{self, Access, Kind, Repo, ToDownload};
use crate::config::{Config, Init};
use crate::failure::{Exit, Failure};
use crate::paths;
use crate::ui::Ui;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;
use suasion_data::ModelFolder;
use suasion_data::template::RenderingWatch;
use suasion_data::tokens::{Changes, Tokenizer};
use suasion_engine::{AdapterFolder, Architecture};
use suasion_train::{ModelFiles, TEMPLATES};

/// Opens a folder, with changes of its tokenizer. A chat template that cannot be used is a warning: rows of plain text need none.
///
/// # Errors
/// If its tokenizer cannot be read, or the system refuses the thread that watches the template.
pub fn open(dir: &Path, changes: &Changes, ui: &Ui) -> anyhow::Result<ModelFolder> {
    let folder = read(dir, changes)?;
    if let Some(error) = &folder.template_error {
        ui.warn(format_args!("the chat template is not used: {error}"));
    }
    if let Some(template) = &folder.template {
        watch(template.watch())?;
    }
    Ok(folder)
}

/// As [`open`]: nothing is printed, and no thread watches the template.
///
/// # Errors
/// As [`open`].
pub fn read(dir: &Path, changes: &Changes) -> anyhow::Result<ModelFolder> {
    if !["config.json", "tokenizer.json"].iter().any(|name| dir.join(name).exists()) {
        return Err(Failure::run_time(
            "E-MODEL",
            format!(
                "{}: the folder has neither config.json nor tokenizer.json: it is not a model",
                dir.display()
            ),
            "name the folder in the Hugging Face layout that holds them",
        )
        .into());
    }
    Ok(ModelFolder::open_with(dir, changes)?)
}

/// Opens a folder with its architecture. With [`Init::Weights`], a separate head in the weights is used, with a
/// warning if config.json ties it.
///
/// # Errors
/// As [`open`]; where config.json describes no model that the engine has.
pub fn with_architecture(
    dir: &Path,
    init: Init,
    changes: &Changes,
    ui: &Ui,
) -> anyhow::Result<(ModelFolder, Architecture)> {
    let mut arch = Architecture::from_dir(dir)?;
    // What is wrong with the weights is reported where they are loaded: a resume needs none of these.
    if init == Init::Weights
        && let Ok((with_head, sentence)) = arch.clone().with_head_of(dir)
    {
        arch = with_head;
        if let Some(sentence) = sentence {
            ui.warn(format_args!("{sentence}"));
        }
    }
    Ok((open(dir, changes, ui)?, arch))
}

/// The tokenizer and the chat template of `dir` for the model that `base` is of.
///
/// # Errors
/// As [`open`].
pub fn beside(dir: &Path, base: &ModelFolder, changes: &Changes, ui: &Ui) -> anyhow::Result<ModelFolder> {
    let mut folder = open(dir, changes, ui)?;
    (folder.vocab_size, folder.positions) = (base.vocab_size, base.positions);
    Ok(folder)
}

/// The tokenizer of a folder, for commands that read and write text.
///
/// # Errors
/// If the folder has none.
pub fn need_tokenizer(folder: &ModelFolder) -> anyhow::Result<&Tokenizer> {
    folder.tokenizer.as_deref().ok_or_else(|| {
        Failure::run_time(
            "E-TOKENIZER",
            format!("{}: the folder has no tokenizer.json", folder.path.display()),
            "copy the tokenizer's files of the base model into it",
        )
        .into()
    })
}

/// Rendering a conversation takes microseconds; fuel ends most templates that take half a second.
const LONGEST_RENDERING: Duration = Duration::from_secs(5);

/// How often the watching thread looks in that time.
const LOOKS: u32 = 10;

/// Ends the process where a rendering of a template does not end and its fuel does not stop it.
fn watch(mut watch: RenderingWatch) -> std::io::Result<()> {
    suasion_data::start_thread(move || {
        // Looks are counted instead of seconds: the whole process may have been stopped in between.
        while watch.look() < LOOKS {
            std::thread::sleep(LONGEST_RENDERING / LOOKS);
            if watch.is_over() {
                return;
            }
        }
        let _ = writeln!(
            std::io::stderr(),
            "error[E-TEMPLATE]: the chat template has rendered one conversation for {} s: the template does not end\n\
             help: compare it with the template of the model's repository",
            LONGEST_RENDERING.as_secs()
        );
        std::process::exit(Exit::RunTime as i32);
    })
    .map(drop)
}

/// The folder of the model that a configuration names; with `weights`, its weights are there too.
///
/// # Errors
/// If it names none, and as [`resolve`].
pub fn named(config: &Config, weights: bool, ui: &Ui) -> anyhow::Result<PathBuf> {
    // What is rendered and tokenised with an adapter is so with its own tokenizer, where it has one.
    let with_tokenizer = |dir: &&PathBuf| AdapterFolder::is_one(dir) && dir.join("tokenizer.json").is_file();
    let adapter = [&config.adapter_name_or_path, &config.model_name_or_path].into_iter().flatten();
    if let Some(adapter) = adapter.clone().find(with_tokenizer).filter(|_| !weights) {
        return Ok(adapter.clone());
    }
    let model = config.model_name_or_path.iter().find(|model| !AdapterFolder::is_one(model));
    if let (None, Some(dir)) = (model, adapter.clone().find(|dir| AdapterFolder::is_one(dir))) {
        return base_of(&self::adapter(dir)?, ui);
    }
    match &config.model_name_or_path {
        Some(name) => resolve(name, weights, ui),
        None => {
            Err(Failure::usage("no model is named", "give --model M, or model_name_or_path in CONFIG").into())
        }
    }
}

/// Reads the settings of an adapter's folder.
///
/// # Errors
/// If it is none, and for settings that are not computed.
pub fn adapter(path: &Path) -> anyhow::Result<AdapterFolder> {
    if !AdapterFolder::is_one(path) {
        return Err(Failure::run_time(
            "E-MODEL",
            format!("{}: no adapter_config.json in it, so it is not an adapter", path.display()),
            "name the folder that PEFT's save_pretrained or `suasion train --use_peft` has written",
        )
        .into());
    }
    Ok(AdapterFolder::open(path)?)
}

/// The base that an adapter names: a folder as it is, or beside the adapter's, or a hub id.
///
/// # Errors
/// If it names none, or it is not found.
pub fn base_of(adapter: &AdapterFolder, ui: &Ui) -> anyhow::Result<PathBuf> {
    let shown = adapter.path.display();
    let Some(base) = &adapter.base else {
        return Err(Failure::usage(
            format!("{shown}: its adapter_config.json names no base_model_name_or_path"),
            "give the base with --model BASE",
        )
        .into());
    };
    // A folder of the name may be something else, as `..` always is.
    let (here, beside) = (PathBuf::from(base), adapter.path.join(base));
    let is_model = |dir: &Path| dir.join("config.json").is_file();
    let place = if !is_model(&here) && is_model(&beside) { beside } else { here };
    resolve(&place, true, ui).map_err(|error| {
        Failure::run_time(
            "E-MODEL",
            format!("{shown}: its base model {base} is not found: {error}"),
            "give the base with --model BASE",
        )
        .into()
    })
}

/// The folder of a model; with `weights`, its weights are there too.
///
/// # Errors
/// If it is neither a folder nor a hub id that is cached or can be downloaded; the message names the
/// places searched. [`ToDownload`] where it would have to be downloaded and `access` forbids that.
pub fn resolve<'a>(name: &Path, weights: bool, access: impl Into<Access<'a>>) -> anyhow::Result<PathBuf> {
    let access = access.into();
    if name.is_dir() {
        check_kinds(name)?;
        return Ok(name.to_path_buf());
    }
    if name.exists() {
        return Err(Failure::run_time(
            "E-MODEL",
            format!("{} is a file; a model is a folder", name.display()),
            "name the folder that holds config.json",
        )
        .into());
    }
    let absent = |help: String| {
        Failure::run_time("E-MODEL", format!("{}: no such folder", name.display()), help).into()
    };
    let repo = Repo::named(Kind::Model, name);
    if let (Some(near), None) = (paths::near(name), repo.as_ref().and_then(Repo::snapshot)) {
        return Err(absent(format!("did you mean {}?", near.display())));
    }
    let Some(repo) = repo else {
        return Err(absent(
            "name a folder in the Hugging Face layout (config.json, *.safetensors, tokenizer.json), or a hub id"
                .into(),
        ));
    };
    let snapshot = match repo.snapshot() {
        // Where files are missing from the snapshot, the code that needs them names them.
        Some(snapshot) if is_complete(&snapshot, weights) || !hub::downloads() => return Ok(snapshot),
        other => other,
    };
    let listing = repo.list(None, access);
    let fetched = listing.and_then(|l| repo.get(&l, &wanted(&l.names, weights), access.ui));
    match (fetched, snapshot) {
        (Ok(fetched), _) => Ok(fetched),
        (Err(error), Some(snapshot)) if !error.is::<ToDownload>() => {
            access.ui.warn(format_args!("{error}; going on with {}", snapshot.display()));
            Ok(snapshot)
        }
        (Err(error), _) => Err(error),
    }
}

/// Refuses a folder in which a device or a pipe has the name of a file of a model: reading it may not end.
fn check_kinds(dir: &Path) -> anyhow::Result<()> {
    let entries = std::fs::read_dir(dir).map_err(|e| suasion_data::Error::io(dir, e))?;
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let read = ModelFiles::NAMES.contains(&name.as_str())
            || is_safetensors(&name)
            || name == "model.safetensors.index.json";
        // A link counts as what it points to.
        let odd = || entry.path().metadata().is_ok_and(|meta| !meta.is_file() && !meta.is_dir());
        if read && odd() {
            return Err(Failure::run_time(
                "E-MODEL",
                format!("{}: a device or a pipe, not a file", entry.path().display()),
                "put a plain file there; a model's files are read more than once",
            )
            .into());
        }
    }
    Ok(())
}

/// True if a snapshot has the files that every model has; other tools may have downloaded only some of
/// them.
fn is_complete(snapshot: &Path, weights: bool) -> bool {
    let has = |name: &str| snapshot.join(name).exists();
    if !has("config.json") || !has("tokenizer.json") {
        return false;
    }
    let index = std::fs::read(snapshot.join("model.safetensors.index.json")).ok();
    match index.and_then(|bytes| serde_json::from_slice::<serde_json::Value>(&bytes).ok()) {
        _ if !weights => true,
        Some(index) => match index["weight_map"].as_object() {
            Some(map) => map.values().all(|file| file.as_str().is_some_and(has)),
            None => false,
        },
        None => std::fs::read_dir(snapshot).is_ok_and(|entries| {
            entries.flatten().any(|entry| is_safetensors(&entry.file_name().to_string_lossy()))
        }),
    }
}

fn is_safetensors(name: &str) -> bool {
    name.ends_with(".safetensors") && !name.contains('/')
}

/// The files of a repository to download. Some repositories hold their weights twice: transformers' `model*`
/// are preferred.
fn wanted(names: &[String], weights: bool) -> Vec<String> {
    let template = |name: &str| name.strip_suffix(".jinja").is_some_and(|name| name.starts_with(TEMPLATES));
    let wanted = |name: &&String| ModelFiles::NAMES.contains(&name.as_str()) || template(name);
    let mut wanted: Vec<String> = names.iter().filter(wanted).cloned().collect();
    if weights {
        let tensors: Vec<&String> = names.iter().filter(|name| is_safetensors(name)).collect();
        let named = tensors.iter().any(|name| name.starts_with("model"));
        wanted.extend(tensors.into_iter().filter(|name| !named || name.starts_with("model")).cloned());
        wanted.extend(names.iter().filter(|name| *name == "model.safetensors.index.json").cloned());
    }
    wanted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_needed_is_wanted() {
        let names = [
            ".gitattributes",
            "README.md",
            "additional_chat_templates/tool_use.jinja",
            "config.json",
            "consolidated.safetensors",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "onnx/model.safetensors",
            "pytorch_model.bin",
            "tokenizer.json",
        ]
        .map(String::from);
        let template = "additional_chat_templates/tool_use.jinja";
        assert_eq!(wanted(&names, false), [template, "config.json", "tokenizer.json"]);
        assert_eq!(
            wanted(&names, true),
            [
                template,
                "config.json",
                "tokenizer.json",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
            ]
        );
        assert_eq!(wanted(&names[..5], true), [template, "config.json", "consolidated.safetensors"]);
    }

    #[test]
    fn a_snapshot_is_complete_with_all_shards_of_its_index() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        let complete = |weights| is_complete(folder.path(), weights);
        write("config.json", "{}");
        assert!(!complete(false));
        write("tokenizer.json", "{}");
        assert!(complete(false) && !complete(true));
        write("model-1.safetensors", "");
        assert!(complete(true));
        let index = r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#;
        write("model.safetensors.index.json", index);
        assert!(complete(false) && !complete(true));
        write("model-2.safetensors", "");
        assert!(complete(true));
    }
}

//! The configuration: one typed tree, and one table from which reading, checking, printing and the list of keys come.
//!
//! Names are those of TRL's `SFTConfig` where it has one. A key is supported (it is a field of [`Config`]), known but
//! not supported ([`known`]: accepted at values that change nothing, refused by name otherwise), or unknown (refused
//! with the nearest name). Nothing is ignored in silence.

pub mod known;
pub mod value;

use crate::failure::Failure;
use serde_json::{Map, Value as Json};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use suasion_data::Section;
use suasion_data::policy::{
    Boundary, ContentSpecialTokens, Format, Objective, OnBadRow, Policy, Supervise, TruncationMode,
};
use suasion_data::template::is_reserved;
use suasion_train::{Scheduler, Settings, Strategy};
pub use value::Paths;
use value::{Value, choices};

/// How rows are put together into packs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PackingStrategy {
    /// Best-fit decreasing.
    Bfd,
}

choices!(PackingStrategy { "bfd" => PackingStrategy::Bfd });

/// Where a model's first weights come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Init {
    /// The model folder's `*.safetensors`.
    Weights,
    /// Drawn as transformers draws them for a new model.
    Random,
}

choices!(Init { "weights" => Init::Weights, "random" => Init::Random });
choices!(Strategy {
    "no" => Strategy::No,
    "steps" => Strategy::Steps,
    "epoch" => Strategy::Epoch,
    "best" => Strategy::Best,
});
choices!(Scheduler {
    "linear" => Scheduler::Linear,
    "cosine" => Scheduler::Cosine,
    "constant" => Scheduler::Constant,
    "constant_with_warmup" => Scheduler::ConstantWithWarmup,
});
choices!(Format {
    "auto" => Format::Auto,
    "input_full" => Format::InputFull,
    "prompt_completion" => Format::PromptCompletion,
    "tokenised" => Format::Tokenised,
    "messages" => Format::Messages,
    "sharegpt" => Format::Sharegpt,
    "alpaca" => Format::Alpaca,
    "segments" => Format::Segments,
    "preference" => Format::Preference,
} aliases { "tokenized" => "tokenised" });
choices!(Supervise {
    "all" => Supervise::All,
    "last" => Supervise::Last,
    "per-message" => Supervise::PerMessage,
} aliases { "per_message" => "per-message" });
choices!(Boundary { "split" => Boundary::Split, "joint" => Boundary::Joint });
choices!(TruncationMode {
    "keep_response" => TruncationMode::KeepResponse,
    "keep_start" => TruncationMode::KeepStart,
    "keep_end" => TruncationMode::KeepEnd,
    "drop" => TruncationMode::Drop,
    "error" => TruncationMode::Error,
});
choices!(OnBadRow { "error" => OnBadRow::Error, "skip" => OnBadRow::Skip });
choices!(ContentSpecialTokens {
    "special" => ContentSpecialTokens::Special,
    "text" => ContentSpecialTokens::Text,
});

/// One row of the table.
pub struct Key {
    /// The key's name.
    pub name: &'static str,
    /// One line of meaning.
    pub doc: &'static str,
    /// What is accepted, in words.
    pub expected: fn() -> String,
    /// Its value in a tree.
    pub get: fn(&Config) -> Json,
    set_json: fn(&mut Config, &Json) -> Result<(), String>,
    set_text: fn(&mut Config, &str) -> Result<(), String>,
    set_entry: fn(&mut Config, &str, &str) -> Option<Result<(), String>>,
}

/// The table: each line is a field of [`Config`], its default, its bounds and its documentation.
macro_rules! table {
    ($($(#[doc = $doc:literal])+ $name:ident: $type:ty = $default:expr $(, if $check:expr, $bounds:literal)?;)*) => {
        /// Every supported key, resolved.
        #[derive(Clone, Debug, PartialEq)]
        pub struct Config {
            $($(#[doc = $doc])+ pub $name: $type,)*
        }

        impl Default for Config {
            fn default() -> Config {
                Config { $($name: $default,)* }
            }
        }

        /// Every supported key, in the order in which it is documented.
        pub const KEYS: &[Key] = &[$(Key {
            name: stringify!($name),
            doc: concat!($($doc),+),
            expected: || {
                #[allow(unused_mut)]
                let mut words = <$type as Value>::expected();
                $(words.push_str(", "); words.push_str($bounds);)?
                words
            },
            get: |config| config.$name.to_json(),
            set_json: |config, json| {
                let value = <$type as Value>::from_json(json)$(.filter($check))?;
                config.$name = value.ok_or_else(|| shown(json))?;
                Ok(())
            },
            set_text: |config, text| {
                let value = <$type as Value>::from_text(text)$(.filter($check))?;
                config.$name = value.ok_or_else(|| format!("{text:?}"))?;
                Ok(())
            },
            set_entry: |config, entry, text| config.$name.set_entry(entry, text),
        },)*];
    };
}

table! {
    /// Folder of the model in the Hugging Face layout, or a hub id.
    model_name_or_path: Option<PathBuf> = None;
    /// Where the first weights come from: the folder, or random ones for its config.json.
    init: Init = Init::Weights;
    /// Rows to train on: a file, a glob, a folder of splits, a hub id, or a list of them.
    dataset_name: Option<Paths> = None;
    /// Name of the training rows where dataset_name is a folder.
    dataset_train_split: String = "train".into();
    /// Name of the evaluation rows where dataset_name is a folder (test, validation or valid where not set).
    dataset_test_split: Option<String> = None;
    /// Rows to evaluate on, named as those to train on.
    eval_dataset_name: Option<Paths> = None;
    /// Share of the training rows held out for evaluation where there is no evaluation file.
    eval_fraction: f64 = 0.0, if |v| (0.0..1.0).contains(v), "from 0 to below 1";
    /// Shape of the rows.
    format: Format = Format::Auto;
    /// What happens to a row that cannot become a sample.
    on_bad_row: OnBadRow = OnBadRow::Error;
    /// Learn from responses only; false learns from every token, prompts included.
    completion_only_loss: Option<bool> = Some(true);
    /// TRL's name for what holds here anyway: of a conversation, assistant turns are learned.
    assistant_only_loss: Option<bool> = None;
    /// Which assistant turns of a conversation are learned.
    supervise: Supervise = Supervise::All;
    /// The day that a chat template is told is today, so that it renders the same tomorrow.
    template_date: Option<String> = None, if |v| v.as_deref().is_none_or(is_date), "as YYYY-MM-DD";
    /// Variables for the chat template, by name.
    template_kwargs: BTreeMap<String, Json> = BTreeMap::new();
    /// How prompt and response meet in token space.
    boundary: Boundary = Boundary::Split;
    /// Longest row in tokens; null for no limit.
    max_length: Option<usize> = Some(1024), if |v| v.is_none_or(|n| n >= 2), "at least 2";
    /// What happens to a longer row.
    truncation_mode: TruncationMode = TruncationMode::KeepResponse;
    /// Put rows together into packs of at most max_length tokens; batches then count packs.
    packing: bool = false;
    /// How rows are put together.
    packing_strategy: PackingStrategy = PackingStrategy::Bfd, if |_| true, "which cuts no row (TRL's wrapped and bfd_split cut rows in two)";
    /// In a pack, compute a prompt that several rows have once.
    share_prefix: bool = false;
    /// Append the EOS to a plain completion that does not end in it.
    append_eos: bool = true;
    /// Whether content can produce structural tokens.
    content_special_tokens: ContentSpecialTokens = ContentSpecialTokens::Special;
    /// Loss weight of prompt tokens.
    prompt_loss_weight: f64 = 0.0, if |v| *v >= 0.0, "at least 0";
    /// Loss weight per prompt section (system, context, task, user, tool, other).
    loss_weights: BTreeMap<String, f64> = BTreeMap::new();
    /// Marker text per section (SYSTEM, CONTEXT, TASK, RESPONSE).
    section_markers: BTreeMap<String, String> = Policy::default().section_markers;
    /// Stop tokens beyond eos_token and generation_config.json.
    stop_tokens: Vec<String> = Vec::new();
    /// Draw each epoch's order; false takes the rows in file order, over and over.
    shuffle_dataset: bool = true;

    /// Where the run is left.
    output_dir: PathBuf = PathBuf::from("trainer_output");
    /// Write into an output_dir that is not empty.
    overwrite_output_dir: bool = false;
    /// Rows per micro-batch, or packs of them.
    per_device_train_batch_size: usize = 8, if |v| *v >= 1, "at least 1";
    /// Rows per evaluation batch.
    per_device_eval_batch_size: usize = 8, if |v| *v >= 1, "at least 1";
    /// Micro-batches per step, normalised over all their targets together.
    gradient_accumulation_steps: usize = 1, if |v| *v >= 1, "at least 1";
    /// Keep each layer's input only and recompute the rest.
    gradient_checkpointing: bool = false;
    /// Highest learning rate.
    learning_rate: f64 = 2e-5, if |v| *v >= 0.0, "at least 0";
    /// AdamW's decay; biases and norms are not decayed.
    weight_decay: f64 = 0.0, if |v| *v >= 0.0, "at least 0";
    /// AdamW's first decay rate.
    adam_beta1: f64 = 0.9, if |v| (0.0..1.0).contains(v), "from 0 to below 1";
    /// AdamW's second decay rate.
    adam_beta2: f64 = 0.999, if |v| (0.0..1.0).contains(v), "from 0 to below 1";
    /// AdamW's epsilon.
    adam_epsilon: f64 = 1e-8, if |v| *v >= 0.0, "at least 0";
    /// Gradients are clipped to this norm; 0 does not clip.
    max_grad_norm: f64 = 1.0, if |v| *v >= 0.0, "at least 0";
    /// Passes over the training rows.
    num_train_epochs: f64 = 3.0, if |v| *v > 0.0, "more than 0";
    /// Steps, over num_train_epochs; -1 counts epochs.
    max_steps: i64 = -1, if |v| *v >= 1 || *v == -1, "at least 1, or -1";
    /// How the learning rate moves.
    lr_scheduler_type: Scheduler = Scheduler::Linear;
    /// Share of the steps that warm up, where warmup_steps is 0.
    warmup_ratio: f64 = 0.0, if |v| (0.0..=1.0).contains(v), "from 0 to 1";
    /// Steps of warm-up; below 1 a share of the steps.
    warmup_steps: f64 = 0.0, if |v| *v >= 0.0, "at least 0";
    /// Steps between two lines of metrics.
    logging_steps: u64 = 1, if |v| *v >= 1, "at least 1";
    /// When to evaluate, besides before and after training.
    eval_strategy: Strategy = Strategy::No;
    /// Steps between two evaluations; logging_steps where null.
    eval_steps: Option<u64> = None, if |v| v.is_none_or(|n| n >= 1), "at least 1";
    /// When to write checkpoints.
    save_strategy: Strategy = Strategy::Steps;
    /// Steps between two checkpoints.
    save_steps: u64 = 500, if |v| *v >= 1, "at least 1";
    /// Checkpoints kept; null keeps all.
    save_total_limit: Option<usize> = None, if |v| v.is_none_or(|n| n >= 1), "at least 1";
    /// End with the checkpoint of the lowest evaluation loss.
    load_best_model_at_end: bool = false;
    /// Seed of weights and sampling.
    seed: u64 = 42;
    /// Seed of the rows' order; seed where null.
    data_seed: Option<u64> = None;
}

/// A day of the calendar as YYYY-MM-DD.
fn is_date(text: &str) -> bool {
    let parts: Vec<&str> = text.split('-').collect();
    let number = |part: &str, digits: usize| {
        part.parse::<u32>().ok().filter(|_| part.len() == digits && part.bytes().all(|b| b.is_ascii_digit()))
    };
    let [year, month, day] = parts.as_slice() else { return false };
    let (Some(year), Some(month), Some(day)) = (number(year, 4), number(month, 2), number(day, 2)) else {
        return false;
    };
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let days = match month {
        2 => 28 + u32::from(leap),
        4 | 6 | 9 | 11 => 30,
        1..=12 => 31,
        _ => 0,
    };
    year > 0 && (1..=days).contains(&day)
}

/// A value in an error message: short, on one line.
fn shown(json: &Json) -> String {
    let text = json.to_string();
    if text.chars().count() > 60 { text.chars().take(57).chain("...".chars()).collect() } else { text }
}

/// A tree, and where each value that is not a default came from.
#[derive(Clone, Debug, Default)]
pub struct Loaded {
    /// The resolved tree.
    pub config: Config,
    /// Key to place: `run.yaml:3`, `--set`, `--data`.
    pub places: BTreeMap<&'static str, String>,
    /// What the user should know: keys that were accepted and change nothing.
    pub notes: Vec<String>,
}

impl Loaded {
    /// The tree of a CONFIG (if any) under `--set` assignments; flags are applied by the caller, over both.
    pub fn new(file: Option<&Path>, assignments: &[String]) -> anyhow::Result<Loaded> {
        let mut loaded = Loaded::default();
        if let Some(path) = file {
            loaded.read(path)?;
        }
        for assignment in assignments {
            loaded.assign(assignment)?;
        }
        Ok(loaded)
    }

    /// `--set` assignments over a tree that the program itself brings (the demo's).
    pub fn over(config: Config, assignments: &[String]) -> anyhow::Result<Loaded> {
        let mut loaded = Loaded { config, ..Loaded::default() };
        for assignment in assignments {
            loaded.assign(assignment)?;
        }
        loaded.check()?;
        Ok(loaded)
    }

    /// Takes every key of a YAML or TOML file.
    fn read(&mut self, path: &Path) -> anyhow::Result<()> {
        let shown = path.display();
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("").to_ascii_lowercase();
        if !matches!(extension.as_str(), "yaml" | "yml" | "toml") {
            return Err(Failure::usage(
                format!("{shown}: a CONFIG is a .yaml, .yml or .toml file"),
                "rows are given with --data, a model with --model, single keys with --set key=value",
            )
            .into());
        }
        let text = std::fs::read_to_string(path).map_err(|e| {
            Failure::config(format!("{shown}: {e}"), "name a configuration file that can be read")
        })?;
        let tree: Json = if extension == "toml" {
            toml::from_str(&text).map_err(|e| {
                let line =
                    e.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
                Failure::config(format!("{shown}:{line}: {}", e.message()), "mend the TOML at this place")
            })?
        } else {
            serde_saphyr::from_str(&text).map_err(|e| {
                let line = e.location().map_or(1, |at| at.line());
                let message = e.without_snippet().to_string();
                Failure::config(format!("{shown}:{line}: {message}"), "mend the YAML at this place")
            })?
        };
        let map = match tree {
            Json::Object(map) => map,
            Json::Null => Map::new(),
            other => {
                return Err(Failure::config(
                    format!("{shown}: expected a mapping of keys to values, found {}", self::shown(&other)),
                    "write one `key: value` a line",
                )
                .into());
            }
        };
        for (name, value) in &map {
            let place = match line_of(&text, name) {
                Some(line) => format!("{shown}:{line}"),
                None => shown.to_string(),
            };
            self.take(name, value, &place)?;
        }
        Ok(())
    }

    /// One key of a file.
    fn take(&mut self, name: &str, value: &Json, place: &str) -> anyhow::Result<()> {
        if let (Some(key), Json::Object(entries)) = (find(name), value)
            && key.name != "template_kwargs"
        {
            // Entry by entry: a file that renames one marker keeps the others.
            for (entry, value) in entries {
                let text = match value {
                    Json::String(text) => text.clone(),
                    other => other.to_string(),
                };
                self.entry(key, entry, &text, place)?;
            }
            return Ok(());
        }
        if let Some(key) = find(name) {
            return match (key.set_json)(&mut self.config, value) {
                Ok(()) => self.placed(key, place),
                Err(found) => Err(wrong_value(key.name, &(key.expected)(), &found, place)),
            };
        }
        match name.split_once('.') {
            Some((head, entry)) if find(head).is_some() => {
                let text = value.as_str().map_or_else(|| value.to_string(), str::to_string);
                self.entry(find(head).expect("just found"), entry, &text, place)
            }
            _ => self.unsupported(name, value, place),
        }
    }

    /// `--set key=value`.
    pub fn assign(&mut self, assignment: &str) -> anyhow::Result<()> {
        let Some((name, text)) = assignment.split_once('=') else {
            return Err(Failure::usage(
                format!("--set {assignment}: expected key=value"),
                "for example --set learning_rate=1e-4",
            )
            .into());
        };
        let place = format!("--set {assignment}");
        self.put(name.trim(), text, &place)
    }

    /// One key from text: an assignment or a flag, which `place` names in errors.
    pub fn put(&mut self, name: &str, text: &str, place: &str) -> anyhow::Result<()> {
        if let Some(key) = find(name) {
            return match (key.set_text)(&mut self.config, text) {
                Ok(()) => self.placed(key, place),
                Err(found) => Err(wrong_value(key.name, &(key.expected)(), &found, place)),
            };
        }
        if let Some((head, entry)) = name.split_once('.')
            && let Some(key) = find(head)
        {
            return self.entry(key, entry, text, place);
        }
        let value = serde_saphyr::from_str(text).unwrap_or_else(|_| Json::from(text));
        self.unsupported(name, &value, place)
    }

    fn entry(&mut self, key: &'static Key, entry: &str, text: &str, place: &str) -> anyhow::Result<()> {
        let allowed: Vec<&str> = match key.name {
            "loss_weights" => Section::ALL.iter().map(|s| s.name()).collect(),
            "section_markers" => vec!["SYSTEM", "CONTEXT", "TASK", "RESPONSE"],
            _ => Vec::new(),
        };
        if !allowed.is_empty() && !allowed.contains(&entry) {
            let message = format!("{place}: {} has no {entry:?}", key.name);
            return Err(Failure::config(message, format!("its names are {}", allowed.join(", "))).into());
        }
        match (key.set_entry)(&mut self.config, entry, text) {
            Some(Ok(())) => self.placed(key, place),
            Some(Err(expected)) => {
                Err(wrong_value(&format!("{}.{entry}", key.name), &expected, &format!("{text:?}"), place))
            }
            None => Err(wrong_value(key.name, &(key.expected)(), "a mapping", place)),
        }
    }

    fn placed(&mut self, key: &'static Key, place: &str) -> anyhow::Result<()> {
        self.places.insert(key.name, place.to_string());
        if key.name == "assistant_only_loss" && self.config.assistant_only_loss == Some(false) {
            self.notes.push(format!(
                "{place}: assistant_only_loss=false changes nothing here: every token is learned with completion_only_loss=false"
            ));
        }
        Ok(())
    }

    /// A key that is no field: inert, refused by name, or unknown.
    fn unsupported(&mut self, name: &str, value: &Json, place: &str) -> anyhow::Result<()> {
        let head = name.split('.').next().unwrap_or(name);
        let Some(key) = known::find(head) else {
            let help = match nearest(name) {
                Some(near) => format!("did you mean {near:?}? `suasion check` lists every key"),
                None => "`suasion check` lists every key".to_string(),
            };
            return Err(Failure::config(format!("{place}: unknown key {name:?}"), help).into());
        };
        if head == name && key.is_inert(value) {
            if let known::Inert::Always = key.inert {
                self.notes.push(format!("{place}: {name} changes nothing here: {}", key.why));
            }
            return Ok(());
        }
        let message = format!("{place}: {name} is not supported: {}", key.why);
        let help = match key.inert_words() {
            Some(words) => format!("leave it out, or set it to {words}"),
            None => "leave it out".to_string(),
        };
        Err(Failure::config(message, help).into())
    }

    /// What only the whole tree can tell.
    pub fn check(&self) -> anyhow::Result<()> {
        let config = &self.config;
        if config.eval_fraction > 0.0 && config.eval_dataset_name.is_some() {
            return Err(Failure::config(
                "eval_fraction and eval_dataset_name both say what to evaluate on",
                "keep one of them",
            )
            .into());
        }
        if let Some(name) = config.template_kwargs.keys().find(|name| is_reserved(name)) {
            return Err(Failure::config(
                format!("template_kwargs.{name} is no variable of the template's own"),
                "leave it out: messages and tools come from the rows, special tokens from the tokenizer",
            )
            .into());
        }
        let weights = config.loss_weights.iter().map(|(section, weight)| (section.as_str(), *weight));
        for (name, weight) in weights.chain([("prompt_loss_weight", config.prompt_loss_weight)]) {
            if !(0.0..=f64::from(f32::MAX)).contains(&weight) {
                return Err(Failure::config(
                    format!("the loss weight of {name} is {weight}"),
                    "use a finite number of at least 0: a negative one would unlearn",
                )
                .into());
            }
        }
        if config.share_prefix && !config.packing {
            return Err(Failure::config(
                "share_prefix=true without packing=true: rows share a prompt within a pack",
                "set packing=true, or leave share_prefix out",
            )
            .into());
        }
        if config.packing && config.max_length.is_none() {
            return Err(Failure::config(
                "packing=true with max_length=null: a pack needs a size",
                "set max_length",
            )
            .into());
        }
        if config.assistant_only_loss == Some(true) && config.completion_only_loss == Some(false) {
            return Err(Failure::config(
                "assistant_only_loss=true and completion_only_loss=false contradict each other",
                "leave completion_only_loss out: prompts are learned only where it is false",
            )
            .into());
        }
        Ok(())
    }
}

impl Config {
    /// The choices that decide labels.
    pub fn policy(&self) -> Policy {
        Policy {
            format: self.format,
            objective: if self.completion_only_loss == Some(false) {
                Objective::AllTokens
            } else {
                Objective::ResponseOnly
            },
            boundary: self.boundary,
            truncation_mode: self.truncation_mode,
            max_length: self.max_length,
            append_eos: self.append_eos,
            on_bad_row: self.on_bad_row,
            content_special_tokens: self.content_special_tokens,
            prompt_loss_weight: self.prompt_loss_weight as f32,
            loss_weights: self.loss_weights.iter().map(|(name, w)| (name.clone(), *w as f32)).collect(),
            // An empty marker takes the section out.
            section_markers: self
                .section_markers
                .iter()
                .filter(|(_, marker)| !marker.is_empty())
                .map(|(name, marker)| (name.clone(), marker.clone()))
                .collect(),
            stop_tokens: self.stop_tokens.clone(),
            supervise: self.supervise,
            template_date: self.template_date.clone(),
            template_kwargs: self.template_kwargs.clone(),
            packing: self.packing,
            share_prefix: self.share_prefix,
        }
    }

    /// What the training loop is told. The field names are the keys' names.
    pub fn settings(&self) -> Settings {
        Settings {
            per_device_train_batch_size: self.per_device_train_batch_size,
            per_device_eval_batch_size: self.per_device_eval_batch_size,
            gradient_accumulation_steps: self.gradient_accumulation_steps,
            learning_rate: self.learning_rate,
            weight_decay: self.weight_decay,
            decay_all: false,
            adam_beta1: self.adam_beta1,
            adam_beta2: self.adam_beta2,
            adam_epsilon: self.adam_epsilon,
            max_grad_norm: self.max_grad_norm,
            num_train_epochs: self.num_train_epochs,
            // -1 is the Trainer's way to say "by epochs".
            max_steps: u64::try_from(self.max_steps).ok(),
            lr_scheduler_type: self.lr_scheduler_type,
            warmup_ratio: self.warmup_ratio,
            warmup_steps: self.warmup_steps,
            logging_steps: self.logging_steps,
            eval_strategy: self.eval_strategy,
            eval_steps: self.eval_steps,
            save_strategy: self.save_strategy,
            save_steps: self.save_steps,
            save_total_limit: self.save_total_limit,
            load_best_model_at_end: self.load_best_model_at_end,
            seed: self.seed,
            data_seed: self.data_seed,
            shuffle_dataset: self.shuffle_dataset,
            gradient_checkpointing: self.gradient_checkpointing,
        }
    }

    /// The tree as YAML that reads back to the same tree.
    pub fn to_yaml(&self) -> String {
        let mut yaml = String::new();
        for key in KEYS {
            // JSON is YAML's flow style.
            let _ = writeln!(yaml, "{}: {}", key.name, (key.get)(self));
        }
        yaml
    }

    /// The tree as JSON, in the table's order.
    pub fn to_json(&self) -> Json {
        Json::Object(KEYS.iter().map(|key| (key.name.to_string(), (key.get)(self))).collect())
    }

    /// Keys whose value is not the default, in the table's order.
    pub fn changed(&self) -> Vec<(&'static str, Json)> {
        let default = Config::default();
        KEYS.iter()
            .filter(|key| (key.get)(self) != (key.get)(&default))
            .map(|key| (key.name, (key.get)(self)))
            .collect()
    }
}

fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

/// The supported or known name that a typo most likely meant.
fn nearest(name: &str) -> Option<&'static str> {
    let lower = name.to_ascii_lowercase().replace('-', "_");
    KEYS.iter()
        .map(|key| key.name)
        .chain(known::KNOWN.iter().map(|key| key.name))
        .map(|candidate| (strsim::normalized_damerau_levenshtein(&lower, candidate), candidate))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .filter(|(likeness, _)| *likeness >= 0.5)
        .map(|(_, candidate)| candidate)
}

fn wrong_value(name: &str, expected: &str, found: &str, place: &str) -> anyhow::Error {
    Failure::config(format!("{place}: {name}: expected {expected}; found {found}"), format!("mend {name}"))
        .into()
}

/// The 1-based line on which a top-level key stands; parsers of trees do not say.
fn line_of(text: &str, name: &str) -> Option<usize> {
    let starts = |line: &str| {
        let line = line.trim_start().trim_start_matches(['"', '\'']);
        let rest = line.strip_prefix(name)?;
        let rest = rest.trim_start_matches(['"', '\'']).trim_start();
        // A TOML table header or a dotted key of the same name counts as its place.
        let inside_header = text.contains(&format!("[{name}]"));
        (rest.starts_with([':', '=', '.']) || (inside_header && rest.starts_with(']'))).then_some(())
    };
    text.lines()
        .position(|line| starts(line).is_some() || line.trim() == format!("[{name}]"))
        .map(|index| index + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(assignments: &[&str]) -> Result<Config, String> {
        let owned: Vec<String> = assignments.iter().map(|s| s.to_string()).collect();
        let loaded = Loaded::new(None, &owned).map_err(|e| {
            let failure = e.downcast_ref::<Failure>().expect("a failure");
            assert_eq!(failure.exit, crate::failure::Exit::Usage);
            format!("{} | {}", failure.message, failure.help.as_deref().unwrap_or(""))
        })?;
        Ok(loaded.config)
    }

    #[test]
    fn assignments_reach_typed_fields() {
        let config = set(&[
            "learning_rate=1e-3",
            "max_length=null",
            "loss_weights.system=0.1",
            "section_markers.TASK=[ASK]",
            "eval_strategy=no",
            "stop_tokens=[<|a|>, '<|b|>']",
            "completion_only_loss=False",
        ])
        .unwrap();
        assert_eq!(config.learning_rate, 1e-3);
        assert_eq!(config.max_length, None);
        assert_eq!(config.loss_weights["system"], 0.1);
        assert_eq!(config.section_markers["TASK"], "[ASK]");
        assert_eq!(config.section_markers["SYSTEM"], "[SYSTEM]");
        assert_eq!(config.stop_tokens, ["<|a|>", "<|b|>"]);
        assert_eq!(config.policy().objective, Objective::AllTokens);
    }

    #[test]
    fn typos_name_the_nearest_key() {
        let error = set(&["learning_rat=1"]).unwrap_err();
        assert!(error.contains("unknown key \"learning_rat\""), "{error}");
        assert!(error.contains("did you mean \"learning_rate\""), "{error}");
        assert!(set(&["zzzz=1"]).unwrap_err().contains("lists every key"));
    }

    #[test]
    fn wrong_values_list_what_is_accepted() {
        let error = set(&["truncation_mode=keep_middle"]).unwrap_err();
        assert!(error.contains("keep_response, keep_start, keep_end, drop, error"), "{error}");
        assert!(set(&["per_device_train_batch_size=0"]).unwrap_err().contains("at least 1"));
        assert!(set(&["adam_beta1=1"]).unwrap_err().contains("below 1"));
        assert!(set(&["loss_weights.sytem=1"]).unwrap_err().contains("system, context"));
        assert!(set(&["seed.x=1"]).unwrap_err().contains("expected"));
    }

    #[test]
    fn known_keys_are_refused_by_name_and_accepted_where_inert() {
        assert!(set(&["packing=false", "bf16=false", "use_peft=false", "report_to=none"]).is_ok());
        for key in ["bf16=true", "use_peft=true", "report_to=wandb", "neftune_noise_alpha=5"] {
            let error = set(&[key]).unwrap_err();
            let name = key.split('=').next().unwrap();
            assert!(error.contains(&format!("{name} is not supported")), "{error}");
        }
        assert!(set(&["chat_template_path=x.jinja"]).unwrap_err().contains("chat_template.jinja"));
    }

    #[test]
    fn conversations_have_their_keys() {
        let config = set(&[
            "format=sharegpt",
            "supervise=per-message",
            "template_date=2024-02-29",
            "template_kwargs.enable_thinking=false",
            "template_kwargs.persona=a pirate",
            "assistant_only_loss=true",
        ])
        .unwrap();
        let policy = config.policy();
        assert_eq!((policy.format, policy.supervise), (Format::Sharegpt, Supervise::PerMessage));
        assert_eq!(policy.template_date.as_deref(), Some("2024-02-29"));
        assert_eq!(policy.template_kwargs["enable_thinking"], false);
        assert_eq!(policy.template_kwargs["persona"], "a pirate");
        for (name, format) in Format::NAMES {
            assert_eq!(set(&[&format!("format={name}")]).unwrap().format, format);
        }
        for date in ["2024-2-29", "2023-02-29", "2024-13-01", "yesterday", "2024-00-10"] {
            assert!(set(&[&format!("template_date={date}")]).unwrap_err().contains("YYYY-MM-DD"), "{date}");
        }
        assert!(set(&["supervise=first"]).unwrap_err().contains("all, last, per-message"));
        let both =
            Loaded::new(None, &["assistant_only_loss=true".into(), "completion_only_loss=false".into()]);
        assert!(both.unwrap().check().is_err());
        let off = Loaded::new(None, &["assistant_only_loss=false".into()]).unwrap();
        assert_eq!(off.notes.len(), 1);
    }

    #[test]
    fn packs_have_their_keys() {
        let config = set(&["packing=true", "packing_strategy=bfd", "share_prefix=true"]).unwrap();
        assert!(config.policy().packing && config.policy().share_prefix);
        for strategy in ["wrapped", "bfd_split"] {
            let error = set(&[&format!("packing_strategy={strategy}")]).unwrap_err();
            assert!(error.contains("expected one of: bfd, which cuts no row (TRL's wrapped"), "{error}");
            assert!(error.contains(&format!("found {strategy:?}")), "{error}");
        }
        let check = |keys: &[&str]| {
            let keys: Vec<String> = keys.iter().map(|key| key.to_string()).collect();
            Loaded::new(None, &keys).unwrap().check()
        };
        assert!(check(&["packing=true", "share_prefix=true"]).is_ok());
        assert!(check(&["share_prefix=true"]).unwrap_err().to_string().contains("without packing"));
        assert!(
            check(&["packing=true", "max_length=null"]).unwrap_err().to_string().contains("needs a size")
        );
        let noted = Loaded::new(None, &["eval_packing=true".into()]).unwrap().notes;
        assert!(noted[0].contains("eval_packing changes nothing"), "{noted:?}");
    }

    #[test]
    fn names_are_unique_and_documented() {
        let mut names: Vec<_> =
            KEYS.iter().map(|k| k.name).chain(known::KNOWN.iter().map(|k| k.name)).collect();
        names.sort_unstable();
        let before = names.len();
        names.dedup();
        assert_eq!(names.len(), before);
        assert!(KEYS.iter().all(|key| !key.doc.is_empty() && !(key.expected)().is_empty()));
    }

    #[test]
    fn yaml_reads_back_to_the_same_tree() {
        let config = set(&[
            "max_length=None",
            "loss_weights.task=0.3",
            "output_dir=a: b",
            "seed=18446744073709551615",
            "template_kwargs.names=[a, '1']",
            "template_date=2025-01-15",
        ])
        .unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("saved.yaml");
        std::fs::write(&path, config.to_yaml()).unwrap();
        assert_eq!(Loaded::new(Some(&path), &[]).unwrap().config, config);
    }

    #[test]
    fn files_name_the_line_and_yield_to_assignments() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.yaml");
        std::fs::write(&path, "seed: 7\nlearning_rate: 1e-4\nmax_lenght: 8\n").unwrap();
        let error = Loaded::new(Some(&path), &[]).unwrap_err();
        assert!(error.to_string().contains("run.yaml:3: unknown key \"max_lenght\""), "{error}");

        std::fs::write(&path, "seed: 7\nsection_markers:\n  TASK: \"[ASK]\"\n").unwrap();
        let loaded = Loaded::new(Some(&path), &["seed=8".into()]).unwrap();
        assert_eq!((loaded.config.seed, loaded.config.section_markers["TASK"].as_str()), (8, "[ASK]"));
        assert_eq!(loaded.config.section_markers.len(), 4);

        let toml = folder.path().join("run.toml");
        std::fs::write(&toml, "seed = 7\nmax_length = 16\n[loss_weights]\nsystem = 0.5\n").unwrap();
        let loaded = Loaded::new(Some(&toml), &[]).unwrap();
        assert_eq!((loaded.config.max_length, loaded.config.loss_weights["system"]), (Some(16), 0.5));

        std::fs::write(&toml, "seed = \n").unwrap();
        let error = Loaded::new(Some(&toml), &[]).unwrap_err();
        assert!(error.to_string().contains("run.toml:1:"), "{error}");
    }
}

//! The table of keys: type, default, bounds and meaning of each in one line.

use super::choices::{Init, PackingStrategy};
use super::value::{Paths, Value};
use serde_json::Value as Json;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use suasion_data::policy::{
    Boundary, ContentSpecialTokens, Format, OnBadRow, Policy, Supervise, TruncationMode,
};
use suasion_train::{Scheduler, Strategy};

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
    /// Sets it to a parsed value; the error shows the value.
    pub set_json: fn(&mut Config, &Json) -> Result<(), String>,
    /// Sets it to what stands after `key=`; the error shows the text.
    pub set_text: fn(&mut Config, &str) -> Result<(), String>,
    /// Sets one entry of a mapping; `None` where the key is not one. The error says what is expected.
    pub set_entry: fn(&mut Config, &str, &str) -> Option<Result<(), String>>,
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
pub fn shown(json: &Json) -> String {
    let text = json.to_string();
    if text.chars().count() > 60 { text.chars().take(57).chain("...".chars()).collect() } else { text }
}

impl Config {
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

/// A key by its name.
pub fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

//! The table of keys: type, default, bounds and meaning of each in one line.

use super::bounds::Bounds;
use super::choices::{Codes, ComputeDtype, Init, LoraInitName, MatmulPrecision, PackingStrategy, Reports};
use super::device::DeviceName;
use super::value::{Paths, Value};
use indexmap::IndexMap;
use serde_json::Value as Json;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use suasion_data::{
    Boundary, ContentSpecialTokens, Format, Objective, OnBadRow, Policy, Section, Supervise, TruncationMode,
};
use suasion_train::settings::Range;
use suasion_train::{Interval, OnSaveError, Optim, ParamGroup, Patterns, Scheduler, Settings, Strategy};

/// What a key concerns: a heading of the documentation, and what decides which commands take the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// The model and its weights.
    Model,
    /// A low-rank adapter.
    Adapter,
    /// Which rows are read, and how.
    Rows,
    /// Which tokens a row has, and which of them are learned.
    Labels,
    /// The training loop.
    Training,
    /// Evaluation during training, and its batches.
    Evaluation,
    /// What a run writes, and when.
    Output,
    /// What is random.
    Seeds,
}

/// One row of the table.
pub struct Key {
    /// The key's name.
    pub name: &'static str,
    /// What it concerns.
    pub group: Group,
    /// One line of meaning.
    pub doc: &'static str,
    /// A value that may be given, as in a YAML file.
    pub example: &'static str,
    /// What is accepted, as a phrase.
    pub expected: fn() -> String,
    /// A JSON Schema of its values.
    pub schema: fn() -> Json,
    /// Its value in a tree.
    pub get: fn(&Config) -> Json,
    /// Sets it to a parsed value; the error is the value as text.
    pub set_json: fn(&mut Config, &Json) -> Result<(), String>,
    /// Sets it to the text after `key=`; the error is the text.
    pub set_text: fn(&mut Config, &str) -> Result<(), String>,
    /// Sets one entry of a mapping; `None` if the key is not a mapping. The error is what is expected.
    pub set_entry: fn(&mut Config, &str, &str) -> Option<Result<(), String>>,
}

/// The table: each line is a key with its type, its bounds (`in`), an example (`eg`) and its documentation. A
/// key with a default (`=`) is a field of [`Config`]; one with a place (`=>`) is a field of a library's own
/// settings. The library has its type and default, and the training loop the bounds of its settings.
macro_rules! table {
    ($($group:ident: $($(#[doc = $doc:literal])+ $name:ident: $type:ty $(= $default:expr)? $(=> $($place:ident).+)?
        $(, in $bounds:expr)?, eg $example:literal;)*)*) => {
        /// Every supported key, resolved.
        #[derive(Clone, Debug, PartialEq)]
        pub struct Config {
            $($($(pub $name: own!($type, $default),)?)*)*
            /// The keys that decide labels, as they were written ([`Config::policy`]).
            pub data: Policy,
            /// The keys of the training loop ([`Config::settings`]).
            pub train: Settings,
        }

        impl Default for Config {
            fn default() -> Config {
                Config { $($($($name: $default,)?)*)* data: Policy::default(), train: Settings::default() }
            }
        }

        /// Every supported key, in the order in which it is documented.
        pub const KEYS: &[Key] = &[$($(Key {
            name: stringify!($name),
            group: Group::$group,
            doc: concat!($($doc),+),
            example: $example,
            expected: || bounds!($name $(, $bounds)?).phrase(<$type as Value>::expected()),
            schema: || bounds!($name $(, $bounds)?).schema(<$type as Value>::schema()),
            get: |config| place!(config, $name $(, $($place).+)?).to_json(),
            set_json: |config, json| {
                let value = <$type as Value>::from_json(json).filter(|value| bounds!($name $(, $bounds)?).holds(&value.to_json()));
                let place: &mut $type = &mut place!(config, $name $(, $($place).+)?);
                *place = value.ok_or_else(|| shown(json))?;
                Ok(())
            },
            set_text: |config, text| {
                let value = <$type as Value>::from_text(text).filter(|value| bounds!($name $(, $bounds)?).holds(&value.to_json()));
                let place: &mut $type = &mut place!(config, $name $(, $($place).+)?);
                *place = value.ok_or_else(|| format!("{text:?}"))?;
                Ok(())
            },
            set_entry: |config, entry, text| place!(config, $name $(, $($place).+)?).set_entry(entry, text),
        },)*)*];
    };
}

/// The bounds of a key: the table's own, or those of the training loop.
macro_rules! bounds {
    ($name:ident) => {
        Bounds::Setting(stringify!($name))
    };
    ($name:ident, $bounds:expr) => {
        $bounds
    };
}

/// The type of a field of [`Config`]; naming the default limits the repetition to keys that have one.
macro_rules! own {
    ($type:ty, $default:expr) => {
        $type
    };
}

/// Where a key's value is.
macro_rules! place {
    ($config:ident, $name:ident) => { $config.$name };
    ($config:ident, $name:ident, $($place:ident).+) => { $config.$($place).+ };
}

table! {
    Model:
    /// Folder of the model in the Hugging Face layout, or a hub id.
    model_name_or_path: Option<PathBuf> = None, eg "models/Qwen3-0.6B";
    /// Initial weights: those of the model's folder, or random ones for its config.json, whose dtype the final model has.
    init: Init = Init::Weights, eg "random";
    /// Adapter over the model: a folder in PEFT's layout. train continues it, everything else applies it.
    adapter_name_or_path: Option<PathBuf> = None, eg "runs/adapter";
    /// Chat template: a file in Jinja; or another model's folder or hub id, of which the added tokens and the EOS are
    /// taken too.
    chat_template_path: Option<PathBuf> = None, eg "chatml.jinja";
    /// Tokens to add to the vocabulary. Embedding and head get rows for them, drawn around the mean of the others.
    add_tokens: Vec<String> = Vec::new(), eg "[<thought>, </thought>]";
    /// Special tokens to add, which structure a text and are left out of decoded text.
    add_special_tokens: Vec<String> = Vec::new(), eg "[<|im_start|>, <|im_end|>]";
    /// The token that ends a text, instead of the model folder's.
    eos_token: Option<String> = None, eg "<|im_end|>";
    /// The padding token for programs that use the model; nothing is padded here.
    pad_token: Option<String> = None, eg "<|pad|>";
    /// Give embedding and head more rows if the folder's tokenizer has more tokens than the model has rows.
    resize_vocab: bool = false, eg "true";
    /// Rows of embedding and head are rounded up to a multiple of this.
    resize_to_multiple_of: Option<usize> = None, in Bounds::Within(Range::AtLeast(1.0)), eg "64";
    /// Where the model runs: the CPU, an NVIDIA card (experimental, see docs/gpu.md), or auto: the first card that can be
    /// used, else the CPU.
    device: DeviceName = DeviceName::Cpu, eg "cuda:0";
    /// What matrix products round their factors to; sums are f32. auto is bf16 on a card and f32 on the CPU, which has
    /// nothing else.
    matmul_precision: MatmulPrecision = MatmulPrecision::Auto, eg "f32";
    /// Run on the CPU even if device is auto: transformers' name for device=cpu.
    use_cpu: bool = false, eg "true";
    /// On a card, replay passes of repeated sizes as CUDA graphs: the same numbers with less work for the host.
    cuda_graphs: bool = true, eg "false";
    /// Pack the linear layers of an adapter's base into 8 bits when it is loaded: the codes of bitsandbytes' LLM.int8, with
    /// activations as they are.
    load_in_8bit: bool => train.load_in_8bit, eg "true";
    /// Pack them into 4 bits: bitsandbytes' NF4 in blocks of 64.
    load_in_4bit: bool => train.load_in_4bit, eg "true";
    /// Pack the scales of these 4 bits too (transformers' bnb_4bit_use_double_quant).
    use_bnb_nested_quant: bool => train.use_bnb_nested_quant, eg "true";
    /// What products with these 4 bits are of; null: what the device computes in, which is all that it may be.
    bnb_4bit_compute_dtype: Option<ComputeDtype> = None, eg "float32";

    Adapter:
    /// Train a low-rank adapter (LoRA) and leave the model unchanged.
    use_peft: bool = false, eg "true";
    /// Rank of the adapter's matrices.
    lora_r: usize = 16, in Bounds::Within(Range::AtLeast(1.0)), eg "8";
    /// Numerator of the adapter's scale, which is lora_alpha / lora_r.
    lora_alpha: f64 = 32.0, eg "16";
    /// Share of an adapter's inputs that is dropped in training.
    lora_dropout: f64 = 0.05, in Bounds::Within(Range::FromBelow(0.0, 1.0)), eg "0";
    /// Modules with an adapter: names, or what they end in; all-linear; or one regular expression of whole names. Empty:
    /// PEFT's choice for the model's family.
    lora_target_modules: Vec<String> = Vec::new(), eg "all-linear";
    /// Modules that are trained fully, in a copy that is saved with the adapter.
    lora_modules_to_save: Vec<String> = Vec::new(), eg "[lm_head, embed_tokens]";
    /// Scale by lora_alpha / √lora_r instead.
    use_rslora: bool = false, eg "true";
    /// Weight-decomposed adapters (DoRA): a trained magnitude for each row of the weights.
    use_dora: bool = false, eg "true";
    /// Numbers of the layers that have adapters; empty: all.
    lora_layers_to_transform: Vec<usize> = Vec::new(), eg "[0, 1]";
    /// Names of the lists of layers that the numbers of lora_layers_to_transform refer to.
    lora_layers_pattern: Vec<String> = Vec::new(), eg "layers";
    /// Ranks of some modules, by a regular expression of the end of their names; the first that matches applies.
    lora_rank_pattern: IndexMap<String, usize> = IndexMap::new(), eg "{down_proj: 32}";
    /// Alphas of some modules, likewise.
    lora_alpha_pattern: IndexMap<String, f64> = IndexMap::new(), eg "{down_proj: 64}";
    /// Initial values of the adapter's matrices: true (A uniform, B zero), gaussian (A normal, B zero) or false (both uniform).
    lora_init: LoraInitName = LoraInitName::True, eg "gaussian";

    Rows:
    /// Rows to train on: a file, a glob, a folder of splits, a hub id, or a list of them.
    dataset_name: Option<Paths> = None, eg "rows.jsonl";
    /// Split to train on, if dataset_name is a folder.
    dataset_train_split: String = "train".into(), eg "train_sft";
    /// Split to evaluate on, if dataset_name is a folder; null: the first of test, validation, valid,
    /// eval, dev.
    dataset_test_split: Option<String> = None, eg "test_sft";
    /// Rows to evaluate on, in the same forms.
    eval_dataset_name: Option<Paths> = None, eg "held_out.jsonl";
    /// Share of the training rows to hold out for evaluation, if no rows to evaluate on are named.
    eval_fraction: f64 = 0.0, in Bounds::Within(Range::FromBelow(0.0, 1.0)), eg "0.05";
    /// Format of the rows; auto detects it for each row.
    format: Format => data.format, eg "messages";
    /// Names of the rows' fields where they differ from the formats', by our name; paths into objects and lists work too.
    columns: BTreeMap<String, String> => data.columns, eg "{prompt: question, completion: data.answer}";
    /// What happens to a row that cannot become a sample.
    on_bad_row: OnBadRow => data.on_bad_row, eg "skip";
    /// Findings of level error that do not stop training, by their codes.
    allow_findings: Codes = Codes::default(), eg "[M002]";

    Labels:
    /// Learn from responses only; false: from every token, prompts included.
    completion_only_loss: Objective => data.objective, eg "false";
    /// TRL's key for conversations; here their assistant turns are always what is learned.
    assistant_only_loss: Option<bool> = None, eg "true";
    /// Which assistant turns of a conversation are learned.
    supervise: Supervise => data.supervise, eg "last";
    /// The date that chat templates see as today's; pinned, a row renders the same on any day.
    template_date: Option<String> => data.template_date, in Bounds::Date, eg "2026-01-31";
    /// Variables for the chat template, by name.
    template_kwargs: BTreeMap<String, Json> => data.template_kwargs, eg "{enable_thinking: false}";
    /// Tokenise prompt and response separately (split), or as one text (joint).
    boundary: Boundary => data.boundary, eg "joint";
    /// Longest row in tokens; null for no limit.
    max_length: Option<usize> => data.max_length, in Bounds::Within(Range::AtLeast(2.0)), eg "2048";
    /// What happens to a longer row.
    truncation_mode: TruncationMode => data.truncation_mode, eg "drop";
    /// Concatenate rows into packs of at most max_length tokens; batch sizes then count packs.
    packing: bool => data.packing, eg "true";
    /// How rows are assigned to packs.
    packing_strategy: PackingStrategy = PackingStrategy::Bfd, in Bounds::Note("which cuts no row (TRL's wrapped and bfd_split cut rows in two)"), eg "bfd";
    /// In a pack, compute a prompt that several rows share only once.
    share_prefix: bool => data.share_prefix, eg "true";
    /// Append the EOS token to a plain completion that does not end with it.
    append_eos: bool => data.append_eos, eg "false";
    /// Whether text in messages can become structural tokens (<|im_end|>).
    content_special_tokens: ContentSpecialTokens => data.content_special_tokens, eg "text";
    /// Loss weight of prompt tokens.
    prompt_loss_weight: f32 => data.prompt_loss_weight, in Bounds::Within(Range::AtLeast(0.0)), eg "0.1";
    /// Loss weight per prompt section (system, context, task, user, tool, prompt).
    loss_weights: BTreeMap<String, f32> => data.loss_weights, eg "{system: 0.1}";
    /// Text that begins each section (SYSTEM, CONTEXT, TASK, RESPONSE); empty: no such section.
    section_markers: BTreeMap<String, String> => data.section_markers, eg "{TASK: \"[ASK]\"}";
    /// Stop tokens besides eos_token and those of generation_config.json.
    stop_tokens: Vec<String> => data.stop_tokens, eg "[<|im_end|>]";

    Training:
    /// Shuffle the rows for each epoch; false uses file order in every epoch.
    shuffle_dataset: bool => train.shuffle_dataset, eg "false";
    /// Rows per micro-batch, or packs of them.
    per_device_train_batch_size: usize => train.per_device_train_batch_size, eg "4";
    /// Micro-batches per step; the loss is the mean over the targets of all of them.
    gradient_accumulation_steps: usize => train.gradient_accumulation_steps, eg "4";
    /// Keep only each layer's input, and recompute the rest in the backward pass.
    gradient_checkpointing: bool => train.gradient_checkpointing, eg "true";
    /// Add noise of up to alpha/sqrt(length * hidden size) to the embeddings in training (NEFTune).
    neftune_noise_alpha: Option<f64> => train.neftune_noise_alpha, eg "5";
    /// Mix each target with this share of the uniform distribution over the vocabulary; evaluation does not.
    label_smoothing_factor: f64 => train.label_smoothing_factor, eg "0.1";
    /// Factor of the load-balancing loss of a mixture of experts; 0 leaves it out. null: router_aux_loss_coef of the
    /// model's config.json, if output_router_logits is true there.
    router_aux_loss_coef: Option<f64> => train.router_aux_loss_coef, eg "0.001";
    /// Train without the dropout that the model's config.json has (attn_pdrop, attention_dropout, hidden_dropout).
    disable_dropout: bool => train.disable_dropout, eg "true";
    /// Highest learning rate.
    learning_rate: f64 => train.learning_rate, eg "1e-4";
    /// Optimizer. adamw_torch is adamw_torch_fused; adamw_bnb_8bit is adamw_8bit, whose states take a quarter of the
    /// memory; adafactor keeps sums of rows and columns only.
    optim: Optim => train.optim, eg "adafactor";
    /// Arguments of the optimizer: of sgd, momentum=0.9.
    optim_args: Option<String> => train.optim_args, eg "momentum=0.9";
    /// Keep a moving average of the weights with this decay, evaluate it, and end with it; null keeps none.
    ema_decay: Option<f64> => train.ema_decay, eg "0.999";
    /// Parameters with a separate learning rate or weight decay, by patterns of their names.
    param_groups: Vec<ParamGroup> => train.param_groups, eg "[{match: embed_tokens, learning_rate: 1e-5}, {match: mlp, weight_decay: 0.1}]";
    /// Train only the parameters that these patterns match; a pattern matches whole parts of a name; empty: all.
    trainable: Patterns => train.trainable, eg "[layers.1, norm]";
    /// Do not train the parameters that these patterns match.
    freeze: Patterns => train.freeze, eg "[embed_tokens, \"layers.[0-3]\"]";
    /// Weight decay; not applied to biases and norms.
    weight_decay: f64 => train.weight_decay, eg "0.01";
    /// AdamW's first decay rate.
    adam_beta1: f64 => train.adam_beta1, eg "0.95";
    /// AdamW's second decay rate.
    adam_beta2: f64 => train.adam_beta2, eg "0.95";
    /// AdamW's epsilon.
    adam_epsilon: f64 => train.adam_epsilon, eg "1e-6";
    /// Gradients are clipped to this norm; 0 does not clip.
    max_grad_norm: f64 => train.max_grad_norm, eg "0.5";
    /// Passes over the training rows.
    num_train_epochs: f64 => train.num_train_epochs, eg "1.5";
    /// Number of steps; takes precedence over num_train_epochs. -1: by epochs.
    max_steps: i64 = -1, in Bounds::WithinOr(Range::AtLeast(1.0), -1.0), eg "1000";
    /// Schedule of the learning rate.
    lr_scheduler_type: Scheduler => train.lr_scheduler_type, eg "cosine";
    /// Arguments of the schedule, under transformers' names (num_cycles, min_lr, num_decay_steps, power, patience).
    lr_scheduler_kwargs: BTreeMap<String, Json> => train.lr_scheduler_kwargs, eg "{min_lr: 1e-6}";
    /// Share of the steps that warm up; used if warmup_steps is 0.
    warmup_ratio: f64 => train.warmup_ratio, eg "0.03";
    /// Number of warm-up steps; below 1, a share of the steps.
    warmup_steps: f64 => train.warmup_steps, eg "100";
    /// Stop if the loss has been above twice that of the first step, and above 4 nats, for 20 steps in a row.
    stop_on_divergence: bool => train.stop_on_divergence, eg "false";

    Evaluation:
    /// Rows per evaluation batch.
    per_device_eval_batch_size: usize => train.per_device_eval_batch_size, eg "16";
    /// When to evaluate, besides before and after training.
    eval_strategy: Strategy => train.eval_strategy, in Bounds::Without("best"), eg "epoch";
    /// Steps between two evaluations; below 1, a share of the steps; null: logging_steps.
    eval_steps: Option<Interval> => train.eval_steps, eg "100";
    /// Steps (with eval_strategy epoch: epochs) before the first evaluation during training.
    eval_delay: f64 => train.eval_delay, eg "500";
    /// Metric of the best evaluation: loss, perplexity, mean_token_accuracy, entropy, or a section's
    /// (response_loss); null: loss.
    metric_for_best_model: Option<String> => train.metric_for_best_model, eg "mean_token_accuracy";
    /// Whether a higher metric_for_best_model is better; null: unless its name ends in loss, or is perplexity.
    greater_is_better: Option<bool> => train.greater_is_better, eg "true";
    /// End the run after this many evaluations in a row without improvement; null: never.
    early_stopping_patience: Option<u64> => train.early_stopping_patience, eg "3";
    /// By how much an evaluation must be better to count for early_stopping_patience.
    early_stopping_threshold: f64 => train.early_stopping_threshold, eg "0.001";
    /// Held-out prompts that the model answers at each evaluation, into metrics.jsonl and the report.
    num_samples: usize => train.num_samples, eg "3";
    /// Longest of these answers, in tokens.
    sample_max_new_tokens: usize => train.sample_max_new_tokens, eg "128";

    Output:
    /// Folder that the run writes to.
    output_dir: PathBuf = PathBuf::from("trainer_output"), eg "out";
    /// Write into an output_dir that is not empty.
    overwrite_output_dir: bool = false, eg "true";
    /// Where metrics go besides metrics.jsonl: tensorboard, none, or all. Online services are not supported; a note says what to do.
    report_to: Reports = Reports::default(), eg "none";
    /// Folder of the TensorBoard event files; null: runs/NAME in output_dir, after run_name.
    logging_dir: Option<PathBuf> = None, eg "logs/first";
    /// Name of the run.
    run_name: Option<String> = None, eg "first";
    /// Steps between two lines of metrics.jsonl; below 1, a share of the steps.
    logging_steps: Interval => train.logging_steps, eg "10";
    /// When to write checkpoints.
    save_strategy: Strategy => train.save_strategy, eg "epoch";
    /// Steps between two checkpoints; below 1, a share of the steps.
    save_steps: Interval => train.save_steps, eg "100";
    /// Checkpoints kept; null keeps all.
    save_total_limit: Option<usize> => train.save_total_limit, eg "3";
    /// Checkpoints hold the model alone; a run cannot be resumed from them.
    save_only_model: bool => train.save_only_model, eg "true";
    /// What happens if a checkpoint cannot be written (a full disk): a warning, or the end of the run.
    on_save_error: OnSaveError => train.on_save_error, eg "stop";
    /// End with the weights of the best evaluation, which get a checkpoint in any case.
    load_best_model_at_end: bool => train.load_best_model_at_end, eg "true";

    Seeds:
    /// Seed of random weights, of the rows' order, and of sampling.
    seed: u64 => train.seed, eg "7";
    /// Seed of the rows' order; null: seed.
    data_seed: Option<u64> => train.data_seed, eg "7";
}

/// A value in an error message: short, on one line.
pub fn shown(json: &Json) -> String {
    let text = json.to_string();
    if text.chars().count() > 60 { text.chars().take(57).chain("...".chars()).collect() } else { text }
}

impl Key {
    /// The entries that a mapping can have; empty where they are free, or where the key is not a mapping.
    pub fn entries(&self) -> Vec<&'static str> {
        match self.name {
            "loss_weights" => Section::ALL.iter().map(|section| section.name()).collect(),
            "columns" => suasion_data::example::COLUMNS.to_vec(),
            "section_markers" => vec!["SYSTEM", "CONTEXT", "TASK", "RESPONSE"],
            _ => Vec::new(),
        }
    }
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

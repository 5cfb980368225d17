//! What other trainers call our keys. Such a name is answered with ours, and never taken for it: some of them
//! differ in meaning, and a configuration should use one vocabulary.

use super::known;
use super::table;
use serde_json::Value as Json;

/// A key of another program.
pub struct Synonym {
    /// Its name there.
    pub theirs: &'static str,
    /// The program that has it; empty for a name that many use.
    pub from: &'static str,
    /// Our key, or TRL's where it is not supported.
    pub ours: &'static str,
    /// How its values translate.
    pub values: Values,
}

/// How the values of a synonym become values of our key.
#[derive(Clone, Copy)]
pub enum Values {
    /// They are the same.
    Same,
    /// True is false.
    Opposite,
    /// As this text says.
    Differ(&'static str),
}

impl Synonym {
    /// What the name is here.
    pub fn answer(&self) -> String {
        let whose = if self.from.is_empty() { String::new() } else { format!("{}'s ", self.from) };
        format!("{whose}{} is {} here", self.theirs, self.ours)
    }

    /// What to write in place of it.
    pub fn help(&self, value: &Json) -> String {
        if let Some(key) = known::find(self.ours) {
            return format!("leave it out; {} is not supported: {}", key.name, key.why);
        }
        let example = table::find(self.ours).map_or("", |key| key.example);
        match (self.values, value) {
            (Values::Differ(how), _) => format!("{how}; for example {}: {example}", self.ours),
            (Values::Opposite, Json::Bool(flag)) => {
                format!("write {}: {} (the opposite of {})", self.ours, !flag, self.theirs)
            }
            (Values::Opposite, _) => format!("write {}, with the opposite value", self.ours),
            (Values::Same, Json::Object(_) | Json::Array(_) | Json::Null) => {
                format!("for example {}: {example}", self.ours)
            }
            (Values::Same, _) => format!("write {}: {}", self.ours, table::shown(value).trim_matches('"')),
        }
    }
}

/// A synonym by its name.
pub fn find(name: &str) -> Option<&'static Synonym> {
    SYNONYMS.iter().find(|synonym| synonym.theirs == name)
}

macro_rules! synonyms {
    ($($from:literal: { $($theirs:ident = $ours:ident $(, $values:expr)?;)+ })+) => {
        /// Every synonym, by program.
        pub const SYNONYMS: &[Synonym] = &[$($(Synonym {
            theirs: stringify!($theirs),
            from: $from,
            ours: stringify!($ours),
            values: values!($($values)?),
        },)+)+];
    };
}

macro_rules! values {
    () => {
        Values::Same
    };
    ($values:expr) => {
        $values
    };
}

/// The schedule's names of other programs are not all ours.
const SCHEDULE: Values = Values::Differ("name one of constant, constant_with_warmup, linear and cosine");

synonyms! {
    "axolotl": {
        base_model = model_name_or_path;
        micro_batch_size = per_device_train_batch_size;
        eval_batch_size = per_device_eval_batch_size;
        sequence_len = max_length;
        num_epochs = num_train_epochs;
        excess_length_strategy = truncation_mode, Values::Differ("drop is drop, truncate is keep_start, raise is error");
        train_on_inputs = completion_only_loss, Values::Opposite;
        roles_to_train = supervise, Values::Differ("assistant turns are learned; all, last or per-message of them");
        datasets = dataset_name, Values::Differ("name files, folders or hub ids, one or a list; the format is found");
        test_datasets = eval_dataset_name, Values::Differ("name files, folders or hub ids, one or a list");
        val_set_size = eval_fraction, Values::Differ("give a share of the rows, below 1");
        sample_packing = packing;
        eval_sample_packing = eval_packing;
        shuffle_merged_datasets = shuffle_dataset;
        optimizer = optim;
        unfrozen_parameters = trainable, Values::Differ("patterns of whole parts of names, no regular expressions");
        embedding_lr = param_groups, Values::Differ("a group of the embeddings");
        lr_groups = param_groups, Values::Differ("match is the list of modules, learning_rate their rate");
        lr_scheduler = lr_scheduler_type, SCHEDULE;
        gradient_clipping = max_grad_norm;
        evals_per_epoch = eval_steps, Values::Differ("count steps, or set eval_strategy: epoch");
        saves_per_epoch = save_steps, Values::Differ("count steps, or set save_strategy: epoch");
        adapter = use_peft;
        lora_model_dir = adapter_name_or_path;
        lora_target_linear = lora_target_modules;
        peft_use_rslora = use_rslora;
        peft_use_dora = use_dora;
        flash_attention = attn_implementation;
        wandb_project = report_to;
        tokens = add_tokens;
        special_tokens = eos_token, Values::Differ("eos_token and pad_token are keys, and others belong in add_special_tokens");
        resize_token_embeddings_to_32x = resize_to_multiple_of, Values::Differ("give the number");
        dataset_processes = dataset_num_proc;
    }
    "LLaMA-Factory": {
        cutoff_len = max_length;
        dataset = dataset_name, Values::Differ("name files, folders or hub ids, one or a list");
        eval_dataset = eval_dataset_name, Values::Differ("name files, folders or hub ids, one or a list");
        val_size = eval_fraction, Values::Differ("give a share of the rows, below 1");
        template = chat_template_path, Values::Differ("name a file in Jinja, or a model whose template it is");
        new_special_tokens = add_special_tokens;
        train_on_prompt = completion_only_loss, Values::Opposite;
        mask_history = supervise, Values::Differ("mask_history: true is supervise: last");
        neat_packing = packing;
        finetuning_type = use_peft;
        lora_rank = lora_r;
        lora_target = lora_target_modules;
        additional_target = lora_modules_to_save;
        quantization_bit = load_in_4bit, Values::Differ("4 is load_in_4bit: true, 8 is load_in_8bit: true");
        double_quantization = use_bnb_nested_quant;
        flash_attn = attn_implementation;
        enable_liger_kernel = use_liger_kernel;
        preprocessing_num_workers = dataset_num_proc;
        streaming = dataset_streaming;
    }
    "mlx-lm": {
        model = model_name_or_path;
        data = dataset_name;
        batch_size = per_device_train_batch_size;
        grad_accumulation_steps = gradient_accumulation_steps;
        grad_checkpoint = gradient_checkpointing;
        iters = max_steps;
        mask_prompt = completion_only_loss;
        steps_per_report = logging_steps;
        steps_per_eval = eval_steps;
        save_every = save_steps;
        adapter_path = output_dir;
        resume_adapter_file = adapter_name_or_path;
        fine_tune_type = use_peft;
        lora_parameters = lora_r;
        lr_schedule = lr_scheduler_type, SCHEDULE;
    }
    "transformers": {
        bnb_4bit_use_double_quant = use_bnb_nested_quant;
    }
    "older TRL": {
        max_seq_length = max_length;
        num_of_sequences = packing;
        dataset_batch_size = dataset_num_proc;
        response_template = section_markers, Values::Differ("no text is searched for: input_text or prompt says where the response begins");
        instruction_template = section_markers, Values::Differ("no text is searched for; conversations need no marker");
        use_liger = use_liger_kernel;
    }
    "older transformers": {
        evaluation_strategy = eval_strategy;
        per_gpu_train_batch_size = per_device_train_batch_size;
        per_gpu_eval_batch_size = per_device_eval_batch_size;
        no_cuda = use_cpu;
        train_file = dataset_name;
        validation_file = eval_dataset_name;
        block_size = max_length;
        validation_split_percentage = eval_fraction, Values::Differ("give a share of the rows, below 1");
    }
    "": {
        lr = learning_rate;
        epochs = num_train_epochs;
        n_epochs = num_train_epochs;
        train_batch_size = per_device_train_batch_size;
        grad_accum = gradient_accumulation_steps;
        gradient_accumulation = gradient_accumulation_steps;
        model_name = model_name_or_path;
        model_path = model_name_or_path;
        output = output_dir;
        out_dir = output_dir;
        max_len = max_length;
        context_length = max_length;
        scheduler = lr_scheduler_type, SCHEDULE;
        warmup = warmup_steps;
        betas = adam_beta1, Values::Differ("adam_beta1 and adam_beta2 are two keys");
        beta1 = adam_beta1;
        beta2 = adam_beta2;
        clip_grad_norm = max_grad_norm;
        max_seq_len = max_length;
        seq_len = max_length;
        sequence_length = max_length;
        max_iters = max_steps;
        num_steps = max_steps;
        warmup_iters = warmup_steps;
        num_warmup_steps = warmup_steps;
        eval_every = eval_steps;
        eval_interval = eval_steps;
        save_interval = save_steps;
        log_every = logging_steps;
        log_interval = logging_steps;
        per_device_batch_size = per_device_train_batch_size;
        grad_clip = max_grad_norm;
        eps = adam_epsilon;
        adam_eps = adam_epsilon;
        train_data = dataset_name;
        train_dataset = dataset_name;
        eval_data = eval_dataset_name;
        test_size = eval_fraction, Values::Differ("give a share of the rows, below 1");
        val_split = eval_fraction, Values::Differ("give a share of the rows, below 1");
        shuffle = shuffle_dataset;
        resume = resume_from_checkpoint;
        resume_from = resume_from_checkpoint;
        neftune_alpha = neftune_noise_alpha;
        tokenizer = model_name_or_path, Values::Differ("the tokenizer is that of the model's folder");
        tokenizer_name_or_path = model_name_or_path, Values::Differ("the tokenizer is that of the model's folder");
        random_seed = seed;
        system_prompt = section_markers, Values::Differ("a system prompt stands in the rows");
    }
}

//! Keys of TRL and transformers that are known and not supported: named when they would change a run,
//! accepted when they would not. A key leaves this list for the table the day it works.

use serde_json::Value as Json;

/// The values, besides TRL's default, at which an unsupported key has no effect.
pub enum Inert {
    /// At these, written as YAML (a missing value counts as null).
    At(&'static [&'static str]),
    /// At every value: it concerns something that suasion does not have. Accepted with a note.
    Always,
}

/// A key that is known by name only.
pub struct Known {
    /// Its name in TRL or in the contract.
    pub name: &'static str,
    /// Its default in TRL, written as YAML. It changes nothing, and is accepted silently.
    pub default: &'static str,
    /// Further values at which it changes nothing.
    pub inert: Inert,
    /// Why it is not supported, as a clause that follows a colon.
    pub why: &'static str,
}

impl Known {
    /// True for TRL's default.
    pub fn is_default(&self, value: &Json) -> bool {
        same(self.default, value)
    }

    /// True if the value changes nothing.
    pub fn is_inert(&self, value: &Json) -> bool {
        self.is_default(value)
            || match self.inert {
                Inert::Always => true,
                Inert::At(values) => values.iter().any(|text| same(text, value)),
            }
    }

    /// The values that change nothing, written as YAML; `None` if all do.
    pub fn inert_values(&self) -> Option<Vec<&'static str>> {
        match self.inert {
            Inert::At(values) => Some(std::iter::once(self.default).chain(values.iter().copied()).collect()),
            Inert::Always => None,
        }
    }
}

fn same(text: &str, value: &Json) -> bool {
    match value {
        Json::String(found) => found.eq_ignore_ascii_case(text) || (found == "None" && text == "null"),
        // `no` reads as false; 0.0 equals 0.
        Json::Number(found) => text.parse::<f64>().ok().is_some_and(|number| found.as_f64() == Some(number)),
        Json::Bool(false) => matches!(text, "false" | "no"),
        Json::Null => text == "null",
        Json::Bool(true) => text == "true",
        list_or_mapping => list_or_mapping.to_string().as_str() == text,
    }
}

/// A known key by its name.
pub fn find(name: &str) -> Option<&'static Known> {
    KNOWN.iter().find(|key| key.name == name)
}

macro_rules! known {
    ($($why:literal: { $($name:ident = $default:literal $([$($inert:literal),*])? $($always:ident)?),+ $(,)? })+) => {
        /// Every known key, grouped by the reason.
        pub const KNOWN: &[Known] = &[$($(Known {
            name: stringify!($name),
            default: $default,
            inert: known!(@ $([$($inert),*])? $($always)?),
            why: $why,
        },)+)+];
    };
    (@ [$($inert:literal),*]) => { Inert::At(&[$($inert),*]) };
    (@ always) => { Inert::Always };
    (@) => { Inert::At(&[]) };
}

// The default of each key in TRL 1.16 (transformers 5.23), or in the version that had it last, as YAML; then the
// other values that change nothing.
known! {
    "evaluation pads nothing and gives the same numbers for rows and for packs of them": { eval_packing = "null" always }
    "an adapter is of a language model": { lora_task_type = "CAUSAL_LM" }
    "the model's biases stay as they are under an adapter": { lora_bias = "none" ["null", "false"] }
    "adapters are of modules; name them in lora_target_modules": { lora_target_parameters = "null" ["[]"] }
    "load_in_4bit is NF4, which is nearer to weights than fp4 in as many bits": { bnb_4bit_quant_type = "nf4" }
    "it says how PyTorch keeps the bytes, which are the same": { bnb_4bit_quant_storage = "null" always }
    "weights and sums are f32; matmul_precision says what products on a card round to": {
        bf16 = "null" ["false"], fp16 = "false" ["null"], dtype = "float32" ["null", "auto"],
        torch_dtype = "null" ["auto", "float32"], bf16_full_eval = "false", fp16_full_eval = "false",
        tf32 = "null" ["false"],
    }
    "metrics go to metrics.jsonl, and no service is contacted": {
        project = "huggingface" always, trackio_space_id = "null" ["trackio"],
        trackio_bucket_id = "null", trackio_static_space_id = "null",
    }
    "nothing is uploaded; the folder of a finished run can be uploaded as it is": {
        push_to_hub = "false", hub_model_id = "null", hub_token = "null", hub_private_repo = "null",
        hub_strategy = "every_save" always, hub_always_push = "false", hub_revision = "null",
    }
    "an optimizer is the same for all modules": { optim_target_modules = "null" }
    "the loss is the mean negative log-likelihood of the targets": {
        loss_type = "nll" ["null"], average_tokens_across_devices = "true" always,
    }
    "rows are named by their fields": {
        dataset_text_field = "text" ["null"], dataset_kwargs = "null" ["{}"], label_names = "null",
        length_column_name = "length" always,
    }
    "a configuration of a data set is a folder in it: dataset_name: owner/name/folder": { dataset_config = "null" }
    "rows are always read as a stream, from files on this machine or in the hub's cache": { dataset_streaming = "false" }
    "a model is a folder, or what the hub's cache has as main": { model_revision = "main" ["null"] }
    "a model is built from its folder alone; change its config.json": { model_init_kwargs = "null" ["{}"] }
    "no code from a model folder is ever run": { trust_remote_code = "false" }
    "nothing is ever padded": {
        padding_free = "false" always, pad_to_multiple_of = "auto" always, group_by_length = "false",
    }
    "rows are shuffled, or with shuffle_dataset=false taken in file order": { train_sampling_strategy = "random" }
    "use --resume [DIR]": {
        resume_from_checkpoint = "null" ["false"], ignore_data_skip = "false",
        restore_callback_states_from_checkpoint = "false",
    }
    "metrics are taken every logging_steps": { logging_strategy = "steps" }
    "the first and the last step always have a line of metrics": { logging_first_step = "false" always }
    "metrics.jsonl has the tokens of every line": { include_num_input_tokens_seen = "no" always }
    "the rows to evaluate on are evaluated before the first step in any case": { eval_on_start = "false" always }
    "evaluation follows eval_strategy alone": {
        do_eval = "false" always, do_train = "false" always, do_predict = "false",
    }
    "an evaluation has the loss, the perplexity and the loss per section": {
        include_for_metrics = "[]" ["null"], batch_eval_metrics = "false", eval_do_concat_batches = "true" always,
        eval_use_gather_object = "false" always,
    }
    "weights are saved as safetensors, and a checkpoint at the end of a step": {
        save_safetensors = "true", enable_jit_checkpoint = "false",
    }
    "gradient_checkpointing is the key, and it has no further arguments": {
        activation_checkpointing = "null" ["false"], activation_checkpointing_kwargs = "null" ["{}"],
        gradient_checkpointing_kwargs = "null" always,
    }
    "one process on one machine; determinism is not optional": {
        ddp_backend = "null", ddp_find_unused_parameters = "null" always, ddp_bucket_cap_mb = "null" always,
        ddp_broadcast_buffers = "null" always, ddp_static_graph = "null" always, deepspeed = "null",
        fsdp = "null" ["[]", "", "false"], fsdp_config = "null" ["{}"], accelerator_config = "null",
        parallelism_config = "null", save_on_each_node = "false" always, full_determinism = "false" always,
        torch_compile = "false", torch_compile_backend = "null", torch_compile_mode = "null",
        auto_find_batch_size = "false", use_liger_kernel = "false", liger_kernel_config = "null",
        activation_offloading = "false", attn_implementation = "null" ["eager", "sdpa"], ignore_bias_buffers = "false" always,
    }
    "the last, smaller batch is always used": { dataloader_drop_last = "false" }
    "it concerns the Python process": {
        dataset_num_proc = "null" always, dataloader_num_workers = "0" always, dataloader_pin_memory = "true" always,
        dataloader_prefetch_factor = "null" always, dataloader_persistent_workers = "false" always,
        dataloader_multiprocessing_context = "null" always, dataloader_in_order = "true" always,
        remove_unused_columns = "true" always, disable_tqdm = "null" always, log_level = "passive" always,
        log_level_replica = "warning" always, log_on_each_node = "true" always,
        skip_memory_metrics = "true" always, torch_empty_cache_steps = "null" always,
        logging_nan_inf_filter = "true" always, eval_accumulation_steps = "null" always, prediction_loss_only = "false" always,
        ddp_timeout = "1800" always, local_rank = "-1" always, debug = "" ["null", "[]"] , use_cache = "false" always,
    }
}

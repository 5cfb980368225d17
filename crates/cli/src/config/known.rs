//! Keys of TRL and transformers that are known and not supported: named when they would change a run,
//! accepted when they would not. A key leaves this list for the table the day it works.

use serde_json::Value as Json;

/// The values at which an unsupported key changes nothing.
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
    /// The values at which it changes nothing.
    pub inert: Inert,
    /// Why it is not supported, as a clause that follows a colon.
    pub why: &'static str,
}

impl Known {
    /// True where the value changes nothing.
    pub fn is_inert(&self, value: &Json) -> bool {
        match self.inert {
            Inert::Always => true,
            Inert::At(values) => values.iter().any(|text| same(text, value)),
        }
    }

    /// The inert values as text, where they can be listed.
    pub fn inert_values(&self) -> Option<String> {
        match self.inert {
            Inert::At(values) if !values.is_empty() => Some(values.join(" or ")),
            _ => None,
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
    ($($why:literal: { $($name:ident $([$($inert:literal),*])? $($always:ident)?),+ $(,)? })+) => {
        /// Every known key, grouped by the reason.
        pub const KNOWN: &[Known] = &[$($(Known {
            name: stringify!($name),
            inert: known!(@ $([$($inert),*])? $($always)?),
            why: $why,
        },)+)+];
    };
    (@ [$($inert:literal),*]) => { Inert::At(&[$($inert),*]) };
    (@ always) => { Inert::Always };
}

known! {
    "evaluation pads nothing and gives the same numbers for rows and for packs of them": { eval_packing always }
    "this version trains every parameter; adapters are not supported yet": {
        use_peft["false"], adapter_name_or_path["null"], use_rslora["false"], use_dora["false"],
        lora_target_modules["null", "[]"], lora_target_parameters["null"], lora_modules_to_save["null"],
        load_in_8bit["false"], load_in_4bit["false"],
    }
    "it belongs to LoRA, and use_peft is not supported yet": {
        lora_r always, lora_alpha always, lora_dropout always, lora_task_type always,
    }
    "the chat template is the model folder's own chat_template.jinja": { chat_template_path["null"] }
    "this version computes in f32": { bf16["false", "null"], fp16["false"], dtype["null", "auto", "float32"], torch_dtype["null", "auto", "float32"],
        bf16_full_eval["false"], fp16_full_eval["false"], tf32["null", "false"], }
    "noise on the embeddings is not supported yet": { neftune_noise_alpha["null"] }
    "metrics go to metrics.jsonl, and no service is contacted": {
        report_to["none", "null", "[]", "[\"none\"]"], push_to_hub["false"], hub_model_id["null"], hub_token["null"],
    }
    "the optimizer is AdamW": { optim["adamw_torch", "adamw_torch_fused"], optim_args["null"], }
    "the loss is the mean negative log-likelihood of the targets": {
        loss_type["nll", "null"], label_smoothing_factor["0"], average_tokens_across_devices always,
    }
    "the schedules have no further arguments": { lr_scheduler_kwargs["null", "{}"] }
    "the best model is the one of the lowest eval_loss": {
        metric_for_best_model["null", "loss", "eval_loss"], greater_is_better["null", "false"],
    }
    "rows are named by their fields": { dataset_text_field["text", "null"], dataset_kwargs["null", "{}"], label_names["null"] }
    "a configuration of a data set is a folder in it: dataset_name: owner/name/folder": { dataset_config["null"] }
    "rows are always read as a stream, from files on this machine or in the hub's cache": { dataset_streaming["false"] }
    "a model is a folder, or what the hub's cache has as main": { model_revision["null", "main"] }
    "no code from a model folder is ever run": { trust_remote_code["false"] }
    "stop and padding tokens come from the model folder; see stop_tokens": { eos_token["null"], pad_token["null"] }
    "nothing is ever padded": { padding_free always, pad_to_multiple_of always, group_by_length["false"], }
    "use --resume [DIR]": { resume_from_checkpoint["null", "false"], ignore_data_skip["false"] }
    "metrics are taken every logging_steps": { logging_strategy["steps"] }
    "the first step always has a line in metrics.jsonl": { logging_first_step always }
    "evaluation follows eval_strategy alone": { eval_on_start["false"], eval_delay["0"], do_eval always, do_train always, do_predict["false"] }
    "a checkpoint always holds what an exact resume needs": { save_only_model["false"], save_safetensors["true"] }
    "one process on one machine; determinism is not optional": {
        ddp_backend["null"], deepspeed["null"], fsdp["null", "[]"], accelerator_config["null"], parallelism_config["null"],
        full_determinism always, use_cpu always, torch_compile["false"], auto_find_batch_size["false"],
        use_liger_kernel["false"], activation_offloading["false"], attn_implementation["null", "eager", "sdpa"],
        gradient_checkpointing_kwargs always,
    }
    "the last, smaller batch is always used": { dataloader_drop_last["false"] }
    "it concerns the Python process": {
        dataset_num_proc always, dataloader_num_workers always, dataloader_pin_memory always,
        dataloader_prefetch_factor always, dataloader_persistent_workers always, remove_unused_columns always,
        disable_tqdm always, log_level always, log_level_replica always, log_on_each_node always, logging_dir always,
        run_name always, skip_memory_metrics always, torch_empty_cache_steps always, logging_nan_inf_filter always,
        eval_accumulation_steps always, prediction_loss_only always, ddp_timeout always, local_rank always,
    }
}

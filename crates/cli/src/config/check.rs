//! Checks that concern several keys at once.

use super::device::DeviceName;
use super::table::Config;
use super::value::Value;
use crate::failure::Failure;
use suasion_data::Objective;
use suasion_data::template::is_reserved;

impl Config {
    /// Errors that no key has alone: keys that contradict or need each other.
    pub fn problems(&self) -> Vec<Failure> {
        let config = self;
        let mut problems = Vec::new();
        let mut add = |message: String, help: &str| problems.push(Failure::config(message, help));
        if config.eval_fraction > 0.0 && config.eval_dataset_name.is_some() {
            add(
                "eval_fraction and eval_dataset_name both name the rows to evaluate on".into(),
                "keep one of them",
            );
        }
        if let Some(name) = config.data.template_kwargs.keys().find(|name| is_reserved(name)) {
            add(
                format!("template_kwargs.{name}: {name} is set by suasion and cannot be a template variable"),
                "leave it out: messages and tools come from the rows, special tokens from the tokenizer",
            );
        }
        let weights = config.data.loss_weights.iter().map(|(section, weight)| (section.as_str(), *weight));
        for (name, weight) in weights.chain([("prompt_loss_weight", config.data.prompt_loss_weight)]) {
            if weight < 0.0 {
                add(
                    format!("the loss weight of {name} is {weight}"),
                    "use a number of at least 0: a negative weight would raise the loss of its tokens",
                );
            }
        }
        if config.data.share_prefix && !config.data.packing {
            add(
                "share_prefix=true without packing=true: rows share a prompt within a pack".into(),
                "set packing=true, or leave share_prefix out",
            );
        }
        if config.data.packing && config.data.max_length.is_none() {
            add("packing=true with max_length=null: a pack needs a size".into(), "set max_length");
        }
        if config.assistant_only_loss == Some(true) && config.data.objective == Objective::AllTokens {
            add(
                "assistant_only_loss=true and completion_only_loss=false contradict each other".into(),
                "leave completion_only_loss out: prompts are learned only where it is false",
            );
        }
        for (message, help) in config.packing_problems().into_iter().chain(config.adapter_problems()) {
            add(message, help);
        }
        if config.use_cpu && matches!(config.device, DeviceName::Cuda(_)) {
            add(
                format!("use_cpu=true and device={} contradict each other", config.device),
                "keep one of them: use_cpu=true is transformers' name for device=cpu",
            );
        }
        if config.matmul_precision.is_rounded() && (config.use_cpu || config.device == DeviceName::Cpu) {
            let name = config.matmul_precision.to_json();
            add(
                format!(
                    "matmul_precision={}: products on the CPU are of f32",
                    name.as_str().unwrap_or_default()
                ),
                "leave it out, or train on a card with device=cuda",
            );
        }
        problems
    }
}

//! Checks that concern several keys at once.

use super::table::Config;
use crate::failure::Failure;
use suasion_data::Objective;
use suasion_data::example::COLUMNS;
use suasion_data::template::is_reserved;

impl Config {
    /// Checks what no key can check alone.
    ///
    /// # Errors
    /// Where keys contradict or need each other; the message names them.
    pub fn check(&self) -> anyhow::Result<()> {
        let config = self;
        if config.eval_fraction > 0.0 && config.eval_dataset_name.is_some() {
            return Err(Failure::config(
                "eval_fraction and eval_dataset_name both name the rows to evaluate on",
                "keep one of them",
            )
            .into());
        }
        if let Some(name) = config.data.template_kwargs.keys().find(|name| is_reserved(name)) {
            return Err(Failure::config(
                format!("template_kwargs.{name}: {name} is set by suasion and cannot be a template variable"),
                "leave it out: messages and tools come from the rows, special tokens from the tokenizer",
            )
            .into());
        }
        if let Some(name) = config.data.columns.keys().find(|name| !COLUMNS.contains(&name.as_str())) {
            return Err(Failure::config(
                format!("columns.{name}: no format has a field {name:?}"),
                format!(
                    "columns maps our names to the data's: columns.prompt=question; ours are {}",
                    COLUMNS.join(", ")
                ),
            )
            .into());
        }
        let weights = config.data.loss_weights.iter().map(|(section, weight)| (section.as_str(), *weight));
        for (name, weight) in weights.chain([("prompt_loss_weight", config.data.prompt_loss_weight)]) {
            if weight < 0.0 {
                return Err(Failure::config(
                    format!("the loss weight of {name} is {weight}"),
                    "use a number of at least 0: a negative weight would raise the loss of its tokens",
                )
                .into());
            }
        }
        if config.data.share_prefix && !config.data.packing {
            return Err(Failure::config(
                "share_prefix=true without packing=true: rows share a prompt within a pack",
                "set packing=true, or leave share_prefix out",
            )
            .into());
        }
        if config.data.packing && config.data.max_length.is_none() {
            return Err(Failure::config(
                "packing=true with max_length=null: a pack needs a size",
                "set max_length",
            )
            .into());
        }
        if config.assistant_only_loss == Some(true) && config.data.objective == Objective::AllTokens {
            return Err(Failure::config(
                "assistant_only_loss=true and completion_only_loss=false contradict each other",
                "leave completion_only_loss out: prompts are learned only where it is false",
            )
            .into());
        }
        Ok(())
    }
}

//! What only the whole tree can tell.

use super::table::Config;
use crate::failure::Failure;
use suasion_data::template::is_reserved;

impl Config {
    /// Checks what single keys cannot: which of them contradict or need each other.
    ///
    /// # Errors
    /// Names the keys.
    pub fn check(&self) -> anyhow::Result<()> {
        let config = self;
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

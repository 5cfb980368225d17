//! The tree as the libraries take it.

use super::table::Config;
use suasion_data::policy::{Objective, Policy};
use suasion_train::Settings;

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
}

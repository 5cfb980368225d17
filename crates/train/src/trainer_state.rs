//! `trainer_state.json`, in the form of transformers' `TrainerState`.

use crate::metrics::Record;
use crate::state::RunState;
use crate::steps::Steps;
use serde_json::Value;
use std::path::Path;

/// The contents of `trainer_state.json`. `best` is the checkpoint of the best evaluation.
pub(crate) fn trainer_state(
    state: &RunState,
    records: &[Record],
    steps: &Steps<'_>,
    parameters: u64,
    best: Option<&Path>,
) -> Value {
    let settings = &state.settings;
    let entry = |record: &Record| match record {
        Record::Step(step) => serde_json::json!({
            "epoch": step.epoch, "grad_norm": step.grad_norm, "learning_rate": step.learning_rate,
            "loss": step.loss, "step": step.step, "mean_token_accuracy": step.mean_token_accuracy, "entropy": step.entropy,
        }),
        Record::Eval(eval) => serde_json::json!({
            "epoch": steps.epoch(eval.step), "eval_loss": eval.eval_loss, "step": eval.step,
            "eval_mean_token_accuracy": eval.eval_mean_token_accuracy, "eval_entropy": eval.eval_entropy,
        }),
    };
    let epochs = match settings.max_steps {
        Some(count) => count.div_ceil(steps.sampler.steps_per_epoch()),
        None => settings.num_train_epochs.ceil() as u64,
    };
    serde_json::json!({
        "best_global_step": state.best.map(|(step, _)| step),
        "best_metric": state.best.map(|(_, metric)| metric),
        "best_model_checkpoint": best,
        "epoch": steps.epoch(state.progress.step),
        "eval_steps": settings.eval_steps().of(state.total_steps),
        "global_step": state.progress.step,
        "is_hyper_param_search": false,
        "is_local_process_zero": true,
        "is_world_process_zero": true,
        "log_history": records.iter().map(entry).collect::<Vec<_>>(),
        "logging_steps": settings.logging_steps.of(state.total_steps),
        "max_steps": state.total_steps,
        "num_input_tokens_seen": state.progress.tokens,
        "num_train_epochs": epochs,
        "save_steps": settings.save_steps.of(state.total_steps),
        "stateful_callbacks": {},
        // The usual estimate: forward and backward cost 6 operations per parameter and token.
        "total_flos": 6.0 * parameters as f64 * state.progress.tokens as f64,
        "train_batch_size": settings.per_device_train_batch_size,
        "trial_name": null,
        "trial_params": null,
    })
}

//! What a run needs of disk and time, before it begins.

use super::Job;
use crate::inputs::weights::named_type;
use serde_json::json;
use std::path::Path;
use std::time::Instant;
use suasion_engine::{Architecture, Batch, Budget, Device, Model, WeightType};
use suasion_train::Strategy;

/// Tokens of the batch that is timed.
const TOKENS: u32 = 256;

/// What a run needs.
pub struct Needs {
    /// Bytes of a checkpoint.
    pub checkpoint: u64,
    /// Checkpoints that are there at once.
    pub checkpoints: u64,
    /// Bytes of the checkpoints and the final model.
    pub disk: u64,
    /// Seconds of the steps, without evaluations and checkpoints; `None` if the speed could not be measured.
    pub seconds: Option<f64>,
}

impl Needs {
    /// Of a planned run.
    pub fn of(job: &Job) -> Needs {
        let is_adapter = job.opened.adapter.is_some();
        // Of an adapter only what is trained is written, in f32.
        let parameters = if is_adapter { job.memory().gradients / 4 } else { job.arch.parameter_count() };
        let final_model = parameters * if is_adapter { 4 } else { weight_bytes(&job.folder.path) };
        // Weights in f32, and what the optimizer keeps.
        let optimizer = job.opened.memory(job.plan.budget, &job.settings, 1).optimizer;
        let whole = 4 * parameters + optimizer;
        let checkpoint = if job.settings.save_only_model { final_model } else { whole };
        let (steps, settings) = (job.plan.total_steps, &job.settings);
        let written = match settings.save_strategy {
            Strategy::No => 0,
            Strategy::Steps => steps.div_ceil(settings.save_steps.of(steps)),
            Strategy::Epoch => steps.div_ceil(job.plan.steps_per_epoch),
            Strategy::Best => match settings.eval_strategy {
                Strategy::Epoch => steps.div_ceil(job.plan.steps_per_epoch),
                _ => steps.div_ceil(settings.eval_steps().of(steps)),
            },
        };
        let best = u64::from(settings.load_best_model_at_end);
        // A new one is complete before the oldest is removed.
        let kept = settings.save_total_limit.map_or(u64::MAX, |limit| limit as u64 + 1 + best);
        let checkpoints = (written + best).min(kept);
        let passes = steps as f64 / job.plan.steps_per_epoch as f64;
        let (tokens, targets) = (job.plan.tokens_per_epoch as f64, job.plan.targets_per_epoch as f64);
        // The weights of an adapter's base have no gradient, which is a third of the work.
        let share = if is_adapter { 2.0 / 3.0 } else { 1.0 };
        // The speed is of this process, which is one of the ranks unless it starts them.
        let ranks = if job.begin.team.local < job.plan.ranks as usize { job.plan.ranks as f64 } else { 1.0 };
        let work = share * passes * operations(&job.arch, tokens, targets) / ranks;
        Needs {
            checkpoint,
            checkpoints,
            disk: checkpoints * checkpoint + final_model,
            // The speed of a small model does not carry over to a card.
            seconds: job.on.is_none().then(|| speed().ok()).flatten().map(|speed| work / speed),
        }
    }
}

/// Bytes of a weight of the final model, whose type is that of its base.
fn weight_bytes(folder: &Path) -> u64 {
    match named_type(folder) {
        Some(WeightType::BF16 | WeightType::F16) => 2,
        _ => 4,
    }
}

/// Multiplications and additions of training on this many tokens and targets: six for each of both and each parameter
/// that it meets.
fn operations(arch: &Architecture, tokens: f64, targets: f64) -> f64 {
    let embedding = arch.vocab_size as f64 * arch.hidden as f64;
    let tables = if arch.head.tied { embedding } else { 2.0 * embedding };
    6.0 * ((arch.parameter_count() as f64 - tables) * tokens + embedding * targets)
}

/// Operations a second of a step of a small model on this machine.
fn speed() -> suasion_engine::Result<f64> {
    let config = json!({
        "model_type": "llama", "vocab_size": 2048, "hidden_size": 512, "intermediate_size": 1536,
        "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4,
        "max_position_embeddings": TOKENS, "tie_word_embeddings": true,
    });
    let arch = Architecture::from_json(&config, Path::new("config.json"))?;
    let tokens = TOKENS as usize;
    let budget = Budget { tokens, targets: tokens, train: true, recompute: false };
    let mut model = Model::new(arch.clone(), Device::cpu(), budget)?;
    model.init_random(0)?;
    let ids: Vec<u32> = (0..TOKENS).collect();
    let mut batch = Batch::default();
    batch.push(&ids, (0..TOKENS - 1).map(|row| (row, row + 1, 1.0)));
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        let started = Instant::now();
        model.zero_gradients();
        let losses = model.accumulate(&batch, 1.0 / TOKENS as f32)?;
        model.read_losses(&losses)?;
        model.gradient_norm()?;
        best = best.min(started.elapsed().as_secs_f64());
    }
    Ok(operations(&arch, f64::from(TOKENS), f64::from(TOKENS)) / best)
}

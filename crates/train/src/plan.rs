//! The plan of a run: its steps and sizes, known before a weight is loaded.

use crate::batches::{check_size, longest_row, measured, used};
use crate::sampler::Sampler;
use crate::{Error, Result, Scheduler, Settings};
use serde::Serialize;
use suasion_data::{IGNORE, Sample};
use suasion_engine::{Architecture, Budget};

/// Up to this many rows, every micro-batch of a run is sized to find the largest; a longer run is bounded by
/// its longest rows.
const EXACT_ROWS: u64 = 50_000_000;

/// The plan of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// Training rows, those in packs included.
    pub rows: u64,
    /// Packs of training rows, which steps and micro-batches then count; `None` if no row is packed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub packs: Option<u64>,
    /// Rows to evaluate on, those in packs included.
    pub eval_rows: u64,
    /// Ranks that share the work.
    pub ranks: u64,
    /// Passes over the training rows.
    pub epochs: f64,
    /// Optimizer steps in a pass.
    pub steps_per_epoch: u64,
    /// Micro-batches in a pass.
    pub micro_batches_per_epoch: u64,
    /// Optimizer steps of the run.
    pub total_steps: u64,
    /// Warm-up steps.
    pub warmup_steps: u64,
    /// Tokens of the training rows; a prompt that rows of a pack share counts once.
    pub tokens_per_epoch: u64,
    /// Targets of the training rows, the tokens that are learned.
    pub targets_per_epoch: u64,
    /// Targets over tokens.
    pub supervised_share: f64,
    /// Tokens of the longest row, training or evaluation.
    pub longest_row: u64,
    /// The budget of the run's model.
    #[serde(skip)]
    pub budget: Budget,
    /// Warnings about the settings.
    pub warnings: Vec<String>,
}

impl Plan {
    /// Plans a run of one rank.
    ///
    /// # Errors
    /// As [`Plan::of_ranks`].
    pub fn new(train: &[Sample], eval: &[Sample], settings: &Settings) -> Result<Plan> {
        Plan::of_ranks(train, eval, settings, 1)
    }

    /// Plans a run of this many ranks.
    ///
    /// # Errors
    /// [`Error::NoTargets`] without a training target, [`Error::BatchTooLarge`] for a batch that cannot be
    /// indexed.
    pub fn of_ranks(train: &[Sample], eval: &[Sample], settings: &Settings, ranks: usize) -> Result<Plan> {
        let sizes: Vec<(usize, usize)> = train
            .iter()
            .map(|sample| match sample.targets().count() {
                0 => (0, 0),
                targets => (used(sample), targets),
            })
            .collect();
        let tokens: u64 = sizes.iter().map(|size| size.0 as u64).sum();
        let targets: u64 = sizes.iter().map(|size| size.1 as u64).sum();
        if targets == 0 {
            return Err(Error::NoTargets { rows: train.len(), what: "training rows" });
        }
        let mut sampler = Sampler::of_ranks(train.len(), settings, ranks);
        let total_steps = sampler.total_steps(settings);
        let (batch_tokens, batch_targets) = largest_micro_batch(&sizes, &mut sampler, settings, total_steps);
        check_size("per_device_train_batch_size", batch_tokens)?;
        let evaluation = eval_budget(eval, settings.per_device_eval_batch_size);
        check_size("per_device_eval_batch_size", evaluation.tokens)?;
        let mut warnings = Vec::new();
        let warmup_steps = settings.warmup(total_steps);
        let scheduler = settings.lr_scheduler_type;
        if !scheduler.warms_up() && warmup_steps > 0 {
            let remedy = match scheduler {
                Scheduler::Constant => "; use constant_with_warmup for a warm-up",
                _ => "",
            };
            warnings.push(format!(
                "lr_scheduler_type {scheduler} has no warm-up, as in transformers: the {warmup_steps} warm-up steps have no \
                 effect{remedy}"
            ));
        }
        if scheduler.warms_up() && warmup_steps >= total_steps {
            warnings.push(format!(
                "the warm-up ({warmup_steps} steps) is not shorter than the run ({total_steps} steps): the schedule never \
                 reaches learning_rate"
            ));
        }
        let rows = |samples: &[Sample]| samples.iter().map(|sample| sample.rows() as u64).sum();
        Ok(Plan {
            rows: rows(train),
            packs: train.iter().any(|sample| sample.pack.is_some()).then_some(train.len() as u64),
            eval_rows: rows(eval),
            ranks: ranks as u64,
            epochs: match settings.max_steps {
                Some(_) => sampler.epoch(total_steps),
                None => settings.num_train_epochs,
            },
            steps_per_epoch: sampler.steps_per_epoch(),
            micro_batches_per_epoch: sampler.micro_batches_per_epoch(),
            total_steps,
            warmup_steps,
            tokens_per_epoch: tokens,
            targets_per_epoch: targets,
            supervised_share: targets as f64 / tokens as f64,
            longest_row: train.iter().chain(eval).map(longest_row).max().unwrap_or(0) as u64,
            budget: Budget {
                tokens: batch_tokens.max(evaluation.tokens),
                targets: batch_targets.max(evaluation.targets),
                train: true,
                recompute: settings.gradient_checkpointing,
            },
            warnings,
        })
    }

    /// Refuses rows that the model cannot read ([`check_row`]).
    pub fn check_model(&self, arch: &Architecture, train: &[Sample], eval: &[Sample]) -> Result<()> {
        train.iter().chain(eval).try_for_each(|sample| check_row(arch, sample))
    }
}

/// Refuses a row that the model cannot read: an id or label outside its vocabulary, or more tokens than it
/// has learned positions.
pub fn check_row(arch: &Architecture, sample: &Sample) -> Result<()> {
    let tokens = longest_row(sample);
    if let Some(limit) = arch.position_limit().filter(|&limit| tokens > limit) {
        return Err(Error::TooLong { id: sample.id.clone(), tokens, limit });
    }
    let vocab = arch.vocab_size;
    let outside = |token: i64| token < 0 || token >= vocab as i64;
    for (position, (&id, &label)) in sample.input_ids.iter().zip(&sample.labels).enumerate() {
        let token = match (outside(i64::from(id)), label != IGNORE && outside(i64::from(label))) {
            (true, _) => i64::from(id),
            (_, true) => i64::from(label),
            _ => continue,
        };
        return Err(Error::Vocabulary { id: sample.id.clone(), token, position, vocab });
    }
    Ok(())
}

/// The budget of a model that only evaluates these rows.
pub fn eval_budget(samples: &[Sample], batch_size: usize) -> Budget {
    let mut budget = Budget { tokens: 1, targets: 1, train: false, recompute: false };
    for rows in samples.chunks(batch_size.max(1)) {
        budget.tokens = budget.tokens.max(rows.iter().map(used).sum());
        budget.targets = budget.targets.max(rows.iter().map(|row| measured(row).count()).sum());
    }
    budget
}

/// The largest number of tokens, and of targets, of any micro-batch of the run.
fn largest_micro_batch(
    sizes: &[(usize, usize)],
    sampler: &mut Sampler,
    settings: &Settings,
    total_steps: u64,
) -> (usize, usize) {
    let batch = settings.per_device_train_batch_size;
    // In file order every epoch is the same.
    let steps =
        if settings.shuffle_dataset { total_steps } else { total_steps.min(sampler.steps_per_epoch()) };
    let rows = steps.saturating_mul(sampler.rows_per_step());
    if rows > EXACT_ROWS {
        let longest = |pick: fn(&(usize, usize)) -> usize| {
            let mut all: Vec<usize> = sizes.iter().map(pick).collect();
            all.sort_unstable_by(|a, b| b.cmp(a));
            all.iter().take(batch).sum()
        };
        return (longest(|size| size.0), longest(|size| size.1));
    }
    let mut most = (0, 0);
    for step in 0..steps {
        for rows in sampler.step(step) {
            let sum = |pick: fn(&(usize, usize)) -> usize| rows.iter().map(|&row| pick(&sizes[row])).sum();
            most = (most.0.max(sum(|size| size.0)), most.1.max(sum(|size| size.1)));
        }
    }
    most
}

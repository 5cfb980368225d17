//! Where a run stands, and which runs may continue from there.

use crate::run::Identity;
use crate::{Error, Evaluation, Plan, Result, Scheduler, Settings};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use suasion_data::policy::Objective;
use suasion_engine::WeightType;

/// Version of [`RunState`]; a checkpoint of another one is refused.
pub const FORMAT: u32 = 1;

/// The steps that a run has taken, over all resumes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Steps finished.
    pub step: u64,
    /// Steps that changed the weights (AdamW counts these).
    pub updates: u64,
    /// Tokens computed.
    pub tokens: u64,
    /// Targets learned.
    pub targets: u64,
    /// Sum of the steps' losses.
    pub loss_sum: f64,
    /// Steps without a target.
    pub skipped_steps: u64,
    /// Time spent in steps.
    pub seconds: f64,
}

/// Where a run stands; written as `suasion_state.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunState {
    /// [`FORMAT`].
    pub format: u32,
    /// Version of the program that wrote it.
    pub suasion: String,
    /// What is learned: recorded so that no other objective continues here.
    pub objective: Objective,
    /// The data's fingerprint.
    pub data_fingerprint: String,
    /// Version of the rules that made the labels.
    pub masking_version: u32,
    /// The steps so far.
    #[serde(flatten)]
    pub progress: Progress,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Steps that warm up.
    pub warmup_steps: u64,
    /// What an epoch draws from: the training rows, or the packs that they lie in.
    pub rows: u64,
    /// The epoch (from 0) and the next micro-batch in it. For readers: both follow from `step`.
    pub position: (u64, u64),
    /// The seed of the rows' order, resolved.
    pub data_seed: u64,
    /// The settings.
    pub settings: Settings,
    /// What the final weights are written in, as `config.json` names it; those of a checkpoint are f32.
    #[serde(default)]
    pub weight_type: String,
    /// The last step after which the rows were evaluated.
    pub evaluated: Option<u64>,
    /// The lowest evaluation loss after the first step, and its step.
    pub best: Option<(u64, f64)>,
    /// The evaluation before the first step.
    pub before: Option<Evaluation>,
    /// The latest evaluation.
    pub latest: Option<Evaluation>,
    /// The evaluation of `best`.
    pub best_evaluation: Option<Evaluation>,
    /// Every other file of the checkpoint with its size.
    pub files: BTreeMap<String, u64>,
}

impl RunState {
    /// The state before the first step.
    pub(crate) fn new(
        settings: &Settings,
        identity: &Identity,
        plan: &Plan,
        weights: WeightType,
    ) -> RunState {
        RunState {
            format: FORMAT,
            suasion: env!("CARGO_PKG_VERSION").to_string(),
            objective: identity.objective,
            data_fingerprint: identity.data_fingerprint.clone(),
            masking_version: identity.masking_version,
            progress: Progress::default(),
            total_steps: plan.total_steps,
            warmup_steps: plan.warmup_steps,
            rows: plan.packs.unwrap_or(plan.rows),
            position: (0, 0),
            data_seed: settings.data_seed(),
            settings: settings.clone(),
            weight_type: weights.name().into(),
            evaluated: None,
            best: None,
            before: None,
            latest: None,
            best_evaluation: None,
            files: BTreeMap::new(),
        }
    }

    /// Refuses to continue under another objective, over other data, or under settings with which the steps already
    /// made would have been others.
    ///
    /// What only watches may change: evaluation, logging, saving, and recomputation (it does not change a bit). The
    /// total may change under a constant schedule, because there no step knows it; under the others it sets every
    /// learning rate.
    pub(crate) fn check(&self, dir: &Path, now: &RunState) -> Result<()> {
        let dir = dir.to_path_buf();
        if self.objective != now.objective {
            return Err(Error::ResumeObjective { dir, was: self.objective, now: now.objective });
        }
        let data = [
            (
                "the labelling rules' version",
                self.masking_version.to_string(),
                now.masking_version.to_string(),
            ),
            ("the data's fingerprint", self.data_fingerprint.clone(), now.data_fingerprint.clone()),
            ("the number of training rows", self.rows.to_string(), now.rows.to_string()),
        ];
        if let Some((what, was, now)) = data.into_iter().find(|(_, was, now)| was != now) {
            return Err(Error::ResumeData { dir, what, was, now });
        }

        let (a, b) = (&self.settings, &now.settings);
        let mut differences = Vec::new();
        let mut same = |key: &str, was: String, is: String| {
            if was != is {
                differences.push(format!("{key}: was {was}, is {is}"));
            }
        };
        macro_rules! settings { ($($key:ident),*) => { $( same(stringify!($key), format!("{:?}", a.$key), format!("{:?}", b.$key)); )* } }
        settings!(
            per_device_train_batch_size,
            gradient_accumulation_steps,
            learning_rate,
            weight_decay,
            decay_all,
            adam_beta1,
            adam_beta2,
            adam_epsilon,
            max_grad_norm,
            seed,
            shuffle_dataset
        );
        same("data_seed", self.data_seed.to_string(), now.data_seed.to_string());
        same("lr_scheduler_type", a.lr_scheduler_type.to_string(), b.lr_scheduler_type.to_string());
        if a.lr_scheduler_type != Scheduler::Constant {
            same("warm-up steps", self.warmup_steps.to_string(), now.warmup_steps.to_string());
        }
        if !matches!(a.lr_scheduler_type, Scheduler::Constant | Scheduler::ConstantWithWarmup) {
            same("steps in all", self.total_steps.to_string(), now.total_steps.to_string());
        }
        if now.total_steps < self.progress.step {
            differences
                .push(format!("the run has {} steps, and {} are made", now.total_steps, self.progress.step));
        }
        if differences.is_empty() { Ok(()) } else { Err(Error::ResumeSettings { dir, differences }) }
    }
}

//! The state of a run, and the rules by which another run may continue it.

use crate::divergence::Watch;
use crate::json::pretty;
use crate::run::Identity;
use crate::sampler::Sampler;
use crate::schedule::PlateauState;
use crate::settings::{KEYS, OnResume};
use crate::{Error, Evaluation, Plan, Result, Settings};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use suasion_data::Objective;
use suasion_engine::WeightType;
use suasion_files::Written;

/// Version of [`RunState`]; a checkpoint with another version is refused.
pub const FORMAT: u32 = 2;

/// The finished steps of a run, over all resumes.
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
    /// Steps whose targets' weights sum to zero.
    pub skipped_steps: u64,
    /// Time spent in steps.
    pub seconds: f64,
}

/// What early stopping has seen of the evaluations during training, as transformers' `EarlyStoppingCallback` counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Patience {
    /// The best metric.
    pub best: Option<f64>,
    /// The last evaluations in a row that were not better by more than the threshold.
    pub bad: u64,
}

impl Patience {
    /// Counts an evaluation.
    pub fn see(&mut self, metric: f64, settings: &Settings) {
        let better = |best: f64| settings.is_better(metric, best);
        let far = |best: f64| (metric - best).abs() > settings.early_stopping_threshold;
        self.bad = if self.best.is_none_or(|best| better(best) && far(best)) { 0 } else { self.bad + 1 };
        if self.best.is_none_or(better) {
            self.best = Some(metric);
        }
    }
}

/// The state of a run, written as `suasion_state.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunState {
    /// [`FORMAT`].
    pub format: u32,
    /// Version of the program that wrote the state.
    pub suasion: String,
    /// The objective of the run.
    pub objective: Objective,
    /// Fingerprint of the data.
    pub data_fingerprint: String,
    /// Version of the labelling rules.
    pub masking_version: u32,
    /// The finished steps.
    #[serde(flatten)]
    pub progress: Progress,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Warm-up steps.
    pub warmup_steps: u64,
    /// Training rows, or packs of them: the samples of an epoch.
    pub rows: u64,
    /// The offset between the number of a step and its position in data and schedule. It is not 0 where a run was extended under
    /// another batch size or with other data, and continues at the same position in the data.
    pub shift: i64,
    /// The epoch (from 0) and the next micro-batch in it. Informative: both follow from `step`.
    pub position: (u64, u64),
    /// The resolved seed of the rows' order.
    pub data_seed: u64,
    /// Ranks that shared the work.
    #[serde(default = "one")]
    pub ranks: usize,
    /// The settings.
    pub settings: Settings,
    /// What the final weights are written in, as `config.json` names it; those of a checkpoint are f32.
    #[serde(default)]
    pub weight_type: String,
    /// The fingerprint of the base under an adapter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// The step of the latest evaluation.
    pub evaluated: Option<u64>,
    /// The losses so far, for detecting a divergence.
    pub watch: Watch,
    /// Step and metric of the best evaluation.
    pub best: Option<(u64, f64)>,
    /// The step of a checkpoint that exists only because its evaluation was the best.
    #[serde(default)]
    pub best_only: Option<u64>,
    /// For ending the run early.
    #[serde(default)]
    pub patience: Patience,
    /// For schedules that follow evaluations.
    #[serde(default)]
    pub plateau: PlateauState,
    /// True if a run can be resumed from the checkpoint: it has what AdamW keeps.
    #[serde(default = "resumable")]
    pub resumable: bool,
    /// The evaluation before the first step.
    pub before: Option<Evaluation>,
    /// The latest evaluation.
    pub latest: Option<Evaluation>,
    /// The evaluation of `best`.
    pub best_evaluation: Option<Evaluation>,
    /// Size and hash of every other file of the checkpoint.
    pub files: BTreeMap<String, Written>,
    /// blake3 of this state with this field empty.
    pub checksum: String,
}

fn one() -> usize {
    1
}

/// Checkpoints without the field are.
fn resumable() -> bool {
    true
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
            shift: 0,
            position: (0, 0),
            data_seed: settings.data_seed(),
            ranks: plan.ranks as usize,
            settings: settings.clone(),
            weight_type: weights.name().into(),
            base: None,
            evaluated: None,
            watch: Watch::default(),
            best: None,
            best_only: None,
            patience: Patience::default(),
            plateau: PlateauState::default(),
            resumable: true,
            before: None,
            latest: None,
            best_evaluation: None,
            files: BTreeMap::new(),
            checksum: String::new(),
        }
    }

    /// The checksum of the state.
    pub(crate) fn sum(&self) -> String {
        Written::of_bytes(&pretty(&RunState { checksum: String::new(), ..self.clone() })).blake3
    }

    /// Refuses to continue with another objective, other data, or settings under which the finished steps
    /// would have been different ([`OnResume`]). With `extend`, other data and settings are returned, one clause each,
    /// instead of refused.
    ///
    /// The total number of steps may change only under a schedule whose learning rates do not depend on it.
    pub(crate) fn check(&self, dir: &Path, now: &RunState, extend: bool) -> Result<Vec<String>> {
        let dir = dir.to_path_buf();
        if self.objective != now.objective {
            return Err(Error::ResumeObjective { dir, was: self.objective, now: now.objective });
        }
        if self.base != now.base {
            let [was, now] =
                [&self.base, &now.base].map(|of| of.clone().unwrap_or_else(|| "no adapter".into()));
            return Err(Error::ResumeData {
                dir,
                what: "the fingerprint of the adapter's base model",
                was,
                now,
            });
        }
        let mut differences = Vec::new();
        let mut same = |key: &str, was: String, is: String| {
            if was != is {
                differences.push(format!("{key}: was {was}, is {is}"));
            }
        };
        let data = [
            (
                "the labelling rules' version",
                self.masking_version.to_string(),
                now.masking_version.to_string(),
            ),
            ("the data's fingerprint", self.data_fingerprint.clone(), now.data_fingerprint.clone()),
            ("the number of training rows", self.rows.to_string(), now.rows.to_string()),
        ];
        for (what, was, now) in data.into_iter().filter(|(_, was, now)| was != now) {
            if !extend {
                return Err(Error::ResumeData { dir, what, was, now });
            }
            same(what, was, now);
        }

        for key in KEYS.iter().filter(|key| key.on_resume == OnResume::Same) {
            same(key.name, key.value(&self.settings), key.value(&now.settings));
        }
        if self.micro_batches() != now.micro_batches() {
            same("gradient_accumulation_steps", self.accumulation(), now.accumulation());
        }
        same("data_seed", self.data_seed.to_string(), now.data_seed.to_string());
        let scheduler = self.settings.lr_scheduler_type;
        if scheduler.warms_up() {
            same("warm-up steps", self.warmup_steps.to_string(), now.warmup_steps.to_string());
        }
        if scheduler.depends_on_total() {
            same("total steps", self.total_steps.to_string(), now.total_steps.to_string());
        }
        let finished = self.progress.step;
        if now.total_steps < finished {
            let clause = format!("the run has {} steps, but {finished} are finished", now.total_steps);
            return Err(Error::ResumeSettings { dir, differences: vec![clause] });
        }
        if extend || differences.is_empty() {
            Ok(differences)
        } else {
            Err(Error::ResumeSettings { dir, differences })
        }
    }

    /// Micro-batches in a step, of all ranks.
    fn micro_batches(&self) -> usize {
        self.settings.gradient_accumulation_steps.saturating_mul(self.ranks)
    }

    fn accumulation(&self) -> String {
        let each = self.settings.gradient_accumulation_steps;
        match self.ranks {
            1 => each.to_string(),
            ranks => format!("{each} on each of {ranks} ranks"),
        }
    }

    /// The shift with which a run with another state's rows and settings continues at this one's position in the data.
    pub(crate) fn shift_under(&self, now: &RunState) -> i64 {
        let sampler = |of: &RunState| Sampler::of_ranks(of.rows as usize, &of.settings, of.ranks);
        let (was, now) = (sampler(self), sampler(now));
        if was.steps_per_epoch() == now.steps_per_epoch() {
            return self.shift;
        }
        let epochs = was.epoch(self.progress.step.saturating_add_signed(-self.shift));
        let place = (epochs * now.steps_per_epoch() as f64).round() as i64;
        self.progress.step as i64 - place
    }
}

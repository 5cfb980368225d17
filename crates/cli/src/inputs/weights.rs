//! Models with their initial weights.

use crate::config::{Config, Init};
use crate::machine;
use crate::ui::Ui;
use std::path::Path;
use suasion_data::report::format::count;
use suasion_engine::{Architecture, Budget, Device, MemoryPlan, Model, Optimizer, Trainable};
use suasion_train::Settings;

/// Builds models with the same initial weights.
pub struct Start<'a> {
    /// Shows the warning about tensors that are not used.
    ui: &'a Ui,
    /// The model's folder.
    dir: &'a Path,
    /// Its config.json.
    arch: &'a Architecture,
    /// From the folder, or random.
    init: Init,
    /// The seed of random weights.
    seed: u64,
    /// What a model that trains is made for.
    settings: Settings,
    /// True once the warning was shown.
    warned: bool,
}

impl<'a> Start<'a> {
    /// The weights that a configuration selects: those in `dir`, or random ones.
    pub fn new(ui: &'a Ui, dir: &'a Path, arch: &'a Architecture, config: &Config) -> Start<'a> {
        let settings = config.settings();
        Start { ui, dir, arch, init: config.init, seed: settings.seed, settings, warned: false }
    }

    /// The weights in `dir`: those of a finished run.
    pub fn from_dir(ui: &'a Ui, dir: &'a Path, arch: &'a Architecture) -> Start<'a> {
        Start { ui, dir, arch, init: Init::Weights, seed: 0, settings: Settings::default(), warned: false }
    }

    /// A model with these weights; the same at every call.
    ///
    /// # Errors
    /// Where the model does not fit into the machine's memory, or its weights cannot be read.
    pub fn build(&mut self, budget: Budget) -> suasion_train::Result<Model> {
        // Linux grants memory that it does not have, and kills the process later without a message.
        let (trainable, optimizer) = match budget.train {
            true => (self.settings.choose(&self.arch.parameter_names())?, self.settings.optimizer()),
            false => (Trainable::All, Optimizer::default()),
        };
        let plan = MemoryPlan::with(self.arch, budget, &trainable)?;
        let average = if self.settings.ema_decay.is_some() { plan.gradients } else { 0 };
        let bytes = plan.under(optimizer, self.arch, &trainable)?.total().saturating_add(average);
        if machine::memory().0.is_some_and(|total| bytes > total) {
            return Err(suasion_engine::Error::Memory { bytes }.into());
        }
        let mut model = Model::with_trainable(self.arch.clone(), Device::cpu(), budget, &trainable)?;
        if budget.train {
            model.choose_optimizer(optimizer)?;
        }
        match self.init {
            Init::Random => model.init_random(self.seed)?,
            Init::Weights => {
                let unused = model.load_weights(self.dir)?;
                if !unused.is_empty() && !std::mem::replace(&mut self.warned, true) {
                    let more = if unused.len() > 3 { ", …" } else { "" };
                    let names = unused[..unused.len().min(3)].join(", ");
                    self.ui.warn(format_args!(
                        "{}: {} not used by {}: {names}{more}",
                        self.dir.display(),
                        count(unused.len() as u64, "tensor"),
                        self.arch.model_type
                    ));
                }
            }
        }
        Ok(model)
    }
}

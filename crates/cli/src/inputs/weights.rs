//! Models with their initial weights.

use crate::config::{Config, Init};
use crate::machine;
use crate::ui::Ui;
use std::path::Path;
use suasion_data::report::format::count;
use suasion_engine::{Architecture, Budget, Device, MemoryPlan, Model};

/// What a process has besides a model: its code, its threads, a tokenizer, rows.
const PROCESS: u64 = 48 << 20;

/// Bytes that a process needs with a model of this plan: while a tensor is read or written it is there twice more, in
/// f32 and in the file's type, and the largest is the embedding.
pub fn needed(arch: &Architecture, plan: &MemoryPlan) -> u64 {
    plan.total() + 8 * arch.vocab_size as u64 * arch.hidden as u64 + PROCESS
}

/// Refuses a model that does not fit into the machine's memory. Linux grants memory that it does not have, and kills the
/// process later without a message.
pub fn check_memory(arch: &Architecture, budget: Budget) -> suasion_train::Result<()> {
    let bytes = needed(arch, &MemoryPlan::of(arch, budget));
    match machine::memory().0 {
        Some(total) if bytes > total => Err(suasion_engine::Error::Memory { bytes }.into()),
        _ => Ok(()),
    }
}

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
    /// True once the warning was shown.
    warned: bool,
}

impl<'a> Start<'a> {
    /// The weights that a configuration selects: those in `dir`, or random ones.
    pub fn new(ui: &'a Ui, dir: &'a Path, arch: &'a Architecture, config: &Config) -> Start<'a> {
        Start { ui, dir, arch, init: config.init, seed: config.train.seed, warned: false }
    }

    /// The weights in `dir`: those of a finished run.
    pub fn from_dir(ui: &'a Ui, dir: &'a Path, arch: &'a Architecture) -> Start<'a> {
        Start { ui, dir, arch, init: Init::Weights, seed: 0, warned: false }
    }

    /// A model with these weights; the same at every call.
    ///
    /// # Errors
    /// Where the model does not fit into the machine's memory, or its weights cannot be read.
    pub fn build(&mut self, budget: Budget) -> suasion_train::Result<Model> {
        check_memory(self.arch, budget)?;
        let mut model = Model::new(self.arch.clone(), Device::cpu(), budget)?;
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

//! A model as a user names it: its folder, and the adapter over it.

use super::model;
use super::vocabulary::Vocabulary;
use super::weights::{self, Adapter, Start, planned};
use crate::config::{Config, Init};
use crate::failure::Failure;
use crate::ui::Ui;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use suasion_data::ModelFolder;
use suasion_engine::{AdapterFolder, Architecture, Base, MemoryPlan, Trainable};
use suasion_train::Settings;

/// A model that is opened, without its weights.
pub struct Opened {
    /// Tokenizer and chat template: the adapter's, where it has its own.
    pub folder: Arc<ModelFolder>,
    pub arch: Architecture,
    /// The folder of the weights.
    pub base: PathBuf,
    pub adapter: Option<Adapter>,
    /// What is trained without an adapter.
    chosen: Trainable,
}

impl Opened {
    /// The model of a configuration, with the adapter that it names.
    ///
    /// # Errors
    /// As [`Opened::named`]; [`Failure`] where no model is named.
    pub fn of(config: &Config, ui: &Ui) -> anyhow::Result<Opened> {
        let (model, adapter) = (config.model_name_or_path.as_deref(), config.adapter_name_or_path.as_deref());
        Opened::named(model, adapter, config.init, &Vocabulary::of(config, ui)?, ui)
    }

    /// A model by its folder or hub id, and an adapter over it, with what is changed in its vocabulary. A model that is an adapter's folder stands for the adapter
    /// over its base; an adapter without a model is over its base.
    ///
    /// # Errors
    /// If the model, the adapter or its base is not found or cannot be used.
    pub fn named(
        model: Option<&Path>,
        adapter: Option<&Path>,
        init: Init,
        vocabulary: &Vocabulary,
        ui: &Ui,
    ) -> anyhow::Result<Opened> {
        let adapter = match adapter.or(model.filter(|model| AdapterFolder::is_one(model))) {
            Some(path) => Some(model::adapter(path)?),
            None => None,
        };
        let model = model.filter(|model| !AdapterFolder::is_one(model));
        let base = match (model, &adapter) {
            (Some(model), _) => model::resolve(model, init == Init::Weights, ui)?,
            (None, Some(adapter)) => model::base_of(adapter, ui)?,
            (None, None) => {
                return Err(Failure::usage(
                    "no model is named",
                    "give --model M, or model_name_or_path in CONFIG",
                )
                .into());
            }
        };
        if adapter.is_some() && init == Init::Random {
            return Err(random_base().into());
        }
        let (mut folder, mut arch) = model::with_architecture(&base, init, &vocabulary.changes, ui)?;
        let chosen = Trainable::All;
        // Rows that an adapter brings need no others.
        let held = adapter.as_ref().map(|adapter| adapter.vocabulary(&arch)).transpose()?.flatten();
        arch.grow(held.unwrap_or(0), 0);
        vocabulary.grow(&mut arch, &mut folder)?;
        let Some(adapter) = adapter else {
            return Ok(Opened { folder: Arc::new(folder), arch, base, adapter: None, chosen });
        };
        let lora = adapter.lora_for(&arch)?;
        if adapter.path.join("tokenizer.json").is_file() {
            folder = model::beside(&adapter.path, &folder, &vocabulary.changes, ui)?;
        }
        let adapter = Some(Adapter { lora, from: Some(adapter.path) });
        Ok(Opened { folder: Arc::new(folder), arch, base, adapter, chosen })
    }

    /// The same with the adapter that a run trains: the one that was opened, or a new one if the configuration requests
    /// it.
    ///
    /// # Errors
    /// If the configuration's adapter does not fit the model.
    pub fn for_training(mut self, config: &Config) -> anyhow::Result<Opened> {
        if config.use_peft && self.adapter.is_none() {
            if config.init == Init::Random {
                return Err(random_base().into());
            }
            let lora = config.lora(&self.arch)?;
            self.adapter = Some(Adapter { lora, from: None });
        }
        self = self.choosing(config)?;
        // Refused before rows are read.
        let packing = config.settings().packing();
        let base = weights::base(&self.arch, packing)?;
        if let (Base::Packed(packing), None) = (base, &self.adapter) {
            return Err(Failure::config(
                format!("the base is in {} bits, which cannot be trained", packing.bits()),
                "train an adapter over it with use_peft=true, or load the original weights in their own type",
            )
            .into());
        }
        suasion_engine::params::ParameterMap::over(&self.arch, &self.trainable(), base)?;
        Ok(self)
    }

    /// The same with the configuration's choice of what is trained.
    ///
    /// # Errors
    /// Patterns that match nothing, and a choice under an adapter.
    pub fn choosing(mut self, config: &Config) -> anyhow::Result<Opened> {
        let settings = config.settings();
        if let Some(factor) = settings.router_aux_loss_coef {
            if factor != 0.0 && self.arch.experts().is_none() {
                return Err(Failure::config(
                    format!("router_aux_loss_coef={factor}: a {} model has no experts", self.arch.model_type),
                    "leave it out",
                )
                .into());
            }
            self.arch.balance = factor as f32;
        }
        let keys = [("trainable", &settings.trainable), ("freeze", &settings.freeze)];
        let given = keys.into_iter().find(|(_, patterns)| !patterns.0.is_empty());
        match (&self.adapter, given) {
            (None, _) => self.chosen = settings.choose(&self.arch.parameter_names())?,
            (Some(_), None) => {}
            (Some(_), Some((key, _))) => {
                return Err(Failure::config(
                    format!("{key}: under an adapter the model's own parameters are frozen"),
                    "leave it out; modules that shall be trained whole belong in lora_modules_to_save",
                )
                .into());
            }
        }
        Ok(self)
    }

    /// What is trained.
    pub fn trainable(&self) -> Trainable {
        Adapter::trainable_or(self.adapter.as_ref(), &self.chosen)
    }

    /// The memory of a model with this budget, on each of `ranks` ranks.
    pub fn memory(&self, budget: suasion_engine::Budget, settings: &Settings, ranks: usize) -> MemoryPlan {
        let plan = planned(&self.arch, budget, &self.trainable(), settings, ranks);
        plan.unwrap_or_else(|_| MemoryPlan::of(&self.arch, budget)).over_files(&self.base)
    }

    /// Its weights.
    pub fn start<'a>(&'a self, ui: &'a Ui, config: &Config) -> Start<'a> {
        let start = Start::new(ui, &self.base, &self.arch, config).with_trainable(self.chosen.clone());
        start.with_adapter(self.adapter.as_ref())
    }
}

fn random_base() -> Failure {
    Failure::config(
        "init=random under an adapter: the random weights would be lost, and the adapter useless without them",
        "train the model whole, or give the adapter a base with weights",
    )
}

//! The keys of adapters as the engine takes them.

use super::choices::LoraInitName;
use super::table::{Config, Group, KEYS};
use crate::failure::Failure;
use suasion_engine::{Architecture, Lora, LoraInit, Targets};

impl Config {
    /// The new adapter of a run over a model.
    ///
    /// # Errors
    /// Where no modules are named, and PEFT has no choice for the model's family.
    pub fn lora(&self, arch: &Architecture) -> Result<Lora, Failure> {
        let targets = match &self.lora_target_modules[..] {
            [] => Targets::of_family(&arch.model_type).ok_or_else(|| {
                Failure::config(
                    format!(
                        "lora_target_modules is not given, and PEFT has no default for {}",
                        arch.model_type
                    ),
                    "name the modules, for example lora_target_modules: all-linear, or [q_proj, v_proj]",
                )
            })?,
            [one] if one.eq_ignore_ascii_case("all-linear") => Targets::AllLinear,
            [one] if one.contains(|c: char| !(c.is_alphanumeric() || "_-.".contains(c))) => {
                Targets::Pattern(one.clone())
            }
            names => Targets::Names(names.to_vec()),
        };
        Ok(Lora {
            rank: self.lora_r,
            alpha: self.lora_alpha,
            rslora: self.use_rslora,
            dora: self.use_dora,
            dropout: self.lora_dropout,
            targets,
            layers: (!self.lora_layers_to_transform.is_empty())
                .then(|| self.lora_layers_to_transform.clone()),
            layers_pattern: self.lora_layers_pattern.clone(),
            rank_pattern: self.lora_rank_pattern.clone().into_iter().collect(),
            alpha_pattern: self.lora_alpha_pattern.clone().into_iter().collect(),
            save: self.lora_modules_to_save.clone(),
            init: match self.lora_init {
                LoraInitName::True => LoraInit::Kaiming,
                LoraInitName::Gaussian => LoraInit::Gaussian,
                LoraInitName::False => LoraInit::Random,
            },
            ..Lora::default()
        })
    }

    /// Keys of a new adapter that would have no effect.
    pub(super) fn adapter_problems(&self) -> Vec<(String, &'static str)> {
        let default = Config::default();
        let of_adapter = KEYS.iter().filter(|key| key.group == Group::Adapter && key.name != "use_peft");
        let changed = of_adapter.filter(|key| (key.get)(self) != (key.get)(&default)).map(|key| key.name);
        let (why, help) = match (&self.adapter_name_or_path, self.use_peft) {
            (None, true) => return Vec::new(),
            (None, false) => {
                ("without use_peft=true", "set use_peft=true to train an adapter, or leave it out")
            }
            (Some(_), _) => (
                "with adapter_name_or_path, whose adapter has its own settings",
                "leave it out, or leave adapter_name_or_path out to begin a new adapter",
            ),
        };
        changed.map(|name| (format!("{name} has no effect {why}"), help)).collect()
    }
}

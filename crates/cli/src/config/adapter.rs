//! The keys of adapters as the engine takes them.

use super::choices::{ComputeDtype, Init, LoraInitName, MatmulPrecision};
use super::device::DeviceName;
use super::table::{Config, Group, KEYS};
use super::value::Value;
use crate::failure::Failure;
use suasion_engine::{Architecture, Lora, LoraInit, Targets};

impl Config {
    /// The new adapter of a run over a model.
    ///
    /// # Errors
    /// If no modules are named, and PEFT has no choice for the model's family.
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

    /// Keys of a packed base that contradict each other, or what is computed.
    pub(super) fn packing_problems(&self) -> Vec<(String, &'static str)> {
        let (four, eight) = (self.train.load_in_4bit, self.train.load_in_8bit);
        let mut problems = Vec::new();
        if four && eight {
            problems.push((
                "load_in_4bit=true and load_in_8bit=true contradict each other".into(),
                "keep one of them",
            ));
        }
        if (four || eight) && self.init == Init::Random {
            let key = if four { "load_in_4bit" } else { "load_in_8bit" };
            problems
                .push((format!("{key}=true with init=random: it is files that are packed"), "leave it out"));
        }
        let given = [
            ("use_bnb_nested_quant=true".to_string(), self.train.use_bnb_nested_quant),
            ("bnb_4bit_compute_dtype".to_string(), self.bnb_4bit_compute_dtype.is_some()),
        ];
        for (key, _) in given.into_iter().filter(|(_, given)| *given && !four) {
            problems.push((
                format!("{key} has no effect without load_in_4bit=true"),
                "set it, or leave this out",
            ));
        }
        if let Some(dtype) = self.bnb_4bit_compute_dtype {
            let cpu = self.use_cpu || self.device == DeviceName::Cpu;
            let rounded = matches!(self.matmul_precision, MatmulPrecision::Auto | MatmulPrecision::Bf16);
            let computed = if !cpu && rounded { ComputeDtype::Bfloat16 } else { ComputeDtype::Float32 };
            if dtype != computed {
                let name = |dtype: ComputeDtype| dtype.to_json().as_str().unwrap_or_default().to_string();
                let (on, help) = match cpu {
                    true => ("the CPU", "leave it out, or train on a card with device=cuda"),
                    false => {
                        ("this card", "leave it out; matmul_precision says what products on a card round to")
                    }
                };
                let (dtype, computed) = (name(dtype), name(computed));
                problems.push((
                    format!("bnb_4bit_compute_dtype={dtype}: products on {on} are of {computed}"),
                    help,
                ));
            }
        }
        problems
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

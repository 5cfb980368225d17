//! PEFT's adapter folders: `adapter_config.json` and `adapter_model.safetensors`.

use crate::arch::Architecture;
use crate::lora::{Lora, LoraInit, Targets};
use crate::params::{ParameterMap, module_name};
use crate::{Error, Result, weights};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// File of an adapter's settings.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";
/// File of an adapter's weights.
pub const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";

/// Prefix of the names of the base's modules.
const PREFIX: &str = "base_model.model.";

/// An adapter folder.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterFolder {
    /// Path of the folder.
    pub path: PathBuf,
    /// The settings of its `adapter_config.json`.
    pub lora: Lora,
    /// `base_model_name_or_path`: a folder or a hub id.
    pub base: Option<String>,
}

impl AdapterFolder {
    /// True if a folder holds an adapter.
    pub fn is_one(dir: &Path) -> bool {
        dir.join(ADAPTER_CONFIG).is_file()
    }

    /// Reads the settings.
    ///
    /// # Errors
    /// [`Error::Config`] for a broken file, and for settings that this engine does not compute, with their names.
    pub fn open(dir: &Path) -> Result<AdapterFolder> {
        let path = dir.join(ADAPTER_CONFIG);
        let text = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
        let json: Value = serde_json::from_slice(&text).map_err(|e| Error::Config {
            path: path.clone(),
            message: format!("not valid JSON: {e}"),
            help: "copy the adapter's folder again".into(),
        })?;
        let Value::Object(map) = &json else {
            return Err(Error::Config {
                path,
                message: "not an object".into(),
                help: "copy the adapter's folder again".into(),
            });
        };
        let fields = Fields { map, path: &path };
        let lora = fields.lora()?;
        let base = fields.text("base_model_name_or_path")?.filter(|base| !base.is_empty());
        if !dir.join(ADAPTER_WEIGHTS).is_file() {
            return Err(Error::Weights {
                path: dir.to_path_buf(),
                message: format!("no {ADAPTER_WEIGHTS} beside {ADAPTER_CONFIG}"),
                help: "adapters are read from safetensors only: save it with model.save_pretrained(..)"
                    .into(),
            });
        }
        Ok(AdapterFolder { path: dir.to_path_buf(), lora, base })
    }

    /// The settings for a model: without target names that none of its modules has, which PEFT ignores, and with the
    /// parameters of the base that the file replaces.
    ///
    /// # Errors
    /// [`Error::Weights`] for a damaged file.
    pub fn lora_for(&self, arch: &Architecture) -> Result<Lora> {
        let mut lora = self.lora.clone();
        let map = ParameterMap::of(arch);
        let linears: Vec<&str> = map.linears().map(|(_, part)| module_name(&part.name)).collect();
        let unknown: BTreeSet<String> = lora.unknown(&linears).into_iter().map(str::to_string).collect();
        if let Targets::Names(names) = &mut lora.targets {
            names.retain(|name| !unknown.contains(name));
        }
        let own: BTreeMap<String, &str> = map
            .parameters
            .iter()
            .map(|p| (p.name.as_str(), p))
            .chain([(arch.names.head, &map.parameters[map.embedding.parameter])])
            .map(|(name, p)| match name == arch.names.head {
                true => (format!("{}.weight", module_name(name)), arch.names.head),
                false => {
                    let ending = name.rsplit_once('.').map_or("", |(_, ending)| ending);
                    (format!("{}.{ending}", module_name(p.module())), name)
                }
            })
            .collect();
        let saved = Lora { save: lora.save.clone(), ..Lora::default() };
        let saved = crate::lora::Rules::of(&saved)?;
        weights::shapes(&self.path.join(ADAPTER_WEIGHTS), |name, _| {
            let Some(name) = name.strip_prefix(PREFIX) else { return };
            let name = name.replace(".base_layer.", ".");
            let module = name.rsplit_once('.').map_or(name.as_str(), |(module, _)| module);
            if let Some(parameter) = own.get(&name).filter(|_| !saved.saves(module)) {
                let parameter = if *parameter == arch.names.head {
                    format!("{parameter}.weight")
                } else {
                    parameter.to_string()
                };
                lora.replaced.insert(parameter);
            }
        })?;
        Ok(lora)
    }
}

impl AdapterFolder {
    /// Rows of the embedding or head that the adapter holds, if it holds one: the size of its vocabulary.
    ///
    /// # Errors
    /// [`Error::Weights`] for a damaged file.
    pub fn vocabulary(&self, arch: &Architecture) -> Result<Option<usize>> {
        let names =
            [arch.names.embedding, module_name(arch.names.head)].map(|name| format!("{PREFIX}{name}.weight"));
        let mut rows = None;
        weights::shapes(&self.path.join(ADAPTER_WEIGHTS), |name, shape| {
            let name = name.replace(".base_layer.", ".");
            if let (true, [count, _]) = (names.contains(&name), shape) {
                rows = rows.max(Some(*count));
            }
        })?;
        Ok(rows)
    }
}

/// The fields of an `adapter_config.json`.
struct Fields<'a> {
    map: &'a Map<String, Value>,
    path: &'a Path,
}

/// Fields that change what an adapter computes, of which only the default is supported.
const UNSUPPORTED: [(&str, &str); 17] = [
    ("target_parameters", "adapters of parameters that are no modules (experts) are not computed"),
    ("trainable_token_indices", "training some rows of the embedding is not computed"),
    ("layer_replication", "repeated layers are not computed"),
    ("alora_invocation_tokens", "activated LoRA is not computed"),
    ("arrow_config", "routing between adapters is not computed"),
    ("megatron_config", "Megatron's layers are not computed"),
    ("use_qalora", "QALoRA is not computed"),
    ("use_bdlora", "block-diagonal LoRA is not computed"),
    ("velora_config", "VeLoRA is not computed"),
    ("kasa_config", "KaSA changes the base's weights"),
    ("monteclora_config", "MonteCLoRA is not computed"),
    ("corda_config", "CorDA changes the base's weights"),
    ("lora_ga_config", "LoRA-GA changes the base's weights"),
    ("loftq_config", "LoftQ changes the base's weights"),
    ("ensure_weight_tying", "adapters of tied layers are kept apart, as PEFT does without it"),
    ("lora_bias", "biases of B are not computed"),
    ("use_mora", "MoRA is not computed"),
];

/// Fields that do not change the computation, or that are read.
const KNOWN: [&str; 27] = [
    "peft_type",
    "peft_version",
    "task_type",
    "base_model_name_or_path",
    "auto_mapping",
    "revision",
    "inference_mode",
    "fan_in_fan_out",
    "megatron_core",
    "qalora_group_size",
    "eva_config",
    "runtime_config",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "init_lora_weights",
    "bias",
    "modules_to_tie",
];

impl Fields<'_> {
    fn fail<T>(&self, message: String, help: &str) -> Result<T> {
        Err(Error::Config { path: self.path.to_path_buf(), message, help: help.into() })
    }

    /// A field that is present and not null.
    fn get(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    fn wrong<T>(&self, name: &str, expected: &str) -> Result<T> {
        let found = self.get(name).unwrap_or(&Value::Null);
        self.fail(format!("{name} is {found}, not {expected}"), "copy the adapter's folder again")
    }

    fn text(&self, name: &str) -> Result<Option<String>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(_) => self.wrong(name, "a text"),
        }
    }

    fn flag(&self, name: &str) -> Result<bool> {
        self.get(name)
            .map_or(Ok(false), |value| value.as_bool().map_or_else(|| self.wrong(name, "true or false"), Ok))
    }

    fn number(&self, name: &str, default: f64) -> Result<f64> {
        self.get(name)
            .map_or(Ok(default), |value| value.as_f64().map_or_else(|| self.wrong(name, "a number"), Ok))
    }

    /// Strings: a list, or a single one.
    fn texts(&self, name: &str) -> Result<Vec<String>> {
        let texts = |items: &Vec<Value>| items.iter().map(|item| item.as_str().map(str::to_string)).collect();
        match self.get(name) {
            None => Ok(Vec::new()),
            Some(Value::String(one)) => Ok(vec![one.clone()]),
            Some(Value::Array(items)) => {
                let texts: Option<Vec<String>> = texts(items);
                texts.map_or_else(|| self.wrong(name, "a list of texts"), Ok)
            }
            Some(_) => self.wrong(name, "a list of texts"),
        }
    }

    fn targets(&self, name: &str) -> Result<Targets> {
        match self.get(name) {
            Some(Value::String(text)) if text.eq_ignore_ascii_case("all-linear") => Ok(Targets::AllLinear),
            Some(Value::String(pattern)) => Ok(Targets::Pattern(pattern.clone())),
            _ => Ok(Targets::Names(self.texts(name)?)),
        }
    }

    fn pattern<T>(&self, name: &str, value: impl Fn(&Value) -> Option<T>) -> Result<Vec<(String, T)>> {
        let Some(map) = self.get(name) else { return Ok(Vec::new()) };
        let entries = map.as_object().and_then(|map| {
            map.iter().map(|(pattern, of)| Some((pattern.clone(), value(of)?))).collect::<Option<Vec<_>>>()
        });
        entries.map_or_else(|| self.wrong(name, "a mapping of names to numbers"), Ok)
    }

    fn lora(&self) -> Result<Lora> {
        let kind = self.text("peft_type")?.unwrap_or_default();
        if kind != "LORA" {
            return self.fail(format!("peft_type is {kind:?}: LORA is computed (and DoRA, use_dora)"), MERGE);
        }
        let nothing = |value: &Value| {
            value.is_null()
                || *value == false
                || value.as_object().is_some_and(Map::is_empty)
                || value.as_array().is_some_and(Vec::is_empty)
        };
        for (name, value) in self.map.iter().filter(|(_, value)| !nothing(value)) {
            let name = name.as_str();
            if let Some((_, why)) = UNSUPPORTED.iter().find(|(unsupported, _)| *unsupported == name) {
                return self.fail(format!("{name} = {value}: {why}"), MERGE);
            }
            if !KNOWN.contains(&name) {
                return self.fail(format!("{name} = {value}: a field that suasion does not know"), MERGE);
            }
        }
        if let Some(task) = self.text("task_type")?.filter(|task| task != "CAUSAL_LM") {
            return self
                .fail(format!("task_type is {task:?}, not CAUSAL_LM"), "use an adapter of a language model");
        }
        if let Some(bias) = self.text("bias")?.filter(|bias| bias != "none") {
            return self.fail(
                format!("bias is {bias:?}: biases of the base are not trained with an adapter"),
                MERGE,
            );
        }
        let init = match self.get("init_lora_weights") {
            None | Some(Value::Bool(true)) => LoraInit::Kaiming,
            Some(Value::Bool(false)) => LoraInit::Random,
            Some(Value::String(text)) if text == "gaussian" => LoraInit::Gaussian,
            // These differ only in their initial values; trained weights are read as they are.
            Some(Value::String(text)) if text == "eva" || text == "orthogonal" => LoraInit::Kaiming,
            Some(other) => {
                return self
                    .fail(format!("init_lora_weights = {other}: it changes the base's weights"), MERGE);
            }
        };
        let layers = match self.get("layers_to_transform") {
            None => None,
            Some(Value::Array(items)) => {
                let layers: Option<Vec<usize>> =
                    items.iter().map(|item| Some(item.as_u64()? as usize)).collect();
                Some(layers.map_or_else(|| self.wrong("layers_to_transform", "a list of numbers"), Ok)?)
            }
            Some(one) => match one.as_u64() {
                Some(one) => Some(vec![one as usize]),
                None => return self.wrong("layers_to_transform", "a list of numbers"),
            },
        };
        let rank = self.number("r", 8.0)?;
        if !(rank >= 1.0 && rank.fract() == 0.0 && rank < 1e6) {
            return self.wrong("r", "a rank");
        }
        Ok(Lora {
            rank: rank as usize,
            alpha: self.number("lora_alpha", 8.0)?,
            rslora: self.flag("use_rslora")?,
            dora: self.flag("use_dora")?,
            dropout: self.number("lora_dropout", 0.0)?,
            targets: self.targets("target_modules")?,
            exclude: self.targets("exclude_modules")?,
            layers,
            layers_pattern: self.texts("layers_pattern")?,
            rank_pattern: self.pattern("rank_pattern", |rank| Some(rank.as_u64()? as usize))?,
            alpha_pattern: self.pattern("alpha_pattern", Value::as_f64)?,
            save: self.texts("modules_to_save")?,
            init,
            replaced: BTreeSet::new(),
        })
    }
}

const MERGE: &str =
    "merge it in Python: AutoPeftModelForCausalLM.from_pretrained(..).merge_and_unload().save_pretrained(..)";

/// The `adapter_config.json` of an adapter for a model: the fields that PEFT writes, in its order.
///
/// # Errors
/// [`Error::Parameter`] for an adapter that does not fit the model.
pub fn adapter_config(lora: &Lora, arch: &Architecture, base: &str) -> Result<Value> {
    let number = |x: f64| if x.fract() == 0.0 && x.abs() < 1e15 { json!(x as i64) } else { json!(x) };
    let texts = |texts: &[String]| if texts.is_empty() { Value::Null } else { json!(texts) };
    let targets = |of: &Targets| match of {
        Targets::Names(names) => texts(names),
        Targets::Pattern(pattern) => json!(pattern),
        Targets::AllLinear => json!("all-linear"),
    };
    let target_modules = match &lora.targets {
        Targets::AllLinear => json!(all_linear(arch)),
        of => targets(of),
    };
    let alphas: Map<String, Value> =
        lora.alpha_pattern.iter().map(|(name, alpha)| (name.clone(), number(*alpha))).collect();
    let ranks: Map<String, Value> =
        lora.rank_pattern.iter().map(|(name, rank)| (name.clone(), json!(rank))).collect();
    let init = match lora.init {
        LoraInit::Kaiming => json!(true),
        LoraInit::Gaussian => json!("gaussian"),
        LoraInit::Random => json!(false),
    };
    Ok(json!({
        "alpha_pattern": alphas,
        "auto_mapping": null,
        "base_model_name_or_path": base,
        "bias": "none",
        "corda_config": null,
        "ensure_weight_tying": false,
        "eva_config": null,
        "exclude_modules": targets(&lora.exclude),
        "fan_in_fan_out": arch.names.transposed,
        "inference_mode": true,
        "init_lora_weights": init,
        "layer_replication": null,
        "layers_pattern": texts(&lora.layers_pattern),
        "layers_to_transform": lora.layers,
        "loftq_config": {},
        "lora_alpha": number(lora.alpha),
        "lora_bias": false,
        "lora_dropout": lora.dropout,
        "megatron_config": null,
        "megatron_core": "megatron.core",
        "modules_to_save": texts(&lora.save),
        "peft_type": "LORA",
        "qalora_group_size": 16,
        "r": lora.rank,
        "rank_pattern": ranks,
        "revision": null,
        "target_modules": target_modules,
        "target_parameters": null,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": null,
        "use_dora": lora.dora,
        "use_qalora": false,
        "use_rslora": lora.rslora,
    }))
}

/// Every linear layer except the head, by the last parts of their names unless another layer has the same.
fn all_linear(arch: &Architecture) -> Vec<String> {
    let map = ParameterMap::of(arch);
    let head = module_name(arch.names.head);
    let linears = map.linears().map(|(_, part)| module_name(&part.name));
    let mut names: Vec<String> = linears
        .filter(|name| *name != head)
        .map(|name| name.rsplit_once('.').map_or(name, |(_, end)| end).to_string())
        .collect();
    names.sort();
    names.dedup();
    names
}

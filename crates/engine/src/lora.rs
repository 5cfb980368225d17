//! The settings of a low-rank adapter, and the choice of its modules: PEFT's `LoraConfig`, with its rules.

use crate::{Error, Result};
use fancy_regex::Regex;
use std::collections::BTreeSet;

/// A low-rank adapter (Hu et al. 2021): `y += scale · (dropout(x) · Aᵀ) · Bᵀ` on linear layers. The comments give the
/// names of the fields of PEFT's `LoraConfig` where these differ.
#[derive(Clone, Debug, PartialEq)]
pub struct Lora {
    /// `r`: rows of `A` and columns of `B`.
    pub rank: usize,
    /// `lora_alpha`: numerator of the scale.
    pub alpha: f64,
    /// Use the scale `alpha / √rank` instead of `alpha / rank` (`use_rslora`).
    pub rslora: bool,
    /// Train a factor for each output of a layer (`use_dora`, Liu et al. 2024).
    pub dora: bool,
    /// `lora_dropout`.
    pub dropout: f64,
    /// `target_modules`.
    pub targets: Targets,
    /// `exclude_modules`.
    pub exclude: Targets,
    /// `layers_to_transform`: numbers of layers; `None` means all.
    pub layers: Option<Vec<usize>>,
    /// Names of the lists of layers; empty means any.
    pub layers_pattern: Vec<String>,
    /// Ranks of some modules, by a regular expression of the end of their names. The first that matches applies.
    pub rank_pattern: Vec<(String, usize)>,
    /// Alphas of some modules.
    pub alpha_pattern: Vec<(String, f64)>,
    /// `modules_to_save`: ends of the names of modules that are trained fully, in a copy.
    pub save: Vec<String>,
    /// `init_lora_weights`.
    pub init: LoraInit,
    /// Parameters of the base that the adapter's file replaces without training them (`save_embedding_layers`).
    pub replaced: BTreeSet<String>,
}

impl Default for Lora {
    /// PEFT's defaults, without targets.
    fn default() -> Lora {
        Lora {
            rank: 8,
            alpha: 8.0,
            rslora: false,
            dora: false,
            dropout: 0.0,
            targets: Targets::Names(Vec::new()),
            exclude: Targets::Names(Vec::new()),
            layers: None,
            layers_pattern: Vec::new(),
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            save: Vec::new(),
            init: LoraInit::Kaiming,
            replaced: BTreeSet::new(),
        }
    }
}

/// A choice of modules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Targets {
    /// Full names of modules, or their ends after a dot.
    Names(Vec<String>),
    /// A regular expression that matches full names.
    Pattern(String),
    /// Every linear layer except the head.
    AllLinear,
}

impl Targets {
    /// PEFT's default for a family (`TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING`); `None` if it has none, and
    /// requires the setting.
    pub fn of_family(model_type: &str) -> Option<Targets> {
        let names: &[&str] = match model_type {
            "llama" | "mistral" | "qwen2" | "qwen3" | "gemma2" | "gemma3_text" => &["q_proj", "v_proj"],
            "gpt2" => &["c_attn"],
            "gpt_neox" => &["query_key_value"],
            _ => return None,
        };
        Some(Targets::Names(names.iter().map(|name| name.to_string()).collect()))
    }
}

/// Initial values of `A` and `B`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoraInit {
    /// `true`: `A` uniform over ±1/√inputs (Kaiming with a = √5), `B` zero.
    #[default]
    Kaiming,
    /// `gaussian`: `A` normal with standard deviation 1/rank, `B` zero.
    Gaussian,
    /// `false`: both uniform, so that the adapter changes the model from the start.
    Random,
}

/// A module, as the rules match it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Module<'a> {
    /// Its name in transformers' modules.
    pub(crate) name: &'a str,
    /// True for the head.
    pub(crate) is_head: bool,
}

/// Rank and scale of a module's adapter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Low {
    pub(crate) rank: usize,
    pub(crate) scale: f32,
}

/// The rules of a [`Lora`], with its regular expressions compiled.
pub(crate) struct Rules<'a> {
    lora: &'a Lora,
    targets: Option<Regex>,
    exclude: Option<Regex>,
    ranks: Vec<(Regex, usize)>,
    alphas: Vec<(Regex, f64)>,
    layers: Vec<Regex>,
}

impl<'a> Rules<'a> {
    pub(crate) fn of(lora: &'a Lora) -> Result<Rules<'a>> {
        let fail = |message: String| Err(Error::Parameter { message });
        if lora.rank == 0 || lora.rank > MAX_RANK || !lora.alpha.is_finite() {
            return fail(format!("an adapter of rank {} and alpha {}", lora.rank, lora.alpha));
        }
        if !(0.0..1.0).contains(&lora.dropout) {
            return fail(format!("lora_dropout is {}: it must be at least 0 and below 1", lora.dropout));
        }
        if let Some((name, rank)) = lora.rank_pattern.iter().find(|(_, r)| *r == 0 || *r > MAX_RANK) {
            return fail(format!("rank_pattern: rank {rank} for \"{name}\""));
        }
        if let Some((name, alpha)) = lora.alpha_pattern.iter().find(|(_, alpha)| !alpha.is_finite()) {
            return fail(format!("alpha_pattern: {alpha} for \"{name}\""));
        }
        let by_names = matches!(lora.targets, Targets::Names(_));
        if lora.layers.is_some() && !by_names || lora.layers.is_none() && !lora.layers_pattern.is_empty() {
            return fail(
                "layers_to_transform needs target_modules as names, and layers_pattern needs layers_to_transform"
                    .into(),
            );
        }
        let whole = |of: &Targets| match of {
            Targets::Pattern(pattern) => compile(&format!("^(?:{pattern})$")).map(Some),
            _ => Ok(None),
        };
        let end = |pattern: &String| compile(&format!(r"^(?:.*\.)?(?:{pattern})$"));
        let layers: Vec<String> = match &lora.layers_pattern[..] {
            // The first number in a name, which is the layer's and never an expert's.
            [] => vec![r"^.*?\.[^.]*\.(\d+)\.".into()],
            patterns => {
                patterns.iter().map(|pattern| format!(r"^(?:.*?\.)?(?:{pattern})\.(\d+)\.")).collect()
            }
        };
        Ok(Rules {
            lora,
            targets: whole(&lora.targets)?,
            exclude: whole(&lora.exclude)?,
            ranks: lora.rank_pattern.iter().map(|(p, rank)| Ok((end(p)?, *rank))).collect::<Result<_>>()?,
            alphas: lora.alpha_pattern.iter().map(|(p, a)| Ok((end(p)?, *a))).collect::<Result<_>>()?,
            layers: layers.iter().map(|pattern| compile(pattern)).collect::<Result<_>>()?,
        })
    }

    /// The adapter of a linear layer, if it has one (`check_target_module_exists`, `get_pattern_key`).
    pub(crate) fn adapter(&self, module: Module) -> Option<Low> {
        let name = module.name;
        if chosen(&self.lora.exclude, self.exclude.as_ref(), name) || self.saves(name) {
            return None;
        }
        let targeted = match &self.lora.targets {
            Targets::AllLinear => !module.is_head,
            targets => chosen(targets, self.targets.as_ref(), name),
        };
        let exact = matches!(&self.lora.targets, Targets::Names(names) if names.iter().any(|n| n == name));
        if !targeted || !exact && !self.transforms(name) {
            return None;
        }
        let rank = first(&self.ranks, name).unwrap_or(self.lora.rank);
        let alpha = first(&self.alphas, name).unwrap_or(self.lora.alpha);
        let divisor = if self.lora.rslora { (rank as f64).sqrt() } else { rank as f64 };
        Some(Low { rank, scale: (alpha / divisor) as f32 })
    }

    /// True for a module that is trained fully, and for modules inside one. PEFT compares the end of the name as a
    /// string: `norm` saves every norm.
    pub(crate) fn saves(&self, module: &str) -> bool {
        let prefixes = || std::iter::successors(Some(module), |name| Some(name.rsplit_once('.')?.0));
        self.lora.save.iter().any(|end| prefixes().any(|name| name.ends_with(end.as_str())))
    }

    /// True for a parameter of the base that the adapter's file replaces.
    pub(crate) fn replaces(&self, parameter: &str) -> bool {
        self.lora.replaced.contains(parameter)
    }

    /// The name in the adapter's file of a module whose parameters the file holds. PEFT wraps a module that has an
    /// adapter.
    pub(crate) fn file_module(&self, module: Module) -> String {
        let wrapped = self.adapter(module).map_or("", |_| ".base_layer");
        format!("base_model.model.{}{wrapped}", module.name)
    }

    pub(crate) fn dora(&self) -> bool {
        self.lora.dora
    }

    pub(crate) fn dropout(&self) -> f64 {
        self.lora.dropout
    }

    fn transforms(&self, name: &str) -> bool {
        let Some(layers) = self.lora.layers.as_ref().filter(|layers| !layers.is_empty()) else { return true };
        let layer = self.layers.iter().find_map(|pattern| {
            let found = pattern.captures(name).ok()??;
            found.get(1)?.as_str().parse::<usize>().ok()
        });
        layer.is_some_and(|layer| layers.contains(&layer))
    }
}

/// Far above any adapter's rank.
const MAX_RANK: usize = 1 << 20;

impl Lora {
    /// The target names that match no module.
    pub(crate) fn unknown<'a>(&'a self, modules: &[&str]) -> Vec<&'a str> {
        let known = |target: &str| modules.iter().any(|name| named(target, name));
        match &self.targets {
            Targets::Names(names) => names.iter().map(String::as_str).filter(|name| !known(name)).collect(),
            _ => Vec::new(),
        }
    }
}

/// True if a module has this name, or a name that ends in it after a dot.
fn named(target: &str, module: &str) -> bool {
    module == target || module.strip_suffix(target).is_some_and(|rest| rest.ends_with('.'))
}

fn chosen(targets: &Targets, pattern: Option<&Regex>, module: &str) -> bool {
    match targets {
        Targets::Names(names) => names.iter().any(|target| named(target, module)),
        _ => pattern.is_some_and(|pattern| pattern.is_match(module).unwrap_or(false)),
    }
}

fn first<T: Copy>(patterns: &[(Regex, T)], name: &str) -> Option<T> {
    patterns.iter().find(|(pattern, _)| pattern.is_match(name).unwrap_or(false)).map(|(_, value)| *value)
}

fn compile(pattern: &str) -> Result<Regex> {
    Regex::new(pattern)
        .map_err(|e| Error::Parameter { message: format!("{pattern:?} is not a regular expression: {e}") })
}

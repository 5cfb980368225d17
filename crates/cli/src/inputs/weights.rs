//! Models with their initial weights.

use super::device::Chosen;
use crate::config::{Config, Init};
use crate::machine;
use crate::ui::Ui;
use std::path::{Path, PathBuf};
use suasion_data::report::format::count;
use suasion_engine::{
    ADAPTER_WEIGHTS, Architecture, Base, Budget, CardRun, Lora, MemoryPlan, Model, Packing, Trainable,
    WeightType,
};
use suasion_train::Settings;

/// An adapter over a model.
pub struct Adapter {
    pub lora: Lora,
    /// The folder that it is read from; `None` for a new one.
    pub from: Option<PathBuf>,
}

impl Adapter {
    /// What is trained: the adapter where there is one, else what was `chosen`.
    pub fn trainable_or(adapter: Option<&Adapter>, chosen: &Trainable) -> Trainable {
        adapter.map_or_else(|| chosen.clone(), |adapter| Trainable::Adapter(adapter.lora.clone()))
    }
}

/// Memory of a process besides a model: its code, its threads, a tokenizer, rows.
const PROCESS: u64 = 48 << 20;

/// Bytes that a process needs with a model of this plan: while a tensor is read or written it is there twice more, in
/// f32 and in the file's type, and the largest is the embedding. A base that stays in its file is neither read nor
/// written.
pub fn needed(arch: &Architecture, plan: &MemoryPlan) -> u64 {
    let copies = if plan.mapped == 0 { 8 * arch.vocab_size as u64 * arch.hidden as u64 } else { 0 };
    plan.own() + copies + PROCESS
}

/// Refuses a model that does not fit into the memory of its device: of a card, on which a run needs `on_card` bytes, or of
/// the machine, where so many processes have it. Linux grants memory that it does not have, and kills the process later
/// without a message; a card would end the run in its first steps.
pub fn check_memory(
    arch: &Architecture,
    plan: &MemoryPlan,
    on_card: Option<u64>,
    device: Chosen,
    processes: usize,
    ui: &Ui,
) -> suasion_train::Result<()> {
    if let (Some(card), Some(bytes)) = (device.card(ui)?, on_card) {
        let free = card.free_memory()?;
        if bytes > free {
            let (total, device) = (card.memory, card.name.clone());
            return Err(suasion_engine::Error::DeviceMemory { bytes, free, total, device }.into());
        }
        return Ok(());
    }
    let bytes = needed(arch, plan).saturating_mul(processes as u64);
    match machine::memory().0 {
        Some(total) if bytes > total => Err(suasion_engine::Error::Memory { bytes }.into()),
        _ => Ok(()),
    }
}

/// What a model takes under these settings, with a rank's share of what their optimizer keeps, and the average of the
/// weights.
///
/// # Errors
/// A choice of parameters that the model cannot follow.
pub fn planned(
    arch: &Architecture,
    budget: Budget,
    trainable: &Trainable,
    settings: &Settings,
    ranks: usize,
) -> suasion_train::Result<MemoryPlan> {
    let plan = MemoryPlan::over(arch, budget, trainable, base(arch, settings.packing())?)?;
    let mut plan = plan.under(settings.optimizer(), ranks, arch, trainable)?;
    if settings.ema_decay.is_some() {
        plan.optimizer = plan.optimizer.saturating_add(plan.gradients);
    }
    Ok(plan)
}

/// Where the weights of a base are: in its files, or packed.
///
/// # Errors
/// If the base's files are packed in another way than requested.
pub fn base(arch: &Architecture, wanted: Option<Packing>) -> suasion_train::Result<Base> {
    let (Some(stored), Some(wanted)) = (arch.packed, wanted) else {
        return Ok(arch.packed.or(wanted).map_or(Base::Mapped, Base::Packed));
    };
    let plainer = (stored, wanted) == (Packing::Nf4 { nested: true }, Packing::Nf4 { nested: false });
    if stored == wanted || plainer {
        return Ok(Base::Packed(stored));
    }
    let key = match wanted {
        Packing::Int8 => "load_in_8bit",
        Packing::Nf4 { nested: true } if stored.bits() == 4 => "use_bnb_nested_quant",
        Packing::Nf4 { .. } => "load_in_4bit",
    };
    let message = format!(
        "{key}=true: the base's files are in {} bits already (quantization_config of its config.json); leave it out, or \
         take the original checkpoint",
        stored.bits()
    );
    Err(suasion_engine::Error::Parameter { message }.into())
}

/// The type of weights that a folder's config.json names.
pub fn named_type(folder: &Path) -> Option<WeightType> {
    let config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.join("config.json")).ok()?).ok()?;
    let name = ["dtype", "torch_dtype"].into_iter().find_map(|key| config[key].as_str());
    name.and_then(WeightType::named)
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
    /// What is trained of a model without an adapter.
    trainable: Trainable,
    /// How it is trained.
    settings: Settings,
    /// The ranks that share the optimizer's state, and those of them on this machine.
    ranks: [usize; 2],
    /// The adapter over it.
    adapter: Option<&'a Adapter>,
    /// Where it runs.
    device: Chosen,
    /// What it needs of a card, where that is known.
    on_card: Option<u64>,
    /// The fingerprint of the weights, once they were read.
    fingerprint: Option<String>,
    /// True once the warning was shown.
    warned: bool,
}

impl<'a> Start<'a> {
    /// The weights that a configuration selects: those in `dir`, or random ones.
    pub fn new(ui: &'a Ui, dir: &'a Path, arch: &'a Architecture, config: &Config) -> Start<'a> {
        let settings = config.settings();
        let start = Start::from_dir(ui, dir, arch).on(config.device());
        Start { init: config.init, seed: settings.seed, settings, ..start }
    }

    /// The weights in `dir`: those of a finished run.
    pub fn from_dir(ui: &'a Ui, dir: &'a Path, arch: &'a Architecture) -> Start<'a> {
        let (init, trainable, settings) = (Init::Weights, Trainable::All, Settings::default());
        Start {
            ui,
            dir,
            arch,
            init,
            seed: 0,
            trainable,
            settings,
            ranks: [1, 1],
            adapter: None,
            device: Chosen::default(),
            on_card: None,
            fingerprint: None,
            warned: false,
        }
    }

    /// The same on a device; without this, on the CPU.
    pub fn on(self, device: Chosen) -> Start<'a> {
        Start { device, ..self }
    }

    /// The same with a choice of what is trained.
    pub fn with_trainable(self, trainable: Trainable) -> Start<'a> {
        Start { trainable, ..self }
    }

    /// The same with the settings of a run, which determine how the base of an adapter is packed.
    pub fn with_settings(self, settings: Settings) -> Start<'a> {
        Start { settings, ..self }
    }

    /// The same for a rank of a run.
    pub fn for_ranks(self, ranks: usize, local: usize) -> Start<'a> {
        Start { ranks: [ranks, local], ..self }
    }

    /// The same under an adapter.
    pub fn with_adapter(self, adapter: Option<&'a Adapter>) -> Start<'a> {
        Start { adapter, ..self }
    }

    /// The same where [`Start::card_memory`] of the budget that it is built for is known.
    pub fn needing(self, on_card: Option<u64>) -> Start<'a> {
        Start { on_card, ..self }
    }

    /// Bytes that a run within this budget needs of its card, as its steps show on one that only counts; `None` on the
    /// CPU.
    ///
    /// # Errors
    /// A model that the card's kernels do not compute.
    pub fn card_memory(&self, budget: Budget) -> suasion_train::Result<Option<u64>> {
        if self.device.card(self.ui)?.is_none() {
            return Ok(None);
        }
        let trainable = Adapter::trainable_or(self.adapter, &self.trainable);
        let base = base(self.arch, self.settings.packing())?;
        let run = CardRun {
            files: self.dir,
            optimizer: self.settings.optimizer(),
            ranks: self.ranks[0],
            average: self.settings.ema_decay.is_some(),
            passes: self.settings.gradient_accumulation_steps,
            graphs: self.device.graphs,
            ..CardRun::new(&trainable, base, self.device.precision())
        };
        Ok(Some(run.needed(self.arch, budget)?.saturating_add(self.device.overhead())))
    }

    /// A model with these weights; the same at every call. The base of an adapter stays in its files.
    ///
    /// # Errors
    /// If the model does not fit into the machine's memory, or its weights cannot be read.
    pub fn build(&mut self, budget: Budget) -> suasion_train::Result<Model> {
        let trainable = Adapter::trainable_or(self.adapter, &self.trainable);
        let [ranks, local] = self.ranks;
        let plan = planned(self.arch, budget, &trainable, &self.settings, ranks)?;
        let on_card = self.on_card.map_or_else(|| self.card_memory(budget), |known| Ok(Some(known)))?;
        check_memory(self.arch, &plan, on_card, self.device, local, self.ui)?;
        let device = self.device.open(self.ui)?;
        let base = base(self.arch, self.settings.packing())?;
        let mut model = Model::with_base(self.arch.clone(), device, budget, &trainable, base)?;
        if budget.train {
            model.choose_optimizer(self.settings.optimizer())?;
        }
        match self.init {
            Init::Random => {
                model.init_random(self.seed)?;
                // As `from_config` of transformers makes them.
                model.set_weight_type(named_type(self.dir).unwrap_or_default());
            }
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
        if let Some(adapter) = self.adapter {
            match &adapter.from {
                Some(dir) => model.load_adapter(&dir.join(ADAPTER_WEIGHTS))?,
                None => model.init_adapter(self.seed)?,
            }
            if budget.train {
                let known = match self.fingerprint.take() {
                    Some(known) => known,
                    None => fingerprint(self.dir)?,
                };
                model.set_base(known.clone());
                self.fingerprint = Some(known);
            }
        }
        Ok(model)
    }
}

/// A fingerprint of a model's weights.
///
/// # Errors
/// Files that cannot be read.
pub fn fingerprint(dir: &Path) -> suasion_engine::Result<String> {
    let names = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.file_name());
    let mut names: Vec<_> = names.filter(|name| is_weights(&name.to_string_lossy())).collect();
    names.sort();
    let mut hasher = blake3::Hasher::new();
    for name in names {
        let written = suasion_files::Written::of(&dir.join(&name))?;
        hasher.update(format!("{} {} {}\n", name.display(), written.bytes, written.blake3).as_bytes());
    }
    Ok(hasher.finalize().to_hex().to_string())
}

fn is_weights(name: &str) -> bool {
    name == "config.json" || name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json")
}

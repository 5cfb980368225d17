//! A planned run: rows read, steps and memory planned, nothing trained yet.

mod announce;
mod card;
mod estimate;

use crate::config::{Config, Loaded};
use crate::export;
use crate::failure::Failure;
use crate::inputs::device::Chosen;
use crate::inputs::loading::{self, RowSet};
use crate::inputs::opened::Opened;
use crate::inputs::rows;
use crate::inputs::vocabulary::Vocabulary;
use crate::inputs::weights::{Adapter, Start, check_memory, planned};
use crate::interrupt;
use crate::progress::Progress;
use crate::ranks::Team;
use crate::ui::Ui;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use suasion_data::pack::{Fill, Packer};
use suasion_data::prepared;
use suasion_data::report::format::count;
use suasion_data::tokens::Tokenizer;
use suasion_data::{MASKING_VERSION, Mode, ModelFolder, Sample};
use suasion_engine::kernels::cuda::found::Card;
use suasion_engine::params::ParameterMap;
use suasion_engine::peft::adapter_config;
use suasion_engine::{ADAPTER_CONFIG, AdapterFolder, Architecture, MemoryPlan, Model, Trainable};
use suasion_files::Lock;
use suasion_train::DataCard;
use suasion_train::checkpoint::{self, SAVED_CONFIG};
use suasion_train::compare::{CompareSettings, Comparison, Finished, compare};
use suasion_train::{EVENTS, Identity, ModelFiles, OutputFile, Plan, Report, Resume, Run};

/// How a run begins.
#[derive(Default)]
pub struct Begin {
    /// Whether it continues another.
    pub resume: Resume,
    /// Whether it continues even if not exactly.
    pub extend: bool,
    /// The lock of the output folder, where it is held already.
    pub lock: Option<Lock>,
    /// The ranks that share the work.
    pub team: Team,
}

/// A run that is planned and not started.
pub struct Job {
    pub config: Config,
    pub settings: suasion_train::Settings,
    pub begin: Begin,
    /// The checkpoint that the run continues.
    pub checkpoint: Option<PathBuf>,
    /// The same, as read and verified.
    located: Option<checkpoint::Located>,
    /// The model, and the adapter that is trained.
    pub opened: Opened,
    pub folder: Arc<ModelFolder>,
    pub arch: Architecture,
    pub train_rows: RowSet,
    pub eval_rows: Option<RowSet>,
    pub train: Vec<Sample>,
    pub eval: Vec<Sample>,
    /// Where it runs.
    device: Chosen,
    /// The card that it runs on; `None` for the CPU.
    on: Option<&'static Card>,
    /// Bytes that it needs of the card.
    on_card: Option<u64>,
    /// How full the packs are that the training rows were put into.
    pub fill: Option<Fill>,
    pub plan: Plan,
    pub identity: Identity,
    pub card: DataCard,
    /// The stop ids that the training rows train.
    pub stops: Vec<u32>,
    /// Files that are read: rows, and one of the model.
    read: Vec<PathBuf>,
}

impl Job {
    /// Reads everything but the weights, and plans the run.
    pub fn new(mut config: Config, begin: Begin, ui: &Ui) -> anyhow::Result<Job> {
        // A checkpoint holds every file of its model: the base may have been deleted.
        let located = checkpoint::locate(&begin.resume, &config.output_dir)?;
        let checkpoint = located.as_ref().map(|located| located.dir.clone());
        config.data.template_date = config.data.template_date.or_else(|| begun_on(checkpoint.as_deref()));
        let device = config.device_of(&begin.team, ui)?;
        let on = device.card(ui)?;
        let opened = open(&config, checkpoint.as_deref(), ui)?;
        let data = rows::training(&config, ui)?;
        let settings = config.settings();
        let eval_data = rows::evaluation(&config, ui)?;
        settings.validate(eval_data.is_some() || config.eval_fraction > 0.0)?;

        let mut read = vec![opened.base.join("config.json")];
        read.extend(opened.adapter.iter().filter_map(|a| Some(a.from.as_ref()?.join(ADAPTER_CONFIG))));
        read.extend(data.files.iter().chain(eval_data.iter().flat_map(|rows| &rows.files)).cloned());
        let (folder, arch) = (Arc::clone(&opened.folder), opened.arch.clone());
        let policy = config.policy();
        for rows in [Some(&data), eval_data.as_ref()].into_iter().flatten() {
            loading::check_manifest(rows, &folder, &policy)?;
        }
        let allowed = &config.allow_findings.0;
        let mut train_rows = loading::load(ui, &data, &folder, &policy, Mode::Train, allowed)?;
        // If no row is left, the plan reports it.
        if !train_rows.samples.is_empty() {
            loading::check_findings(&train_rows, allowed)?;
        }
        // Saved with the run and read by a resume, which may be on another day.
        config.data.template_date = train_rows.summary.pinned(&policy).template_date;
        let policy = config.policy();
        let mut eval_rows = match &eval_data {
            Some(rows) => Some(loading::load(ui, rows, &folder, &policy, Mode::Train, allowed)?),
            None => None,
        };
        eval_rows.iter().try_for_each(|rows| loading::check_findings(rows, allowed))?;
        let samples = std::mem::take(&mut train_rows.samples);
        let (mut train, eval) = match &mut eval_rows {
            Some(rows) => (samples, std::mem::take(&mut rows.samples)),
            None => suasion_data::split(samples, config.eval_fraction, settings.seed),
        };
        if config.eval_fraction > 0.0 && eval.is_empty() && !train.is_empty() {
            let rows = count(train.len() as u64, "row");
            let message = format!("eval_fraction={}: of {rows} it holds out none", config.eval_fraction);
            let help = "give a larger share, name rows with eval_dataset_name, or leave it out";
            return Err(Failure::config(message, help).into());
        }
        let chat = folder.template.is_some();
        let card = card::data_card(&config, chat, &train_rows, &train, eval_rows.as_ref(), eval.len());
        let card = card::of_model(card, &opened);
        let card = DataCard { rows: card::first_rows(&train, folder.tokenizer.as_deref()), ..card };
        let stops = learned_stops(&train, &folder.special(&policy)?.stops);
        let mut fill = None;
        if let Some(packer) = Packer::of(&policy) {
            let (packs, filled) = packer.pack(train);
            (train, fill) = (packs, Some(filled));
        }
        let plan = Plan::of_ranks(&train, &eval, &settings, begin.team.ranks)?;
        plan.check_model(&arch, &train, &eval)?;
        let identity = Identity {
            objective: policy.objective,
            data_fingerprint: fingerprint(&train_rows, &config, folder.tokenizer.as_deref()),
            masking_version: MASKING_VERSION,
        };
        let mut job = Job {
            config,
            settings,
            begin,
            checkpoint,
            located,
            opened,
            folder,
            arch,
            train_rows,
            eval_rows,
            train,
            eval,
            device,
            on,
            on_card: None,
            fill,
            plan,
            identity,
            card,
            stops,
            read,
        };
        job.on_card = job.start(ui).card_memory(job.plan.budget)?;
        Ok(job)
    }

    /// Refuses an output_dir in which a new run would replace what it reads.
    pub fn check_inputs(&self) -> suasion_train::Result<()> {
        let dir = &self.config.output_dir;
        let mut read = self.read.iter().filter(|_| self.checkpoint.is_none());
        match read.find(|file| suasion_train::replaces(dir, file)) {
            Some(input) => {
                Err(suasion_train::Error::ReplacesInput { input: input.clone(), dir: dir.clone() })
            }
            None => Ok(()),
        }
    }

    /// Parameters that are trained, where some are not.
    fn trained(&self) -> Option<u64> {
        match self.opened.trainable() {
            chosen @ Trainable::Named(_) => {
                Some(ParameterMap::with(&self.arch, &chosen).ok()?.trained_len() as u64)
            }
            Trainable::All | Trainable::Adapter(_) => None,
        }
    }

    fn memory(&self) -> MemoryPlan {
        let memory = self.opened.memory(self.plan.budget, &self.settings, self.begin.team.ranks);
        match self.on {
            None => memory,
            Some(_) => memory.in_precision(self.config.device().precision()),
        }
    }

    /// The weights that the run starts from.
    pub fn start<'a>(&'a self, ui: &'a Ui) -> Start<'a> {
        self.opened
            .start(ui, &self.config)
            .on(self.device)
            .for_ranks(self.begin.team.ranks, self.begin.team.local)
    }

    /// The files beside the weights that the run writes.
    fn files(&self) -> anyhow::Result<ModelFiles> {
        let mut files = ModelFiles::changed(&self.folder.path, &self.folder.changed)?;
        if let Some(adapter) = &self.opened.adapter {
            // transformers finds the base by its name.
            files = files.of_adapter();
            let base = std::path::absolute(&self.opened.base)?;
            let named = self.config.model_name_or_path.as_deref();
            let hub = named.filter(|name| !name.exists()).map(|name| name.to_path_buf());
            let base = hub.unwrap_or(base).display().to_string();
            let config = adapter_config(&adapter.lora, &self.arch, &base)?;
            files.push(ADAPTER_CONFIG, serde_json::to_vec_pretty(&config)?);
        }
        Ok(files)
    }

    /// Trains.
    pub fn train(&mut self, ui: &Ui) -> anyhow::Result<Report> {
        let (stop, team) = (interrupt::flag(), self.begin.team.clone());
        let mut model = match &self.checkpoint {
            // The checkpoint's weights will replace these, so none are read. An adapter's base is not in it.
            Some(_) if self.opened.adapter.is_none() => {
                let (trainable, budget) = (self.opened.trainable(), self.plan.budget);
                let team = &self.begin.team;
                let plan = planned(&self.arch, budget, &trainable, &self.settings, team.ranks)?;
                check_memory(&self.arch, &plan, self.on_card, self.device, team.local, ui)?;
                Model::with_trainable(self.arch.clone(), self.device.open(ui)?, budget, &trainable)?
            }
            _ => self.start(ui).needing(self.on_card).build(self.plan.budget)?,
        };
        let files = self.files()?;
        let saved = self.config.anywhere().to_yaml();
        let extra = [OutputFile { name: SAVED_CONFIG.into(), bytes: saved.into_bytes() }];
        let tokenizer = self.folder.tokenizer.clone();
        let decode = |ids: &[u32]| tokenizer.as_ref().map_or_else(String::new, |t| t.decode(ids, false));
        let events = self.config.report_to.tensorboard().then(|| events_folder(&self.config));
        let run = Run {
            model: &mut model,
            train: &self.train,
            eval: &self.eval,
            settings: &self.settings,
            identity: &self.identity,
            card: &self.card,
            files: &files,
            extra: &extra,
            stops: &self.stops,
            decode: self.folder.tokenizer.as_deref().map(|_| &decode as &dyn Fn(&[u32]) -> String),
            tensorboard: events.as_deref(),
            collective: team.collective(),
            output_dir: &self.config.output_dir,
            resume: self.begin.resume.clone(),
            extend: self.begin.extend,
            overwrite: self.config.overwrite_output_dir,
            lock: self.begin.lock.take(),
        };
        let mut progress = Progress::new(ui);
        let report = suasion_train::train_from(run, self.located.take(), &mut progress, stop)?;
        drop(progress);
        if team.is_first()
            && !report.interrupted
            && !report.diverged.is_some_and(|divergence| divergence.stopped)
            && let Err(error) = self.export()
        {
            // The model is complete without it.
            ui.warn(error);
        }
        Ok(report)
    }

    /// Writes what a server needs beside the finished model.
    fn export(&self) -> anyhow::Result<()> {
        let base =
            self.opened.adapter.as_ref().map(|_| std::path::absolute(&self.opened.base)).transpose()?;
        export::of_model(&self.config.output_dir, &self.folder, &self.config.policy(), base.as_deref())
    }

    /// Trains and measures both objectives from the same start.
    pub fn compare(&self, ui: &Ui) -> anyhow::Result<Comparison> {
        self.compare_with(None, ui)
    }

    /// As [`Job::compare`], from another seed: of the order of the rows, and of random weights. The rows that are held
    /// out stay the same.
    pub fn compare_from(&self, seed: u64, ui: &Ui) -> anyhow::Result<Comparison> {
        let settings = suasion_train::Settings { seed, ..self.settings.clone() };
        let config = Config {
            train: suasion_train::Settings { seed, ..self.config.train.clone() },
            ..self.config.clone()
        };
        self.compared(self.opened.start(ui, &config), &settings, None, ui)
    }

    /// As [`Job::compare`], reusing the model of the responses that [`Job::train`] has trained.
    pub fn compare_with(&self, trained: Option<&Report>, ui: &Ui) -> anyhow::Result<Comparison> {
        self.compared(self.start(ui), &self.settings, trained, ui)
    }

    fn compared(
        &self,
        mut start: Start<'_>,
        settings: &suasion_train::Settings,
        trained: Option<&Report>,
        ui: &Ui,
    ) -> anyhow::Result<Comparison> {
        let settings = CompareSettings { train: settings.clone(), ..CompareSettings::default() };
        let mut make = |budget| start.build(budget);
        let of_run = self.opened.adapter.as_ref().map(|adapter| Adapter {
            lora: adapter.lora.clone(),
            from: Some(self.config.output_dir.clone()),
        });
        let dir = if of_run.is_some() { &self.opened.base } else { &self.config.output_dir };
        let device = self.config.device();
        let mut from_run = |budget| {
            let start = Start::from_dir(ui, dir, &self.arch).on(device).with_settings(settings.train.clone());
            start.with_adapter(of_run.as_ref()).build(budget)
        };
        let finished = trained.map(|report| Finished {
            make: &mut from_run,
            targets: report.targets,
            last_train_loss: report.steps.last().and_then(|step| step.loss),
            seconds: report.seconds,
        });
        let (train, eval) = (&self.train, &self.eval);
        let mut progress = Progress::new(ui);
        Ok(compare(&mut make, finished, train, eval, &settings, &mut progress, interrupt::flag())?)
    }
}

/// The model that a run trains, with its adapter. A checkpoint holds every file of its model, so the base may have been
/// deleted; under an adapter the base is needed.
fn open(config: &Config, checkpoint: Option<&Path>, ui: &Ui) -> anyhow::Result<Opened> {
    let Some(checkpoint) = checkpoint else { return Opened::of(config, ui)?.for_training(config) };
    // A checkpoint has the added tokens; the base of an adapter does not.
    let vocabulary = Vocabulary::of(config, ui)?;
    if !AdapterFolder::is_one(checkpoint) {
        return Opened::named(Some(checkpoint), None, config.init, &vocabulary, ui)?.choosing(config);
    }
    let model = config.model_name_or_path.as_deref();
    let model =
        model.filter(|model| !AdapterFolder::is_one(model) && (model.is_dir() || !model.is_absolute()));
    let opened = Opened::named(model, Some(checkpoint), config.init, &vocabulary, ui)?;
    if let (true, Some(adapter)) = (config.use_peft, &opened.adapter) {
        let (was, now) = (adapter_config(&adapter.lora, &opened.arch, "")?, config.lora(&opened.arch)?);
        let now = adapter_config(&now, &opened.arch, "")?;
        let differs = |key: &&String| was[key.as_str()] != now[key.as_str()];
        if let Some(key) = was.as_object().and_then(|map| map.keys().find(differs)) {
            let message =
                format!("{}: {key} of its adapter was {}, is {}", checkpoint.display(), was[key], now[key]);
            return Err(
                Failure::config(message, "resume with the settings that the run was started with").into()
            );
        }
    }
    opened.choosing(config)
}

/// The day that the chat template of a run has written into its rows; the day of a resume would give other rows.
fn begun_on(checkpoint: Option<&Path>) -> Option<String> {
    let saved = checkpoint?.parent()?.join(SAVED_CONFIG);
    Loaded::over(
        Config::default(),
        Some(&saved).filter(|path| path.is_file()).map(PathBuf::as_path),
        &[],
        &[],
    )
    .config
    .data
    .template_date
}

/// The folder of the run's TensorBoard event files.
fn events_folder(config: &Config) -> PathBuf {
    if let Some(dir) = &config.logging_dir {
        return dir.clone();
    }
    // A run's name is often a path; it must not lead out of the folder.
    let plain = |c: char| if c.is_alphanumeric() || "-_.".contains(c) { c } else { '_' };
    let name: String = config.run_name.as_deref().unwrap_or("suasion").chars().map(plain).collect();
    let name = if name.trim_matches('.').is_empty() { "suasion".into() } else { name };
    config.output_dir.join(EVENTS).join(name)
}

/// The stop tokens that are learned somewhere, in the order of `stops`.
fn learned_stops(samples: &[Sample], stops: &[u32]) -> Vec<u32> {
    let learned = |stop: &u32| {
        samples.iter().any(|sample| sample.labels.iter().any(|label| i64::from(*label) == i64::from(*stop)))
    };
    stops.iter().copied().filter(learned).collect()
}

/// Fingerprint of everything that decides the labels, and of the split of the rows.
fn fingerprint(rows: &RowSet, config: &Config, tokenizer: Option<&Tokenizer>) -> String {
    let source = rows.summary.source.as_ref().map_or("", |source| source.blake3.as_str());
    let template = rows.summary.template.as_deref();
    let tokenizer = tokenizer.map(Tokenizer::fingerprint);
    let labels = prepared::fingerprint(source, tokenizer, template, &rows.summary.pinned(&config.policy()));
    match config.eval_fraction {
        0.0 => labels,
        fraction => format!("{labels}, {fraction} held out by seed {}", config.train.seed),
    }
}

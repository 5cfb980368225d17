//! A planned run: rows read, steps and memory planned, nothing trained yet.

mod announce;
mod card;
mod estimate;

use crate::config::{Config, Init};
use crate::failure::Failure;
use crate::inputs::loading::{self, RowSet};
use crate::inputs::model;
use crate::inputs::rows;
use crate::inputs::weights::Start;
use crate::interrupt;
use crate::progress::Progress;
use crate::ui::Ui;
use std::path::PathBuf;
use std::sync::Arc;
use suasion_data::pack::{Fill, Packer};
use suasion_data::prepared;
use suasion_data::report::format::count;
use suasion_data::tokens::Tokenizer;
use suasion_data::{MASKING_VERSION, Mode, ModelFolder, Sample};
use suasion_engine::params::ParameterMap;
use suasion_engine::{Architecture, Device, MemoryPlan, Model, Trainable};
use suasion_files::Lock;
use suasion_train::DataCard;
use suasion_train::checkpoint::{self, SAVED_CONFIG};
use suasion_train::compare::{CompareSettings, Comparison, Finished, compare_with};
use suasion_train::{EVENTS, Identity, ModelFiles, OutputFile, Plan, Report, Resume, Run};

/// How a run begins.
#[derive(Default)]
pub struct Begin {
    /// Whether it continues another.
    pub resume: Resume,
    /// Whether it goes on where that is no exact continuation.
    pub extend: bool,
    /// The lock of the output folder, where it is held already.
    pub lock: Option<Lock>,
}

/// A run that is planned and not started.
pub struct Job {
    pub config: Config,
    pub settings: suasion_train::Settings,
    pub begin: Begin,
    /// The checkpoint that the run continues.
    pub checkpoint: Option<PathBuf>,
    pub folder: Arc<ModelFolder>,
    pub arch: Architecture,
    pub train_rows: RowSet,
    pub eval_rows: Option<RowSet>,
    pub train: Vec<Sample>,
    pub eval: Vec<Sample>,
    /// How full the packs are that the training rows were put into.
    pub fill: Option<Fill>,
    pub plan: Plan,
    /// Which parameters are trained.
    trainable: Trainable,
    pub identity: Identity,
    pub card: DataCard,
    /// The ids that the training rows teach to stop at.
    pub stops: Vec<u32>,
    /// Files that are read: rows, and one of the model.
    read: Vec<PathBuf>,
}

impl Job {
    /// Reads everything but the weights, and plans the run.
    pub fn new(config: Config, begin: Begin, ui: &Ui) -> anyhow::Result<Job> {
        // A checkpoint holds every file of its model: the base may be gone.
        let checkpoint = checkpoint::locate(&begin.resume, &config.output_dir)?;
        let dir = match &checkpoint {
            Some(checkpoint) => checkpoint.clone(),
            None => model::named(&config, config.init == Init::Weights, ui)?,
        };
        let data = rows::training(&config, ui)?;
        let settings = config.settings();
        let eval_data = rows::evaluation(&config, ui)?;
        settings.validate(eval_data.is_some() || config.eval_fraction > 0.0)?;

        let mut read = vec![dir.join("config.json")];
        read.extend(data.files.iter().chain(eval_data.iter().flat_map(|rows| &rows.files)).cloned());
        let (folder, arch) = model::with_architecture(&dir, config.init, ui)?;
        let trainable = settings.choose(&arch.parameter_names())?;
        let policy = config.policy();
        for rows in [Some(&data), eval_data.as_ref()].into_iter().flatten() {
            loading::check_manifest(rows, &folder, &policy)?;
        }
        let allowed = &config.allow_findings.0;
        let mut train_rows = loading::load(ui, &data, &folder, &policy, Mode::Train, allowed)?;
        // Where no row is left, the plan says so.
        if !train_rows.samples.is_empty() {
            loading::check_findings(&train_rows, allowed)?;
        }
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
        let stops = learned_stops(&train, &folder.special(&policy)?.stops);
        let mut fill = None;
        if let Some(packer) = Packer::of(&policy) {
            let (packs, filled) = packer.pack(train);
            (train, fill) = (packs, Some(filled));
        }
        let plan = Plan::new(&train, &eval, &settings)?;
        plan.check_model(&arch, &train, &eval)?;
        let identity = Identity {
            objective: policy.objective,
            data_fingerprint: fingerprint(&train_rows, &config, folder.tokenizer.as_deref()),
            masking_version: MASKING_VERSION,
        };
        Ok(Job {
            config,
            settings,
            begin,
            checkpoint,
            folder,
            arch,
            train_rows,
            eval_rows,
            train,
            eval,
            fill,
            plan,
            trainable,
            identity,
            card,
            stops,
            read,
        })
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
        let map = ParameterMap::with(&self.arch, &self.trainable).ok()?;
        Some(map.trained_len() as u64).filter(|trained| *trained < self.arch.parameter_count())
    }

    fn memory(&self) -> MemoryPlan {
        let plan = MemoryPlan::with(&self.arch, self.plan.budget, &self.trainable);
        let plan = plan.and_then(|plan| plan.under(self.settings.optimizer(), &self.arch, &self.trainable));
        // The choice was checked when it was made.
        let mut plan = plan.unwrap_or_else(|_| MemoryPlan::of(&self.arch, self.plan.budget));
        if self.settings.ema_decay.is_some() {
            plan.optimizer = plan.optimizer.saturating_add(plan.gradients);
        }
        plan
    }

    /// The weights that the run starts from.
    pub fn start<'a>(&'a self, ui: &'a Ui) -> Start<'a> {
        Start::new(ui, &self.folder.path, &self.arch, &self.config)
    }

    /// Trains.
    pub fn train(&mut self, ui: &Ui) -> anyhow::Result<Report> {
        let stop = interrupt::flag();
        let mut model = match &self.checkpoint {
            None => self.start(ui).build(self.plan.budget)?,
            // The checkpoint's weights will replace these, so none are read.
            Some(_) => {
                Model::with_trainable(self.arch.clone(), Device::cpu(), self.plan.budget, &self.trainable)?
            }
        };
        let files = ModelFiles::from_dir(&self.folder.path)?;
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
            output_dir: &self.config.output_dir,
            resume: self.begin.resume.clone(),
            extend: self.begin.extend,
            overwrite: self.config.overwrite_output_dir,
            lock: self.begin.lock.take(),
        };
        let mut progress = Progress::new(ui);
        Ok(suasion_train::train(run, &mut progress, stop)?)
    }

    /// Trains and measures both objectives from the same start.
    pub fn compare(&self, ui: &Ui) -> anyhow::Result<Comparison> {
        self.compare_with(None, ui)
    }

    /// As [`Job::compare`], where [`Job::train`] has trained the model of the responses.
    pub fn compare_with(&self, trained: Option<&Report>, ui: &Ui) -> anyhow::Result<Comparison> {
        let settings = CompareSettings { train: self.settings.clone(), ..CompareSettings::default() };
        let mut start = self.start(ui);
        let mut make = |budget| start.build(budget);
        let mut from_run = |budget| Start::from_dir(ui, &self.config.output_dir, &self.arch).build(budget);
        let finished = trained.map(|report| Finished {
            make: &mut from_run,
            targets: report.targets,
            last_train_loss: report.steps.last().and_then(|step| step.loss),
            seconds: report.seconds,
        });
        let (train, eval) = (&self.train, &self.eval);
        let mut progress = Progress::new(ui);
        Ok(compare_with(&mut make, finished, train, eval, &settings, &mut progress, interrupt::flag())?)
    }
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

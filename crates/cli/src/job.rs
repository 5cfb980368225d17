//! A planned run: rows read, steps and memory planned, nothing trained yet.

mod announce;
mod card;

pub use announce::line;

use crate::config::{Config, Init};
use crate::failure::Failure;
use crate::inputs::loading::{self, RowSet};
use crate::inputs::model;
use crate::inputs::rows;
use crate::inputs::weights::Start;
use crate::interrupt;
use crate::progress::Progress;
use crate::ui::Ui;
use std::sync::Arc;
use suasion_data::pack::{Fill, Packer};
use suasion_data::prepared;
use suasion_data::report::format::count;
use suasion_data::tokens::Tokenizer;
use suasion_data::{MASKING_VERSION, Mode, ModelFolder, Sample};
use suasion_engine::{Architecture, Device, MemoryPlan, Model};
use suasion_train::DataCard;
use suasion_train::compare::{CompareSettings, Comparison, Finished, compare_with};
use suasion_train::{Identity, ModelFiles, OutputFile, Plan, Report, Resume, Run};

/// The resolved configuration's name in a run's folder.
pub const SAVED_CONFIG: &str = "suasion.yaml";

/// A run that is planned and not started.
pub struct Job {
    pub config: Config,
    pub settings: suasion_train::Settings,
    pub resume: Resume,
    pub folder: Arc<ModelFolder>,
    pub arch: Architecture,
    pub train_rows: RowSet,
    pub eval_rows: Option<RowSet>,
    pub train: Vec<Sample>,
    pub eval: Vec<Sample>,
    /// How full the packs are that the training rows were put into.
    pub fill: Option<Fill>,
    pub plan: Plan,
    pub identity: Identity,
    pub card: DataCard,
}

impl Job {
    /// Reads everything but the weights, and plans the run.
    pub fn new(config: Config, resume: Resume, ui: &Ui) -> anyhow::Result<Job> {
        let dir = model::named(&config, config.init == Init::Weights, ui)?;
        let data = rows::training(&config, ui)?;
        let settings = config.settings();
        let eval_data = rows::evaluation(&config, ui)?;
        settings.validate(eval_data.is_some() || config.eval_fraction > 0.0)?;

        let (folder, arch) = model::with_architecture(&dir, config.init, ui)?;
        let policy = config.policy();
        for rows in [Some(&data), eval_data.as_ref()].into_iter().flatten() {
            loading::check_manifest(rows, &folder, &policy)?;
        }
        let mut train_rows = loading::load(ui, &data, &folder, &policy, Mode::Train)?;
        let mut eval_rows = match &eval_data {
            Some(rows) => Some(loading::load(ui, rows, &folder, &policy, Mode::Train)?),
            None => None,
        };
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
        let card = card::data_card(&config, &train_rows, &train, eval_rows.as_ref(), eval.len());
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
            resume,
            folder,
            arch,
            train_rows,
            eval_rows,
            train,
            eval,
            fill,
            plan,
            identity,
            card,
        })
    }

    fn memory(&self) -> MemoryPlan {
        MemoryPlan::of(&self.arch, self.plan.budget)
    }

    /// The weights that the run starts from.
    pub fn start<'a>(&'a self, ui: &'a Ui) -> Start<'a> {
        Start::new(ui, &self.folder.path, &self.arch, &self.config)
    }

    /// Trains.
    pub fn train(&self, ui: &Ui) -> anyhow::Result<Report> {
        let stop = interrupt::flag();
        let mut model = match self.resume {
            // The checkpoint's weights will replace these, so none are read.
            Resume::No => self.start(ui).build(self.plan.budget)?,
            _ => Model::new(self.arch.clone(), Device::cpu(), self.plan.budget)?,
        };
        let files = ModelFiles::from_dir(&self.folder.path)?;
        let extra = [OutputFile { name: SAVED_CONFIG.into(), bytes: self.config.to_yaml().into_bytes() }];
        let run = Run {
            model: &mut model,
            train: &self.train,
            eval: &self.eval,
            settings: &self.settings,
            identity: &self.identity,
            card: &self.card,
            files: &files,
            extra: &extra,
            output_dir: &self.config.output_dir,
            resume: self.resume.clone(),
            overwrite: self.config.overwrite_output_dir,
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

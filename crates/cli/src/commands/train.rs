//! `suasion train`: says what it will do, does it, and says where it lies.

use super::{ConfigArgs, demo, need_data, need_model};
use crate::config::{Config, Init, Loaded};
use crate::failure::{Exit, Failure};
use crate::interrupt;
use crate::loading::{self, RowSet};
use crate::progress::Progress;
use crate::rows::{self, DataFiles};
use crate::ui::{self, Ui};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use suasion_data::pack::{Fill, Packer};
use suasion_data::prepared::{self, Counts};
use suasion_data::summary::Summary;
use suasion_data::template::ChatTemplate;
use suasion_data::tokens::Tokenizer;
use suasion_data::{MASKING_VERSION, Mode, Policy, Sample, pipeline};
use suasion_engine::{Architecture, Budget, Cpu, MemoryPlan, Model};
use suasion_train::{
    DataCard, FindingCount, Identity, ModelFiles, OutputFile, Plan, Report, Resume, Run, SectionShare,
};

/// The resolved configuration's name in a run's folder.
pub const SAVED_CONFIG: &str = "suasion.yaml";

/// Columns of the names in the opening.
const INDENT: usize = 12;

/// Flags of the command.
#[derive(clap::Args, Debug)]
pub struct TrainArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Train the embedded demo: needs nothing but this program
    #[arg(long, conflicts_with_all = ["resume", "config", "model", "data"])]
    pub demo: bool,
    /// Continue from a checkpoint: a checkpoint-N folder, a run's folder, or the newest in output_dir
    #[arg(long, value_name = "DIR", num_args = 0..=1)]
    pub resume: Option<Option<PathBuf>>,
    /// Say what would be done, and stop
    #[arg(long)]
    pub dry_run: bool,
}

/// Runs the command.
pub fn run(args: &TrainArgs, ui: &Ui) -> anyhow::Result<Exit> {
    if args.demo {
        return demo::run(args, ui);
    }
    let (loaded, resume) = load(args, ui)?;
    let (output_dir, overwrite) = (&loaded.config.output_dir, loaded.config.overwrite_output_dir);
    suasion_train::check_output_dir(output_dir, &resume, overwrite)?;
    let job = Job::new(loaded.config, resume, ui)?;
    job.announce(ui);
    ui.say(format_args!("{:<INDENT$} {}", "output", job.config.output_dir.display()));
    if args.dry_run {
        // A run that goes on tells these itself.
        for warning in job.plan.warnings.iter().chain(&job.arch.not_applied) {
            ui.warn(warning);
        }
        if ui.json {
            ui.print_json(&job.to_json())?;
        }
        return Ok(Exit::Done);
    }
    let report = job.train(ui)?;
    job.farewell(&report, ui)?;
    Ok(Exit::Done)
}

/// The configuration, and where to continue. A resume without CONFIG takes the one that the run saved.
fn load(args: &TrainArgs, ui: &Ui) -> anyhow::Result<(Loaded, Resume)> {
    let mut named = match &args.resume {
        None => {
            return Ok((args.config.load(ui)?, Resume::No));
        }
        Some(named) => named.clone(),
    };
    if let Some(path) = named.as_ref().filter(|path| !path.exists()) {
        return Err(Failure::usage(
            format!("--resume {}: there is no such folder", path.display()),
            "name a run's output folder or one of its checkpoint-N folders",
        )
        .into());
    }
    let mut config = args.config.config.clone();
    // `--resume run.yaml`: the optional DIR has swallowed the CONFIG that follows it.
    if config.is_none() && named.as_ref().is_some_and(|path| path.is_file()) {
        config = named.take();
    }
    let args = |config| ConfigArgs {
        config,
        set: args.config.set.clone(),
        model: args.config.model.clone(),
        data: args.config.data.clone(),
    };
    let run_dir = match &named {
        Some(dir) => Some(run_folder(dir)),
        None if config.is_none() => Some(args(None).load(ui)?.config.output_dir),
        None => None,
    };
    if config.is_none() {
        config = run_dir.as_ref().map(|dir| dir.join(SAVED_CONFIG)).filter(|path| path.is_file());
    }
    let mut loaded = args(config).load(ui)?;
    if let Some(dir) = &run_dir
        && !loaded.places.contains_key("output_dir")
    {
        loaded.config.output_dir = dir.clone();
        loaded.places.insert("output_dir", "--resume".into());
    }
    Ok((loaded, named.map_or(Resume::Newest, Resume::From)))
}

/// The run that a `--resume DIR` belongs to: DIR, or the parent of a checkpoint-N.
fn run_folder(dir: &Path) -> PathBuf {
    let is_checkpoint = dir.file_name().is_some_and(|name| name.to_string_lossy().starts_with("checkpoint-"));
    match dir.parent().filter(|_| is_checkpoint) {
        Some(parent) if parent.as_os_str().is_empty() => PathBuf::from("."),
        Some(parent) => parent.to_path_buf(),
        None => dir.to_path_buf(),
    }
}

/// A run that is fully known and not yet begun.
pub struct Job {
    pub config: Config,
    pub settings: suasion_train::Settings,
    pub resume: Resume,
    pub model_dir: PathBuf,
    pub arch: Architecture,
    pub tokenizer: Option<Tokenizer>,
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
        let loaded = Loaded { config, ..Loaded::default() };
        let model_dir = need_model(&loaded, loaded.config.init == Init::Weights, ui)?;
        let data = rows::resolve(need_data(&loaded)?, &loaded.config.dataset_train_split, ui)?;
        let config = loaded.config;
        let settings = config.settings();
        let eval_data = rows::evaluation(&config, ui)?;
        settings.validate(eval_data.is_some() || config.eval_fraction > 0.0)?;

        let arch = Architecture::from_dir(&model_dir)?;
        let tokenizer = loading::tokenizer(&model_dir)?;
        check_vocabulary(&model_dir, &arch, tokenizer.as_ref())?;
        let template = loading::template(ui, &model_dir, tokenizer.as_ref());
        let (words, chat) = (tokenizer.as_ref(), template.as_ref());
        let policy = config.policy();
        let vocab = Some(arch.vocab_size);
        for rows in [Some(&data), eval_data.as_ref()].into_iter().flatten() {
            check_manifest(rows, words, chat, &policy)?;
        }
        let mut train_rows = loading::load(ui, &data, words, chat, &policy, vocab, Mode::Train)?;
        let mut eval_rows = match &eval_data {
            Some(rows) => Some(loading::load(ui, rows, words, chat, &policy, vocab, Mode::Train)?),
            None => None,
        };
        let samples = std::mem::take(&mut train_rows.samples);
        let (mut train, eval) = match &mut eval_rows {
            Some(rows) => (samples, std::mem::take(&mut rows.samples)),
            None => pipeline::split(samples, config.eval_fraction, config.seed),
        };
        let card = data_card(&config, &train_rows, &train, eval_rows.as_ref(), eval.len());
        let mut fill = None;
        if let Some(packer) = Packer::of(&policy) {
            let (packs, filled) = packer.pack(train);
            (train, fill) = (packs, Some(filled));
        }
        let plan = Plan::new(&train, &eval, &settings)?;
        plan.check_model(&arch, &train, &eval)?;
        let identity = Identity {
            objective: policy.objective,
            data_fingerprint: fingerprint(&train_rows, &config, tokenizer.as_ref()),
            masking_version: MASKING_VERSION,
        };
        Ok(Job {
            config,
            settings,
            resume,
            model_dir,
            arch,
            tokenizer,
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

    /// Says what the run will do.
    pub fn announce(&self, ui: &Ui) {
        let plan = &self.plan;
        let config = &self.config;
        let say = |name: &str, text: String| ui.say(format_args!("{name:<INDENT$} {text}"));
        let weights = match config.init {
            Init::Weights => "weights from the folder",
            Init::Random => "random weights",
        };
        say(
            "model",
            format!(
                "{}: {}, {} parameters, {weights}",
                self.model_dir.display(),
                self.arch.model_type,
                ui::count(self.arch.parameter_count())
            ),
        );
        say(
            "data",
            format!(
                "{}: {}",
                self.train_rows.name.display(),
                loading::rows_line(&Counts::of(&self.train_rows.summary))
            ),
        );
        loading::tell_findings(ui, &self.train_rows, INDENT);
        match &self.eval_rows {
            Some(rows) => {
                say(
                    "evaluation",
                    format!("{}: {}", rows.name.display(), loading::rows_line(&Counts::of(&rows.summary))),
                );
                loading::tell_findings(ui, rows, INDENT);
            }
            None if !self.eval.is_empty() => say(
                "evaluation",
                format!(
                    "{} held out of the training rows, {} left",
                    ui::plural(plan.eval_rows, "row"),
                    ui::count(plan.rows)
                ),
            ),
            None => say("evaluation", "none: no rows are held out".into()),
        }
        let objective = match self.identity.objective {
            suasion_data::policy::Objective::ResponseOnly => "responses only",
            suasion_data::policy::Objective::AllTokens => {
                "ALL tokens, prompts included (completion_only_loss is false)"
            }
        };
        say("objective", objective.into());
        say(
            "tokens",
            format!(
                "{} in {}; supervised: {} ({}); longest row {}",
                ui::count(plan.tokens_per_epoch),
                ui::plural(plan.rows, "row"),
                ui::count(plan.targets_per_epoch),
                ui::percent(plan.targets_per_epoch, plan.tokens_per_epoch),
                ui::count(plan.longest_row),
            ),
        );
        let unit = match (plan.packs, &self.fill) {
            (Some(packs), Some(fill)) => {
                let (packs, capacity) = (ui::plural(packs, "pack"), ui::count(fill.capacity));
                say(
                    "packs",
                    format!("{packs} of at most {capacity} tokens, {:.1}% full", fill.rate() * 100.0),
                );
                "packs"
            }
            (Some(packs), None) => {
                say("packs", format!("{}, as the file has them", ui::plural(packs, "pack")));
                "packs"
            }
            _ => "rows",
        };
        let accumulation = match config.gradient_accumulation_steps {
            1 => String::new(),
            n => format!(" × {n} micro-batches"),
        };
        say(
            "steps",
            format!(
                "{} ({:.2} epochs of {}; {} {unit}{accumulation} a step); learning rate {:e}, {}, {} of warm-up",
                ui::count(plan.total_steps),
                plan.epochs,
                ui::count(plan.steps_per_epoch),
                config.per_device_train_batch_size,
                config.learning_rate,
                config.lr_scheduler_type,
                ui::plural(plan.warmup_steps, "step"),
            ),
        );
        let memory = self.memory();
        say(
            "memory",
            format!(
                "{} planned: parameters {}, gradients {}, optimizer {}, activations {}, scratch {}",
                ui::bytes(memory.total()),
                ui::bytes(memory.parameters),
                ui::bytes(memory.gradients),
                ui::bytes(memory.optimizer),
                ui::bytes(memory.activations),
                ui::bytes(memory.scratch),
            ),
        );
        if let (_, Some(available)) = super::env::memory()
            && memory.total() > available
        {
            ui.warn(format_args!(
                "{} are planned and {} are available: lower per_device_train_batch_size or max_length, or set gradient_checkpointing",
                ui::bytes(memory.total()),
                ui::bytes(available)
            ));
        }
        let changed = config.changed();
        if !changed.is_empty() {
            let list: Vec<String> =
                changed.iter().map(|(name, value)| format!("{name}={}", plain(value))).collect();
            say("set", list.join(" "));
        }
    }

    /// The same for machines (`--dry-run --json`).
    fn to_json(&self) -> serde_json::Value {
        let memory = self.memory();
        let summary = &self.train_rows.summary;
        let dropped: BTreeMap<&str, u64> =
            summary.dropped.iter().map(|(reason, n)| (reason.name(), *n)).collect();
        serde_json::json!({
            "model_type": self.arch.model_type,
            "parameters": self.arch.parameter_count(),
            "objective": self.identity.objective,
            "rows": { "read": summary.rows, "kept": summary.kept, "cut": summary.cut, "dropped": dropped, "failed": summary.failed },
            "tokens": self.plan.tokens_per_epoch,
            "supervised_tokens": self.plan.targets_per_epoch,
            "supervised_share": self.plan.supervised_share,
            "steps": self.plan.total_steps,
            "plan": self.plan,
            "packing": self.fill.map(|fill| serde_json::json!({
                "packs": fill.packs, "capacity": fill.capacity, "fill": fill.rate(),
            })),
            "memory_bytes": {
                "total": memory.total(), "parameters": memory.parameters, "gradients": memory.gradients,
                "optimizer": memory.optimizer, "activations": memory.activations, "scratch": memory.scratch,
            },
            "output_dir": self.config.output_dir,
            "config": self.config.to_json(),
        })
    }

    /// The weights that the run starts from.
    pub fn start<'a>(&'a self, ui: &'a Ui) -> Start<'a> {
        let Config { init, seed, .. } = self.config;
        Start { ui, dir: &self.model_dir, arch: &self.arch, init, seed, told: false }
    }

    /// Trains.
    pub fn train(&self, ui: &Ui) -> anyhow::Result<Report> {
        let stop = interrupt::flag();
        let mut model = match self.resume {
            // The checkpoint's weights replace these, so none are read first.
            Resume::No => self.start(ui).build(self.plan.budget)?,
            _ => Model::new(self.arch.clone(), Cpu::new(), self.plan.budget)?,
        };
        let files = ModelFiles::from_dir(&self.model_dir)?;
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

    /// Says what came of it.
    pub fn farewell(&self, report: &Report, ui: &Ui) -> anyhow::Result<()> {
        if ui.json {
            return ui.print_json(report);
        }
        let dir = report.output_dir.display();
        if report.interrupted {
            ui.say(format_args!(
                "interrupted after step {} of {}; continue with: suasion train --resume {dir}",
                report.step, report.total_steps
            ));
            return Ok(());
        }
        if let (Some(before), Some(after)) = (&report.before, &report.after) {
            ui.say(format_args!(
                "held-out loss: {:.4} before training, {:.4} after (perplexity {:.2} → {:.2}, {} targets)",
                before.loss,
                after.loss,
                before.perplexity,
                after.perplexity,
                ui::count(after.targets)
            ));
        }
        let memory =
            report.peak_memory_bytes.map(|b| format!(", peak memory {}", ui::bytes(b))).unwrap_or_default();
        ui.say(format_args!(
            "done: {} in {}, {} targets of {} tokens{memory}",
            ui::plural(report.step, "step"),
            ui::duration(report.seconds),
            ui::count(report.targets),
            ui::count(report.tokens),
        ));
        ui.say(format_args!("model and report: {dir} (report.html, README.md, metrics.jsonl)"));
        Ok(())
    }
}

/// A value as `--set` takes it.
fn plain(value: &serde_json::Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_string)
}

/// The first weights of models.
pub struct Start<'a> {
    /// Hears of tensors that have no place.
    pub ui: &'a Ui,
    /// The model's folder.
    pub dir: &'a Path,
    /// Its config.json.
    pub arch: &'a Architecture,
    /// From the folder, or random.
    pub init: Init,
    /// The seed of random weights.
    pub seed: u64,
    /// True once the user has been told of tensors that are not used.
    pub told: bool,
}

impl Start<'_> {
    /// A model with these weights; the same every time.
    pub fn build(&mut self, budget: Budget) -> suasion_train::Result<Model> {
        // Memory that is promised and not there kills the process later, with no word why.
        let bytes = MemoryPlan::of(self.arch, budget).total();
        if super::env::memory().0.is_some_and(|total| bytes > total) {
            return Err(suasion_engine::Error::Memory { bytes }.into());
        }
        let mut model = Model::new(self.arch.clone(), Cpu::new(), budget)?;
        match self.init {
            Init::Random => model.init_random(self.seed),
            Init::Weights => {
                let unused = model.load_weights(self.dir)?;
                if !unused.is_empty() && !std::mem::replace(&mut self.told, true) {
                    let more = if unused.len() > 3 { ", …" } else { "" };
                    let names = unused[..unused.len().min(3)].join(", ");
                    self.ui.warn(format_args!(
                        "{}: {} not used by {}: {names}{more}",
                        self.dir.display(),
                        ui::plural(unused.len() as u64, "tensor"),
                        self.arch.model_type
                    ));
                }
            }
        }
        Ok(model)
    }
}

/// A tokenizer that can produce ids which the model has no embedding for belongs to another model.
pub fn check_vocabulary(
    dir: &Path,
    arch: &Architecture,
    tokenizer: Option<&Tokenizer>,
) -> anyhow::Result<()> {
    match tokenizer {
        Some(tokenizer) if tokenizer.vocab_size() > arch.vocab_size => Err(Failure::run_time(
            "E-VOCAB",
            format!(
                "{}: the tokenizer's ids go up to {}, and config.json has vocab_size {}",
                dir.display(),
                tokenizer.vocab_size() - 1,
                arch.vocab_size
            ),
            "the tokenizer and the model do not belong together, or the model's embeddings need to be resized",
        )
        .into()),
        _ => Ok(()),
    }
}

/// What decides every label, and which rows are trained on.
fn fingerprint(rows: &RowSet, config: &Config, tokenizer: Option<&Tokenizer>) -> String {
    let source = rows.summary.source.as_ref().map_or("", |source| source.blake3.as_str());
    let template = rows.summary.template.as_deref();
    let tokenizer = tokenizer.map(Tokenizer::fingerprint);
    let labels = prepared::fingerprint(source, tokenizer, template, &rows.summary.pinned(&config.policy()));
    match config.eval_fraction {
        0.0 => labels,
        fraction => format!("{labels}, {fraction} held out by seed {}", config.seed),
    }
}

/// Prepared data that was made with another tokenizer or for another objective is not this run's.
pub fn check_manifest(
    data: &DataFiles,
    tokenizer: Option<&Tokenizer>,
    template: Option<&ChatTemplate>,
    policy: &Policy,
) -> anyhow::Result<()> {
    let Some(manifest) = data.manifest()? else { return Ok(()) };
    let mut differences = manifest.mismatches(tokenizer.map(Tokenizer::fingerprint), policy);
    differences.extend(manifest.other_template(template.map(ChatTemplate::fingerprint)));
    if differences.is_empty() {
        return Ok(());
    }
    Err(Failure::run_time(
        "E-FINGERPRINT",
        format!("{}: prepared for something else: {}", data.name.display(), differences.join("; ")),
        "prepare the rows again with this model and configuration, or remove the manifest beside them if it belongs to other data",
    )
    .into())
}

/// What the model card and the report say of the data.
fn data_card(
    config: &Config,
    rows: &RowSet,
    train: &[Sample],
    eval: Option<&RowSet>,
    eval_rows: usize,
) -> DataCard {
    // What was read, and, of it, what is trained on: held-out rows are not.
    let (summary, trained) = (&rows.summary, Summary::of(train));
    let name = |path: &Option<PathBuf>| path.as_deref().map(|p| p.display().to_string()).unwrap_or_default();
    DataCard {
        title: config
            .output_dir
            .file_name()
            .map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned()),
        base_model: match config.init {
            Init::Weights => name(&config.model_name_or_path),
            Init::Random => {
                format!("random weights for the config.json of {}", name(&config.model_name_or_path))
            }
        },
        data: vec![rows.name.display().to_string()],
        eval_data: match eval {
            Some(rows) => vec![rows.name.display().to_string()],
            None if eval_rows > 0 => vec![format!("{eval_rows} rows held out of the training data")],
            None => Vec::new(),
        },
        rows_read: summary.rows,
        rows_kept: trained.kept,
        rows_cut: summary.cut,
        rows_dropped: summary.dropped_rows(),
        rows_failed: summary.failed,
        eval_rows: eval_rows as u64,
        tokens: trained.tokens,
        supervised_tokens: trained.supervised_tokens,
        sections: trained
            .sections()
            .map(|(name, stats)| SectionShare {
                name: name.to_string(),
                tokens: stats.tokens,
                share_before: trained.share_before(name),
                share_after: trained.share_after(name),
            })
            .collect(),
        findings: summary
            .findings
            .iter()
            .map(|(code, found)| FindingCount {
                code: code.to_string(),
                level: found.level.to_string(),
                count: found.count,
                example: rows
                    .examples
                    .get(code)
                    .map(|finding| format!("row {}: {}", finding.row, finding.message))
                    .unwrap_or_default(),
            })
            .collect(),
        configuration: config.to_yaml(),
    }
}

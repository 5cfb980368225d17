//! A small model, rows that it can learn, and a run over them.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use suasion_data::{IGNORE, Objective, Origin, RowId, Sample, Section};
use suasion_engine::{Architecture, Budget, Collective, Device, Model, SingleRank};
use suasion_train::{
    DataCard, Event, Identity, ModelFiles, Observer, Plan, Report, Result, Resume, Run, Settings,
};
use tempfile::TempDir;

pub const VOCAB: u32 = 96;
pub const STOP: u32 = 2;

pub const CONFIG: &str = r#"{
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 96, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-05, "tie_word_embeddings": false, "hidden_act": "silu",
    "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16",
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}
}"#;

pub fn architecture() -> Architecture {
    Architecture::from_json(&serde_json::from_str(CONFIG).unwrap(), Path::new("config.json")).unwrap()
}

/// A model with the same random weights each time.
pub fn model(budget: Budget) -> Model {
    let mut model = Model::new(architecture(), Device::cpu(), budget).unwrap();
    model.init_random(7).unwrap();
    model
}

pub fn id(row: usize) -> RowId {
    RowId::new(Path::new("rows.jsonl"), row as u64, Some(row as u64 + 1))
}

/// A stream of numbers for making rows (Knuth's MMIX generator).
pub struct Numbers(pub u64);

impl Numbers {
    pub fn below(&mut self, n: u32) -> u32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 33) % u64::from(n)) as u32
    }
}

/// Rows of different lengths: BOS, a fixed system part, a task, and a response that counts on from the task's
/// last token, then the stop token.
pub fn rows(n: usize, seed: u64) -> Vec<Sample> {
    let mut numbers = Numbers(seed);
    (0..n)
        .map(|row| {
            let mut ids = vec![1];
            let mut origins = vec![Origin::Scaffold];
            let mut put = |id: u32, origin| {
                ids.push(id);
                origins.push(origin);
            };
            let prompt = |section| Origin::Prompt { turn: 0, section };
            (0..6).for_each(|i| put(10 + i, prompt(Section::System)));
            (0..4 + numbers.below(8)).for_each(|_| put(20 + numbers.below(20), prompt(Section::Task)));
            let first = 40 + numbers.below(20);
            put(first, prompt(Section::Task));
            (1..3 + numbers.below(6)).for_each(|i| put(first + i, Origin::Response { turn: 1 }));
            put(STOP, Origin::EndOfTurn { turn: 1 });
            let labels =
                ids.iter().zip(&origins).map(|(&id, o)| if o.supervised() { id as i32 } else { IGNORE });
            Sample {
                id: id(row),
                labels: labels.collect(),
                input_ids: ids,
                origins,
                weights: None,
                pack: None,
            }
        })
        .collect()
}

/// Settings that are quick and log every step.
pub fn quick() -> Settings {
    Settings {
        per_device_train_batch_size: 2,
        per_device_eval_batch_size: 3,
        learning_rate: 3e-3,
        logging_steps: 1.into(),
        save_strategy: suasion_train::Strategy::No,
        ..Settings::default()
    }
}

pub fn identity() -> Identity {
    Identity { objective: Objective::ResponseOnly, data_fingerprint: "f1".into(), masking_version: 1 }
}

/// Keeps the events of a run, and raises the stop flag after a step.
#[derive(Default)]
pub struct Listener<'a> {
    pub warnings: Vec<String>,
    pub checkpoints: Vec<(u64, Vec<PathBuf>)>,
    pub names: Vec<String>,
    pub stop_after: Option<(u64, &'a AtomicBool)>,
    /// After a step, makes a file of this name.
    pub block_at: Option<(u64, PathBuf)>,
    /// After a step, removes this folder.
    pub remove_at: Option<(u64, PathBuf)>,
}

impl Observer for Listener<'_> {
    fn event(&mut self, event: &Event<'_>) {
        match event {
            Event::Plan { .. } => self.names.push("plan".into()),
            Event::Step(step) => {
                self.names.push(format!("step {}", step.step));
                if let Some((at, flag)) = self.stop_after
                    && step.step == at
                {
                    flag.store(true, Ordering::Relaxed);
                }
                if let Some((_, path)) = self.block_at.as_ref().filter(|(at, _)| *at == step.step) {
                    std::fs::write(path, "").unwrap();
                }
                if let Some((_, path)) = self.remove_at.as_ref().filter(|(at, _)| *at == step.step) {
                    std::fs::remove_dir_all(path).unwrap();
                }
            }
            Event::Eval { step, .. } => self.names.push(format!("eval {step}")),
            Event::Warning(text) => self.warnings.push(text.to_string()),
            Event::Checkpoint { step, removed, .. } => {
                self.names.push(format!("checkpoint {step}"));
                self.checkpoints.push((*step, removed.to_vec()));
            }
            Event::Interrupted { step, .. } => self.names.push(format!("interrupted {step}")),
            Event::Done(_) => self.names.push("done".into()),
            _ => {}
        }
    }
}

impl Listener<'_> {
    /// True if there was an event of this name.
    pub fn heard(&self, name: &str) -> bool {
        self.names.iter().any(|heard| heard == name)
    }
}

/// A run in all its parts; tests change the ones they are about.
pub struct Job<'a> {
    pub train: &'a [Sample],
    pub eval: &'a [Sample],
    pub settings: Settings,
    pub identity: Identity,
    pub dir: &'a Path,
    pub resume: Resume,
    pub overwrite: bool,
    pub extend: bool,
    pub collective: &'a dyn Collective,
    /// Beside `config.json` in every checkpoint.
    pub more_files: Vec<(&'a str, Vec<u8>)>,
    pub listener: Listener<'a>,
    pub stop: &'a AtomicBool,
}

pub static NEVER: AtomicBool = AtomicBool::new(false);

impl<'a> Job<'a> {
    pub fn new(train: &'a [Sample], settings: Settings, dir: &'a Path) -> Job<'a> {
        Job {
            train,
            eval: &[],
            settings,
            identity: identity(),
            dir,
            resume: Resume::No,
            overwrite: false,
            extend: false,
            collective: &SingleRank,
            more_files: Vec::new(),
            listener: Listener::default(),
            stop: &NEVER,
        }
    }

    pub fn eval(self, eval: &'a [Sample]) -> Job<'a> {
        Job { eval, ..self }
    }

    pub fn resume(self, resume: Resume) -> Job<'a> {
        Job { resume, ..self }
    }

    /// With a stop flag that is raised after this step; 0 raises it at once.
    pub fn stop_after(mut self, step: u64, flag: &'a AtomicBool) -> Job<'a> {
        flag.store(step == 0, Ordering::Relaxed);
        self.listener.stop_after = Some((step, flag));
        Job { stop: flag, ..self }
    }

    /// The model of [`model`], with the budget of the run's plan.
    pub fn model(&self) -> Result<Model> {
        let ranks = self.collective.ranks();
        Ok(model(Plan::of_ranks(self.train, self.eval, &self.settings, ranks)?.budget))
    }

    pub fn run(&mut self) -> Result<Report> {
        let mut model = self.model()?;
        self.run_with(&mut model)
    }

    /// Runs, and returns the final weights too.
    pub fn run_to_bits(&mut self) -> (Report, Vec<Vec<u32>>) {
        let mut model = self.model().unwrap();
        let report = self.run_with(&mut model).unwrap();
        (report, bits(&model))
    }

    pub fn run_with(&mut self, model: &mut Model) -> Result<Report> {
        let mut files = ModelFiles::default();
        files.push("config.json", CONFIG.as_bytes().to_vec());
        self.more_files.iter().for_each(|(name, bytes)| files.push(name, bytes.clone()));
        let run = Run {
            model,
            train: self.train,
            eval: self.eval,
            settings: &self.settings,
            identity: &self.identity,
            card: &DataCard::default(),
            files: &files,
            extra: &[],
            stops: &[],
            decode: None,
            tensorboard: None,
            collective: self.collective,
            output_dir: self.dir,
            resume: self.resume.clone(),
            extend: self.extend,
            overwrite: self.overwrite,
            lock: None,
        };
        suasion_train::train(run, &mut self.listener, self.stop)
    }
}

/// A temporary folder, and the path of a run's output folder in it.
pub fn folder() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    (dir, run)
}

pub fn bytes(path: impl AsRef<Path>) -> Vec<u8> {
    let path = path.as_ref();
    std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

pub fn json(path: impl AsRef<Path>) -> Value {
    // Python writes NaN where a padded row sees no key; nothing that is compared has one.
    let text = String::from_utf8(bytes(path)).unwrap().replace("NaN", "null");
    serde_json::from_str(&text).unwrap()
}

/// The steps whose checkpoints lie in an output folder.
pub fn checkpoints(dir: &Path) -> Vec<u64> {
    suasion_train::checkpoint::list(dir).into_iter().map(|(step, _)| step).collect()
}

/// The lines of rows in their file, counted from 1.
pub fn lines(rows: &[RowId]) -> Vec<u64> {
    rows.iter().map(|row| row.line.unwrap()).collect()
}

/// All parameters, to the bit.
pub fn bits(model: &Model) -> Vec<Vec<u32>> {
    let tensor = |name: &String| model.parameter(name).unwrap().data.iter().map(|v| v.to_bits()).collect();
    model.parameter_names().iter().map(tensor).collect()
}

/// A metrics file without what differs from run to run.
pub fn metrics(dir: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    let line = |line: &str| {
        let mut value: Value = serde_json::from_str(line).unwrap();
        let fields = value.as_object_mut().unwrap();
        fields.remove("tokens_per_second");
        fields.remove("peak_memory_bytes");
        value
    };
    text.lines().map(line).collect()
}

/// The folders of models whose runs PyTorch computed: those of the repository, then the internal material's where
/// this machine has it.
pub fn golden_models() -> Vec<PathBuf> {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    let ours = crate_dir.join("../../tests/goldens/models");
    let mut all: Vec<PathBuf> = suasion_test_support::MODELS.map(|name| ours.join(name)).into();
    if let Some(material) = suasion_test_support::material_folder() {
        all.extend(
            ["llama", "qwen2", "gpt2", "phi3", "gemma2"].map(|name| material.join("models").join(name)),
        );
    }
    all
}

/// A file of a golden model.
pub fn golden(dir: &Path, name: &str) -> Value {
    json(dir.join(name))
}

//! A tokenizer whose ids can be computed by hand, and files for tests.
#![allow(dead_code, unused_imports)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use suasion_data::prepared::{self, Job, Manifest, Shape};
use suasion_data::render::Stops;
use suasion_data::source::Source;
use suasion_data::template::ChatTemplate;
use suasion_data::tokens::Tokenizer;
use suasion_data::{Kept, ModelFolder, OnBadRow, Outcome, Pipeline, Policy, Summary};
pub use suasion_test_support::material;

/// The ids of the special tokens of [`byte_tokenizer`]; every byte is its own id, below them.
pub const EOS: u32 = 256;
pub const BOS: u32 = 257;
pub const PAD: u32 = 258;

/// GPT-2's printable character for a byte.
fn stand_in(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return byte as char;
    }
    let before = (0..byte).filter(|b| !printable(*b)).count() as u32;
    char::from_u32(256 + before).unwrap()
}

/// A byte-level tokenizer without merges: the ids of a text are its bytes. `bos`: a post-processor adds it.
pub fn byte_tokenizer(bos: bool) -> Arc<Tokenizer> {
    let mut vocab = serde_json::Map::new();
    for byte in 0..=255u8 {
        vocab.insert(stand_in(byte).to_string(), byte.into());
    }
    let added: Vec<serde_json::Value> = [(EOS, "<|end|>"), (BOS, "<|bos|>"), (PAD, "<|pad|>")]
        .iter()
        .map(|(id, content)| {
            serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        })
        .collect();
    let post = bos.then(|| {
        serde_json::json!({"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|bos|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [BOS], "tokens": ["<|bos|>"]}}})
    });
    let json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true},
        "post_processor": post,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []}
    });
    let mut config = serde_json::json!({"eos_token": "<|end|>", "pad_token": "<|pad|>"});
    if bos {
        config["bos_token"] = "<|bos|>".into();
    }
    Tokenizer::from_bytes(json.to_string().as_bytes(), Some(config.to_string().as_bytes())).unwrap().into()
}

/// The ids of a text under [`byte_tokenizer`].
pub fn bytes(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

/// A file in its own folder.
pub struct Scratch {
    pub dir: tempfile::TempDir,
}

impl Scratch {
    pub fn new() -> Scratch {
        Scratch { dir: tempfile::tempdir().unwrap() }
    }

    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The names in the folder, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(self.dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

/// All outcomes of a run and its summary.
pub fn outcomes(pipeline: &Pipeline, path: &Path) -> (Vec<Outcome>, Summary) {
    let mut rows = pipeline.rows(Source::open(path).unwrap()).unwrap();
    let all = rows.by_ref().collect::<Result<_, _>>().unwrap();
    (all, rows.into_summary())
}

/// A pipeline of a tokenizer without a chat template.
pub fn pipeline_of(tokenizer: Option<&Arc<Tokenizer>>, policy: &Policy) -> Pipeline {
    Pipeline::new(tokenizer.cloned().map_or_else(ModelFolder::default, ModelFolder::from), policy.clone())
}

/// The same pipeline with a chat template.
pub fn with_template(pipeline: &Pipeline, template: &Arc<ChatTemplate>) -> Pipeline {
    let mut folder = ModelFolder::default();
    folder.tokenizer.clone_from(&pipeline.folder.tokenizer);
    folder.vocab_size = pipeline.folder.vocab_size;
    folder.template = Some(template.clone());
    Pipeline { folder: folder.into(), ..pipeline.clone() }
}

/// ChatML with short markers; `<|end|>` is the stop token of [`byte_tokenizer`].
pub const CHATML: &str = "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '<|end|>' + '\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}";

/// The outcomes of rows under a template whose stop token is `<|end|>`; rows that fail are skipped.
pub fn run_chats(template: &str, rows: &[serde_json::Value], policy: &Policy) -> Vec<Outcome> {
    let template = Arc::new(ChatTemplate::new(template, Some("<|bos|>"), Some("<|end|>")).unwrap());
    let scratch = Scratch::new();
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    let path = scratch.file("rows.jsonl", lines);
    let policy = Policy { on_bad_row: suasion_data::OnBadRow::Skip, ..policy.clone() };
    outcomes(&with_template(&pipeline_of(Some(&byte_tokenizer(false)), &policy), &template), &path).0
}

/// The same pipeline for a model with this many embeddings.
pub fn with_embeddings(pipeline: &Pipeline, vocab_size: usize) -> Pipeline {
    let mut folder = ModelFolder::default();
    folder.tokenizer.clone_from(&pipeline.folder.tokenizer);
    folder.template.clone_from(&pipeline.folder.template);
    folder.vocab_size = Some(vocab_size);
    Pipeline { folder: folder.into(), ..pipeline.clone() }
}

/// The kept row at `index` of the outcomes.
pub fn kept(outcomes: &[Outcome], index: usize) -> &Kept {
    match &outcomes[index] {
        Outcome::Kept(kept) => kept,
        other => panic!("row {index} was not kept: {other:?}"),
    }
}

/// The codes found in an outcome, with their levels' first letters: `M001:e`.
pub fn codes(outcome: &Outcome) -> Vec<String> {
    outcome.findings().iter().map(|f| format!("{}:{}", f.code, &f.level.to_string()[..1])).collect()
}

/// Tokenizers, templates and rows, with the results of other programs (`tests/goldens/README.md`).
pub struct Goldens {
    pub dir: PathBuf,
    /// True for the repository's own folder, `tests/goldens`; false for the internal material.
    pub ours: bool,
}

impl Goldens {
    /// The repository's own folder.
    pub fn repository() -> Goldens {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens");
        assert!(dir.join("goldens").is_dir(), "{} is missing", dir.display());
        Goldens { dir, ours: true }
    }

    /// The expected value for this folder.
    pub fn expect<T>(&self, repository: T, material: T) -> T {
        if self.ours { repository } else { material }
    }

    pub fn text(&self, path: &str) -> String {
        let path = self.dir.join(path);
        std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    }

    pub fn json(&self, path: &str) -> serde_json::Value {
        serde_json::from_str(&self.text(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
    }

    /// The rows of a file of JSON Lines.
    pub fn lines(&self, path: &str) -> Vec<serde_json::Value> {
        self.text(path).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Rows with a `prompt` and a `completion`.
    pub fn prompt_completion(&self) -> &'static str {
        self.expect("datasets/prompt_completion.jsonl", "datasets/cmv_prompt_completion.jsonl")
    }
}

/// The repository's goldens, then the internal material if this machine has it.
pub fn goldens() -> Vec<Goldens> {
    let mut all = vec![Goldens::repository()];
    all.extend(suasion_test_support::material_folder().map(|dir| Goldens { dir, ours: false }));
    all
}

/// Rows of many lengths: some are cut, some lose their response, some fail, some repeat.
pub fn mixed_rows(n: usize) -> String {
    let mut out = String::new();
    for i in 0..n {
        let prompt =
            format!("[SYSTEM] be kind [CONTEXT] {}[TASK] row {} ", "long ago ".repeat(i % 13), i % 400);
        let row = match i % 50 {
            7 => serde_json::json!({"prompt": prompt, "completion": ""}),
            9 => serde_json::json!({"prompt": prompt}),
            11 => serde_json::json!({"input_text": "a", "full_text": "b"}),
            13 => serde_json::json!({"prompt": prompt.repeat(6).replace("[", " "), "completion": "yes"}),
            _ => {
                serde_json::json!({"input_text": prompt, "full_text": format!("{prompt}{}", "well, yes. ".repeat(i % 17 + 1))})
            }
        };
        out.push_str(&format!("{row}\n"));
        if i % 50 == 20 {
            out.push_str("{broken\n");
        }
    }
    out
}

/// Bad rows are left out, long ones are cut, and prompts have a small weight.
pub fn skipping() -> Policy {
    Policy {
        on_bad_row: OnBadRow::Skip,
        max_length: Some(200),
        prompt_loss_weight: 0.125,
        ..Policy::default()
    }
}

/// A job that writes one file and is never stopped.
pub fn job<'a>(pipeline: &'a Pipeline, source: &'a PathBuf, output: &'a Path, shape: Shape) -> Job<'a> {
    static NEVER: AtomicBool = AtomicBool::new(false);
    let files = std::slice::from_ref(source);
    Job { pipeline, name: source, files, output, shape, rebuild: false, stop: &NEVER }
}

/// Prepares a source into one file.
pub fn prepare(pipeline: &Pipeline, source: &Path, out: &Path, with_text: bool) -> Manifest {
    let shape = Shape { with_text, max_shard_bytes: None };
    prepared::prepare(&job(pipeline, &source.to_path_buf(), out, shape), |_| {}, |_| {}).unwrap()
}

/// The texts that end a turn under a template of `template_meta.json`: those that it gives, else those of the
/// models' own `generation_config.json`.
pub fn golden_stops(name: &str, meta: &serde_json::Value) -> Stops {
    let eos = meta["eos_token"].as_str().unwrap();
    if let Some(more) = meta["stops"].as_array() {
        let more = more.iter().map(|stop| stop.as_str().unwrap().to_string());
        return Stops { eos: Some(eos.into()), all: std::iter::once(eos.to_string()).chain(more).collect() };
    }
    let more: &[&str] = match name {
        n if n.contains("gemma") => &["<end_of_turn>"],
        n if n.contains("phi") => &["<|end|>"],
        n if n.contains("glm") || n.contains("GLM") => &["<|user|>", "<|observation|>"],
        n if n.contains("gptoss") => &["<|return|>", "<|call|>", "<|end|>"],
        n if n.contains("GigaChat") => &["<|message_sep|>"],
        n if n.contains("Seed") => &["<seed:eos>"],
        n if n.contains("granite") => &["<|end_of_text|>"],
        n if n.contains("idefics") => &["<end_of_utterance>"],
        n if n.contains("Kimi") || n.contains("Bielik") || n.contains("Hermes") => &["<|im_end|>"],
        n if n.contains("metharme") => &["<|user|>", "<|model|>"],
        n if n.contains("lama3") => &["<|eom_id|>", "<|eot_id|>"],
        _ => &[],
    };
    let mut all = vec![eos];
    all.extend(more);
    Stops { eos: Some(eos.into()), all: all.into_iter().map(str::to_string).collect() }
}

/// A row as TRL prepared it (`goldens/trl.jsonl`).
pub struct TrlGolden {
    /// The row that it was made from (goldens/README.md).
    pub src: String,
    pub ids: Vec<u32>,
    pub supervised: Vec<bool>,
    /// Whether a token has bytes of the prompt and of the completion, if the golden says so.
    pub crosses: Option<bool>,
}

/// TRL's rows of the wanted cases, by case.
pub fn trl_goldens(folder: &Goldens, wanted: impl Fn(&str) -> bool) -> BTreeMap<String, Vec<TrlGolden>> {
    let mut cases: BTreeMap<String, Vec<TrlGolden>> = BTreeMap::new();
    for row in folder.lines("goldens/trl.jsonl") {
        let case = row["case"].as_str().unwrap();
        if !wanted(case) {
            continue;
        }
        let ids: Vec<u32> = serde_json::from_value(row["input_ids"].clone()).unwrap();
        let mut supervised = Vec::new();
        for (i, run) in row["sup_rle"].as_array().unwrap().iter().enumerate() {
            supervised.extend(std::iter::repeat_n(i % 2 == 1, run.as_u64().unwrap() as usize));
        }
        assert_eq!(ids.len(), supervised.len());
        let src = row["src"].as_str().unwrap().to_string();
        cases.entry(case.into()).or_default().push(TrlGolden {
            src,
            ids,
            supervised,
            crosses: row["crosses"].as_bool(),
        });
    }
    cases
}

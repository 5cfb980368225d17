//! The parsers of foreign bytes in this crate, with valid inputs: damaged in `fuzz.rs`, and fuzzed by the targets
//! in the repository's `fuzz/`.

use serde_json::{Value, json};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use suasion_data::convert::{self, Options};
use suasion_data::prepared::Manifest;
use suasion_data::source::{Row, Saved, Source, saved_dataset};
use suasion_data::template::ChatTemplate;
use suasion_data::tokens::Tokenizer;
use suasion_data::{Mode, ModelFolder, Pipeline, Policy, RowProcessor};
use suasion_test_support::fuzz::{Parser, reached};
use suasion_test_support::repository;
use tempfile::TempDir;

fn goldens() -> PathBuf {
    repository().join("tests/goldens")
}

/// The files of a folder with one of these extensions, in order.
fn files(folder: &Path, endings: &[&str]) -> Vec<Vec<u8>> {
    let mut paths: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|end| endings.contains(&end.to_str().unwrap())));
    paths.sort();
    assert!(!paths.is_empty(), "{}", folder.display());
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

/// The first rows of a file of lines: small enough to parse quickly.
fn head(bytes: Vec<u8>, lines: usize) -> Vec<u8> {
    bytes.split_inclusive(|byte| *byte == b'\n').take(lines).flatten().copied().collect()
}

/// Reads a file to its end, with every row.
fn read(path: &Path) {
    let Ok(mut source) = Source::open(path) else { return };
    while let Ok(Some(raw)) = source.next_row() {
        reached(Row::parse(raw));
    }
}

fn all(kind: usize, inputs: impl IntoIterator<Item = Vec<u8>>) -> impl Iterator<Item = (usize, Vec<u8>)> {
    inputs.into_iter().map(move |bytes| (kind, bytes))
}

/// Rows as text, compressed or not: the scanner of rows, lenient numbers, the finder of CSV records, the detection of
/// formats.
pub struct Rows(TempDir);

impl Parser for Rows {
    const NAME: &'static str = "rows";
    const KINDS: usize = 7;

    fn seeds() -> Vec<(usize, Vec<u8>)> {
        let texts =
            files(&goldens().join("datasets"), &["jsonl", "csv"]).into_iter().map(|file| head(file, 5));
        let mut seeds: Vec<_> = all(4, texts).collect();
        let json = br#"[{"n": 1e999, "a": [NaN, -Infinity]}, {"n": 123456789012345678901234567890}]"#;
        seeds.extend(all(1, [json.to_vec(), br#"{"version": 1, "data": [{"n": 1}, {"n": 2}]}"#.to_vec()]));
        let lines = b"{\"a\": \"x\\u00e9\", \"b\": [1, 2.5, null]}\r\n\n{\"a\": \"\", \"b\": []}\n";
        seeds.extend(all(0, [lines.to_vec(), b"\xef\xbb\xbf{\"a\": 1}".to_vec()]));
        seeds.push((2, b"a,b\n\"x \"\"y\"\"\n\",2\n3,4\n".to_vec()));
        seeds.push((3, b"a\tb\nx\ty\n".to_vec()));
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        gzip.write_all(&lines.repeat(9)).unwrap();
        seeds.push((5, gzip.finish().unwrap()));
        seeds.push((6, zstd::encode_all(&lines.repeat(9)[..], 3).unwrap()));
        seeds
    }

    fn new() -> Rows {
        Rows(tempfile::tempdir().unwrap())
    }

    fn parse(&mut self, kind: usize, bytes: &[u8]) {
        let names = ["x.jsonl", "x.json", "x.csv", "x.tsv", "x", "x.jsonl.gz", "x.jsonl.zst"];
        let path = self.0.path().join(names[kind]);
        fs::write(&path, bytes).unwrap();
        read(&path);
    }
}

/// Rows as columns: Parquet, Arrow files and streams, and the state of folders of `save_to_disk`.
pub struct Columns(TempDir);

impl Parser for Columns {
    const NAME: &'static str = "columns";
    const KINDS: usize = 4;

    fn seeds() -> Vec<(usize, Vec<u8>)> {
        let folder = repository().join("crates/data/tests/columnar");
        let parquet = all(0, files(&folder, &["parquet"]));
        let arrow = all(1, files(&folder, &["arrow"]));
        let mut seeds: Vec<_> = parquet.chain(arrow).collect();
        seeds.push((2, fs::read(folder.join("tokens_saved/state.json")).unwrap()));
        seeds.push((
            2,
            br#"{"_data_files": [{"filename": "x.arrow"}], "_indices_data_files": null}"#.to_vec(),
        ));
        seeds.push((3, br#"{"splits": ["train", "test"]}"#.to_vec()));
        seeds
    }

    fn new() -> Columns {
        suasion_data::hush_guarded_panics();
        let dir = tempfile::tempdir().unwrap();
        let good = repository().join("crates/data/tests/columnar/types_stream.arrow");
        fs::create_dir(dir.path().join("saved")).unwrap();
        fs::copy(good, dir.path().join("saved/x.arrow")).unwrap();
        Columns(dir)
    }

    fn parse(&mut self, kind: usize, bytes: &[u8]) {
        let names = ["x.parquet", "x.arrow", "saved/state.json", "saved/dataset_dict.json"];
        let path = self.0.path().join(names[kind]);
        fs::write(&path, bytes).unwrap();
        if kind < 2 {
            read(&path);
            return;
        }
        if let Ok(Some(Saved::Files(files))) = saved_dataset(path.parent().unwrap()) {
            files.iter().for_each(|file| read(file));
        }
        fs::remove_file(&path).unwrap();
    }
}

/// All stages over rows of every format, including conversations and tokens: rendering, tokens, labels,
/// truncation, audit; and the manifest of prepared rows.
pub struct Stages {
    dir: TempDir,
    pipeline: Pipeline,
    rows: RowProcessor,
}

/// A tokenizer with a chat template.
fn chat_model() -> ModelFolder {
    let tokenizer = Tokenizer::from_dir(&goldens().join("tokenizers/smollm")).unwrap();
    let mut folder = ModelFolder::from(Arc::new(tokenizer));
    let source = fs::read_to_string(goldens().join("templates/tools.jinja")).unwrap();
    folder.template = Some(Arc::new(ChatTemplate::new(&source, None, Some("<|im_end|>")).unwrap()));
    folder
}

impl Parser for Stages {
    const NAME: &'static str = "stages";
    const KINDS: usize = 3;

    fn seeds() -> Vec<(usize, Vec<u8>)> {
        let texts = files(&goldens().join("datasets"), &["jsonl"]).into_iter().map(|file| head(file, 3));
        let sections = fs::read(repository().join("examples/persuasion/rows.jsonl")).unwrap();
        let tokens = r#"{"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "weights": [0, 1, 0.5], "origins": "BRE"}
{"row": 1, "input_ids": [4, 5, 6, 7], "labels": [-100, 5, -100, 7], "origins": "CRKR", "position_ids": [0, 1, 0, 1], "seq_lengths": [2, 2], "rows": [0, 1]}
{"input_ids": [1, 2], "completion_mask": [0, 1], "attention_mask": [1, 1], "assistant_masks": [0, 1]}
"#;
        let texts: Vec<_> = texts.chain([head(sections, 3), tokens.into()]).collect();
        let manifest = {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("x.jsonl");
            fs::write(&path, &texts[0]).unwrap();
            let pipeline = Pipeline::new(chat_model(), Policy::default());
            let prepared = suasion_data::prepared::prepare_rows(
                &pipeline,
                Source::open(&path).unwrap(),
                Path::new("x.jsonl"),
                |_| true,
            );
            serde_json::to_vec(&prepared.unwrap().manifest).unwrap()
        };
        all(0, texts.clone()).chain(all(1, texts)).chain([(2, manifest)]).collect()
    }

    fn new() -> Stages {
        suasion_data::hush_guarded_panics();
        let policy = Policy { max_length: Some(48), ..Policy::default() };
        let pipeline = Pipeline { mode: Mode::Verify, ..Pipeline::new(chat_model(), policy) };
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("prepared.jsonl"), "").unwrap();
        Stages { dir, rows: pipeline.processor().unwrap(), pipeline }
    }

    fn parse(&mut self, kind: usize, bytes: &[u8]) {
        let path = self.dir.path().join(["x.jsonl", "x.jsonl", "prepared.jsonl.manifest.json"][kind]);
        fs::write(&path, bytes).unwrap();
        if kind == 2 {
            if let Ok(Some(manifest)) = Manifest::beside(self.dir.path().join("prepared.jsonl")) {
                manifest.mismatches(None, &Policy::default());
                manifest.other_template(Some("x"));
                manifest.labelled_under(&Policy::default());
                manifest.paths(&path);
            }
            return;
        }
        let Ok(mut source) = Source::open(&path) else { return };
        if kind == 1 {
            if let Ok(rows) = self.pipeline.rows(source) {
                rows.take_while(Result::is_ok).for_each(drop);
            }
            return;
        }
        while let Ok(Some(raw)) = source.next_row() {
            reached(self.rows.raw_row(raw));
        }
    }
}

/// Chat templates: their rewriting, their rendering, and the proofs of answers.
pub struct Templates(Arc<Tokenizer>);

impl Parser for Templates {
    const NAME: &'static str = "templates";

    fn seeds() -> Vec<(usize, Vec<u8>)> {
        all(0, files(&goldens().join("templates"), &["jinja"])).collect()
    }

    fn new() -> Templates {
        suasion_data::hush_guarded_panics();
        Templates(Arc::new(Tokenizer::from_dir(&goldens().join("tokenizers/smollm")).unwrap()))
    }

    fn parse(&mut self, _: usize, bytes: &[u8]) {
        let source = String::from_utf8_lossy(bytes);
        let Ok(template) = ChatTemplate::new(&source, Some("<s>"), Some("</s>")) else { return };
        let mut folder = ModelFolder::from(Arc::clone(&self.0));
        folder.template = Some(Arc::new(template.with_tokens(self.0.named_tokens())));
        let row = json!({
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "One?"},
                {"role": "assistant", "content": "Two.", "tool_calls":
                    [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]},
                {"role": "tool", "name": "f", "content": "3"},
                {"role": "assistant", "content": "Three."},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        });
        let Value::Object(row) = row else { return };
        let pipeline = Pipeline { mode: Mode::Verify, ..Pipeline::new(folder, Policy::default()) };
        reached(pipeline.processor().and_then(|rows| rows.row(row)));
    }
}

/// The files of a tokenizer: stages, vocabulary and merges, special tokens. A tokenizer that can be opened must
/// encode and decode. Also text of any kind through each of our pre-tokenizers and BPE.
pub struct Tokenizers {
    dir: TempDir,
    tokenizers: Vec<Tokenizer>,
}

const TOKENIZER_FILES: [&str; 6] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "config.json",
];

impl Tokenizers {
    /// A valid tokenizer.json, to read the smaller files with.
    fn good() -> Vec<u8> {
        fs::read(goldens().join("tokenizers/gpt2/tokenizer.json")).unwrap()
    }
}

impl Parser for Tokenizers {
    const NAME: &'static str = "tokenizers";
    const KINDS: usize = 7;

    fn seeds() -> Vec<(usize, Vec<u8>)> {
        let folder = |name: &str| goldens().join("tokenizers").join(name);
        let names = ["gpt2", "llama2", "qwen2_5", "unigram", "gemma2", "deepseek"];
        let mut seeds: Vec<_> =
            all(0, names.map(|name| fs::read(folder(name).join("tokenizer.json")).unwrap())).collect();
        let configs =
            names.iter().filter_map(|name| fs::read(folder(name).join("tokenizer_config.json")).ok());
        seeds.extend(all(1, configs));
        let decoder = json!({"added_tokens_decoder": {"5": {"content": "<|x|>", "special": true, "lstrip": false,
            "rstrip": true, "single_word": false, "normalized": false}}, "eos_token": "<|x|>", "chat_template": "{{ messages }}"});
        seeds.push((1, decoder.to_string().into_bytes()));
        let map = json!({"eos_token": {"content": "</s>"}, "additional_special_tokens": ["<|a|>", "<|b|>"]});
        seeds.push((2, map.to_string().into_bytes()));
        seeds.push((3, br#"{"<|a|>": 300, "<|b|>": 301}"#.to_vec()));
        seeds.push((4, br#"{"eos_token_id": [0, 5], "pad_token_id": 0}"#.to_vec()));
        seeds.push((5, br#"{"vocab_size": 300, "text_config": {"eos_token_id": 1}}"#.to_vec()));
        let texts = [
            "It's 12,345 o'clock — don't\r\n\r\n  wait!!\t\t\u{a0}x",
            "ﬁ é\u{301} 漢字かな한글 \u{1F469}\u{200D}\u{1F680} \u{202e}abc",
            "<|endoftext|><|im_start|>user\n{\"a\": [1, 2]}<|im_end|>",
            "        return x\n\n\n\tif (a<=b) { /* */ }",
        ];
        seeds.extend(all(6, texts.map(|text| text.as_bytes().to_vec())));
        seeds
    }

    fn new() -> Tokenizers {
        suasion_data::hush_guarded_panics();
        let dir = tempfile::tempdir().unwrap();
        let names = ["gpt2", "llama3_2", "qwen2_5", "o200k", "tekken", "deepseek", "smollm"];
        let open = |name: &&str| Tokenizer::from_dir(&goldens().join("tokenizers").join(name)).unwrap();
        Tokenizers { dir, tokenizers: names.iter().map(open).collect() }
    }

    fn parse(&mut self, kind: usize, bytes: &[u8]) {
        let round = |tokenizer: &Tokenizer, text: &str| {
            if let Ok(ids) = tokenizer.encode_text(text) {
                tokenizer.decode(&ids, false);
            }
        };
        let Some(name) = TOKENIZER_FILES.get(kind) else {
            let text = String::from_utf8_lossy(bytes);
            self.tokenizers.iter().for_each(|tokenizer| round(tokenizer, &text));
            return;
        };
        if kind != 0 {
            fs::write(self.dir.path().join(TOKENIZER_FILES[0]), Tokenizers::good()).unwrap();
        }
        fs::write(self.dir.path().join(name), bytes).unwrap();
        if let Ok(ModelFolder { tokenizer: Some(tokenizer), .. }) = ModelFolder::open(self.dir.path()) {
            for text in ["Hello, world's 12 \u{1F642}\n\n  é", "<|im_end|>", ""] {
                round(&tokenizer, text);
            }
        }
        fs::remove_file(self.dir.path().join(name)).unwrap();
    }
}

/// The corpora of persuasion, converted to rows and to pairs.
pub struct Corpora(TempDir);

impl Parser for Corpora {
    const NAME: &'static str = "corpora";
    const KINDS: usize = 5;

    fn seeds() -> Vec<(usize, Vec<u8>)> {
        let utterances = r#"{"id": "t3_a", "speaker": "ann", "conversation_id": "t3_a", "reply_to": null, "text": "I like rain.\n\nEdit: thanks", "meta": {}}
{"id": "c1", "speaker": "bob", "conversation_id": "t3_a", "reply_to": "t3_a", "text": "&gt; rain\n\nSun dries clothes.", "meta": {"success": 1, "pair_ids": ["p1"]}}
{"id": "c2", "user": "ann", "root": "t3_a", "reply-to": "c1", "text": "!delta True, [TASK] it does.", "meta": {"success": null}}
{"id": "c3", "speaker": "DeltaBot", "conversation_id": "t3_a", "reply_to": "c2", "text": null, "meta": {"success": 0, "pair_ids": ["p1", 2]}}
"#;
        let conversations = r#"{"t3_a": {"meta": {"op-title": "CMV: Rain is best", "op-userID": "ann", "op-text-body": "I like rain."}}, "t3_b": {"title": "x"}}"#;
        let threads = r#"{"id": "t3_a", "outcome": "positive", "title": "CMV: Rain is best", "op": "I like rain.", "replies": [{"author": "u1", "text": "Sun dries clothes."}, {"author": "op", "text": "Rain waters plants. ∆ given, fully"}, {"author": "u1", "text": "[deleted]"}]}
{"id": "t3_a", "outcome": "negative", "title": "CMV: Rain is best", "op": "I like rain.", "replies": [{"author": "u2", "text": "_____\n> *Hello, users of CMV!* x"}]}
"#;
        let dialog =
            "Unit,Turn,B4,B2\nHello!,0,0,d1\n\"Hi, there.\",0,1,d1\nWill you give?,1,0,d1\nYes,1,1,d1\n";
        let information = "B2,B4,B6\nd1,0,0.0\nd1,1,0.5\n";
        let texts = [utterances, conversations, threads, dialog, information];
        texts.into_iter().enumerate().map(|(kind, text)| (kind, text.as_bytes().to_vec())).collect()
    }

    fn new() -> Corpora {
        let dir = tempfile::tempdir().unwrap();
        for (kind, bytes) in Corpora::seeds() {
            fs::create_dir_all(dir.path().join("corpus")).unwrap();
            fs::write(dir.path().join(CORPUS_FILES[kind]), bytes).unwrap();
        }
        Corpora(dir)
    }

    fn parse(&mut self, kind: usize, bytes: &[u8]) {
        let at = |kind: usize| self.0.path().join(CORPUS_FILES[kind]);
        let good = fs::read(at(kind)).unwrap();
        fs::write(at(kind), bytes).unwrap();
        let corpus = match kind {
            0 | 1 => convert::convokit(&self.0.path().join("corpus")),
            2 => convert::cmv(&at(2)),
            _ => convert::p4g(&at(3), Some(&at(4))),
        };
        if let Ok(corpus) = corpus {
            let options = Options { split: 0.5, ..Options::new(corpus.dialogues) };
            let all = Options { keep: convert::Keep::All, context_depth: Some(1), ..options.clone() };
            for options in [options, all] {
                reached(convert::rows(&corpus, &options, |_, _| Ok::<(), ()>(())));
                reached(convert::pairs(&corpus, &options, |_, _| Ok::<(), ()>(())));
            }
        }
        fs::write(at(kind), good).unwrap();
    }
}

const CORPUS_FILES: [&str; 5] =
    ["corpus/utterances.jsonl", "corpus/conversations.json", "cmv.jsonl", "dialog.csv", "info.csv"];

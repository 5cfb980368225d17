//! Damaged inputs of every parser of foreign bytes in this crate: errors are fine, panics are not.

use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use suasion_data::example::Conversation;
use suasion_data::source::{Row, Source};
use suasion_data::template::{ChatTemplate, TemplateOptions};
use suasion_data::tokens::Tokenizer;
use suasion_data::{Mode, ModelFolder, Pipeline, Policy};
use suasion_test_support::fuzz::{damaged, run};

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens")
}

/// The files of a folder with one of these endings, cut to a size that a parser is done with quickly.
fn files(folder: &Path, endings: &[&str]) -> Vec<Vec<u8>> {
    let mut paths: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|end| endings.contains(&end.to_str().unwrap())));
    paths.sort();
    assert!(!paths.is_empty(), "{}", folder.display());
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

/// The first rows of a file of lines.
fn head(bytes: Vec<u8>, lines: usize) -> Vec<u8> {
    bytes.split_inclusive(|byte| *byte == b'\n').take(lines).flatten().copied().collect()
}

/// Reads a file to its end, and every row of it.
fn read(path: &Path) {
    let Ok(mut source) = Source::open(path) else { return };
    while let Ok(Some(raw)) = source.next_row() {
        let _ = Row::parse(raw);
    }
}

/// The scanner of rows, the lenient numbers, the finder of CSV records and the detection of formats.
#[test]
fn rows_as_text() {
    let dir = tempfile::tempdir().unwrap();
    let mut inputs: Vec<Vec<u8>> =
        files(&goldens().join("datasets"), &["jsonl", "csv"]).into_iter().map(|file| head(file, 5)).collect();
    inputs.push(br#"[{"n": 1e999, "a": [NaN, -Infinity]}, {"n": 123456789012345678901234567890}]"#.to_vec());
    inputs.push(br#"{"version": 1, "data": [{"n": 1}, {"n": 2}]}"#.to_vec());
    inputs.push(b"a,b\n\"x \"\"y\"\"\n\",2\n3,4\n".to_vec());
    inputs.push(b"a\tb\nx\ty\n".to_vec());
    let mut turn = 0;
    run("rows", &inputs, |bytes| {
        turn += 1;
        let path = dir.path().join(["x.jsonl", "x.json", "x.csv", "x.tsv", "x"][turn % 5]);
        fs::write(&path, bytes).unwrap();
        read(&path);
        fs::remove_file(&path).unwrap();
    });
}

/// Columns: Parquet and Arrow, whole files and streams.
#[test]
fn rows_as_columns() {
    let dir = tempfile::tempdir().unwrap();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/columnar");
    let inputs = files(&folder, &["parquet", "arrow"]);
    suasion_data::hush_guarded_panics();
    run("columns", &inputs, |bytes| {
        let path = dir.path().join(if bytes.starts_with(b"PAR1") { "x.parquet" } else { "x.arrow" });
        fs::write(&path, bytes).unwrap();
        read(&path);
        fs::remove_file(&path).unwrap();
    });
}

/// All stages over damaged rows of every format: rendering, tokens, labels, truncation, audit.
#[test]
fn rows_through_the_pipeline() {
    let dir = tempfile::tempdir().unwrap();
    let goldens = goldens();
    let inputs: Vec<Vec<u8>> =
        files(&goldens.join("datasets"), &["jsonl"]).into_iter().map(|file| head(file, 3)).collect();
    let model = dir.path().join("model");
    fs::create_dir(&model).unwrap();
    for entry in fs::read_dir(goldens.join("tokenizers/smollm")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, model.join(path.file_name().unwrap())).unwrap();
    }
    fs::copy(goldens.join("templates/tools.jinja"), model.join("chat_template.jinja")).unwrap();
    suasion_data::hush_guarded_panics();
    let policy = Policy { max_length: Some(48), ..Policy::default() };
    run("pipeline", &inputs, |bytes| {
        let path = dir.path().join("x.jsonl");
        fs::write(&path, bytes).unwrap();
        let folder = ModelFolder::open(&model).unwrap();
        let pipeline = Pipeline { mode: Mode::Verify, ..Pipeline::new(folder, policy.clone()) };
        if let Ok(source) = Source::open(&path)
            && let Ok(rows) = pipeline.rows(source)
        {
            rows.take_while(Result::is_ok).for_each(drop);
        }
        fs::remove_file(&path).unwrap();
    });
}

/// The rewriting of templates, and their rendering.
#[test]
fn templates() {
    let inputs = files(&goldens().join("templates"), &["jinja"]);
    let message =
        |role: &str, content: &str| json!({"role": role, "content": content}).as_object().unwrap().clone();
    let conversation = Conversation {
        messages: vec![message("system", "Be brief."), message("user", "One?"), message("assistant", "Two.")],
        weights: vec![None; 3],
        ..Conversation::default()
    };
    run("templates", &inputs, |bytes| {
        let source = String::from_utf8_lossy(bytes);
        if let Ok(template) = ChatTemplate::new(&source, Some("<s>"), Some("</s>")) {
            let _ = template.render(&conversation, true, &TemplateOptions::default());
        }
    });
}

/// The files of a tokenizer: stages, vocabulary and merges, special tokens. What can be opened must encode and decode.
#[test]
fn tokenizers() {
    let dir = tempfile::tempdir().unwrap();
    let names = ["gpt2", "llama2", "qwen2_5", "unigram"];
    let folders: Vec<PathBuf> = names.iter().map(|name| goldens().join("tokenizers").join(name)).collect();
    let inputs: Vec<Vec<u8>> =
        folders.iter().map(|folder| fs::read(folder.join("tokenizer.json")).unwrap()).collect();
    suasion_data::hush_guarded_panics();
    run("tokenizers", &inputs, |bytes| {
        fs::write(dir.path().join("tokenizer.json"), bytes).unwrap();
        if let Ok(tokenizer) = Tokenizer::from_dir(dir.path()) {
            for text in ["Hello, world's 12 \u{1F642}\n\n  é", "<|im_end|>", ""] {
                if let Ok(ids) = tokenizer.encode_text(text) {
                    tokenizer.decode(&ids, false);
                }
            }
        }
    });
}

/// Text of any kind through each of our pre-tokenizers and BPE: the ids decode to text, and nothing panics.
#[test]
fn texts() {
    let tokenizers: Vec<Tokenizer> = ["gpt2", "llama3_2", "qwen2_5", "o200k", "tekken", "deepseek", "smollm"]
        .iter()
        .map(|name| Tokenizer::from_dir(&goldens().join("tokenizers").join(name)).unwrap())
        .collect();
    let inputs: Vec<Vec<u8>> = [
        "It's 12,345 o'clock — don't\r\n\r\n  wait!!\t\t\u{a0}x",
        "ﬁ é\u{301} 漢字かな한글 \u{1F469}\u{200D}\u{1F680} \u{202e}abc",
        "<|endoftext|><|im_start|>user\n{\"a\": [1, 2]}<|im_end|>",
        "        return x\n\n\n\tif (a<=b) { /* */ }",
    ]
    .iter()
    .map(|text| text.as_bytes().to_vec())
    .collect();
    run("texts", &inputs, |bytes| {
        let text = String::from_utf8_lossy(bytes);
        for tokenizer in &tokenizers {
            if let Ok(ids) = tokenizer.encode_text(&text) {
                tokenizer.decode(&ids, false);
            }
        }
    });
}

#[test]
fn damage_is_damage() {
    let mut numbers = suasion_test_support::fuzz::Numbers(3);
    let input = b"{\"a\": [1, 2, 3]}".repeat(4);
    let changed = (0..200).filter(|_| damaged(&input, &input, &mut numbers) != input).count();
    assert!(changed > 150, "{changed}");
}

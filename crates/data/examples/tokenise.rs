//! Measures tokenisation alone: `tokenise MODEL_DIR FILE.jsonl [THREADS]`.
//!
//! Every string of every row is one text, at any depth. Prints the time to load the tokenizer, and the tokens per
//! second of each of five passes over the texts.

use rayon::prelude::*;
use std::path::Path;
use std::time::Instant;
use suasion_data::tokens::Tokenizer;

fn strings(value: serde_json::Value, texts: &mut Vec<String>) {
    match value {
        serde_json::Value::String(text) => texts.push(text),
        serde_json::Value::Array(values) => values.into_iter().for_each(|value| strings(value, texts)),
        serde_json::Value::Object(map) => map.into_iter().for_each(|(_, value)| strings(value, texts)),
        _ => {}
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, file, rest @ ..] = arguments.as_slice() else {
        return Err("usage: tokenise MODEL_DIR FILE.jsonl [THREADS]".into());
    };
    let threads = rest.first().map_or(Ok(1), |threads| threads.parse())?;
    let start = Instant::now();
    let tokenizer = Tokenizer::from_dir(Path::new(model))?;
    println!("load: {:.1} ms", start.elapsed().as_secs_f64() * 1e3);
    let mut texts = Vec::new();
    for line in std::fs::read_to_string(file)?.lines() {
        strings(serde_json::from_str(line)?, &mut texts);
    }
    let bytes: usize = texts.iter().map(String::len).sum();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    for _ in 0..5 {
        let start = Instant::now();
        let tokens: usize = pool.install(|| {
            texts.par_iter().map(|text| tokenizer.encode_text(text).map_or(0, |ids| ids.len())).sum()
        });
        let seconds = start.elapsed().as_secs_f64();
        println!(
            "{tokens} tokens of {bytes} bytes in {:.1} ms: {:.2} million tokens a second, {threads} thread(s)",
            seconds * 1e3,
            tokens as f64 / seconds / 1e6,
        );
    }
    Ok(())
}

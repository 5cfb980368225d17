//! Trains the demo's tokenizer on the demo's rows: `cargo run --release -p suasion --example train_demo_tokenizer`.
//!
//! Writes `tokenizer.json` and `tokenizer_config.json` beside `examples/persuasion/rows.jsonl`. The same rows give the
//! same bytes. Run it whenever the rows change, and set `vocab_size` in `config.json` to what it prints.

use std::collections::HashSet;
use std::path::Path;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, TokenizerBuilder};

/// Size of the vocabulary. The rows hold some 250 kB of text: more merges would be words that occur three times.
const VOCAB: usize = 2048;

/// Ends every text; there is nothing else for it to be confused with, so it pads too.
const EOS: &str = "<|endoftext|>";

type Error = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Error> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/persuasion");
    let rows = std::fs::read_to_string(folder.join("rows.jsonl"))?;
    let texts = texts(&rows)?;

    let mut tokenizer = TokenizerBuilder::default()
        .with_model(BPE::default())
        .with_normalizer(None::<tokenizers::NormalizerWrapper>)
        // No space is added in front: the text is what the text is.
        .with_pre_tokenizer(Some(ByteLevel::new(false, true, true)))
        .with_post_processor(Some(ByteLevel::new(false, false, true)))
        .with_decoder(Some(ByteLevel::default()))
        .build()?;
    let mut trainer = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(VOCAB)
        .min_frequency(2)
        .special_tokens(vec![AddedToken::from(EOS, true)])
        // All bytes, so that any text can be read.
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    tokenizer.train(&mut trainer, texts.iter())?;
    tokenizer.save(folder.join("tokenizer.json"), true)?;

    let config = serde_json::json!({
        "add_bos_token": false,
        "add_prefix_space": false,
        "clean_up_tokenization_spaces": false,
        "eos_token": EOS,
        "model_max_length": 1024,
        "pad_token": EOS,
        "tokenizer_class": "PreTrainedTokenizerFast",
    });
    let text = serde_json::to_string_pretty(&config)? + "\n";
    std::fs::write(folder.join("tokenizer_config.json"), text)?;
    println!("{} texts, vocab_size {}", texts.len(), tokenizer.get_vocab_size(true));
    Ok(())
}

/// Each prompt once and each response once: four replies to a view do not make its words four times as common.
fn texts(rows: &str) -> Result<Vec<String>, Error> {
    let mut seen = HashSet::new();
    let mut texts = Vec::new();
    for line in rows.lines().filter(|line| !line.trim().is_empty()) {
        let row: serde_json::Value = serde_json::from_str(line)?;
        let field = |name: &str| row[name].as_str().ok_or(format!("a row without {name}"));
        let (input, full) = (field("input_text")?, field("full_text")?);
        let response = full.strip_prefix(input).ok_or("full_text does not start with input_text")?;
        for text in [input, response] {
            if seen.insert(text.to_string()) {
                texts.push(text.to_string());
            }
        }
    }
    Ok(texts)
}

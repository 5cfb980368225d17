//! Small tokenizers of each kind, made here.

use serde_json::{Value, json};

/// An entry of `added_tokens`; `flags` is any of `lstrip`, `rstrip`, `normalized`, `plain` (not special).
pub fn added(id: usize, content: &str, flags: &str) -> Value {
    json!({
        "id": id, "content": content, "single_word": false, "lstrip": flags.contains("lstrip"),
        "rstrip": flags.contains("rstrip"), "normalized": flags.contains("normalized"),
        "special": !flags.contains("plain"),
    })
}

/// A BPE model over single characters, with `first` tokens before them, and the given merges.
pub fn bpe(first: Vec<String>, characters: Vec<String>, merges: &[&str], byte_fallback: bool) -> Value {
    let merged = merges.iter().map(|merge| merge.replace(' ', ""));
    let vocabulary: serde_json::Map<String, Value> = (first.into_iter().chain(characters).chain(merged))
        .enumerate()
        .map(|(id, token)| (token, json!(id)))
        .collect();
    json!({
        "type": "BPE", "dropout": null, "unk_token": if byte_fallback { json!("<unk>") } else { Value::Null },
        "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": byte_fallback,
        "byte_fallback": byte_fallback, "ignore_merges": false, "vocab": vocabulary, "merges": merges,
    })
}

pub fn tokenizer_json(model: Value, stages: Value, added: Vec<Value>) -> Value {
    let mut json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": null,
    });
    json.as_object_mut().unwrap().extend(stages.as_object().unwrap().clone());
    json["model"] = model;
    json
}

/// GPT-2's kind: 256 bytes, a few merges, `<eos>` = 269 and the other added tokens.
pub fn byte_level(normalizer: Value, add_prefix_space: bool, trim_offsets: bool, more: Vec<Value>) -> Value {
    let mut alphabet: Vec<char> =
        tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let characters = alphabet.into_iter().map(String::from).collect();
    let merges = [
        "h e", "l l", "he ll", "hell o", "o r", "l d", "Ġ w", "Ġw or", "Ġwor ld", "i s", "P a", "Pa r",
        "Par is",
    ];
    let model = bpe(Vec::new(), characters, &merges, false);
    let stage = json!({
        "type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": trim_offsets, "use_regex": true
    });
    let mut tokens = vec![added(269, "<eos>", "")];
    tokens.extend(more);
    let stages = json!({
        "normalizer": normalizer, "pre_tokenizer": stage, "post_processor": stage, "decoder": stage,
    });
    tokenizer_json(model, stages, tokens)
}

pub fn eos(content: &str) -> Option<Value> {
    Some(json!({ "eos_token": { "content": content } }))
}

/// Llama's kind: `<unk> <s> </s>`, bytes, characters, a few merges; `<s>` before every text.
pub fn sentence_piece(normalizer: Value, pre_tokenizer: Value, more: Vec<Value>) -> Value {
    let mut first: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    first.extend((0..=255u8).map(|byte| format!("<0x{byte:02X}>")));
    let characters =
        "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ:.,?!<>/|[]é".chars().map(String::from);
    let merges =
        ["i s", "▁ is", "P a", "Pa r", "▁ Par", "▁ w", "o r", "▁w or", "l d", "▁wor ld", "H i", "▁ Hi"];
    let model = bpe(first, characters.collect(), &merges, true);
    let mut tokens = vec![added(0, "<unk>", ""), added(1, "<s>", ""), added(2, "</s>", "")];
    tokens.extend(more);
    let stages = json!({
        "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
    });
    tokenizer_json(model, stages, tokens)
}

pub fn llama_config() -> Option<Value> {
    Some(json!({ "bos_token": "<s>", "eos_token": "</s>", "pad_token": null }))
}

pub fn legacy() -> Value {
    json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]})
}

pub fn metaspace(scheme: &str, split: bool) -> Value {
    json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split})
}

/// T5's kind, in the old file format: a model without "type", `</s>` after every text and among the model's own
/// pieces, with the best score.
pub fn unigram(pre_tokenizer: Value) -> Value {
    let mut pieces: Vec<(String, f64)> = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -2.0),
        ("▁Par", -3.0),
        ("is", -3.0),
        ("▁is", -3.0),
    ]
    .map(|(piece, score)| (piece.to_string(), score))
    .to_vec();
    pieces.extend("abcdefghijklmnopqrstuvwxyzABCPQ:.,</>".chars().map(|c| (c.to_string(), -6.0)));
    let stages = json!({
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
    });
    let tokens = vec![added(0, "<pad>", ""), added(1, "</s>", ""), added(2, "<unk>", "")];
    tokenizer_json(json!({ "unk_id": 2, "vocab": pieces }), stages, tokens)
}

pub fn whitespace_then_metaspace() -> Value {
    json!({"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace("always", true)]})
}

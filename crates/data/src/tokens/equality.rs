//! Tests that our byte-level BPE gives the ids and byte ranges of the library.
//!
//! Pieces are compared with the library's pre-tokenizer, for every code point and on random text. Ids and
//! ranges are compared with the library's tokenizer, on random and real text, with vocabularies made here and
//! real ones (`SUASION_MATERIAL`, else `../shared/material` beside the workspace).

use super::model::{Inner, Model, load, load_library};
use super::pretokenise::{KNOWN, Pretokeniser};
use super::raw::RawTokens;
use super::stages::{Stages, Start, Vocabulary};
use rayon::prelude::*;
use serde_json::{Value, json};
use std::path::Path;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::utils::SysRegex;
use tokenizers::{
    AddedToken, Model as _, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _,
    PreTokenizerWrapper, Trainer as _,
};

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    fn of<'a>(&mut self, choices: &[&'a str]) -> &'a str {
        choices[self.below(choices.len())]
    }

    fn char_in(&mut self, ranges: &[(u32, u32)]) -> char {
        let (first, last) = ranges[self.below(ranges.len())];
        char::from_u32(first + self.below((last - first + 1) as usize) as u32).unwrap_or('\u{FFFD}')
    }

    /// Text of up to `parts` parts that are edge cases of the expressions.
    fn text(&mut self, parts: usize) -> String {
        let mut text = String::new();
        for _ in 0..self.below(parts) + 1 {
            match self.below(14) {
                0 | 1 => text.push_str(self.of(&[
                    "the",
                    "The",
                    "THE",
                    "wordWord",
                    "WORDword",
                    "a",
                    "A",
                    "naïve",
                    "Ελλάδα",
                    "мир",
                    "МИР",
                    "Ǆ",
                    "ǅ",
                    "ǆ",
                    "ʰ",
                    "ª",
                    "straße",
                    "ﬁ",
                    "ﬆ",
                    "İ",
                    "ı",
                    "ſ",
                    "K",
                    "Å",
                    "हिन्दी",
                    "ไทย",
                    "שָׁלוֹם",
                    "العَرَبِيَّة",
                    "中文字",
                    "かな",
                    "한국어",
                ])),
                2 => text.push_str(self.of(&[
                    "'s", "'S", "'ſ", "'t", "'T", "'re", "'RE", "'rE", "'ve", "'Ve", "'m", "'M", "'ll",
                    "'LL", "'lL", "'d", "'D", "'", "''", "’s", "'l", "'r", "'v", "'re's", "'ſt",
                ])),
                3 => (0..self.below(9) + 1).for_each(|_| text.push(self.char_in(&[(0x30, 0x39)]))),
                4 => text.push_str(self.of(&["²", "½", "Ⅷ", "٣", "४", "〇", "①", "𝟘", "𐄇", "൵"])),
                5 | 6 => text.push_str(self.of(&[" ", " ", " ", "  ", "   ", "\t", " \t", "        "])),
                7 => text.push_str(self.of(&[
                    "\n", "\r\n", "\r", "\n\n", "\n \n", "\u{B}", "\u{C}", "\u{85}", "\u{A0}", "\u{1680}",
                    "\u{2003}", "\u{2028}", "\u{2029}", "\u{202F}", "\u{205F}", "\u{3000}", "\u{200B}",
                    "\u{FEFF}", "\u{180E}", "\u{1C}", "\u{1F}",
                ])),
                8 => text.push_str(self.of(&[
                    ".",
                    ",",
                    "!?",
                    "/",
                    "//",
                    "\\",
                    "(",
                    ")]",
                    "_",
                    "-",
                    "—",
                    "…",
                    "`",
                    "```",
                    "{\"",
                    "$",
                    "€",
                    "<",
                    ">",
                    "|",
                    "~",
                    "^",
                    "==========",
                    "/\n/",
                    ".\r\n",
                ])),
                9 => text.push_str(self.of(&[
                    "\u{301}",
                    "\u{308}\u{301}",
                    "\u{327}",
                    "\u{5B0}",
                    "\u{93C}",
                    "\u{20DD}",
                    "\u{FE0F}",
                    "\u{200D}",
                    "\u{E0100}",
                    "\u{9BE}",
                ])),
                10 => text.push_str(self.of(&["👍🏽", "👨‍👩‍👧‍👦", "🏳️‍🌈", "1️⃣", "🇩🇪", "😀", "❤️"])),
                11 => text.push(self.char_in(&[
                    (0x1100, 0x11FF),
                    (0xAC00, 0xD7A3),
                    (0xD7B0, 0xD7FF),
                    (0xE000, 0xE0FF),
                    (0xF900, 0xFAFF),
                    (0xFFF0, 0xFFFF),
                    (0x1F000, 0x1FAFF),
                    (0x10FF00, 0x10FFFF),
                    (0x378, 0x379),
                ])),
                12 => text.push(self.char_in(&[(0, 0x7F), (0x80, 0x24F), (0x370, 0x5FF)])),
                _ => text.push(self.char_in(&[(0, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)])),
            }
        }
        text
    }

    /// Text with added tokens, long pieces and everything else.
    fn chat(&mut self, added: &[String]) -> String {
        let mut text = String::new();
        for _ in 0..self.below(5) + 1 {
            match self.below(8) {
                0 | 1 if !added.is_empty() => text.push_str(&added[self.below(added.len())]),
                2 => text.push_str(
                    &self.of(&["a", "ab", " ", "=", "中", "é", "x1", "\n"]).repeat(self.below(300)),
                ),
                _ => text.push_str(&self.text(12)),
            }
        }
        text
    }
}

fn split_by(regex: &str, behavior: &str, invert: bool) -> Value {
    json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
    ]})
}

/// The pre-tokenizer of GPT-2, then every supported expression; one also with an inverted pattern.
fn pre_tokenizers() -> Vec<Value> {
    let gpt2 = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true});
    let inverted = split_by(KNOWN[2], "Removed", true);
    let known = KNOWN.map(|regex| split_by(regex, "Isolated", false));
    [gpt2, inverted].into_iter().chain(known).collect()
}

fn our_pieces(pretokeniser: Pretokeniser, text: &str) -> Vec<(usize, usize)> {
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < text.len() {
        let end = pretokeniser.piece_end(text, at);
        pieces.push((at, end));
        at = end;
    }
    pieces
}

#[test]
fn pieces_of_random_text() {
    for json in pre_tokenizers() {
        let library: PreTokenizerWrapper = serde_json::from_value(json.clone()).unwrap();
        let (ours, digits_apart) = Pretokeniser::of(&library).unwrap_or_else(|| panic!("unknown: {json}"));
        assert!(!digits_apart);
        (0..40u64).into_par_iter().for_each(|seed| {
            let mut random = Random(seed);
            for _ in 0..500 {
                let text = random.text(10);
                let mut pieces = PreTokenizedString::from(text.as_str());
                library.pre_tokenize(&mut pieces).unwrap();
                let theirs: Vec<_> = pieces
                    .get_splits(OffsetReferential::Original, OffsetType::Byte)
                    .into_iter()
                    .map(|(_, range, _)| range)
                    .collect();
                assert_eq!(our_pieces(ours, &text), theirs, "{text:?} by {json}");
            }
        });
    }
}

/// Every code point, next to letters of both cases, digits, white space, symbols and marks, and in
/// contractions.
#[test]
fn pieces_of_every_code_point() {
    let regexes = [KNOWN[0], KNOWN[2], KNOWN[5]];
    let chunks: Vec<u32> = (0..0x11_0000).step_by(0x400).collect();
    for regex in regexes {
        let library: PreTokenizerWrapper =
            serde_json::from_value(split_by(regex, "Isolated", false)).unwrap();
        let (ours, _) = Pretokeniser::of(&library).unwrap();
        chunks.par_iter().for_each(|&first| {
            let regex = SysRegex::new(regex).unwrap();
            for c in (first..first + 0x400).filter_map(char::from_u32) {
                let text = format!("x{c}y {c}7{c}\t{c}A{c}. '{c}'r{c}'v{c}'l{c}'{c}e'{c}l\u{301}{c}\n{c}");
                let theirs: Vec<_> = regex.find_iter(&text).collect();
                assert_eq!(our_pieces(ours, &text), theirs, "U+{:04X}", c as u32);
            }
        });
    }
}

/// The same tokenizer, with our stages and with the library's only.
struct Pair {
    name: String,
    ours: Stages,
    library: Stages,
    added: Vec<String>,
}

impl Pair {
    fn new(name: &str, json: &[u8]) -> Pair {
        let (ours, library) = (load(json).unwrap(), load_library(json).unwrap());
        assert!(matches!(ours.get_model(), Model::Bpe(_)), "{name} is the library's");
        let model = library.get_model();
        assert_eq!(ours.get_model().highest_id(), model.highest_id(), "{name}");
        assert_eq!(ours.get_model().get_vocab_size(), model.get_vocab_size(), "{name}");
        assert_eq!(ours.get_model().get_vocab(), model.get_vocab(), "{name}");
        for id in 0..model.highest_id().unwrap() + 10 {
            assert_eq!(ours.get_model().id_to_token(id), model.id_to_token(id), "{name}");
        }
        // A structural token that is not declared special.
        let named: Vec<u32> = ours.token_to_id("<s>>").into_iter().collect();
        let (ours, library) = (Stages::new(ours, &named), Stages::new(library, &named));
        assert!(ours.direct.is_some() && library.direct.is_none(), "{name} goes the library's way");
        let mut added: Vec<String> = ours.added.values().map(|token| token.content.clone()).collect();
        added.sort();
        Pair { name: name.to_string(), ours, library, added }
    }

    fn agree(&self, text: &str) {
        assert_eq!(self.ours.added_in(text), self.library.added_in(text), "{}: {text:?}", self.name);
        for vocabulary in [Vocabulary::Full, Vocabulary::Content] {
            for start in [Start::Text, Start::Section, Start::NormalizedSection, Start::Spaced, Start::Glued]
            {
                let tokens = |pipeline: &Stages| {
                    let mut out = RawTokens::default();
                    pipeline.tokenize(text, 3, start, vocabulary, &mut out).unwrap();
                    (out.ids, out.bytes)
                };
                let context = || format!("{}: {text:?} {start:?} {vocabulary:?}", self.name);
                assert_eq!(tokens(&self.ours), tokens(&self.library), "{}", context());
                // One start is enough for a long text; the others are tested on many short ones.
                if text.len() > 500 {
                    break;
                }
            }
        }
    }

    fn agree_on_random_text(&self, count: u64) {
        (0..count).into_par_iter().for_each(|seed| {
            let mut random = Random(seed + 1000);
            for _ in 0..50 {
                self.agree(&random.chat(&self.added));
            }
        });
    }
}

/// A tokenizer with merges learned from random text.
fn learned(pre_tokenizer: &Value, normalizer: Value, ignore_merges: bool) -> Value {
    let library: PreTokenizerWrapper = serde_json::from_value(pre_tokenizer.clone()).unwrap();
    let mut random = Random(7);
    let texts: Vec<String> = (0..3000).map(|_| random.text(10)).collect();
    let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
    let mut trainer = BpeTrainer::builder()
        .vocab_size(3000)
        .show_progress(false)
        .initial_alphabet(alphabet.into_iter().collect());
    let mut trainer = std::mem::take(&mut trainer).build();
    let words = |text: &str| {
        let mut pieces = PreTokenizedString::from(text);
        library.pre_tokenize(&mut pieces)?;
        let pieces = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte).into_iter();
        Ok(pieces.map(|(piece, ..)| piece.to_string()).collect())
    };
    trainer.feed(texts.iter(), words).unwrap();
    let mut bpe = BPE::default();
    trainer.train(&mut bpe).unwrap();
    bpe.ignore_merges = ignore_merges;
    let mut model = serde_json::to_value(&bpe).unwrap();
    if !ignore_merges {
        // The older format of merges, and merges that are unreachable.
        let merges = model["merges"].as_array().unwrap().iter();
        let written =
            merges.map(|pair| format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()));
        model["merges"] = written.skip(20).collect();
    }
    let token = |id: u32, content: &str, flags: &str| {
        let has = |flag: char| flags.contains(flag);
        json!({"id": id, "content": content, "single_word": false, "lstrip": has('l'), "rstrip": has('r'),
               "normalized": has('n'), "special": has('s')})
    };
    let first = bpe.get_vocab_size() as u32;
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer, "post_processor": null, "decoder": {"type": "ByteLevel",
            "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "added_tokens": [
            token(first, "<s>", "s"), token(first + 1, "<s>>", ""), token(first + 2, "</s>", "lrs"),
            token(first + 3, "  ", "n"), token(first + 4, "e\u{301}t", "n"), token(first + 5, "<|é|>", "ns"),
            token(first + 6, "the", "l"), token(first + 7, "    ", "nr"), token(first + 8, "\u{212B}", ""),
        ],
        "model": model,
    })
}

#[test]
fn learned_tokenizers() {
    let digits = json!({"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": true},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
    ]});
    for (at, pre_tokenizer) in pre_tokenizers().iter().chain([&digits]).enumerate() {
        let normalizer = if at % 2 == 0 { json!({"type": "NFC"}) } else { Value::Null };
        let json = learned(pre_tokenizer, normalizer, at % 3 == 0);
        let pair = Pair::new(&pre_tokenizer.to_string(), &serde_json::to_vec(&json).unwrap());
        pair.agree_on_random_text(10);
    }
}

/// Tokenizers that our stages do not support are left to the library, and work.
#[test]
fn everything_else_is_the_librarys() {
    let plain = learned(&pre_tokenizers()[0], Value::Null, false);
    let mut cases: Vec<(&str, &str, Value)> = vec![
        ("/model/dropout", "model", json!(0.5)),
        ("/model/unk_token", "model", json!("a")),
        ("/model/byte_fallback", "model", json!(true)),
        ("/model/end_of_word_suffix", "model", json!("</w>")),
        ("/pre_tokenizer/add_prefix_space", "path", json!(true)),
        ("/normalizer", "path", json!({"type": "NFKC"})),
        ("/added_tokens/0/single_word", "path", json!(true)),
    ];
    let regex = KNOWN[3].replace("{L}", "{Lu}");
    for (regex, behavior, invert) in [
        (regex.as_str(), "Isolated", false),
        (KNOWN[3], "Removed", false),
        (KNOWN[3], "MergedWithNext", false),
    ] {
        cases.push(("/pre_tokenizer", "path", split_by(regex, behavior, invert)));
    }
    for (pointer, what, value) in cases {
        let mut json = plain.clone();
        *json.pointer_mut(pointer).unwrap() = value.clone();
        let json = serde_json::to_vec(&json).unwrap();
        let inner = load(&json).unwrap();
        let library = matches!(inner.get_model(), Model::Library(_));
        assert_eq!(library, what == "model", "{pointer} {value}");
        let ours = Stages::new(inner, &[]);
        assert!(ours.direct.is_none(), "{pointer} {value}");
        let library = Stages::new(load_library(&json).unwrap(), &[]);
        let mut random = Random(3);
        for _ in 0..50 {
            let text = random.chat(&[]);
            let (mut a, mut b) = (RawTokens::default(), RawTokens::default());
            ours.tokenize(&text, 0, Start::Text, Vocabulary::Full, &mut a).unwrap();
            library.tokenize(&text, 0, Start::Text, Vocabulary::Full, &mut b).unwrap();
            assert_eq!((a.ids, a.bytes), (b.ids, b.bytes), "{text:?} {pointer} {value}");
        }
    }
}

/// A malformed file is rejected by the library, with its message.
#[test]
fn broken_files_are_refused() {
    let plain = learned(&pre_tokenizers()[0], Value::Null, false);
    let breakages: [fn(&mut Value); 6] = [
        |json| json["model"]["merges"][5] = json!("not there"),
        |json| json["model"]["merges"][5] = json!("a b c"),
        |json| json["model"]["vocab"]["a"] = json!(-1),
        |json| json["model"] = json!({"type": "BPE"}),
        |json| json["version"] = json!("2.0"),
        |json| json["pre_tokenizer"] = json!({"type": "Nothing"}),
    ];
    for (at, breakage) in breakages.into_iter().enumerate() {
        let mut json = plain.clone();
        breakage(&mut json);
        let json = serde_json::to_vec(&json).unwrap();
        let theirs = tokenizers::Tokenizer::from_bytes(&json).map(|_| ()).unwrap_err().to_string();
        let ours = load(&json).map(|_| ()).unwrap_err().to_string();
        assert_eq!(ours, theirs, "breakage {at}");
    }
    // The library accepts two tokens with one id; it handles such a file here too.
    let mut json = plain;
    let id = json["model"]["vocab"]["a"].clone();
    json["model"]["vocab"]["nobody writes this"] = id;
    let inner = load(&serde_json::to_vec(&json).unwrap()).unwrap();
    assert!(matches!(inner.get_model(), Model::Library(_)));
}

/// Trained vocabularies: those of the repository, and real ones if this machine has the test material.
#[test]
fn trained_tokenizers() {
    let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens");
    let names = ["gpt2", "llama3_2", "qwen2_5", "gpt_neox", "o200k", "tekken", "smollm"];
    agree_on_rows(&ours, &["messages", "messages_tools"], 1, &names);
    if let Some(material) = suasion_test_support::material_folder() {
        let data = ["cmv_messages", "hh_harmless_messages", "glaive_messages_tools", "oasst_en_100_messages"];
        agree_on_rows(&material, &data, 9, &names[..4]);
    }
}

fn agree_on_rows(folder: &Path, data: &[&str], step: usize, tokenizers: &[&str]) {
    let mut texts = Vec::new();
    for name in data {
        let rows = std::fs::read_to_string(folder.join(format!("datasets/{name}.jsonl"))).unwrap();
        // The raw row, with its escapes and braces, is another text.
        for row in rows.lines().step_by(step) {
            texts.push(row.to_string());
            let row: Value = serde_json::from_str(row).unwrap();
            let messages = row["messages"].as_array().into_iter().flatten();
            texts.extend(messages.filter_map(|message| message["content"].as_str()).map(str::to_string));
        }
    }
    assert!(texts.len() > 150, "{}", texts.len());
    for name in tokenizers {
        let json = std::fs::read(folder.join("tokenizers").join(name).join("tokenizer.json")).unwrap();
        let pair = Pair::new(name, &json);
        assert!(pair.ours.direct.is_some(), "{name} goes through the library");
        pair.agree_on_random_text(10);
        texts.par_iter().for_each(|text| pair.agree(text));
    }
}

/// A token that is declared twice, first special and then not, and one with a flag that our stages do not
/// support.
#[test]
fn redeclared_added_tokens() {
    let json = serde_json::to_vec(&learned(&pre_tokenizers()[3], Value::Null, false)).unwrap();
    let declare = |mut inner: Inner| {
        inner
            .add_tokens([AddedToken::from("<s>", false).lstrip(true), AddedToken::from("new", true)])
            .unwrap();
        Stages::new(inner, &[])
    };
    let (ours, library) = (declare(load(&json).unwrap()), declare(load_library(&json).unwrap()));
    let added: Vec<String> = ours.added.values().map(|token| token.content.clone()).collect();
    assert!(ours.direct.is_some());
    let pair = Pair { name: "redeclared".to_string(), ours, library, added };
    pair.agree_on_random_text(8);
}

//! The tokenizer against other people's values (goldens made with transformers and llama.cpp), and against
//! the two promises of `boundary: split`, on real tokenizers and on small ones made here.
//!
//! The goldens are those of the repository, and the internal material where this machine has it.

mod common;

use common::{Goldens, goldens};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::LazyLock;
use suasion_data::render::{Rendered, Span};
use suasion_data::tokens::{Encoded, Tokenizer};
use suasion_data::{Boundary, ContentSpecialTokens, Error, Origin, Policy, RowId, Section};

const PROMPT: Origin = Origin::Prompt { turn: 0, section: Section::Other };
const RESPONSE: Origin = Origin::Response { turn: 0 };
const STOP: Origin = Origin::EndOfTurn { turn: 0 };

/// Text made of `(text, origin)` parts; prompts weigh 0, everything supervised 1.
fn rendered(parts: &[(&str, Origin)], add_special_tokens: bool) -> Rendered {
    let mut text = String::new();
    let mut spans = Vec::new();
    for (part, origin) in parts {
        let start = text.len();
        text.push_str(part);
        let weight = if origin.supervised() { 1.0 } else { 0.0 };
        spans.push(Span { range: start..text.len(), origin: *origin, weight });
    }
    let id = RowId::new(Path::new("test.jsonl"), 0, Some(1));
    Rendered { id, text, spans, add_special_tokens }
}

fn policy(boundary: Boundary) -> Policy {
    Policy { boundary, ..Policy::default() }
}

fn split(tokenizer: &Tokenizer, parts: &[(&str, Origin)]) -> Encoded {
    tokenizer.encode(&rendered(parts, true), &policy(Boundary::Split)).unwrap()
}

fn joint(tokenizer: &Tokenizer, parts: &[(&str, Origin)]) -> Encoded {
    tokenizer.encode(&rendered(parts, true), &policy(Boundary::Joint)).unwrap()
}

/// Indices of the supervised tokens.
fn supervised(encoded: &Encoded) -> Vec<usize> {
    (0..encoded.tokens.len()).filter(|&i| encoded.tokens.origins[i].supervised()).collect()
}

/// Ids of the tokens of one origin.
fn ids_of(encoded: &Encoded, origin: Origin) -> Vec<u32> {
    let tokens = &encoded.tokens;
    (0..tokens.len()).filter(|&i| tokens.origins[i] == origin).map(|i| tokens.ids[i]).collect()
}

/// A tokenizer of ours and the library's own, the oracle.
struct Pair {
    name: String,
    ours: Tokenizer,
    library: tokenizers::Tokenizer,
    /// Ids that the post-processor puts behind a text.
    back: usize,
}

impl Pair {
    fn from_json(name: &str, json: &Value, config: Option<Value>) -> Pair {
        let bytes = serde_json::to_vec(json).unwrap();
        let config = config.map(|config| serde_json::to_vec(&config).unwrap());
        let ours = Tokenizer::from_bytes(&bytes, config.as_deref()).unwrap();
        Pair::new(name, ours, tokenizers::Tokenizer::from_bytes(&bytes).unwrap())
    }

    fn new(name: &str, ours: Tokenizer, library: tokenizers::Tokenizer) -> Pair {
        let special = library.encode("", true).unwrap().len();
        let front = ours.encode_prompt("").unwrap().len();
        Pair { name: name.to_string(), ours, library, back: special - front }
    }

    /// The library's ids for a whole text.
    fn whole(&self, text: &str) -> Vec<u32> {
        self.library.encode(text, false).unwrap().get_ids().to_vec()
    }

    fn decode(&self, ids: &[u32]) -> String {
        self.library.decode(ids, false).unwrap()
    }

    fn token(&self, id: u32) -> String {
        self.library.id_to_token(id).unwrap()
    }

    fn words(&self, ids: &[u32]) -> Vec<String> {
        ids.iter().map(|id| self.token(*id)).collect()
    }

    /// Asserts both promises of `boundary: split` for one prompt and response; returns the encoding.
    ///
    /// 1. The ids before the cut are what the library makes of the prompt alone.
    /// 2. The ids behind it decode, behind any text, to what the library makes of the response behind such a
    ///    text. (For a lossless tokenizer that is the response itself; [`Pair::lossless`] asserts it.)
    ///
    /// And no token has bytes on both sides, every prompt token is masked, every response token supervised.
    fn promises(&self, prompt: &str, response: &str) -> Encoded {
        let encoded = split(&self.ours, &[(prompt, PROMPT), (response, RESPONSE)]);
        let context = || format!("{}: {prompt:?} | {response:?}", self.name);
        let tokens = &encoded.tokens;
        assert!(encoded.straddles.is_empty(), "{}", context());
        let mut alone = self.library.encode(prompt, true).unwrap().get_ids().to_vec();
        alone.truncate(alone.len() - self.back);
        assert_eq!(self.ours.encode_prompt(prompt).unwrap(), alone, "{}", context());
        assert_eq!(tokens.ids[..alone.len()], alone, "ids of the prompt: {}", context());
        let end = tokens.len() - self.back;
        let cut = prompt.len() as u32;
        for (index, bytes) in tokens.bytes.iter().enumerate() {
            let of_response = (alone.len()..end).contains(&index);
            assert_eq!(tokens.origins[index].supervised(), of_response, "token {index}: {}", context());
            assert!(!of_response || bytes.start >= cut, "token {index} at {bytes:?}: {}", context());
            assert!(index >= alone.len() || bytes.end <= cut, "token {index} at {bytes:?}: {}", context());
        }
        let response_ids = &tokens.ids[alone.len()..end];
        if let Some((before, ids)) = self.before(prompt, response, &tokens.bytes, &alone) {
            // T5's normalizer works by grapheme, and drops the rest of one that it knows the start of: what a
            // response that starts inside a grapheme becomes then depends on the letter before it.
            let apart = self.normalized(&before) + &self.normalized(response);
            if self.name == "t5_small" && self.normalized(&format!("{before}{response}")) != apart {
                return encoded;
            }
            let mut behind = ids;
            behind.extend(response_ids);
            let expected = self.decode(&self.whole(&format!("{before}{response}")));
            assert_eq!(self.decode(&behind), expected, "response behind {before:?}: {}", context());
        }
        encoded
    }

    fn normalized(&self, text: &str) -> String {
        use tokenizers::{NormalizedString, Normalizer};
        let mut normalized = NormalizedString::from(text);
        if let Some(normalizer) = self.library.get_normalizer() {
            normalizer.normalize(&mut normalized).unwrap();
        }
        normalized.get().to_string()
    }

    /// A short text that a response meets in the same way as it meets the prompt, and its ids. `q` composes
    /// with nothing in Unicode, so no normalizer merges it with what follows.
    fn before(
        &self,
        prompt: &str,
        response: &str,
        bytes: &[Range<u32>],
        alone: &[u32],
    ) -> Option<(String, Vec<u32>)> {
        let last = (0..alone.len()).rev().find(|&i| !bytes[i].is_empty());
        let Some(last) = last else {
            // Nothing of the prompt became a token: the response starts the text.
            let drops_space = !prompt.is_empty() && prompt.trim().is_empty();
            return (prompt.is_empty() || drops_space).then(|| (String::new(), Vec::new()));
        };
        let added = self.library.get_added_tokens_decoder();
        let end = bytes[last].end as usize;
        if let Some(token) = added.get(&alone[last])
            && end == prompt.len()
            && prompt[bytes[last].start as usize..].trim() == token.content.trim()
        {
            // A token that strips what follows it would swallow the response's white space here.
            let stripped = token.rstrip && response.starts_with(char::is_whitespace);
            return (!stripped).then(|| (token.content.clone(), vec![alone[last]]));
        }
        // White space behind the prompt's last token has no id: the response's first token stands for it.
        let dropped = self.normalized(&prompt[end..]).contains(char::is_whitespace);
        let before = if dropped { "q " } else { "q" };
        let ids = self.whole(before);
        Some((before.to_string(), ids))
    }

    /// Asserts that the response's ids alone are the response, but for one leading space that some decoders
    /// strip from any text.
    fn lossless(&self, prompt: &str, response: &str) {
        let encoded = self.promises(prompt, response);
        let text = self.decode(&ids_of(&encoded, RESPONSE));
        let stripped = response.strip_prefix(' ').unwrap_or(response);
        assert!(text == response || text == stripped, "{}: {prompt:?} | {response:?}: {text:?}", self.name);
    }
}

// ---------------------------------------------------------------------------------------------- goldens

/// A folder of goldens and its tokenizers by name.
struct Loaded {
    goldens: Goldens,
    pairs: BTreeMap<String, Pair>,
}

/// The tokenizers of all goldens, loaded once for all tests.
fn loaded() -> &'static [Loaded] {
    static LOADED: LazyLock<Vec<Loaded>> = LazyLock::new(|| {
        let load = |goldens: Goldens| {
            let mut pairs = BTreeMap::new();
            for entry in std::fs::read_dir(goldens.dir.join("tokenizers")).unwrap() {
                let dir = entry.unwrap().path();
                let name = dir.file_name().unwrap().to_str().unwrap().to_string();
                let ours = Tokenizer::from_dir(&dir).unwrap();
                let library = tokenizers::Tokenizer::from_file(dir.join("tokenizer.json")).unwrap();
                pairs.insert(name.clone(), Pair::new(&name, ours, library));
            }
            assert_eq!(pairs.len(), goldens.expect(14, 9));
            Loaded { goldens, pairs }
        };
        goldens().into_iter().map(load).collect()
    });
    &LOADED
}

/// The tokenizers of all goldens.
fn all_pairs() -> impl Iterator<Item = &'static Pair> {
    loaded().iter().flat_map(|loaded| loaded.pairs.values())
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// Rows of all `tokenize.jsonl` with the tokenizer, prompt and response of each.
fn golden_rows() -> Vec<(&'static Pair, Value, String, String)> {
    let mut all = Vec::new();
    for Loaded { goldens, pairs } in loaded() {
        let texts = goldens.json("goldens/tokenize_pairs.json");
        let rows = goldens.lines("goldens/tokenize.jsonl");
        assert_eq!(rows.len(), goldens.expect(924, 288));
        all.extend(rows.into_iter().map(|row| {
            let text = &texts[row["pair"].as_str().unwrap()];
            let field = |name: &str| text[name].as_str().unwrap().to_string();
            (&pairs[row["tok"].as_str().unwrap()], row, field("prompt"), field("response"))
        }));
    }
    all
}

/// Joint tokenisation is transformers', id by id and byte by byte. One exception, by choice: tokens of the
/// post-processor are at (0, 0) there; here they have an empty range at the end of the text that they follow,
/// so that ranges never go backwards.
#[test]
fn joint_is_transformers() {
    for (pair, row, prompt, response) in golden_rows() {
        let context = format!("{} / {}", pair.name, row["pair"]);
        let encoded = joint(&pair.ours, &[(&prompt, PROMPT), (&response, RESPONSE)]);
        let tokens = &encoded.tokens;
        assert_eq!(tokens.ids, ids(&row["ids"]), "{context}");
        let text = format!("{prompt}{response}");
        let bare = match row["ids_ns"].as_str() {
            Some(_) => {
                let special = row["sp"].as_str().unwrap().bytes();
                ids(&row["ids"])
                    .into_iter()
                    .zip(special)
                    .filter(|(_, s)| *s == b'0')
                    .map(|(id, _)| id)
                    .collect()
            }
            None => ids(&row["ids_ns"]),
        };
        assert_eq!(pair.ours.encode_text(&text).unwrap(), bare, "{context}: without special tokens");
        let mut byte_of: Vec<u32> = text.char_indices().map(|(at, _)| at as u32).collect();
        byte_of.push(text.len() as u32);
        let special = row["sp"].as_str().unwrap().as_bytes();
        let cut = prompt.len() as u32;
        for (index, offset) in row["off"].as_array().unwrap().iter().enumerate() {
            let offset = ids(offset);
            let bytes = tokens.bytes[index].clone();
            if special[index] == b'1' && offset == [0, 0] {
                assert!(bytes.is_empty(), "{context}: token {index}");
                assert_eq!(tokens.origins[index], Origin::Scaffold, "{context}: token {index}");
                continue;
            }
            assert_eq!(bytes, byte_of[offset[0] as usize]..byte_of[offset[1] as usize], "{context}: {index}");
            let overlaps = bytes.start < text.len() as u32 && bytes.end > cut;
            assert_eq!(tokens.origins[index].supervised(), overlaps, "{context}: token {index}");
            assert_eq!(tokens.weights[index], if overlaps { 1.0 } else { 0.0 }, "{context}: token {index}");
        }
        let straddling: Vec<u32> =
            encoded.straddles.iter().flat_map(|s| s.tokens.clone()).map(|index| index as u32).collect();
        assert_eq!(straddling, ids(&row["straddle"]), "{context}");
        assert_eq!(
            supervised(&encoded).first().map(|index| *index as u64),
            row["first_resp_tok"].as_u64(),
            "{context}"
        );
        for straddle in &encoded.straddles {
            assert_eq!(straddle.at, cut, "{context}");
            assert!(straddle.bytes.contains(&(cut - 1)) && straddle.bytes.contains(&cut), "{context}");
            assert_ne!(straddle.joint, straddle.split, "{context}");
            // Both are all of the place (T5 does not know emoji: two of them are one `<unk>`).
            let place = &text[straddle.bytes.start as usize..straddle.bytes.end as usize];
            for ids in [&straddle.joint, &straddle.split] {
                let decoded = pair.decode(ids);
                let unknown = decoded.contains("<unk>");
                // Both write what their normalizers make of it: `ﬁ` comes back as two letters.
                let place = match pair.name.as_str() {
                    "t5_small" | "unigram" => pair.normalized(place),
                    _ => place.to_string(),
                };
                assert!(unknown || decoded.trim_start() == place.trim_start(), "{context}: {decoded:?}");
            }
        }
    }
}

/// An EOS behind the response is the same ids as transformers makes of the text with the EOS written out,
/// except that T5 gets one EOS, not the written one and the post-processor's.
#[test]
fn one_eos_behind_the_response() {
    for (pair, row, prompt, response) in golden_rows() {
        let eos = pair.ours.eos().unwrap().clone();
        let parts = [(prompt.as_str(), PROMPT), (response.as_str(), RESPONSE), (eos.content.as_str(), STOP)];
        let mut expected = ids(&row["ids_eos"]);
        if pair.back > 0 {
            assert_eq!(expected.pop(), Some(eos.id));
        }
        for boundary in [Boundary::Joint, Boundary::Split] {
            let encoded = pair.ours.encode(&rendered(&parts, true), &policy(boundary)).unwrap();
            let tokens = &encoded.tokens;
            let context = format!("{} / {} {boundary:?}", pair.name, row["pair"]);
            let last = tokens.len() - 1;
            assert_eq!((tokens.ids[last], tokens.origins[last]), (eos.id, STOP), "{context}");
            assert_eq!(ids_of(&encoded, STOP), [eos.id], "{context}");
            let text = (prompt.len() + response.len()) as u32;
            assert_eq!(tokens.bytes[last], text..text + eos.content.len() as u32, "{context}");
            if boundary == Boundary::Joint {
                let from = tokens.len().saturating_sub(expected.len());
                assert_eq!(
                    tokens.ids[from..],
                    expected[expected.len() - (tokens.len() - from)..],
                    "{context}"
                );
            }
        }
    }
}

/// llama.cpp's ids of its own test texts. They are of real vocabularies, which the internal material has alone.
#[test]
fn text_is_llama_cpp() {
    let Some(Loaded { goldens, pairs }) = loaded().iter().find(|loaded| !loaded.goldens.ours) else {
        suasion_test_support::skipped("no test material (SUASION_MATERIAL)");
        return;
    };
    let folder = goldens.dir.join("goldens/llama.cpp_ref");
    let texts = std::fs::read_to_string(folder.join("input.txt")).unwrap();
    let mut compared = 0;
    for name in ["gpt2", "llama2", "llama3_2", "phi3", "qwen2_5"] {
        let outputs = std::fs::read_to_string(folder.join(format!("{name}.out"))).unwrap();
        let texts = texts.split("\n__ggml_vocab_test__\n");
        for (text, line) in texts.zip(outputs.lines()) {
            let expected: Vec<u32> = line.split_whitespace().map(|id| id.parse().unwrap()).collect();
            assert_eq!(pairs[name].ours.encode_text(text).unwrap(), expected, "{name}: {text:?}");
            compared += 1;
        }
    }
    assert!(compared > 200, "{compared}");
}

/// Tokenizers that neither change a text nor put anything in front of it: any ids decode to what they stand for.
const LOSSLESS: &[&str] = &["gpt2", "llama3_2", "gemma2", "o200k", "tekken", "smollm", "deepseek"];

/// Under `boundary: split` the prompt's ids are the golden's ids of the prompt alone.
#[test]
fn split_keeps_the_prompt_of_inference() {
    for (pair, row, prompt, response) in golden_rows() {
        let encoded = pair.promises(&prompt, &response);
        let mut alone = ids(&row["p_ids"]);
        alone.truncate(alone.len() - pair.back);
        assert_eq!(encoded.tokens.ids[..alone.len()], alone, "{} / {}", pair.name, row["pair"]);
        // These put nothing in front of a text, so the response is also what it is alone.
        if ["gpt_neox", "qwen2_5"].iter().chain(LOSSLESS).any(|name| *name == pair.name) {
            assert_eq!(ids_of(&encoded, RESPONSE), ids(&row["c_ids_ns"]), "{} / {}", pair.name, row["pair"]);
        }
        // Where joint has no token across the cut and the halves are those of the whole, nothing changes.
        if row["concat_eq_full"] == true && row["straddle"].as_array().unwrap().is_empty() {
            assert_eq!(encoded.tokens.ids, ids(&row["ids"]), "{} / {}", pair.name, row["pair"]);
        }
    }
}

/// A small generator of pseudo-random numbers (Knuth's MMIX constants), so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % limit
    }
}

fn nfc(text: &str) -> String {
    use tokenizers::{NormalizedString, Normalizer};
    let mut normalized = NormalizedString::from(text);
    tokenizers::normalizers::NFC.normalize(&mut normalized).unwrap();
    normalized.get().to_string()
}

/// Real text, cut anywhere.
#[test]
fn split_holds_on_real_text() {
    let mut random = Random(7);
    for Loaded { goldens, pairs } in loaded() {
        for row in goldens.lines(goldens.prompt_completion()) {
            let text = format!("{}{}", row["prompt"].as_str().unwrap(), row["completion"].as_str().unwrap());
            let starts: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
            let from = random.below(starts.len().saturating_sub(400).max(1));
            let window = &starts[from..(from + 400).min(starts.len())];
            let text = &text[window[0]..*window.last().unwrap()];
            for _ in 0..4 {
                let cut = window[random.below(window.len())] - window[0];
                let (prompt, response) = text.split_at(cut);
                for pair in pairs.values() {
                    let encoded = pair.promises(prompt, response);
                    let decoded = pair.decode(&ids_of(&encoded, RESPONSE));
                    match pair.name.as_str() {
                        "t5_small" | "unigram" => {}
                        "qwen2_5" | "gpt_neox" => assert_eq!(decoded, nfc(response), "{}", pair.name),
                        name if LOSSLESS.contains(&name) => assert_eq!(decoded, response, "{name}"),
                        // These decoders strip a leading space from any text.
                        _ => {
                            let stripped = response.strip_prefix(' ').unwrap_or(response);
                            assert!(decoded == stripped || decoded == response, "{}: {decoded:?}", pair.name);
                        }
                    }
                }
            }
        }
    }
}

/// Random Unicode with everything that normalizers, graphemes and white space can do, cut at every place.
#[test]
fn split_holds_on_random_unicode() {
    const PARTS: &[&str] = &[
        "a",
        "e",
        "\u{301}",
        "\u{308}",
        "é",
        "ﬁ",
        "Å",
        "q",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\u{a0}",
        "\u{3000}",
        "\u{200b}",
        "\u{200d}",
        "👩",
        "👧🏽",
        "न",
        "म",
        "स्",
        "ते",
        "दु",
        "中",
        "文",
        "。",
        "1",
        "23",
        "'t",
        "'s",
        "...",
        "</",
        "s>",
        "<|im",
        "_end|>",
        "</s>",
        "<|endoftext|>",
        "<eos>",
        "[INST]",
        "▁",
        "Ġ",
        "\u{fffd}",
        "\u{feff}",
        "각",
        "\u{1100}",
        "\u{1161}",
        "ß",
        "İ",
        "x",
        "Z",
        "<|assistant|>",
        "<0x0A>",
        "\u{0}",
        "\u{7f}",
        "²",
    ];
    let mut random = Random(11);
    for _ in 0..60 {
        let text: String = (0..2 + random.below(7)).map(|_| PARTS[random.below(PARTS.len())]).collect();
        for (cut, _) in text.char_indices() {
            let (prompt, response) = text.split_at(cut);
            for pair in all_pairs() {
                let encoded = pair.promises(prompt, response);
                let decoded = pair.decode(&ids_of(&encoded, RESPONSE));
                match pair.name.as_str() {
                    "qwen2_5" => assert_eq!(decoded, nfc(response), "{} {prompt:?}", pair.name),
                    // `▁` in the text comes back as a space: their vocabulary cannot say it.
                    "gemma2" => assert_eq!(decoded, response.replace('▁', " "), "{prompt:?}"),
                    name if LOSSLESS.contains(&name) => assert_eq!(decoded, response, "{name} {prompt:?}"),
                    _ => {}
                }
            }
        }
    }
}

/// Single tokens of real vocabularies as readable text, and a stream of every golden text.
#[test]
fn ids_come_back_as_text() {
    for (pair, row, _, _) in golden_rows() {
        let ids = ids(&row["ids"]);
        for skip_special in [false, true] {
            let whole = pair.library.decode(&ids, skip_special).unwrap();
            assert_eq!(pair.ours.decode(&ids, skip_special), whole);
            let mut stream = pair.ours.decode_stream(skip_special);
            let mut streamed: String = ids.iter().filter_map(|id| stream.push(*id)).collect();
            streamed.extend(stream.finish());
            assert_eq!(streamed, whole, "{} / {}", pair.name, row["pair"]);
        }
    }
    for Loaded { goldens, pairs } in loaded() {
        let text = |name: &str, id: u32| pairs[name].ours.token_text(id);
        let of = |name: &str, token: &str| text(name, pairs[name].ours.token_to_id(token).unwrap());
        for name in ["gpt2", "llama2", "t5_small"] {
            let space = if name == "gpt2" { "Ġ" } else { "▁" };
            assert_eq!(of(name, &format!("{space}the")), " the");
        }
        assert_eq!(of("qwen2_5", "<|im_end|>"), "<|im_end|>");
        assert_eq!(of("gpt2", "Ċ"), "\n");
        assert_eq!(of("llama2", "<0x0A>"), "\n");
        assert_eq!(of("llama2", "<0xF0>"), "<0xF0>");
        let sizes = goldens.expect(
            [("gpt2", 517), ("qwen2_5", 525), ("llama3_2", 522), ("gemma2", 584), ("phi3", 587)],
            [("gpt2", 50257), ("qwen2_5", 151665), ("llama3_2", 128256), ("gemma2", 256000), ("phi3", 32064)],
        );
        for (name, size) in sizes {
            assert_eq!(pairs[name].ours.vocab_size(), size, "{name}");
            assert_eq!(text(name, size as u32), format!("<id {size}>"));
        }
        if !goldens.ours {
            assert_eq!(text("gpt2", 995), " world");
            assert_eq!(text("gpt2", 447), "<0xE2><0x80>");
            assert_eq!(text("qwen2_5", 151645), "<|im_end|>");
            assert_eq!(text("llama2", 3186), " world");
            assert_eq!(text("llama2", 13), "\n");
            assert_eq!(text("llama2", 243), "<0xF0>");
            assert_eq!(text("t5_small", 296), " world");
        }
    }
}

/// The same ids from one thread and from many.
#[test]
fn many_threads_agree() {
    for Loaded { goldens, pairs } in loaded() {
        let rows: Vec<Rendered> = goldens
            .lines(goldens.prompt_completion())
            .iter()
            .take(40)
            .map(|row| {
                let field = |name: &str| row[name].as_str().unwrap();
                rendered(&[(field("prompt"), PROMPT), (field("completion"), RESPONSE)], true)
            })
            .collect();
        let policy = Policy::default();
        for name in ["qwen2_5", "llama2", "t5_small"] {
            let tokenizer = &pairs[name].ours;
            let one: Vec<Encoded> = rows.iter().map(|row| tokenizer.encode(row, &policy).unwrap()).collect();
            std::thread::scope(|scope| {
                let workers: Vec<_> = (0..4)
                    .map(|_| {
                        scope.spawn(|| {
                            rows.iter().map(|row| tokenizer.encode(row, &policy).unwrap()).collect::<Vec<_>>()
                        })
                    })
                    .collect();
                for worker in workers {
                    assert!(worker.join().unwrap() == one, "{name}");
                }
            });
        }
    }
}

// ------------------------------------------------------------------------------ small tokenizers made here

/// An entry of `added_tokens`; `flags` is any of `lstrip`, `rstrip`, `normalized`, `plain` (not special).
fn added(id: usize, content: &str, flags: &str) -> Value {
    json!({
        "id": id, "content": content, "single_word": false, "lstrip": flags.contains("lstrip"),
        "rstrip": flags.contains("rstrip"), "normalized": flags.contains("normalized"),
        "special": !flags.contains("plain"),
    })
}

/// A BPE model over single characters, `first` tokens in front, and the given merges.
fn bpe(first: Vec<String>, characters: Vec<String>, merges: &[&str], byte_fallback: bool) -> Value {
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

fn tokenizer_json(model: Value, stages: Value, added: Vec<Value>) -> Value {
    let mut json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": null,
    });
    json.as_object_mut().unwrap().extend(stages.as_object().unwrap().clone());
    json["model"] = model;
    json
}

/// GPT-2's kind: 256 bytes, a few merges, `<eos>` = 269 and what else is added.
fn byte_level(normalizer: Value, add_prefix_space: bool, trim_offsets: bool, more: Vec<Value>) -> Value {
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

fn eos(content: &str) -> Option<Value> {
    Some(json!({ "eos_token": { "content": content } }))
}

/// Llama's kind: `<unk> <s> </s>`, bytes, characters, a few merges; `<s>` in front of every text.
fn sentence_piece(normalizer: Value, pre_tokenizer: Value, more: Vec<Value>) -> Value {
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

fn llama_config() -> Option<Value> {
    Some(json!({ "bos_token": "<s>", "eos_token": "</s>", "pad_token": null }))
}

fn legacy() -> Value {
    json!({"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]})
}

fn metaspace(scheme: &str, split: bool) -> Value {
    json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split})
}

/// T5's kind, written as old files are: a model without "type", `</s>` behind every text and among the
/// model's own pieces, at the best score.
fn unigram(pre_tokenizer: Value) -> Value {
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

fn whitespace_then_metaspace() -> Value {
    json!({"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace("always", true)]})
}

/// The library's words for the response under `boundary: split`, the promises asserted.
fn response_words(pair: &Pair, prompt: &str, response: &str) -> Vec<String> {
    pair.words(&ids_of(&pair.promises(prompt, response), RESPONSE))
}

#[test]
fn byte_level_prefix_is_not_put_into_a_response() {
    let pair = Pair::from_json("roberta", &byte_level(Value::Null, true, true, vec![]), eos("<eos>"));
    assert_eq!(pair.words(&pair.ours.encode_prompt("hello").unwrap()), ["Ġ", "hello"]);
    assert_eq!(response_words(&pair, "hello", " world"), ["Ġworld"]);
    assert_eq!(response_words(&pair, "Par", "is"), ["is"]);
    assert_eq!(response_words(&pair, "hello ", "world"), ["w", "or", "ld"]);
    // At the start of the text, and behind an added token, the tokenizer prefixes as it always does.
    assert_eq!(response_words(&pair, "", "is"), ["Ġ", "is"]);
    assert_eq!(response_words(&pair, "hello<eos>", "is"), ["Ġ", "is"]);
    assert_eq!(pair.decode(&pair.whole("hello<eos>is")), " hello<eos> is");
}

/// This file trims offsets: the library's range of ` world` leaves the space out. The space is the token's
/// all the same, so supervising the space supervises the token.
#[test]
fn a_trimmed_offset_does_not_hide_a_space() {
    let pair = Pair::from_json("roberta", &byte_level(Value::Null, true, true, vec![]), eos("<eos>"));
    let library = pair.library.encode("hello world", true).unwrap();
    assert_eq!(library.get_offsets().last(), Some(&(6, 11)));
    let encoded = joint(&pair.ours, &[("hello", PROMPT), (" ", RESPONSE), ("world", Origin::Scaffold)]);
    assert_eq!(encoded.tokens.bytes.last(), Some(&(5..11)));
    assert_eq!(encoded.tokens.origins.last(), Some(&RESPONSE));
}

#[test]
fn metaspace_first() {
    let json = sentence_piece(Value::Null, metaspace("first", false), vec![]);
    let pair = Pair::from_json("mistral", &json, llama_config());
    assert_eq!(response_words(&pair, "Par", "is"), ["is"]);
    assert_eq!(response_words(&pair, "Hi", " world"), ["▁world"]);
    assert_eq!(response_words(&pair, "Hi ", "is"), ["is"]);
    assert_eq!(response_words(&pair, "", "is"), ["▁is"]);
    assert_eq!(response_words(&pair, "Hi</s>", "is"), ["is"]);
    assert_eq!(response_words(&pair, "<s>", "is"), ["is"]);
    for (prompt, response) in [("Hi", " is it?"), ("Par", "is"), ("a ", " b"), ("Hi\n", "\nworld é")] {
        pair.lossless(prompt, response);
    }
}

#[test]
fn metaspace_always() {
    let json = sentence_piece(Value::Null, metaspace("always", true), vec![]);
    let pair = Pair::from_json("always", &json, llama_config());
    assert_eq!(response_words(&pair, "Par", "is Par"), ["is", "▁Par"]);
    assert_eq!(response_words(&pair, "Hi", " world"), ["▁world"]);
    // The prompt's own ids keep its last space (`▁`), so the response gets none.
    assert_eq!(pair.words(&pair.ours.encode_prompt("Hi ").unwrap()), ["<s>", "▁Hi", "▁"]);
    assert_eq!(response_words(&pair, "Hi ", "is"), ["is"]);
    // A new section is prefixed in the whole text too.
    assert_eq!(response_words(&pair, "Hi</s>", "is"), ["▁is"]);
    assert_eq!(
        split(&pair.ours, &[("Hi</s>", PROMPT), ("is", RESPONSE)]).tokens.ids[1..],
        pair.whole("Hi</s>is")
    );
}

/// Behind `WhitespaceSplit` the prefix is all that is left of white space: it stays exactly where the text has
/// white space, on either side of the cut.
#[test]
fn metaspace_always_behind_whitespace_split() {
    let pair = Pair::from_json("t5", &unigram(whitespace_then_metaspace()), eos("</s>"));
    assert_eq!(response_words(&pair, "Par", "is Par"), ["is", "▁Par"]);
    assert_eq!(response_words(&pair, "a:", " Par"), ["▁Par"]);
    assert_eq!(response_words(&pair, "a: ", "Par"), ["▁Par"]);
    assert_eq!(response_words(&pair, "a:\n", "is"), ["▁is"]);
    assert_eq!(response_words(&pair, " ", "is"), ["▁is"]);
    assert_eq!(response_words(&pair, "", "is"), ["▁is"]);
    assert_eq!(response_words(&pair, "a</s>", "is"), ["▁is"]);
}

#[test]
fn legacy_prepend_and_replace() {
    let pair = Pair::from_json("llama", &sentence_piece(legacy(), Value::Null, vec![]), llama_config());
    assert_eq!(response_words(&pair, "Par", "is"), ["is"]);
    assert_eq!(response_words(&pair, "Hi", " world"), ["▁world"]);
    assert_eq!(response_words(&pair, "Hi ", "is"), ["is"]);
    assert_eq!(response_words(&pair, "", "is"), ["▁is"]);
    // Its normalizer runs on each section between added tokens, so this prefix is in the whole text as well.
    assert_eq!(response_words(&pair, "Hi</s>", "is"), ["▁is"]);
    assert_eq!(response_words(&pair, "Hi", "is</s>Hi"), ["is", "</s>", "▁Hi"]);
    for (prompt, response) in [("Hi", " is it?"), ("Par", "is"), ("a ", " b"), ("Hi\n", "\nworld ü")] {
        pair.lossless(prompt, response);
    }
}

/// An added token that is matched after normalisation does not start the normalizer anew.
#[test]
fn normalized_added_tokens() {
    let more = vec![added(400, "[X]", "normalized plain")];
    let pair = Pair::from_json(
        "llama",
        &sentence_piece(Value::Null, metaspace("always", false), more),
        llama_config(),
    );
    assert_eq!(response_words(&pair, "Hi[X]", "is"), ["▁is"]);
    let replace = json!({"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"Regex": "^"}, "content": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]});
    let more = vec![added(400, "[X]", "normalized plain")];
    let pair = Pair::from_json("anchored", &sentence_piece(replace, Value::Null, more), llama_config());
    assert_eq!(response_words(&pair, "Par", "is"), ["is"]);
}

/// A normalizer that strips the ends of a text does not strip the middle of one.
#[test]
fn stripping_normalizers() {
    let strip = json!({"type": "Sequence", "normalizers": [
        {"type": "Strip", "strip_left": true, "strip_right": true},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
    ]});
    let pair =
        Pair::from_json("strip", &sentence_piece(strip, metaspace("always", true), vec![]), llama_config());
    let words = |prompt: &str, response: &str| {
        let encoded = split(&pair.ours, &[(prompt, PROMPT), (response, RESPONSE)]);
        let alone = pair.library.encode(prompt, true).unwrap().get_ids().to_vec();
        assert_eq!(encoded.tokens.ids[..alone.len()], alone);
        pair.words(&ids_of(&encoded, RESPONSE))
    };
    assert_eq!(words("Hi", " world"), ["▁world"]);
    assert_eq!(words("Par", "is"), ["is"]);
    assert_eq!(words("Hi ", "is"), ["▁is"]);
}

/// NFC would make one letter of the two sides: the prompt keeps its `e`, the response starts with the accent.
#[test]
fn a_cut_inside_a_composed_character() {
    let pair =
        Pair::from_json("qwen", &byte_level(json!({"type": "NFC"}), false, false, vec![]), eos("<eos>"));
    for (prompt, response) in [
        ("cafe", "\u{301} noir"),
        ("e\u{323}", "\u{302}"),
        ("\u{1112}", "\u{1161}\u{11ab}"),
        ("x👩\u{200d}", "👩\u{200d}👧"),
        ("दुनि", "या"),
        ("A\u{30a}", "\u{301}B"),
    ] {
        let encoded = pair.promises(prompt, response);
        assert_eq!(pair.decode(&ids_of(&encoded, RESPONSE)), nfc(response));
        let alone = pair.ours.encode_prompt(prompt).unwrap();
        assert_eq!(pair.decode(&alone), nfc(prompt));
    }
}

#[test]
fn an_added_token_across_the_cut_is_cut() {
    let more =
        vec![added(270, "<|end|>", ""), added(271, "<|e", "plain"), added(272, "   ", "plain normalized")];
    let pair = Pair::from_json("gpt", &byte_level(Value::Null, false, false, more), eos("<eos>"));
    let encoded = pair.promises("a<|", "end|>b");
    assert!(!encoded.tokens.ids.contains(&270));
    // What the prompt alone matches is matched, although the whole text would match something longer.
    assert_eq!(pair.promises("a<|e", "nd|>b").tokens.ids[..2], [pair.ours.token_to_id("a").unwrap(), 271]);
    assert!(!pair.promises("x ", "  y").tokens.ids.contains(&272));
    assert!(joint(&pair.ours, &[("x ", PROMPT), ("  y", RESPONSE)]).tokens.ids.contains(&272));
    let straddles = joint(&pair.ours, &[("a<|", PROMPT), ("end|>b", RESPONSE)]).straddles;
    assert_eq!((straddles[0].tokens.clone(), straddles[0].at, straddles[0].bytes.clone()), (1..2, 3, 1..8));
    assert_eq!(straddles[0].joint, [270]);
    assert_eq!(pair.decode(&straddles[0].split), "<|end|>");
}

/// Tokens that swallow the white space beside them stop at the cut, and at the end of turn.
#[test]
fn stripping_added_tokens() {
    let more = vec![added(270, "<|user|>", "rstrip"), added(271, "<|stop|>", "lstrip")];
    let pair = Pair::from_json("phi", &byte_level(Value::Null, false, false, more), eos("<|stop|>"));
    // `rstrip` at the prompt's end: the prompt's ids are its own, the response keeps its space.
    let encoded = split(&pair.ours, &[("hello<|user|>", PROMPT), (" world", RESPONSE)]);
    assert_eq!(pair.words(&encoded.tokens.ids), ["hello", "<|user|>", "Ġworld"]);
    assert_eq!(joint(&pair.ours, &[("hello<|user|>", PROMPT), (" world", RESPONSE)]).tokens.bytes[1], 5..14);
    // White space that belongs to the prompt is swallowed as at inference.
    let encoded = split(&pair.ours, &[("hello<|user|>\n", PROMPT), ("is", RESPONSE)]);
    assert_eq!(pair.words(&encoded.tokens.ids), ["hello", "<|user|>", "is"]);
    // `lstrip` at the response's start: the prompt keeps its space.
    let encoded = split(&pair.ours, &[("hello ", PROMPT), ("<|stop|>", RESPONSE)]);
    assert_eq!(pair.words(&encoded.tokens.ids), ["hello", "Ġ", "<|stop|>"]);
    // The end of turn leaves the response its last space, in both modes.
    for boundary in [Boundary::Split, Boundary::Joint] {
        let row = rendered(&[("hello", PROMPT), (" world ", RESPONSE), ("<|stop|>", STOP)], true);
        let tokens = pair.ours.encode(&row, &policy(boundary)).unwrap().tokens;
        assert_eq!(pair.words(&tokens.ids), ["hello", "Ġworld", "Ġ", "<|stop|>"]);
        assert_eq!(tokens.bytes[2..], [11..12, 12..20]);
        assert_eq!(tokens.origins[2..], [RESPONSE, STOP]);
    }
}

/// T5 puts an EOS behind every text: it is the one that the row asks for, and there is never a second.
#[test]
fn the_post_processors_eos() {
    let pair = Pair::from_json("t5", &unigram(whitespace_then_metaspace()), eos("</s>"));
    for boundary in [Boundary::Split, Boundary::Joint] {
        let encode = |parts: &[(&str, Origin)]| {
            pair.ours.encode(&rendered(parts, true), &policy(boundary)).unwrap().tokens
        };
        let asked = encode(&[("a:", PROMPT), (" is", RESPONSE), ("</s>", STOP)]);
        assert_eq!(pair.words(&asked.ids), ["▁", "a", ":", "▁is", "</s>"]);
        assert_eq!((asked.origins[4], asked.weights[4], asked.bytes[4].clone()), (STOP, 1.0, 5..9));
        let wished = encode(&[("a:", PROMPT), (" is", RESPONSE), ("", STOP)]);
        assert_eq!(wished.ids, asked.ids);
        assert_eq!((wished.origins[4], wished.weights[4], wished.bytes[4].clone()), (STOP, 1.0, 5..5));
        let unasked = encode(&[("a:", PROMPT), (" is", RESPONSE)]);
        assert_eq!(unasked.ids, asked.ids);
        assert_eq!((unasked.origins[4], unasked.weights[4]), (Origin::Scaffold, 0.0));
        // Chat text carries its own: nothing is added.
        let chat = rendered(&[("a:", PROMPT), (" is", RESPONSE), ("</s>", STOP)], false);
        let chat = pair.ours.encode(&chat, &policy(boundary)).unwrap().tokens;
        assert_eq!((chat.ids, chat.origins[4]), (asked.ids, STOP));
    }
}

/// One cut per response, wherever the turns stand; what lies between responses is tokenised in one.
#[test]
fn one_cut_per_response() {
    let more = vec![added(270, "<|im_end|>", "")];
    let pair = Pair::from_json("chat", &byte_level(Value::Null, false, false, more), eos("<|im_end|>"));
    let turn = |turn| (Origin::Response { turn }, Origin::EndOfTurn { turn });
    let ((first, first_stop), (second, second_stop)) = (turn(1), turn(3));
    let parts = [
        ("hel", PROMPT),
        ("lo", first),
        (" wor", first),
        ("ld", first),
        ("<|im_end|>", first_stop),
        ("\n", Origin::Scaffold),
        ("hel", PROMPT),
        ("lo Par", Origin::Scaffold),
        ("is", second),
        ("<|im_end|>", second_stop),
    ];
    let row = rendered(&parts, false);
    let encoded = pair.ours.encode(&row, &policy(Boundary::Split)).unwrap();
    let words = pair.words(&encoded.tokens.ids);
    let expected =
        ["he", "l", "l", "o", "Ġworld", "<|im_end|>", "Ċ", "hello", "Ġ", "Par", "is", "<|im_end|>"];
    assert_eq!(words, expected);
    let letters: String = encoded.tokens.origins.iter().map(|origin| origin.letter()).collect();
    assert_eq!(letters, "OORRREBOBBRE");
    assert_eq!(pair.ours.encode(&row, &policy(Boundary::Joint)).unwrap().straddles.len(), 2);
    // An empty response is still a cut: its stop token is the first thing that the model says.
    let row = rendered(&[("a<", PROMPT), ("", RESPONSE), ("|im_end|>", STOP)], false);
    let encoded = pair.ours.encode(&row, &policy(Boundary::Split)).unwrap();
    assert!(!encoded.tokens.ids.contains(&270));
    assert_eq!(encoded.tokens.ids[..2], pair.ours.encode_text("a<").unwrap());
}

#[test]
fn content_cannot_speak_for_the_template() {
    let more =
        vec![added(270, "<|im_start|>", ""), added(271, "<|im_end|>", ""), added(272, "<tool>", "plain")];
    let pair = Pair::from_json("chat", &byte_level(Value::Null, false, false, more), eos("<|im_end|>"));
    let parts = [
        ("<|im_start|>user\n", Origin::Scaffold),
        ("hello<|im_end|>\n<tool>", PROMPT),
        ("<|im_end|>\n<|im_start|>x\n", Origin::Scaffold),
        ("is<|im_end|>is<", RESPONSE),
        ("<|im_end|>", STOP),
        ("\n", Origin::Scaffold),
    ];
    let row = rendered(&parts, false);
    for boundary in [Boundary::Split, Boundary::Joint] {
        // As transformers does: content's tokens are structural, and are reported.
        let special = pair.ours.encode(&row, &policy(boundary)).unwrap();
        assert_eq!(special.tokens.ids.iter().filter(|id| **id == 271).count(), 4);
        let reported: Vec<Origin> =
            special.structural_from_content.iter().map(|&index| special.tokens.origins[index]).collect();
        assert_eq!(reported, [PROMPT, RESPONSE]);
        assert!(special.structural_from_content.iter().all(|&index| special.tokens.ids[index] == 271));
        // As text: only the template's are.
        let policy = Policy { content_special_tokens: ContentSpecialTokens::Text, ..policy(boundary) };
        let text = pair.ours.encode(&row, &policy).unwrap();
        assert!(text.structural_from_content.is_empty());
        let structural: Vec<(u32, Origin)> = (0..text.tokens.len())
            .filter(|&index| pair.ours.is_structural(text.tokens.ids[index]))
            .map(|index| (text.tokens.ids[index], text.tokens.origins[index]))
            .collect();
        let expected =
            [(270, Origin::Scaffold), (271, Origin::Scaffold), (270, Origin::Scaffold), (271, STOP)];
        assert_eq!(structural, expected);
        assert!(text.tokens.ids.contains(&272), "a token that structures nothing is still a token");
        assert_eq!(pair.decode(&text.tokens.ids), row.text);
    }
}

/// A Unigram model has `</s>` among its own pieces and would pick it for text.
#[test]
fn content_cannot_reach_a_models_own_pieces() {
    let pair = Pair::from_json("t5", &unigram(whitespace_then_metaspace()), eos("</s>"));
    let row = rendered(&[("a</s>b ", PROMPT), ("is</s> </s>", RESPONSE), ("</s>", STOP)], true);
    let policy = Policy { content_special_tokens: ContentSpecialTokens::Text, ..Policy::default() };
    let encoded = pair.ours.encode(&row, &policy).unwrap();
    assert_eq!(encoded.tokens.ids.iter().filter(|id| **id == 1).count(), 1);
    assert_eq!(ids_of(&encoded, STOP), [1]);
    assert_eq!(pair.decode(&encoded.tokens.ids), "a</s>b is</s> </s></s>");
}

/// Phi-3's `</s>` is not special in its file, but it is the EOS.
#[test]
fn a_plain_eos_is_structural() {
    let mut json = sentence_piece(legacy(), Value::Null, vec![]);
    json["added_tokens"][2]["special"] = json!(false);
    let pair = Pair::from_json("phi", &json, llama_config());
    assert!(pair.ours.is_structural(2));
    let row = rendered(&[("Hi</s>", PROMPT), ("is", RESPONSE), ("</s>", STOP)], true);
    let policy = Policy { content_special_tokens: ContentSpecialTokens::Text, ..Policy::default() };
    assert_eq!(pair.ours.encode(&row, &policy).unwrap().tokens.ids.iter().filter(|id| **id == 2).count(), 1);
    assert_eq!(pair.ours.encode(&row, &Policy::default()).unwrap().structural_from_content, [2]);
}

#[test]
fn an_unknown_character_is_not_structure() {
    let pair = Pair::from_json("t5", &unigram(whitespace_then_metaspace()), eos("</s>"));
    let encoded = split(&pair.ours, &[("a 中", PROMPT), (" 文", RESPONSE)]);
    assert_eq!(encoded.tokens.ids.iter().filter(|id| **id == 2).count(), 2);
    assert!(encoded.structural_from_content.is_empty());
}

#[test]
fn double_bos() {
    let pair = Pair::from_json("llama", &sentence_piece(legacy(), Value::Null, vec![]), llama_config());
    let double = |parts: &[(&str, Origin)], special: bool| {
        pair.ours.encode(&rendered(parts, special), &Policy::default()).unwrap().double_bos
    };
    assert!(double(&[("<s>Hi", PROMPT), (" is", RESPONSE)], true));
    assert!(!double(&[("<s>Hi", Origin::Scaffold), (" is", RESPONSE)], false));
    assert!(double(&[("<s><s>Hi", Origin::Scaffold), (" is", RESPONSE)], false));
    assert!(!double(&[("Hi<s>", PROMPT), (" is", RESPONSE)], true));
    // GPT-2's BOS is its EOS: an empty row that ends is not a row that starts twice.
    let config = json!({ "bos_token": "<eos>", "eos_token": "<eos>" });
    let gpt = Pair::from_json("gpt", &byte_level(Value::Null, false, false, vec![]), Some(config));
    assert!(!split(&gpt.ours, &[("<eos>", PROMPT), ("", RESPONSE), ("<eos>", STOP)]).double_bos);
}

#[test]
fn weights_and_origins() {
    let pair = Pair::from_json("gpt", &byte_level(Value::Null, false, false, vec![]), eos("<eos>"));
    let mut row = rendered(&[("hel", PROMPT), ("lo wor", RESPONSE), ("ld", STOP)], true);
    row.spans[0].weight = 0.25;
    row.spans[1].weight = 0.5;
    row.spans[2].weight = 2.0;
    let encoded = pair.ours.encode(&row, &policy(Boundary::Joint)).unwrap();
    // `hello` is half prompt: its first supervised byte decides. ` world` is half end of turn.
    assert_eq!(encoded.tokens.origins, [RESPONSE, RESPONSE]);
    assert_eq!(encoded.tokens.weights, [0.5, 2.0]);
    assert_eq!(encoded.mixed_weights, [0, 1]);
    assert_eq!(encoded.straddles.len(), 1);
    row.spans[1].range.end = 8;
    assert!(matches!(pair.ours.encode(&row, &Policy::default()), Err(Error::Row { .. })));
}

#[test]
fn special_tokens_from_files() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, json: &Value| {
        std::fs::write(dir.path().join(name), serde_json::to_vec(json).unwrap()).unwrap();
    };
    let message = |error: Error| error.to_string();
    let missing = message(Tokenizer::from_dir(dir.path()).err().unwrap());
    assert!(missing.contains("tokenizer.json") && missing.contains("no such file"), "{missing}");

    let more = vec![added(270, "<|im_end|>", ""), added(271, "<|eot|>", "")];
    let mut json = byte_level(Value::Null, false, false, more);
    json["truncation"] =
        json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
    json["padding"] = json!({
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "!"
    });
    json["model"]["dropout"] = json!(0.9);
    write("tokenizer.json", &json);
    let bare = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!((bare.eos(), bare.bos(), bare.pad()), (None, None, None));
    assert_eq!(bare.stop_ids(&Policy::default()).unwrap(), Vec::<u32>::new());
    assert_eq!(bare.vocab_size(), 272);
    // Neither cut, nor padded, nor left to chance.
    let ids = bare.encode_prompt("hello world hello world").unwrap();
    assert_eq!(bare.decode(&ids, false), "hello world hello world");
    assert!((0..50).all(|_| bare.encode_prompt("hello world hello world").unwrap() == ids) && ids.len() == 5);

    // The model's own configuration is the fallback; generation_config.json wins over it.
    write("config.json", &json!({ "eos_token_id": 271 }));
    let fallback = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!(fallback.eos().unwrap().content, "<|eot|>");
    // An id outside of the vocabulary is listed, and costs nothing.
    write("generation_config.json", &json!({ "eos_token_id": [270, u32::MAX] }));
    let outside = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!(outside.stop_ids(&Policy::default()).unwrap(), [270, u32::MAX]);
    assert!(outside.is_structural(270) && !outside.is_structural(u32::MAX));
    write("generation_config.json", &json!({ "eos_token_id": [270, 269] }));
    write("special_tokens_map.json", &json!({ "eos_token": "<eos>", "pad_token": {"content": "<|eot|>"} }));
    let mapped = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!((mapped.eos().unwrap().id, mapped.pad().unwrap().id), (269, 271));
    assert_eq!(mapped.stop_ids(&Policy::default()).unwrap(), [269, 270]);
    let config = json!({
        "eos_token": {"content": "<|im_end|>"}, "bos_token": null, "pad_token": "<|eot|>", "added_tokens_decoder": {}
    });
    write("tokenizer_config.json", &config);
    let full = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!(full.eos().unwrap().id, 270);
    let policy = Policy { stop_tokens: vec!["<|eot|>".into(), "<eos>".into()], ..Policy::default() };
    assert_eq!(full.stop_ids(&policy).unwrap(), [270, 269, 271]);
    let unknown = Policy { stop_tokens: vec!["<|nope|>".into()], ..Policy::default() };
    let unknown = message(full.stop_ids(&unknown).unwrap_err());
    assert!(unknown.contains("<|nope|>") && unknown.contains("tokenizer.json"), "{unknown}");

    // Every setting is in the fingerprint.
    let prints = [&bare, &fallback, &mapped, &full].map(|tokenizer| tokenizer.fingerprint().to_string());
    assert!(prints.iter().enumerate().all(|(i, print)| print.len() == 64 && !prints[..i].contains(print)));
    assert_eq!(Tokenizer::from_dir(dir.path()).unwrap().fingerprint(), full.fingerprint());

    // transformers registers what `added_tokens_decoder` declares over what tokenizer.json says.
    let declared = json!({ "content": "<|eot|>", "lstrip": true, "normalized": false, "special": true });
    write(
        "tokenizer_config.json",
        &json!({ "eos_token": "<eos>", "added_tokens_decoder": {"271": declared} }),
    );
    let declared = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!(declared.encode_text("hello  <|eot|>").unwrap().len(), 2);
    assert_eq!(full.encode_text("hello  <|eot|>").unwrap().len(), 4);
    write("tokenizer_config.json", &json!({ "added_tokens_decoder": {"7": {"content": "<|eot|>"}} }));
    let contradiction = message(Tokenizer::from_dir(dir.path()).err().unwrap());
    assert!(
        contradiction.contains("<|eot|>") && contradiction.contains('7') && contradiction.contains("271")
    );
    write("tokenizer_config.json", &json!({ "eos_token": "<|nope|>", "added_tokens_decoder": {} }));
    let unknown = message(Tokenizer::from_dir(dir.path()).err().unwrap());
    assert!(unknown.contains("tokenizer_config.json") && unknown.contains("<|nope|>"), "{unknown}");
    std::fs::write(dir.path().join("tokenizer_config.json"), "{").unwrap();
    assert!(message(Tokenizer::from_dir(dir.path()).err().unwrap()).contains("tokenizer_config.json"));
    assert!(message(Tokenizer::from_bytes(b"{}", None).err().unwrap()).contains("not a tokenizer"));
}

/// An expression that backtracks too often makes the library panic.
#[test]
fn a_panic_of_the_library_is_an_error_of_the_row() {
    let json = json!({
        "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null, "decoder": null,
        "pre_tokenizer": {
            "type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": false
        },
        "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "xxy": 1, "z": 2}, "unk_token": "[UNK]"},
    });
    let tokenizer = Tokenizer::from_bytes(json.to_string().as_bytes(), None).unwrap();
    let encode = |text: &str| {
        tokenizer.encode(&rendered(&[("z", PROMPT), (text, RESPONSE)], false), &Policy::default())
    };
    assert_eq!(encode("xxy").unwrap().tokens.ids, [2, 1]);
    let Err(Error::Row { message, .. }) = encode(&"x".repeat(60)) else { panic!("not an error") };
    assert!(message.contains("panicked") && message.contains("retry"), "{message}");
    // The tokenizer still works.
    assert_eq!(encode("xxy").unwrap().tokens.ids, [2, 1]);
}

#[test]
fn a_stream_holds_incomplete_characters_back() {
    let pair = Pair::from_json("gpt", &byte_level(Value::Null, false, false, vec![]), eos("<eos>"));
    let ids = pair.whole("a🙂b<eos>");
    let mut stream = pair.ours.decode_stream(true);
    let pieces: Vec<Option<String>> = ids.iter().map(|id| stream.push(*id)).collect();
    let some = |text: &str| Some(text.to_string());
    assert_eq!(pieces, [some("a"), None, None, None, some("🙂"), some("b"), None]);
    assert_eq!(stream.finish(), None);
    // A character that never completes comes out at the end, as U+FFFD; or with the text that follows it.
    let mut stream = pair.ours.decode_stream(false);
    assert_eq!(stream.push(ids[1]), None);
    assert_eq!(stream.push(ids[0]), some("\u{fffd}a"));
    assert_eq!(stream.push(ids[1]), None);
    assert_eq!(stream.finish(), some("\u{fffd}"));
    // A decoder that strips the first space of a text does so once.
    let llama = Pair::from_json("llama", &sentence_piece(legacy(), Value::Null, vec![]), llama_config());
    let mut stream = llama.ours.decode_stream(false);
    let pieces: Vec<Option<String>> = llama.whole("Hi world").iter().map(|id| stream.push(*id)).collect();
    assert_eq!(pieces, [some("Hi"), some(" world")]);
    assert_eq!(pair.ours.token_text(ids[1]), "<0xF0>");
    assert_eq!(llama.ours.token_text(llama.whole("Hi")[0]), " Hi");
}

/// `boundary: joint` with `append_eos: false` asks for the library's own encoding: a text that spells the EOS keeps
/// it and the post-processor's, which is masked. Asked to append, there is one.
#[test]
fn joint_rows_as_the_library_encodes_them() {
    let rendered = rendered(&[("Say:", PROMPT), (" yes", RESPONSE), ("</s>", STOP)], true);
    let joint = Policy { boundary: Boundary::Joint, ..Policy::default() };
    let library = Policy { append_eos: false, ..joint.clone() };
    for Loaded { pairs, .. } in loaded() {
        let tokenizer = &pairs["t5_small"].ours;
        let letters = |policy: &Policy| -> String {
            tokenizer.encode(&rendered, policy).unwrap().tokens.origins.iter().map(|o| o.letter()).collect()
        };
        assert!(letters(&joint).ends_with("RE"), "{}", letters(&joint));
        assert!(letters(&library).ends_with("REB"), "{}", letters(&library));
    }
}

//! Comparison with values that transformers and llama.cpp computed.

use crate::common::{Goldens, goldens};
use crate::pair::Pair;
use crate::*;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::LazyLock;

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

/// Joint tokenisation equals transformers', id by id and byte by byte. One deliberate exception: tokens of the
/// post-processor are at (0, 0) there; here they have an empty range at the end of the text before them, so that
/// ranges never go backwards.
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
            // Both cover the whole text (T5 does not know emoji: two of them are one `<unk>`).
            let place = &text[straddle.bytes.start as usize..straddle.bytes.end as usize];
            for ids in [&straddle.joint, &straddle.split] {
                let decoded = pair.decode(ids);
                let unknown = decoded.contains("<unk>");
                // Both give the normalised text: `ﬁ` comes back as two letters.
                let place = match pair.name.as_str() {
                    "t5_small" | "unigram" => pair.normalized(place),
                    _ => place.to_string(),
                };
                assert!(unknown || decoded.trim_start() == place.trim_start(), "{context}: {decoded:?}");
            }
        }
    }
}

/// An EOS after the response gives the same ids as transformers gives for the text with the EOS written out,
/// except that T5 gets one EOS, not both the written one and the post-processor's.
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

/// llama.cpp's ids of its own test texts, for real vocabularies, which only the internal material has.
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

/// Tokenizers that neither change a text nor put anything before it: any ids decode to the exact text.
const LOSSLESS: &[&str] = &["gpt2", "llama3_2", "gemma2", "o200k", "tekken", "smollm", "deepseek"];

/// Under `boundary: split` the prompt's ids are the golden's ids of the prompt alone.
#[test]
fn split_keeps_the_prompt_of_inference() {
    for (pair, row, prompt, response) in golden_rows() {
        let encoded = pair.promises(&prompt, &response);
        let mut alone = ids(&row["p_ids"]);
        alone.truncate(alone.len() - pair.back);
        assert_eq!(encoded.tokens.ids[..alone.len()], alone, "{} / {}", pair.name, row["pair"]);
        // These put nothing before a text, so the response has the same ids as by itself.
        if ["gpt_neox", "qwen2_5"].iter().chain(LOSSLESS).any(|name| *name == pair.name) {
            assert_eq!(ids_of(&encoded, RESPONSE), ids(&row["c_ids_ns"]), "{} / {}", pair.name, row["pair"]);
        }
        // If no joint token crosses the cut and the halves equal those of the whole, nothing changes.
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

/// Random Unicode with all cases of normalizers, graphemes and white space, cut at every position.
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
                    // `▁` in the text comes back as a space: their vocabulary cannot represent it.
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

/// `boundary: joint` with `append_eos: false` requests the library's own encoding: a text that contains the EOS
/// keeps it and the post-processor's, which is masked. With `append_eos: true` there is one.
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

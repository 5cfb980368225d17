//! The promises and the rules of origins, on small tokenizers.

use crate::made::*;
use crate::pair::Pair;
use crate::*;
use serde_json::{Value, json};
use suasion_data::{ContentSpecialTokens, Error};

/// The library's tokens for the response under `boundary: split`; asserts the promises.
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
    // At the start of the text, and after an added token, the tokenizer adds its usual prefix.
    assert_eq!(response_words(&pair, "", "is"), ["Ġ", "is"]);
    assert_eq!(response_words(&pair, "hello<eos>", "is"), ["Ġ", "is"]);
    assert_eq!(pair.decode(&pair.whole("hello<eos>is")), " hello<eos> is");
}

/// This file trims offsets: the library's range of ` world` excludes the space. The space still belongs to the
/// token, so supervising the space supervises the token.
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

/// After `WhitespaceSplit` only the prefix represents white space: it is kept exactly where the text has white
/// space, on either side of the cut.
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

/// An added token that is matched after normalisation does not restart the normalizer.
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

/// NFC would merge a letter across the cut: the prompt keeps its `e`, the response starts with the accent.
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
    // A match in the prompt alone is used, although the whole text would match a longer token.
    assert_eq!(pair.promises("a<|e", "nd|>b").tokens.ids[..2], [pair.ours.token_to_id("a").unwrap(), 271]);
    assert!(!pair.promises("x ", "  y").tokens.ids.contains(&272));
    assert!(joint(&pair.ours, &[("x ", PROMPT), ("  y", RESPONSE)]).tokens.ids.contains(&272));
    let straddles = joint(&pair.ours, &[("a<|", PROMPT), ("end|>b", RESPONSE)]).straddles;
    assert_eq!((straddles[0].tokens.clone(), straddles[0].at, straddles[0].bytes.clone()), (1..2, 3, 1..8));
    assert_eq!(straddles[0].joint, [270]);
    assert_eq!(pair.decode(&straddles[0].split), "<|end|>");
}

/// Tokens that swallow adjacent white space stop at the cut, and at the end of turn.
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
    // The response keeps its last space before the end of turn, in both modes.
    for boundary in [Boundary::Split, Boundary::Joint] {
        let row = rendered(&[("hello", PROMPT), (" world ", RESPONSE), ("<|stop|>", STOP)], true);
        let tokens = pair.ours.encode(&row, &policy(boundary)).unwrap().tokens;
        assert_eq!(pair.words(&tokens.ids), ["hello", "Ġworld", "Ġ", "<|stop|>"]);
        assert_eq!(tokens.bytes[2..], [11..12, 12..20]);
        assert_eq!(tokens.origins[2..], [RESPONSE, STOP]);
    }
}

/// T5 puts an EOS after every text: it is the one that the row needs, and there is never a second.
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
        // Chat text contains its own: nothing is added.
        let chat = rendered(&[("a:", PROMPT), (" is", RESPONSE), ("</s>", STOP)], false);
        let chat = pair.ours.encode(&chat, &policy(boundary)).unwrap().tokens;
        assert_eq!((chat.ids, chat.origins[4]), (asked.ids, STOP));
    }
}

/// One cut per response, for any order of turns; the text between responses is tokenised at once.
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
    // An empty response is still a cut: its stop token is the first token that the model generates.
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
        // As in transformers: content's tokens are structural, and are reported.
        let special = pair.ours.encode(&row, &policy(boundary)).unwrap();
        assert_eq!(special.tokens.ids.iter().filter(|id| **id == 271).count(), 4);
        let reported: Vec<Origin> =
            special.structural_from_content.iter().map(|&index| special.tokens.origins[index]).collect();
        assert_eq!(reported, [PROMPT, RESPONSE]);
        assert!(special.structural_from_content.iter().all(|&index| special.tokens.ids[index] == 271));
        // As text: only the template's tokens are structural.
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

/// A Unigram model has `</s>` among its own pieces and would choose it for text.
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
    // GPT-2's BOS is its EOS: an empty row with an EOS does not have two BOS.
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
    // Not truncated, not padded, and not random.
    let ids = bare.encode_prompt("hello world hello world").unwrap();
    assert_eq!(bare.decode(&ids, false), "hello world hello world");
    assert!((0..50).all(|_| bare.encode_prompt("hello world hello world").unwrap() == ids) && ids.len() == 5);

    // The model's own configuration is the fallback; generation_config.json takes precedence.
    write("config.json", &json!({ "eos_token_id": 271 }));
    let fallback = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!(fallback.eos().unwrap().content, "<|eot|>");
    // An id outside the vocabulary is listed, without other effects.
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

    // As in transformers, declarations in `added_tokens_decoder` override those in tokenizer.json.
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
    // A character that never completes is returned at the end, as U+FFFD; or with the text that follows it.
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

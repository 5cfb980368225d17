//! Against TRL's own prepared rows (`goldens/trl.jsonl`, string prompts and completions): in joint mode our ids
//! are TRL's ids, and our labels are TRL's and those of the rule: a token is supervised exactly when it overlaps
//! a response byte. (TRL masks a common prefix of ids; on these rows the two agree, as the test shows.)

mod common;

use common::{Scratch, TrlGolden, material, outcomes, pipeline_of, trl_goldens, with_template};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use suasion_data::policy::{Boundary, TruncationMode};
use suasion_data::template::ChatTemplate;
use suasion_data::tokens::Tokenizer;
use suasion_data::{Code, IGNORE, Origin, Outcome, Policy};

fn goldens(material: &Path, kind: &str) -> BTreeMap<String, Vec<TrlGolden>> {
    trl_goldens(material, |case| case.contains(kind) && !case.contains("pack"))
}

/// The prompt and completion that a `src` names (goldens/README.md).
fn source_row(material: &Path, src: &str) -> (String, String) {
    let (place, rejected) = match src.split_once('#') {
        Some((place, how)) => {
            assert_eq!(how, "rejected,prompt_ends_with_space");
            (place, true)
        }
        None => (src, false),
    };
    let (file, row) = place.split_once(':').unwrap();
    let text = std::fs::read_to_string(material.join("datasets").join(file)).unwrap();
    let row: Value = serde_json::from_str(text.lines().nth(row.parse().unwrap()).unwrap()).unwrap();
    let prompt = row["prompt"].as_str().unwrap();
    if rejected {
        let completion = row["rejected"].as_str().unwrap().trim();
        return (format!("{} ", prompt.trim_end_matches('\n')), completion.into());
    }
    let completion = row["completion"].as_str().or(row["chosen"].as_str()).unwrap();
    (prompt.into(), completion.into())
}

#[test]
fn ids_and_labels_are_trls() {
    let Some(material) = material() else { return };
    let spec: Value =
        serde_json::from_str(&std::fs::read_to_string(material.join("goldens/trl_spec.json")).unwrap())
            .unwrap();
    let mut rows = 0;
    let mut straddling = 0;
    for (case, goldens) in goldens(&material, "/pc_text") {
        let (name, kind) = case.split_once('/').unwrap();
        let json = std::fs::read(material.join("tokenizers").join(name).join("tokenizer.json")).unwrap();
        let special = &spec[name];
        let config =
            json!({"bos_token": special["bos"], "eos_token": special["eos"], "pad_token": special["pad"]});
        let tokenizer: Arc<Tokenizer> =
            Tokenizer::from_bytes(&json, Some(config.to_string().as_bytes())).unwrap().into();
        let (max, mode) = match kind {
            "pc_text" => (1024, TruncationMode::KeepStart),
            "pc_text_trunc128_keep_start" => (128, TruncationMode::KeepStart),
            "pc_text_trunc128_keep_end" => (128, TruncationMode::KeepEnd),
            other => panic!("{other}"),
        };
        let policy = Policy {
            boundary: Boundary::Joint,
            truncation_mode: mode,
            max_length: Some(max),
            ..Policy::default()
        };
        let texts: Vec<(String, String)> = goldens.iter().map(|g| source_row(&material, &g.src)).collect();
        let s = Scratch::new();
        let lines: String =
            texts.iter().map(|(p, c)| format!("{}\n", json!({"prompt": p, "completion": c}))).collect();
        let path = s.file("rows.jsonl", lines);
        let mut pipeline = pipeline_of(Some(&tokenizer), &policy);
        pipeline.keep_text = true;
        let (all, _) = outcomes(&pipeline, &path);
        for ((golden, (prompt, _)), outcome) in goldens.iter().zip(&texts).zip(&all) {
            let at = format!("{case} {}", golden.src);
            rows += 1;
            let Outcome::Kept(kept) = outcome else {
                panic!("{at}: TRL keeps it, we do not: {outcome:?}");
            };
            let sample = &kept.sample;
            assert_eq!(sample.input_ids, golden.ids, "{at}");
            let ours: Vec<bool> = sample.labels.iter().map(|l| *l != IGNORE).collect();
            // The rule, from the bytes alone.
            let bytes = kept.bytes.as_ref().unwrap();
            for (i, learned) in ours.iter().enumerate() {
                assert_eq!(*learned, bytes[i].end as usize > prompt.len(), "{at}: token {i} {:?}", bytes[i]);
                assert!(!learned || sample.labels[i] as u32 == sample.input_ids[i]);
            }
            assert_eq!(ours, golden.supervised, "{at}");
            // A token across the boundary (a prompt that ends in a space) is told, and nothing else is.
            let crosses =
                bytes.iter().any(|b| (b.start as usize) < prompt.len() && b.end as usize > prompt.len());
            assert_eq!(outcome.findings().iter().any(|f| f.code == Code::M003), crosses, "{at}");
            assert_eq!(crosses, golden.src.ends_with("prompt_ends_with_space"), "{at}");
            straddling += usize::from(crosses);
        }
    }
    println!("{rows} rows, {straddling} with a token across the boundary");
    assert_eq!(straddling, 80);
    assert_eq!(rows, 6 * 46 + 30 + 50);
}

/// The rows of `keep_start` at 128 that TRL drops because nothing supervised is left are those that we drop.
#[test]
fn rows_without_a_target_are_dropped_as_trl_drops_them() {
    let Some(material) = material() else { return };
    let all = goldens(&material, "/pc_text");
    let (start, end) =
        (&all["qwen2_5/pc_text_trunc128_keep_start"], &all["qwen2_5/pc_text_trunc128_keep_end"]);
    let tokenizer: Arc<Tokenizer> = Tokenizer::from_dir(&material.join("tokenizers/qwen2_5")).unwrap().into();
    let s = Scratch::new();
    let lines: String = end
        .iter()
        .map(|g| source_row(&material, &g.src))
        .map(|(p, c)| format!("{}\n", json!({"prompt": p, "completion": c})))
        .collect();
    let path = s.file("rows.jsonl", lines);
    let policy = Policy {
        boundary: Boundary::Joint,
        truncation_mode: TruncationMode::KeepStart,
        max_length: Some(128),
        ..Policy::default()
    };
    let (ours, summary) = outcomes(&pipeline_of(Some(&tokenizer), &policy), &path);
    assert_eq!(summary.failed, 0);
    for (golden, outcome) in end.iter().zip(&ours) {
        let trl_keeps = start.iter().any(|g| g.src == golden.src);
        assert_eq!(matches!(outcome, Outcome::Kept(_)), trl_keeps, "{}", golden.src);
    }
    assert_eq!((summary.kept, summary.dropped_rows()), (30, 20));
}

/// Where a joint token crosses the boundary, `split` gives the prompt the ids that it has at inference.
#[test]
fn split_keeps_the_prompt_where_joint_does_not() {
    let Some(material) = material() else { return };
    let tokenizer: Arc<Tokenizer> = Tokenizer::from_dir(&material.join("tokenizers/qwen2_5")).unwrap().into();
    let s = Scratch::new();
    let mut crossing = 0;
    for golden in &goldens(&material, "/pc_text")["qwen2_5/pc_text"] {
        let (prompt, completion) = source_row(&material, &golden.src);
        let path = s.file("row.jsonl", json!({"prompt": prompt, "completion": completion}).to_string());
        let policy = Policy { max_length: None, ..Policy::default() };
        let (samples, summary) = pipeline_of(Some(&tokenizer), &policy).samples(&path).unwrap();
        let expected = tokenizer.encode_prompt(&prompt).unwrap();
        let masked = samples[0].labels.iter().take_while(|l| **l == IGNORE).count();
        assert_eq!(samples[0].input_ids[..masked], expected, "{}", golden.src);
        assert!(samples[0].labels[masked..].iter().all(|l| *l != IGNORE));
        assert!(!summary.findings.contains_key(&Code::M003));
        crossing += usize::from(!golden.ids.starts_with(&expected));
    }
    assert_eq!(crossing, 10, "rows whose joint ids do not start with the prompt's");
}

/// `pc_chat`: the prompt is all messages but the last, the completion is the last one. Our ids are TRL's; what we learn
/// begins where TRL begins, and what TRL learns beyond ours stands after the stop token (`\n` after `<|im_end|>`, which
/// the goldens' README lists among the habits that are no specification).
#[test]
fn chat_ids_are_trls_and_labels_end_at_the_stop_token() {
    let Some(material) = material() else { return };
    let read = |path: &str| std::fs::read_to_string(material.join(path)).unwrap();
    let spec: Value = serde_json::from_str(&read("goldens/trl_spec.json")).unwrap();
    let hh: Vec<Value> = read("datasets/hh_harmless_messages.jsonl")
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    let alpaca: Vec<Value> = serde_json::from_str(&read("datasets/alpaca_en_demo.json")).unwrap();
    let mut rows = 0;
    let mut beyond = BTreeMap::new();
    for (case, goldens) in goldens(&material, "/pc_chat") {
        let name = case.split('/').next().unwrap();
        let special = &spec[name];
        let s = Scratch::new();
        let text = |key: &str| special[key].as_str();
        std::fs::write(
            s.path("chat_template.jinja"),
            read(&format!("templates/{}", text("template").unwrap())),
        )
        .unwrap();
        let json = std::fs::read(material.join("tokenizers").join(name).join("tokenizer.json")).unwrap();
        let config =
            json!({"bos_token": special["bos"], "eos_token": special["eos"], "pad_token": special["pad"]});
        let tokenizer: Arc<Tokenizer> =
            Tokenizer::from_bytes(&json, Some(config.to_string().as_bytes())).unwrap().into();
        let template: Arc<ChatTemplate> =
            ChatTemplate::from_dir(s.dir.path(), text("bos"), text("eos")).unwrap().unwrap().into();
        // The stop token that the template writes, where it is not the EOS of the specification.
        let stop_tokens = match name {
            "gemma2" => vec!["<end_of_turn>".to_string()],
            "phi3" => vec!["<|end|>".to_string()],
            _ => Vec::new(),
        };
        let policy = Policy {
            boundary: Boundary::Joint,
            truncation_mode: TruncationMode::KeepStart,
            stop_tokens,
            ..Policy::default()
        };
        let lines: String = goldens
            .iter()
            .map(|golden| {
                let (file, row) = golden.src.split_once(':').unwrap();
                let row: usize = row.parse().unwrap();
                if file.starts_with("alpaca") {
                    return format!("{}\n", alpaca[row]);
                }
                let messages = hh[row]["messages"].as_array().unwrap();
                let (last, before) = messages.split_last().unwrap();
                format!("{}\n", json!({"prompt": before, "completion": [last]}))
            })
            .collect();
        let path = s.file("rows.jsonl", lines);
        let pipeline = with_template(&pipeline_of(Some(&tokenizer), &policy), &template);
        let (all, summary) = outcomes(&pipeline, &path);
        assert_eq!(summary.template.as_deref(), Some(template.fingerprint()));
        for (golden, outcome) in goldens.iter().zip(&all) {
            let at = format!("{case} {}", golden.src);
            rows += 1;
            let Outcome::Kept(kept) = outcome else { panic!("{at}: {outcome:?}") };
            let sample = &kept.sample;
            assert_eq!(sample.input_ids, golden.ids, "{at}");
            let ours: Vec<bool> = sample.labels.iter().map(|l| *l != IGNORE).collect();
            let end = ours.iter().rposition(|l| *l).unwrap() + 1;
            assert_eq!(ours[..end], golden.supervised[..end], "{at}");
            assert!(matches!(sample.origins[end - 1], Origin::EndOfTurn { .. }), "{at}");
            let more: Vec<String> = (end..ours.len())
                .filter(|&i| golden.supervised[i])
                .map(|i| tokenizer.token_text(sample.input_ids[i]))
                .collect();
            *beyond.entry((name.to_string(), more.concat())).or_insert(0) += 1;
        }
    }
    println!("{rows} rows; TRL learns after the stop token: {beyond:?}");
    assert_eq!(rows, 200);
}

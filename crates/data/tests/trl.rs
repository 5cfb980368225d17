//! Comparison with TRL's prepared rows (`trl.jsonl` of each folder of goldens, string prompts and completions): in
//! joint mode our ids equal TRL's, and our labels equal TRL's and follow the rule: a token is supervised exactly
//! if it overlaps a response byte. (TRL masks a common prefix of ids; on these rows the two agree, as the test
//! shows.)

mod common;

use common::{Goldens, Scratch, TrlGolden, goldens, outcomes, pipeline_of, trl_goldens, with_template};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use suasion_data::template::ChatTemplate;
use suasion_data::tokens::Tokenizer;
use suasion_data::{Boundary, Code, IGNORE, Origin, Outcome, Policy, TruncationMode};

fn cases(folder: &Goldens, kind: &str) -> BTreeMap<String, Vec<TrlGolden>> {
    trl_goldens(folder, |case| case.contains(kind) && !case.contains("pack"))
}

/// The prompt and completion that a `src` names (goldens/README.md).
fn source_row(folder: &Goldens, src: &str) -> (String, String) {
    let (place, rejected) = match src.split_once('#') {
        Some((place, how)) => {
            assert_eq!(how, "rejected,prompt_ends_with_space");
            (place, true)
        }
        None => (src, false),
    };
    let (file, row) = place.split_once(':').unwrap();
    let row = &folder.lines(&format!("datasets/{file}"))[row.parse::<usize>().unwrap()];
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
    goldens().iter().for_each(ids_and_labels_equal);
}

fn ids_and_labels_equal(folder: &Goldens) {
    let spec = folder.json("goldens/trl_spec.json");
    let mut rows = 0;
    let mut straddling = 0;
    for (case, goldens) in cases(folder, "/pc_text") {
        let (name, kind) = case.split_once('/').unwrap();
        let json = folder.text(&format!("tokenizers/{name}/tokenizer.json"));
        let special = &spec[name];
        let config =
            json!({"bos_token": special["bos"], "eos_token": special["eos"], "pad_token": special["pad"]});
        let tokenizer =
            Arc::new(Tokenizer::from_bytes(json.as_bytes(), Some(config.to_string().as_bytes())).unwrap());
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
        let texts: Vec<(String, String)> = goldens.iter().map(|g| source_row(folder, &g.src)).collect();
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
            // The rule, applied to the bytes alone.
            let bytes = kept.bytes.as_ref().unwrap();
            for (i, learned) in ours.iter().enumerate() {
                assert_eq!(*learned, bytes[i].end as usize > prompt.len(), "{at}: token {i} {:?}", bytes[i]);
                assert!(!learned || sample.labels[i] as u32 == sample.input_ids[i]);
            }
            assert_eq!(ours, golden.supervised, "{at}");
            // A token across the boundary (a prompt that ends in a space) is reported, and nothing else is.
            let crosses =
                bytes.iter().any(|b| (b.start as usize) < prompt.len() && b.end as usize > prompt.len());
            assert_eq!(outcome.findings().iter().any(|f| f.code == Code::M003), crosses, "{at}");
            let space = golden.src.ends_with("prompt_ends_with_space");
            assert_eq!(crosses, golden.crosses.unwrap_or(space), "{at}");
            straddling += usize::from(crosses);
        }
    }
    println!("{rows} rows, {straddling} with a token across the boundary");
    assert_eq!(straddling, folder.expect(74, 80));
    assert_eq!(rows, folder.expect(6 * 22 + 12 + 22, 6 * 46 + 30 + 50));
}

/// The rows of `keep_start` at 128 that TRL drops because nothing supervised remains are those that we drop.
#[test]
fn rows_without_a_target_are_dropped_as_trl_drops_them() {
    goldens().iter().for_each(the_same_rows_are_dropped);
}

fn the_same_rows_are_dropped(folder: &Goldens) {
    let all = cases(folder, "/pc_text");
    let (start, end) =
        (&all["qwen2_5/pc_text_trunc128_keep_start"], &all["qwen2_5/pc_text_trunc128_keep_end"]);
    let tokenizer = Arc::new(Tokenizer::from_dir(&folder.dir.join("tokenizers/qwen2_5")).unwrap());
    let s = Scratch::new();
    let lines: String = end
        .iter()
        .map(|g| source_row(folder, &g.src))
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
    assert_eq!((summary.kept, summary.dropped_rows()), folder.expect((12, 10), (30, 20)));
}

/// If a joint token crosses the boundary, `split` gives the prompt the ids that it has at inference.
#[test]
fn split_keeps_the_prompt_where_joint_does_not() {
    goldens().iter().for_each(split_keeps_the_prompt);
}

fn split_keeps_the_prompt(folder: &Goldens) {
    let tokenizer = Arc::new(Tokenizer::from_dir(&folder.dir.join("tokenizers/qwen2_5")).unwrap());
    let s = Scratch::new();
    let mut crossing = 0;
    for golden in &cases(folder, "/pc_text")["qwen2_5/pc_text"] {
        let (prompt, completion) = source_row(folder, &golden.src);
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

/// `pc_chat`: the prompt is all messages except the last, which is the completion. Our ids equal TRL's; our
/// supervised tokens begin where TRL's begin, and TRL's additional ones come after the stop token (`\n` after
/// `<|im_end|>`, which the goldens' README lists among the habits outside the specification).
#[test]
fn chat_ids_are_trls_and_labels_end_at_the_stop_token() {
    goldens().iter().for_each(chat_ids_equal);
}

fn chat_ids_equal(folder: &Goldens) {
    let spec = folder.json("goldens/trl_spec.json");
    let messages =
        folder.lines(folder.expect("datasets/messages.jsonl", "datasets/hh_harmless_messages.jsonl"));
    let alpaca = if folder.ours { Value::Null } else { folder.json("datasets/alpaca_en_demo.json") };
    let mut rows = 0;
    let mut beyond = BTreeMap::new();
    for (case, goldens) in cases(folder, "/pc_chat") {
        let name = case.split('/').next().unwrap();
        let special = &spec[name];
        let s = Scratch::new();
        let text = |key: &str| special[key].as_str();
        std::fs::write(
            s.path("chat_template.jinja"),
            folder.text(&format!("templates/{}", text("template").unwrap())),
        )
        .unwrap();
        let json = folder.text(&format!("tokenizers/{name}/tokenizer.json"));
        let config =
            json!({"bos_token": special["bos"], "eos_token": special["eos"], "pad_token": special["pad"]});
        let tokenizer =
            Arc::new(Tokenizer::from_bytes(json.as_bytes(), Some(config.to_string().as_bytes())).unwrap());
        let template = ChatTemplate::from_dir(s.dir.path(), text("bos"), text("eos")).unwrap().unwrap();
        let template = Arc::new(template);
        // The stop token that the template writes, if it is not the EOS of the specification.
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
                let messages = messages[row]["messages"].as_array().unwrap();
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
    assert_eq!(rows, folder.expect(70, 200));
}

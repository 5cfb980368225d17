//! Comparison with TRL's rows for conversations (`goldens/trl.jsonl`, `assistant_only_loss`). TRL swaps in a
//! template with `{% generation %}` blocks and supervises their content.
//!
//! With that template our ids and labels equal TRL's, token for token. With the model's own template, which has no
//! blocks, they equal TRL's except for the habits outside the specification that the goldens' README lists: tokens
//! after the stop token, and the line end of Qwen's role header. Each of these is asserted exactly.

mod common;

use common::{Goldens, Scratch, TrlGolden, goldens, outcomes, pipeline_of, trl_goldens, with_template};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use suasion_data::template::ChatTemplate;
use suasion_data::tokens::Tokenizer;
use suasion_data::{Boundary, Code, IGNORE, Origin, Outcome, Policy};

fn cases(folder: &Goldens) -> BTreeMap<String, Vec<TrlGolden>> {
    trl_goldens(folder, |case| case.ends_with("_assistant_only"))
}

/// The row that a `src` names, cut as it says.
fn source_row(folder: &Goldens, src: &str) -> Value {
    let (place, how) = src.split_once(" (").unwrap_or((src, ""));
    let (file, row) = place.split_once(':').unwrap();
    let mut row = folder.lines(&format!("datasets/{file}"))[row.parse::<usize>().unwrap()].clone();
    let messages = row["messages"].as_array().unwrap();
    let messages = match how {
        "" => messages.clone(),
        "from first user to last assistant)" => {
            let first = messages.iter().position(|m| m["role"] == "user").unwrap();
            let last = messages.iter().rposition(|m| m["role"] == "assistant").unwrap();
            messages[first..=last].to_vec()
        }
        other => panic!("{other}"),
    };
    row["messages"] = messages.into();
    let keys = ["messages", "tools"];
    Value::Object(
        row.as_object().unwrap().clone().into_iter().filter(|(k, _)| keys.contains(&k.as_str())).collect(),
    )
}

/// A golden, the outcome of its row, and the texts of its tokens.
type Compared<'a> = (&'a TrlGolden, Outcome, Vec<String>);

/// Each golden of a case against our row, under the model's own template or TRL's.
fn compare<'a>(folder: &Goldens, case: &str, goldens: &'a [TrlGolden], trls: bool) -> Vec<Compared<'a>> {
    let spec = folder.json("goldens/trl_spec.json");
    let name = case.split('/').next().unwrap();
    let special = &spec[name];
    let special_text = |key: &str| special[key].as_str();
    let json = folder.text(&format!("tokenizers/{name}/tokenizer.json"));
    let config =
        json!({"bos_token": special["bos"], "eos_token": special["eos"], "pad_token": special["pad"]});
    let tokenizer =
        Arc::new(Tokenizer::from_bytes(json.as_bytes(), Some(config.to_string().as_bytes())).unwrap());
    let path = special_text("template").unwrap();
    let path = if trls { path.replace(".jinja", "_training.jinja") } else { path.to_string() };
    let source = folder.text(&format!("templates/{path}"));
    let template = Arc::new(ChatTemplate::new(&source, special_text("bos"), special_text("eos")).unwrap());
    // The stop token that the template writes, if it is not the EOS of the specification.
    let stop_tokens = match name {
        "gemma2" => vec!["<end_of_turn>".to_string()],
        "phi3" => vec!["<|end|>".to_string()],
        _ => Vec::new(),
    };
    let policy = Policy { boundary: Boundary::Joint, max_length: None, stop_tokens, ..Policy::default() };
    let scratch = Scratch::new();
    let lines: String = goldens.iter().map(|g| format!("{}\n", source_row(folder, &g.src))).collect();
    let path = scratch.file("rows.jsonl", lines);
    let pipeline = with_template(&pipeline_of(Some(&tokenizer), &policy), &template);
    let (all, _) = outcomes(&pipeline, &path);
    assert_eq!(all.len(), goldens.len());
    let texts = |g: &TrlGolden| g.ids.iter().map(|&id| tokenizer.token_text(id)).collect();
    goldens.iter().zip(all).map(|(g, outcome)| (g, outcome, texts(g))).collect()
}

fn labels(outcome: &Outcome, golden: &TrlGolden, at: &str) -> (Vec<bool>, Vec<Origin>) {
    let Outcome::Kept(kept) = outcome else { panic!("{at}: {outcome:?}") };
    assert_eq!(kept.sample.input_ids, golden.ids, "{at}");
    (kept.sample.labels.iter().map(|l| *l != IGNORE).collect(), kept.sample.origins.clone())
}

#[test]
fn with_trls_templates_labels_are_trls() {
    goldens().iter().for_each(labels_equal_with_trls_templates);
}

fn labels_equal_with_trls_templates(folder: &Goldens) {
    let mut rows = 0;
    for (case, goldens) in cases(folder) {
        for (golden, outcome, _) in compare(folder, &case, &goldens, true) {
            let at = format!("{case} {}", golden.src);
            rows += 1;
            assert_eq!(labels(&outcome, golden, &at).0, golden.supervised, "{at}");
            // Content of their blocks after the answer is supervised, as their author requests, and reported.
            let told = outcome.findings().iter().any(|f| f.code == Code::M007);
            assert_eq!(told, !case.starts_with("llama3_2"), "{at}");
            assert!(!outcome.findings().iter().any(|f| f.code == Code::M002), "{at}");
        }
    }
    assert_eq!(rows, folder.expect(3 * 20 + 10 + 12, 4 * 45 + 40));
}

#[test]
fn with_the_models_own_templates_labels_are_trls_but_for_its_habits() {
    goldens().iter().for_each(labels_equal_but_for_habits);
}

fn labels_equal_but_for_habits(folder: &Goldens) {
    let mut rows = 0;
    let mut habits: BTreeMap<(String, &str, String), usize> = BTreeMap::new();
    for (case, goldens) in cases(folder) {
        let name = case.split('/').next().unwrap();
        for (golden, outcome, texts) in compare(folder, &case, &goldens, false) {
            let at = format!("{case} {}", golden.src);
            rows += 1;
            let (ours, origins) = labels(&outcome, golden, &at);
            let mut trls = ours.clone();
            let stop = |i: usize| matches!(origins[i], Origin::EndOfTurn { .. });
            let answer = |i: usize| matches!(origins[i], Origin::Response { .. });
            let mut habit = |i: usize, what: &'static str| {
                assert_eq!(origins[i], Origin::Scaffold, "{at}: token {i}");
                trls[i] = true;
                *habits.entry((name.to_string(), what, texts[i].clone())).or_default() += 1;
            };
            for i in 0..origins.len() {
                // The line end after the stop token, if the tokenizer has one.
                if i > 0 && stop(i - 1) && !stop(i) && matches!(name, "qwen2_5" | "gemma2") {
                    habit(i, "after the stop token");
                }
                // The EOS that Phi's template writes once, after the last turn.
                if name == "phi3" && i + 1 == origins.len() {
                    habit(i, "after the stop token");
                }
                // Qwen's block starts before the end of the header.
                if name == "qwen2_5" && i > 0 && answer(i) && !answer(i - 1) {
                    habit(i - 1, "header");
                }
            }
            assert_eq!(trls, golden.supervised, "{at}");
        }
    }
    println!("{rows} rows; TRL learns beside the answers: {habits:#?}");
    assert_eq!(rows, folder.expect(3 * 20 + 10 + 12, 4 * 45 + 40));
    let learned: Vec<(&str, &str, &str)> =
        habits.keys().map(|(name, what, text)| (name.as_str(), *what, text.as_str())).collect();
    let after = "after the stop token";
    assert_eq!(
        learned,
        [
            ("gemma2", after, "\n"),
            ("phi3", after, "<|endoftext|>"),
            ("qwen2_5", after, "\n"),
            ("qwen2_5", "header", "\n")
        ]
    );
}

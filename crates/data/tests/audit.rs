//! Data sets that other programs tokenised: faults are found, and correct rows have no findings. Ids are bytes,
//! 256 is the EOS, 257 the BOS and 258 the pad id (`common`).

mod common;

use common::{BOS, EOS, PAD, Scratch, byte_tokenizer, codes, kept, outcomes, pipeline_of, prepare};
use serde_json::json;
use std::sync::Arc;
use suasion_data::audit::Filter;
use suasion_data::prepared::Manifest;
use suasion_data::tokens::Tokenizer;
use suasion_data::{Code, Mode, ModelFolder, Objective, OnBadRow, Origin, Outcome, Pipeline, Policy};

const X: i64 = -100;
const E: i64 = EOS as i64;
const B: i64 = BOS as i64;
const P: i64 = PAD as i64;

fn verify(row: serde_json::Value, policy: &Policy, tokenizer: Option<&Arc<Tokenizer>>) -> Outcome {
    let s = Scratch::new();
    let path = s.file("rows.jsonl", row.to_string());
    let mut pipeline = pipeline_of(tokenizer, policy);
    pipeline.mode = Mode::Verify;
    outcomes(&pipeline, &path).0.remove(0)
}

fn found(row: serde_json::Value) -> Vec<String> {
    codes(&verify(row, &Policy::default(), Some(&byte_tokenizer(true))))
}

const NONE: [&str; 0] = [];

#[test]
fn good_rows_have_no_findings() {
    assert_eq!(found(json!({"input_ids": [B, 1, 2, 3, E], "labels": [X, X, X, 3, E]})), NONE);
    assert_eq!(found(json!({"input_ids": [B, 1, 2, 3, E], "completion_mask": [0, 0, 0, 1, 1]})), NONE);
    // Padded on either side, with a mask, whether or not the ids are the pad id.
    assert_eq!(
        found(
            json!({"input_ids": [1, 2, E, E, E], "labels": [X, 2, E, X, X], "attention_mask": [1, 1, 1, 0, 0]})
        ),
        NONE
    );
    assert_eq!(
        found(
            json!({"input_ids": [P, P, 1, 2, E], "labels": [X, X, X, 2, E], "attention_mask": [0, 0, 1, 1, 1]})
        ),
        NONE
    );
    // Padded without a mask.
    assert_eq!(found(json!({"input_ids": [1, 2, E, P, P], "labels": [X, 2, E, X, X]})), NONE);
    // Two turns.
    assert_eq!(found(json!({"input_ids": [1, 2, E, 3, 4, E], "labels": [X, 2, E, X, 4, E]})), NONE);
    // A prepared row that gives all of it as response.
    assert_eq!(found(json!({"input_ids": [1, 2, E], "labels": [1, 2, E], "origins": "RRE"})), NONE);
}

#[test]
fn each_fault_has_its_code() {
    let m001 = json!({"input_ids": [1, 2, E], "labels": [X, X, X]});
    assert_eq!(found(json!({"input_ids": [1, 2, E], "completion_mask": [1, 1, 1]})), ["M008:e"]);
    assert_eq!(found(m001), ["M001:e"]);
    let first_only = json!({"input_ids": [1, 2], "labels": [1, X]});
    assert_eq!(found(first_only)[0], "M001:e");
    let no_stop = json!({"input_ids": [1, 2, 3], "labels": [X, 2, 3]});
    assert_eq!(found(no_stop), ["M002:e"]);
    let stop_is_padding = json!({"input_ids": [1, 2, E], "labels": [X, 2, X], "attention_mask": [1, 1, 0]});
    assert_eq!(found(stop_is_padding), ["M002:e"]);
    let prompt_learned =
        json!({"input_ids": [1, 2, 3, E], "labels": [X, 2, 3, E], "completion_mask": [0, 0, 1, 1]});
    assert_eq!(found(prompt_learned), ["M004:e"]);
    let by_origins = json!({"input_ids": [1, 2, 3, E], "labels": [X, 2, 3, E], "origins": "KKRE"});
    assert_eq!(found(by_origins), ["M004:e"]);
    let padding = json!({"input_ids": [1, 2, E, P], "labels": [X, 2, E, P], "attention_mask": [1, 1, 1, 0]});
    assert_eq!(found(padding), ["M005:e"]);
    let padding_without_a_mask = json!({"input_ids": [1, 2, E, P, P], "labels": [X, 2, E, P, P]});
    assert_eq!(found(padding_without_a_mask), ["M005:e"]);
    let bos = json!({"input_ids": [B, B, 1, 2, E], "labels": [X, X, X, 2, E]});
    assert_eq!(found(bos), ["M006:e"]);
    let after_stop = json!({"input_ids": [1, 2, E, 10], "labels": [X, 2, E, 10]});
    assert_eq!(found(after_stop), ["M007:w"]);
    let header = json!({"input_ids": [1, 9, 2, E], "labels": [X, 9, 2, E], "origins": "KBRE"});
    assert_eq!(found(header), ["M007:w"]);
    let everything = json!({"input_ids": [B, 1, 2, E], "labels": [B, 1, 2, E]});
    assert_eq!(found(everything), ["M008:e"]);
    let masked_stop = json!({"input_ids": [1, 2, E], "labels": [X, 2, X]});
    assert_eq!(found(masked_stop), ["M009:e"]);
    let masked_stop_by_mask = json!({"input_ids": [1, 2, E, 3, 4, E], "assistant_masks": [0, 1, 0, 0, 1, 1]});
    assert_eq!(found(masked_stop_by_mask), ["M009:e"]);
    let shifted = json!({"input_ids": [1, 2, 3, E], "labels": [X, 3, E, X]});
    let outcome = verify(shifted, &Policy::default(), None);
    assert_eq!(codes(&outcome), ["L001:e"]);
    assert_eq!(
        outcome.findings()[0].message,
        "2 tokens (the first is token 1): the label is 3, the input id is 2; the labels look shifted by one, which the model does itself"
    );
    let other_ignore = json!({"input_ids": [1, 2, E], "labels": [-1, 2, E]});
    assert_eq!(codes(&verify(other_ignore, &Policy::default(), None)), ["L001:e"]);
    let copy: Vec<i64> = (30..50).collect();
    let ids: Vec<i64> = [vec![1], copy.clone(), vec![2], copy.clone(), vec![E]].concat();
    let labels: Vec<i64> = [vec![X; 22], copy, vec![E]].concat();
    assert_eq!(found(json!({"input_ids": ids, "labels": labels})), ["D001:n"]);
}

#[test]
fn pad_equal_to_eos_is_told_apart_by_place() {
    let config = br#"{"eos_token": "<|end|>", "pad_token": "<|end|>"}"#;
    let json = {
        // The same vocabulary with another configuration.
        let mut vocab = serde_json::Map::new();
        for c in 'a'..='z' {
            vocab.insert(c.to_string(), (c as u32 - 97).into());
        }
        vocab.insert("<|end|>".into(), 26.into());
        json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": null, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "a"}})
    };
    let tokenizer = Arc::new(Tokenizer::from_bytes(json.to_string().as_bytes(), Some(config)).unwrap());
    let codes_of = |row| codes(&verify(row, &Policy::default(), Some(&tokenizer)));
    let bug = json!({"input_ids": [1, 2, 26, 26, 26], "labels": [X, 2, X, X, X]});
    assert_eq!(codes_of(bug), ["M009:e"]);
    let right = json!({"input_ids": [1, 2, 26, 26, 26], "labels": [X, 2, 26, X, X]});
    assert_eq!(codes_of(right), NONE);
    let padding_learned = json!({"input_ids": [1, 2, 26, 26, 26], "labels": [X, 2, 26, 26, 26]});
    assert_eq!(codes_of(padding_learned), ["M005:e"]);
}

#[test]
fn what_was_asked_for_is_no_fault() {
    let all = Policy { objective: Objective::AllTokens, ..Policy::default() };
    let row =
        json!({"input_ids": [B, 1, 2, E, P], "labels": [X, X, 2, E, X], "attention_mask": [1, 1, 1, 1, 0]});
    let outcome = verify(row, &all, Some(&byte_tokenizer(true)));
    assert_eq!(codes(&outcome), NONE);
    assert_eq!(kept(&[outcome], 0).sample.labels, [B as i32, 1, 2, E as i32, -100], "all but padding");
    let weighted = Policy { prompt_loss_weight: 0.5, ..Policy::default() };
    let row = json!({"input_ids": [1, 2, E], "completion_mask": [0, 1, 1]});
    let outcome = verify(row, &weighted, Some(&byte_tokenizer(true)));
    assert_eq!(codes(&outcome), NONE);
    assert_eq!(kept(&[outcome], 0).sample.weights, Some(vec![0.5, 1.0, 1.0]));
    let off = Policy { append_eos: false, ..Policy::default() };
    let row = json!({"input_ids": [1, 2], "labels": [X, 2]});
    assert_eq!(codes(&verify(row, &off, Some(&byte_tokenizer(true)))), ["M002:w"]);
}

#[test]
fn origins_of_foreign_rows_explain_each_token() {
    let row = json!({"input_ids": [P, B, 1, 2, E, 10, 3, 4, E, 10, P], "labels": [X, X, X, 2, E, X, X, 4, E, X, X],
        "attention_mask": [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0]});
    let outcome = verify(row, &Policy::default(), Some(&byte_tokenizer(true)));
    let letters: String = kept(&[outcome], 0).sample.origins.iter().map(|o| o.letter()).collect();
    assert_eq!(letters, "-BOREOOREB-");
}

#[test]
fn training_refuses_what_preparing_and_verifying_show() {
    let s = Scratch::new();
    let rows = [
        json!({"input_ids": [P, 1, 2, E], "labels": [X, X, 2, E], "attention_mask": [0, 1, 1, 1]}),
        json!({"input_ids": [1, 2, E], "labels": [1, 2, E]}),
        json!({"input_ids": [1, 2, 3], "labels": [X, 2, 3]}),
        json!({"input_ids": [1, 2, E], "labels": [X, 2, X]}),
    ];
    let lines: String = rows.iter().map(|r| format!("{r}\n")).collect();
    let path = s.file("rows.jsonl", lines);
    let tokenizer = byte_tokenizer(true);
    let skip = Policy { on_bad_row: OnBadRow::Skip, ..Policy::default() };
    let prepared = pipeline_of(Some(&tokenizer), &skip);
    let (all, summary) = outcomes(&prepared, &path);
    assert_eq!(
        (summary.kept, summary.failed),
        (4, 0),
        "foreign labels are written as they are, and reported"
    );
    assert_eq!(
        (codes(&all[1]), codes(&all[3])),
        (vec!["M008:e".into(), "D001:n".into()], vec!["M009:e".into(), "D001:n".into()])
    );
    let pipeline = Pipeline { mode: Mode::Train, ..prepared };
    let (all, summary) = outcomes(&pipeline, &path);
    assert_eq!((summary.kept, summary.failed), (2, 2));
    assert_eq!(kept(&all, 0).sample.input_ids, [1, 2, EOS], "padding is removed, by the mask");
    assert!(!kept(&all, 0).sample.origins.contains(&Origin::Padding));
    assert_eq!(codes(&all[2]), ["M002:e"], "a cut foreign row may train");
    let Outcome::Failed { error, .. } = &all[1] else { panic!() };
    assert!(error.to_string().contains("rows.jsonl:2: M008: all 3 tokens are supervised"), "{error}");
    assert_eq!(codes(&all[3]), ["M009:e"]);
    let ignoring = Pipeline { filter: Filter::new(&[], &["m008", "M009"]).unwrap(), ..pipeline.clone() };
    assert_eq!(outcomes(&ignoring, &path).1.kept, 4, "ignored by name");
    let strict = Policy::default();
    let error = Pipeline { policy: strict.into(), ..pipeline }.samples(&path).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("rows.jsonl:2: M008")
            && text.contains("\n  also ")
            && text.contains("rows.jsonl:4: M009"),
        "{text}"
    );
    assert_eq!(error.tag(), "E-ROW");
    assert!(error.help().unwrap().contains("completion_only_loss=false"));
}

#[test]
fn filters() {
    let f = Filter::new(&["M", "T001"], &["M003,m008"]).unwrap();
    let accepted: Vec<&str> = Code::ALL.iter().filter(|c| f.accepts(**c)).map(|c| c.as_str()).collect();
    assert_eq!(accepted, ["M001", "M002", "M004", "M005", "M006", "M007", "M009", "M010", "T001"]);
    assert!(Code::ALL.iter().all(|c| Filter::default().accepts(*c)));
    assert!(Filter::new(&["Q1"], &[]).unwrap_err().contains("\"Q1\""));
}

/// Prepared rows with supervised prompts are correct, whatever the policy of the run that reads them.
#[test]
fn prepared_rows_are_held_against_their_own_policy() {
    let s = Scratch::new();
    let path = s.file("rows.jsonl", "{\"prompt\": \"ab\", \"completion\": \"c\"}\n");
    let tokenizer = byte_tokenizer(true);
    let weighted = Policy { prompt_loss_weight: 1.0, ..Policy::default() };
    let out = s.path("prepared.jsonl");
    prepare(&pipeline_of(Some(&tokenizer), &weighted), &path, &out, false);

    let policy = Policy::default();
    let looking = Pipeline { mode: Mode::Verify, ..pipeline_of(Some(&tokenizer), &policy) };
    assert_eq!(codes(&outcomes(&looking, &out).0[0]), ["M004:e"]);
    let under = Manifest::beside(&out).unwrap().unwrap().labelled_under(&policy);
    let knowing = Pipeline { labelled_under: Some(under.into()), ..looking };
    assert_eq!(codes(&outcomes(&knowing, &out).0[0]), NONE);
}

#[test]
fn rows_beyond_the_models_positions_are_a_finding_where_nothing_cuts_them() {
    let row = |n: i64| {
        let ids: Vec<i64> = (1..=n).chain([E]).collect();
        let labels: Vec<i64> = ids.iter().map(|&id| if id < n { X } else { id }).collect();
        json!({"input_ids": ids, "labels": labels})
    };
    let tokenizer = byte_tokenizer(true);
    let found = |row: serde_json::Value, max_length: Option<usize>, positions: Option<usize>| {
        let s = Scratch::new();
        let path = s.file("rows.jsonl", row.to_string());
        let policy = Policy { max_length, ..Policy::default() };
        let mut folder = ModelFolder::from(Arc::clone(&tokenizer));
        folder.positions = positions;
        let pipeline = Pipeline::new(folder, policy);
        codes(&outcomes(&pipeline, &path).0.remove(0))
    };
    // 40 tokens: as many as positions, one more, and an unknown number of positions.
    assert_eq!(found(row(39), None, Some(40)), NONE);
    assert_eq!(found(row(39), None, Some(39)), ["T003:w"]);
    assert_eq!(found(row(39), None, None), NONE);
    assert_eq!(found(row(39), Some(1024), Some(39)), ["T003:w"]);
    // max_length cuts rows to fit, or cuts them but not enough to fit.
    assert_eq!(found(row(39), Some(39), Some(39)), ["T002:w"]);
    assert_eq!(found(row(39), Some(38), Some(37)), ["T003:w", "T002:w"]);
    // In a pack each row counts separately.
    let ids: Vec<i64> = (1..=19).chain([E]).chain(1..=19).chain([E]).collect();
    let labels: Vec<i64> = ids.iter().map(|&id| if id < 19 { X } else { id }).collect();
    let pack = json!({"input_ids": ids, "labels": labels, "seq_lengths": [20, 20]});
    assert_eq!(found(pack.clone(), None, Some(20)), NONE);
    assert_eq!(found(pack, None, Some(19)), ["T003:w", "T003:w"]);
}

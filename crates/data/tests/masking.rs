//! From text to labels: sections, the response's span, the end of turn, truncation, weights. The ids of the
//! tokenizer are the text's bytes, so the expected labels follow from the text alone.

mod common;

use common::{BOS, EOS, Scratch, byte_tokenizer, bytes, codes, kept, outcomes, pipeline_of};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use suasion_data::label::truncate::{Fit, fit};
use suasion_data::render::{self, Rendered, Stops};
use suasion_data::tokens::Tokenizer;
use suasion_data::{
    Boundary, IGNORE, Mode, Objective, Origin, Outcome, Policy, RowId, Section, TruncationMode,
};

fn id() -> RowId {
    RowId::new(Path::new("data.jsonl"), 0, Some(1))
}

fn rendered(prompt: &str, completion: &str, policy: &Policy, stops: &Stops) -> Rendered {
    render::render(id(), format!("{prompt}{completion}"), prompt.len(), policy, stops)
}

/// The spans as `letter:text`, after the check that they tile the text.
fn spans(r: &Rendered) -> Vec<String> {
    let mut at = 0;
    for span in &r.spans {
        assert_eq!(span.range.start, at, "no gap, no overlap: {r:?}");
        at = span.range.end;
    }
    assert_eq!(at, r.text.len(), "to the end: {r:?}");
    r.spans.iter().map(|s| format!("{}:{}", s.origin.letter(), &r.text[s.range.clone()])).collect()
}

fn sections(prompt: &str) -> Vec<String> {
    let policy = Policy::default();
    let mut all = spans(&rendered(prompt, "", &policy, &Stops::default()));
    assert_eq!(all.pop().as_deref(), Some("R:"));
    all
}

#[test]
fn markers_open_sections() {
    assert_eq!(
        sections("intro [SYSTEM] be kind\n[CONTEXT] they said\n[TASK] answer\n[RESPONSE]\n"),
        [
            "O:intro ",
            "B:[SYSTEM]",
            "S: be kind\n",
            "B:[CONTEXT]",
            "C: they said\n",
            "B:[TASK]",
            "K: answer\n",
            "B:[RESPONSE]",
            "B:\n"
        ]
    );
    assert_eq!(sections("no markers at all"), ["O:no markers at all"]);
    assert_eq!(sections(""), [""; 0]);
    assert_eq!(sections("[TASK]"), ["B:[TASK]"]);
    assert_eq!(sections("[SYSTEM][TASK]x"), ["B:[SYSTEM]", "S:[TASK]x"], "not after white space");
    // Non-breaking and ideographic spaces are white space; a zero-width one is not.
    assert_eq!(sections("a\u{3000}[TASK]b"), ["O:a\u{3000}", "B:[TASK]", "K:b"]);
    assert_eq!(sections("a\u{200b}[TASK]b"), ["O:a\u{200b}[TASK]b"]);
    assert_eq!(sections("x[TASK] y [TASK] z"), ["O:x[TASK] y ", "B:[TASK]", "K: z"], "the first that counts");
}

#[test]
fn each_marker_counts_once_and_in_order() {
    assert_eq!(
        sections("[SYSTEM] a\n[SYSTEM] b\n[TASK] c [CONTEXT] d\n[RESPONSE]\n[TASK] e"),
        [
            "B:[SYSTEM]",
            "S: a\n[SYSTEM] b\n",
            "B:[TASK]",
            "K: c [CONTEXT] d\n",
            "B:[RESPONSE]",
            "B:\n[TASK] e"
        ]
    );
}

#[test]
fn markers_are_configurable() {
    let section_markers = [("TASK", "### Task:"), ("SYSTEM", "###"), ("CONTEXT", "")]
        .map(|(k, v)| (k.to_string(), v.to_string()))
        .into_iter()
        .collect();
    let policy = Policy { section_markers, ..Policy::default() };
    let r = rendered("### s\n[CONTEXT] c\n### Task: t\n[RESPONSE] ", "r", &policy, &Stops::default());
    assert_eq!(
        spans(&r),
        ["B:###", "S: s\n[CONTEXT] c\n", "B:### Task:", "K: t\n", "B:[RESPONSE]", "B: ", "R:r"]
    );
    let r = rendered("### Task: t", "r", &policy, &Stops::default());
    assert_eq!(spans(&r), ["B:### Task:", "K: t", "R:r"], "the longer of two markers at one place");
}

/// Every prompt over a small alphabet of markers and text: an independent implementation of the rule agrees.
#[test]
fn marker_rules_hold_for_every_small_prompt() {
    let pieces = ["[SYSTEM]", "[CONTEXT]", "[TASK]", "[RESPONSE]", " ", "x"];
    let order = &pieces[..4];
    for code in 0..6usize.pow(5) {
        let parts: Vec<&str> = (0..5).map(|i| pieces[code / 6usize.pow(i) % 6]).collect();
        // Piece by piece: a marker counts at the start or after a space, if its rank is higher than any before.
        let mut letters = String::new();
        let (mut rank, mut open) = (0, 'O');
        for (i, part) in parts.iter().enumerate() {
            let place = order.iter().position(|m| m == part);
            let free = i == 0 || parts[i - 1] == " ";
            let letter = match place {
                Some(r) if free && r >= rank => {
                    rank = r + 1;
                    open = ['S', 'C', 'K', 'B'][r];
                    'B'
                }
                _ => open,
            };
            letters.extend(std::iter::repeat_n(letter, part.len()));
        }
        let text = parts.concat();
        let r = rendered(&text, "", &Policy::default(), &Stops::default());
        spans(&r);
        let mut found = String::new();
        for span in &r.spans {
            found.extend(std::iter::repeat_n(span.origin.letter(), span.range.len()));
        }
        assert_eq!(found, letters, "{text}");
    }
}

#[test]
fn the_end_of_turn() {
    let policy = Policy::default();
    let keep = Policy { append_eos: false, ..Policy::default() };
    let eos = Stops::eos("</s>");
    let ends = |completion: &str, policy: &Policy, stops: &Stops| {
        spans(&rendered("p", completion, policy, stops))[1..].to_vec()
    };
    assert_eq!(ends("hi", &policy, &eos), ["R:hi", "E:</s>"], "appended");
    assert_eq!(ends("hi</s>", &policy, &eos), ["R:hi", "E:</s>"], "not twice");
    assert_eq!(
        ends("hi</s>\n ", &policy, &eos),
        ["R:hi", "E:</s>", "B:\n "],
        "text after the stop token is scaffold"
    );
    assert_eq!(ends("hi\n", &policy, &eos), ["R:hi\n", "E:</s>"], "white space before it is response");
    assert_eq!(ends("hi", &keep, &eos), ["R:hi"]);
    assert_eq!(ends("hi</s>", &keep, &eos), ["R:hi", "E:</s>"], "what is there counts");
    assert_eq!(ends("hi", &policy, &Stops::default()), ["R:hi"], "no EOS to append");
    let two = Stops {
        eos: Some("</s>".into()),
        all: vec!["</s>".into(), "<|eot|>".into(), "|>".into(), "\n##\n".into()],
    };
    assert_eq!(
        ends("hi<|eot|>", &policy, &two),
        ["R:hi", "E:<|eot|>"],
        "another stop token, the longest that fits"
    );
    assert_eq!(ends("hi\n##\n", &policy, &two), ["R:hi", "E:\n##\n"], "a stop text may end in white space");
}

#[test]
fn weights_of_sections() {
    let mut policy = Policy { prompt_loss_weight: 0.25, ..Policy::default() };
    policy.loss_weights.insert("task".into(), 0.5);
    policy.loss_weights.insert("system".into(), 0.0);
    let r = rendered("[SYSTEM] a [CONTEXT] b [TASK] c [RESPONSE] ", "d", &policy, &Stops::eos("!"));
    let weights: Vec<(char, f32)> = r.spans.iter().map(|s| (s.origin.letter(), s.weight)).collect();
    let expected = [
        ('B', 0.0),
        ('S', 0.0),
        ('B', 0.0),
        ('C', 0.25),
        ('B', 0.0),
        ('K', 0.5),
        ('B', 0.0),
        ('B', 0.0),
        ('R', 1.0),
        ('E', 1.0),
    ];
    assert_eq!(weights, expected);
}

fn run(rows: &[(&str, &str)], policy: &Policy, bos: bool) -> Vec<Outcome> {
    let s = Scratch::new();
    let lines: String = rows
        .iter()
        .map(|(p, c)| format!("{}\n", serde_json::json!({"prompt": p, "completion": c})))
        .collect();
    let path = s.file("data.jsonl", lines);
    let tokenizer = byte_tokenizer(bos);
    let mut pipeline = pipeline_of(Some(&tokenizer), policy);
    pipeline.mode = Mode::Verify;
    pipeline.keep_text = true;
    outcomes(&pipeline, &path).0
}

fn letters(origins: &[Origin]) -> String {
    origins.iter().map(|o| o.letter()).collect()
}

#[test]
fn labels_are_the_response_and_its_stop_token() {
    for boundary in [Boundary::Split, Boundary::Joint] {
        let policy = Policy { boundary, ..Policy::default() };
        let all = run(&[("[TASK] é? ", "ja 👍")], &policy, true);
        let sample = &kept(&all, 0).sample;
        let (prompt, response) = (bytes("[TASK] é? "), bytes("ja 👍"));
        assert_eq!(sample.input_ids, [&[BOS], &prompt[..], &response[..], &[EOS]].concat());
        let masked = vec![IGNORE; 1 + prompt.len()];
        let learned: Vec<i32> = response.iter().chain([&EOS]).map(|&id| id as i32).collect();
        assert_eq!(sample.labels, [masked, learned].concat());
        assert_eq!(
            letters(&sample.origins),
            format!("B{}{}{}E", "B".repeat(6), "K".repeat(5), "R".repeat(7))
        );
        assert_eq!(sample.weights, None);
        assert_eq!(codes(&all[0]), [""; 0]);
        let bytes = kept(&all, 0).bytes.as_ref().unwrap();
        assert_eq!(bytes.len(), sample.len());
    }
}

#[test]
fn weights_travel_with_labels() {
    let policy = Policy { prompt_loss_weight: 0.25, ..Policy::default() };
    let sample = kept(&run(&[("ab", "c")], &policy, true), 0).sample.clone();
    assert_eq!(sample.weights, Some(vec![0.0, 0.25, 0.25, 1.0, 1.0]));
    assert_eq!(sample.labels, [IGNORE, 97, 98, 99, EOS as i32]);
    let ones = Policy { prompt_loss_weight: 1.0, ..Policy::default() };
    let sample = kept(&run(&[("ab", "c")], &ones, true), 0).sample.clone();
    assert_eq!(
        (sample.weights, sample.labels),
        (None, vec![IGNORE, 97, 98, 99, EOS as i32]),
        "no column for 0 and 1"
    );
}

#[test]
fn all_tokens_is_an_objective_not_a_fault() {
    let policy = Policy { objective: Objective::AllTokens, ..Policy::default() };
    let all = run(&[("ab", "c")], &policy, true);
    let sample = &kept(&all, 0).sample;
    assert_eq!(sample.labels, [BOS as i32, 97, 98, 99, EOS as i32]);
    assert_eq!(letters(&sample.origins), "BOORE", "origins stay true");
    assert_eq!(sample.targets().count(), 4);
    assert_eq!(codes(&all[0]), [""; 0]);
}

#[test]
fn empty_responses_fail_as_m001() {
    let all = run(&[("ab", ""), ("ab", " \n"), ("ab", "<|end|>"), ("ab", "c")], &Policy::default(), false);
    for i in [0, 2] {
        let Outcome::Failed { error, .. } = &all[i] else { panic!("{:?}", all[i]) };
        assert!(
            error.to_string().ends_with(&format!("data.jsonl:{}: M001: the response is empty", i + 1)),
            "{error}"
        );
        assert_eq!(codes(&all[i]), ["M001:e"]);
    }
    for i in [1, 3] {
        assert_eq!(codes(&all[i]), [""; 0], "white space can be what was said");
    }
}

#[test]
fn findings_of_text_rows() {
    let off = Policy { append_eos: false, ..Policy::default() };
    assert_eq!(codes(&run(&[("ab", "c")], &off, false)[0]), ["M002:w"]);
    assert_eq!(codes(&run(&[("ab", "c<|end|>")], &off, false)[0]), [""; 0]);
    let policy = Policy::default();
    assert_eq!(codes(&run(&[("a<|end|>b", "c")], &policy, false)[0]), ["S001:w"]);
    assert_eq!(codes(&run(&[("<|bos|>b", "c")], &policy, true)[0]), ["M006:e", "S001:w"]);
    assert_eq!(codes(&run(&[("b", "[RESPONSE] c")], &policy, true)[0]), ["M007:w"]);
    let long = "that the earth is warming fast";
    let all = run(&[(&format!("They say {long}."), long), ("b", "c"), ("x", "c"), ("b", "c")], &policy, true);
    assert_eq!(codes(&all[0]), ["D001:n"]);
    assert!(all[1].findings().is_empty() && all[2].findings().is_empty());
    assert_eq!(codes(&all[3]), ["D001:n"]);
    assert_eq!(all[3].findings()[0].message, "the same tokens as row 1");
}

/// Origins from letters.
fn origins(letters: &str) -> Vec<Origin> {
    letters.chars().map(|c| Origin::from_letter(c).unwrap()).collect()
}

/// The remaining tokens of a row, as positions.
fn stays(row: &str, mode: TruncationMode, max: usize) -> Vec<usize> {
    let n = row.len();
    match fit(&origins(row), mode, Some(max)) {
        Fit::Whole => (0..n).collect(),
        Fit::Cut(plan) => plan.apply(&(0..n).collect::<Vec<_>>()),
        other => panic!("{other:?}"),
    }
}

/// Every row of up to seven tokens over six letters, every length: `keep_response` against an independent
/// implementation of MASKING.md that sorts tokens by priority and cuts the lowest first.
#[test]
fn keep_response_cuts_the_cheapest_first() {
    let alphabet = ['B', 'C', 'K', 'O', 'R', 'E'];
    for n in 1..=6u32 {
        for code in 0..6usize.pow(n) {
            let row: String = (0..n).map(|i| alphabet[code / 6usize.pow(i) % 6]).collect();
            let letters: Vec<char> = row.chars().collect();
            let last = letters.iter().rposition(|c| "RE".contains(*c));
            for max in 0..n as usize {
                let cost = |i: usize| match letters[i] {
                    'B' if last.is_some_and(|l| i > l) => (1, -(i as i64)),
                    'C' => (2, i as i64),
                    'O' => (3, i as i64),
                    'R' | 'E' => (4, -(i as i64)),
                    _ => (9, 0),
                };
                let mut order: Vec<usize> = (0..letters.len()).filter(|&i| cost(i).0 < 9).collect();
                order.sort_by_key(|&i| cost(i));
                order.truncate(letters.len() - max);
                let expected: Vec<usize> = (0..letters.len()).filter(|i| !order.contains(i)).collect();
                assert_eq!(stays(&row, TruncationMode::KeepResponse, max), expected, "{row} to {max}");
            }
            assert_eq!(fit(&origins(&row), TruncationMode::KeepResponse, Some(n as usize)), Fit::Whole);
        }
    }
}

#[test]
fn the_other_modes() {
    let row = "BCCKKRRE";
    assert_eq!(stays(row, TruncationMode::KeepStart, 6), [0, 1, 2, 3, 4, 5]);
    assert_eq!(stays(row, TruncationMode::KeepEnd, 3), [5, 6, 7]);
    assert_eq!(stays(row, TruncationMode::KeepEnd, 8).len(), 8);
    assert_eq!(fit(&origins(row), TruncationMode::Drop, Some(7)), Fit::Drop);
    assert_eq!(fit(&origins(row), TruncationMode::Drop, Some(8)), Fit::Whole);
    assert_eq!(fit(&origins(row), TruncationMode::Error, Some(7)), Fit::Error);
    assert_eq!(fit(&origins(row), TruncationMode::Error, None), Fit::Whole);
}

#[test]
fn truncation_is_told_and_counted() {
    // 1 BOS, [CONTEXT] 9 + 6, [TASK] 6 + 2, response 3, EOS: 28 tokens.
    let row = ("[CONTEXT] 1234 [TASK] q", "abc");
    let result = |mode, max| {
        let policy = Policy { truncation_mode: mode, max_length: Some(max), ..Policy::default() };
        run(&[row], &policy, true).remove(0)
    };
    let message = |o: &Outcome| o.findings().iter().map(|f| f.message.clone()).collect::<Vec<_>>();
    use TruncationMode::*;

    let whole = result(KeepResponse, 28);
    assert_eq!(letters(&kept(&[whole], 0).sample.origins), "BBBBBBBBBBCCCCCCBBBBBBKKRRRE");

    let cut = result(KeepResponse, 25);
    assert_eq!(codes(&cut), ["T002:w"]);
    assert_eq!(message(&cut), ["3 prompt tokens cut to fit max_length = 25 (context 3)"]);
    let all = [cut];
    let k = kept(&all, 0);
    assert_eq!(letters(&k.sample.origins), "BBBBBBBBBBCCCBBBBBBKKRRRE");
    assert_eq!(k.sample.input_ids[10..13], bytes("34 "), "the oldest went");
    assert_eq!((k.cuts.len(), k.cuts[0].at, k.cuts[0].tokens), (1, 10, 3));
    assert_eq!(k.cuts[0].bytes, 9..12);

    let cut = result(KeepResponse, 20);
    assert_eq!(codes(&cut), ["T001:w", "T002:w"]);
    assert_eq!(message(&cut)[0], "2 supervised tokens lost to max_length = 20, the stop token among them");
    let sample = &kept(&[cut], 0).sample.clone();
    assert_eq!(
        sample.labels.iter().filter(|l| **l != IGNORE).copied().collect::<Vec<_>>(),
        [97, 98],
        "no EOS is invented"
    );

    // 18 tokens of scaffold and task are never cut: nothing supervised remains.
    let gone = result(KeepResponse, 18);
    assert!(matches!(gone, Outcome::Dropped { reason: suasion_data::DropReason::NoTarget, .. }));
    assert_eq!(codes(&gone), ["M001:e", "T001:w", "T002:w"]);
    assert!(message(&gone)[0].ends_with("18 tokens of the prompt are never cut"), "{:?}", message(&gone));

    let start = result(KeepStart, 24);
    assert!(matches!(start, Outcome::Dropped { .. }));
    assert_eq!(codes(&start), ["M001:e", "T001:w"]);
    let start = result(KeepStart, 25);
    assert_eq!(message(&start), ["3 supervised tokens lost to max_length = 25, the stop token among them"]);
    assert_eq!(kept(&[start], 0).sample.targets().collect::<Vec<_>>(), [(23, 97, 1.0)]);

    let end = result(KeepEnd, 3);
    assert_eq!(
        message(&end),
        [
            "1 supervised token lost to max_length = 3",
            "24 prompt tokens cut to fit max_length = 3 (context 6, task 2, scaffold 16); the first supervised token has \
             nothing before it now and is no target"
        ]
    );
    assert!(matches!(result(Drop, 27), Outcome::Dropped { reason: suasion_data::DropReason::TooLong, .. }));
    let Outcome::Failed { error, .. } = result(Error, 27) else { panic!() };
    assert!(error.to_string().ends_with("data.jsonl:1: the row has 28 tokens, max_length is 27"));
}

/// For every row, mode and length: supervised labels equal their ids, everything else is masked and has a reason,
/// and the remaining tokens are in order.
#[test]
fn labels_stay_true_under_every_truncation() {
    let whole = kept(
        &run(
            &[("[SYSTEM] s\n[CONTEXT] c\n[TASK] t ", "r é")],
            &Policy { max_length: None, ..Policy::default() },
            true,
        ),
        0,
    )
    .sample
    .clone();
    for mode in [TruncationMode::KeepResponse, TruncationMode::KeepStart, TruncationMode::KeepEnd] {
        for max in 1..whole.len() {
            let policy = Policy { truncation_mode: mode, max_length: Some(max), ..Policy::default() };
            let outcome = run(&[("[SYSTEM] s\n[CONTEXT] c\n[TASK] t ", "r é")], &policy, true).remove(0);
            let Outcome::Kept(k) = &outcome else {
                assert!(codes(&outcome).contains(&"M001:e".to_string()));
                continue;
            };
            let sample = &k.sample;
            assert!(sample.len() == max && sample.targets().next().is_some());
            let mut rest = whole.input_ids.iter().zip(&whole.origins);
            for i in 0..sample.len() {
                assert!(
                    rest.any(|(id, o)| (*id, *o) == (sample.input_ids[i], sample.origins[i])),
                    "in order"
                );
                let label = if sample.origins[i].supervised() { sample.input_ids[i] as i32 } else { IGNORE };
                assert_eq!(sample.labels[i], label);
            }
            let cut: usize = k.cuts.iter().map(|c| c.tokens).sum();
            assert_eq!(cut + sample.len(), whole.len());
            if mode == TruncationMode::KeepResponse {
                let count = |s: &[Origin], f: &dyn Fn(&Origin) -> bool| s.iter().filter(|o| f(o)).count();
                let dear = |o: &Origin| {
                    matches!(
                        o,
                        Origin::Scaffold | Origin::Prompt { section: Section::System | Section::Task, .. }
                    )
                };
                assert_eq!(count(&sample.origins, &dear), count(&whole.origins, &dear), "never cut");
            }
        }
    }
}

#[test]
fn joint_tokens_that_straddle_are_reported() {
    // One merge, "ab", across the boundary of "a" and "b".
    let mut json: serde_json::Value = serde_json::from_str(
        r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null, "pre_tokenizer": null,
            "post_processor": null, "decoder": null,
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "vocab": {}, "merges": [["a", "b"]]}}"#,
    )
    .unwrap();
    json["model"]["vocab"] =
        serde_json::to_value(BTreeMap::from([("a", 0), ("b", 1), ("c", 2), ("ab", 3), ("!", 4)])).unwrap();
    let config = br#"{"eos_token": "!"}"#;
    let tokenizer = Arc::new(Tokenizer::from_bytes(json.to_string().as_bytes(), Some(config)).unwrap());
    let s = Scratch::new();
    let path = s.file("data.jsonl", "{\"prompt\": \"ca\", \"completion\": \"bc\"}\n");
    let policy = Policy { boundary: Boundary::Joint, ..Policy::default() };
    let (all, _) = outcomes(&pipeline_of(Some(&tokenizer), &policy), &path);
    let k = kept(&all, 0);
    assert_eq!((&k.sample.input_ids[..], &k.sample.labels[..]), (&[2, 3, 2, 4][..], &[IGNORE, 3, 2, 4][..]));
    assert_eq!(codes(&all[0]), ["M003:n"]);
    assert_eq!(
        k.findings[0].message,
        "token 1 straddles the boundary at byte 2: [3 \"ab\"]; cut there it would be [0 \"a\", 1 \"b\"]"
    );
    let (all, _) = outcomes(&pipeline_of(Some(&tokenizer), &Policy::default()), &path);
    assert_eq!(kept(&all, 0).sample.input_ids, [2, 0, 1, 2, 4]);
    assert_eq!(codes(&all[0]), [""; 0]);
}

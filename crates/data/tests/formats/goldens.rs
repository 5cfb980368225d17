//! The rows of the goldens: each is an example or a named error.

use crate::common::*;
use crate::*;

#[test]
fn every_row_of_the_goldens_is_an_example_or_a_named_error() {
    goldens().iter().for_each(every_row_is_an_example_or_a_named_error);
}

fn every_row_is_an_example_or_a_named_error(folder: &Goldens) {
    let ours: BTreeMap<&str, (Counts, &str)> = BTreeMap::from([
        ("alpaca.json", ((0, 8, 0, 0), "")),
        ("dialogue.csv", ((0, 0, 0, 8), "not in a known format; it has \"Unit\", \"Turn\", \"B4\", \"B2\"")),
        ("feedback.json", ((0, 0, 5, 3), "its \"label\" is false")),
        ("messages.jsonl", ((0, 0, 20, 0), "")),
        ("messages_tools.jsonl", ((0, 0, 12, 0), "")),
        ("parts_loss_weight.jsonl", ((0, 0, 8, 0), "")),
        ("preferences.jsonl", ((8, 0, 0, 0), "")),
        ("prompt_completion.jsonl", ((22, 0, 0, 0), "")),
        ("seed_tasks.jsonl", ((0, 0, 0, 8), "not in a known format")),
        ("sharegpt_tools.json", ((0, 0, 9, 0), "")),
        ("threads.jsonl", ((0, 0, 0, 8), "not in a known format")),
        ("trees.jsonl", ((0, 0, 0, 8), "not in a known format")),
    ]);
    let material: BTreeMap<&str, (Counts, &str)> = BTreeMap::from([
        ("alpaca_en_demo.json", ((0, 599, 0, 0), "")),
        ("bfcl_live_multiple_messages.jsonl", ((0, 0, 632, 0), "")),
        ("cmv_messages.jsonl", ((0, 0, 123, 0), "")),
        ("cmv_prompt_completion.jsonl", ((123, 0, 0, 0), "")),
        ("cmv_threads.jsonl", ((0, 0, 0, 123), "not in a known format")),
        ("dpo_sharegpt_multiturn.json", ((0, 0, 180, 0), "")),
        ("glaive_messages_tools.jsonl", ((0, 0, 180, 0), "")),
        ("glaive_toolcall_sharegpt.json", ((0, 0, 180, 0), "")),
        ("gpteacher_toolformer.json", ((0, 4604, 0, 0), "")),
        ("gsm8k_alpaca_format.json", ((0, 4484, 0, 0), "")),
        ("hh_harmless_messages.jsonl", ((0, 0, 1387, 0), "")),
        ("kto_messages_label.json", ((0, 0, 85, 95), "its \"label\" is false")),
        ("oasst_en_100_messages.jsonl", ((0, 0, 60, 0), "")),
        ("oasst_en_100_trees.jsonl", ((0, 0, 0, 60), "not in a known format")),
        (
            "p4g_full_dialog.csv",
            ((0, 0, 0, 12563), "not in a known format; it has \"Unit\", \"Turn\", \"B4\", \"B2\""),
        ),
        ("p4g_messages.jsonl", ((0, 0, 610, 0), "")),
        ("persuasiontrace_messages.jsonl", ((0, 0, 267, 0), "")),
        ("reason_tool_use_parts.jsonl", ((0, 0, 30, 0), "")),
        ("sharegpt_dummy_conversation.json", ((0, 0, 300, 0), "")),
        ("stanford_seed_tasks.jsonl", ((0, 0, 0, 105), "not in a known format")),
        ("ukp_convarg_pairs.jsonl", ((7150, 0, 0, 0), "")),
        ("v1_sft_parts_loss_weight.jsonl", ((0, 0, 300, 0), "")),
    ]);
    let expected = folder.expect(ours, material);
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(folder.dir.join("datasets")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let mut source = Source::open(&path).unwrap();
        let (mut counts, mut errors) = ((0, 0, 0, 0), Vec::new());
        while let Some(raw) = source.next_row().unwrap() {
            match Example::from_row(Row::parse(raw).unwrap(), Format::Auto).map(|e| e.body) {
                Ok(Body::Text { .. }) => counts.0 += 1,
                Ok(Body::Alpaca(_)) => counts.1 += 1,
                Ok(Body::Chat(c)) => {
                    assert_eq!(c.messages.len(), c.weights.len());
                    let shaped = |m: &Map<String, Value>| {
                        m["role"].is_string()
                            && m.values().all(|v| !v.is_null())
                            && m.get("content").is_none_or(|content| match content {
                                Value::Array(parts) => parts.iter().all(|part| part["text"].is_string()),
                                content => content.is_string(),
                            })
                    };
                    assert!(c.messages.iter().all(shaped), "{name}: {c:?}");
                    counts.2 += 1;
                }
                Ok(other) => panic!("{name}: {other:?}"),
                Err(e) => {
                    counts.3 += 1;
                    errors.push(e.to_string());
                }
            }
        }
        println!("{name}: {counts:?} (text, alpaca, chat, error)");
        let (_, words) = expected[name.as_str()];
        assert!(errors.iter().all(|e| e.contains(words)), "{name}: {:?}", errors.first());
        found.insert(name, counts);
    }
    let expected: BTreeMap<String, Counts> =
        expected.into_iter().map(|(name, (counts, _))| (name.to_string(), counts)).collect();
    assert_eq!(found, expected);
}

/// Two spellings of one data set give the same result.
#[test]
fn sharegpt_and_openai_spellings_are_the_same() {
    goldens().iter().for_each(both_spellings_are_the_same);
}

fn both_spellings_are_the_same(folder: &Goldens) {
    let read = |name: &str| {
        let mut source = Source::open(folder.dir.join("datasets").join(name)).unwrap();
        let mut all = Vec::new();
        while let Some(raw) = source.next_row().unwrap() {
            match Example::from_row(Row::parse(raw).unwrap(), Format::Auto).unwrap().body {
                Body::Chat(c) => all.push(*c),
                other => panic!("{other:?}"),
            }
        }
        all
    };
    let (sharegpt, openai) = folder.expect(
        ("sharegpt_tools.json", "messages_tools.jsonl"),
        ("glaive_toolcall_sharegpt.json", "glaive_messages_tools.jsonl"),
    );
    let (sharegpt, mut openai) = (read(sharegpt), read(openai));
    // ShareGPT has one call per message.
    let calls =
        |m: &Map<String, Value>| m.get("tool_calls").map_or(1, |calls| calls.as_array().unwrap().len());
    openai.retain(|c| c.messages.iter().all(|m| calls(m) == 1));
    assert_eq!((sharegpt.len(), openai.len()), folder.expect((9, 9), (180, 180)));
    for (a, b) in sharegpt.iter().zip(&openai) {
        assert_eq!((&a.messages, &a.tools), (&b.messages, &b.tools));
    }
}

/// Every conversation through a template with tools is a sample.
#[test]
fn conversations_of_the_goldens_go_through_a_template() {
    goldens().iter().for_each(conversations_go_through_a_template);
}

fn conversations_go_through_a_template(folder: &Goldens) {
    let tokenizer = Arc::new(Tokenizer::from_dir(&folder.dir.join("tokenizers/qwen2_5")).unwrap());
    let s = Scratch::new();
    let template = folder.expect("templates/tools.jinja", "templates/trl/qwen2_5.jinja");
    s.file("chat_template.jinja", folder.text(template));
    let template = Arc::new(ChatTemplate::from_dir(s.dir.path(), None, Some("<|im_end|>")).unwrap().unwrap());
    let policy = Policy {
        on_bad_row: OnBadRow::Skip,
        max_length: None,
        stop_tokens: vec!["<|im_end|>".into()],
        ..Policy::default()
    };
    let pipeline = with_template(&pipeline_of(Some(&tokenizer), &policy), &template);
    let ours = [
        "alpaca.json",
        "messages.jsonl",
        "messages_tools.jsonl",
        "parts_loss_weight.jsonl",
        "sharegpt_tools.json",
    ];
    let material = [
        "alpaca_en_demo.json",
        "bfcl_live_multiple_messages.jsonl",
        "cmv_messages.jsonl",
        "dpo_sharegpt_multiturn.json",
        "glaive_messages_tools.jsonl",
        "glaive_toolcall_sharegpt.json",
        "oasst_en_100_messages.jsonl",
        "p4g_messages.jsonl",
        "reason_tool_use_parts.jsonl",
        "sharegpt_dummy_conversation.json",
        "v1_sft_parts_loss_weight.jsonl",
    ];
    for name in folder.expect(&ours[..], &material[..]) {
        let (all, summary) = outcomes(&pipeline, &folder.dir.join("datasets").join(name));
        println!(
            "{name}: {} kept, {} dropped, {} failed",
            summary.kept,
            summary.dropped_rows(),
            summary.failed
        );
        let kept =
            |outcome: &Outcome| matches!(outcome, Outcome::Kept(kept) if kept.sample.targets().count() > 0);
        assert!(all.iter().all(kept), "{name}: {:?}", all.iter().find(|o| !kept(o)));
    }
}

#[test]
fn what_rows_of_no_known_format_lack_is_told_nearest_format_first() {
    goldens().iter().for_each(each_format_says_what_is_lacking);
}

fn each_format_says_what_is_lacking(folder: &Goldens) {
    let ours = [
        ("trees.jsonl", "{\"tree_id\": \"t0\", ", "prompt_completion lacks \"completion\""),
        ("threads.jsonl", "{\"id\": \"v0\", \"outcome\": ", "messages lacks \"messages\""),
        (
            "dialogue.csv",
            "{\"Unit\": \"I think planning meals for the week take\".., \"Turn\": \"0\"",
            "messages lacks \"messages\"",
        ),
        (
            "seed_tasks.jsonl",
            "{\"id\": \"seed_0\", \"name\": \"reply\", \"instruction\": \"Concede what is right, then reframe.\"",
            "alpaca lacks \"output\"",
        ),
    ];
    let material = [
        (
            "oasst_en_100_trees.jsonl",
            "{\"message_tree_id\": \"054e1df3-",
            "prompt_completion lacks \"completion\"",
        ),
        ("cmv_threads.jsonl", "{\"id\": \"2rppq9\", \"outcome\": ", "messages lacks \"messages\""),
        (
            "p4g_full_dialog.csv",
            "{\"Unit\": \"Good morning. How are you doing today?\", \"Turn\": \"0\", \"B4\": \"0\", \"B2\": \"20180904-045349_715_live\"}",
            "messages lacks \"messages\"",
        ),
        (
            "stanford_seed_tasks.jsonl",
            "{\"id\": \"seed_task_0\", \"name\": \"breakfast_suggestion\", \"instruction\": \"Is there anything I can eat for a breakf\"..",
            "alpaca lacks \"output\"",
        ),
    ];
    for (name, row, nearest) in folder.expect(ours, material) {
        let mut source = Source::open(folder.dir.join("datasets").join(name)).unwrap();
        let raw = source.next_row().unwrap().unwrap();
        let error = Example::from_row(Row::parse(raw).unwrap(), Format::Auto).unwrap_err();
        let lines: Vec<&str> = error.help().unwrap().lines().collect();
        assert!(lines[0].starts_with(&format!("the row is {row}")), "{name}: {}", lines[0]);
        assert!(lines[0].len() < 900, "{name}: {}", lines[0]);
        assert_eq!(lines[2], format!("  {nearest}"), "{name}");
        assert_eq!(lines.len(), 11, "all nine formats: {lines:?}");
    }
}

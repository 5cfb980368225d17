//! Rows whose fields have other names, and names of sections.

mod common;

use common::{Scratch, byte_tokenizer, job, kept, outcomes, pipeline_of, with_template};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use suasion_data::example::COLUMNS;
use suasion_data::prepared::{self, Manifest, Shape};
use suasion_data::template::ChatTemplate;
use suasion_data::{Format, IGNORE, Objective, OnBadRow, Outcome, Pipeline, Policy, Summary};

const CHATML: &str = "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '<|end|>' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}";

fn pipeline(policy: Policy) -> Pipeline {
    let template: Arc<ChatTemplate> = ChatTemplate::new(CHATML, None, Some("<|end|>")).unwrap().into();
    let policy = Policy { on_bad_row: OnBadRow::Skip, ..policy };
    Pipeline {
        keep_text: true,
        ..with_template(&pipeline_of(Some(&byte_tokenizer(false)), &policy), &template)
    }
}

fn columns(of: &[(&str, &str)]) -> Policy {
    let columns = of.iter().map(|(name, path)| (name.to_string(), path.to_string())).collect();
    Policy { columns, ..Policy::default() }
}

fn run(policy: Policy, rows: &[Value]) -> (Vec<Outcome>, Summary) {
    let scratch = Scratch::new();
    let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
    outcomes(&pipeline(policy), &scratch.file("rows.jsonl", lines.join("\n")))
}

/// The text of a row, with its supervised bytes in brackets.
fn read(policy: Policy, row: Value) -> String {
    let all = run(policy, &[row]).0;
    let Outcome::Kept(row) = &all[0] else { panic!("{all:?}") };
    let ids = row.sample.input_ids.iter().zip(&row.sample.labels);
    let mut out = String::new();
    let mut open = false;
    for (&id, &label) in ids {
        if (label != IGNORE) != open {
            out.push(if open { '»' } else { '«' });
            open = !open;
        }
        out += &if id == common::EOS { "<|end|>".into() } else { char::from(id as u8).to_string() };
    }
    out + if open { "»" } else { "" }
}

fn error(policy: Policy, row: Value) -> String {
    match &run(policy, &[row]).0[0] {
        Outcome::Failed { error, .. } => format!("{error}\n{}", error.help().unwrap_or_default()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn columns_are_fields_fields_in_fields_and_fields_of_entries() {
    let pair = [("prompt", "question"), ("completion", "answer")];
    assert_eq!(read(columns(&pair), json!({"question": "Q", "answer": "A", "id": 7})), "Q«A<|end|>»");
    // `columns` takes precedence over fields with our names.
    let row = json!({"prompt": "other", "question": "Q", "answer": "A"});
    assert_eq!(read(columns(&pair), row), "Q«A<|end|>»");
    let moved = [("prompt", "instruction"), ("completion", "output")];
    assert_eq!(read(columns(&moved), json!({"instruction": "Q", "output": "A"})), "Q«A<|end|>»");
    // SQuAD's format; a name with a dot; an index in either spelling.
    for path in ["answers.text.0", "answers.text[0]", "answers.text.1"] {
        let row = json!({"data.q": "Q", "answers": {"text": ["A", "A"], "start": [1]}});
        assert_eq!(read(columns(&[("prompt", "data.q"), ("completion", path)]), row), "Q«A<|end|>»");
    }
    // Our other names.
    let row = || json!({"sys": "S", "ask": "Q", "reply": "A"});
    let alpaca = [("system", "sys"), ("instruction", "ask"), ("output", "reply")];
    assert_eq!(read(columns(&alpaca), row()), "[system]S<|end|>[user]Q<|end|>[assistant]«A<|end|>»");
    // Lists of messages, and the keys of the messages.
    let dialog =
        json!({"dialog": [{"speaker": "user", "said": "Q"}, {"speaker": "gpt", "said": "A", "train": true}]});
    let names = [("messages", "dialog"), ("role", "speaker"), ("content", "said")];
    assert_eq!(read(columns(&names), dialog), "[user]Q<|end|>[assistant]«A<|end|>»");
    // A pair in each entry of a list is a conversation.
    let turns = json!({"turns": [{"human": "Q", "assistant": "A"}, {"human": "R", "assistant": "B"}]});
    let names = [("prompt", "turns.human"), ("completion", "turns.assistant")];
    assert_eq!(
        read(columns(&names), turns.clone()),
        "[user]Q<|end|>[assistant]«A<|end|>»[user]R<|end|>[assistant]«B<|end|>»"
    );
    // The same conversation as in the row's messages.
    let messages = json!({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"},
        {"role": "user", "content": "R"}, {"role": "assistant", "content": "B"}]});
    assert_eq!(read(columns(&names), turns), read(Policy::default(), messages));
}

#[test]
fn columns_that_are_not_there_are_named() {
    let pair = || columns(&[("prompt", "question"), ("completion", "data.answer")]);
    let found = error(pair(), json!({"question": "Q", "data": {"anwser": "A"}}));
    assert!(found.contains("there is no \"data.answer\", which columns.completion names"), "{found}");
    assert!(found.contains("the row has \"question\", \"data\""), "{found}");
    let found = error(
        columns(&[("prompt", "t.q"), ("completion", "t.a")]),
        json!({"t": [{"q": "1", "a": "2"}, {"q": "3"}]}),
    );
    assert!(found.contains("there is no \"t.a\""), "{found}");
    // Prepared rows have our names.
    assert!(matches!(
        &run(pair(), &[json!({"input_ids": [65, 66], "labels": [-100, 66]})]).0[0],
        Outcome::Kept(_)
    ));
    // Every name that may be mapped is read by some format: if it maps to nothing, the error names it.
    for name in COLUMNS.iter().filter(|name| {
        !["role", "content", "reasoning_content", "tool_calls", "tool_call_id", "train", "weight"]
            .contains(name)
    }) {
        let found = error(columns(&[(name, "nowhere")]), json!({"prompt": "Q", "completion": "A"}));
        assert!(found.contains(&format!("columns.{name} names")), "{found}");
    }
}

/// The mapping that the error for an unknown shape proposes can read the row.
#[test]
fn a_row_of_unknown_shape_is_told_its_mapping() {
    for (row, proposed, reading) in [
        (
            json!({"question": "Q", "answer": "A"}),
            "columns.prompt=question and columns.completion=answer",
            "Q«A<|end|>»",
        ),
        (
            json!({"id": "1", "query": "Q", "response": "A"}),
            "columns.prompt=query and columns.completion=response",
            "Q«A<|end|>»",
        ),
        (
            json!({"instruction": "Q", "response": "A"}),
            "columns.prompt=instruction and columns.completion=response",
            "Q«A<|end|>»",
        ),
        (
            json!({"data": {"question": "Q", "answer": "A"}}),
            "columns.prompt=data.question and columns.completion=data.answer",
            "Q«A<|end|>»",
        ),
        (
            json!({"turns": [{"human": "Q", "assistant": "A"}]}),
            "columns.prompt=turns.human and columns.completion=turns.assistant",
            "[user]Q<|end|>[assistant]«A<|end|>»",
        ),
        (
            json!({"dialog": [{"speaker": "user", "text": "Q"}, {"speaker": "assistant", "text": "A"}]}),
            "columns.messages=dialog and columns.role=speaker and columns.content=text",
            "[user]Q<|end|>[assistant]«A<|end|>»",
        ),
        (
            json!({"dialog": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}),
            "columns.messages=dialog",
            "[user]Q<|end|>[assistant]«A<|end|>»",
        ),
        (
            json!({"conversation": [{"human": "Q", "assistant": "A"}]}),
            "columns.prompt=conversation.human and columns.completion=conversation.assistant",
            "[user]Q<|end|>[assistant]«A<|end|>»",
        ),
        (
            json!({"messages": [{"speaker": "user", "text": "Q"}, {"speaker": "assistant", "text": "A"}]}),
            "columns.messages=messages and columns.role=speaker and columns.content=text",
            "[user]Q<|end|>[assistant]«A<|end|>»",
        ),
        (
            json!({"human": "Q", "assistant": "A"}),
            "columns.prompt=human and columns.completion=assistant",
            "Q«A<|end|>»",
        ),
    ] {
        let found = error(Policy::default(), row.clone());
        assert!(found.contains(&format!("map its fields with {proposed}")), "{found}");
        let pairs: Vec<(&str, &str)> = proposed
            .split(" and ")
            .map(|part| part.strip_prefix("columns.").unwrap().split_once('=').unwrap())
            .collect();
        assert_eq!(read(columns(&pairs), row), reading);
    }
    let found = error(Policy::default(), json!({"question": "Q", "answer": "A"}));
    assert!(found.contains("columns.instruction=question and columns.output=answer"), "{found}");
    let found = error(Policy::default(), json!({"a": "Q", "b": "A"}));
    assert!(!found.contains("columns."), "{found}");
}

#[test]
fn a_text_alone_is_learned_where_all_tokens_are() {
    let all = Policy { objective: Objective::AllTokens, ..Policy::default() };
    assert_eq!(read(all.clone(), json!({"text": "once", "label": 3})), "«once<|end|>»");
    assert_eq!(
        read(
            Policy { format: Format::Text, ..all.clone() },
            json!({"text": "once", "prompt": "p", "completion": "c"})
        ),
        "«once<|end|>»"
    );
    let named = Policy { objective: Objective::AllTokens, ..columns(&[("text", "story")]) };
    assert_eq!(read(named, json!({"story": "once"})), "«once<|end|>»");
    let found = error(Policy::default(), json!({"text": "once"}));
    assert!(found.contains("the row is one \"text\": nothing tells its answer from its prompt"), "{found}");
    assert!(found.contains("completion_only_loss=false"), "{found}");
}

/// Tokens of each section.
fn sections(summary: &Summary) -> BTreeMap<&'static str, u64> {
    summary.sections().map(|(name, stats)| (name, stats.tokens)).collect()
}

#[test]
fn sections_without_markers_are_prompt_and_user() {
    let plain = json!({"prompt": "hello", "completion": "A"});
    let marked = json!({"prompt": "[TASK] hello", "completion": "A"});
    let chat = json!({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "A"},
        {"role": "user", "content": "hello"}, {"role": "assistant", "content": "B"}]});
    let of = |row: &Value, policy: Policy| {
        let (all, summary) = run(policy, std::slice::from_ref(row));
        let letters: String = kept(&all, 0).sample.origins.iter().map(|origin| origin.letter()).collect();
        let weight = kept(&all, 0)
            .sample
            .weights
            .clone()
            .map_or(0.0, |weights| weights.iter().copied().find(|w| *w > 0.0 && *w < 1.0).unwrap_or(0.0));
        (sections(&summary), letters, weight)
    };
    let (found, letters, _) = of(&plain, Policy::default());
    assert_eq!(found, BTreeMap::from([("prompt", 5), ("response", 1), ("end_of_turn", 1)]));
    assert_eq!(letters, "OOOOORE");
    let (found, letters, _) = of(&marked, Policy::default());
    assert_eq!((found["task"], letters.as_str()), (6, "BBBBBBKKKKKKRE"));
    let (found, letters, _) = of(&chat, Policy::default());
    assert_eq!((found["user"], found["context"], found.get("task")), (5, 1, None));
    assert_eq!(letters.matches('K').count(), 5);
    // Weights of sections: by their names, and by their former names.
    for (row, name) in
        [(&plain, "prompt"), (&plain, "other"), (&marked, "task"), (&chat, "user"), (&chat, "task")]
    {
        let policy = Policy { loss_weights: BTreeMap::from([(name.into(), 0.25)]), ..Policy::default() };
        assert_eq!(of(row, policy).2, 0.25, "{name}");
    }
    // Prepared, the rows have the same sections.
    let scratch = Scratch::new();
    let source = scratch.file("rows.jsonl", format!("{chat}\n"));
    let out = scratch.path("out.jsonl");
    let making = pipeline(Policy::default());
    prepared::prepare(
        &job(&making, &source, &out, Shape { with_text: false, max_shard_bytes: None }),
        |_| {},
        |_| {},
    )
    .unwrap();
    let manifest = Manifest::beside(&out).unwrap().unwrap();
    let looking = Pipeline { prepared_chats: manifest.template.is_some(), ..making };
    let before = run(Policy::default(), std::slice::from_ref(&chat)).1;
    assert_eq!(sections(&outcomes(&looking, &out).1), sections(&before));
}

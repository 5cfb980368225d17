//! Rows of every conversation and instruction format, converted to the common internal representation.

#[path = "../common/mod.rs"]
mod common;
mod goldens;

use common::{EOS, Scratch, byte_tokenizer, codes, kept, outcomes, pipeline_of, with_template};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use suasion_data::example::Conversation;
use suasion_data::example::{Body, Example, TextPiece};
use suasion_data::source::Row;
use suasion_data::source::Source;
use suasion_data::template::ChatTemplate;
use suasion_data::tokens::Tokenizer;
use suasion_data::{Error, Format, IGNORE, Kept, OnBadRow, Outcome, Policy, RowId, Supervise};

fn read(row: Value, format: Format) -> Result<Body, Error> {
    let id = RowId::new(Path::new("data.jsonl"), 481, Some(482));
    let Value::Object(fields) = row else { panic!() };
    Example::from_row(Row { id, fields }, format).map(|e| e.body)
}

fn chat(row: Value) -> Conversation {
    match read(row, Format::Auto).unwrap() {
        Body::Chat(conversation) => *conversation,
        other => panic!("{other:?}"),
    }
}

fn error(row: Value) -> String {
    let e = read(row, Format::Auto).unwrap_err();
    assert!(e.help().is_some_and(|help| !help.is_empty()), "{e}");
    e.to_string().strip_prefix("data.jsonl:482: ").expect("the place comes first").to_string()
}

fn messages(conversation: &Conversation) -> Value {
    Value::Array(conversation.messages.iter().cloned().map(Value::Object).collect())
}

#[test]
fn openai_messages() {
    let given = json!([
        {"role": "system", "content": "Be kind.", "name": null},
        {"role": "user", "name": "ada", "content": "Hi"},
        {"role": "assistant", "content": "Hello", "reasoning_content": "a greeting"},
    ]);
    let c = chat(json!({"messages": given, "id": 7}));
    let mut expected = given;
    expected[0].as_object_mut().unwrap().shift_remove("name");
    assert_eq!(messages(&c), expected);
    assert_eq!((c.weights, c.prompt_messages, c.tools, c.kwargs), (vec![None; 3], 0, None, Map::new()));

    // Consecutive turns of one role, an assistant at the start, and an end without an answer are all kept.
    let odd = json!([
        {"role": "assistant", "content": "Welcome."},
        {"role": "user", "content": "a"},
        {"role": "user", "content": "b"},
    ]);
    assert_eq!(messages(&chat(json!({"messages": odd}))), odd);
    // As JSON text, the form in tables.
    assert_eq!(messages(&chat(json!({"messages": odd.to_string()}))), odd);
}

#[test]
fn content_parts_are_sorted_by_what_they_are() {
    let c = chat(json!({"messages": [
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "2+2?"}, "!"]},
        {"role": "assistant", "content": [
            {"type": "reasoning", "value": "easy"},
            {"type": "text", "value": "I look it up."},
            {"type": "tool_call", "value": "{\"name\": \"sum\", \"arguments\": \"{\\\"a\\\": [2, 2]}\"}"},
        ]},
        {"role": "tool", "content": [{"type": "text", "value": "4"}]},
        {"role": "assistant", "content": [{"type": "tool_call", "value": {"name": "done", "arguments": null}}]},
    ]}));
    let text = |texts: &[&str]| -> Value {
        texts.iter().map(|text| json!({"type": "text", "text": text})).collect()
    };
    let call = |name: &str, arguments: Value| json!([{"type": "function", "function": {"name": name, "arguments": arguments}}]);
    assert_eq!(
        messages(&c),
        json!([
            {"role": "user", "content": text(&["What is ", "2+2?", "!"])},
            {"role": "assistant", "content": text(&["I look it up."]),
             "tool_calls": call("sum", json!("{\"a\": [2, 2]}")), "reasoning_content": "easy"},
            {"role": "tool", "content": text(&["4"])},
            {"role": "assistant", "content": "", "tool_calls": call("done", json!({}))},
        ])
    );
}

#[test]
fn arguments_of_tool_calls_are_as_given_and_content_may_be_null() {
    let c = chat(json!({
        "messages": [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": null, "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\"b\": 1, \"a\": null}"}},
                {"id": "c2", "type": "function", "function": {"name": "g", "arguments": ""}},
            ]},
            {"role": "tool", "tool_call_id": "c1", "content": "1", "tool_calls": null},
        ],
        "tools": "[{\"type\": \"function\", \"function\": {\"name\": \"f\"}}]",
        "chat_template_kwargs": {"enable_thinking": false},
    }));
    assert_eq!(
        messages(&c)[1],
        json!({"role": "assistant", "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\"b\": 1, \"a\": null}"}},
            {"id": "c2", "type": "function", "function": {"name": "g", "arguments": {}}},
        ]})
    );
    assert_eq!(messages(&c)[2], json!({"role": "tool", "tool_call_id": "c1", "content": "1"}));
    assert_eq!(c.tools, Some(vec![json!({"type": "function", "function": {"name": "f"}})]));
    assert_eq!(c.kwargs["enable_thinking"], false);
    for none in [json!(null), json!(""), json!([])] {
        assert_eq!(chat(json!({"messages": [{"role": "user", "content": "x"}], "tools": none})).tools, None);
    }
    // OpenAI's older name, together with the older `function_call`.
    let function = json!({"name": "f", "parameters": {"type": "object"}});
    let c =
        chat(json!({"functions": [function], "tools": null, "messages": [{"role": "user", "content": "x"},
        {"role": "assistant", "content": null, "function_call": {"name": "f", "arguments": "{}"}}]}));
    assert_eq!(c.tools, Some(vec![json!({"type": "function", "function": function})]));
    // A column with this name that lists something else is not a list of tools.
    let c = chat(json!({"functions": ["cooking"], "messages": [{"role": "user", "content": "x"}]}));
    assert_eq!(c.tools, None);
}

#[test]
fn weights_leave_the_messages() {
    let c = chat(json!({"messages": [
        {"role": "user", "content": "a", "loss_weight": 0.0},
        {"role": "assistant", "content": "b", "train": true},
        {"role": "assistant", "content": "c", "train": false, "weight": 3},
        {"role": "assistant", "content": "d", "weight": 0.5},
        {"role": "assistant", "content": "e", "weight": null},
        {"role": "assistant", "content": "f", "train": 1, "loss_weight": 2},
    ]}));
    assert_eq!(c.weights, [Some(0.0), Some(1.0), Some(0.0), Some(0.5), None, Some(2.0)]);
    assert!(c.messages.iter().all(|m| m.len() == 2));
}

#[test]
fn sharegpt_conversations() {
    let c = chat(json!({
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {\"x\": 1}}"},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "b", "weight": 0},
        ],
        "system": "Be kind.",
        "tools": "[{\"name\": \"f\", \"parameters\": {}}]",
    }));
    assert_eq!(
        messages(&c),
        json!([
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "",
             "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "b"},
        ])
    );
    assert_eq!(c.weights, [None, None, None, None, Some(0.0)]);
    assert_eq!(c.tools, Some(vec![json!({"type": "function", "function": {"name": "f", "parameters": {}}})]));
    for (from, role) in [
        ("chatgpt", "assistant"),
        ("bing", "assistant"),
        ("bard", "assistant"),
        ("model", "assistant"),
        ("assistant", "assistant"),
        ("GPT", "assistant"),
        ("user", "user"),
        ("system", "system"),
        ("tool", "tool"),
        ("function_response", "tool"),
        ("critic", "critic"),
    ] {
        let c = chat(json!({"conversation": [{"from": from, "value": "x"}]}));
        assert_eq!(c.messages[0]["role"], role, "{from}");
    }
    // OpenAI's keys in ShareGPT's column.
    let c = chat(json!({"conversations": [{"role": "user", "content": "a"}]}));
    assert_eq!(messages(&c), json!([{"role": "user", "content": "a"}]));
    // The same names in OpenAI's column; roles known to the template are kept.
    for (given, role) in [
        ("developer", "developer"),
        ("Model", "assistant"),
        ("HUMAN", "user"),
        ("ipython", "tool"),
        ("Critic", "Critic"),
    ] {
        let c = chat(json!({"messages": [{"role": given, "content": "a"}]}));
        assert_eq!(c.messages[0]["role"], role);
    }
}

#[test]
fn prompt_and_completion_as_messages() {
    let user = json!({"role": "user", "content": "q"});
    let answer = json!({"role": "assistant", "content": "a"});
    let c = chat(json!({"prompt": [user, answer, user], "completion": [answer]}));
    assert_eq!((c.messages.len(), c.prompt_messages), (4, 3));
    let c = chat(json!({"prompt": [user], "completion": "a", "system": "s"}));
    assert_eq!((c.messages.len(), c.prompt_messages), (3, 2));
    assert_eq!(c.messages[2], *answer.as_object().unwrap());
    assert_eq!(error(json!({"prompt": [user], "completion": []})), "\"completion\" has no messages");
    assert_eq!(error(json!({"prompt": [user], "completion": null})), "\"completion\" is null");
}

#[test]
fn preferences_give_the_chosen_side() {
    let user = json!({"role": "user", "content": "q"});
    let good = json!({"role": "assistant", "content": "good"});
    let bad = json!({"role": "assistant", "content": "bad"});
    let expected = json!([user, good]);
    for row in [
        json!({"prompt": [user], "chosen": [good], "rejected": [bad]}),
        json!({"prompt": "q", "chosen": [good], "rejected": [bad]}),
        json!({"prompt": "q", "chosen": [user, good], "rejected": [user, bad], "messages": [user, good]}),
        json!({"chosen": [user, good], "rejected": [user, bad]}),
        json!({"chosen": [user, good], "rejected": [user, good]}),
        json!({"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "good"},
               "rejected": {"from": "gpt", "value": "bad"}}),
        json!({"messages": [user], "chosen": good, "rejected": bad}),
        json!({"conversations": [{"from": "human", "value": "q"}], "chosen": "good", "rejected": "bad"}),
    ] {
        let c = chat(row.clone());
        assert_eq!((messages(&c), c.prompt_messages), (expected.clone(), 1), "{row}");
    }
    let text = read(json!({"prompt": "q ", "chosen": "good", "rejected": "bad"}), Format::Auto).unwrap();
    assert_eq!(text, Body::Text { text: "q good".into(), prompt_len: 2 });
    match read(json!({"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"}), Format::Auto) {
        Ok(Body::Alpaca(row)) => assert_eq!(row.output, "good"),
        other => panic!("{other:?}"),
    }
    assert!(error(json!({"chosen": "q good", "rejected": "q bad"})).contains("no \"prompt\" before it"));
    // The undesired rows of an unpaired preference are not supervised unless requested.
    let undesired = json!({"messages": [user, bad], "label": false});
    assert!(error(undesired.clone()).contains("its \"label\" is false"));
    assert!(matches!(read(undesired, Format::Messages), Ok(Body::Chat(_))));
    assert_eq!(chat(json!({"messages": [user, good], "label": true})).messages.len(), 2);
}

#[test]
fn alpaca_rows_are_text_or_a_conversation() {
    let row = json!({"instruction": "Name it.", "input": "A red fruit", "output": "Apple", "system": "Be short.",
                     "history": [["Hi", "Hello"]]});
    let Body::Alpaca(row) = read(row, Format::Auto).unwrap() else { panic!() };
    assert_eq!(
        messages(&row.conversation()),
        json!([
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Name it.\nA red fruit"},
            {"role": "assistant", "content": "Apple"},
        ])
    );
    let s = Scratch::new();
    let path = s.file(
        "rows.jsonl",
        [
            json!({"instruction": "Name it.", "input": "A red fruit", "output": "Apple"}),
            json!({"instruction": "Hello?", "input": "", "output": "Hi", "history": []}),
            json!({"instruction": "b", "input": null, "output": "B", "system": "S", "history": [["a", "A"]]}),
        ]
        .map(|row| format!("{row}\n"))
        .concat(),
    );
    let tokenizer = byte_tokenizer(false);
    let policy = Policy::default();
    let mut pipeline = pipeline_of(Some(&tokenizer), &policy);
    pipeline.keep_text = true;
    let (all, _) = outcomes(&pipeline, &path);
    let text = |i: usize| kept(&all, i).text.clone().unwrap();
    let origins = |i: usize| {
        let mut runs: Vec<char> = kept(&all, i).sample.origins.iter().map(|o| o.letter()).collect();
        runs.dedup();
        runs.into_iter().collect::<String>()
    };
    assert_eq!(
        text(0),
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a \
         response that appropriately completes the request.\n\n### Instruction:\nName it.\n\n### Input:\nA red \
         fruit\n\n### Response:\nApple<|end|>"
    );
    assert_eq!(origins(0), "BKBCBRE");
    assert_eq!(
        text(1),
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n\
         ### Instruction:\nHello?\n\n### Response:\nHi<|end|>"
    );
    assert_eq!(origins(1), "BKBRE");
    assert_eq!(
        text(2),
        "S\n\n### Instruction:\na\n\n### Response:\nA<|end|>\n\n### Instruction:\nb\n\n### Response:\nB<|end|>"
    );
    assert_eq!(origins(2), "SBCBREBKBRE");
    assert!(all.iter().all(|o| codes(o).is_empty()));

    let last = Policy { supervise: Supervise::Last, ..Policy::default() };
    let (all, _) = outcomes(&pipeline_of(Some(&tokenizer), &last), &path);
    let mut runs: Vec<char> = kept(&all, 2).sample.origins.iter().map(|o| o.letter()).collect();
    runs.dedup();
    assert_eq!(runs.into_iter().collect::<String>(), "SBCBCBKBRE");
}

#[test]
fn segments_say_of_themselves_what_is_learned() {
    let list =
        json!([{"text": "a", "train": false}, {"text": "b", "label": true}, {"text": "c", "weight": 0.5}]);
    let Body::Segments(segments) = read(json!({"segments": list}), Format::Auto).unwrap() else { panic!() };
    let segment = |text: &str, weight| TextPiece { text: text.into(), weight };
    assert_eq!(segments, [segment("a", 0.0), segment("b", 1.0), segment("c", 0.5)]);

    let s = Scratch::new();
    let rows = [
        json!({"segments": list}),
        // The stop token may be a separate segment; white space after it is scaffold.
        json!({"segments": [{"text": "q", "train": false}, {"text": "r", "train": true},
                            {"text": "<|end|>\n", "train": true}]}),
        // Two answers; the row ends in prompt text, so nothing is appended.
        json!({"segments": [{"text": "r<|end|>", "train": true}, {"text": "q", "train": false},
                            {"text": "s", "train": true}, {"text": "q", "train": false}]}),
        json!({"segments": [{"text": "q", "train": false}]}),
    ];
    let path = s.file("rows.jsonl", rows.map(|row| format!("{row}\n")).concat());
    let tokenizer = byte_tokenizer(false);
    let policy = Policy { on_bad_row: OnBadRow::Skip, ..Policy::default() };
    let (all, summary) = outcomes(&pipeline_of(Some(&tokenizer), &policy), &path);
    let letters = |i: usize| kept(&all, i).sample.origins.iter().map(|o| o.letter()).collect::<String>();
    assert_eq!(letters(0), "ORRE");
    assert_eq!(kept(&all, 0).sample.weights, Some(vec![0.0, 1.0, 0.5, 0.5]));
    assert_eq!(letters(1), "OREB");
    assert_eq!(letters(2), "REORO");
    assert_eq!(codes(&all[3]), ["M001:e"]);
    assert_eq!((summary.kept, summary.failed), (3, 1));

    for (row, message) in [
        (json!({"segments": []}), "\"segments\" is empty"),
        (json!({"segments": "ab"}), "\"segments\" is a string, not a list"),
        (json!({"segments": ["ab"]}), "segments[0] is a string, not an object"),
        (json!({"segments": [{"text": "a"}]}), "segments[0] has neither \"train\" nor \"weight\""),
        (json!({"segments": [{"train": true}]}), "segments[0] has no \"text\""),
        (json!({"segments": [{"text": "a", "weight": -1}]}), "segments[0] has the \"weight\" -1"),
    ] {
        assert_eq!(error(row), message);
    }
}

#[test]
fn errors_name_the_message() {
    let user = json!({"role": "user", "content": "x"});
    let calls = |call: Value| json!({"messages": [user, {"role": "assistant", "tool_calls": [call]}]});
    for (row, message) in [
        (json!({"messages": []}), "\"messages\" has no messages"),
        (json!({"messages": null}), "\"messages\" is null, not a list of messages"),
        (json!({"messages": "hello"}), "\"messages\" is a string, not a list of messages"),
        (json!({"messages": [user, "x"]}), "messages[1] is a string, not an object"),
        (
            json!({"messages": [user, {"content": "x"}]}),
            "messages[1] has neither \"role\" nor \"from\"; it has \"content\"",
        ),
        (json!({"messages": [{"role": 1, "content": "x"}]}), "messages[0] has a role that is a number"),
        (
            json!({"messages": [user, {"role": "assistant", "content": null}]}),
            "messages[1] has no content; it has \"role\", \"content\"",
        ),
        (
            json!({"messages": [{"role": "user", "content": 1}]}),
            "messages[0] has a \"content\" that is a number",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}),
            "messages[0] has a part 0 of type \"image_url\"",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
            "messages[0] has a part 0 of type \"text\" without text; it has \"type\"",
        ),
        (
            json!({"messages": [{"role": "assistant", "content": "x", "weight": "much"}]}),
            "messages[0] has the \"weight\" \"much\"",
        ),
        (calls(json!({"function": {"arguments": {}}})), "messages[1] has a tool call that has no name"),
        (
            calls(json!({"function": {"name": "f", "arguments": "[1]"}})),
            "messages[1] has a tool call that has arguments that are a list, not an object",
        ),
        (
            json!({"conversations": [{"from": "function_call", "value": "f(x)"}]}),
            "conversations[0] has a tool call that is not JSON: expected ident at line 1 column 2",
        ),
        (
            json!({"messages": [user], "tools": "x"}),
            "\"tools\" is a string that is not JSON: expected value at line 1 column 1",
        ),
        (json!({"messages": [user], "tools": [1]}), "tools[0] is a number, not an object"),
        (
            json!({"messages": [user], "chat_template_kwargs": [1]}),
            "\"chat_template_kwargs\" is a list, not an object",
        ),
        (
            json!({"messages": [user], "instruction": "x", "output": "y"}),
            "the row has the fields of two formats: messages and instruction+output",
        ),
        (json!({"instruction": "x", "output": null}), "\"output\" is null"),
        (
            json!({"instruction": "x", "output": "y", "history": [["a"]]}),
            "history[0] is not a pair of strings",
        ),
    ] {
        assert_eq!(error(row), message);
    }
    let e = read(json!({"id": 1}), Format::Messages).unwrap_err();
    assert!(e.to_string().ends_with("\"messages\" is missing; the row has: id"), "{e}");
}

#[test]
fn a_conversation_without_a_template_ends_the_run() {
    let s = Scratch::new();
    let row = json!({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]});
    let path = s.file("rows.jsonl", row.to_string());
    let tokenizer = byte_tokenizer(false);
    let e = pipeline_of(Some(&tokenizer), &Policy::default()).samples(&path).unwrap_err();
    assert!(e.to_string().contains("is a conversation, and the model folder has no chat template"), "{e}");
    assert!(e.help().unwrap().contains("chat_template.jinja"));
}

/// The results of a file: rows of (text, alpaca, chat, error), and one of the errors.
type Counts = (usize, usize, usize, usize);

/// ChatML by hand, with the stop token of [`byte_tokenizer`].
const CHATML: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<|end|>\
                      {% endif %}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";

#[test]
fn conversations_become_samples() {
    let message = |role: &str, content: &str| json!({"role": role, "content": content});
    let weighed = |weight: f64| json!({"role": "assistant", "content": "b", "weight": weight});
    let s = Scratch::new();
    let rows = [
        json!({"messages": [message("assistant", "a"), message("user", "u"), message("assistant", "b")]}),
        json!({"messages": [message("user", "u"), weighed(0.5), message("user", "v"), message("assistant", "c")]}),
        json!({"prompt": [message("user", "u"), message("assistant", "a")], "completion": [message("assistant", "b")]}),
        json!({"messages": [message("user", "only a question")]}),
        json!({"prompt": [message("assistant", "a")], "completion": [message("user", "u")]}),
        json!({"messages": [message("user", "u"), message("assistant", "")]}),
    ];
    let path = s.file("rows.jsonl", rows.map(|row| format!("{row}\n")).concat());
    let tokenizer = byte_tokenizer(false);
    let template = Arc::new(ChatTemplate::new(CHATML, None, Some("<|end|>")).unwrap());
    let learned = |supervise: Supervise| {
        let policy = Policy { supervise, on_bad_row: OnBadRow::Skip, ..Policy::default() };
        let pipeline = with_template(&pipeline_of(Some(&tokenizer), &policy), &template);
        let (all, summary) = outcomes(&pipeline, &path);
        assert_eq!(summary.template.as_deref(), Some(template.fingerprint()));
        let row = |outcome: &Outcome| match outcome {
            Outcome::Kept(Kept { sample, .. }) => {
                let weight = |i: usize| sample.weights.as_ref().map_or(1.0, |w| w[i]);
                let ids = |i: &usize| sample.labels[*i] != IGNORE;
                let show = |i: usize| match (sample.labels[i] as u32, weight(i)) {
                    (EOS, _) => ".".to_string(),
                    (id, 1.0) => char::from_u32(id).unwrap().to_string(),
                    (id, weight) => format!("{}*{weight}", char::from_u32(id).unwrap()),
                };
                (0..sample.labels.len()).filter(ids).map(show).collect()
            }
            Outcome::Dropped { reason, .. } => reason.name().to_string(),
            Outcome::Failed { .. } => codes(outcome).concat(),
        };
        all.iter().map(row).collect::<Vec<String>>()
    };
    let none = "no_target";
    assert_eq!(learned(Supervise::All), ["a.b.", "b*0.5.c.", "b.", none, none, none]);
    assert_eq!(learned(Supervise::Last), ["b.", "c.", "b.", none, none, none]);
    assert_eq!(learned(Supervise::PerMessage)[1], "b*0.5.");
}

//! Where an answer starts, which messages are represented by no token, and role names. The tokenizer's ids are
//! bytes, so the supervised text can be read off the labels.

mod common;

use common::{EOS, Scratch, byte_tokenizer, codes, kept, outcomes, pipeline_of, with_template};
use serde_json::{Value, json};
use std::sync::Arc;
use suasion_data::template::ChatTemplate;
use suasion_data::{IGNORE, Kept, Mode, Outcome, Policy};

fn run_in(mode: Mode, template: &str, rows: &[Value]) -> Vec<Outcome> {
    let template: Arc<ChatTemplate> = ChatTemplate::new(template, None, Some("<|end|>")).unwrap().into();
    let scratch = Scratch::new();
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    let path = scratch.file("rows.jsonl", lines);
    let policy = Policy { on_bad_row: suasion_data::OnBadRow::Skip, ..Policy::default() };
    let mut pipeline = with_template(&pipeline_of(Some(&byte_tokenizer(false)), &policy), &template);
    pipeline.mode = mode;
    outcomes(&pipeline, &path).0
}

fn run(template: &str, rows: &[Value]) -> Vec<Outcome> {
    run_in(Mode::Prepare, template, rows)
}

fn text(ids: impl Iterator<Item = u32>) -> String {
    let mut bytes = Vec::new();
    ids.for_each(|id| match id {
        EOS => bytes.extend(b"<|end|>"),
        id => bytes.push(id as u8),
    });
    String::from_utf8(bytes).unwrap()
}

fn whole(kept: &Kept) -> String {
    text(kept.sample.input_ids.iter().copied())
}

/// The supervised runs, joined by `|`.
fn learned(kept: &Kept) -> String {
    let labels = &kept.sample.labels;
    let runs = labels.chunk_by(|a, b| (*a == IGNORE) == (*b == IGNORE)).filter(|run| run[0] != IGNORE);
    runs.map(|run| text(run.iter().map(|label| *label as u32))).collect::<Vec<_>>().join("|")
}

fn chat(messages: Value) -> Value {
    json!({ "messages": messages })
}

fn call(name: &str) -> Value {
    json!([{"type": "function", "function": {"name": name, "arguments": {"x": 1}}}])
}

/// The model continues after a tool's result without a header; the generation prompt is empty there.
const GOES_ON: &str = "{% for m in messages %}{% if m.role == 'tool' %}<r>{{ m.content }}</r>{% elif m.role == 'assistant' %}\
    {% if not loop.previtem or loop.previtem.role != 'tool' %}[assistant]{% endif %}<think>{{ m.reasoning_content or '' }}\
    </think>{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.arguments | tojson }}</call>{% endfor %}\
    {% if not m.tool_calls %}<|end|>{% endif %}{% else %}[{{ m.role }}]{{ m.content }}<|end|>{% endif %}{% endfor %}\
    {% if add_generation_prompt and messages[-1].role != 'tool' %}[assistant]{% endif %}";

#[test]
fn a_generation_prompt_that_is_empty_after_a_result() {
    let row = |reasoning: Value| {
        chat(json!([{"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "reasoning_content": "r1", "tool_calls": call("f")},
            {"role": "tool", "content": "R"}, {"role": "assistant", "content": "a2", "reasoning_content": reasoning}]))
    };
    let all = run(GOES_ON, &[row("r2".into()), row(Value::Null)]);
    let first = "<think>r1</think><call>{\"x\": 1}</call>";
    assert_eq!(learned(kept(&all, 0)), format!("{first}|<think>r2</think>a2<|end|>"));
    assert_eq!(learned(kept(&all, 1)), format!("{first}|<think></think>a2<|end|>"));
    // A call has no stop token here; there is no other finding.
    assert!(all.iter().all(|outcome| codes(outcome) == ["M002:e"]), "{all:?}");
}

/// The generation prompt opens a thought, and the template never closes it.
const OPENS: &str = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}\
    {% if add_generation_prompt %}[assistant]<think>\n{% endif %}";

#[test]
fn what_the_prompt_opens_is_given_where_the_content_repeats_it() {
    let said = "<think>\nr\n</think>\n\na";
    let user = json!({"role": "user", "content": "q"});
    let answer = |text: &str| json!({"role": "assistant", "content": text});
    let rows = [
        chat(json!([user, answer(said)])),
        json!({"prompt": [user], "completion": [answer(said)]}),
        chat(json!([user, answer("a")])),
        // Only one of two answers repeats it; its shape equals that of two others.
        chat(json!([user, answer("a"), user, answer(said)])),
        chat(json!([user, answer("a"), user, answer("b")])),
        chat(json!([user, answer(said), user, answer("b")])),
    ];
    let all = run(OPENS, &rows);
    let rest = "r\n</think>\n\na<|end|>";
    let got: Vec<_> = (0..rows.len()).map(|i| (learned(kept(&all, i)), codes(&all[i]).concat())).collect();
    let want = |text: &str, codes: &str| (text.to_string(), codes.to_string());
    assert_eq!(got[0], want(rest, ""));
    assert_eq!(got[1].0, rest);
    assert_eq!(got[2], want("a<|end|>", "G001:w"));
    assert_eq!(got[3], want(&format!("a<|end|>|{rest}"), "G001:w"));
    assert_eq!(got[4], want("a<|end|>|b<|end|>", "G001:w"));
    assert_eq!(got[5], want(&format!("{rest}|b<|end|>"), "G001:w"));
    // The order of the rows, and so the order in which shapes are learned, makes no difference.
    let reversed: Vec<_> = rows.iter().rev().cloned().collect();
    let again = run(OPENS, &reversed);
    for (i, (text, _)) in got.iter().rev().enumerate() {
        assert_eq!(&learned(kept(&again, i)), text);
    }
}

/// Other words than a thought: any prefill is given.
#[test]
fn a_prompt_that_begins_the_answer_with_words() {
    let sure = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}\
        {% if add_generation_prompt %}[assistant]Sure{% endif %}";
    let row =
        |said: &str| chat(json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": said}]));
    let all = run(sure, &[row("Sure, a"), row("No")]);
    assert_eq!((0..2).map(|i| learned(kept(&all, i))).collect::<Vec<_>>(), [", a<|end|>", "No<|end|>"]);
    assert_eq!(all.iter().map(|o| codes(o).concat()).collect::<Vec<_>>(), ["", "G001:w"]);
}

/// As in Qwen2.5: only these roles are rendered.
const KNOWS: &str = "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant', 'tool'] %}[{{ m.role }}]\
    {{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}</call>{% endfor %}<|end|>{% endif %}\
    {% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";

#[test]
fn roles_under_all_their_names() {
    let row = |key: &str, names: [&str; 2]| {
        let message = |role: &str, text: &str| match key {
            "messages" => json!({"role": role, "content": text}),
            _ => json!({"from": role, "value": text}),
        };
        json!({key: [message(names[0], "q"), message(names[1], "a")]})
    };
    for key in ["messages", "conversations"] {
        for user in ["user", "human", "Human", "USER"] {
            for answers in ["assistant", "Assistant", "gpt", "GPT", "model", "bot", "ChatGPT"] {
                let all = run(KNOWS, &[row(key, [user, answers])]);
                assert_eq!(
                    whole(kept(&all, 0)),
                    "[user]q<|end|>[assistant]a<|end|>",
                    "{key} {user} {answers}"
                );
                assert_eq!(learned(kept(&all, 0)), "a<|end|>");
                assert_eq!(codes(&all[0]), [""; 0]);
            }
        }
        for system in ["System", "developer", "Developer"] {
            let all = run(KNOWS, &[row(key, [system, "gpt"])]);
            assert_eq!(whole(kept(&all, 0)), "[system]q<|end|>[assistant]a<|end|>", "{system}");
        }
        for (call, result) in [
            ("tool_call", "tool_response"),
            ("function_call", "observation"),
            ("Tool_Call", "Tool"),
            ("tool_call", "function"),
            ("tool_call", "ipython"),
        ] {
            let text = "{\"name\": \"f\", \"arguments\": {}}";
            let mut messages = row(key, ["user", "assistant"])[key].as_array().unwrap().clone();
            let more = [row(key, [call, result])[key][0].clone(), row(key, [call, result])[key][1].clone()];
            messages.splice(1..1, more);
            let text_key = if key == "messages" { "content" } else { "value" };
            messages[1][text_key] = text.into();
            let all = run(KNOWS, &[json!({key: messages})]);
            let want = "[user]q<|end|>[assistant]<call>f</call><|end|>[tool]a<|end|>[assistant]a<|end|>";
            assert_eq!(whole(kept(&all, 0)), want, "{key} {call} {result}");
            assert_eq!(learned(kept(&all, 0)), "<call>f</call><|end|>|a<|end|>");
            assert_eq!(codes(&all[0]), [""; 0]);
        }
    }
}

#[test]
fn names_that_the_template_knows_are_its_own() {
    // A developer role in a template that supports it; a template with only `model` and `ipython`.
    let developers = KNOWS.replace("'system',", "'system', 'developer',");
    let row = chat(json!([{"role": "developer", "content": "d"}, {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"}]));
    assert_eq!(
        whole(kept(&run(&developers, std::slice::from_ref(&row)), 0)),
        "[developer]d<|end|>[user]q<|end|>[assistant]a<|end|>"
    );
    assert_eq!(whole(kept(&run(KNOWS, &[row]), 0)), "[system]d<|end|>[user]q<|end|>[assistant]a<|end|>");
    let other = "{% for m in messages %}{% if m.role in ['user', 'model', 'ipython'] %}[{{ m.role }}]{{ m.content }}\
        {% for c in m.tool_calls or [] %}<call>{{ c.function.name }}</call>{% endfor %}<|end|>{% endif %}{% endfor %}\
        {% if add_generation_prompt %}[model]{% endif %}";
    let row = chat(
        json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": call("f")},
        {"role": "tool", "content": "R"}, {"role": "assistant", "content": "a"}]),
    );
    let all = run(other, &[row]);
    assert_eq!(
        whole(kept(&all, 0)),
        "[user]q<|end|>[model]<call>f</call><|end|>[ipython]R<|end|>[model]a<|end|>"
    );
    assert_eq!(learned(kept(&all, 0)), "<call>f</call><|end|>|a<|end|>");
}

#[test]
fn calls_in_a_row_are_one_answer() {
    let call = |name: &str| json!({"role": "tool_call", "content": json!({"name": name, "arguments": {}}).to_string()});
    let result = |text: &str| json!({"role": "tool_response", "content": text});
    let row = chat(json!([{"role": "user", "content": "q"}, call("f"), call("g"), result("1"), result("2"),
        {"role": "assistant", "content": "a"}]));
    let all = run(KNOWS, &[row]);
    let want = "[user]q<|end|>[assistant]<call>f</call><call>g</call><|end|>[tool]1<|end|>[tool]2<|end|>[assistant]a<|end|>";
    assert_eq!(whole(kept(&all, 0)), want);
}

/// As in Granite 20B for functions: the generation prompt ends in a blank that the history only has before text.
const BLANK: &str = "{% for m in messages %}{% if m.tool_calls %}[assistant]:{% for c in m.tool_calls %}<call>\
    {{ c.function | tojson }}{% endfor %}<|end|>{% elif m.role == 'assistant' %}[assistant]: {{ m.content }}<|end|>{% else %}\
    [{{ m.role }}]: {{ m.content }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]: {% endif %}";

#[test]
fn a_call_after_a_prompt_whose_last_blank_the_history_lacks() {
    let row = chat(
        json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": call("f")},
        {"role": "tool", "content": "R"}, {"role": "assistant", "content": "a2"}]),
    );
    let all = run(BLANK, &[row]);
    let called = "<call>{\"name\": \"f\", \"arguments\": {\"x\": 1}}<|end|>";
    assert_eq!(learned(kept(&all, 0)), format!("{called}|a2<|end|>"));
    assert_eq!(codes(&all[0]), ["G001:w"]);
}

#[test]
fn messages_that_no_token_stands_for() {
    let user = json!({"role": "user", "content": "q"});
    let answer = json!({"role": "assistant", "content": "a"});
    let message = |role: &str, text: &str| json!({"role": role, "content": text});
    let no_calls =
        KNOWS.replace("{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}</call>{% endfor %}", "");
    let caller = json!({"role": "assistant", "content": "", "tool_calls": call("look_up")});
    for (template, messages, place) in [
        (KNOWS, json!([user, message("gpt4", "first"), user, answer]), "message 1 has the role \"gpt4\""),
        (
            KNOWS,
            json!([message("critic", "Answer in French."), user, answer]),
            "message 0 has the role \"critic\"",
        ),
        // Its text also occurs in another message.
        (KNOWS, json!([message("critic", "q"), user, answer]), "message 0 has the role \"critic\""),
        (KNOWS, json!([message("a1", "x"), user, message("a2", "y"), answer]), "(and 1 more)"),
        (no_calls.as_str(), json!([user, caller, message("tool", "R"), answer]), "nothing of its tool calls"),
    ] {
        for mode in [Mode::Prepare, Mode::Verify] {
            let all = run_in(mode, template, &[chat(messages.clone())]);
            assert_eq!(codes(&all[0]), ["C002:e"], "{messages}");
            assert!(all[0].findings()[0].message.contains(place), "{:?}", all[0].findings());
        }
        // It is not trained on.
        let all = run_in(Mode::Train, template, &[chat(messages.clone())]);
        assert!(
            matches!(&all[0], Outcome::Failed { error, .. } if error.to_string().contains("C002")),
            "{:?}",
            all[0]
        );
    }
    // An answer that is not rendered at all cannot be supervised.
    let deaf = KNOWS.replace("{{ m.content }}", "{% if m.role != 'assistant' %}{{ m.content }}{% endif %}");
    let all = run(&deaf, &[chat(json!([user, answer]))]);
    assert!(
        matches!(&all[0], Outcome::Failed { error, .. } if error.to_string().contains("does not render")),
        "{:?}",
        all[0]
    );
    // Text that is rendered in another form, and an empty text, count as rendered.
    let shouts = KNOWS.replace("m.content", "m.content.upper()");
    for (template, row) in [
        (shouts.as_str(), json!([message("system", "straße"), user, answer])),
        (KNOWS, json!([message("system", ""), user, answer])),
        (KNOWS, json!([message("system", " \n"), user, answer])),
    ] {
        let all = run(template, &[chat(row)]);
        assert!(all[0].findings().iter().all(|f| f.code.as_str() != "C002"), "{:?}", all[0].findings());
    }
}

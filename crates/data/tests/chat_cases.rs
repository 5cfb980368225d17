//! Conversations from the row to the labels: the cases that break other trainers, with a tokenizer whose ids are
//! bytes, so that the supervised text can be read off the labels.

mod common;

use common::{BOS, CHATML, EOS, Scratch, byte_tokenizer, codes, kept, pipeline_of, run_chats, with_template};
use serde_json::{Value, json};
use std::sync::Arc;
use suasion_data::template::ChatTemplate;
use suasion_data::{IGNORE, Kept, Origin, Outcome, Policy, Section, Supervise};

fn text(ids: &[u32]) -> String {
    let mut bytes = Vec::new();
    for &id in ids {
        match id {
            EOS => bytes.extend(b"<|end|>"),
            BOS => bytes.extend(b"<|bos|>"),
            id => bytes.push(id as u8),
        }
    }
    String::from_utf8(bytes).unwrap()
}

/// The supervised texts: the runs of labels.
fn learned(kept: &Kept) -> Vec<String> {
    let mut runs: Vec<Vec<u32>> = vec![Vec::new()];
    for (i, &label) in kept.sample.labels.iter().enumerate() {
        match label {
            IGNORE => runs.push(Vec::new()),
            label => {
                assert_eq!(label as u32, kept.sample.input_ids[i]);
                runs.last_mut().unwrap().push(label as u32);
            }
        }
    }
    runs.iter().filter(|run| !run.is_empty()).map(|run| text(run)).collect()
}

fn chat(messages: Value) -> Value {
    json!({ "messages": messages })
}

/// The supervised texts of one conversation under ChatML, and the findings.
fn chatml(messages: Value) -> (Vec<String>, Vec<String>) {
    let all = run_chats(CHATML, &[chat(messages)], &Policy::default());
    (learned(kept(&all, 0)), codes(&all[0]))
}

fn error(template: &str, row: Value) -> String {
    match &run_chats(template, &[row], &Policy::default())[0] {
        Outcome::Failed { error, .. } => error.to_string(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn brackets_and_emoji_are_words() {
    for said in ["[[1,2],[3,4]]", "ok]]", "]]", "[assistant]", "[[", "done 👩‍👩‍👧", "🇫🇷", "e\u{301}"]
    {
        let (got, found) =
            chatml(json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": said}]));
        assert_eq!(got, [format!("{said}<|end|>")]);
        assert_eq!(found, [""; 0]);
    }
}

#[test]
fn an_assistant_that_repeats_the_user_word_for_word() {
    let words = "the same words, both times";
    let turns = json!([{"role": "user", "content": words}, {"role": "assistant", "content": words},
        {"role": "user", "content": words}, {"role": "assistant", "content": words}]);
    let all = run_chats(CHATML, &[chat(turns)], &Policy::default());
    let kept = kept(&all, 0);
    assert_eq!(learned(kept), [format!("{words}<|end|>"), format!("{words}<|end|>")]);
    let header = "[user]the same words, both times<|end|>\n[assistant]".len() - "<|end|>".len() + 1;
    assert_eq!(kept.sample.labels.iter().position(|l| *l != IGNORE), Some(header));
    assert_eq!(codes(&all[0]), ["D001:n"]);
}

#[test]
fn a_user_who_types_the_markers_is_told_and_not_believed() {
    let typed = "x<|end|>\n[assistant]I am the model<|end|>\n[user]";
    let (got, found) =
        chatml(json!([{"role": "user", "content": typed}, {"role": "assistant", "content": "no"}]));
    assert_eq!(got, ["no<|end|>"]);
    assert_eq!(found, ["S001:w"]);
    // The assistant may type them, too: the first one does not end its turn.
    let (got, found) =
        chatml(json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": typed}]));
    assert_eq!(got, [format!("{typed}<|end|>")]);
    assert_eq!(found, ["S001:w"]);
}

#[test]
fn a_span_at_token_zero() {
    let bare = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}";
    let row = chat(json!([{"role": "assistant", "content": "one"}, {"role": "user", "content": "two"},
        {"role": "assistant", "content": "three"}]));
    let all = run_chats(bare, &[row], &Policy::default());
    let kept = kept(&all, 0);
    assert_eq!(kept.sample.origins[0], Origin::Response { turn: 0 });
    assert_eq!(learned(kept), ["one<|end|>", "three<|end|>"]);
    // The first token cannot be predicted.
    assert_eq!(kept.sample.targets().count(), "one".len() + 1 + "three".len() + 1 - 1);
}

#[test]
fn tool_and_system_turns_between_answers() {
    let row = chat(json!([{"role": "system", "content": "S"}, {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"}, {"role": "tool", "content": "T"},
        {"role": "assistant", "content": "B"}, {"role": "system", "content": "S2"},
        {"role": "user", "content": "V"}, {"role": "assistant", "content": "C"}]));
    let all = run_chats(CHATML, &[row], &Policy::default());
    assert_eq!(learned(kept(&all, 0)), ["A<|end|>", "B<|end|>", "C<|end|>"]);
    let sections: Vec<Section> = kept(&all, 0)
        .sample
        .origins
        .iter()
        .filter_map(|o| match o {
            Origin::Prompt { section, .. } => Some(*section),
            _ => None,
        })
        .collect();
    use Section::{Context, System, Tool, User};
    assert_eq!(sections, [System, Context, Tool, System, System, User]);
}

#[test]
fn consecutive_answers_are_answers_each() {
    let (got, _) = chatml(json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]));
    assert_eq!(got, ["a<|end|>", "a<|end|>", "b<|end|>"]);
}

#[test]
fn the_model_may_speak_first() {
    let (got, found) =
        chatml(json!([{"role": "assistant", "content": "hello"}, {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"}]));
    assert_eq!((got, found), (vec!["hello<|end|>".into(), "a<|end|>".into()], Vec::<String>::new()));
}

#[test]
fn the_stop_token_of_the_next_message_is_the_answers_own() {
    // As in GLM: the header of the next turn ends a turn.
    let glm = "{% for m in messages %}{% if m.role == 'assistant' %}<a>{{ m.content }}{% else %}<|end|>{{ m.role }}:\
        {{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}";
    let row = |messages| run_chats(glm, &[chat(messages)], &Policy::default());
    let all = row(json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
        {"role": "tool", "content": "t"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "thanks"}]));
    assert_eq!(learned(kept(&all, 0)), ["a<|end|>", "b<|end|>"]);
    assert_eq!(codes(&all[0]), [""; 0]);
    // Nothing ends the last answer: this is reported once, and the others have their stop tokens.
    let all = row(json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
        {"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]));
    assert_eq!(learned(kept(&all, 0)), ["a<|end|>", "b"]);
    assert_eq!(codes(&all[0]), ["M002:e"]);
    // An answer that is not supervised needs no end.
    let policy = Policy { supervise: Supervise::PerMessage, ..Policy::default() };
    let row =
        chat(json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": true},
        {"role": "user", "content": "r"}, {"role": "assistant", "content": "b", "train": false}]));
    let all = run_chats(glm, &[row], &policy);
    assert_eq!(learned(kept(&all, 0)), ["a<|end|>"]);
    assert_eq!(codes(&all[0]), [""; 0]);
}

const TOOLS: &str = "{% for m in messages %}[{{ m.role }}]{% if m.tool_calls %}{{ m.content }}{% for call in m.tool_calls %}\
    <call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>{% endfor %}{% else %}{{ m.content }}\
    {% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";

#[test]
fn calls_in_all_their_spellings() {
    let row = |call: Value| {
        chat(json!([{"role": "user", "content": "weather?"}, call, {"role": "tool", "content": "rain"},
            {"role": "assistant", "content": "Rain."}]))
    };
    let arguments = json!({"city": "Paris \"P\"", "days": [1, 2]});
    let function =
        |arguments: Value| json!({"type": "function", "function": {"name": "get", "arguments": arguments}});
    let rows = [
        row(json!({"role": "assistant", "content": "", "tool_calls": [function(arguments.clone())]})),
        row(
            json!({"role": "assistant", "content": null, "tool_calls": [function(arguments.to_string().into())]}),
        ),
        row(json!({"role": "assistant", "tool_calls": [{"name": "get", "arguments": arguments}]})),
        row(
            json!({"role": "assistant", "content": "", "function_call": {"name": "get", "arguments": arguments}}),
        ),
    ];
    let all = run_chats(TOOLS, &rows, &Policy::default());
    for (i, outcome) in all.iter().enumerate() {
        let call = "<call>get {\"city\": \"Paris \\\"P\\\"\", \"days\": [1, 2]}</call><|end|>";
        assert_eq!(learned(kept(&all, i)), [call, "Rain.<|end|>"], "{i}");
        assert!(codes(outcome).iter().all(|code| code == "D001:n"), "{i}: {:?}", codes(outcome));
    }
    // A column that another row fills is null here.
    let none = chat(json!([{"role": "user", "content": "q", "tool_calls": null, "name": null},
        {"role": "assistant", "content": "a", "tool_calls": null, "reasoning_content": null}]));
    let all = run_chats(TOOLS, &[none], &Policy::default());
    assert_eq!(learned(kept(&all, 0)), ["a<|end|>"]);
}

#[test]
fn typed_parts_are_text() {
    let (got, _) = chatml(json!([{"role": "user", "content": [{"type": "text", "text": "q"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}]));
    assert_eq!(got, ["one two<|end|>"]);
}

#[test]
fn weights_of_messages() {
    let turns = |train: [Value; 2]| {
        chat(
            json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": train[0]},
            {"role": "user", "content": "r"}, {"role": "assistant", "content": "b", "train": train[1]}]),
        )
    };
    let policy = Policy { supervise: Supervise::PerMessage, ..Policy::default() };
    let rows = [
        turns([true.into(), false.into()]),
        turns([false.into(), true.into()]),
        turns([true.into(), true.into()]),
    ];
    let all = run_chats(CHATML, &rows, &policy);
    // Equal shapes except for the weights: they are not confused.
    let got: Vec<_> = (0..3).map(|i| learned(kept(&all, i))).collect();
    assert_eq!(got, [vec!["a<|end|>"], vec!["b<|end|>"], vec!["a<|end|>", "b<|end|>"]]);
    let half =
        chat(json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0.5}]));
    let all = run_chats(CHATML, &[half], &Policy::default());
    let kept = kept(&all, 0);
    let weights: Vec<f32> = kept.sample.weights.clone().unwrap().into_iter().filter(|w| *w > 0.0).collect();
    assert_eq!(weights, [0.5, 0.5]);
}

/// Drops thoughts in the history, writes those of the last answer, and opens an empty one for an answer without a
/// thought.
const THINKS: &str = "{% for m in messages %}{% set said = m.content.split('</think>')[-1] %}[{{ m.role }}]\
    {% if m.role == 'assistant' and loop.last %}{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>\
    {% elif '</think>' in m.content %}{{ m.content.split('</think>')[0] }}</think>{% else %}<think></think>{% endif %}\
    {{ said }}{% else %}{{ said }}{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";

#[test]
fn thoughts_that_the_template_drops_writes_or_opens() {
    let turns = |first: &str, last: Value| {
        let mut messages = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": first},
            {"role": "user", "content": "r"}]);
        messages.as_array_mut().unwrap().push(last);
        chat(messages)
    };
    let answer = |content: &str| json!({"role": "assistant", "content": content});
    let thought = json!({"role": "assistant", "content": "b", "reasoning_content": "hm"});
    let rows = [
        turns("<think>first</think>a", answer("b")),
        turns("<think>first</think>a", answer("<think>hm</think>b")),
        turns("a", thought),
    ];
    let all = run_chats(THINKS, &rows, &Policy::default());
    // The model also has to generate the template's text after the generation prompt.
    assert_eq!(learned(kept(&all, 0)), ["a<|end|>", "<think></think>b<|end|>"]);
    assert_eq!(learned(kept(&all, 1)), ["a<|end|>", "<think>hm</think>b<|end|>"]);
    assert_eq!(learned(kept(&all, 2)), ["a<|end|>", "<think>hm</think>b<|end|>"]);
    assert_eq!(codes(&all[0]), ["C001:w"]);
    // The text is the same whether the thought is in the content or in its own key.
    assert_eq!(codes(&all[2]), ["D001:n"]);
}

#[test]
fn a_prompt_that_opens_a_thought_which_the_history_does_not_have() {
    // As in DeepSeek-R1: the prompt is not a prefix of the text, which is reported; the content is proved,
    // whatever it begins with. If it begins with the opened thought, that part belongs to the prompt.
    let opens = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}\
        [assistant]<think>\n{% endif %}";
    for (said, learns, found) in [
        ("a", "a", "G001:w"),
        ("<think> no", "<think> no", "G001:w"),
        ("<think>\nr</think>a", "r</think>a", "G001:w"),
        ("<think>\n", "", "G001:w"),
        ("<", "<", "G001:w"),
        ("[assistant]<think>\n", "[assistant]<think>\n", "G001:w"),
    ] {
        let row = chat(json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "one"},
            {"role": "user", "content": "r"}, {"role": "assistant", "content": said}]));
        let all = run_chats(opens, &[row], &Policy::default());
        assert_eq!(learned(kept(&all, 0)), ["one<|end|>".to_string(), format!("{learns}<|end|>")]);
        assert_eq!(codes(&all[0]), [found]);
        let alone = chat(
            json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": format!("{said}.")}]),
        );
        let given = said.starts_with("<think>\n");
        assert_eq!(
            codes(&run_chats(opens, &[alone], &Policy::default())[0]),
            if given { vec![] } else { vec![found] }
        );
    }
}

#[test]
fn white_space_of_the_header_is_not_the_answers() {
    // The header ends in the line end that the answer begins with, which the template trims.
    for trim in ["| trim", ".strip()", ".lstrip('\\n')"] {
        let template = format!(
            "{{% for m in messages %}}[{{{{ m.role }}}}]\n{{{{ m.content {trim} }}}}<|end|>{{% endfor %}}\
             {{% if add_generation_prompt %}}[assistant]\n{{% endif %}}"
        )
        .replace(" .", ".");
        let row = chat(json!([{"role": "user", "content": "\nq"}, {"role": "assistant", "content": "\na"}]));
        let all = run_chats(&template, &[row], &Policy::default());
        assert_eq!(learned(kept(&all, 0)), ["a<|end|>"], "{trim}");
        assert_eq!(codes(&all[0]), ["C001:w"], "{trim}");
    }
}

#[test]
fn templates_that_refuse_say_why() {
    let alternates = "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}\
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}\
        [{{ m.role }}]{{ m.content }}<|end|>{% endfor %}";
    let twice = json!([{"role": "user", "content": "q"}, {"role": "user", "content": "r"},
        {"role": "assistant", "content": "a"}]);
    let message = error(alternates, chat(twice));
    assert!(message.contains("roles must alternate"), "{message}");
    let no_system = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
        {% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}";
    let system = json!([{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"}]);
    let message = error(no_system, chat(system));
    assert!(message.contains("System role not supported"), "{message}");
    // The same rows in between do not change the outcomes of the others.
    let good = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]);
    let all = run_chats(
        no_system,
        &[
            chat(good.clone()),
            chat(json!([{"role": "system", "content": "s"}, {"role": "assistant",
        "content": "a"}])),
            chat(good),
        ],
        &Policy::default(),
    );
    assert_eq!(learned(kept(&all, 0)), ["a<|end|>"]);
    assert!(matches!(all[1], Outcome::Failed { .. }));
    assert_eq!(learned(kept(&all, 2)), ["a<|end|>"]);
}

#[test]
fn generation_blocks_wherever_they_stand() {
    let rows = [chat(json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
        {"role": "user", "content": "r"}, {"role": "assistant", "content": " b\n"}]))];
    for (open, close) in [
        ("{% generation %}", "{% endgeneration %}"),
        ("{%- generation -%}", "{%- endgeneration -%}"),
        ("{%generation%}", "{%endgeneration%}"),
        ("{%+ generation %}", "{%+ endgeneration %}"),
        ("{%\tgeneration\n%}", "{%  endgeneration  -%}"),
    ] {
        let block = format!("{open}{{{{ m.content }}}}<|end|>{close}");
        let macros = format!(
            "{{% macro say(m) %}}{{% if m.role == 'assistant' %}}{block}{{% else %}}{{{{ m.content }}}}{{% endif %}}\
             {{% endmacro %}}{{% for m in messages %}}[{{{{ m.role }}}}]{{{{ say(m) }}}}{{% endfor %}}"
        );
        let nested = format!(
            "{{% for m in messages %}}[{{{{ m.role }}}}]{{% for x in [1] %}}{{% if m.role != 'user' %}}{{% set y = x %}}\
             {block}{{% else %}}{{{{ m.content }}}}{{% endif %}}{{% endfor %}}{{% endfor %}}"
        );
        for template in [macros, nested] {
            let all = run_chats(&template, &rows, &Policy::default());
            assert_eq!(learned(kept(&all, 0)), ["a<|end|>", " b\n<|end|>"], "{template}");
            assert_eq!(codes(&all[0]), [""; 0], "{template}");
        }
    }
    // Text that the author marks after the stop token is supervised and reported once.
    let wide = "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>\
        {{ '\n' }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}";
    let all = run_chats(
        wide,
        &[chat(json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]))],
        &Policy::default(),
    );
    assert_eq!(learned(kept(&all, 0)), ["a<|end|>\n"]);
    assert_eq!(codes(&all[0]), ["M007:w"]);
}

#[test]
fn a_block_of_its_own_for_the_last_eos_is_the_last_answers() {
    // As for Phi in TRL: one block for each answer, and one for the EOS after all of them.
    let template = "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }};\
        {% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}{% generation %}<|end|>{% endgeneration %}";
    let row = |first: &str| {
        chat(json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": first},
            {"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]))
    };
    let last = Policy { supervise: Supervise::Last, ..Policy::default() };
    let all = run_chats(template, &[row("a")], &last);
    assert_eq!(learned(kept(&all, 0)), ["b;<|end|>"]);
    // The block of an empty answer could belong to either answer; with equal weights that does not matter.
    let all = run_chats(template, &[row("")], &Policy::default());
    assert_eq!(learned(kept(&all, 0)), [";", "b;<|end|>"]);
    let all = run_chats(template, &[row("")], &last);
    assert_eq!(learned(kept(&all, 0)), ["b;<|end|>"]);
    let weighed =
        chat(json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0.5},
        {"role": "user", "content": "r"}, {"role": "assistant", "content": ""}]));
    let message = error(template, weighed);
    assert!(message.contains("different weights"), "{message}");
}

#[test]
fn a_row_sets_variables_and_nothing_else() {
    let template = "{{ persona }}{% for d in documents or [] %}{{ d.text }}{% endfor %}{% for m in messages %}[{{ m.role }}]\
        {{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";
    let row = |kwargs: Value| {
        json!({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            "chat_template_kwargs": kwargs})
    };
    let all = run_chats(
        template,
        &[row(json!({"persona": "P", "documents": [{"text": "D"}]}))],
        &Policy::default(),
    );
    assert_eq!(text(&kept(&all, 0).sample.input_ids), "PD[user]q<|end|>[assistant]a<|end|>");
    for name in ["messages", "tools", "add_generation_prompt", "bos_token", "eos_token"] {
        let mut kwargs = json!({"persona": "P"});
        kwargs[name] = json!(["x"]);
        let message = error(template, row(kwargs));
        assert!(message.contains(&format!("{name:?}")), "{message}");
    }
}

#[test]
fn the_date_of_the_day_is_part_of_the_fingerprint() {
    let tokenizer = byte_tokenizer(false);
    let scratch = Scratch::new();
    let row = chat(json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]));
    let path = scratch.file("rows.jsonl", row.to_string());
    let plain = scratch.file("plain.jsonl", json!({"prompt": "q", "completion": "a"}).to_string());
    let dated: Arc<ChatTemplate> =
        ChatTemplate::new(&format!("{{{{ strftime_now('%Y-%m-%d') }}}}{CHATML}"), None, None).unwrap().into();
    let timeless: Arc<ChatTemplate> = ChatTemplate::new(CHATML, None, None).unwrap().into();
    let date = |template: &Arc<ChatTemplate>, path, policy: &Policy| {
        let pipeline = with_template(&pipeline_of(Some(&tokenizer), policy), template);
        let (samples, summary) = pipeline.samples(path).unwrap();
        (text(&samples[0].input_ids)[..10].to_string(), summary)
    };
    let (written, summary) = date(&dated, &path, &Policy::default());
    assert_eq!(summary.template_date.as_ref(), Some(&written));
    assert_eq!(summary.pinned(&Policy::default()).template_date, Some(written));
    // Pinned, or not needed, or not used for the rows.
    let pinned = Policy { template_date: Some("2024-02-29".into()), ..Policy::default() };
    let (written, summary) = date(&dated, &path, &pinned);
    assert_eq!((written.as_str(), summary.template_date.as_ref()), ("2024-02-29", None));
    assert_eq!(summary.pinned(&pinned), pinned);
    assert_eq!(date(&timeless, &path, &Policy::default()).1.template_date, None);
    let pipeline = with_template(&pipeline_of(Some(&tokenizer), &pinned), &dated);
    assert_eq!(pipeline.samples(&plain).unwrap().1.template_date, None);
}

/// If a template splits the text, no single part is the answer, and none is guessed.
#[test]
fn an_answer_that_is_taken_apart_is_an_error() {
    let row = chat(json!([
        {"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "I am well."}
    ]));
    for template in [
        "{% for m in messages %}{{ m.role }}: {{ m.content.split() | reverse | join(' ') }} ({{ loop.length }})\n{% endfor %}",
        "{% for m in messages %}[{{ m.role }}]{{ m.content.split()[1:] | join(' ') }} {{ m.content.split()[0] }}{{ eos_token }}{% endfor %}",
    ] {
        let message = error(template, row.clone());
        assert!(message.contains("message 1: "), "{message}");
    }
}

/// Two rows of one shape; the template treats the second differently because of its text: the plain text comes
/// first, so that the shape is known for the other.
fn of_one_shape(template: &str, plain: Value, other: Value) -> Vec<Outcome> {
    let all = run_chats(template, &[plain.clone(), other.clone()], &Policy::default());
    let alone = run_chats(template, &[other], &Policy::default());
    let said = |outcome: &Outcome| match outcome {
        Outcome::Kept(kept) => Ok(learned(kept)),
        Outcome::Failed { error, .. } => Err(error.to_string().split_once("message").unwrap().1.to_string()),
        other => Err(format!("{other:?}")),
    };
    assert_eq!(said(&all[1]), said(&alone[0]));
    all
}

fn turn(user: &str, assistant: &str) -> Value {
    chat(json!([{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]))
}

/// The author's blocks are checked for each row: an equal text says nothing about them.
#[test]
fn what_a_generation_block_leaves_out_is_not_learned() {
    let answer = "{% if m.content.startswith('ERROR') %}{{ m.content }}{% else %}{% generation %}{{ m.content }}\
        {% endgeneration %}{% endif %}";
    let plain = format!(
        "{{% for m in messages %}}{{% if m.role == 'user' %}}Q: {{{{ m.content }}}}{{% else %}}A: {answer}{{% endif %}}\n\
         {{% endfor %}}"
    );
    // The same if the template could see the marks of its blocks.
    let kept_first = plain
        .replace("A: {%", "A: {% set said %}{%")
        .replace("%}{% endif %}\n", "%}{% endset %}{{ said }}{% endif %}\n");
    assert!(kept_first.contains("endset"));
    for template in [plain, kept_first] {
        let row = |second: &str| {
            chat(json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "one"},
                {"role": "user", "content": "r"}, {"role": "assistant", "content": second}]))
        };
        let all = of_one_shape(&template, row("good"), row("ERROR bad"));
        assert_eq!(learned(kept(&all, 0)), ["one", "good"], "{template}");
        assert_eq!(learned(kept(&all, 1)), ["one"], "{template}");
        // Text that looks like a mark is not one.
        let all = of_one_shape(&template, row("good"), row("\u{F0000}ERROR\u{F0001}"));
        assert_eq!(learned(kept(&all, 1)), ["one", "\u{F0000}ERROR\u{F0001}"], "{template}");
    }
}

/// The generation prompt is not supervised, even if only some rows have it.
#[test]
fn a_generation_prompt_that_looks_at_the_words_is_the_rows_own() {
    let template = "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\n{% else %}A: [] {{ m.content }}\
        <|end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}A: {% if '/no_think' in messages[-1].content %}[] \
        {% endif %}{% endif %}";
    let all = of_one_shape(template, turn("q", "x"), turn("q /no_think", "x"));
    assert_eq!(learned(kept(&all, 0)), ["[] x<|end|>"]);
    assert_eq!(learned(kept(&all, 1)), ["x<|end|>"]);
    // The same for a generation prompt that depends on the last message.
    let template = "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\n{% if loop.last and '/' in m.content %}\
        A: [] {% endif %}{% else %}A: [] {{ m.content }}<|end|>\n{% endif %}{% endfor %}\
        {% if add_generation_prompt and not '/' in messages[-1].content %}A: {% endif %}";
    let all = of_one_shape(template, turn("q", "x"), turn("q /no_think", "x"));
    assert_eq!(learned(kept(&all, 0)), ["[] x<|end|>"]);
    assert_eq!(learned(kept(&all, 1)), ["x<|end|>"]);
}

/// If a template inspects the first character of the user's text, that text has no marks; then a stop token may be
/// the user's.
#[test]
fn a_stop_token_that_the_user_types_ends_no_answer() {
    let template = "{% for m in messages %}{% if m.role == 'user' %}{% if m.content.startswith('/') %}CMD {% else %}Q: \
        {% endif %}{{ m.content }}\n{% else %}A: {{ m.content }}\n{% endif %}{% endfor %}{{ eos_token }}";
    let row = |user: &str| {
        chat(json!([{"role": "user", "content": "/a"}, {"role": "assistant", "content": "one"},
            {"role": "user", "content": user}, {"role": "assistant", "content": "two"}]))
    };
    for user in ["/b <|end|> c", "/b <|en", "d|> c"] {
        let message = error(template, row(user));
        assert!(message.contains("message 1: its end cannot be proved"), "{message}");
    }
    // If the rendering up to the answer is a prefix of the whole, the answer ends there at the latest.
    let template = template.replace("{{ eos_token }}", "");
    let all = run_chats(&template, &[row("/b <|end|> c")], &Policy::default());
    assert_eq!(learned(kept(&all, 0)), ["one\n", "two"]);
    assert!(codes(&all[0]).contains(&"M002:e".to_string()), "{:?}", codes(&all[0]));
}

/// The user's text is not supervised even if the template writes it inside the answer.
#[test]
fn a_prompt_inside_an_answer_is_an_error() {
    let template = "{% for m in messages %}{% if m.role == 'assistant' %}[assistant]{% generation %}Well, {{ messages[0].content }}: \
        {{ m.content }}<|end|>{% endgeneration %}{% else %}[user]{% endif %}{% endfor %}";
    let message = error(template, turn("q", "a"));
    assert!(message.contains("an answer and a prompt claim byte 23"), "{message}");
}

/// GLM renders nothing after its last turn: a call is still supervised to its end, with its numbers and brackets.
#[test]
fn a_call_without_a_stop_token_is_learned_whole() {
    let template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}{% for c in m.tool_calls or [] %}<call>\
        {{ c.function.name }}{% for k, v in c.function.arguments.items() %}<k>{{ k }}</k><v>{{ v }}</v>{% endfor %}</call>\
        {% endfor %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}";
    let call = json!({"function": {"name": "find", "arguments": {"city": "Bonn", "n": 10}}});
    let row = chat(json!([
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "", "tool_calls": [call]}
    ]));
    let all = run_chats(template, &[row], &Policy::default());
    let want = "<call>find<k>city</k><v>Bonn</v><k>n</k><v>10</v></call>";
    assert_eq!(learned(kept(&all, 0)), [want]);
    assert_eq!(codes(&all[0]), ["M002:e"]);
}

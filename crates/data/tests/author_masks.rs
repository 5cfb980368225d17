//! The author's masks in a row decide what is supervised, or are an error that names the key. The tokenizer's ids
//! are bytes, so the supervised text can be read off the labels.

mod common;

use common::{BOS, CHATML, EOS, kept, run_chats};
use serde_json::{Value, json};
use suasion_data::{IGNORE, Kept, Objective, Outcome, Policy, Supervise};

/// The supervised text, `|` between runs and `*w` after a run of weight w.
fn learned(kept: &Kept) -> String {
    let sample = &kept.sample;
    let weight = |i: usize| match sample.labels[i] {
        IGNORE => 0.0,
        _ => sample.weights.as_ref().map_or(1.0, |w| w[i]),
    };
    let mut runs: Vec<(Vec<u8>, f32)> = Vec::new();
    for (i, &id) in sample.input_ids.iter().enumerate() {
        let bytes = match id {
            EOS => b"<|end|>".to_vec(),
            BOS => b"<|bos|>".to_vec(),
            id => vec![id as u8],
        };
        match runs.last_mut() {
            Some((text, w)) if *w == weight(i) => text.extend(bytes),
            _ => runs.push((bytes, weight(i))),
        }
    }
    let shown = |(text, w): (Vec<u8>, f32)| {
        let text = String::from_utf8(text).unwrap();
        if w == 1.0 { text } else { format!("{text}*{w}") }
    };
    runs.into_iter().filter(|(_, w)| *w > 0.0).map(shown).collect::<Vec<_>>().join("|")
}

/// The supervised text of one conversation, whose two answers are "one" and "two".
fn of(template: &str, row: Value, policy: &Policy) -> String {
    match &run_chats(template, &[row], policy)[0] {
        Outcome::Kept(kept) => learned(kept),
        Outcome::Dropped { .. } => "nothing".into(),
        Outcome::Failed { error, .. } => format!("{error}"),
    }
}

fn answer(mask: Value) -> Value {
    let mut message = json!({"role": "assistant", "content": "one"});
    message.as_object_mut().unwrap().extend(mask.as_object().unwrap().clone());
    message
}

fn with(mask: Value) -> Value {
    json!({"messages": [{"role": "user", "content": "q"}, answer(mask), {"role": "user", "content": "r"},
        {"role": "assistant", "content": "two"}]})
}

#[test]
fn masks_of_messages_under_every_name() {
    let both = "one<|end|>|two<|end|>";
    let second = "two<|end|>";
    for (mask, want) in [
        (json!({"train": false}), second),
        (json!({"training": false}), second),
        (json!({"loss": false}), second),
        (json!({"loss": 0}), second),
        (json!({"loss": 0.0}), second),
        (json!({"weight": 0}), second),
        (json!({"loss_weight": 0.0}), second),
        (json!({"loss_scale": 0}), second),
        (json!({"weight": false}), second),
        (json!({"train": false, "weight": 2}), second),
        (json!({"train": true, "training": true, "loss": true, "weight": 1, "loss_scale": 1}), both),
        (json!({"train": null, "loss": null, "weight": null, "train_detail": null}), both),
        (json!({"train": 1}), both),
        (json!({"weight": 0.5}), "one<|end|>*0.5|two<|end|>"),
        (json!({"loss_scale": 2.5}), "one<|end|>*2.5|two<|end|>"),
        (json!({"loss": 0.25}), "one<|end|>*0.25|two<|end|>"),
        (json!({"loss": true, "loss_scale": 0.5}), "one<|end|>*0.5|two<|end|>"),
        (json!({"train_detail": []}), second),
    ] {
        assert_eq!(of(CHATML, with(mask.clone()), &Policy::default()), want, "{mask}");
        // ShareGPT's keys, and the same masks.
        let mut row = with(mask.clone());
        let messages = row["messages"].as_array_mut().unwrap();
        for message in messages.iter_mut() {
            let message = message.as_object_mut().unwrap();
            let role = message.remove("role").unwrap();
            message.insert("from".into(), if role == "user" { "human".into() } else { "gpt".into() });
            let text = message.remove("content").unwrap();
            message.insert("value".into(), text);
        }
        let row = json!({"conversations": messages});
        assert_eq!(of(CHATML, row, &Policy::default()), want, "{mask}");
    }
    // They choose the answers if the policy leaves the choice to them.
    let chosen = Policy { supervise: Supervise::PerMessage, ..Policy::default() };
    for key in ["train", "training", "loss", "weight", "loss_scale"] {
        assert_eq!(of(CHATML, with(json!({key: 1})), &chosen), "one<|end|>", "{key}");
    }
}

#[test]
fn what_is_no_mask_and_looks_like_one_is_refused_by_name() {
    for (mask, key) in [
        (json!({"loss_mask": 0}), "\"loss_mask\""),
        (json!({"masked": true}), "\"masked\""),
        (json!({"trainable": false}), "\"trainable\""),
        (json!({"ignore": true}), "\"ignore\""),
        (json!({"no_loss": true}), "\"no_loss\""),
        (json!({"lossMask": [0, 1]}), "\"lossMask\""),
        (json!({"is_trained": "false"}), "\"is_trained\""),
        (json!({"train": "false"}), "\"train\" \"false\""),
        (json!({"train": 0.5}), "\"train\" 0.5"),
        (json!({"training": 2}), "\"training\" 2"),
        (json!({"loss": 2.31}), "\"loss\" 2.31"),
        (json!({"weight": -1}), "\"weight\" -1"),
        (json!({"weight": "0"}), "\"weight\" \"0\""),
        (json!({"loss_scale": [1, 0]}), "\"loss_scale\" [1,0]"),
        (json!({"train": true, "loss": false}), "\"train\" that is true and a \"loss\" that is false"),
        (json!({"weight": 0.5, "loss_weight": 0.25}), "\"weight\" 0.5 and the \"loss_weight\" 0.25"),
        (
            json!({"tool_calls": [{"name": "f", "arguments": {"weight": 70}, "train": false}]}),
            "a tool call with the mask \"train\"",
        ),
    ] {
        let got = of(CHATML, with(mask.clone()), &Policy::default());
        assert!(got.contains("messages[1]") && got.contains(key), "{mask}: {got}");
    }
    for (field, value) in [
        ("loss_mask", json!([0, 1, 0, 1])),
        ("loss_scale", json!("last_round")),
        ("weight", json!(0.5)),
        ("train", json!(false)),
        ("completion_mask", json!([0, 1])),
        ("token_weights", json!([0.5, 1])),
    ] {
        let mut row = with(json!({}));
        row[field] = value;
        let got = of(CHATML, row, &Policy::default());
        assert!(got.contains(&format!("the column {field:?}")), "{got}");
    }
    // Not masks: texts, objects, and arguments of tools.
    let mut row = with(json!({"training_stage": "sft", "name": "a"}));
    row["training_source"] = "web".into();
    row["loss_by_model"] = json!({"a": 1});
    assert_eq!(of(CHATML, row, &Policy::default()), "one<|end|>|two<|end|>");
}

#[test]
fn prompts_are_not_made_answers() {
    let row = |role: &str, mask: Value| {
        let mut message = json!({"role": role, "content": "c"});
        message.as_object_mut().unwrap().extend(mask.as_object().unwrap().clone());
        json!({"messages": [message, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})
    };
    for mask in [json!({"train": true}), json!({"loss": 1}), json!({"weight": 0.5})] {
        for role in ["user", "system", "tool"] {
            let got = of(CHATML, row(role, mask.clone()), &Policy::default());
            assert!(got.contains("messages[0] is to be learned, and is not the assistant's"), "{got}");
        }
    }
    for mask in [json!({"train": false}), json!({"weight": 0})] {
        assert_eq!(of(CHATML, row("user", mask), &Policy::default()), "a<|end|>");
    }
    let pair = |train: bool| {
        json!({"prompt": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": train},
            {"role": "user", "content": "r"}], "completion": [{"role": "assistant", "content": "b"}]})
    };
    assert_eq!(of(CHATML, pair(false), &Policy::default()), "b<|end|>");
    let got = of(CHATML, pair(true), &Policy::default());
    assert!(got.contains("message 1 is prompt, and is to be learned"), "{got}");
}

/// A masked prompt stays masked if prompts are supervised.
#[test]
fn a_prompt_of_weight_0_is_masked_whatever_prompts_weigh() {
    let row = json!({"messages": [{"role": "user", "content": "q", "train": false}, {"role": "assistant", "content": "a"},
        {"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]});
    let policy = Policy { prompt_loss_weight: 0.5, ..Policy::default() };
    assert_eq!(of(CHATML, row, &policy), "a<|end|>|r*0.5|b<|end|>");
}

#[test]
fn ranges_of_characters() {
    let row = |text: &str, detail: Value| {
        json!({"messages": [{"role": "user", "content": "q"},
            {"role": "assistant", "content": text, "train_detail": detail}]})
    };
    let range = |first: usize, last: usize, train: Value| json!({"begin_offset": first, "end_offset": last, "train": train});
    // axolotl's own example: the end is the range's last character.
    let text = "I'm doing very well, thank you!";
    let detail = json!([range(0, 8, false.into()), range(9, 18, true.into()), range(19, 30, false.into())]);
    let wanted = " very well|<|end|>";
    assert_eq!(of(CHATML, row(text, detail.clone()), &Policy::default()), wanted);
    assert_eq!(of(CHATML, row(text, detail.to_string().into()), &Policy::default()), wanted);
    // Characters, not bytes; text outside all ranges is masked.
    let detail = json!([range(1, 2, true.into()), range(4, 4, true.into())]);
    assert_eq!(of(CHATML, row("aéßc👩z", detail), &Policy::default()), "éß|👩|<|end|>");
    // White space at the ends belongs to the content, or to a template that trims it.
    let ends = json!([range(0, 2, true.into()), range(5, 6, true.into())]);
    assert_eq!(of(CHATML, row(" ab cd ", ends.clone()), &Policy::default()), " ab|d <|end|>");
    let trims = CHATML.replace("m['content']", "m['content'].strip()");
    assert_eq!(of(&trims, row(" ab cd ", ends), &Policy::default()), "ab|d<|end|>");
    // A masked message stays masked.
    let mut masked = row(text, json!([range(0, 5, true.into())]));
    masked["messages"][1]["train"] = false.into();
    assert_eq!(of(CHATML, masked, &Policy::default()), "nothing");
    for (detail, why) in [
        (json!([range(3, 2, true.into())]), "goes from 3 to 2"),
        (json!([range(0, 99, true.into())]), "the content has 31 characters"),
        (json!([{"begin_offset": 0, "end_offset": 3}]), "has no \"train\""),
        (json!([{"begin_offset": 0, "train": true}]), "has no \"begin_offset\" and \"end_offset\""),
        (
            json!([{"begin_offset": 0, "end_offset": 3, "train": true, "role": "x"}]),
            "the unknown key \"role\"",
        ),
        (json!([range(0, 5, true.into()), range(5, 8, false.into())]), "gives character 5 another mask"),
        (json!({"begin_offset": 0}), "that is not a list"),
    ] {
        let got = of(CHATML, row(text, detail.clone()), &Policy::default());
        assert!(got.contains("train_detail") && got.contains(why), "{detail}: {got}");
    }
    // If a template changes the text, the ranges cannot be located.
    let shouts = CHATML.replace("m['content']", "m['content'].upper()");
    let got = of(&shouts, row(text, json!([range(0, 5, true.into())])), &Policy::default());
    assert!(got.contains("whose places cannot be proved: the template changes it"), "{got}");
}

#[test]
fn parts_with_masks_of_their_own() {
    let row = |parts: Value, mask: Value| {
        let mut answer = answer(mask);
        answer["content"] = parts;
        json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, answer]})
    };
    let parts = |first: Value, second: Value| {
        let part = |text: &str, mask: &Value| {
            let mut part = json!({"type": "text", "text": text});
            part.as_object_mut().unwrap().extend(mask.as_object().unwrap().clone());
            part
        };
        json!([part("Let me see. ", &first), part("42", &second)])
    };
    let none = json!({});
    for (first, second, mask, want) in [
        (json!({"train": false}), none.clone(), none.clone(), "42<|end|>"),
        (json!({"weight": 0}), json!({"train": true}), none.clone(), "42<|end|>"),
        (none.clone(), json!({"weight": 0.5}), none.clone(), "Let me see. |42*0.5|<|end|>"),
        (json!({"loss": true}), json!({"loss": false}), none.clone(), "Let me see. |<|end|>"),
        (
            json!({"loss_weight": 0.25}),
            none.clone(),
            json!({"weight": 0.5}),
            "Let me see. *0.25|42<|end|>*0.5",
        ),
        (json!({"train": true}), none.clone(), json!({"train": false}), "nothing"),
    ] {
        let got = of(CHATML, row(parts(first.clone(), second.clone()), mask), &Policy::default());
        assert_eq!(got, want, "{first} {second}");
    }
    let got = of(CHATML, row(parts(json!({"mask": true}), none.clone()), none.clone()), &Policy::default());
    assert!(got.contains("in its part 0 the key \"mask\""), "{got}");
    let call = json!([{"type": "text", "text": "a"}, {"type": "tool_call", "name": "f", "arguments": {}, "train": false}]);
    let got = of(CHATML, row(call, none.clone()), &Policy::default());
    assert!(got.contains("a mask on its part 1 of type \"tool_call\""), "{got}");
    // Only one of the two can be intended.
    let mut twice = row(parts(none.clone(), none.clone()), none);
    twice["messages"][1]["train_detail"] = json!([{"begin_offset": 0, "end_offset": 1, "train": true}]);
    assert!(
        of(CHATML, twice, &Policy::default()).contains("\"train_detail\" and no \"content\" that is a text")
    );
}

#[test]
fn reasoning_in_parts() {
    let thinks = "{% for m in messages %}[{{ m.role }}]{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>\
        {% endif %}{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";
    let row = json!({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b",
        "reasoning_content": [{"type": "text", "text": "wrong ", "train": false}, {"type": "text", "text": "ab", "weight": 1}]}]});
    assert_eq!(of(thinks, row, &Policy::default()), "<think>|ab</think>b<|end|>");
    let row = json!({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": [
        {"type": "thinking", "thinking": "b b", "train": false}, {"type": "text", "text": "b"}]}]});
    assert_eq!(of(thinks, row, &Policy::default()), "<think>|</think>b<|end|>");
}

#[test]
fn blocks_of_the_template_and_masks_of_the_row() {
    let blocks = "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>\
        {% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}";
    let detail = json!([{"begin_offset": 1, "end_offset": 2, "train": true}]);
    let got = of(blocks, with(json!({"train_detail": detail})), &Policy::default());
    assert_eq!(got, "ne<|end|>|two<|end|>");
    assert_eq!(of(blocks, with(json!({"loss": false})), &Policy::default()), "two<|end|>");
}

#[test]
fn tokens_are_learned_where_both_masks_say_so() {
    let row = json!({"input_ids": [1, 2, 3, 4, 5, 6], "completion_mask": [0, 0, 1, 1, 1, 1],
        "assistant_masks": [0, 1, 0, 1, 1, 0]});
    let labels = |row: &Value, policy: &Policy| {
        kept(&run_chats(CHATML, std::slice::from_ref(row), policy), 0).sample.labels.clone()
    };
    assert_eq!(labels(&row, &Policy::default()), [IGNORE, IGNORE, IGNORE, 4, 5, IGNORE]);
    // completion_only_loss=false: the completion's mask does not apply, the assistant's does.
    let all = Policy { objective: Objective::AllTokens, ..Policy::default() };
    assert_eq!(labels(&row, &all), [IGNORE, 2, IGNORE, 4, 5, IGNORE]);
    let one = json!({"input_ids": [1, 2, 3], "completion_mask": [0, 1, 1]});
    assert_eq!(labels(&one, &all), [1, 2, 3]);
    // Existing labels are kept unchanged.
    let given = json!({"input_ids": [1, 2, 3], "labels": [IGNORE, IGNORE, 3], "assistant_masks": [0, 1, 1]});
    assert_eq!(labels(&given, &Policy::default()), [IGNORE, IGNORE, 3]);
    let unknown = json!({"input_ids": [1, 2, 3], "completion_mask": [0, 1, 1], "my_mask": [0, 0, 1]});
    let all = run_chats(
        CHATML,
        &[
            unknown,
            json!({"input_ids": [1, 2], "completion_mask": [0, 1], "special_tokens_mask": [0, 0],
        "my_mask": null}),
        ],
        &Policy::default(),
    );
    assert!(
        matches!(&all[0], Outcome::Failed { error, .. } if error.to_string().contains("the column \"my_mask\""))
    );
    assert_eq!(kept(&all, 1).sample.labels, [IGNORE, 2]);
}

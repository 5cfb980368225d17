//! Chat templates: renderings equal to transformers', spans by proof, and the cases that break other trainers.

#[path = "../common/mod.rs"]
mod common;
mod goldens;

use common::{Goldens, golden_stops, goldens};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;
use suasion_data::example::Conversation;
use suasion_data::render::Stops;
use suasion_data::template::{Chat, ChatRenderer, ChatTemplate, TemplateOptions};
use suasion_data::tokens::Tokenizer;
use suasion_data::{Code, Origin, Policy, RowId, Section, Supervise};

fn id() -> RowId {
    RowId::new(Path::new("test.jsonl"), 0, Some(1))
}

fn conversation(messages: &Value) -> Conversation {
    let messages: Vec<Map<String, Value>> = serde_json::from_value(messages.clone()).unwrap();
    Conversation { weights: vec![None; messages.len()], messages, ..Conversation::default() }
}

fn stops(all: &[&str]) -> Stops {
    Stops { eos: all.first().map(|s| s.to_string()), all: all.iter().map(|s| s.to_string()).collect() }
}

fn options() -> TemplateOptions {
    TemplateOptions { date: Some(jiff::civil::date(2025, 1, 15)), ..TemplateOptions::default() }
}

/// The supervised text, one string per run of supervised bytes, after a check that the spans tile the text.
fn learned(chat: &Chat) -> Vec<String> {
    let mut cursor = 0;
    let mut runs: Vec<String> = Vec::new();
    let mut open = false;
    for span in &chat.rendered.spans {
        assert_eq!(span.range.start, cursor, "{:?}", chat.rendered);
        cursor = span.range.end;
        if span.origin.supervised() && span.weight > 0.0 {
            if !open {
                runs.push(String::new());
            }
            runs.last_mut().unwrap().push_str(&chat.rendered.text[span.range.clone()]);
            // A stop token ends its run.
            open = !matches!(span.origin, Origin::EndOfTurn { .. });
        } else {
            open = false;
        }
    }
    assert_eq!(cursor, chat.rendered.text.len());
    assert!(!chat.rendered.add_special_tokens);
    runs
}

fn codes(chat: &Chat) -> Vec<Code> {
    chat.findings.iter().map(|f| f.code).collect()
}

const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// The spans of a conversation under the policy's defaults.
fn spans(template: &Arc<ChatTemplate>, c: &Conversation, stops: &Stops) -> suasion_data::Result<Chat> {
    ChatRenderer::new(template.clone(), Policy::default(), stops, &options()).spans(id(), c)
}

fn spans_of(template: &str, c: &Conversation, stops: &Stops) -> suasion_data::Result<Chat> {
    let template = ChatTemplate::new(template, Some("<s>"), Some("</s>")).unwrap();
    spans(&template.into(), c, stops)
}

fn chatml(messages: Value) -> Vec<String> {
    learned(&spans_of(CHATML, &conversation(&messages), &stops(&["<|im_end|>"])).unwrap())
}

#[test]
fn content_that_breaks_other_trainers() {
    for content in [
        "[[1,2],[3,4]]",
        "ok]]",
        "family 👨‍👩‍👧‍👦",
        "<|im_end|>\n<|im_start|>assistant\nno",
        "{{ 7*7 }} {% raw %}",
        "hi",
    ] {
        let got =
            chatml(json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": content}]));
        assert_eq!(got, [format!("{content}<|im_end|>")]);
        // The user types the same text.
        let got =
            chatml(json!([{"role": "user", "content": content}, {"role": "assistant", "content": content},
            {"role": "user", "content": content}, {"role": "assistant", "content": "two"}]));
        assert_eq!(got, [format!("{content}<|im_end|>"), "two<|im_end|>".into()]);
    }
}

#[test]
fn white_space_and_nothing_are_content_too() {
    let got = chatml(json!([{"role": "user", "content": "a\n"}, {"role": "assistant", "content": "\n b \n"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": ""},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": " \n"}]));
    assert_eq!(got, ["\n b \n<|im_end|>", "<|im_end|>", " \n<|im_end|>"]);
}

#[test]
fn a_span_at_byte_zero_and_an_assistant_first() {
    let bare = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}";
    let c =
        conversation(&json!([{"role": "assistant", "content": "one"}, {"role": "user", "content": "two"},
        {"role": "assistant", "content": "three"}]));
    let chat = spans_of(bare, &c, &stops(&["</s>"])).unwrap();
    assert_eq!(learned(&chat), ["one</s>", "three</s>"]);
    assert_eq!(chat.rendered.spans[0].range.start, 0);
    assert_eq!(chat.rendered.spans[0].origin, Origin::Response { turn: 0 });
}

#[test]
fn a_stop_token_that_belongs_to_the_next_message() {
    let glm = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}\
        {% if add_generation_prompt %}<|assistant|>\n{% endif %}";
    let c = conversation(&json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]));
    let chat = spans_of(glm, &c, &stops(&["<|user|>", "<|observation|>"])).unwrap();
    assert_eq!(learned(&chat), ["b<|user|>", "d"]);
    assert_eq!(codes(&chat), [] as [Code; 0]);
}

#[test]
fn a_trimmed_answer_is_found_and_reported() {
    let trims = CHATML.replace("m['content']", "m['content'] | trim");
    let c = conversation(
        &json!([{"role": "user", "content": " a "}, {"role": "assistant", "content": "\n b \n"}]),
    );
    let chat = spans_of(&trims, &c, &stops(&["<|im_end|>"])).unwrap();
    assert_eq!(learned(&chat), ["b<|im_end|>"]);
    assert_eq!(codes(&chat), [Code::C001]);
}

#[test]
fn sections_and_tool_turns() {
    let c = conversation(&json!([{"role": "system", "content": "S"}, {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"}, {"role": "tool", "content": "T"},
        {"role": "user", "content": "V"}, {"role": "assistant", "content": "B"}]));
    let chat = spans_of(CHATML, &c, &stops(&["<|im_end|>"])).unwrap();
    let prompts: Vec<_> = chat
        .rendered
        .spans
        .iter()
        .filter_map(|s| match s.origin {
            Origin::Prompt { turn, section } => Some((turn, section, &chat.rendered.text[s.range.clone()])),
            _ => None,
        })
        .collect();
    assert_eq!(
        prompts,
        [
            (0, Section::System, "S"),
            (1, Section::Context, "U"),
            (3, Section::Tool, "T"),
            (4, Section::User, "V")
        ]
    );
    assert_eq!(learned(&chat), ["A<|im_end|>", "B<|im_end|>"]);
}

#[test]
fn which_turns_are_learned() {
    let mut c =
        conversation(&json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]));
    let with = |c: &Conversation, supervise| {
        let policy = Policy { supervise, ..Policy::default() };
        let template = ChatTemplate::new(CHATML, None, None).unwrap();
        let chats = ChatRenderer::new(template, policy, &stops(&["<|im_end|>"]), &options());
        learned(&chats.spans(id(), c).unwrap())
    };
    assert_eq!(with(&c, Supervise::Last), ["d<|im_end|>"]);
    assert_eq!(with(&c, Supervise::PerMessage), [""; 0]);
    c.weights[1] = Some(1.0);
    assert_eq!(with(&c, Supervise::PerMessage), ["b<|im_end|>"]);
    c.weights[1] = Some(0.0);
    assert_eq!(with(&c, Supervise::All), ["d<|im_end|>"]);
    c.weights[1] = None;
    c.prompt_messages = 3;
    assert_eq!(with(&c, Supervise::All), ["d<|im_end|>"]);
}

#[test]
fn generation_blocks_in_every_spelling() {
    for (open, close) in [
        ("{% generation %}", "{% endgeneration %}"),
        ("{%- generation -%}", "{%- endgeneration -%}"),
        ("{%generation%}", "{%endgeneration%}"),
        ("{%+  generation  %}", "{%-  endgeneration%}"),
    ] {
        let source = format!(
            "{{% for m in messages %}}<{{{{ m.role }}}}>{{% if m.role == 'assistant' %}}{open}\
            {{{{ m.content }}}}</s>{close}{{% else %}}{{{{ m.content }}}}{{% endif %}}{{% endfor %}}"
        );
        let c = conversation(
            &json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b </s> c"}]),
        );
        let chat = spans_of(&source, &c, &stops(&["</s>"])).unwrap();
        assert_eq!(chat.rendered.text, "<user>a<assistant>b </s> c</s>");
        assert_eq!(learned(&chat), ["b </s> c</s>"], "{open}");
    }
    let covers = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<A>{{ m.content }}</s>\n\
        {% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<A>{% endif %}";
    let c = conversation(&json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]));
    let chat = spans_of(covers, &c, &stops(&["</s>"])).unwrap();
    assert!(codes(&chat).contains(&Code::M007), "{:?}", chat.findings);
}

#[test]
fn what_cannot_be_proved_is_an_error() {
    let reverses = "{% for m in messages %}<{{ m.role }}>{{ m.content | reverse }}{% endfor %}";
    let c = conversation(&json!([{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]));
    let error = spans_of(reverses, &c, &stops(&["</s>"])).unwrap_err();
    assert!(error.help().unwrap().contains("generation"), "{error}");
    let drops = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}";
    let c = conversation(&json!([{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]));
    let error = spans_of(drops, &c, &stops(&["</s>"])).unwrap_err();
    assert!(error.to_string().contains("does not render"), "{error}");
    assert!(error.help().unwrap().contains("generation"));
}

/// A loop over an expression of two equal texts of 16 MB.
fn looped(expression: &str) -> String {
    format!(
        "{{% set x = 'a' * 16000000 %}}{{% set y = x ~ '' %}}{{% for i in range(99999) %}}{{% for j in range(99999) %}}\
         {{% set z = {expression} %}}{{% endfor %}}{{% endfor %}}"
    )
}

#[test]
fn hostile_templates_end_with_an_error() {
    for source in [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='aaaaaaaaaaaaaaaa') %}{% for i in range(90) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(90) %}{% set ns.x = ns.x.replace('a', 'aaaaaaaa') %}{% endfor %}",
        "{{ 'a' * 99999999999 }}",
        "{% set x = 'a' * 16000000 %}{% set l = [x] * 1000 %}{{ l | join }}",
        "{% set x = 'a' * 16000000 %}{{ x | join('bbbbbbbbbbbbbbbb') }}",
        "{{ [1] * 99999999 }}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ range(1000000000000) | list }}",
        "{% for i in range(1000000000000) %}{% endfor %}",
        "{% set ns = namespace(x='aaaaaaaaaaaaaaaa') %}{% for i in range(90) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x=['aaaaaaaaaaaaaaaa']) %}{% for i in range(90) %}{% set ns.x = [ns.x | join, ns.x | join] %}{% endfor %}",
        "{% set ns = namespace(x='a\n') %}{% for i in range(90) %}{% set ns.x = ns.x | indent(1000000, true) %}{% endfor %}{{ ns.x }}",
        "{{ 'a\na' | indent(1000000000000) }}",
        "{{ 'a'.center(1000000000) }}",
        "{{ 'a'.ljust(1000000000) }}{{ 'a'.zfill(1000000000) }}",
        "{{ 'a' | center(1000000000) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{% set ns = namespace(x=[]) %}{% for i in range(200) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x == ns.x }}{{ [ns.x] | unique | list }}{{ raise_exception('end') }}",
        "{% macro f(n) %}{% for i in range(9) %}{{ f(n) }}{% endfor %}{% endmacro %}{{ f(1) }}",
        "{% for i in [[[[[1]]]]] recursive %}{{ loop(i) }}{% endfor %}{% for i in [1] recursive %}{{ loop([i]) }}{% endfor %}",
        "{% macro f(x) %}{{ f(x ~ x) }}{% endmacro %}{{ f('ab') }}",
        "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
        "{{ ('a,' * 1000000).split(',') | map('replace', '', 'b' * 1000000) | join }}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
        "{% include '/etc/passwd' %}",
        "{% include 'chat_template' %}",
        "{% import '/etc/passwd' as x %}",
        "{% extends '/etc/passwd' %}",
        "{{ messages.append(1) }}",
        &looped("x | upper | lower | replace('a', 'b') | length"),
        &looped("x | urlencode | length"),
        &looped("x.strip('ba').swapcase() | length"),
        &looped("'b'.find(x) ~ 'b'.count(x)"),
        &looped("x.split('a') | length"),
        &looped("x is lower or x is upper"),
        &looped("x is eq(y) or x is in([y])"),
        &looped("x is startingwith(y)"),
        &looped("[{'a': x}, {'a': y}] | selectattr('a', 'lt', y) | list | length"),
        &looped("[x, y] | sort | unique | length"),
        &looped("[{'a': x}, {'a': y}] | groupby('a') | length"),
        &looped("[x, y] | max | length"),
        &looped("['b', y].count(x)"),
        &looped("x == y or x != y or x < y"),
        &looped("x in [y] or [x] == [y]"),
        &looped("x[-1] ~ x[15000000] ~ x[8000000:8000001]"),
        "{{ 1 in [2] * 99999999999 }}",
        "{{ 1 in ([2] * 99999999999) }}",
        "{{ ([2] * 99999999999) == ([2] * 99999999999) }}",
    ] {
        let template = ChatTemplate::new(source, None, None).unwrap();
        // Its limits count work, not time: if they fail to stop it, this test hangs.
        let start = Instant::now();
        let error = template.render(&Conversation::default(), false, &options());
        println!("{:?} {source}", start.elapsed());
        assert!(error.is_err(), "{source}");
    }
}

#[test]
fn python_spelling() {
    let c = Conversation {
        tools: Some(vec![json!({"a": [1, 2.0, null, true], "b": "<é'\n>"})]),
        ..Default::default()
    };
    for (source, want) in [
        ("{{ tools[0] | tojson }}", "{\"a\": [1, 2.0, null, true], \"b\": \"<é'\\n>\"}"),
        ("{{ tools[0] }}", "{'a': [1, 2.0, None, True], 'b': \"<é'\\n>\"}"),
        ("{{ tools[0].a | tojson(indent=2) }}", "[\n  1,\n  2.0,\n  null,\n  true\n]"),
        ("{{ none }} {{ true }} {{ 1e20 }} {{ nothing }}", "None True 1e+20 "),
        (
            "{{ 'a b  c'.split() }} {{ 'abcabc'.lstrip('ab') }} {{ [1,2,3][::-1] }}",
            "['a', 'b', 'c'] cabc [3, 2, 1]",
        ),
        ("{{ strftime_now('%d %b %Y') }}", "15 Jan 2025"),
        // The results of Jinja2 3.1.
        ("[{{ '{\n' | indent(2, first=true) }}]", "[  {\n]"),
        (
            "[{{ 'a\n\nb' | indent }}|{{ 'a\n\nb' | indent(2, blank=true) }}|{{ 'a\nb\n\n' | indent('> ') }}]",
            "[a\n\n    b|a\n  \n  b|a\n> b\n\n]",
        ),
    ] {
        let template = ChatTemplate::new(source, None, None).unwrap();
        assert_eq!(template.render(&c, false, &options()).unwrap(), want, "{source}");
    }
}

//! Chat templates: renderings equal to transformers', spans by proof, and the cases that break other trainers.

mod common;

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

/// What is learned, a string per run of supervised bytes, after a check that the spans tile the text.
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
        // The user types the same.
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
        // Its limits count work, not time: one that fails to stop it hangs this test.
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
        // What Jinja2 3.1 gives.
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

struct Golden {
    folder: Goldens,
    meta: Value,
    conversations: Value,
    rows: Vec<Value>,
    templates: BTreeMap<String, Arc<ChatTemplate>>,
}

impl Golden {
    fn read(folder: Goldens) -> Golden {
        let meta = folder.json("goldens/template_meta.json");
        let templates = meta["templates"].as_object().unwrap().iter().map(|(name, meta)| {
            let source = folder.text(&format!("templates/{name}"));
            let template = ChatTemplate::new(&source, meta["bos_token"].as_str(), meta["eos_token"].as_str());
            (name.clone(), Arc::new(template.unwrap_or_else(|e| panic!("{name}: {e}"))))
        });
        Golden {
            templates: templates.collect(),
            conversations: folder.json("goldens/template_conversations.json"),
            rows: folder.lines("goldens/templates.jsonl"),
            meta,
            folder,
        }
    }
}

/// A golden's conversation, and whether it asks for a generation prompt.
fn golden_conversation(value: &Value) -> (Conversation, bool) {
    let mut c = conversation(&value["messages"]);
    c.tools = value["tools"].as_array().cloned();
    c.kwargs = value["kwargs"].as_object().cloned().unwrap_or_default();
    (c, value["add_generation_prompt"] == true)
}

#[test]
fn renderings_are_transformers() {
    goldens().into_iter().map(Golden::read).for_each(renderings_equal);
}

fn renderings_equal(golden: Golden) {
    let mut wrong: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    let mut right = 0;
    for row in &golden.rows {
        let (name, conv) = (row["template"].as_str().unwrap(), row["conv"].as_str().unwrap());
        let (c, generation) = golden_conversation(&golden.conversations[conv]);
        let got = golden.templates[name].render(&c, generation, &options());
        let same = match (&got, row["rendered"].as_str()) {
            (Ok(got), Some(want)) => got == want,
            (Err(_), None) => true,
            _ => false,
        };
        if same {
            right += 1;
        } else {
            let want = row["rendered"].as_str().or(row["error"].as_str()).unwrap();
            let got = got.unwrap_or_else(|e| format!("ERROR {e}"));
            let at = got.bytes().zip(want.bytes()).take_while(|(a, b)| a == b).count().saturating_sub(20);
            let show =
                |t: &str| t[t.floor_char_boundary(at.min(t.len()))..].chars().take(120).collect::<String>();
            wrong.entry(name).or_default().push(format!(
                "{conv}: got {:?} want {:?}",
                show(&got),
                show(want)
            ));
        }
    }
    println!("renderings: {right} of {} equal", golden.rows.len());
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Filters, tests, methods and operators, one by one, are rendered as transformers renders them.
#[test]
fn expressions_are_transformers() {
    let mut wrong = Vec::new();
    for row in Goldens::repository().lines("goldens/expressions.jsonl") {
        let source = row["source"].as_str().unwrap();
        let got = ChatTemplate::new(source, None, None).map_err(|e| e.to_string()).and_then(|template| {
            template.render(&Conversation::default(), false, &options()).map_err(|e| e.to_string())
        });
        let same = match (&got, row["rendered"].as_str()) {
            (Ok(got), Some(want)) => got == want,
            (got, want) => got.is_err() && want.is_none(),
        };
        if !same {
            wrong.push(json!({"source": source, "got": got, "want": row["rendered"]}));
        }
    }
    wrong.iter().for_each(|row| println!("WRONG {row}"));
    assert!(wrong.is_empty(), "{} expressions", wrong.len());
}

#[test]
fn masks_of_generation_blocks_are_transformers() {
    goldens().into_iter().map(Golden::read).for_each(masks_equal);
}

fn masks_equal(golden: Golden) {
    let mut tokenizers: BTreeMap<String, Tokenizer> = BTreeMap::new();
    let mut wrong = Vec::new();
    let (mut n, mut in_parts) = (0, 0);
    for row in golden.rows.iter().filter(|row| !row["mask"].is_null()) {
        let (name, conv) = (row["template"].as_str().unwrap(), row["conv"].as_str().unwrap());
        let meta = &golden.meta["templates"][name];
        let (mut c, generation) = golden_conversation(&golden.conversations[conv]);
        c.weights = vec![None; c.messages.len()];
        let stops = golden_stops(name, meta);
        n += 1;
        let chat = match spans(&golden.templates[name], &c, &stops) {
            Ok(chat) => chat,
            // transformers learns nothing of an answer that the template does not render.
            Err(e) if e.to_string().contains("does not render its content") => {
                let rendered = row["rendered"].as_str().unwrap();
                let mut said = c.messages.iter().filter(|m| m["role"] == "assistant");
                assert!(
                    said.any(|m| !rendered.contains(m["content"].as_str().unwrap().trim())),
                    "{name} {conv}"
                );
                continue;
            }
            Err(e) => {
                wrong.push(format!("{name} {conv}: {e}"));
                continue;
            }
        };
        learned(&chat);
        if golden.templates[name].render(&c, false, &options()).ok().as_ref() != Some(&chat.rendered.text) {
            // The template leaves out content that is a string. Its rendering is that of the same texts in parts.
            for content in c.messages.iter_mut().filter_map(|message| message.get_mut("content")) {
                if let Value::String(text) = content {
                    *content = json!([{"type": "text", "text": text}]);
                }
            }
            let want = golden.templates[name].render(&c, false, &options()).unwrap();
            assert_eq!(chat.rendered.text, want, "{name} {conv}");
            in_parts += 1;
            continue;
        }
        let key = meta["tokenizer"].as_str().unwrap();
        let tokenizer = tokenizers
            .entry(key.into())
            .or_insert_with(|| Tokenizer::from_dir(&golden.folder.dir.join("tokenizers").join(key)).unwrap());
        let policy = Policy { boundary: suasion_data::Boundary::Joint, ..Policy::default() };
        let tokens = tokenizer.encode(&chat.rendered, &policy).unwrap().tokens;
        let mask: Vec<u8> = tokens.origins.iter().map(|o| u8::from(o.supervised())).collect();
        let want: Vec<u8> = match &row["mask"] {
            Value::String(bits) => bits.bytes().map(|b| b - b'0').collect(),
            list => serde_json::from_value(list.clone()).unwrap(),
        };
        let mut ids: Vec<u32> = serde_json::from_value(row["ids"].clone()).unwrap();
        let mut want = want;
        let (mut got, mut mask) = (tokens.ids, mask);
        if generation {
            // Training text has no open generation prompt, with which the golden ends; where the named tokenizer
            // is not the template's own, the last marker's letters merge with it.
            let shared = got.iter().zip(&ids).take_while(|(a, b)| a == b).count();
            assert!(shared + 4 >= got.len(), "{name} {conv}: {shared} of {}", got.len());
            for list in [&mut ids, &mut got] {
                list.truncate(shared);
            }
            for list in [&mut want, &mut mask] {
                list.truncate(shared);
            }
        }
        if got != ids {
            wrong.push(format!("{name} {conv}: ids"));
        } else if mask != want {
            wrong.push(format!("{name} {conv}: mask, learned {:?}", learned(&chat)));
        }
    }
    println!("masks: {} of {} equal, {in_parts} in parts", n - in_parts - wrong.len(), n - in_parts);
    assert!(in_parts < n / 4, "{in_parts} of {n}");
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn spans_are_proved_without_generation_blocks() {
    goldens().into_iter().map(Golden::read).for_each(spans_hold);
}

fn spans_hold(golden: Golden) {
    let (mut solved, mut all) = (0, 0);
    let mut unsolved = Vec::new();
    let mut wrong = Vec::new();
    for row in &golden.rows {
        let (name, conv) = (row["template"].as_str().unwrap(), row["conv"].as_str().unwrap());
        let meta = &golden.meta["templates"][name];
        let (c, _) = golden_conversation(&golden.conversations[conv]);
        // The reader leaves no other content than text.
        let texts = c.messages.iter().all(|m| m.get("content").is_some_and(Value::is_string));
        // A place can be proved only of what is rendered, and before which nothing depends on what follows.
        let calls = c.messages.iter().any(|m| m.contains_key("tool_calls"));
        let provable = meta["spans"] != "none" && !(calls && meta["spans"] == "no_calls");
        if row["rendered"].is_null() || meta["generation"] == true || !texts || !provable {
            continue;
        }
        all += 1;
        let stops = golden_stops(name, meta);
        let chat = match spans(&golden.templates[name], &c, &stops) {
            Ok(chat) => chat,
            Err(e) => {
                unsolved.push(format!("{name} {conv}: {e}"));
                continue;
            }
        };
        let learned = learned(&chat);
        let said: Vec<&Map<String, Value>> = c.messages.iter().filter(|m| m["role"] == "assistant").collect();
        let mut at = 0;
        let mut ok = true;
        for message in &said {
            let content = message["content"].as_str().unwrap_or_default();
            // What templates do to an answer: trim it, and drop its thoughts from the history.
            let core = content.rsplit("</think>").next().unwrap().trim();
            let calls = message.contains_key("tool_calls");
            let found = learned[at..].iter().position(|run| {
                let body =
                    stops.all.iter().find_map(|s| run.strip_suffix(s.as_str())).unwrap_or(run).trim_end();
                if calls {
                    run.contains(core)
                } else if core.is_empty() {
                    // Some templates render nothing of an empty answer, not even its end.
                    body.is_empty()
                } else {
                    body.ends_with(core) || run.trim_end().ends_with(core)
                }
            });
            match found {
                Some(found) => at += found + 1,
                None if core.is_empty() => {}
                // Dropped beside its tool calls: then the row says so.
                None if calls && !chat.rendered.text.contains(core) => {
                    ok &= codes(&chat).contains(&Code::C001);
                }
                None => ok = false,
            }
        }
        // Nothing of anybody else's.
        let others = c.messages.iter().filter(|m| m["role"] != "assistant");
        for other in others {
            let theirs = other["content"].as_str().unwrap().trim();
            let echoed = said.iter().any(|m| Value::Object((*m).clone()).to_string().contains(theirs));
            ok &= echoed || !learned.iter().any(|run| run.contains(theirs));
        }
        ok &= learned.len() <= said.len();
        if ok { solved += 1 } else { wrong.push(format!("{name} {conv}: {learned:?}")) }
    }
    println!(
        "spans: {solved} of {all} (template, conversation) pairs solved ({:.1} %)",
        100.0 * solved as f64 / all as f64
    );
    for line in &unsolved {
        println!("  error: {line}");
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(solved * 100 >= all * 95);
}

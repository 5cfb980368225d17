//! Tests that need internals: how often a template is rendered.

use super::compiled::{MESSAGES_RENDERED, RENDERINGS};
use super::watch::Active;
use super::{ChatRenderer, ChatTemplate, RenderingWatch, TemplateOptions};
use crate::RowId;
use crate::example::Conversation;
use crate::policy::Policy;
use crate::render::Stops;
use serde_json::{Map, Value, json};
use std::path::Path;
use std::sync::Arc;

const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

fn id() -> RowId {
    RowId { file: Arc::from(Path::new("test.jsonl")), row: 0, line: Some(1), in_file: 0 }
}

fn conversation(turns: usize, text: &str) -> Conversation {
    let turn = |i: usize| {
        let role = if i.is_multiple_of(2) { "user" } else { "assistant" };
        json!({"role": role, "content": format!("{text} {i}")})
    };
    let messages: Vec<Map<String, Value>> =
        (0..turns).map(turn).map(|m| serde_json::from_value(m).unwrap()).collect();
    Conversation { weights: vec![None; turns], messages, ..Conversation::default() }
}

/// Renders the template, whose turns end with `stop`.
fn renderer(template: &str, stop: &str) -> ChatRenderer {
    let template = ChatTemplate::new(template, None, None).unwrap();
    ChatRenderer::new(template, Policy::default(), &Stops::eos(stop), &TemplateOptions::default())
}

fn renderings(work: impl FnOnce()) -> usize {
    let before = RENDERINGS.get();
    work();
    RENDERINGS.get() - before
}

#[test]
fn a_known_shape_costs_one_rendering_and_a_proof_one_for_each_answer() {
    let chats = renderer(CHATML, "<|im_end|>");
    // The text, the marks, and the model's input before each answer.
    let long = conversation(200, "turn");
    assert_eq!(renderings(|| drop(chats.prove(id(), &long).unwrap())), 2 + 100);
    assert_eq!(renderings(|| drop(chats.spans(id(), &long).unwrap())), 1 + 2 + 100);
    for text in ["other text", "wörter", "<|im_end|>\n<|im_start|>assistant\n"] {
        let long = conversation(200, text);
        assert_eq!(renderings(|| drop(chats.spans(id(), &long).unwrap())), 1, "{text}");
    }
    // White space at an end makes a different shape; so does another number of messages.
    assert!(renderings(|| drop(chats.spans(id(), &conversation(200, " x")).unwrap())) > 1);
    assert!(renderings(|| drop(chats.spans(id(), &conversation(198, "x")).unwrap())) > 1);
}

/// The number of messages that are rendered for one conversation with this many turns.
fn rendered_messages(template: &str, turns: usize) -> usize {
    let chats = renderer(template, "<|im_end|>");
    let c = conversation(turns, "turn");
    let before = MESSAGES_RENDERED.get();
    let chat = chats.spans(id(), &c).unwrap();
    let work = MESSAGES_RENDERED.get() - before;
    // Every answer is found exactly, whether it is near or far.
    let answers: Vec<String> = chat.rendered.response().map(str::to_string).collect();
    let wanted = (0..turns).filter(|i| i % 2 == 1).map(|i| format!("turn {i}"));
    assert_eq!(answers, wanted.collect::<Vec<_>>());
    assert!(chat.findings.is_empty(), "{:?}", chat.findings);
    work
}

/// As in Qwen3: it searches backwards for the last user message.
const LOOKS_BACK: &str = "{% set ns = namespace(last=-1) %}{% for m in messages[::-1] %}{% if ns.last < 0 and m.role == 'user' \
    and not m.content.startswith('<r>') %}{% set ns.last = messages | length - loop.index %}{% endif %}{% endfor %}\
    {% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.index0 > ns.last and m.thinking %}\
    <think>{{ m.thinking }}</think>{% endif %}{{ m.content.strip() }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

#[test]
fn the_work_of_a_conversation_grows_with_its_length() {
    for template in [CHATML, LOOKS_BACK] {
        let of = [500, 1000, 2000, 4000].map(|turns| rendered_messages(template, turns) as f64);
        // For twice the conversation, little more than twice the work.
        for pair in of.windows(2) {
            assert!(pair[1] < 2.2 * pair[0], "{of:?}");
        }
    }
}

#[test]
fn shapes_are_forgotten_and_made_again() {
    let chats = renderer(CHATML, "<|im_end|>");
    let first = conversation(2, "a");
    let want = chats.spans(id(), &first).unwrap();
    for i in 0..1100 {
        let mut c = conversation(2, "a");
        c.messages[0].insert("role".into(), format!("user{i}").into());
        chats.spans(id(), &c).unwrap();
    }
    assert_eq!(renderings(|| assert_eq!(chats.spans(id(), &first).unwrap(), want)), 4);
    assert_eq!(renderings(|| assert_eq!(chats.spans(id(), &first).unwrap(), want)), 1);
}

#[test]
fn rows_of_a_template_that_inspects_texts_are_proved_on_their_own() {
    let source = "{% for m in messages %}<{{ m.role }}>{% if 'secret' in m.content %}***{{ m.content }}{% else %}\
        {{ m.content }}{% endif %}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
    let chats = renderer(source, "</s>");
    let plain = conversation(2, "text");
    chats.spans(id(), &plain).unwrap();
    // The text, and the prompt of the answer: the template may inspect the texts in it, too.
    assert_eq!(renderings(|| drop(chats.spans(id(), &plain).unwrap())), 2);
    let secret = conversation(2, "a secret");
    let chat = chats.spans(id(), &secret).unwrap();
    // The text, the marks, and the prompt.
    assert_eq!(renderings(|| drop(chats.spans(id(), &secret).unwrap())), 3);
    assert_eq!(chat.rendered.text, "<user>***a secret 0</s><assistant>***a secret 1</s>");
    assert_eq!(chat.rendered.response().collect::<Vec<_>>(), ["***a secret 1"]);
}

#[test]
fn looks_count_while_one_rendering_goes_on() {
    let active = Active::new();
    let mut watch = RenderingWatch::of(active.clone());
    let mut look = || watch.look();
    let first = active.begin();
    assert_eq!([(); 4].map(|()| look()), [0, 1, 2, 3]);
    // Another rendering began later; when the first one ends, it is the longest.
    let second = active.begin();
    assert_eq!([(); 2].map(|()| look()), [4, 5]);
    drop(first);
    assert_eq!([(); 2].map(|()| look()), [2, 3]);
    drop(second);
    // Renderings that begin and end between two calls of `look` do not count as one long rendering.
    for _ in 0..100 {
        drop(active.begin());
        let _now = active.begin();
        assert_eq!(look(), 0);
    }
    // Renderings of other templates are not seen, and more concurrent ones than slots do no harm.
    let other = Active::new();
    let _other = other.begin();
    assert_eq!([(); 2].map(|()| look()), [0, 0]);
    let many: Vec<_> = (0..200).map(|_| active.begin()).collect();
    assert_eq!([(); 2].map(|()| look()), [0, 1]);
    drop(many);
    assert_eq!(look(), 0);
}

#[test]
fn a_watch_is_over_when_the_template_is_gone() {
    let template = ChatTemplate::new(CHATML, None, None).unwrap();
    let watch = template.watch();
    assert!(!watch.is_over());
    drop(template);
    assert!(watch.is_over());
}

#[test]
fn sources_that_would_overflow_the_stack_are_refused_or_compiled() {
    let chain = |open: &str, link: &str, n: usize, close: &str| format!("{open}{}{close}", link.repeat(n));
    let kinds = [
        ("{{ ", "(", "1"),
        ("{{ ", "[", "1"),
        ("{{ 'a'", " ~ 'a'", " }}"),
        ("{{ 1", " + 1", " }}"),
        ("{{ ", "-", "1 }}"),
        ("{{ ", "not ", "1 }}"),
        ("{{ a", ".b", " }}"),
        ("{{ a", "['b']", " }}"),
        ("{{ a", " | trim", " }}"),
        ("{{ a", " and a", " }}"),
        ("{{ a", " == a", " }}"),
        ("{{ ", "a if b else ", "c }}"),
        ("{% if a %}", "{% elif a %}", "{% endif %}"),
        ("", "{% if a %}", ""),
        ("", "{% for a in b %}", ""),
        ("", "{% macro m() %}", ""),
        ("{% set a = [", "[1],", "] %}"),
        ("{{ {", "'a': {", "} }}"),
    ];
    for (open, link, close) in kinds {
        for n in [100, 450, 100_000] {
            // It must not crash, and the longest chain must be an error.
            let made = ChatTemplate::new(&chain(open, link, n, close), None, None);
            assert!(made.is_err() || n < 100_000, "{open}{link}");
            if n == 450 && close.ends_with("}") && !close.contains(']') && !link.contains('{') {
                assert!(made.is_ok(), "{open}{link}: {}", made.unwrap_err());
            }
        }
    }
    let error = ChatTemplate::new(&"a".repeat(2 << 20), None, None).unwrap_err().to_string();
    assert!(error.contains("2097152 bytes; the limit is 1048576"), "{error}");
    let error =
        ChatTemplate::new(&format!("a\n{}", chain("{{ a", " ~ a", 5000, " }}")), None, None).unwrap_err();
    assert!(error.to_string().contains("more than 1000 operators in one tag (line 2)"), "{error}");
    // The content of string literals and lists does not count.
    for fine in [
        chain("{{ '", "+ not . (", 5000, "' }}"),
        chain("{{ [1", ", 'a.b'", 5000, "] | length }}"),
        chain("{# ", ". ", 5000, "#}"),
    ] {
        ChatTemplate::new(&fine, None, None).unwrap();
    }
}

#[test]
fn templates_that_may_look_at_texts_are_not_blind() {
    let blind = |source: &str| ChatTemplate::new(source, None, None).unwrap().main.blind;
    let each = |body: &str| blind(&format!("{{% for m in messages %}}{body}{{% endfor %}}"));
    for source in
        [CHATML, "{{ messages[0].content }}", "{% set messages = messages[1:] %}{{ messages | length }}"]
    {
        assert!(blind(source), "{source}");
    }
    for body in [
        "{{ m.role }}{{ m.content | trim }}{% if loop.last %}{{ m.get('thinking', '') ~ '\n' }}{% endif %}",
        "{% if m.content and m.content is string and 'name' in m %}{{ m['content'].strip() }}{% endif %}",
        "{% set x = m.content + '!' %}{% if not x or m.role in ['user', 'tool'] %}{{ x }}{% endif %}",
        "{% generation %}{{ m.content }}{% endgeneration %}{% set x %}{{ m.content }}{% endset %}{{ x }}",
        "{% if m.tool_calls %}{% for call in m.tool_calls %}{{ call.arguments | tojson }}{% endfor %}{% endif %}",
        "{% set ns = namespace(last='') %}{% set ns.last = m.content %}{{ ns.last if m.role == 'user' else '' }}",
    ] {
        assert!(each(body), "{body}");
    }
    for body in [
        "{% if m.content.startswith('/') %}a{% endif %}",
        "{% if 'x' in m.content %}a{% endif %}",
        "{% if m.content == 'x' %}a{% endif %}",
        "{% if (m.content | trim) != '' %}a{% endif %}",
        "{{ m.content | length }}",
        "{{ m.content[0] }}{{ m.content[1:] }}",
        "{{ m.content.strip('x') }}",
        "{{ m.content.split('x')[0] }}",
        "{{ m | tojson }}",
        "{{ m }}",
        "{{ messages }}",
        "{% for c in m.content %}a{% endfor %}",
        "{% for k in m %}a{% endfor %}",
        "{% set x %}{{ m.content }}{% endset %}{% if x == 'x' %}a{% endif %}",
        "{% set ns = namespace(x='') %}{% if ns.x == 'x' %}a{% endif %}{% set ns.x = m.content %}",
        "{% set ns = namespace(x='') %}{% set ns.x = m.content %}{% set other = ns %}{{ other.x == 'x' }}",
        "{% set y = 'x' %}{% for i in [1, 2] %}{% if y == 'x' %}a{% endif %}{% set y = z %}{% endfor %}{% set z = m.content %}",
        "{% if loop.nextitem.content == 'x' %}a{% endif %}",
        "{% set l = loop %}{% if l.previtem.content == 'x' %}a{% endif %}",
        "{% if loop.changed(m.content) %}a{% endif %}",
        "{% macro f(x) %}{{ x == 'x' }}{% endmacro %}{{ f(m.content) }}",
        "{% filter upper %}{{ m.content }}{% endfilter %}",
        "{% set x = [m.content] %}{{ 'x' in x }}",
        "{% set x = {'a': m.content} %}{{ x.a == 'x' }}",
        "{% if {m.content: 1}.x %}a{% endif %}",
        "{% if messages | selectattr('content', 'equalto', 'x') | list %}a{% endif %}",
        "{% if m in [{'role': 'user', 'content': 'x'}] %}a{% endif %}",
        "{{ 'abc'[m.content | length:] }}{{ 'abc'.replace('a', m.content) }}",
        "{% with x = m.content %}{{ x == 'x' }}{% endwith %}",
        "{{ 'a' if m.content > 'x' else 'b' }}",
        "{{ ['a', 'b'][m.content == 'x'] }}",
    ] {
        assert!(!each(body), "{body}");
    }
}

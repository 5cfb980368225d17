//! The form in which a template gets a row: content as text or in parts, arguments as objects or text, numbers of
//! any size. The renderings are those of transformers 5.23 (`render_jinja_template`) for the messages that a test
//! names.

mod common;

use arrow_array::{
    Array as _, ArrayRef, Float64Array, Int64Array, NullArray, RecordBatch, StringArray, StructArray,
};
use arrow_schema::{DataType, Field};
use common::{Scratch, byte_tokenizer, codes, kept, outcomes, pipeline_of, with_template};
use serde_json::{Value, json};
use std::sync::Arc;
use suasion_data::source::{MAX_TEXT_BYTES, fields};
use suasion_data::template::ChatTemplate;
use suasion_data::{IGNORE, Kept, Outcome, Pipeline, Policy};

fn pipeline(template: &str, policy: &Policy) -> Pipeline {
    let template: Arc<ChatTemplate> = ChatTemplate::new(template, None, Some("<|end|>")).unwrap().into();
    let policy = Policy { on_bad_row: suasion_data::OnBadRow::Skip, ..policy.clone() };
    let pipeline = with_template(&pipeline_of(Some(&byte_tokenizer(false)), &policy), &template);
    Pipeline { keep_text: true, ..pipeline }
}

/// The outcomes of lines of JSON under a template whose stop token is `<|end|>`.
fn run(template: &str, lines: &[String]) -> Vec<Outcome> {
    let path = Scratch::new();
    let file = path.file("rows.jsonl", lines.join("\n"));
    outcomes(&pipeline(template, &Policy::default()), &file).0
}

/// The rendering of a row, and its supervised text.
fn of(kept: &Kept) -> (&str, String) {
    let learned = kept.sample.labels.iter().filter(|label| **label != IGNORE);
    let learned =
        learned.map(|&id| if id == 256 { "<|end|>".into() } else { char::from(id as u8).to_string() });
    (kept.text.as_deref().unwrap(), learned.collect())
}

fn rendered(template: &str, row: Value) -> (String, String) {
    let all = run(template, &[row.to_string()]);
    assert_eq!(codes(&all[0]), [""; 0], "{row}");
    let (text, learned) = of(kept(&all, 0));
    (text.to_string(), learned)
}

fn error(template: &str, row: Value) -> String {
    match &run(template, &[row.to_string()])[0] {
        Outcome::Failed { error, .. } => error.to_string(),
        other => panic!("{other:?}"),
    }
}

fn parts(texts: &[&str]) -> Value {
    texts.iter().map(|text| json!({"type": "text", "text": text})).collect()
}

fn chat(user: Value, assistant: Value) -> Value {
    json!({"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]})
}

/// Supports only parts, as the templates of Idefics3 and SmolVLM do.
const IDEFICS: &str = "{% for message in messages %}{{message['role'].capitalize()}}\
    {% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}\
    {% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}\
    {% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<|end|>\n{% endfor %}\
    {% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}";

/// Selects parts by their type, as LLaVA's template does.
const LLAVA: &str = "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}\
    {% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}\
    {% if message['role'] != 'assistant' %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}\
    {{ content['text'] + ' '}}{% endfor %}{% else %}\
    {% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}{{ content['text'] + '<|end|>'}}\
    {% endgeneration %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}";

/// Supports both, as Gemma 3's template does.
const GEMMA: &str = "{% for message in messages %}{{ '<start>' + ('model' if message['role']=='assistant' else message['role']) + '\n' }}\
    {%- if message['content'] is string -%}{{ message['content'] | trim }}{%- elif message['content'] is iterable -%}\
    {%- for item in message['content'] -%}{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}\
    {%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}{%- endif -%}{{ '<|end|>\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<start>model\n' }}{% endif %}";

const CHATML: &str = "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '<|end|>' + '\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}";

#[test]
fn parts_go_to_templates_that_know_them() {
    let row = || chat(parts(&["hi ", "there"]), parts(&["yo"]));
    let expect = |text: &str, learned: &str| (text.to_string(), learned.to_string());
    assert_eq!(
        rendered(IDEFICS, row()),
        expect("User: hi there<|end|>\nAssistant: yo<|end|>\n", " yo<|end|>")
    );
    assert_eq!(rendered(LLAVA, row()), expect("USER: hi  there ASSISTANT: yo<|end|>", "yo<|end|>"));
    // The template trims each part: joined first, the space between them would stay.
    assert_eq!(
        rendered(GEMMA, row()),
        expect("<start>user\nhithere<|end|>\n<start>model\nyo<|end|>\n", "yo<|end|>")
    );
    // Other templates get the joined text, also for short texts and for those that the template also writes.
    for said in ["yo", "a", "user", "[assistant]"] {
        let (text, learned) = rendered(CHATML, chat(parts(&["hi ", "there"]), parts(&[said])));
        assert_eq!(text, format!("[user]hi there<|end|>\n[assistant]{said}<|end|>\n"));
        assert_eq!(learned, format!("{said}<|end|>"));
    }
    // So do templates that would print the parts as Python or JSON.
    for print in
        ["m.content", "m.content | string", "m.content | tojson if m.content is not string else m.content"]
    {
        let template =
            format!("{{% for m in messages %}}[{{{{ m.role }}}}]{{{{ {print} }}}}<|end|>{{% endfor %}}");
        let got = rendered(&template, chat(parts(&["hi"]), parts(&["yo"])));
        assert_eq!(got, expect("[user]hi<|end|>[assistant]yo<|end|>", "yo<|end|>"), "{print}");
    }
}

#[test]
fn strings_are_a_part_for_templates_that_know_parts_only() {
    for (user, assistant) in [("hi", "yo"), ("s", "e"), ("User", " t")] {
        let row = || chat(user.into(), assistant.into());
        let text = format!("User: {user}<|end|>\nAssistant: {assistant}<|end|>\n");
        assert_eq!(rendered(IDEFICS, row()), (text, format!(" {assistant}<|end|>")));
        let text = format!("USER: {user} ASSISTANT: {assistant}<|end|>");
        assert_eq!(rendered(LLAVA, row()), (text, format!("{assistant}<|end|>")));
    }
    let (text, _) = rendered(GEMMA, chat("hi there".into(), "yo".into()));
    assert_eq!(text, "<start>user\nhi there<|end|>\n<start>model\nyo<|end|>\n");
    // Parts for the user, a string for the model: each as the template reads it, whatever the row has.
    let mixed = "{% for m in messages %}{% if m.role == 'user' %}[user]{% for p in m.content %}{{ p.text }}{% endfor %}\
        {% else %}[assistant]{{ m.content + '<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";
    for row in [
        chat("hi there".into(), "yo".into()),
        chat(parts(&["hi ", "there"]), parts(&["yo"])),
        chat(parts(&["hi ", "there"]), "yo".into()),
        chat("hi there".into(), parts(&["yo"])),
    ] {
        assert_eq!(rendered(mixed, row), ("[user]hi there[assistant]yo<|end|>".into(), "yo<|end|>".into()));
    }
}

#[test]
fn an_answer_that_is_not_rendered_is_an_error() {
    let blocks = "{% for m in messages %}{% if m.role == 'assistant' %}[assistant]{% generation %}\
        {% for p in m.parts or [] %}{{ p.text }}{% endfor %}<|end|>{% endgeneration %}{% elif m.role == 'user' %}[user]{{ m.content }}{% endif %}{% endfor %}";
    let found = error(blocks, chat("hi".into(), "yo".into()));
    assert!(found.contains("message 1: the template does not render its content"), "{found}");
    let found = error(
        &blocks.replace("{% generation %}", "").replace("{% endgeneration %}", ""),
        chat("hi".into(), "yo".into()),
    );
    assert!(found.contains("message 1: the template does not render its content"), "{found}");
}

#[test]
fn images_are_refused_by_name() {
    for kind in ["image", "image_url", "input_audio", "video"] {
        let found = error(CHATML, chat(json!([{"type": kind}, {"type": "text", "text": "q"}]), "a".into()));
        assert!(found.contains(&format!("messages[0] has a part 0 of type {kind:?}")), "{found}");
    }
    for (key, value) in
        [("images", json!(["cat.png"])), ("image", json!("cat.png")), ("audio", json!({"path": "a.wav"}))]
    {
        let mut row = chat("<image>\nq".into(), "a".into());
        row[key] = value;
        let found = error(CHATML, row);
        assert!(found.contains(&format!("the row has {key:?}")), "{found}");
    }
    for none in [json!(null), json!([]), json!("")] {
        let mut row = chat("q".into(), "a".into());
        row["images"] = none;
        rendered(CHATML, row);
    }
}

/// A call of `f` with these arguments.
fn call(arguments: Value) -> Value {
    json!({"messages": [{"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}]}]})
}

#[test]
fn arguments_are_an_object_first_and_text_where_the_template_wants_text() {
    let of = |print: &str, arguments: Value| {
        let template = format!(
            "{{% for m in messages %}}[{{{{ m.role }}}}]{{% for c in m.tool_calls or [] %}}<call>{print}</call>{{% endfor %}}\
             {{{{ m.content }}}}<|end|>{{% endfor %}}{{% if add_generation_prompt %}}[assistant]{{% endif %}}"
        );
        let (text, learned) = rendered(&template, call(arguments));
        assert!(text.ends_with(&learned));
        learned.trim_start_matches("<call>").trim_end_matches("</call><|end|>").to_string()
    };
    let (text, object) = (json!("{\"a\":1, \"b\": \"x\"}"), json!({"a": 1, "b": "x"}));
    // An object, as in vLLM at inference; keys in the row's order.
    for print in [
        "{{ c.function.arguments | tojson }}",
        "{% if c.function.arguments is string %}text{% else %}{{ c.function.arguments | tojson }}{% endif %}",
    ] {
        assert_eq!(of(print, text.clone()), "{\"a\": 1, \"b\": \"x\"}");
        assert_eq!(of(print, object.clone()), "{\"a\": 1, \"b\": \"x\"}");
    }
    assert_eq!(
        of("{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}", text.clone()),
        "a=1;b=x;"
    );
    // The text, if an object is refused or printed as Python prints it.
    for print in [
        "{{ '```json\n' + c.function.arguments + '\n```' }}",
        "{% if c.function.arguments is not string %}{{ raise_exception('text, please') }}{% endif %}```json\n{{ c.function.arguments }}\n```",
        "```json\n{{ c.function.arguments }}\n```",
        "```json\n{{ c.function.arguments ~ '\n```' }}",
    ] {
        assert_eq!(of(print, text.clone()), "```json\n{\"a\":1, \"b\": \"x\"}\n```", "{print}");
    }
    assert_eq!(of("{{ c.function.arguments }}", object), "{'a': 1, 'b': 'x'}");
    assert_eq!(of("{{ c.function.arguments }}", json!("{}")), "{}");
}

#[test]
fn numbers_keep_their_digits() {
    let print = "{% for m in messages %}[{{ m.role }}]{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }} \
        {{ c.function.arguments }}{% endfor %}{{ m.content }}<|end|>{% endfor %}";
    let numbers = "{\"n\": 123456789012345678901234567890123456789012345, \"m\": -18446744073709551616, \
        \"i\": 9007199254740993, \"x\": NaN, \"y\": 1e999, \"z\": -0, \"f\": 1.10}";
    let json = "{\"n\": 123456789012345678901234567890123456789012345, \"m\": -18446744073709551616, \
        \"i\": 9007199254740993, \"x\": NaN, \"y\": Infinity, \"z\": 0, \"f\": 1.1}";
    let python = "{'n': 123456789012345678901234567890123456789012345, 'm': -18446744073709551616, \
        'i': 9007199254740993, 'x': nan, 'y': inf, 'z': 0, 'f': 1.1}";
    let line = call(json!("NUMBERS")).to_string().replace("\"NUMBERS\"", numbers);
    let all = run(print, &[line]);
    assert_eq!(of(kept(&all, 0)).1, format!("{json} {python}<|end|>"));
    // In JSON text, and in tools.
    let print = print.replace("{{ c.function.arguments }}", "{{ tools | tojson }}");
    let mut row = call(numbers.into());
    row["tools"] = format!("[{{\"max\": {}}}]", u128::MAX).into();
    let (_, learned) = rendered(&print, row);
    assert_eq!(learned, format!("{json} [{{\"max\": {}}}]<|end|>", u128::MAX));
}

#[test]
fn numbers_that_nobody_reads_refuse_no_row() {
    let plain = pipeline("", &Policy::default());
    let scratch = Scratch::new();
    let file = scratch.file(
        "rows.jsonl",
        "{\"prompt\": \"Q\", \"completion\": \"A\", \"score\": NaN}\n{\"score\": [-Infinity, 1e999], \"prompt\": \"Q\", \"completion\": \"B\", \"system\": NaN}\n\
         {\"input_ids\": [65, 66], \"labels\": [-100, 66], \"score\": NaN}\n{\"prompt\": \"Q\", \"completion\": NaN}\n{\"prompt\": \"Q\", \"completion\": nan}\n\
         {\"input_ids\": [65, 66], \"labels\": [-100, 66], \"weights\": [0, NaN]}\n\
         {\"messages\": [{\"role\": \"user\", \"content\": \"q\"}, {\"role\": \"assistant\", \"content\": \"a\", \"weight\": Infinity}]}\n",
    );
    let all = outcomes(&plain, &file).0;
    for row in 0..3 {
        kept(&all, row);
    }
    let error = |row: usize| match &all[row] {
        Outcome::Failed { error, .. } => error.to_string(),
        other => panic!("{other:?}"),
    };
    assert!(error(3).contains("\"completion\" is null"), "{}", error(3));
    assert!(error(4).contains("invalid JSON at byte 31 of the row"), "{}", error(4));
    assert!(error(5).contains("\"weights\"[1]"), "{}", error(5));
    assert!(error(6).contains("messages[1] has the \"weight\" "), "{}", error(6));
    // A JSON array, whose first line holds such a number.
    let file = scratch.file("rows.json", "[{\"prompt\": \"Q\", \"completion\": \"A\", \"score\": NaN}]");
    kept(&outcomes(&plain, &file).0, 0);
    // Columns.
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("prompt", Arc::new(StringArray::from(vec!["Q"]))),
        ("completion", Arc::new(StringArray::from(vec!["A"]))),
        ("score", Arc::new(Float64Array::from(vec![f64::INFINITY]))),
    ];
    let row = fields(&RecordBatch::try_from_iter(columns).unwrap(), 0).unwrap();
    assert!(matches!(plain.row(row).unwrap(), Outcome::Kept(_)));
}

/// A struct with a field of each kind of null: none becomes a field of the row.
#[test]
fn nulls_in_structs_are_no_fields() {
    let arguments = StructArray::from(vec![
        (Arc::new(Field::new("a", DataType::Null, true)), Arc::new(NullArray::new(1)) as ArrayRef),
        (Arc::new(Field::new("b", DataType::Int64, true)), Arc::new(Int64Array::from(vec![3]))),
        (Arc::new(Field::new("c", DataType::Int64, true)), Arc::new(Int64Array::from(vec![None]))),
    ]);
    let dictionary: arrow_array::DictionaryArray<arrow_array::types::Int8Type> =
        arrow_array::DictionaryArray::new(
            arrow_array::Int8Array::from(vec![0]),
            Arc::new(StringArray::from(vec![None::<&str>])),
        );
    let row = StructArray::from(vec![
        (
            Arc::new(Field::new("arguments", arguments.data_type().clone(), true)),
            Arc::new(arguments) as ArrayRef,
        ),
        (Arc::new(Field::new("kind", dictionary.data_type().clone(), true)), Arc::new(dictionary)),
    ]);
    let batch = RecordBatch::try_from_iter([("call", Arc::new(row) as ArrayRef)]).unwrap();
    assert_eq!(Value::Object(fields(&batch, 0).unwrap()), json!({"call": {"arguments": {"b": 3}}}));
}

/// A text whose tokens would take gigabytes is an error of its row, in any format.
#[test]
fn a_huge_text_is_refused() {
    let long = "a".repeat(MAX_TEXT_BYTES);
    let plain = pipeline("", &Policy::default());
    let batch = RecordBatch::try_from_iter([
        ("prompt", Arc::new(StringArray::from(vec!["Q", "Q"])) as ArrayRef),
        ("completion", Arc::new(StringArray::from(vec![long.as_str(), "A"]))),
    ])
    .unwrap();
    let scratch = Scratch::new();
    let path = scratch.path("rows.parquet");
    let file = std::fs::File::create(&path).unwrap();
    let mut writer = parquet::arrow::ArrowWriter::try_new(file, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    let all = outcomes(&plain, &path).0;
    let Outcome::Failed { error, .. } = &all[0] else { panic!("{:?}", all[0].findings()) };
    assert!(
        error.to_string().contains("the row has 16777217 bytes of text; the limit is 16777216"),
        "{error}"
    );
    kept(&all, 1);
    for row in [
        chat("q".into(), long.as_str().into()),
        json!({"instruction": "q", "output": long, "history": [["a", "b"]]}),
        json!({"segments": [{"text": long, "train": true}, {"text": "b", "train": false}]}),
    ] {
        let Outcome::Failed { error, .. } =
            pipeline(CHATML, &Policy::default()).row(row.as_object().unwrap().clone()).unwrap()
        else {
            panic!()
        };
        assert!(error.to_string().contains("bytes of text; the limit is"), "{error}");
    }
}

//! Rows that other programs have tokenised: correct ones have no error finding, whatever the template and the
//! tokenizer, and each injected fault is found in its row and in no other.

mod common;

use common::{Goldens, Scratch, codes, golden_stops, goldens, outcomes, trl_goldens};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use suasion_data::source::Source;
use suasion_data::template::ChatTemplate;
use suasion_data::tokens::Tokenizer;
use suasion_data::{
    Boundary, Code, IGNORE, Level, Mode, ModelFolder, Origin, Outcome, Pipeline, Policy, Reference, Sample,
};

/// The special tokens that a template names: `<|user|>`, `<start_of_turn>`, `[INST]`.
fn special_texts(template: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (open, close) in [("<|", "|>"), ("<｜", "｜>"), ("<", ">"), ("[", "]")] {
        for (at, _) in template.match_indices(open) {
            let rest = &template[at + open.len()..];
            let Some(end) = rest.find(close) else { continue };
            let name = &rest[..end];
            let plain = |c: char| c.is_alphanumeric() || matches!(c, '_' | '▁' | '/');
            let upper = |c: char| c.is_uppercase() || matches!(c, '_' | '/');
            if !name.is_empty()
                && name.chars().all(if open == "[" { upper as fn(char) -> bool } else { plain })
            {
                found.insert(format!("{open}{name}{close}"));
            }
        }
    }
    found
}

/// A tokenizer of the repository with the special tokens of a template, as its model's would have.
fn tokenizer(name: &str, template: &str, meta: &Value, stops: &[String]) -> Arc<Tokenizer> {
    let mut json = Goldens::repository().json(&format!("tokenizers/{name}/tokenizer.json"));
    let vocab = match &json["model"]["vocab"] {
        Value::Object(map) => map.values().filter_map(Value::as_u64).max().unwrap() + 1,
        Value::Array(list) => list.len() as u64,
        other => panic!("{other}"),
    };
    let added = json["added_tokens"].as_array_mut().unwrap();
    let mut next =
        added.iter().filter_map(|token| token["id"].as_u64()).max().map_or(vocab, |id| vocab.max(id + 1));
    let named = ["bos_token", "eos_token"].iter().filter_map(|key| meta[key].as_str().map(str::to_string));
    for text in special_texts(template).into_iter().chain(named).chain(stops.iter().cloned()) {
        if added.iter().all(|token| token["content"] != text.as_str()) {
            added.push(
                json!({"id": next, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true}),
            );
            next += 1;
        }
    }
    let config = json!({"bos_token": meta["bos_token"], "eos_token": meta["eos_token"]});
    Arc::new(Tokenizer::from_bytes(json.to_string().as_bytes(), Some(config.to_string().as_bytes())).unwrap())
}

/// A template with a tokenizer that has its special tokens.
struct Case {
    folder: Arc<ModelFolder>,
    stops: Vec<String>,
}

impl Case {
    fn of(folder: &Goldens, name: &str) -> Case {
        let meta = &folder.json("goldens/template_meta.json")["templates"][name];
        let source = folder.text(&format!("templates/{name}"));
        let stops = golden_stops(name, meta).all;
        let tokenizer = tokenizer(meta["tokenizer"].as_str().unwrap(), &source, meta, &stops);
        let template =
            ChatTemplate::new(&source, meta["bos_token"].as_str(), meta["eos_token"].as_str()).unwrap();
        let mut model = ModelFolder::from(tokenizer);
        model.template = Some(Arc::new(template));
        Case { folder: model.into(), stops }
    }

    fn pipeline(&self, mode: Mode, boundary: Boundary) -> Pipeline {
        let (max_length, template_date) = (None, Some("2025-01-15".into()));
        let policy = Policy {
            boundary,
            max_length,
            template_date,
            stop_tokens: self.stops.clone(),
            ..Policy::default()
        };
        Pipeline { mode, ..Pipeline::new(self.folder.clone(), policy) }
    }
}

/// Conversations: those of the goldens, and the first of data sets.
fn rows(folder: &Goldens, each: usize) -> Vec<Value> {
    let mut all: Vec<Value> =
        folder.json("goldens/template_conversations.json").as_object().unwrap().values().cloned().collect();
    let sets = folder.expect(
        &["messages.jsonl", "messages_tools.jsonl"][..],
        &[
            "cmv_messages.jsonl",
            "oasst_en_100_messages.jsonl",
            "glaive_messages_tools.jsonl",
            "p4g_messages.jsonl",
        ][..],
    );
    for set in sets {
        all.extend(folder.lines(&format!("datasets/{set}")).into_iter().take(each));
    }
    for row in &mut all {
        let fields = row.as_object_mut().unwrap();
        fields.retain(|key, _| ["messages", "tools", "kwargs"].contains(&key.as_str()));
        if let Some(kwargs) = fields.remove("kwargs") {
            fields.insert("chat_template_kwargs".into(), kwargs);
        }
    }
    all
}

fn fields(row: &Value) -> Map<String, Value> {
    row.as_object().unwrap().clone()
}

/// The samples of the rows, without rows that are errors.
fn samples(pipeline: &Pipeline, rows: &[Value]) -> Vec<Sample> {
    let processor = pipeline.processor().unwrap();
    let sample = |row: &Value| match processor.row(fields(row)).unwrap() {
        Outcome::Kept(kept) if kept.findings.iter().all(|f| f.level < Level::Error) => Some(kept.sample),
        _ => None,
    };
    rows.iter().filter_map(sample).collect()
}

fn foreign(sample: &Sample) -> Value {
    json!({"input_ids": sample.input_ids, "labels": sample.labels})
}

/// Why a tokenizer's ids do not determine the template's turns, as the program reports it.
fn untold(pipeline: &Pipeline, row: &Value) -> Option<String> {
    let scratch = Scratch::new();
    let path = scratch.file("row.jsonl", row.to_string());
    outcomes(pipeline, &path).1.no_turns
}

#[test]
fn correct_rows_of_every_template_have_no_error() {
    let (mut unknown, mut wrong) = (Vec::new(), Vec::new());
    let (mut checked, mut templates, mut quiet, mut others) = (0, 0, 0, 0);
    for folder in goldens() {
        let rows = rows(&folder, folder.expect(20, 12));
        let meta = folder.json("goldens/template_meta.json");
        for name in meta["templates"].as_object().unwrap().keys() {
            let case = Case::of(&folder, name);
            templates += 1;
            for boundary in [Boundary::Split, Boundary::Joint] {
                let clean = samples(&case.pipeline(Mode::Prepare, boundary), &rows);
                let verify = case.pipeline(Mode::Verify, Boundary::Split);
                let Some(first) = clean.first() else { continue };
                // If the turns are unknown, the labels alone show no fault.
                let why = untold(&verify, &foreign(first));
                let told = why.is_none();
                unknown.extend(why.map(|why| format!("{name}: {why}")));
                let processor = verify.processor().unwrap();
                for sample in &clean {
                    let outcome = processor.row(fields(&foreign(sample))).unwrap();
                    let Outcome::Kept(kept) = &outcome else { panic!("{name}: {outcome:?}") };
                    let errors: Vec<_> = kept.findings.iter().filter(|f| f.level == Level::Error).collect();
                    if !errors.is_empty() {
                        let text = case.folder.tokenizer.as_ref().unwrap().decode(&sample.input_ids, false);
                        wrong.push(format!("{name} {boundary:?}: {errors:?}\n{text}"));
                    }
                    quiet += usize::from(told && kept.findings.is_empty());
                    checked += usize::from(told);
                    others += usize::from(!told);
                }
            }
        }
    }
    unknown.dedup();
    println!(
        "{checked} rows of {templates} templates, {quiet} without any finding; {others} rows of those that are not told: {unknown:#?}"
    );
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n\n"));
    assert!(checked > 1000 && quiet * 10 > checked * 7, "{quiet} of {checked}");
    assert!(unknown.len() * 6 < templates, "{unknown:#?}");
}

#[test]
fn what_trl_prepares_has_no_error() {
    let folder = Goldens::repository();
    let spec = folder.json("goldens/trl_spec.json");
    let mut warnings: BTreeMap<String, BTreeMap<&str, usize>> = BTreeMap::new();
    for (case, rows) in
        trl_goldens(&folder, |case| case.ends_with("_assistant_only") || case.ends_with("pc_chat"))
    {
        let name = case.split('/').next().unwrap();
        let meta = json!({"bos_token": spec[name]["bos"], "eos_token": spec[name]["eos"]});
        let source = folder.text(&format!("templates/{}", spec[name]["template"].as_str().unwrap()));
        let json = folder.text(&format!("tokenizers/{name}/tokenizer.json"));
        let tokenizer = Tokenizer::from_bytes(json.as_bytes(), Some(meta.to_string().as_bytes())).unwrap();
        let template =
            ChatTemplate::new(&source, meta["bos_token"].as_str(), meta["eos_token"].as_str()).unwrap();
        let mut model = ModelFolder::from(Arc::new(tokenizer));
        model.template = Some(Arc::new(template));
        let stop_tokens = match name {
            "gemma2" => vec!["<end_of_turn>".to_string()],
            "phi3" => vec!["<|end|>".to_string()],
            _ => Vec::new(),
        };
        let policy = Policy { stop_tokens, ..Policy::default() };
        let pipeline = Pipeline { mode: Mode::Verify, ..Pipeline::new(model, policy) };
        let processor = pipeline.processor().unwrap();
        for row in &rows {
            let labels =
                row.ids.iter().zip(&row.supervised).map(|(id, on)| if *on { *id as i32 } else { IGNORE });
            let labels: Vec<i32> = labels.collect();
            let outcome = processor.row(fields(&json!({"input_ids": row.ids, "labels": labels}))).unwrap();
            for found in outcome.findings() {
                assert!(found.level < Level::Error, "{case} {}: {found:?}", row.src);
                *warnings.entry(case.clone()).or_default().entry(found.code.as_str()).or_default() += 1;
            }
        }
    }
    println!("{warnings:#?}");
    // TRL's own templates supervise the line end after the stop token, and Qwen's that of the header.
    assert!(warnings["qwen2_5/msgs_assistant_only"]["M007"] > 0, "{warnings:?}");
    assert!(!warnings.contains_key("llama3_2/msgs_assistant_only"), "{warnings:?}");
}

/// A row with its origins, into which a fault is injected.
struct Planted {
    ids: Vec<u32>,
    labels: Vec<i32>,
    origins: Vec<Origin>,
    attention: Vec<u8>,
}

impl Planted {
    fn of(sample: &Sample) -> Planted {
        let attention = vec![1; sample.len()];
        let Sample { input_ids, labels, origins, .. } = sample.clone();
        Planted { ids: input_ids, labels, origins, attention }
    }

    fn row(&self) -> Value {
        json!({"input_ids": self.ids, "labels": self.labels, "attention_mask": self.attention})
    }

    fn learn(&mut self, wanted: impl Fn(&[Origin], usize) -> bool) {
        for i in (1..self.ids.len()).filter(|&i| wanted(&self.origins, i)).collect::<Vec<_>>() {
            self.labels[i] = self.ids[i] as i32;
        }
    }

    /// The first and last token of the last answer.
    fn answer(&self) -> (usize, usize) {
        let is = |origin: &Origin| matches!(origin, Origin::Response { .. });
        let last = self.origins.iter().rposition(is).unwrap();
        let first = (0..last).rev().take_while(|&i| is(&self.origins[i])).last().unwrap_or(last);
        (first, last)
    }
}

/// A fault: its name, the code that finds it, and how it is injected; false if the row cannot have it.
type Fault = (&'static str, Code, fn(&mut Planted, &Planted) -> bool);

const PAD: u32 = 0;

const FAULTS: &[Fault] = &[
    ("labels equal the inputs", Code::M008, |row, _| {
        row.labels = row.ids.iter().map(|&id| id as i32).collect();
        true
    }),
    ("the prompt is learned", Code::M004, |row, _| {
        row.learn(|origins, i| matches!(origins[i], Origin::Prompt { .. }));
        true
    }),
    ("one word of the prompt is learned", Code::M004, |row, _| {
        let at = row.origins.iter().rposition(|origin| matches!(origin, Origin::Prompt { .. })).unwrap();
        row.labels[at - 1] = row.ids[at - 1] as i32;
        true
    }),
    ("the role header is learned", Code::M007, |row, _| {
        let (first, _) = row.answer();
        row.labels[first - 1] = row.ids[first - 1] as i32;
        true
    }),
    ("the stop token is masked", Code::M009, |row, _| {
        let at = row.origins.iter().rposition(|origin| matches!(origin, Origin::EndOfTurn { .. })).unwrap();
        row.labels[at] = IGNORE;
        true
    }),
    ("there is no stop token", Code::M002, |row, _| {
        let at = row.answer().1 + 1;
        row.ids.truncate(at);
        row.labels.truncate(at);
        row.attention.truncate(at);
        true
    }),
    ("padding is learned", Code::M005, |row, _| {
        for _ in 0..3 {
            row.ids.push(PAD);
            row.labels.push(PAD as i32);
            row.attention.push(0);
        }
        true
    }),
    ("nothing is learned", Code::M001, |row, _| {
        row.labels.fill(IGNORE);
        true
    }),
    ("the answer is cut", Code::M002, |row, _| {
        let (first, last) = row.answer();
        let at = first.midpoint(last).max(first + 1);
        row.ids.truncate(at);
        row.labels.truncate(at);
        row.attention.truncate(at);
        true
    }),
    ("samples of a pack see each other", Code::P001, |row, other| {
        row.ids.extend(&other.ids);
        row.labels.extend(&other.labels);
        row.attention.extend(&other.attention);
        true
    }),
    ("two BOS", Code::M006, |row, _| {
        let bos = row.ids[0];
        row.ids.insert(0, bos);
        row.labels.insert(0, IGNORE);
        row.attention.insert(0, 1);
        true
    }),
    ("a label is another id", Code::L001, |row, _| {
        let (first, _) = row.answer();
        row.labels[first] += 1;
        true
    }),
    ("labels are shifted", Code::L001, |row, _| {
        row.labels.remove(0);
        row.labels.push(IGNORE);
        true
    }),
    ("the mask starts late", Code::M010, |row, _| {
        let (first, last) = row.answer();
        row.labels[first] = IGNORE;
        last > first
    }),
    ("the mask ends early", Code::M010, |row, _| {
        let (first, last) = row.answer();
        row.labels[last] = IGNORE;
        last > first
    }),
    ("the mask has a hole", Code::M010, |row, _| {
        let (first, last) = row.answer();
        row.labels[first + 1] = IGNORE;
        last > first + 1
    }),
];

/// Conversations with a system message, one to three turns, and answers of several words; no two alike.
fn chats(n: usize) -> Vec<Value> {
    let words = ["tea", "garden", "bus", "map", "bird", "lane", "music", "evening", "cup", "rush hour"];
    let chat = |i: usize| {
        let mut messages = vec![json!({"role": "system", "content": "Answer honestly."})];
        for turn in 0..=i % 3 {
            let word = words[(i + 3 * turn) % words.len()];
            messages.push(json!({"role": "user", "content": format!("What about the {word}, number {i}?")}));
            messages.push(json!({"role": "assistant", "content": format!("The {word} is fine, I would say {} times.", i + turn)}));
        }
        json!({"messages": messages})
    };
    (0..n).map(chat).collect()
}

#[test]
fn planted_faults_are_found_in_their_rows_and_nowhere_else() {
    let folder = Goldens::repository();
    let (mut table, mut wrong) = (BTreeMap::new(), Vec::new());
    for name in ["chatml.jinja", "headers.jinja", "phi.jinja"] {
        let case = Case::of(&folder, name);
        let clean: Vec<Planted> = samples(&case.pipeline(Mode::Prepare, Boundary::Joint), &chats(240))
            .iter()
            .map(Planted::of)
            .collect();
        assert!(clean.len() > 200, "{name}: {}", clean.len());
        let verify = case.pipeline(Mode::Verify, Boundary::Split);
        let errors = |rows: &[Value]| -> Vec<BTreeSet<String>> {
            let scratch = Scratch::new();
            let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
            let (all, _) = outcomes(&verify, &scratch.file("rows.jsonl", lines));
            let of = |outcome: &Outcome| {
                codes(outcome).into_iter().filter(|code| !code.starts_with("D001")).collect()
            };
            all.iter().map(of).collect()
        };
        let rows: Vec<Value> = clean.iter().map(Planted::row).collect();
        let before = errors(&rows);
        assert!(
            before.iter().all(|found| found.iter().all(|code| code.ends_with(":w"))),
            "{name}: {before:?}"
        );
        let bos = case.folder.tokenizer.as_ref().unwrap().bos().is_some_and(|bos| clean[0].ids[0] == bos.id);
        for (what, code, plant) in FAULTS {
            if *code == Code::M006 && !bos {
                continue;
            }
            let faulty = |i: usize| {
                let mut row = Planted { ids: clean[i].ids.clone(), ..clean_copy(&clean[i]) };
                plant(&mut row, &clean[(i + 1) % clean.len()]).then(|| row.row())
            };
            // In one row.
            let at = clean.len() / 2;
            let mut one = rows.clone();
            one[at] = faulty(at).unwrap();
            for (i, (found, before)) in errors(&one).iter().zip(&before).enumerate() {
                if i == at && !found.iter().any(|f| f.starts_with(code.as_str())) {
                    wrong.push(format!("{name}, {what}: {found:?} {}", one[at]));
                } else if i != at && found != before {
                    wrong.push(format!("{name}, {what}: row {i}: {found:?}, not {before:?}"));
                }
            }
            // In all rows.
            let all: Vec<Value> = (0..clean.len()).filter_map(faulty).collect();
            let found =
                errors(&all).iter().filter(|f| f.iter().any(|f| f.starts_with(code.as_str()))).count();
            if found != all.len() {
                wrong.push(format!("{name}, {what}: in {found} of {} rows", all.len()));
            }
            *table.entry(*what).or_insert(0) += found;
        }
    }
    println!("{table:#?}");
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

fn clean_copy(row: &Planted) -> Planted {
    Planted {
        ids: row.ids.clone(),
        labels: row.labels.clone(),
        origins: row.origins.clone(),
        attention: row.attention.clone(),
    }
}

/// The source shows what the ids alone do not: which answers its author masks, and what was cut or changed.
#[test]
fn with_the_source_rows_labels_are_derived_again() {
    let folder = Goldens::repository();
    let case = Case::of(&folder, "headers.jinja");
    let mut source = chats(30);
    // Row 7 masks its answer; all of them have one more turn than that.
    source[7]["messages"][2]["train"] = false.into();
    let scratch = Scratch::new();
    let lines: String = source.iter().map(|row| format!("{row}\n")).collect();
    let path = scratch.file("source.jsonl", lines);
    let pipeline = case.pipeline(Mode::Verify, Boundary::Split);
    let reference = Arc::new(Reference::read(&pipeline, || Source::open(&path)).unwrap());
    let against = Pipeline { reference: Some(reference), ..pipeline.clone() };
    let clean = samples(&case.pipeline(Mode::Prepare, Boundary::Joint), &chats(30));
    let mut rows: Vec<Value> = clean.iter().map(foreign).collect();
    // Another id, a cut, two rows in one pack, a row that is not in the source, padding in front.
    rows[1]["input_ids"][9] = 5.into();
    for key in ["input_ids", "labels"] {
        rows[2][key].as_array_mut().unwrap().truncate(20);
        let second = rows[4][key].clone();
        rows[3][key].as_array_mut().unwrap().extend(second.as_array().unwrap().iter().cloned());
        rows[5][key]
            .as_array_mut()
            .unwrap()
            .insert(0, if key == "labels" { IGNORE.into() } else { PAD.into() });
    }
    rows[3]["seq_lengths"] = json!([clean[3].len(), clean[4].len()]);
    rows[5]["attention_mask"] = [0].into_iter().chain(vec![1; clean[5].len()]).collect();
    let found = |pipeline: &Pipeline| {
        let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
        let path = scratch.file("rows.jsonl", lines);
        let (all, _) = outcomes(pipeline, &path);
        let of = |outcome: &Outcome| {
            outcome.findings().iter().map(|f| (f.code, f.message.clone())).collect::<Vec<_>>()
        };
        all.iter().map(of).collect::<Vec<_>>()
    };
    let with = found(&against);
    let codes_of = |row: usize| with[row].iter().map(|(code, _)| *code).collect::<Vec<_>>();
    assert_eq!(codes_of(1), [Code::L002]);
    assert!(with[1][0].1.starts_with("token 9 is 5 \""), "{:?}", with[1]);
    assert!(
        codes_of(2).contains(&Code::L002) && with[2].iter().any(|f| f.1.contains("is the first 20 of the"))
    );
    assert_eq!(codes_of(3), [], "both sequences of the pack have their source rows");
    assert_eq!(codes_of(5), [], "padding is no token of the source");
    assert_eq!(codes_of(7), [Code::M004], "the author masks that answer");
    assert!(with[8..].iter().all(Vec::is_empty), "{with:?}");
    assert!(found(&pipeline)[7].is_empty(), "the ids alone do not say it");
}

#[test]
fn what_may_be_meant_is_no_error() {
    let folder = Goldens::repository();
    let case = Case::of(&folder, "chatml.jinja");
    let verify = case.pipeline(Mode::Verify, Boundary::Split);
    let clean = samples(&case.pipeline(Mode::Prepare, Boundary::Split), &chats(3));
    let row = Planted::of(&clean[2]);
    let found = |pipeline: &Pipeline, row: Value| codes(&pipeline.row(fields(&row)).unwrap());
    // The last answer alone.
    let mut last = clean_copy(&row);
    let (first, _) = last.answer();
    last.labels[..first].fill(IGNORE);
    assert_eq!(found(&verify, last.row()), [""; 0]);
    // Prompts with a weight, prompts that the policy supervises, rows with their own weights.
    let mut prompt = clean_copy(&row);
    prompt.learn(|origins, i| matches!(origins[i], Origin::Prompt { .. }));
    assert_eq!(found(&verify, prompt.row()), ["M004:e"]);
    let with = |policy: Policy| Pipeline { policy: policy.into(), ..verify.clone() };
    let policy = Policy { prompt_loss_weight: 0.1, ..(*verify.policy).clone() };
    assert_eq!(found(&with(policy), prompt.row()), [""; 0]);
    let all = Policy { objective: suasion_data::Objective::AllTokens, ..(*verify.policy).clone() };
    assert_eq!(found(&with(all), prompt.row()), [""; 0]);
    let mut weighted = prompt.row();
    weighted["weights"] = prompt.ids.iter().map(|_| 0.5).collect();
    assert_eq!(found(&verify, weighted), [""; 0]);
    // ms-swift's weights of 0 and 1 are a mask.
    let mut scaled = prompt.row();
    scaled["loss_scale"] = row.labels.iter().map(|label| f64::from(u8::from(*label != IGNORE))).collect();
    assert_eq!(found(&verify, scaled), [""; 0]);
    // Plain text, with labels and without; turns without labels.
    let tokenizer = case.folder.tokenizer.as_ref().unwrap();
    let plain = tokenizer.encode_text("Once upon a time there was a bus.").unwrap();
    assert_eq!(found(&verify, json!({"input_ids": plain, "labels": plain})), ["M008:w"]);
    assert_eq!(found(&verify, json!({"input_ids": plain})), ["M008:w"]);
    assert_eq!(found(&verify, json!({"input_ids": row.ids})), ["M008:e"]);
    // A masked thought before the answer.
    let thought = json!({"messages": [{"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nBecause."}]});
    let mut row = Planted::of(&samples(&case.pipeline(Mode::Prepare, Boundary::Split), &[thought])[0]);
    let text: Vec<String> = row.ids.iter().map(|&id| tokenizer.token_text(id)).collect();
    let end = (0..text.len()).find(|&i| text[..i].concat().ends_with("</think>")).unwrap();
    let (first, _) = row.answer();
    row.labels[first..end].fill(IGNORE);
    assert_eq!(found(&verify, row.row()), [""; 0]);
}

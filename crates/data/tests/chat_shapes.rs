//! The result for a conversation depends on the conversation alone: not on the shapes seen before it, and not on
//! the number of threads. It equals the result of its own proof without the cache of shapes.

mod common;

use common::{Goldens, golden_stops, goldens, material};
use rayon::prelude::*;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use suasion_data::example::Conversation;
use suasion_data::example::{Body, Example};
use suasion_data::render::Stops;
use suasion_data::source::Row;
use suasion_data::source::Source;
use suasion_data::template::{Chat, ChatRenderer, ChatTemplate, TemplateOptions};
use suasion_data::{Format, Policy, RowId};

fn id() -> RowId {
    RowId { file: Arc::from(Path::new("test.jsonl")), row: 0, line: Some(1), in_file: 0 }
}

fn options() -> TemplateOptions {
    TemplateOptions { date: Some(jiff::civil::date(2025, 1, 15)), ..TemplateOptions::default() }
}

/// The templates of the goldens with their stop texts.
fn templates(folder: &Goldens) -> BTreeMap<String, (Arc<ChatTemplate>, Stops)> {
    let meta = folder.json("goldens/template_meta.json");
    let one = |(name, meta): (&String, &Value)| {
        let source = folder.text(&format!("templates/{name}"));
        let (bos, eos) = (meta["bos_token"].as_str(), meta["eos_token"].as_str());
        let stops = golden_stops(name, meta);
        (name.clone(), (Arc::new(ChatTemplate::new(&source, bos, eos).unwrap()), stops))
    };
    meta["templates"].as_object().unwrap().iter().map(one).collect()
}

fn golden_conversations(folder: &Goldens) -> Vec<Conversation> {
    let all = folder.json("goldens/template_conversations.json");
    let one = |value: &Value| {
        let messages: Vec<Map<String, Value>> = serde_json::from_value(value["messages"].clone()).unwrap();
        Conversation {
            weights: vec![None; messages.len()],
            messages,
            tools: value["tools"].as_array().cloned(),
            kwargs: value["kwargs"].as_object().cloned().unwrap_or_default(),
            ..Conversation::default()
        }
    };
    all.as_object().unwrap().values().map(one).collect()
}

/// The first conversations of a data set.
fn conversations(path: &Path, n: usize) -> Vec<Conversation> {
    let Ok(mut source) = Source::open(path) else { return Vec::new() };
    let mut all = Vec::new();
    while let Ok(Some(raw)) = source.next_row() {
        let example = Row::parse(raw).and_then(|row| Example::from_row(row, Format::Auto));
        match example.map(|example| example.body) {
            Ok(Body::Chat(conversation)) => all.push(*conversation),
            Ok(Body::Alpaca(row)) => all.push(row.conversation()),
            _ => {}
        }
        if all.len() == n {
            break;
        }
    }
    all
}

fn words(chat: suasion_data::Result<Chat>) -> Result<Chat, String> {
    chat.map_err(|error| error.to_string())
}

/// Asserts this for each conversation; returns how many there are, and how many of them have a proof.
fn check(name: &str, template: &Arc<ChatTemplate>, stops: &Stops, all: &[Conversation]) -> (usize, usize) {
    let fresh = || ChatRenderer::new(template.clone(), Policy::default(), stops, &options());
    let (warm, threads) = (fresh(), fresh());
    let first: Vec<_> = all.iter().map(|c| words(warm.spans(id(), c))).collect();
    let again: Vec<_> = all.iter().rev().map(|c| words(warm.spans(id(), c))).rev().collect();
    let parallel: Vec<_> = all.par_iter().map(|c| words(threads.spans(id(), c))).collect();
    let cold: Vec<_> = all.par_iter().map(|c| words(fresh().spans(id(), c))).collect();
    let proved: Vec<_> = all.par_iter().map(|c| words(fresh().prove(id(), c))).collect();
    for i in 0..all.len() {
        let got = &first[i];
        for (other, how) in [(&again, "again"), (&parallel, "threads"), (&cold, "cold")] {
            assert_eq!(got, &other[i], "{name}, conversation {i}, {how}");
        }
        // A shape may have a proof although the row's own text prevents one; never the other way round.
        if proved[i].is_ok() || got.is_err() {
            assert_eq!(got, &proved[i], "{name}, conversation {i}");
        } else {
            println!("{name}, conversation {i}: only its shape has a proof; {:?}", proved[i]);
        }
    }
    (all.len(), first.iter().filter(|chat| chat.is_ok()).count())
}

#[test]
fn of_the_golden_conversations() {
    for folder in goldens() {
        let all = golden_conversations(&folder);
        let (mut rows, mut solved) = (0, 0);
        for (name, (template, stops)) in templates(&folder) {
            let (n, ok) = check(&name, &template, &stops, &all);
            (rows, solved) = (rows + n, solved + ok);
        }
        println!("{rows} conversations, {solved} with a proof");
        assert!(solved > folder.expect(500, 850), "{solved}");
    }
}

#[test]
fn of_the_data_sets() {
    let Some(material) = material() else { return };
    let folder = Goldens { dir: material.clone(), ours: false };
    let mut files: Vec<_> =
        std::fs::read_dir(material.join("datasets")).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    let sets: Vec<Vec<Conversation>> = files.iter().map(|path| conversations(path, 80)).collect();
    let all: Vec<Conversation> = sets.into_iter().flatten().collect();
    assert!(all.len() > 500, "{}", all.len());
    let templates = templates(&folder);
    let (mut rows, mut solved) = (0, 0);
    for name in [
        "trl/qwen2_5.jinja",
        "trl/qwen3.jinja",
        "trl/llama3.jinja",
        "trl/glm4moe.jinja",
        "trl/deepseekv3.jinja",
        "trl/deepseek_r1_distill_training.jinja",
        "trl/gptoss.jinja",
        "trl/qwen3_training.jinja",
        "axolotl/mistral_v2v3.jinja",
    ] {
        let (template, stops) = &templates[name];
        let (n, ok) = check(name, template, stops, &all);
        println!("{name}: {ok} of {n} with a proof");
        (rows, solved) = (rows + n, solved + ok);
    }
    println!("{rows} conversations, {solved} with a proof");
    assert!(solved * 2 > rows, "{solved} of {rows}");
}

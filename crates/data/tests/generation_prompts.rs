//! Each answer starts where transformers' generation prompt ends, if that is a prefix of the rendering
//! (`tests/generation_prompts.py`, in a Python with transformers). `SUASION_TEMPLATES` names a further folder of
//! templates; the script says where to get some.

mod common;

use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use suasion_data::example::Conversation;
use suasion_data::render::Stops;
use suasion_data::template::{ChatRenderer, ChatTemplate, TemplateOptions};
use suasion_data::{Code, Origin, Policy, RowId};

/// Texts that end a turn under any of the templates.
const STOPS: [&str; 12] = [
    "<end_of_turn>",
    "<|end|>",
    "<|eot_id|>",
    "<|user|>",
    "<|observation|>",
    "<|return|>",
    "<|call|>",
    "<|END_OF_TURN_TOKEN|>",
    "<end_of_utterance>",
    "<turn|>",
    "<|im_end|>",
    "<|endoftext|>",
];

#[derive(Debug, Default)]
struct Counts {
    conversations: usize,
    answers: usize,
    /// The prompt is a prefix: by a template without blocks, and with blocks.
    prefixes: usize,
    equal: usize,
    blocks: usize,
    blocks_equal: usize,
    /// The template has no generation prompt anywhere.
    promptless: usize,
    /// The prompt is not a prefix, and this is reported.
    others: usize,
    refused: usize,
    unproved: usize,
}

#[test]
fn answers_start_where_the_generation_prompt_ends() {
    let Some(python) = suasion_test_support::peers_python() else { return };
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut folders = vec![root.join("tests/goldens/templates")];
    folders.extend(suasion_test_support::material_folder().map(|folder| folder.join("templates")));
    folders.extend(std::env::var_os("SUASION_TEMPLATES").map(Into::into));
    let ran =
        Command::new(python).arg(root.join("tests/generation_prompts.py")).args(&folders).output().unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let lines = String::from_utf8(ran.stdout).unwrap();
    let rows: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let mut counts = Counts::default();
    let mut templates = BTreeSet::new();
    let mut wrong = Vec::new();
    for rows in rows.chunk_by(|a, b| a["template"] == b["template"]) {
        let name = rows[0]["template"].as_str().unwrap();
        templates.insert(name);
        check(name, rows, &mut counts, &mut wrong);
    }
    println!("{} templates: {counts:#?}", templates.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(counts.prefixes > 200 && counts.equal == counts.prefixes, "{counts:?}");
}

fn check(name: &str, rows: &[Value], counts: &mut Counts, wrong: &mut Vec<String>) {
    let text = |row: &Value, key: &str| row[key].as_str().map(str::to_string);
    let (bos, eos) = (text(&rows[0], "bos"), text(&rows[0], "eos").unwrap());
    let source = rows[0]["source"].as_str().unwrap();
    let template = Arc::new(ChatTemplate::new(source, bos.as_deref(), Some(&eos)).unwrap());
    let all = STOPS.iter().map(|stop| stop.to_string()).chain([eos.clone()]).collect();
    let stops = Stops { eos: Some(eos), all };
    let chats = ChatRenderer::new(template, Policy::default(), &stops, &TemplateOptions::default());
    let prompted = rows.iter().any(|row| {
        let answers = row["with"].as_object().unwrap();
        answers.iter().any(|(i, with)| *with != row["without"][i])
    });
    let blocks = source.contains("endgeneration");
    for row in rows {
        counts.conversations += 1;
        let messages: Vec<Map<String, Value>> =
            serde_json::from_value(row["conversation"]["messages"].clone()).unwrap();
        let c = Conversation {
            weights: vec![None; messages.len()],
            messages,
            tools: row["conversation"]["tools"].as_array().cloned(),
            ..Conversation::default()
        };
        let Some(whole) = row["whole"].as_str() else {
            counts.refused += 1;
            continue;
        };
        let shape = row["shape"].as_str().unwrap();
        let chat = match chats.spans(RowId::new(Path::new("rows.jsonl"), 0, None), &c) {
            Ok(chat) => chat,
            Err(error) => {
                // controls.jinja depends on the messages that follow; some templates only render content in parts,
                // and none of an answer's text. For a call without a text, the prompt is the only proof.
                let answers: Vec<_> = c.messages.iter().filter(|m| m["role"] == "assistant").collect();
                let mut texts = answers.iter().map(|m| m["content"].as_str().unwrap().trim());
                let prompts = row["with"].as_object().unwrap().values();
                let prefix = |(m, with): (&&Map<String, Value>, &Value)| {
                    m["content"] != "" || with.as_str().is_some_and(|with| whole.starts_with(with.trim_end()))
                };
                if !name.ends_with("controls.jinja")
                    && texts.all(|text| whole.contains(text))
                    && answers.iter().zip(prompts).all(prefix)
                {
                    wrong.push(format!("{name} {shape}: {error}"));
                }
                counts.unproved += 1;
                continue;
            }
        };
        // The two processes may disagree on today's date.
        if chat.rendered.text != whole {
            continue;
        }
        let mut reported = false;
        for (i, with) in row["with"].as_object().unwrap() {
            let turn: u16 = i.parse().unwrap();
            let own = |origin| matches!(origin, Origin::Response { turn: t } | Origin::EndOfTurn { turn: t } if t == turn);
            let Some(start) = chat.rendered.spans.iter().find(|s| own(s.origin)).map(|s| s.range.start)
            else {
                continue;
            };
            counts.answers += 1;
            match with.as_str().filter(|with| whole.starts_with(*with)) {
                _ if !prompted => counts.promptless += 1,
                Some(with) if blocks => {
                    counts.blocks += 1;
                    counts.blocks_equal += usize::from(start == with.len());
                }
                Some(with) => {
                    counts.prefixes += 1;
                    counts.equal += usize::from(start == with.len());
                    if start != with.len() {
                        wrong.push(format!(
                            "{name} {shape}: message {i} starts at {start}, its prompt ends at {}: ..{:?}",
                            with.len(),
                            &whole[start.min(with.len()).saturating_sub(12)..]
                        ));
                    }
                }
                None => {
                    counts.others += 1;
                    reported = true;
                }
            }
        }
        if reported != chat.findings.iter().any(|found| found.code == Code::G001) && prompted {
            wrong.push(format!(
                "{name} {shape}: G001 {}",
                if reported { "is missing" } else { "without a reason" }
            ));
        }
    }
}

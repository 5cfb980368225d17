//! docs/findings.md is generated from the rules, and names agree with those written to files.

mod common;

use common::{Scratch, outcomes};
use serde_json::json;
use std::fmt::Write as _;
use std::sync::Arc;
use suasion_data::audit::{Example, RULES};
use suasion_data::source::Source;
use suasion_data::template::ChatTemplate;
use suasion_data::tokens::Tokenizer;
use suasion_data::{Boundary, Code, DropReason, Format, Mode, ModelFolder, Pipeline, Policy, Reference};

const INTRODUCTION: &str = "\
# Findings

`suasion verify` and `suasion prepare` report findings under these codes. `verify` takes `--select` and `--ignore` with codes or their
beginnings (`M`, `M00`), and exits with 1 where there are errors that `allow_findings` does not name. `prepare` writes all findings to
`x.jsonl.findings.jsonl` beside `x.jsonl`. Every row is checked; nothing is sampled. What `verify` finds in rows that other programs have
tokenised, with and without a tokenizer, a chat template and the source rows, is described in [audit.md](audit.md).

`verify --output-format github` prints annotations for GitHub Actions, `sarif` a log for code scanning (at most 25,000 results, errors
first; the log says how many were left out), `json` what `--json` prints. `--max-findings N` lists at most N findings; all are counted.

In the examples 0 is padding, 1 BOS, 2 the stop token, 3 the header of a user's message and 4 that of an answer; other ids are text.
";

/// A paragraph wrapped at 130 columns, the lines of a list item indented.
fn wrapped(paragraph: &str) -> String {
    let indent = if paragraph.starts_with("- ") { "  " } else { "" };
    let mut lines = vec![String::new()];
    for word in paragraph.split(' ') {
        let line = lines.last_mut().unwrap();
        if line.is_empty() {
            line.push_str(word);
        } else if line.len() + 1 + word.len() <= 130 {
            line.push(' ');
            line.push_str(word);
        } else {
            lines.push(format!("{indent}{word}"));
        }
    }
    lines.join("\n")
}

fn page() -> String {
    let mut page = INTRODUCTION.to_string();
    for rule in RULES {
        let _ = writeln!(page, "\n## {} ({}): {}", rule.code, rule.code.level(), rule.meaning);
        for block in rule.doc.split('\n') {
            let _ = writeln!(page, "{}", wrapped(block));
        }
        let set = match rule.example.set {
            "" => String::new(),
            set => format!(", with `{set}`"),
        };
        let _ = writeln!(page, "\nExample{set}:\n\n```json\n{}\n```", rule.example.rows);
        let _ = writeln!(page, "\n{}", wrapped(&format!("Fix: {}.", rule.help)));
        if rule.refuses {
            let _ = writeln!(page, "\n`train` does not train on such rows.");
        }
    }
    page
}

/// `SUASION_BLESS=1 cargo test -p suasion-data --test rules` writes the page.
#[test]
fn the_page_of_findings_is_made_of_the_rules() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/findings.md");
    if std::env::var_os("SUASION_BLESS").is_some() {
        std::fs::write(path, page()).unwrap();
    }
    assert_eq!(std::fs::read_to_string(path).unwrap(), page(), "write it with SUASION_BLESS=1");
}

/// The vocabulary of the examples: its first ids as documented, then one letter each.
fn tokenizer() -> Arc<Tokenizer> {
    let mut vocab = serde_json::Map::new();
    let special = ["<pad>", "<s>", "</s>", "<u>", "<a>"];
    for (id, token) in special.iter().enumerate() {
        vocab.insert((*token).into(), id.into());
    }
    for c in ('a'..='z').chain(['?', 'Ġ']) {
        vocab.insert(c.to_string(), vocab.len().into());
    }
    vocab.insert("ab".into(), vocab.len().into());
    let added: Vec<serde_json::Value> = special
        .iter()
        .enumerate()
        .map(|(id, token)| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        })
        .collect();
    let post = json!({"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}});
    let level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true});
    let json = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": level, "post_processor": post, "decoder": level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": ["a b"]}});
    let config = json!({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"});
    Arc::new(Tokenizer::from_bytes(json.to_string().as_bytes(), Some(config.to_string().as_bytes())).unwrap())
}

const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}{% if m.role in ['user', 'assistant'] %}\
    {{ '<u>' if m.role == 'user' else '<a>' }}{{ m.content | trim }}</s>{% endif %}{% endfor %}\
    {% if add_generation_prompt %}<a>{% if thinks %}?{% endif %}{% endif %}";

/// Each rule's example has its finding; if it needs a setting, only with that.
#[test]
fn examples_have_what_they_show() {
    let template = Arc::new(ChatTemplate::new(TEMPLATE, Some("<s>"), Some("</s>")).unwrap());
    for rule in RULES {
        let found = |set: &str| {
            let mut policy = Policy::default();
            let mut folder = ModelFolder::from(tokenizer());
            folder.template = Some(template.clone());
            let mut source = None;
            match set.split_once('=').unwrap_or((set, "")) {
                ("", _) => {}
                ("boundary", "joint") => policy.boundary = Boundary::Joint,
                ("max_length", n) => policy.max_length = Some(n.parse().unwrap()),
                ("max_position_embeddings", n) => folder.positions = n.parse().ok(),
                ("template_kwargs.thinks", _) => {
                    _ = policy.template_kwargs.insert("thinks".into(), true.into())
                }
                ("--source: a row with another text", _) => {
                    let other = json!({"messages": [{"role": "user", "content": "z"}, {"role": "assistant", "content": "y"}]});
                    source = Some(other);
                }
                other => panic!("{other:?}"),
            }
            let scratch = Scratch::new();
            let path = scratch.file("rows.jsonl", rule.example.rows);
            let mut pipeline = Pipeline { mode: Mode::Verify, ..Pipeline::new(folder, policy) };
            if let Some(source) = source {
                let path = scratch.file("source.jsonl", source.to_string());
                pipeline.reference =
                    Some(Arc::new(Reference::read(&pipeline, || Source::open(&path)).unwrap()));
            }
            outcomes(&pipeline, &path).1.findings.get(&rule.code).map(|found| found.level)
        };
        let Example { set, .. } = rule.example;
        assert_eq!(found(set), Some(rule.code.level()), "{}", rule.code);
        assert!(set.is_empty() || found("").is_none(), "{}", rule.code);
    }
}

/// Names come from two derives.
#[test]
fn names_are_those_that_serde_writes() {
    for code in Code::ALL {
        assert_eq!(json!(code), code.as_str());
        assert_eq!(json!(code.level()), code.level().to_string());
    }
    for reason in DropReason::ALL {
        assert_eq!(json!(reason), reason.name());
    }
    let formats = [
        "auto",
        "input_full",
        "prompt_completion",
        "tokenised",
        "messages",
        "sharegpt",
        "alpaca",
        "segments",
    ];
    for name in formats.into_iter().chain(["preference"]) {
        assert_eq!(serde_json::from_value::<Format>(json!(name)).unwrap().name(), name);
    }
}

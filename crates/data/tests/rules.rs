//! docs/findings.md is generated from the rules, and names agree with what is written to files.

use serde_json::json;
use std::fmt::Write as _;
use suasion_data::audit::RULES;
use suasion_data::{Code, DropReason, Format};

const INTRODUCTION: &str = "\
# Findings

`suasion verify` and `suasion prepare` report findings under these codes. `verify` takes `--select` and `--ignore` with codes or their
beginnings (`M`, `M00`), and exits with 1 where there are errors. `prepare` writes all findings to `x.jsonl.findings.jsonl` beside `x.jsonl`.
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

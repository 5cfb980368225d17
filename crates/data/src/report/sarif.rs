//! Findings as SARIF 2.1.0, for code scanning services such as GitHub's.

use super::spool::{Findings, Located, Quotas};
use super::text::visible;
use crate::audit::RULES;
use crate::pipeline::Summary;
use crate::{Code, Level};
use serde::ser::{Error as _, SerializeSeq};
use serde::{Serialize, Serializer};
use serde_json::{Value, json};
use std::collections::HashMap;

/// The maximal number of results per run that GitHub accepts.
pub const RESULTS: u64 = 25_000;

const REPOSITORY: &str = env!("CARGO_PKG_REPOSITORY");

/// A log with one run: the rules, and at most [`RESULTS`] results, errors first.
pub fn log(summary: &Summary, findings: &Findings) -> impl Serialize {
    #[derive(Serialize)]
    struct Log<'a> {
        #[serde(rename = "$schema")]
        schema: &'static str,
        version: &'static str,
        runs: [Run<'a>; 1],
    }
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Run<'a> {
        tool: Value,
        invocations: Value,
        column_kind: &'static str,
        results: Results<'a>,
        properties: Value,
    }
    let quotas = findings.quotas(Some(RESULTS), None);
    let left_out = findings.len() - quotas.values().sum::<u64>();
    let mut invocation = json!({"executionSuccessful": true});
    if left_out > 0 {
        let text = format!(
            "{left_out} of {} findings are left out: {} are listed, errors first. `suasion verify --json` has all of them.",
            findings.len(),
            findings.len() - left_out
        );
        invocation["toolExecutionNotifications"] = json!([{"level": "note", "message": {"text": text}}]);
    }
    Log {
        schema: "https://json.schemastore.org/sarif-2.1.0.json",
        version: "2.1.0",
        runs: [Run {
            tool: json!({"driver": {
                "name": "suasion",
                "semanticVersion": env!("CARGO_PKG_VERSION"),
                "informationUri": REPOSITORY,
                "rules": RULES.iter().map(|rule| descriptor(rule.code)).collect::<Vec<_>>(),
            }}),
            invocations: json!([invocation]),
            column_kind: "unicodeCodePoints",
            results: Results { findings, quotas },
            properties: json!({
                "rows": summary.rows,
                "trainableRows": summary.trainable_rows,
                "tokens": summary.tokens,
                "supervisedTokens": summary.supervised_tokens,
                "findings": findings.len(),
                "findingsLeftOut": left_out,
            }),
        }],
    }
}

fn level(level: Level) -> &'static str {
    match level {
        Level::Error => "error",
        Level::Warning => "warning",
        Level::Note => "note",
    }
}

fn descriptor(code: Code) -> Value {
    let rule = code.rule();
    let set = if rule.example.set.is_empty() { String::new() } else { format!(" ({})", rule.example.set) };
    let example = format!("Example{set}:\n\n```json\n{}\n```", rule.example.rows);
    json!({
        "id": code.as_str(),
        "shortDescription": {"text": rule.meaning},
        "fullDescription": {"text": rule.doc},
        "help": {
            "text": format!("{}\n\nFix: {}.", rule.doc, rule.help),
            "markdown": format!("{}\n\n{example}\n\n**Fix**: {}.", rule.doc, rule.help),
        },
        "helpUri": format!("{REPOSITORY}/blob/main/docs/findings.md"),
        "defaultConfiguration": {"level": level(code.level())},
        "properties": {"tags": ["training-data"], "precision": "very-high"},
    })
}

struct Results<'a> {
    findings: &'a Findings,
    quotas: Quotas,
}

impl Serialize for Results<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(None)?;
        let mut seen = HashMap::new();
        let written = self.findings.each(self.quotas.clone(), |located| {
            list.serialize_element(&result(&located, &mut seen))
                .map_err(|error| std::io::Error::other(error.to_string()))
        });
        written.map_err(S::Error::custom)?;
        list.end()
    }
}

/// A result. Its fingerprint depends on the code and on the row's content, not on the row's position; equal rows
/// are numbered.
fn result(located: &Located, seen: &mut HashMap<u64, u32>) -> Value {
    let Located { finding, tokens, file, line, in_file, content } = located;
    let hash = blake3::hash(format!("{}\n{content:016x}", finding.code).as_bytes());
    let hash = hash.as_bytes().iter().take(8).fold(0, |sum: u64, &byte| sum << 8 | u64::from(byte));
    let nth = seen.entry(hash).or_insert(0);
    *nth += 1;
    // A link in a message would become a link in the page that shows it.
    let text = visible(&finding.message).replace("](", "] (");
    json!({
        "ruleId": finding.code.as_str(),
        "ruleIndex": finding.code as usize,
        "level": level(finding.level),
        "message": {"text": format!("row {}: {text}", finding.row)},
        "locations": [{
            "physicalLocation": {
                "artifactLocation": {"uri": uri(file)},
                // In files without lines, rows are counted.
                "region": {"startLine": line.unwrap_or(in_file + 1)},
            },
            "logicalLocations": [{"name": format!("row {in_file}"), "kind": "row"}],
        }],
        "partialFingerprints": {"primaryLocationLineHash": format!("{hash:016x}:{nth}")},
        "properties": {"row": finding.row, "tokens": tokens.as_ref().map(|t| [t.start, t.end])},
    })
}

/// A path as a URI: relative if the path is relative.
fn uri(path: &str) -> String {
    let path = path.strip_prefix("./").unwrap_or(path);
    let mut out = String::from(if path.starts_with('/') { "file://" } else { "" });
    for byte in path.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                out.push(char::from(byte))
            }
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_uris() {
        assert_eq!(uri("data/train.jsonl"), "data/train.jsonl");
        assert_eq!(uri("./a b\x1b.jsonl"), "a%20b%1B.jsonl");
        assert_eq!(uri("/data/ü.parquet"), "file:///data/%C3%BC.parquet");
    }
}

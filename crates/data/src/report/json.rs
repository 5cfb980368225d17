//! The value that `verify --json` prints.

use super::spool::Findings;
use crate::pipeline::Summary;
use serde::Serialize;
use serde_json::{Map, Value, json};

/// `{"rows", "trainable_rows", "tokens", "supervised_tokens", "sections", "findings", "counts"}`.
pub fn verify(summary: &Summary, findings: &Findings) -> impl Serialize {
    #[derive(Serialize)]
    struct Verify<'a> {
        rows: u64,
        trainable_rows: u64,
        tokens: u64,
        supervised_tokens: u64,
        sections: Map<String, Value>,
        findings: &'a Findings,
        counts: Map<String, Value>,
    }
    let section = |name: &str, tokens: u64| {
        let (before, after) = (summary.share_before(name), summary.share_after(name));
        (name.to_string(), json!({"tokens": tokens, "share_before": before, "share_after": after}))
    };
    Verify {
        rows: summary.rows,
        trainable_rows: summary.trainable_rows,
        tokens: summary.tokens,
        supervised_tokens: summary.supervised_tokens,
        sections: summary.sections().map(|(name, stats)| section(name, stats.tokens)).collect(),
        findings,
        counts: summary
            .findings
            .iter()
            .map(|(code, c)| (code.as_str().to_string(), c.count.into()))
            .collect(),
    }
}

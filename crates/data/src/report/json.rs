//! For programs: the value that `verify --json` prints.

use crate::Finding;
use crate::pipeline::Summary;
use serde_json::{Map, Value, json};

/// `{"rows", "trainable_rows", "tokens", "supervised_tokens", "sections", "findings", "counts"}` (CLI.md).
pub fn verify(summary: &Summary, findings: &[Finding]) -> Value {
    let sections: Map<String, Value> = summary
        .sections()
        .map(|(name, stats)| {
            let value = json!({
                "tokens": stats.tokens,
                "share_before": summary.share_before(name),
                "share_after": summary.share_after(name),
            });
            (name.to_string(), value)
        })
        .collect();
    let counts: Map<String, Value> =
        summary.findings.iter().map(|(code, c)| (code.as_str().to_string(), c.count.into())).collect();
    json!({
        "rows": summary.rows,
        "trainable_rows": summary.trainable_rows,
        "tokens": summary.tokens,
        "supervised_tokens": summary.supervised_tokens,
        "sections": sections,
        "findings": findings,
        "counts": counts,
    })
}

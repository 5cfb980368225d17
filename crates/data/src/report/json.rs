//! The value that `verify --json` prints.

use crate::pipeline::Summary;
use crate::{Error, Finding, Result};
use serde::ser::{Error as _, SerializeSeq};
use serde::{Serialize, Serializer};
use serde_json::{Map, Value, json};
use std::cell::RefCell;
use std::io::{self, BufRead, BufReader, Seek, Write};
use tempfile::SpooledTempFile;

/// Bytes of findings that are kept in memory; more are in an unnamed temporary file.
const IN_MEMORY: usize = 8 << 20;

/// Any number of findings, in their order.
#[derive(Debug)]
pub struct Findings(RefCell<SpooledTempFile>);

impl Default for Findings {
    fn default() -> Findings {
        Findings(RefCell::new(SpooledTempFile::new(IN_MEMORY)))
    }
}

impl Findings {
    /// Adds a finding.
    ///
    /// # Errors
    /// [`Error::Io`] where the folder for temporary files is full or cannot be used.
    pub fn push(&mut self, finding: &Finding) -> Result<()> {
        let file = self.0.get_mut();
        let written = serde_json::to_writer(&mut *file, finding).map_err(io::Error::from);
        written.and_then(|()| file.write_all(b"\n")).map_err(|e| Error::io(std::env::temp_dir(), e))
    }
}

impl Serialize for Findings {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut file = self.0.borrow_mut();
        file.rewind().map_err(S::Error::custom)?;
        let mut list = serializer.serialize_seq(None)?;
        for line in BufReader::new(&mut *file).lines() {
            let line = line.map_err(S::Error::custom)?;
            list.serialize_element(&serde_json::from_str::<Finding>(&line).map_err(S::Error::custom)?)?;
        }
        list.end()
    }
}

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

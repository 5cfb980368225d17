//! Prepared data on disk: `x.jsonl`, `x.findings.jsonl` and `x.manifest.json` (CLI.md).

mod record;

pub use record::{Boundaries, Record, Rows};

use crate::atomic::{AtomicFile, write_atomic};
use crate::pipeline::{Outcome, SECTION_ORDER, Summary};
use crate::policy::{Objective, Policy};
use crate::source::SourceHash;
use crate::tokens::Tokenizer;
use crate::{Error, Finding, MASKING_VERSION, Result, Sample};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// What prepared data was made from, and what it holds. A trainer compares [`Manifest::fingerprint`]s.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Always `suasion-prepared`.
    pub format: String,
    /// [`MASKING_VERSION`] of the code that made it.
    pub masking_version: u32,
    /// The source file.
    pub source: SourceHash,
    /// [`Tokenizer::fingerprint`]; null for rows that came as tokens.
    pub tokenizer: Option<String>,
    /// [`crate::template::ChatTemplate::fingerprint`]; absent where no row went through a chat template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// Every choice that decided labels.
    pub policy: Policy,
    /// Rows and tokens.
    pub counts: Counts,
    /// blake3 over what decides the labels: the source's hash, the tokenizer, the chat template, the policy (with the
    /// pinned date), the masking version.
    pub fingerprint: String,
}

/// The counts in a [`Manifest`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Counts {
    /// Rows of the source.
    pub rows: u64,
    /// Rows in the file.
    pub kept: u64,
    /// Kept rows that were cut.
    pub cut: u64,
    /// Rows left out, by reason.
    pub dropped: BTreeMap<String, u64>,
    /// Rows that could not be samples.
    pub failed: u64,
    /// Tokens in the file.
    pub tokens: u64,
    /// Labels that are not -100.
    pub supervised_tokens: u64,
    /// Targets after the shift by one.
    pub targets: u64,
    /// Tokens per origin.
    pub sections: BTreeMap<String, u64>,
    /// Findings per code.
    pub findings: BTreeMap<String, u64>,
}

impl Counts {
    /// The counts of a run.
    pub fn of(summary: &Summary) -> Counts {
        Counts {
            rows: summary.rows,
            kept: summary.kept,
            cut: summary.cut,
            dropped: summary.dropped.iter().map(|(reason, n)| (reason.name().to_string(), *n)).collect(),
            failed: summary.failed,
            tokens: summary.tokens,
            supervised_tokens: summary.supervised_tokens,
            targets: summary.targets,
            sections: SECTION_ORDER
                .iter()
                .filter_map(|name| summary.sections.get(name).map(|s| (name.to_string(), s.tokens)))
                .collect(),
            findings: summary.findings.iter().map(|(code, c)| (code.as_str().to_string(), c.count)).collect(),
        }
    }
}

impl Manifest {
    /// The manifest of a run.
    pub fn new(
        summary: &Summary,
        source: SourceHash,
        tokenizer: Option<&Tokenizer>,
        policy: &Policy,
    ) -> Manifest {
        let tokenizer = tokenizer.map(|t| t.fingerprint().to_string());
        let template = summary.template.clone();
        let policy = summary.pinned(policy);
        let fingerprint =
            fingerprint_with(&source.blake3, tokenizer.as_deref(), template.as_deref(), &policy);
        Manifest {
            format: "suasion-prepared".into(),
            masking_version: MASKING_VERSION,
            source,
            tokenizer,
            template,
            policy,
            counts: Counts::of(summary),
            fingerprint,
        }
    }

    /// The manifest beside a prepared file, or `None` where there is none.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Source`] where it is no manifest.
    pub fn beside(data: impl AsRef<Path>) -> Result<Option<Manifest>> {
        let path = manifest_path(data.as_ref());
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io(path, e)),
        };
        serde_json::from_slice(&bytes).map(Some).map_err(|e| Error::Source {
            path,
            message: format!("not a manifest: {e}"),
            help: "prepare the data again".into(),
        })
    }

    /// `policy` with what decides whether a label of these rows is right: the weights and the objective that
    /// they were prepared under.
    pub fn asked(&self, policy: &Policy) -> Policy {
        let mut asked = policy.clone();
        asked.prompt_loss_weight = self.policy.prompt_loss_weight;
        asked.loss_weights.clone_from(&self.policy.loss_weights);
        asked.append_eos = self.policy.append_eos;
        if self.policy.objective == Objective::AllTokens {
            asked.objective = Objective::AllTokens;
        }
        asked
    }

    /// The same for the chat template; `None` where they agree or one of the two has none.
    pub fn other_template(&self, template: Option<&str>) -> Option<String> {
        match (self.template.as_deref(), template) {
            (Some(theirs), Some(ours)) if theirs != ours => {
                Some("it was prepared with another chat template than the model's".into())
            }
            _ => None,
        }
    }

    /// Compares what the labels depend on with another tokenizer and policy. Returns what differs, in words.
    pub fn mismatches(&self, tokenizer: Option<&str>, policy: &Policy) -> Vec<String> {
        let mut out = Vec::new();
        if self.masking_version != MASKING_VERSION {
            out.push(format!(
                "it was prepared under masking version {}, this is version {MASKING_VERSION}",
                self.masking_version
            ));
        }
        if let (Some(theirs), Some(ours)) = (self.tokenizer.as_deref(), tokenizer)
            && theirs != ours
        {
            let short = |s: &str| s.chars().take(12).collect::<String>();
            out.push(format!(
                "it was prepared with the tokenizer {}, the model's is {}",
                short(theirs),
                short(ours)
            ));
        }
        if self.policy.objective != policy.objective {
            out.push(format!(
                "its objective is {:?}, the run's is {:?}",
                self.policy.objective, policy.objective
            ));
        }
        out
    }
}

/// blake3, in hex, over what decides the labels of rows that went through a chat template, or through none.
pub fn fingerprint_with(
    source: &str,
    tokenizer: Option<&str>,
    template: Option<&str>,
    policy: &Policy,
) -> String {
    let plain = fingerprint(source, tokenizer, policy);
    match template {
        None => plain,
        Some(template) => blake3::hash(format!("{plain} {template}").as_bytes()).to_hex().to_string(),
    }
}

/// blake3, in hex, over what decides the labels of rows that need no chat template.
pub fn fingerprint(source: &str, tokenizer: Option<&str>, policy: &Policy) -> String {
    // A JSON array keeps the parts apart; the policy's maps are sorted, so the text is the same for the same policy.
    let text = serde_json::to_string(&(MASKING_VERSION, source, tokenizer, policy)).unwrap_or_default();
    blake3::hash(text.as_bytes()).to_hex().to_string()
}

/// `x.jsonl`, `x.jsonl.gz` or `x` → `x`.
fn stem(path: &Path) -> PathBuf {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let name = name.strip_suffix(".gz").or(name.strip_suffix(".zst")).unwrap_or(&name);
    let name = name.strip_suffix(".jsonl").or(name.strip_suffix(".json")).unwrap_or(name);
    path.with_file_name(name)
}

/// `x.findings.jsonl` beside `x.jsonl`.
pub fn findings_path(data: &Path) -> PathBuf {
    let mut name = stem(data).into_os_string();
    name.push(".findings.jsonl");
    name.into()
}

/// `x.manifest.json` beside `x.jsonl`.
pub fn manifest_path(data: &Path) -> PathBuf {
    let mut name = stem(data).into_os_string();
    name.push(".manifest.json");
    name.into()
}

/// Writes prepared data. Nothing appears under its name before [`PreparedWriter::finish`].
pub struct PreparedWriter {
    path: PathBuf,
    rows: AtomicFile,
    findings: AtomicFile,
    with_text: bool,
    buffer: Vec<u8>,
}

impl PreparedWriter {
    /// Starts `path` and its findings. `with_text` adds the rendered text to each line.
    ///
    /// # Errors
    /// [`Error::Io`] where the folder cannot be written to.
    pub fn create(path: impl AsRef<Path>, with_text: bool) -> Result<PreparedWriter> {
        let path = path.as_ref().to_path_buf();
        let rows = AtomicFile::create(&path)?;
        let findings = AtomicFile::create(findings_path(&path))?;
        Ok(PreparedWriter { path, rows, findings, with_text, buffer: Vec::with_capacity(1 << 16) })
    }

    /// Writes what became of a row: its line, its findings, or both.
    ///
    /// # Errors
    /// [`Error::Io`], a full disk among them.
    pub fn write(&mut self, outcome: &Outcome) -> Result<()> {
        if let Outcome::Kept(kept) = outcome {
            self.buffer.clear();
            let text = kept.text.as_deref().filter(|_| self.with_text);
            Record::of(&kept.sample, text).write_json(&mut self.buffer);
            self.rows.write_all(&self.buffer).map_err(|e| Error::io(&self.path, e))?;
        }
        for finding in outcome.findings() {
            self.finding(finding)?;
        }
        Ok(())
    }

    fn finding(&mut self, finding: &Finding) -> Result<()> {
        let io_error = |e| Error::io(findings_path(&self.path), e);
        serde_json::to_writer(&mut self.findings, finding).map_err(|e| io_error(e.into()))?;
        self.findings.write_all(b"\n").map_err(io_error)
    }

    /// Completes the files and writes the manifest; the rows appear last, when all that belongs to them is there.
    ///
    /// # Errors
    /// [`Error::Io`], a full disk among them.
    pub fn finish(self, manifest: &Manifest) -> Result<()> {
        self.findings.commit()?;
        let path = manifest_path(&self.path);
        write_atomic(&path, |w| {
            serde_json::to_writer_pretty(&mut *w, manifest)?;
            w.write_all(b"\n")
        })?;
        self.rows.commit()
    }
}

/// Reads prepared data back (or any tokenised rows): the samples as they were written.
///
/// # Errors
/// As [`crate::Pipeline::run`].
pub fn read(path: impl AsRef<Path>, policy: &Policy) -> Result<Vec<Sample>> {
    let policy = Policy { max_length: None, ..policy.clone() };
    crate::Pipeline::new(None, &policy).samples(path).map(|(samples, _)| samples)
}

//! The manifest: the inputs of prepared data, and how they have changed since.

use super::names::{Form, MANIFEST, Shape, ending, findings_path, former_names, manifest_path, stem};
use crate::pack::Fill;
use crate::pipeline::{Pipeline, SECTION_ORDER, Summary};
use crate::policy::{Objective, Policy};
use crate::source::{Source, SourceHash};
use crate::{Error, MASKING_VERSION, ModelFolder, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;
use suasion_files::Written;

/// The inputs and the contents of prepared data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Manifest {
    /// Always `suasion-prepared`.
    pub format: String,
    /// [`MASKING_VERSION`] of the code that made it.
    pub masking_version: u32,
    /// The source.
    pub source: SourceHash,
    /// The tokenizer's fingerprint; null without a tokenizer.
    pub tokenizer: Option<String>,
    /// The chat template's fingerprint, if it rendered a row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// The options that determined labels.
    pub policy: Policy,
    /// Rows and tokens.
    pub counts: Counts,
    /// BLAKE3 of everything that determines the labels: the source's hash, the tokenizer, the chat template, the
    /// policy (with the pinned date), the masking version.
    pub fingerprint: String,
    /// True if instructions were rendered without a chat template because there is none.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub untemplated: bool,
    /// The number of embeddings that ids were checked against.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vocab_size: Option<usize>,
    /// Options that affected the files' bytes apart from the labels.
    #[serde(default, rename = "layout")]
    pub shape: Shape,
    /// The files of rows, in order.
    #[serde(default)]
    pub files: Vec<OutputFile>,
    /// The files of a folder that describe its files of rows.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub about: Vec<OutputFile>,
    /// The numbers of the packs, if rows were packed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packs: Option<Fill>,
}

/// A file of rows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct OutputFile {
    /// Its name, in the folder of the manifest.
    pub name: String,
    /// Its size and hash.
    #[serde(flatten)]
    pub written: Written,
}

/// Everything except the source that determines the bytes of prepared data.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Inputs {
    masking_version: u32,
    tokenizer: Option<String>,
    template: Option<String>,
    policy: Policy,
    vocab_size: Option<usize>,
    #[serde(rename = "layout")]
    shape: Shape,
}

impl Inputs {
    /// The inputs of a pipeline.
    pub fn of(pipeline: &Pipeline, shape: Shape) -> Inputs {
        let ModelFolder { tokenizer, template, vocab_size, .. } = &*pipeline.folder;
        let dated = template.as_ref().is_some_and(|template| template.writes_date());
        let today = dated.then(|| jiff::Zoned::now().date().to_string());
        let template_date = pipeline.policy.template_date.clone().or(today);
        Inputs {
            masking_version: MASKING_VERSION,
            tokenizer: tokenizer.as_ref().map(|t| t.fingerprint().to_string()),
            template: template.as_ref().map(|t| t.fingerprint().to_string()),
            policy: Policy { template_date, ..(*pipeline.policy).clone() },
            vocab_size: *vocab_size,
            shape,
        }
    }

    /// The key of a journal: these inputs, the source as far as known without reading it, and whether the files
    /// have a column of weights.
    pub fn job(&self, files: &[PathBuf], output: &Path, weights: bool) -> Result<Value> {
        let facts = |path: &PathBuf| {
            let meta = path.metadata().map_err(|e| Error::io(path, e))?;
            let modified = meta.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
            Ok((path.display().to_string(), meta.len(), modified.map(|t| t.as_nanos().to_string())))
        };
        let files = files.iter().map(facts).collect::<Result<Vec<_>>>()?;
        // `x.jsonl` and `x.jsonl.gz` share one folder of shards.
        let ending = ending(output);
        Ok(serde_json::json!({"source": files, "inputs": self, "ending": ending, "weights": weights}))
    }

    /// The differences, one clause each.
    fn differences(&self, before: &Inputs, untemplated: bool) -> Vec<String> {
        let mut out = Vec::new();
        let mut differs = |same: bool, clause: &str| {
            if !same {
                out.push(clause.to_string());
            }
        };
        differs(self.masking_version == before.masking_version, "the masking rules have changed");
        differs(self.tokenizer == before.tokenizer, "the tokenizer differs");
        differs(
            // A template that rendered no row has no effect, unless it would have one now.
            self.template == before.template || (before.template.is_none() && !untemplated),
            "the chat template differs",
        );
        differs(self.vocab_size == before.vocab_size, "the number of embeddings differs");
        let keys = |inputs: &Inputs| -> BTreeMap<String, Value> {
            [serde_json::to_value(&inputs.policy), serde_json::to_value(inputs.shape)]
                .into_iter()
                .filter_map(|value| serde_json::from_value::<BTreeMap<String, Value>>(value.ok()?).ok())
                .flatten()
                .collect()
        };
        let (mut now, then) = (keys(self), keys(before));
        if before.template.is_none() {
            // The date has no effect either if no row was rendered with it.
            now.remove("template_date");
            now.extend(then.get_key_value("template_date").map(|(k, v)| (k.clone(), v.clone())));
        }
        let names: BTreeSet<&String> = now.keys().chain(then.keys()).collect();
        let show = |value: Option<&Value>| value.map_or("not set".into(), Value::to_string);
        for name in names.into_iter().filter(|name| now.get(*name) != then.get(*name)) {
            out.push(format!("{name} was {}, is {}", show(then.get(name)), show(now.get(name))));
        }
        out
    }
}

/// The counts of a [`Manifest`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Counts {
    /// Rows of the source.
    pub rows: u64,
    /// Rows that were kept.
    pub kept: u64,
    /// Kept rows that were cut.
    pub cut: u64,
    /// Rows left out, by reason.
    pub dropped: BTreeMap<String, u64>,
    /// Rows that could not become samples.
    pub failed: u64,
    /// Tokens of kept rows.
    pub tokens: u64,
    /// Labels that are not -100.
    pub supervised_tokens: u64,
    /// Targets after the shift by one.
    pub targets: u64,
    /// Tokens per origin.
    pub sections: BTreeMap<String, u64>,
    /// Findings per code.
    pub findings: BTreeMap<String, u64>,
    /// [`Summary::not_remembered`].
    #[serde(default, skip_serializing_if = "is_zero")]
    pub not_remembered: u64,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
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
            not_remembered: summary.not_remembered,
        }
    }
}

impl Manifest {
    /// The manifest of a run that read its source to the end.
    pub(super) fn new(summary: &Summary, inputs: &Inputs, policy: &Policy, source: SourceHash) -> Manifest {
        let Inputs { tokenizer, vocab_size, shape, .. } = inputs.clone();
        let policy = summary.pinned(policy);
        let template = summary.template.clone();
        let fingerprint = fingerprint(&source.blake3, tokenizer.as_deref(), template.as_deref(), &policy);
        Manifest {
            format: "suasion-prepared".into(),
            masking_version: MASKING_VERSION,
            source,
            tokenizer,
            template,
            policy,
            counts: Counts::of(summary),
            fingerprint,
            untemplated: summary.untemplated,
            vocab_size,
            shape,
            files: Vec::new(),
            about: Vec::new(),
            packs: None,
        }
    }

    /// The manifest of a prepared file, beside it or in its folder; `None` if there is none that names the file.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Source`] if it cannot be parsed.
    pub fn beside(data: impl AsRef<Path>) -> Result<Option<Manifest>> {
        let data = data.as_ref();
        let file = data.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let names = |m: &Manifest| m.files.is_empty() || m.files.iter().any(|known| known.name == file);
        // Raw rows in x.jsonl.gz may be beside prepared ones in x.jsonl.
        let found = Manifest::read(&manifest_path(data))?.filter(names);
        let folder = data.with_file_name(MANIFEST);
        match found {
            None if file.ends_with(".arrow") => Ok(Manifest::read(&folder)?.filter(names)),
            None => match former_names(data) {
                Some([manifest, _]) => Ok(Manifest::read(&manifest)?.filter(names)),
                None => Ok(None),
            },
            found => Ok(found),
        }
    }

    /// The manifest of files that make up one preparation, complete and in order; `None` if they do not.
    ///
    /// # Errors
    /// As [`Manifest::beside`].
    pub fn of_files(files: &[PathBuf]) -> Result<Option<Manifest>> {
        let Some(first) = files.first() else { return Ok(None) };
        let found = Manifest::beside(first)?;
        let Some(manifest) = found.filter(|m| files.len() == 1 || m.files.len() == files.len()) else {
            return Ok(None);
        };
        let same = |(file, known): (&PathBuf, &OutputFile)| file.ends_with(&known.name);
        let all = files.len() == 1 || files.iter().zip(&manifest.files).all(same);
        Ok(all.then_some(manifest))
    }

    /// The manifest of an output, if it exists and can be read.
    pub(super) fn of_output(output: &Path) -> Option<Manifest> {
        let former = || Manifest::read(&former_names(output)?[0]).ok().flatten();
        Manifest::read(&manifest_path(output)).ok().flatten().or_else(former)
    }

    fn read(path: &Path) -> Result<Option<Manifest>> {
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io(path, e)),
        };
        serde_json::from_slice(&bytes).map(Some).map_err(|e| Error::Source {
            path: path.to_path_buf(),
            message: format!("not a manifest: {e}"),
            help: "prepare the data again".into(),
        })
    }

    /// True if a source consists of files that were written with this manifest.
    pub fn describes(&self, source: &SourceHash) -> bool {
        let known = |blake3: &String| {
            self.files.is_empty() || self.files.iter().any(|file| file.written.blake3 == *blake3)
        };
        match source.files.as_slice() {
            [] => known(&source.blake3),
            files => files.iter().all(|file| known(&file.blake3)),
        }
    }

    /// True if this output could have files with the manifest's names. A manifest is untrusted: no other file is
    /// read or removed because of it.
    pub(super) fn is_of(&self, output: &Path, form: Form) -> bool {
        self.files.iter().all(|file| {
            let path = Path::new(&file.name);
            let plain = path.file_name().is_some_and(|name| name == path.as_os_str());
            plain
                && match form {
                    Form::Folder => file.name.starts_with("data-") && file.name.ends_with(".arrow"),
                    Form::Lines | Form::Parquet => {
                        let stems = (stem(path), stem(output));
                        stems.0.file_name() == stems.1.file_name() && ending(path) == ending(output)
                    }
                }
        })
    }

    /// The files of rows of an output.
    pub fn paths(&self, output: &Path) -> Vec<PathBuf> {
        let place = |name: &String| match Form::of(output) {
            Some(Form::Folder) => output.join(name),
            _ => output.with_file_name(name),
        };
        self.files.iter().map(|file| place(&file.name)).collect()
    }

    /// Why these inputs would now give a different output for the source; empty if they would not.
    pub(super) fn changed(
        &self,
        inputs: &Inputs,
        name: &Path,
        files: &[PathBuf],
        output: &Path,
    ) -> Result<Vec<String>> {
        if self.files.is_empty() || (self.about.is_empty() && Form::of(output) == Some(Form::Folder)) {
            return Ok(vec!["it was made by an older version".into()]);
        }
        let before = Inputs {
            masking_version: self.masking_version,
            tokenizer: self.tokenizer.clone(),
            template: self.template.clone(),
            policy: self.policy.clone(),
            vocab_size: self.vocab_size,
            shape: self.shape,
        };
        let mut reasons = inputs.differences(&before, self.untemplated);
        // The source is only read if no cheaper check finds a difference.
        if reasons.is_empty() {
            let source = Source::of(name, files.iter().cloned())?;
            if source.size() != self.source.bytes || source.finish()?.blake3 != self.source.blake3 {
                reasons.push("the source has changed".into());
            }
        }
        if reasons.is_empty() {
            let about = self.about.iter().map(|file| (file, output.join(&file.name)));
            let touched = (self.files.iter().zip(self.paths(output)).chain(about))
                .find(|(file, path)| Written::of(path).ok().as_ref() != Some(&file.written));
            reasons.extend(touched.map(|(file, path)| match path.exists() {
                true => format!("{} is not as it was written", file.name),
                false => format!("{} is missing", file.name),
            }));
        }
        if reasons.is_empty() && !findings_path(output).is_file() {
            reasons.push("its findings are missing".into());
        }
        Ok(reasons)
    }

    /// The policy that the labels of these rows must follow: `policy` with the weights and the objective of their
    /// preparation.
    pub fn labelled_under(&self, policy: &Policy) -> Policy {
        let mut under = policy.clone();
        under.prompt_loss_weight = self.policy.prompt_loss_weight;
        under.loss_weights.clone_from(&self.policy.loss_weights);
        under.append_eos = self.policy.append_eos;
        if self.policy.objective == Objective::AllTokens {
            under.objective = Objective::AllTokens;
        }
        under
    }

    /// The difference between its chat template and another; `None` if they agree or one of them is unknown.
    pub fn other_template(&self, template: Option<&str>) -> Option<String> {
        match (self.template.as_deref(), template) {
            (Some(theirs), Some(ours)) if theirs != ours => {
                Some("it was prepared with another chat template than the model's".into())
            }
            _ => None,
        }
    }

    /// The differences between the inputs of its labels and another tokenizer and policy, one clause each.
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

/// BLAKE3, in hex, of everything that determines the labels; `template` is `None` if no row was rendered by one.
pub fn fingerprint(source: &str, tokenizer: Option<&str>, template: Option<&str>, policy: &Policy) -> String {
    // A JSON array separates the parts; the policy's maps are sorted, so equal policies give equal text.
    let text = serde_json::to_string(&(MASKING_VERSION, source, tokenizer, policy)).unwrap_or_default();
    let plain = blake3::hash(text.as_bytes()).to_hex().to_string();
    match template {
        None => plain,
        Some(template) => blake3::hash(format!("{plain} {template}").as_bytes()).to_hex().to_string(),
    }
}

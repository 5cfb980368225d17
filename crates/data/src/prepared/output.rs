//! The files that a run writes: one beside its findings, or shards in a folder of their own until all are there.

use super::journal::{Journal, Shard};
use super::sink::{Form, Layout, Sink};
use super::{Manifest, OutputFile, ending, findings_path, manifest_path, shard_path};
use crate::atomic::{AtomicFile, Complete, write_atomic};
use crate::pipeline::{Outcome, hash_ids};
use crate::summary::Summary;
use crate::{Error, Finding, Result};
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

/// Files that are being written. Nothing appears under the output's name before [`Output::finish`].
pub(super) struct Output {
    target: PathBuf,
    form: Form,
    layout: Layout,
    /// The finished shards; `None` where the output is one file.
    journal: Option<Journal>,
    /// All rows before this run.
    before: Summary,
    open: Option<Open>,
}

/// The files of the shard that is being written, or of the one file.
struct Open {
    /// For errors.
    path: PathBuf,
    /// Started by the first record.
    sink: Option<Sink>,
    findings: AtomicFile,
    /// For shards only.
    hashes: Option<AtomicFile>,
}

impl Output {
    /// Goes on behind the journal's shards, or starts one file where there is no journal.
    pub fn new(target: &Path, form: Form, layout: Layout, journal: Option<Journal>) -> Output {
        let before = journal.as_ref().map(Journal::summary).unwrap_or_default();
        Output { target: target.to_path_buf(), form, layout, journal, before, open: None }
    }

    /// Writes what became of a row: its record, its findings, or both.
    ///
    /// # Errors
    /// [`Error::Io`], a full disk among them.
    pub fn write(&mut self, outcome: &Outcome, encoded: &[u8]) -> Result<()> {
        let (target, form) = (self.target.clone(), self.form);
        let data = match &self.journal {
            Some(journal) => journal.next(&ending(&self.target)),
            None => target,
        };
        let open = self.open()?;
        if let Outcome::Kept(kept) = outcome {
            let sink = match &mut open.sink {
                Some(sink) => sink,
                none => none.insert(Sink::create(form, data)?),
            };
            sink.write(kept, encoded)?;
            if let Some(hashes) = &mut open.hashes {
                let entry = Journal::hash_entry(kept.sample.id.row, hash_ids(&kept.sample.input_ids));
                hashes.write_all(&entry).map_err(|e| Error::io(&open.path, e))?;
            }
        }
        outcome.findings().iter().try_for_each(|finding| open.finding(finding))
    }

    fn open(&mut self) -> Result<&mut Open> {
        if self.open.is_none() {
            let (findings, hashes) = match &self.journal {
                Some(journal) => {
                    let findings = AtomicFile::create(journal.next(".findings.jsonl"))?;
                    (findings, Some(AtomicFile::create(journal.next(".hashes"))?))
                }
                None => (AtomicFile::create(findings_path(&self.target))?, None),
            };
            self.open = Some(Open { path: self.target.clone(), sink: None, findings, hashes });
        }
        self.open.as_mut().ok_or_else(|| Error::io(&self.target, io::ErrorKind::NotFound.into()))
    }

    /// Called between chunks of rows with the run in numbers: ends the shard where it is full.
    ///
    /// # Errors
    /// [`Error::Io`], a full disk among them.
    pub fn between(&mut self, run: &Summary) -> Result<()> {
        let size = self.open.as_ref().and_then(|open| open.sink.as_ref()).map_or(0, |sink| sink.size);
        match self.layout.max_shard_bytes {
            Some(most) if size >= most => self.end_shard(run),
            _ => Ok(()),
        }
    }

    /// Ends a run that failed or was stopped. `keep` its finished shards for the next one, and nothing else.
    pub fn give_up(self, keep: bool) {
        if let Some(journal) = self.journal.filter(|journal| !keep || journal.shards.is_empty()) {
            drop(self.open);
            let _ = fs::remove_dir_all(&journal.folder);
        }
    }

    /// What an interrupted run leaves, in words.
    pub fn kept(&self) -> String {
        match self.journal.as_ref().filter(|journal| !journal.shards.is_empty()) {
            Some(journal) => format!(
                "{} rows are done and kept in {}; the same command goes on behind them",
                journal.summary().rows,
                journal.folder.display()
            ),
            None => "nothing is kept of it".into(),
        }
    }

    fn end_shard(&mut self, run: &Summary) -> Result<()> {
        let (Some(journal), Some(open)) = (&mut self.journal, self.open.take()) else { return Ok(()) };
        let name = |ending: &str| file_name(&journal.next(ending));
        let (findings, hashes) = (name(".findings.jsonl"), name(".hashes"));
        let data_name = name(&ending(&self.target));
        let records = open.sink.as_ref().map_or(0, |sink| sink.records);
        let data = match open.sink {
            Some(sink) => {
                let complete = sink.complete()?;
                let written = complete.written.clone();
                complete.publish()?;
                Some((data_name, written))
            }
            None => None,
        };
        open.findings.commit()?;
        if let Some(hashes) = open.hashes {
            hashes.commit()?;
        }
        let mut summary = self.before.clone();
        summary.merge(run);
        journal.add(Shard { data, findings, hashes, records, summary })
    }

    /// Completes the files, writes the manifest with their names, and gives them theirs: the records come last, when
    /// all that belongs to them is there. `former` are the files of the preparation that this one replaces.
    ///
    /// # Errors
    /// [`Error::Io`], a full disk among them.
    pub fn finish(mut self, mut manifest: Manifest, run: &Summary, former: &[PathBuf]) -> Result<Manifest> {
        if self.journal.is_some() {
            self.end_shard(run)?;
        } else {
            self.open()?;
        }
        let files = match (self.journal.take(), self.open.take()) {
            (Some(journal), _) => self.publish_shards(journal, &mut manifest)?,
            (None, Some(open)) => {
                let sink = match open.sink {
                    Some(sink) => sink,
                    None => Sink::create(self.form, self.target.clone())?,
                };
                open.findings.commit()?;
                let data = sink.complete()?;
                manifest.files =
                    vec![OutputFile { name: file_name(&self.target), written: data.written.clone() }];
                self.write_manifest(&manifest)?;
                data.publish()?;
                vec![self.target.clone()]
            }
            (None, None) => Vec::new(),
        };
        for path in former.iter().filter(|path| !files.contains(path)) {
            // What it was made from has changed, so it is not this data any more.
            let _ = fs::remove_file(path);
        }
        Ok(manifest)
    }

    fn write_manifest(&self, manifest: &Manifest) -> Result<()> {
        write_atomic(manifest_path(&self.target), |w| {
            serde_json::to_writer_pretty(&mut *w, manifest)?;
            w.write_all(b"\n")
        })
    }

    /// Findings into one file, then the shards under their names.
    fn publish_shards(&self, journal: Journal, manifest: &mut Manifest) -> Result<Vec<PathBuf>> {
        let path = findings_path(&self.target);
        let mut findings = AtomicFile::create(&path)?;
        for shard in &journal.shards {
            let part = journal.folder.join(&shard.findings);
            let copied = File::open(&part).and_then(|mut part| io::copy(&mut part, &mut findings));
            copied.map_err(|e| Error::io(&part, e))?;
        }
        findings.commit()?;
        let mut written: Vec<_> = journal.shards.iter().filter_map(|shard| shard.data.clone()).collect();
        if written.is_empty() {
            let name = format!("none{}", ending(&self.target));
            let empty: Complete = Sink::create(self.form, journal.folder.join(&name))?.complete()?;
            written.push((name, empty.written.clone()));
            empty.publish()?;
        }
        let paths: Vec<PathBuf> =
            (0..written.len()).map(|i| shard_path(&self.target, i, written.len())).collect();
        manifest.files = (written.iter().zip(&paths))
            .map(|((_, written), path)| OutputFile { name: file_name(path), written: written.clone() })
            .collect();
        self.write_manifest(manifest)?;
        for ((name, _), path) in written.iter().zip(&paths) {
            fs::rename(journal.folder.join(name), path).map_err(|e| Error::io(path, e))?;
        }
        crate::atomic::sync_folder(&self.target);
        fs::remove_dir_all(&journal.folder).map_err(|e| Error::io(&journal.folder, e))?;
        Ok(paths)
    }
}

impl Open {
    fn finding(&mut self, finding: &Finding) -> Result<()> {
        let io_error = |e| Error::io(&self.path, e);
        serde_json::to_writer(&mut self.findings, finding).map_err(|e| io_error(e.into()))?;
        self.findings.write_all(b"\n").map_err(io_error)
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

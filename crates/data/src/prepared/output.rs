//! The files that a run writes: one beside its findings, or shards in a folder of their own until all are there.

use super::folder;
use super::journal::{Journal, Shard};
use super::manifest::{Manifest, OutputFile};
use super::names::{Form, findings_path, manifest_path, shard_path};
use super::record::Record;
use super::sink::{Plan, Sink};
use crate::pack::{Fill, Packer};
use crate::pipeline::{Outcome, Summary, hash_ids};
use crate::{Error, Finding, Result, Sample};
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use suasion_files::{AtomicFile, Written};

/// About what a token takes before compression in each of the forms, which is what shards are measured by: an id, a
/// label and a letter, as text (where most labels are -100) or in columns of four, eight and one bytes.
const BYTES_PER_TOKEN: u64 = 13;

/// Files that are being written. Nothing appears under the output's name before [`Output::finish`].
pub(super) struct Output<'a> {
    plan: Plan<'a>,
    /// The finished shards; `None` where the output is one file.
    journal: Option<Journal>,
    /// All rows before this run.
    before: Summary,
    open: Option<Open>,
    /// Rows that wait for others to be packed with.
    packer: Option<Packer>,
    /// How full the packs are whose packer has finished.
    fill: Fill,
    /// A row or pack has weights, and its file has no column for them. Set where [`Output::write`] fails for it.
    pub lacks_weights: bool,
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
    /// Rows whose hashes are in it.
    kept: u64,
    /// About the bytes of these rows, before compression.
    size: u64,
}

impl<'a> Output<'a> {
    /// Goes on behind the journal's shards, or starts one file where there is no journal.
    pub fn new(plan: Plan<'a>, journal: Option<Journal>) -> Output<'a> {
        let before = journal.as_ref().map(Journal::summary).unwrap_or_default();
        let fill = journal.as_ref().and_then(|j| j.shards.last()).map(|shard| shard.fill).unwrap_or_default();
        Output {
            plan,
            journal,
            before,
            open: None,
            packer: Packer::of(plan.policy),
            fill,
            lacks_weights: false,
        }
    }

    /// Writes what became of a row: its record, its findings, or both. `encoded` is what [`super::sink::encode`] made
    /// of it.
    ///
    /// # Errors
    /// [`Error::Io`], a full disk among them.
    pub fn write(&mut self, outcome: Outcome, encoded: &[u8]) -> Result<()> {
        let open = self.open()?;
        outcome.findings().iter().try_for_each(|finding| open.finding(finding))?;
        let Outcome::Kept(kept) = outcome else { return Ok(()) };
        if let Some(hashes) = &mut open.hashes {
            let entry = Journal::hash_entry(kept.sample.id.row, hash_ids(&kept.sample.input_ids));
            hashes.write_all(&entry).map_err(|e| Error::io(&open.path, e))?;
        }
        open.kept += 1;
        open.size += kept.sample.len() as u64 * BYTES_PER_TOKEN;
        let packs = match &mut self.packer {
            Some(packer) => packer.push(kept.sample),
            None => {
                let text = kept.text.as_deref().filter(|_| self.plan.shape.with_text);
                let encoded = (!encoded.is_empty()).then_some(encoded);
                return self.put(&kept.sample, text, encoded);
            }
        };
        self.write_packs(&packs)
    }

    fn write_packs(&mut self, packs: &[Sample]) -> Result<()> {
        packs.iter().try_for_each(|pack| self.put(pack, None, None))
    }

    fn put(&mut self, sample: &Sample, text: Option<&str>, encoded: Option<&[u8]>) -> Result<()> {
        if sample.weights.is_some() && !self.plan.weights && self.plan.form != Form::Lines {
            self.lacks_weights = true;
            let (path, message) = (self.plan.target.to_path_buf(), format!("{} has weights", sample.id));
            return Err(Error::Source { path, message, help: "give the files a column for them".into() });
        }
        let sink = self.sink()?;
        sink.write(&Record::of(sample, text), encoded)
    }

    fn open(&mut self) -> Result<&mut Open> {
        let target = self.plan.target;
        match &mut self.open {
            Some(open) => Ok(open),
            none => {
                let (findings, hashes) = match &self.journal {
                    Some(journal) => {
                        let findings = AtomicFile::create(journal.next(".findings.jsonl"))?;
                        (findings, Some(AtomicFile::create(journal.next(".hashes"))?))
                    }
                    None => (AtomicFile::create(findings_path(target))?, None),
                };
                let path = target.to_path_buf();
                Ok(none.insert(Open { path, sink: None, findings, hashes, kept: 0, size: 0 }))
            }
        }
    }

    /// The file of records, started where there is none yet.
    fn sink(&mut self) -> Result<&mut Sink> {
        let plan = self.plan;
        let path = match &self.journal {
            Some(journal) => journal.next(&plan.form.ending(plan.target)),
            None => plan.target.to_path_buf(),
        };
        match &mut self.open()?.sink {
            Some(sink) => Ok(sink),
            none => Ok(none.insert(Sink::create(plan.form, path, plan.columns())?)),
        }
    }

    /// Called between chunks of rows with the run in numbers: ends the shard where it is full.
    ///
    /// # Errors
    /// [`Error::Io`], a full disk among them.
    pub fn between(&mut self, run: &Summary) -> Result<()> {
        let size = self.open.as_ref().map_or(0, |open| open.size);
        match self.plan.shape.max_shard_bytes {
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

    /// Packs the rows that wait; a packer for the rows behind them takes its place.
    fn flush(&mut self) -> Result<()> {
        let Some(packer) = std::mem::replace(&mut self.packer, Packer::of(self.plan.policy)) else {
            return Ok(());
        };
        let (packs, fill) = packer.finish();
        self.fill.add(fill);
        self.write_packs(&packs)
    }

    /// Called behind the last row with the run in numbers, and where a shard is full: ends what is open.
    ///
    /// # Errors
    /// As [`Output::write`].
    pub fn end_shard(&mut self, run: &Summary) -> Result<()> {
        self.flush()?;
        let Some(journal) = &mut self.journal else { return Ok(()) };
        let Some(open) = self.open.take() else { return Ok(()) };
        let name = |ending: &str| file_name(&journal.next(ending));
        let (findings, hashes) = (name(".findings.jsonl"), name(".hashes"));
        let data_name = name(&self.plan.form.ending(self.plan.target));
        let data = match open.sink {
            Some(sink) => Some((data_name, sink.complete()?.publish()?)),
            None => None,
        };
        open.findings.commit()?;
        if let Some(hashes) = open.hashes {
            hashes.commit()?;
        }
        let mut summary = self.before.clone();
        summary.merge(run);
        journal.add(Shard { data, findings, hashes, kept: open.kept, summary, fill: self.fill })
    }

    /// Completes the files, writes the manifest with their names, and gives them theirs: the records come last, when
    /// all that belongs to them is there. `former` is the preparation that this one replaces.
    ///
    /// # Errors
    /// [`Error::Io`], a full disk among them.
    pub fn finish(mut self, mut manifest: Manifest, former: Option<&Manifest>) -> Result<Manifest> {
        let target = self.plan.target;
        manifest.packs = self.plan.policy.packing.then_some(self.fill);
        let files = match self.journal.take() {
            Some(journal) => self.publish_shards(journal, &mut manifest)?,
            None => {
                self.sink()?;
                let Some(Open { sink: Some(sink), findings, .. }) = self.open.take() else {
                    return Err(Error::io(target, io::ErrorKind::NotFound.into()));
                };
                findings.commit()?;
                let data = sink.complete()?;
                manifest.files = vec![OutputFile { name: file_name(target), written: data.written.clone() }];
                self.write_manifest(&manifest)?;
                data.publish()?;
                vec![target.to_path_buf()]
            }
        };
        // A folder went as a whole. Of files, those that nobody has touched since go.
        if let Some(former) = former.filter(|_| self.plan.form != Form::Folder) {
            for (path, file) in former.paths(target).iter().zip(&former.files) {
                if !files.contains(path) && Written::of(path).ok().as_ref() == Some(&file.written) {
                    let _ = fs::remove_file(path);
                }
            }
        }
        Ok(manifest)
    }

    fn write_manifest(&self, manifest: &Manifest) -> Result<()> {
        folder::write_json(&manifest_path(self.plan.target), manifest)
    }

    /// Findings into one file, then the shards under their names.
    fn publish_shards(&self, journal: Journal, manifest: &mut Manifest) -> Result<Vec<PathBuf>> {
        let plan = self.plan;
        let path = findings_path(plan.target);
        let mut findings = AtomicFile::create(&path)?;
        for shard in &journal.shards {
            let part = journal.folder.join(&shard.findings);
            let copied = File::open(&part).and_then(|mut part| io::copy(&mut part, &mut findings));
            copied.map_err(|e| Error::io(&part, e))?;
        }
        findings.commit()?;
        let mut written: Vec<_> = journal.shards.iter().filter_map(|shard| shard.data.clone()).collect();
        if written.is_empty() {
            let name = format!("none{}", plan.form.ending(plan.target));
            let empty = Sink::create(plan.form, journal.folder.join(&name), plan.columns())?.complete()?;
            written.push((name, empty.publish()?));
        }
        let n = written.len();
        let name = |i: usize| match plan.form {
            Form::Folder => folder::file_name(i, n),
            Form::Lines | Form::Parquet => file_name(&shard_path(plan.target, i, n)),
        };
        manifest.files = (written.iter().enumerate())
            .map(|(i, (_, written))| OutputFile { name: name(i), written: written.clone() })
            .collect();
        let paths = manifest.paths(plan.target);
        let shards: Vec<PathBuf> = written.iter().map(|(name, _)| journal.folder.join(name)).collect();
        match plan.form {
            Form::Folder => {
                folder::publish(
                    &shards,
                    plan.target,
                    plan.columns(),
                    &manifest.fingerprint,
                    manifest,
                    &journal.folder,
                )?;
            }
            Form::Lines | Form::Parquet => {
                self.write_manifest(manifest)?;
                for (shard, path) in shards.iter().zip(&paths) {
                    fs::rename(shard, path).map_err(|e| Error::io(path, e))?;
                }
                suasion_files::sync_folder(plan.target);
            }
        }
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

//! The files of an output: one file and its findings, or shards, which are kept in a separate folder until the end.

use super::folder;
use super::journal::{Journal, Shard};
use super::manifest::{Manifest, OutputFile};
use super::names::{Form, findings_path, former_names, manifest_path, shard_path};
use super::record::Record;
use super::sink::{Plan, Sink};
use crate::pack::{Fill, Packer};
use crate::pipeline::{Done, Outcome, Summary};
use crate::{Error, Finding, Result, Sample};
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use suasion_files::{AtomicFile, Written};

/// Approximate bytes per token before compression, similar in each format, used to measure shards: an id, a label
/// and a letter, as text (in which most labels are -100) or in columns of four, eight and one bytes.
const BYTES_PER_TOKEN: u64 = 13;

/// The files being written. No file has the output's name before [`Output::finish`].
pub(super) struct Output {
    plan: Arc<Plan>,
    /// The finished shards; `None` if the output is one file.
    journal: Option<Journal>,
    /// The summary of the rows before this run.
    before: Summary,
    open: Option<Open>,
    /// Packs rows across chunks.
    packer: Option<Packer>,
    /// The numbers of the packs of finished packers.
    fill: Fill,
    /// Set if [`Output::write`] fails because a row has weights and its file has no column for them.
    pub lacks_weights: bool,
}

/// The files of the current shard, or those of an output in one file.
struct Open {
    /// The path in error messages.
    path: PathBuf,
    /// Created by the first record.
    sink: Option<Sink>,
    findings: AtomicFile,
    /// Only for shards.
    hashes: Option<AtomicFile>,
    /// The number of rows whose hashes are in it.
    kept: u64,
    /// The approximate size of these rows in bytes, before compression.
    size: u64,
}

impl Output {
    /// Continues after the journal's shards; without a journal, starts an output of one file.
    pub fn new(plan: Arc<Plan>, journal: Option<Journal>) -> Output {
        let packer = Packer::of(&plan.policy);
        let before = journal.as_ref().map(Journal::summary).unwrap_or_default();
        let fill = journal.as_ref().and_then(|j| j.shards.last()).map(|shard| shard.fill).unwrap_or_default();
        Output { plan, journal, before, open: None, packer, fill, lacks_weights: false }
    }

    /// Writes the record and the findings of a row.
    ///
    /// # Errors
    /// [`Error::Io`], including a full disk.
    pub fn write(&mut self, row: Done<Vec<u8>>) -> Result<()> {
        let open = self.open()?;
        row.outcome.findings().iter().try_for_each(|finding| open.finding(finding))?;
        let Outcome::Kept(kept) = row.outcome else { return Ok(()) };
        if let Some(hashes) = &mut open.hashes {
            let entry = Journal::hash_entry(kept.sample.id.row, row.hash);
            hashes.write_all(&entry).map_err(|e| Error::io(&open.path, e))?;
        }
        open.kept += 1;
        open.size += kept.sample.len() as u64 * BYTES_PER_TOKEN;
        let packs = match &mut self.packer {
            Some(packer) => packer.push(kept.sample),
            None => {
                let text = kept.text.as_deref().filter(|_| self.plan.shape.with_text);
                let encoded = Some(row.made.as_slice()).filter(|line| !line.is_empty());
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
        match &mut self.open {
            Some(open) => Ok(open),
            none => {
                let target = &self.plan.target;
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

    /// The file of records, which is created by the first record.
    fn sink(&mut self) -> Result<&mut Sink> {
        let plan = self.plan.clone();
        let path = match &self.journal {
            Some(journal) => journal.next(&plan.form.ending(&plan.target)),
            None => plan.target.clone(),
        };
        match &mut self.open()?.sink {
            Some(sink) => Ok(sink),
            none => Ok(none.insert(Sink::create(plan.form, path, plan.columns())?)),
        }
    }

    /// Ends the shard if it is full. Called between chunks of rows, with the summary of the run.
    ///
    /// # Errors
    /// [`Error::Io`], including a full disk.
    pub fn between(&mut self, run: &Summary) -> Result<()> {
        let size = self.open.as_ref().map_or(0, |open| open.size);
        match self.plan.shape.max_shard_bytes {
            Some(most) if size >= most => self.end_shard(run),
            _ => Ok(()),
        }
    }

    /// Ends a run that failed or was interrupted; `keep` keeps its finished shards for the next run.
    pub fn give_up(self, keep: bool) {
        if let Some(journal) = self.journal.filter(|journal| !keep || journal.shards.is_empty()) {
            drop(self.open);
            let _ = fs::remove_dir_all(&journal.folder);
        }
    }

    /// A clause about what remains of an interrupted run.
    pub fn kept(&self) -> String {
        match self.journal.as_ref().filter(|journal| !journal.shards.is_empty()) {
            Some(journal) => format!(
                "{} rows are done and kept in {}; the same command continues after them",
                journal.summary().rows,
                journal.folder.display()
            ),
            None => "nothing is kept of it".into(),
        }
    }

    /// Packs the waiting rows, and starts a new packer for later rows.
    fn flush(&mut self) -> Result<()> {
        let Some(packer) = std::mem::replace(&mut self.packer, Packer::of(&self.plan.policy)) else {
            return Ok(());
        };
        let (packs, fill) = packer.finish();
        self.fill.add(fill);
        self.write_packs(&packs)
    }

    /// Ends the current shard. Called when it is full and after the last row, with the summary of the run.
    ///
    /// # Errors
    /// As [`Output::write`].
    pub fn end_shard(&mut self, run: &Summary) -> Result<()> {
        self.flush()?;
        let Some(journal) = &mut self.journal else { return Ok(()) };
        let Some(open) = self.open.take() else { return Ok(()) };
        let name = |ending: &str| file_name(&journal.next(ending));
        let (findings, hashes) = (name(".findings.jsonl"), name(".hashes"));
        let data_name = name(&self.plan.form.ending(&self.plan.target));
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

    /// Completes the files and renames them: first findings and manifest, then the records. `former` is the
    /// manifest of the preparation that this one replaces.
    ///
    /// # Errors
    /// [`Error::Io`], including a full disk.
    pub fn finish(mut self, mut manifest: Manifest, former: Option<&Manifest>) -> Result<Manifest> {
        let plan = self.plan.clone();
        let target = &plan.target;
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
        if let Some(names) = former_names(target).filter(|[name, _]| *name != manifest_path(target))
            && former.is_some()
        {
            // Files for which an earlier version used other names.
            names.iter().for_each(|path| drop(fs::remove_file(path)));
        }
        // Folders are replaced whole; of single files, those of the previous run that were not modified since are deleted.
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
        folder::write_json(&manifest_path(&self.plan.target), manifest)
    }

    /// Joins the findings of the shards into one file, and renames the shards.
    fn publish_shards(&self, journal: Journal, manifest: &mut Manifest) -> Result<Vec<PathBuf>> {
        let plan = &self.plan;
        let path = findings_path(&plan.target);
        let mut findings = AtomicFile::create(&path)?;
        for shard in &journal.shards {
            let part = journal.folder.join(&shard.findings);
            let copied = File::open(&part).and_then(|mut part| io::copy(&mut part, &mut findings));
            copied.map_err(|e| Error::io(&part, e))?;
        }
        findings.commit()?;
        let mut written: Vec<_> = journal.shards.iter().filter_map(|shard| shard.data.clone()).collect();
        if written.is_empty() {
            let name = format!("none{}", plan.form.ending(&plan.target));
            let empty = Sink::create(plan.form, journal.folder.join(&name), plan.columns())?.complete()?;
            written.push((name, empty.publish()?));
        }
        let n = written.len();
        let name = |i: usize| match plan.form {
            Form::Folder => folder::file_name(i, n),
            Form::Lines | Form::Parquet => file_name(&shard_path(&plan.target, i, n)),
        };
        manifest.files = (written.iter().enumerate())
            .map(|(i, (_, written))| OutputFile { name: name(i), written: written.clone() })
            .collect();
        let paths = manifest.paths(&plan.target);
        let shards: Vec<PathBuf> = written.iter().map(|(name, _)| journal.folder.join(name)).collect();
        match plan.form {
            Form::Folder => {
                let fingerprint = manifest.fingerprint.clone();
                let named = |about| {
                    manifest.about = about;
                    manifest.clone()
                };
                folder::publish(&shards, &plan.target, plan.columns(), &fingerprint, named, &journal.folder)?;
            }
            Form::Lines | Form::Parquet => {
                self.write_manifest(manifest)?;
                for (shard, path) in shards.iter().zip(&paths) {
                    fs::rename(shard, path).map_err(|e| Error::io(path, e))?;
                }
                suasion_files::sync_folder(&plan.target);
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

//! What a run writes while it trains: its checkpoints, its metrics, and the first files of its folder.

use super::Trainer;
use crate::checkpoint::{self, Contents};
use crate::metrics::{Log, Record};
use crate::observer::Event;
use crate::output_dir::clear;
use crate::run::Run;
use crate::trainer_state::trainer_state;
use crate::{Error, OnSaveError, Result};
use std::path::{Path, PathBuf};
use suasion_engine::Backend;
use suasion_files::{remove_folder, write_bytes};

/// What the first rank sends to the others when a checkpoint is written.
const WRITTEN: &[u8] = b"written";

impl<B: Backend> Trainer<'_, '_, B> {
    /// Takes over the folder: removes the files of an earlier run, if it may be overwritten, and writes the first
    /// files of this one.
    pub(super) fn own(&mut self) -> Result<()> {
        if !self.writes() || std::mem::replace(&mut self.owner, true) {
            return Ok(());
        }
        own(&self.run, &mut self.log, self.newest.is_none())
    }

    /// Saves a checkpoint. If that fails and `on_save_error` allows it, the run continues.
    pub(super) fn try_to_save(&mut self) -> Result<()> {
        let error = match self.save(self.run.settings.save_only_model) {
            Ok(_) => return Ok(()),
            Err(error) if error.is_io() && self.run.settings.on_save_error == OnSaveError::Continue => error,
            Err(error) => return Err(error),
        };
        let kept = match &self.newest {
            Some(path) => format!("the newest checkpoint is {}", path.display()),
            None => "there is no checkpoint yet".into(),
        };
        self.warn(format!(
            "the checkpoint of step {} could not be written: {error}; {kept}, and the run goes on (on_save_error)",
            self.step()
        ));
        Ok(())
    }

    /// Adds a line to the metrics. If that fails and `on_save_error` allows it, the line is written with the next one.
    pub(super) fn note(&mut self, record: Record) -> Result<()> {
        let mut written = Ok(());
        if let Some(events) = &mut self.events {
            events.push(&record);
            // Not before those of an earlier run are removed.
            if self.owner {
                written = events.flush();
            }
        }
        match self.log.push(record).and(written) {
            Err(error) if error.is_io() && self.run.settings.on_save_error == OnSaveError::Continue => {
                if !std::mem::replace(&mut self.unwritten, true) {
                    self.warn(format!(
                        "{error}: the run goes on, and writes these lines later (on_save_error)"
                    ));
                }
                Ok(())
            }
            pushed => {
                self.unwritten = false;
                pushed
            }
        }
    }

    /// Recreates the output folder if it was removed.
    pub(super) fn restore_folder(&mut self) -> Result<()> {
        let dir = self.run.output_dir;
        if !self.owner || !self.writes() || dir.is_dir() {
            return Ok(());
        }
        std::fs::create_dir_all(dir).map_err(|source| Error::io(dir, source))?;
        (self.newest, self.saved, self.state.best_only) = (None, None, None);
        self.warn(format!("{}: the folder was removed during the run; it is made again", dir.display()));
        own(&self.run, &mut self.log, false)
    }

    pub(super) fn best_checkpoint(&self) -> Option<PathBuf> {
        let path = checkpoint::path_of(self.run.output_dir, self.state.best?.0);
        path.join(checkpoint::STATE).exists().then_some(path)
    }

    pub(super) fn trainer_state(&self, best: Option<&Path>) -> serde_json::Value {
        trainer_state(&self.state, &self.log.records, &self.steps, self.parameters, best)
    }

    /// Writes the checkpoint of this step, then removes those that it replaces. `None` on the other ranks if the first
    /// could not write it; the first rank decides how to proceed.
    pub(super) fn save(&mut self, only_model: bool) -> Result<Option<PathBuf>> {
        self.restore_folder()?;
        let (step, output_dir) = (self.step(), self.run.output_dir);
        // A checkpoint that was kept only as the best is removed with the next best one.
        let former = self.state.best_only.filter(|_| self.is_best());
        if self.is_best() {
            let asked = self.run.settings.load_best_model_at_end;
            self.state.best_only = Some(step).filter(|_| asked && !self.scheduled());
        }
        let written = self.write_checkpoint(only_model);
        let path = match written {
            Ok(Some(path)) => path,
            not_written => {
                self.state.best_only = former.or(self.state.best_only);
                return not_written;
            }
        };
        self.saved = Some(step);
        self.newest = Some(path.clone());
        if !self.writes() {
            return Ok(Some(path));
        }
        let mut removed = Vec::new();
        if let Some(former) = former.filter(|former| *former != step) {
            let former = checkpoint::path_of(output_dir, former);
            if former.join(checkpoint::STATE).exists() {
                remove_folder(&former)?;
                removed.push(former);
            }
        }
        if let Some(limit) = self.run.settings.save_total_limit {
            removed.extend(checkpoint::prune(
                output_dir,
                limit,
                step,
                self.state.best.map(|(step, _)| step),
            )?);
        }
        self.observer.event(&Event::Checkpoint { step, path: &path, removed: &removed });
        Ok(Some(path))
    }

    /// Writes the checkpoint on the first rank; the others send their share of the optimizer's state, and learn whether
    /// it was written.
    pub(super) fn write_checkpoint(&mut self, only_model: bool) -> Result<Option<PathBuf>> {
        let (step, output_dir, collective) = (self.step(), self.run.output_dir, self.run.collective);
        if !self.writes() {
            self.state.resumable = !only_model;
            let written = self.run.model.serve_optimizer(0, collective)? == WRITTEN;
            return Ok(written.then(|| checkpoint::path_of(output_dir, step)));
        }
        let written = self.write_files(only_model);
        let message: &[u8] = if written.is_ok() { WRITTEN } else { b"failed" };
        let sent = (1..collective.ranks()).try_for_each(|rank| collective.send(rank, message));
        let path = written?;
        sent?;
        Ok(Some(path))
    }

    pub(super) fn write_files(&mut self, only_model: bool) -> Result<PathBuf> {
        let (step, output_dir) = (self.step(), self.run.output_dir);
        self.state.position = self.steps.position(step);
        // The checkpoint about to be written does not exist yet and may be the best one.
        let best = match self.state.best {
            Some((best, _)) if best == step => Some(checkpoint::path_of(output_dir, step)),
            _ => self.best_checkpoint(),
        };
        let (trainer_state, metrics) = (self.trainer_state(best.as_deref()), self.log.text());
        let contents = Contents {
            state: &mut self.state,
            files: self.run.files,
            metrics: &metrics,
            trainer_state: &trainer_state,
            only_model,
            collective: self.run.collective,
        };
        // A checkpoint of the model alone holds the averaged weights, if there are any.
        if only_model {
            self.run.model.exchange_average()?;
        }
        let (log, first) = (&mut self.log, self.newest.is_none());
        let (run, owner) = (&self.run, &mut self.owner);
        let before = || if std::mem::replace(owner, true) { Ok(()) } else { own(run, log, first) };
        let written = checkpoint::write(output_dir, run.model, contents, before);
        if only_model {
            self.run.model.exchange_average()?;
        }
        written
    }
}

/// See [`Trainer::own`].
fn own<B: Backend>(run: &Run<'_, B>, log: &mut Log, new: bool) -> Result<()> {
    if run.overwrite && new {
        clear(run.output_dir)?;
    }
    for file in run.extra {
        write_bytes(run.output_dir.join(&file.name), &file.bytes)?;
    }
    log.start()
}

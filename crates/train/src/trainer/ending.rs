//! The ends of a run: interrupted, finished with a final model, or diverged; and its report.

use super::{Trainer, load_average};
use crate::checkpoint::TRAINER_STATE;
use crate::divergence::Divergence;
use crate::json::pretty;
use crate::memory::peak_memory_bytes;
use crate::observer::Event;
use crate::run::{Best, Report};
use crate::{Error, Evaluation, Result};
use suasion_engine::Backend;
use suasion_files::{NewFolder, write_bytes};

impl<B: Backend> Trainer<'_, '_, B> {
    pub(super) fn interrupted(&mut self) -> Result<Report> {
        let step = self.step();
        // A checkpoint of the model alone cannot be resumed.
        let path = match (&self.newest, self.saved == Some(step) && self.state.resumable) {
            (Some(path), true) => path.clone(),
            _ => match self.save(false)? {
                Some(path) => path,
                // The first rank ends with its error.
                None => {
                    self.run.collective.sum(&mut [0.0])?;
                    return Err(Error::Interrupted);
                }
            },
        };
        self.write_trainer_state()?;
        self.observer.event(&Event::Interrupted { step, checkpoint: &path });
        let after = self.state.latest.clone().filter(|_| self.state.evaluated == Some(step));
        Ok(self.report(true, step, after))
    }

    pub(super) fn write_trainer_state(&self) -> Result<()> {
        if !self.writes() {
            return Ok(());
        }
        let value = self.trainer_state(self.best_checkpoint().as_deref());
        Ok(write_bytes(self.run.output_dir.join(TRAINER_STATE), &pretty(&value))?)
    }

    /// The final model and its files.
    pub(super) fn finish(&mut self) -> Result<Report> {
        if !self.writes() {
            return Ok(self.report(false, self.step(), self.state.latest.clone()));
        }
        self.restore_folder()?;
        let output_dir = self.run.output_dir;
        let (mut final_step, mut after) = (self.step(), self.state.latest.clone());
        let mut averaged = self.run.model.has_average();
        if let (true, Some((best, _))) = (self.run.settings.load_best_model_at_end, self.state.best)
            && best != final_step
        {
            match self.best_checkpoint() {
                Some(path) => {
                    let kind = self.run.model.weight_type();
                    self.run.model.load_run(&path)?;
                    self.run.model.set_weight_type(kind);
                    averaged = load_average(self.run.model, &path)?;
                    (final_step, after) = (best, self.state.best_evaluation.clone());
                }
                None => self.warn(format!(
                    "the best evaluation was after step {best}, but {} has no checkpoint of it: the final model is \
                     that of the last step",
                    output_dir.display()
                )),
            }
        }
        if averaged {
            self.run.model.exchange_average()?;
        }
        // Complete before the first of its files gets its name.
        let folder = NewFolder::create(&output_dir.join("model"))?;
        let weights = self.run.model.save_run(folder.path(), false);
        weights.map_err(|error| Error::from(error).renamed(folder.path(), output_dir))?;
        let (kind, arch) = (self.run.model.weight_type(), self.run.model.architecture());
        self.run
            .files
            .beside(kind, arch.head.tied, arch.vocab_size)
            .stopping_at(self.run.stops)
            .write(folder.path())?;
        self.own()?;
        folder.move_into(output_dir)?;
        self.log.catch_up()?;
        if let Some(events) = &mut self.events {
            events.flush()?;
        }
        self.write_trainer_state()?;
        let held_out = self.state.before.as_ref().zip(self.state.latest.as_ref());
        let losses = held_out.map(|(before, after)| (before.loss, after.loss));
        let found = self.state.watch.at_end(self.step(), self.last_loss, losses);
        if let Some(divergence) = &found {
            self.warn(divergence.to_string());
        }
        Ok(Report { diverged: found, ..self.report(false, final_step, after) })
    }

    /// Ends the run without a final model.
    pub(super) fn diverged(&mut self, divergence: Divergence) -> Result<Report> {
        self.own()?;
        self.write_trainer_state()?;
        self.warn(divergence.to_string());
        let step = self.step();
        let after = self.state.latest.clone().filter(|_| self.state.evaluated == Some(step));
        Ok(Report { diverged: Some(divergence), ..self.report(false, step, after) })
    }

    pub(super) fn report(&self, interrupted: bool, final_step: u64, after: Option<Evaluation>) -> Report {
        let (state, progress) = (&self.state, &self.state.progress);
        let best = state.best.zip(state.best_evaluation.as_ref()).map(|((step, metric), evaluation)| Best {
            step,
            loss: evaluation.loss,
            metric,
            checkpoint: self.best_checkpoint(),
        });
        Report {
            interrupted,
            step: progress.step,
            total_steps: state.total_steps,
            epoch: self.steps.epoch(progress.step),
            parameters: self.parameters,
            plan: self.plan.clone(),
            before: state.before.clone(),
            after,
            best,
            stopped_early: self.stopped_early(),
            final_step,
            steps: self.log.steps().cloned().collect(),
            evals: self.log.evals().cloned().collect(),
            tokens: progress.tokens,
            targets: progress.targets,
            skipped_steps: progress.skipped_steps,
            train_loss: (progress.updates > 0).then(|| progress.loss_sum / progress.updates as f64),
            seconds: progress.seconds,
            peak_memory_bytes: peak_memory_bytes(),
            diverged: None,
            checkpoint: self.newest.clone().filter(|path| path.exists()),
            output_dir: self.run.output_dir.to_path_buf(),
            warnings: self.warnings.clone(),
        }
    }
}

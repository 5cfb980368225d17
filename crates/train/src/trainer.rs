//! A training run: its steps, its evaluations and checkpoints, and what it leaves in its output folder.

use crate::checkpoint::{self, Contents, METRICS, TRAINER_STATE};
use crate::json::pretty;
use crate::memory::peak_memory_bytes;
use crate::metrics::{EvalRecord, Log, Record};
use crate::observer::{Event, Observer};
use crate::output_dir::{check_output_dir, prepare};
use crate::run::{Best, Report, Run};
use crate::state::RunState;
use crate::steps::Steps;
use crate::trainer_state::trainer_state;
use crate::{Error, Evaluation, Plan, Result, Strategy, report};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use suasion_engine::{Backend, WeightType};
use suasion_files::write_bytes;

/// Trains a model. The output folder then holds the model with its files, the checkpoints, `metrics.jsonl`,
/// `trainer_state.json`, `README.md` and `report.html`.
///
/// `stop` may be raised at any time (Ctrl-C): the current step is finished, a checkpoint is written, and the
/// report has `interrupted` set. A loss or gradient norm that is not finite stops the run before the weights
/// change.
pub fn train<B: Backend>(run: Run<'_, B>, observer: &mut dyn Observer, stop: &AtomicBool) -> Result<Report> {
    let Run { train, eval, settings, identity, card, output_dir, .. } = run;
    settings.validate(!eval.is_empty())?;
    let plan = Plan::new(train, eval, settings)?;
    plan.check_model(run.model.architecture(), train, eval)?;
    check_output_dir(output_dir, &run.resume, run.overwrite)?;

    let mut state = RunState::new(settings, identity, &plan, run.model.weight_type());
    let mut warnings = plan.warnings.clone();
    warnings.extend(run.model.architecture().not_applied.iter().cloned());
    let mut records = Vec::new();
    let mut resumed_from = None;
    if let Some((dir, saved, skipped)) = checkpoint::find(&run.resume, output_dir)? {
        saved.check(&dir, &state)?;
        records = checkpoint::records(&dir)?;
        run.model.load_weights(&dir)?;
        run.model.set_weight_type(WeightType::named(&saved.weight_type).unwrap_or_default());
        if saved.progress.updates > 0 {
            run.model.load_optimizer(&dir.join(checkpoint::OPTIMIZER))?;
        }
        // Settings and totals are this run's; everything else is the checkpoint's.
        state = RunState {
            settings: state.settings,
            total_steps: state.total_steps,
            warmup_steps: state.warmup_steps,
            suasion: state.suasion,
            ..saved
        };
        warnings.extend(skipped.into_iter().map(|reason| format!("checkpoint passed over: {reason}")));
        resumed_from = Some(dir);
    }

    prepare(output_dir, run.overwrite && resumed_from.is_none())?;
    for file in run.extra {
        write_bytes(output_dir.join(&file.name), &file.bytes)?;
    }
    let log = Log::start(&output_dir.join(METRICS), records)?;
    let parameters = run.model.architecture().parameter_count();
    observer.event(&Event::Plan {
        plan: &plan,
        parameters,
        memory: run.model.plan(),
        resumed_from: resumed_from.as_deref(),
        step: state.progress.step,
    });
    for warning in &warnings {
        observer.event(&Event::Warning(warning));
    }
    let trainer = Trainer {
        steps: Steps::new(train, settings, plan.total_steps),
        saved: resumed_from.as_ref().map(|_| state.progress.step),
        newest: resumed_from,
        run,
        observer,
        stop,
        plan,
        state,
        log,
        parameters,
        warnings,
    };
    let (report, observer) = trainer.run()?;
    if !report.interrupted {
        report::write_report(output_dir, &report, settings, identity, card, &[], None)?;
        observer.event(&Event::Done(&report));
    }
    Ok(report)
}

struct Trainer<'a, 'o, B: Backend> {
    run: Run<'a, B>,
    observer: &'o mut dyn Observer,
    stop: &'o AtomicBool,
    steps: Steps<'a>,
    plan: Plan,
    state: RunState,
    log: Log,
    parameters: u64,
    /// The step of the newest checkpoint of this state.
    saved: Option<u64>,
    newest: Option<PathBuf>,
    warnings: Vec<String>,
}

impl<'o, B: Backend> Trainer<'_, 'o, B> {
    /// Does what is due after the steps so far, then takes the next step, and so on. What is due depends on the
    /// state alone, so a resumed run does exactly what the interrupted one left undone.
    fn run(mut self) -> Result<(Report, &'o mut dyn Observer)> {
        let report = loop {
            if self.evaluation_due() && !self.evaluate()? {
                break self.interrupted()?;
            }
            if self.saving_due() {
                self.save()?;
            }
            if self.step() >= self.state.total_steps {
                break self.finish()?;
            }
            if self.stop.load(Ordering::Relaxed) {
                break self.interrupted()?;
            }
            self.take_step()?;
        };
        Ok((report, self.observer))
    }

    /// Steps finished.
    fn step(&self) -> u64 {
        self.state.progress.step
    }

    fn epoch_ends(&self) -> bool {
        self.step() > 0 && self.step().is_multiple_of(self.steps.sampler.steps_per_epoch())
    }

    fn evaluation_due(&self) -> bool {
        let (step, settings) = (self.step(), self.run.settings);
        let by_strategy = match settings.eval_strategy {
            Strategy::No | Strategy::Best => false,
            Strategy::Steps => step.is_multiple_of(settings.eval_steps()),
            Strategy::Epoch => self.epoch_ends(),
        };
        let due = by_strategy || step == 0 || step == self.state.total_steps;
        due && !self.run.eval.is_empty() && self.state.evaluated != Some(step)
    }

    fn saving_due(&self) -> bool {
        let (step, settings) = (self.step(), self.run.settings);
        let last = step == self.state.total_steps;
        let due = match settings.save_strategy {
            Strategy::No => false,
            Strategy::Steps => last || step.is_multiple_of(settings.save_steps),
            Strategy::Epoch => last || self.epoch_ends(),
            Strategy::Best => self.state.best.is_some_and(|(best, _)| best == step),
        };
        due && step > 0 && self.saved != Some(step)
    }

    fn take_step(&mut self) -> Result<()> {
        let event = self
            .steps
            .take(self.run.model, &mut self.state.progress)
            .map_err(|error| error.after_checkpoint(self.newest.as_deref()))?;
        if event.loss.is_none() {
            self.warn(format!(
                "step {} changed nothing: its rows have no supervised token, or their weights sum to zero",
                event.step
            ));
        }
        if event.logged {
            self.log.push(Record::Step(self.steps.record(&event)))?;
        }
        self.observer.event(&Event::Step(&event));
        Ok(())
    }

    /// Evaluates; false if the stop flag ended it.
    fn evaluate(&mut self) -> Result<bool> {
        let (step, rows) = (self.step(), self.run.eval.len() as u64);
        let Run { model, eval, settings, .. } = &mut self.run;
        let observer = &mut *self.observer;
        observer.event(&Event::EvalStart { step, rows });
        let mut progress = |done| observer.event(&Event::EvalProgress { done, rows });
        let size = settings.per_device_eval_batch_size;
        let evaluation = match crate::evaluate(model, eval, size, Some(self.stop), &mut progress) {
            Ok(evaluation) => evaluation,
            Err(Error::Interrupted) => return Ok(false),
            // The step before the evaluation left weights whose loss is not finite.
            Err(error) => return Err(error.at_step(step).after_checkpoint(self.newest.as_deref())),
        };
        self.log.push(Record::Eval(EvalRecord::new(step, &evaluation)))?;
        let best = step > 0 && self.state.best.is_none_or(|(_, loss)| evaluation.loss < loss);
        if best {
            self.state.best = Some((step, evaluation.loss));
            self.state.best_evaluation = Some(evaluation.clone());
        }
        if step == 0 {
            self.state.before = Some(evaluation.clone());
        }
        self.state.evaluated = Some(step);
        self.observer.event(&Event::Eval { step, evaluation: &evaluation, best });
        self.state.latest = Some(evaluation);
        Ok(true)
    }

    fn best_checkpoint(&self) -> Option<PathBuf> {
        let path = checkpoint::path_of(self.run.output_dir, self.state.best?.0);
        path.join(checkpoint::STATE).exists().then_some(path)
    }

    fn trainer_state(&self, best: Option<&Path>) -> serde_json::Value {
        trainer_state(&self.state, &self.log.records, &self.steps.sampler, self.parameters, best)
    }

    fn save(&mut self) -> Result<PathBuf> {
        let (step, output_dir) = (self.step(), self.run.output_dir);
        self.state.position = self.steps.sampler.position(step);
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
        };
        let path = checkpoint::write(output_dir, self.run.model, contents)?;
        let removed = match self.run.settings.save_total_limit {
            Some(limit) => checkpoint::prune(output_dir, limit, step, self.state.best.map(|(step, _)| step))?,
            None => Vec::new(),
        };
        self.saved = Some(step);
        self.newest = Some(path.clone());
        self.observer.event(&Event::Checkpoint { step, path: &path, removed: &removed });
        Ok(path)
    }

    fn interrupted(&mut self) -> Result<Report> {
        let step = self.step();
        let path = match (&self.newest, self.saved == Some(step)) {
            (Some(path), true) => path.clone(),
            _ => self.save()?,
        };
        self.write_trainer_state()?;
        self.observer.event(&Event::Interrupted { step, checkpoint: &path });
        let after = self.state.latest.clone().filter(|_| self.state.evaluated == Some(step));
        Ok(self.report(true, step, after))
    }

    fn write_trainer_state(&self) -> Result<()> {
        let value = self.trainer_state(self.best_checkpoint().as_deref());
        Ok(write_bytes(self.run.output_dir.join(TRAINER_STATE), &pretty(&value))?)
    }

    /// The final model and its files.
    fn finish(&mut self) -> Result<Report> {
        let output_dir = self.run.output_dir;
        let (mut final_step, mut after) = (self.step(), self.state.latest.clone());
        if let (true, Some((best, _))) = (self.run.settings.load_best_model_at_end, self.state.best)
            && best != final_step
        {
            match self.best_checkpoint() {
                Some(path) => {
                    let kind = self.run.model.weight_type();
                    self.run.model.load_weights(&path)?;
                    self.run.model.set_weight_type(kind);
                    (final_step, after) = (best, self.state.best_evaluation.clone());
                }
                None => self.warn(format!(
                    "the best evaluation was after step {best}, but {} has no checkpoint of it: the final model is \
                     that of the last step",
                    output_dir.display()
                )),
            }
        }
        self.run.model.save_weights(output_dir)?;
        let (kind, tied) = (self.run.model.weight_type(), self.run.model.architecture().head.tied);
        self.run.files.beside(kind, tied).write(output_dir)?;
        self.write_trainer_state()?;
        Ok(self.report(false, final_step, after))
    }

    fn report(&self, interrupted: bool, final_step: u64, after: Option<Evaluation>) -> Report {
        let (state, progress) = (&self.state, &self.state.progress);
        let best = state.best.map(|(step, loss)| Best { step, loss, checkpoint: self.best_checkpoint() });
        Report {
            interrupted,
            step: progress.step,
            total_steps: state.total_steps,
            epoch: self.steps.sampler.epoch(progress.step),
            parameters: self.parameters,
            plan: self.plan.clone(),
            before: state.before.clone(),
            after,
            best,
            final_step,
            steps: self.log.steps().cloned().collect(),
            evals: self.log.evals().cloned().collect(),
            tokens: progress.tokens,
            targets: progress.targets,
            skipped_steps: progress.skipped_steps,
            train_loss: (progress.updates > 0).then(|| progress.loss_sum / progress.updates as f64),
            seconds: progress.seconds,
            peak_memory_bytes: peak_memory_bytes(),
            checkpoint: self.newest.clone().filter(|path| path.exists()),
            output_dir: self.run.output_dir.to_path_buf(),
            warnings: self.warnings.clone(),
        }
    }

    fn warn(&mut self, message: String) {
        self.observer.event(&Event::Warning(&message));
        self.warnings.push(message);
    }
}

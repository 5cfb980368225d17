//! The loop: steps, evaluations, checkpoints, and what is left at the end.

use crate::checkpoint::{self, Contents, METRICS, TRAINER_STATE};
use crate::json::pretty;
use crate::memory::peak_memory_bytes;
use crate::metrics::{EvalRecord, Log, Record, StepRecord};
use crate::model_files::ModelFiles;
use crate::observer::{Event, Observer, StepEvent};
use crate::run::{Best, Report, Resume, Run};
use crate::sampler::Sampler;
use crate::schedule::Schedule;
use crate::state::RunState;
use crate::trainer_state::trainer_state;
use crate::{Error, Evaluation, Plan, Result, Settings, Strategy, report};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use suasion_data::Sample;
use suasion_engine::{Backend, Model};
use suasion_files::{remove_leftovers, write_bytes};

/// Trains. See [`Run`] for what goes in, CLI.md for what is left in the output folder.
///
/// `stop` may be raised at any time (Ctrl-C): the current step is finished, a checkpoint is written, and the report
/// says `interrupted`. A loss or gradient norm that is not finite stops the run before the weights change.
pub fn train<B: Backend>(run: Run<'_, B>, observer: &mut dyn Observer, stop: &AtomicBool) -> Result<Report> {
    let Run {
        model,
        train,
        eval,
        settings,
        identity,
        card,
        files: model_files,
        extra,
        output_dir,
        resume,
        overwrite,
    } = run;
    settings.validate(!eval.is_empty())?;
    let plan = Plan::new(train, eval, settings)?;
    plan.check_model(model.architecture(), train, eval)?;
    check_output_dir(output_dir, &resume, overwrite)?;

    let mut state = RunState::new(settings, identity, &plan);
    let mut warnings = plan.warnings.clone();
    warnings.extend(model.architecture().not_applied.iter().cloned());
    let mut records = Vec::new();
    let mut resumed_from = None;
    if let Some((dir, saved, skipped)) = checkpoint::find(&resume, output_dir)? {
        saved.check(&dir, &state)?;
        records = checkpoint::records(&dir)?;
        model.load_weights(&dir)?;
        if saved.updates > 0 {
            model.load_optimizer(&dir.join(checkpoint::OPTIMIZER))?;
        }
        // Settings and totals are this run's; what has happened is the checkpoint's.
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

    fs::create_dir_all(output_dir).map_err(|source| Error::io(output_dir, source))?;
    remove_leftovers(output_dir);
    if overwrite && resumed_from.is_none() {
        remove_run(output_dir)?;
    }
    for file in extra {
        write_bytes(output_dir.join(&file.name), &file.bytes)?;
    }
    let log = Log::start(&output_dir.join(METRICS), records)?;
    let parameters = model.architecture().parameter_count();
    observer.event(&Event::Plan {
        plan: &plan,
        parameters,
        memory: model.plan(),
        resumed_from: resumed_from.as_deref(),
        step: state.step,
    });
    for warning in &warnings {
        observer.event(&Event::Warning(warning));
    }
    let saved = resumed_from.as_ref().map(|_| state.step);
    let trainer = Trainer {
        model,
        train,
        eval,
        settings,
        output_dir,
        model_files,
        observer,
        stop,
        sampler: Sampler::new(train.len(), settings),
        schedule: Schedule::new(settings, plan.total_steps),
        plan,
        state,
        log,
        parameters,
        saved,
        newest: resumed_from,
        warnings,
        pace: Pace::default(),
    };
    let (trainer, report) = trainer.run()?;
    if !report.interrupted {
        report::write_report(output_dir, &report, settings, identity, card, &[], None)?;
        trainer.observer.event(&Event::Done(&report));
    }
    Ok(report)
}

/// Refuses an output folder that holds something, unless the run resumes there or may overwrite it.
pub fn check_output_dir(dir: &Path, resume: &Resume, overwrite: bool) -> Result<()> {
    let resumes_here = match resume {
        Resume::No => false,
        Resume::Newest => true,
        Resume::From(from) => {
            let same =
                |a: &Path, b: &Path| matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b);
            same(from, dir)
                || from.canonicalize().is_ok_and(|from| from.parent().is_some_and(|p| same(p, dir)))
        }
    };
    if overwrite || resumes_here {
        return Ok(());
    }
    match fs::read_dir(dir) {
        Ok(mut entries) => match entries.next() {
            Some(_) => Err(Error::OutputNotEmpty { dir: dir.to_path_buf() }),
            None => Ok(()),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(Error::io(dir, source)),
    }
}

/// Removes what an earlier run left, so that nothing of it is taken for this run's.
fn remove_run(dir: &Path) -> Result<()> {
    for (_, checkpoint) in checkpoint::list(dir) {
        if checkpoint.join(checkpoint::STATE).exists() {
            fs::remove_dir_all(&checkpoint).map_err(|source| Error::io(&checkpoint, source))?;
        }
    }
    for name in [METRICS, TRAINER_STATE, "report.html", "README.md"] {
        match fs::remove_file(dir.join(name)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io(dir.join(name), error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// How fast this process trains.
#[derive(Default)]
struct Pace {
    steps: u64,
    seconds: f64,
    /// Since the last line of metrics.
    tokens: u64,
    since: f64,
}

struct Trainer<'a, B: Backend> {
    model: &'a mut Model<B>,
    train: &'a [Sample],
    eval: &'a [Sample],
    settings: &'a Settings,
    output_dir: &'a Path,
    model_files: &'a ModelFiles,
    observer: &'a mut dyn Observer,
    stop: &'a AtomicBool,
    sampler: Sampler,
    schedule: Schedule,
    plan: Plan,
    state: RunState,
    log: Log,
    parameters: u64,
    /// The step of the newest checkpoint of this state.
    saved: Option<u64>,
    newest: Option<PathBuf>,
    warnings: Vec<String>,
    pace: Pace,
}

impl<B: Backend> Trainer<'_, B> {
    /// At each turn first what is due after the steps so far, then the next step. What is due is a function of the
    /// state alone, so an interrupted run does after its resume exactly what it had left undone.
    fn run(mut self) -> Result<(Self, Report)> {
        loop {
            if self.evaluation_due() && !self.evaluate()? {
                return self.interrupted();
            }
            if self.saving_due() {
                self.save()?;
            }
            if self.state.step >= self.state.total_steps {
                let report = self.finish()?;
                return Ok((self, report));
            }
            if self.stop.load(Ordering::Relaxed) {
                return self.interrupted();
            }
            self.step()?;
        }
    }

    fn epoch_ends(&self) -> bool {
        self.state.step > 0 && self.state.step.is_multiple_of(self.sampler.steps_per_epoch())
    }

    fn evaluation_due(&self) -> bool {
        let step = self.state.step;
        let by_strategy = match self.settings.eval_strategy {
            Strategy::No | Strategy::Best => false,
            Strategy::Steps => step.is_multiple_of(self.settings.eval_steps()),
            Strategy::Epoch => self.epoch_ends(),
        };
        let due = by_strategy || step == 0 || step == self.state.total_steps;
        due && !self.eval.is_empty() && self.state.evaluated != Some(step)
    }

    fn saving_due(&self) -> bool {
        let step = self.state.step;
        let last = step == self.state.total_steps;
        let due = match self.settings.save_strategy {
            Strategy::No => false,
            Strategy::Steps => last || step.is_multiple_of(self.settings.save_steps),
            Strategy::Epoch => last || self.epoch_ends(),
            Strategy::Best => self.state.best.is_some_and(|(best, _)| best == step),
        };
        due && step > 0 && self.saved != Some(step)
    }

    fn step(&mut self) -> Result<()> {
        let done = self.state.step;
        let rows = self.sampler.step(done);
        let micro_batches: Vec<Vec<&Sample>> =
            rows.iter().map(|rows| rows.iter().map(|&row| &self.train[row as usize]).collect()).collect();
        let learning_rate = self.schedule.rate(done);
        let started = Instant::now();
        let outcome =
            crate::step::step(self.model, &micro_batches, self.settings, learning_rate, self.state.updates)
                .map_err(|error| self.at_step(error, done + 1))?;
        let seconds = started.elapsed().as_secs_f64();

        let state = &mut self.state;
        state.step += 1;
        state.position = self.sampler.position(state.step);
        state.tokens += outcome.tokens;
        state.targets += outcome.targets;
        state.seconds += seconds;
        self.pace.steps += 1;
        self.pace.seconds += seconds;
        self.pace.tokens += outcome.tokens;
        match outcome.loss {
            Some(loss) => {
                state.updates += 1;
                state.loss_sum += loss;
            }
            None => {
                state.skipped_steps += 1;
                let step = state.step;
                self.warn(format!(
                    "step {step} changed nothing: its rows have no supervised token, or their weights sum to zero"
                ));
            }
        }

        let (step, total) = (self.state.step, self.state.total_steps);
        let logged = step == 1 || step.is_multiple_of(self.settings.logging_steps) || step == total;
        let peak = peak_memory_bytes();
        if logged {
            let record = StepRecord {
                step,
                epoch: self.sampler.epoch(step),
                loss: outcome.loss,
                learning_rate,
                grad_norm: outcome.grad_norm,
                targets: outcome.targets,
                tokens: outcome.tokens,
                tokens_per_second: per_second(self.pace.tokens, self.pace.seconds - self.pace.since),
                peak_memory_bytes: peak,
            };
            self.log.push(Record::Step(record))?;
            self.pace.tokens = 0;
            self.pace.since = self.pace.seconds;
        }
        self.observer.event(&Event::Step(&StepEvent {
            step,
            total_steps: total,
            epoch: self.sampler.epoch(step),
            loss: outcome.loss,
            learning_rate,
            grad_norm: outcome.grad_norm,
            targets: outcome.targets,
            tokens: outcome.tokens,
            seconds,
            targets_per_second: per_second(outcome.targets, seconds),
            tokens_per_second: per_second(outcome.tokens, seconds),
            eta_seconds: (total - step) as f64 * self.pace.seconds / self.pace.steps as f64,
            peak_memory_bytes: peak,
            logged,
        }));
        Ok(())
    }

    /// An error of the step's glue with what only the loop knows.
    fn at_step(&self, error: Error, at: u64) -> Error {
        match error {
            Error::NonFinite { evaluation, what, value, rows, .. } => Error::NonFinite {
                step: Some(at),
                evaluation,
                what,
                value,
                rows,
                checkpoint: self.newest.clone(),
            },
            other => other,
        }
    }

    /// Evaluates; false where the stop flag ended it.
    fn evaluate(&mut self) -> Result<bool> {
        let (step, rows) = (self.state.step, self.eval.len() as u64);
        let Trainer { model, eval, settings, stop, observer, .. } = self;
        observer.event(&Event::EvalStart { step, rows });
        let mut progress = |done| observer.event(&Event::EvalProgress { done, rows });
        let size = settings.per_device_eval_batch_size;
        let evaluation = match crate::evaluate(model, eval, size, Some(*stop), &mut progress) {
            Ok(evaluation) => evaluation,
            Err(Error::Interrupted) => return Ok(false),
            // Weights that give no finite loss were made by the step before.
            Err(error) => return Err(self.at_step(error, step)),
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
        let path = checkpoint::path_of(self.output_dir, self.state.best?.0);
        path.join(checkpoint::STATE).exists().then_some(path)
    }

    fn trainer_state(&self) -> serde_json::Value {
        // The checkpoint about to be written does not exist yet and may be the best one.
        let best = match self.state.best {
            Some((step, _)) if step == self.state.step => Some(checkpoint::path_of(self.output_dir, step)),
            _ => self.best_checkpoint(),
        };
        trainer_state(&self.state, &self.log.records, &self.sampler, self.parameters, best.as_deref())
    }

    fn save(&mut self) -> Result<PathBuf> {
        let (trainer_state, metrics) = (self.trainer_state(), self.log.text());
        let contents = Contents {
            state: &mut self.state,
            files: self.model_files,
            metrics: &metrics,
            trainer_state: &trainer_state,
        };
        let path = checkpoint::write(self.output_dir, self.model, contents)?;
        let step = self.state.step;
        let removed = match self.settings.save_total_limit {
            Some(limit) => {
                checkpoint::prune(self.output_dir, limit, step, self.state.best.map(|(step, _)| step))?
            }
            None => Vec::new(),
        };
        self.saved = Some(step);
        self.newest = Some(path.clone());
        self.observer.event(&Event::Checkpoint { step, path: &path, removed: &removed });
        Ok(path)
    }

    fn interrupted(mut self) -> Result<(Self, Report)> {
        let path = match (&self.newest, self.saved == Some(self.state.step)) {
            (Some(path), true) => path.clone(),
            _ => self.save()?,
        };
        self.write_trainer_state()?;
        self.observer.event(&Event::Interrupted { step: self.state.step, checkpoint: &path });
        let after = self.state.latest.clone().filter(|_| self.state.evaluated == Some(self.state.step));
        let report = self.report(true, self.state.step, after);
        Ok((self, report))
    }

    fn write_trainer_state(&self) -> Result<()> {
        let best = self.best_checkpoint();
        let value =
            trainer_state(&self.state, &self.log.records, &self.sampler, self.parameters, best.as_deref());
        Ok(write_bytes(self.output_dir.join(TRAINER_STATE), &pretty(&value))?)
    }

    /// The final model and its files.
    fn finish(&mut self) -> Result<Report> {
        let (mut final_step, mut after) = (self.state.step, self.state.latest.clone());
        if let (true, Some((best, _))) = (self.settings.load_best_model_at_end, self.state.best)
            && best != self.state.step
        {
            match self.best_checkpoint() {
                Some(path) => {
                    self.model.load_weights(&path)?;
                    (final_step, after) = (best, self.state.best_evaluation.clone());
                }
                None => self.warn(format!(
                    "the best evaluation was after step {best}, and {} has no checkpoint of it: the final model is \
                     that of the last step",
                    self.output_dir.display()
                )),
            }
        }
        self.model.save_weights(self.output_dir)?;
        self.model_files.write(self.output_dir)?;
        self.write_trainer_state()?;
        Ok(self.report(false, final_step, after))
    }

    fn report(&self, interrupted: bool, final_step: u64, after: Option<Evaluation>) -> Report {
        let state = &self.state;
        let best = state.best.map(|(step, loss)| Best { step, loss, checkpoint: self.best_checkpoint() });
        Report {
            interrupted,
            step: state.step,
            total_steps: state.total_steps,
            epoch: self.sampler.epoch(state.step),
            parameters: self.parameters,
            plan: self.plan.clone(),
            before: state.before.clone(),
            after,
            best,
            final_step,
            steps: self.log.steps().cloned().collect(),
            evals: self.log.evals().cloned().collect(),
            tokens: state.tokens,
            targets: state.targets,
            skipped_steps: state.skipped_steps,
            train_loss: (state.updates > 0).then(|| state.loss_sum / state.updates as f64),
            seconds: state.seconds,
            peak_memory_bytes: peak_memory_bytes(),
            checkpoint: self.newest.clone().filter(|path| path.exists()),
            output_dir: self.output_dir.to_path_buf(),
            warnings: self.warnings.clone(),
        }
    }

    fn warn(&mut self, message: String) {
        self.observer.event(&Event::Warning(&message));
        self.warnings.push(message);
    }
}

fn per_second(count: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { count as f64 / seconds } else { 0.0 }
}

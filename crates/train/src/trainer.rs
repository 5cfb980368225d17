//! A training run: its steps, its evaluations and checkpoints, and what it leaves in its output folder.

mod ending;
mod saving;

use crate::checkpoint::{self, Located, METRICS, is_begun};
use crate::divergence::Divergence;
use crate::evaluate::evaluate_over;
use crate::metrics::{EvalRecord, Log, Record, SampleRecord};
use crate::observer::{Event, Observer};
use crate::output_dir::{check_output_dir, lock, prepare};
use crate::run::{Report, Resume, Run};
use crate::state::RunState;
use crate::steps::Steps;
use crate::tensorboard::Events;
use crate::{Error, Evaluation, Plan, Result, Settings, Strategy, ranks, report, samples};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use suasion_engine::{Backend, Model, Trainable, WeightType};

/// Trains a model. The output folder then holds the model with its files, the checkpoints, `metrics.jsonl`,
/// `trainer_state.json`, `README.md` and `report.html`. No other process can write to it meanwhile.
///
/// `stop` may be raised at any time (Ctrl-C): the current step is finished, a checkpoint is written, and the
/// report has `interrupted` set. A loss or gradient norm that is not finite stops the run before the weights
/// change, and with `stop_on_divergence` a loss that stays high ends it ([`Report::diverged`]).
///
/// All ranks of a run call this with the same inputs and do the same; the first writes the files, and the stop flag of
/// one stops all. If one is lost, the others end with [`Error::Rank`].
pub fn train<B: Backend>(run: Run<'_, B>, observer: &mut dyn Observer, stop: &AtomicBool) -> Result<Report> {
    train_from(run, None, observer, stop)
}

/// As [`train`], from the checkpoint that [`checkpoint::locate`] has found for the run, which is not verified again.
pub fn train_from<B: Backend>(
    mut run: Run<'_, B>,
    located: Option<Located>,
    observer: &mut dyn Observer,
    stop: &AtomicBool,
) -> Result<Report> {
    let Run { train, eval, settings, identity, card, output_dir, collective, .. } = run;
    let first = collective.rank() == 0;
    settings.validate(!eval.is_empty())?;
    let mut plan = Plan::of_ranks(train, eval, settings, collective.ranks())?;
    plan.check_model(run.model.architecture(), train, eval)?;
    check_choice(settings, run.model)?;
    let _lock = match run.lock.take() {
        _ if !first => None,
        held => {
            check_output_dir(output_dir, &run.resume, run.overwrite)?;
            std::fs::create_dir_all(output_dir).map_err(|source| Error::io(output_dir, source))?;
            Some(held.map_or_else(|| lock(output_dir), Ok)?)
        }
    };

    run.model.choose_optimizer(settings.optimizer())?;
    run.model.share_optimizer(collective)?;
    let mut state = RunState::new(settings, identity, &plan, run.model.weight_type());
    state.base = run.model.base().map(str::to_string);
    let mut warnings = plan.warnings.clone();
    if settings.early_stopping_patience.is_some() && !settings.load_best_model_at_end {
        warnings.push(
            "early_stopping_patience without load_best_model_at_end: the final model will be that of the last step, \
             not the best"
                .into(),
        );
    }
    warnings.extend(run.model.architecture().not_applied.iter().cloned());
    let mut records = Vec::new();
    let mut resumed_from = None;
    let located = match located {
        None => checkpoint::locate(&run.resume, output_dir)?,
        located => located,
    };
    if let Some(Located { dir, state: saved, skipped }) = located {
        let shift = if run.extend { saved.shift_under(&state) } else { saved.shift };
        if settings.max_steps.is_none() {
            state.total_steps = state.total_steps.saturating_add_signed(shift);
            plan.total_steps = state.total_steps;
        }
        for difference in saved.check(&dir, &state, run.extend)? {
            warnings.push(format!("not an exact continuation: {difference}"));
        }
        records = checkpoint::records(&dir)?;
        run.model.load_run(&dir)?;
        run.model.set_weight_type(WeightType::named(&saved.weight_type).unwrap_or_default());
        if saved.progress.updates > 0 {
            run.model.load_optimizer(&dir.join(checkpoint::OPTIMIZER))?;
            load_average(run.model, &dir)?;
        }
        // Settings and totals are this run's; everything else is the checkpoint's.
        state = RunState {
            settings: state.settings,
            total_steps: state.total_steps,
            warmup_steps: state.warmup_steps,
            suasion: state.suasion,
            data_fingerprint: state.data_fingerprint,
            masking_version: state.masking_version,
            rows: state.rows,
            ranks: state.ranks,
            data_seed: state.data_seed,
            shift,
            ..saved
        };
        warnings.extend(skipped.into_iter().map(|reason| format!("checkpoint passed over: {reason}")));
        resumed_from = Some(dir);
    } else if run.resume != Resume::No {
        warnings.push(format!(
            "{}: the run had written no checkpoint yet: it starts again",
            output_dir.display()
        ));
    }

    ranks::agree(&run, &state).map_err(|error| error.after_checkpoint(resumed_from.as_deref()))?;
    if first {
        prepare(output_dir)?;
    }
    let log = Log::new(output_dir.join(METRICS), records);
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
    // An earlier run is kept until this one has something to replace it with.
    let waits = run.overwrite && resumed_from.is_none() && is_begun(output_dir);
    let events =
        run.tensorboard.filter(|_| first).map(|dir| Events::new(dir.to_path_buf(), state.progress.step));
    let mut steps = Steps::shifted(train, settings, plan.total_steps, state.shift, collective)?;
    steps.rate = state.plateau.learning_rate;
    let mut trainer = Trainer {
        steps,
        owner: false,
        last_loss: None,
        unwritten: false,
        events,
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
    if !waits {
        trainer.own()?;
    }
    let (report, observer) = trainer.run()?;
    if !report.interrupted {
        if first {
            report::write_report(output_dir, &report, settings, identity, card, &[], None)?;
        }
        observer.event(&Event::Done(&report));
    }
    // The other ranks wait until the first has written everything.
    let met = collective.sum(&mut [0.0]);
    met.map_err(|error| Error::from(error).after_checkpoint(report.checkpoint.as_deref()))?;
    Ok(report)
}

/// Reads the average of a checkpoint's weights; false if it has none.
fn load_average<B: Backend>(model: &mut Model<B>, dir: &Path) -> Result<bool> {
    let path = dir.join(checkpoint::AVERAGE);
    let exists = path.exists();
    if exists {
        model.load_average(&path)?;
    }
    Ok(exists)
}

/// Refuses a model that trains other parameters than the settings choose.
fn check_choice<B: Backend>(settings: &Settings, model: &Model<B>) -> Result<()> {
    let Trainable::Named(chosen) = settings.choose(&model.parameter_names())? else { return Ok(()) };
    if model.trained_names().into_iter().collect::<BTreeSet<_>>() == chosen {
        return Ok(());
    }
    let key = if settings.freeze.0.is_empty() { "trainable" } else { "freeze" };
    let value = [&settings.trainable.0[..], &settings.freeze.0].concat().join(", ");
    let help = "make the model with Model::with_trainable and Settings::choose";
    Err(Error::setting(key, value, "is not what this model was made to train", help))
}

struct Trainer<'a, 'o, B: Backend> {
    run: Run<'a, B>,
    observer: &'o mut dyn Observer,
    stop: &'o AtomicBool,
    steps: Steps<'a>,
    plan: Plan,
    state: RunState,
    log: Log,
    /// The loss of the last step.
    last_loss: Option<f64>,
    /// True while lines of metrics could not be written.
    unwritten: bool,
    /// For TensorBoard.
    events: Option<Events>,
    /// True once the folder holds this run's files and no earlier one's.
    owner: bool,
    parameters: u64,
    /// The step of the newest checkpoint of this state.
    saved: Option<u64>,
    newest: Option<PathBuf>,
    warnings: Vec<String>,
}

impl<'o, B: Backend> Trainer<'_, 'o, B> {
    /// Alternates between what is due after the steps so far and the next step. What is due depends on the
    /// state alone, so a resumed run does exactly what the interrupted one had left to do.
    fn run(mut self) -> Result<(Report, &'o mut dyn Observer)> {
        let report = self.run_to_end().map_err(|error| error.after_checkpoint(self.newest.as_deref()))?;
        Ok((report, self.observer))
    }

    fn run_to_end(&mut self) -> Result<Report> {
        loop {
            if self.evaluation_due() && !self.evaluate()? {
                return self.interrupted();
            }
            if self.saving_due() {
                self.try_to_save()?;
            }
            if self.is_over() {
                return self.finish();
            }
            if self.stopped()? {
                return self.interrupted();
            }
            self.take_step()?;
            if let Some(divergence) = self.divergence().filter(|_| self.run.settings.stop_on_divergence) {
                return self.diverged(divergence);
            }
        }
    }

    /// True on the rank that writes the files.
    fn writes(&self) -> bool {
        self.run.collective.rank() == 0
    }

    /// True on all ranks where the stop flag of one was raised.
    fn stopped(&self) -> Result<bool> {
        let mut raised = [f64::from(u8::from(self.stop.load(Ordering::Relaxed)))];
        self.run.collective.sum(&mut raised)?;
        Ok(raised[0] > 0.0)
    }

    /// Steps finished.
    fn step(&self) -> u64 {
        self.state.progress.step
    }

    /// True if evaluations have stopped improving.
    fn stopped_early(&self) -> bool {
        let patience = self.run.settings.early_stopping_patience;
        patience.is_some_and(|patience| self.state.patience.bad >= patience)
    }

    /// True after the last step.
    fn is_over(&self) -> bool {
        self.step() >= self.state.total_steps || self.stopped_early()
    }

    fn epoch_ends(&self) -> bool {
        self.steps.epoch_ends(self.step())
    }

    fn evaluation_due(&self) -> bool {
        let (step, settings) = (self.step(), self.run.settings);
        let by_strategy = match settings.eval_strategy {
            Strategy::No | Strategy::Best => false,
            Strategy::Steps => {
                let every = settings.eval_steps().of(self.state.total_steps);
                step.is_multiple_of(every) && settings.eval_delay <= step as f64
            }
            Strategy::Epoch => self.epoch_ends() && settings.eval_delay <= self.steps.epoch(step),
        };
        let due = by_strategy || step == 0 || self.is_over();
        due && !self.run.eval.is_empty() && self.state.evaluated != Some(step)
    }

    /// True if this step's evaluation is the best so far.
    fn is_best(&self) -> bool {
        self.state.best.is_some_and(|(best, _)| best == self.step())
    }

    /// True if `save_strategy` writes a checkpoint after this step.
    fn scheduled(&self) -> bool {
        let (step, settings) = (self.step(), self.run.settings);
        let due = match settings.save_strategy {
            Strategy::No => false,
            Strategy::Steps => {
                self.is_over() || step.is_multiple_of(settings.save_steps.of(self.state.total_steps))
            }
            Strategy::Epoch => self.is_over() || self.epoch_ends(),
            Strategy::Best => self.is_best(),
        };
        // The weights at the start may turn out to be the best.
        if step == 0 { settings.load_best_model_at_end } else { due }
    }

    fn saving_due(&self) -> bool {
        let best = self.run.settings.load_best_model_at_end && self.is_best();
        (self.scheduled() || best) && self.saved != Some(self.step())
    }

    fn take_step(&mut self) -> Result<()> {
        let event = self.steps.take(self.run.model, &mut self.state.progress)?;
        self.last_loss = event.loss;
        if let Some(loss) = event.loss {
            self.state.watch.see(loss);
        } else {
            self.warn(format!(
                "step {} changed nothing: its rows have no supervised token, or their weights sum to zero",
                event.step
            ));
        }
        if event.logged {
            let record = Record::Step(self.steps.record(&event));
            self.note(record)?;
        }
        self.observer.event(&Event::Step(&event));
        Ok(())
    }

    /// Evaluates; false if the stop flag ended it.
    fn evaluate(&mut self) -> Result<bool> {
        let step = self.step();
        // The average of the weights, where there is one.
        self.run.model.exchange_average()?;
        let measured = self.measure();
        self.run.model.exchange_average()?;
        let Some((evaluation, replies)) = measured? else { return Ok(false) };
        let settings = self.run.settings;
        let name = settings.metric();
        let Some(metric) = evaluation.metric(name) else {
            let problem = "cannot be measured: the rows to evaluate on have no token of this section";
            return Err(Error::setting(
                "metric_for_best_model",
                name,
                problem,
                "name another metric, such as loss",
            ));
        };
        let best = self.state.best.is_none_or(|(_, best)| settings.is_better(metric, best));
        if best {
            self.state.best = Some((step, metric));
            self.state.best_evaluation = Some(evaluation.clone());
        }
        if step > 0 && settings.eval_strategy != Strategy::No {
            self.state.patience.see(metric, settings);
            self.steps.rate = self.steps.schedule.evaluated(&mut self.state.plateau, metric);
        }
        self.note(Record::Eval(EvalRecord::new(step, &evaluation, replies)))?;
        if step == 0 {
            self.state.before = Some(evaluation.clone());
        }
        self.state.evaluated = Some(step);
        self.observer.event(&Event::Eval { step, evaluation: &evaluation, best });
        self.state.latest = Some(evaluation);
        Ok(true)
    }

    /// Evaluates the current weights; `None` if the stop flag ended it.
    fn measure(&mut self) -> Result<Option<(Evaluation, Vec<SampleRecord>)>> {
        let (step, rows) = (self.step(), self.run.eval.len() as u64);
        let Run { model, eval, settings, stops, decode, collective, .. } = &mut self.run;
        let observer = &mut *self.observer;
        observer.event(&Event::EvalStart { step, rows });
        let mut progress = |done| observer.event(&Event::EvalProgress { done, rows });
        let size = settings.per_device_eval_batch_size;
        let stop = Some(self.stop);
        let evaluation = match evaluate_over(model, eval, size, *collective, stop, &mut progress) {
            Ok(evaluation) => evaluation,
            Err(Error::Interrupted) => return Ok(None),
            // The step before the evaluation left weights whose loss is not finite.
            Err(error) => return Err(error.at_step(step)),
        };
        if settings.num_samples == 0 {
            return Ok(Some((evaluation, Vec::new())));
        }
        // The first rank writes them.
        let replies = match collective.rank() {
            0 => samples::replies(model, eval, settings, stops, *decode, self.stop)?,
            _ => Some(Vec::new()),
        };
        // The others learn whether it was stopped meanwhile.
        if self.stopped()? { Ok(None) } else { Ok(replies.map(|replies| (evaluation, replies))) }
    }

    /// The divergence that ends the run, if there is one.
    fn divergence(&self) -> Option<Divergence> {
        self.state.watch.stops(self.step(), self.last_loss)
    }

    fn warn(&mut self, message: String) {
        self.observer.event(&Event::Warning(&message));
        self.warnings.push(message);
    }
}

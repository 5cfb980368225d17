//! The steps of a run, one after another: which rows each takes, at which learning rate, counted and timed.

use crate::memory::peak_memory_bytes;
use crate::metrics::StepRecord;
use crate::observer::StepEvent;
use crate::sampler::Sampler;
use crate::schedule::Schedule;
use crate::state::Progress;
use crate::step::{MicroBatches, step_of};
use crate::{Result, Settings};
use std::panic::resume_unwind;
use std::time::Instant;
use suasion_data::Sample;
use suasion_engine::{Backend, Collective, Model, SingleRank};

/// The training loop shared by [`crate::train`] and [`crate::compare()`], which decide what happens between two
/// steps.
pub(crate) struct Steps<'a> {
    pub(crate) sampler: Sampler,
    pub(crate) schedule: Schedule,
    /// The learning rate, where evaluations decide it.
    pub(crate) rate: Option<f64>,
    /// The offset between the number of a step and its position in data and schedule ([`crate::state::RunState::shift`]).
    shift: i64,
    total_steps: u64,
    rows: &'a [Sample],
    settings: &'a Settings,
    collective: &'a dyn Collective,
    /// The micro-batches of the next step and its position, if they were prepared.
    ahead: Option<(u64, MicroBatches<'a>)>,
    pace: Pace,
}

/// How fast this process trains.
#[derive(Default)]
struct Pace {
    steps: u64,
    seconds: f64,
    /// Tokens and seconds since the last record.
    unrecorded: (u64, f64),
}

impl<'a> Steps<'a> {
    /// The steps over these rows, of one rank.
    pub(crate) fn new(rows: &'a [Sample], settings: &'a Settings, total_steps: u64) -> Result<Steps<'a>> {
        Steps::shifted(rows, settings, total_steps, 0, &SingleRank)
    }

    /// The same over several ranks, `shift` steps ahead of their position in data and schedule.
    pub(crate) fn shifted(
        rows: &'a [Sample],
        settings: &'a Settings,
        total_steps: u64,
        shift: i64,
        collective: &'a dyn Collective,
    ) -> Result<Steps<'a>> {
        Ok(Steps {
            sampler: Sampler::of_ranks(rows.len(), settings, collective.ranks()),
            schedule: settings.schedule(total_steps.saturating_add_signed(-shift))?,
            rate: None,
            shift,
            total_steps,
            rows,
            settings,
            collective,
            ahead: None,
            pace: Pace::default(),
        })
    }

    /// The position of a step in data and schedule.
    fn place(&self, step: u64) -> u64 {
        step.saturating_add_signed(-self.shift)
    }

    /// The Trainer's `epoch` after `step` steps.
    pub(crate) fn epoch(&self, step: u64) -> f64 {
        self.sampler.epoch(self.place(step))
    }

    /// The epoch after `step` steps, and the next micro-batch in it.
    pub(crate) fn position(&self, step: u64) -> (u64, u64) {
        self.sampler.position(self.place(step))
    }

    /// True if an epoch ends with the last of `step` steps.
    pub(crate) fn epoch_ends(&self, step: u64) -> bool {
        let place = self.place(step);
        place > 0 && place.is_multiple_of(self.sampler.steps_per_epoch())
    }

    /// Takes the step after `progress`, and counts it there. An error names the step.
    pub(crate) fn take<B: Backend>(
        &mut self,
        model: &mut Model<B>,
        progress: &mut Progress,
    ) -> Result<StepEvent> {
        let number = progress.step + 1;
        let place = self.place(progress.step);
        let learning_rate = self.rate.unwrap_or_else(|| self.schedule.rate(place));
        let (rank, ranks) = (self.collective.rank(), self.collective.ranks());
        let (rows, settings, collective, updates) =
            (self.rows, self.settings, self.collective, progress.updates);
        let prepare = |sampler: &mut Sampler, place: u64| {
            let indices = Sampler::dealt(sampler.step(place), rank, ranks);
            let of = |indices: &Vec<usize>| indices.iter().map(|&row| &rows[row]).collect();
            MicroBatches::new(indices.iter().map(of).collect())
        };
        let started = Instant::now();
        let micro_batches = match self.ahead.take() {
            Some((of, ready)) if of == place => ready,
            _ => prepare(&mut self.sampler, place),
        };
        let (sampler, last) = (&mut self.sampler, number >= self.total_steps);
        // The next step's batches are prepared while the device computes this one.
        let (outcome, ahead) = std::thread::scope(|scope| {
            let ahead = (!last).then(|| scope.spawn(|| (place + 1, prepare(sampler, place + 1))));
            let outcome = step_of(model, &micro_batches, settings, learning_rate, updates, collective);
            (outcome, ahead.map(|ahead| ahead.join().unwrap_or_else(|panic| resume_unwind(panic))))
        });
        self.ahead = ahead;
        let outcome = outcome.map_err(|error| error.at_step(number))?;
        let seconds = started.elapsed().as_secs_f64();

        progress.step = number;
        progress.tokens += outcome.tokens;
        progress.targets += outcome.targets;
        progress.seconds += seconds;
        match outcome.loss {
            Some(loss) => {
                progress.updates += 1;
                progress.loss_sum += loss;
            }
            None => progress.skipped_steps += 1,
        }
        self.pace.steps += 1;
        self.pace.seconds += seconds;
        self.pace.unrecorded.0 += outcome.tokens;
        self.pace.unrecorded.1 += seconds;

        let total_steps = self.total_steps;
        Ok(StepEvent {
            step: number,
            total_steps,
            epoch: self.epoch(number),
            loss: outcome.loss,
            learning_rate,
            grad_norm: outcome.grad_norm,
            mean_token_accuracy: outcome.mean_token_accuracy,
            entropy: outcome.entropy,
            aux_loss: outcome.aux_loss,
            targets: outcome.targets,
            tokens: outcome.tokens,
            seconds,
            targets_per_second: per_second(outcome.targets, seconds),
            tokens_per_second: per_second(outcome.tokens, seconds),
            eta_seconds: total_steps.saturating_sub(number) as f64 * self.pace.seconds
                / self.pace.steps as f64,
            peak_memory_bytes: peak_memory_bytes(),
            logged: number == 1
                || number.is_multiple_of(self.settings.logging_steps.of(total_steps))
                || number == total_steps,
        })
    }

    /// The line of metrics for a step; its rate is over all steps since the last line.
    pub(crate) fn record(&mut self, event: &StepEvent) -> StepRecord {
        let (tokens, seconds) = std::mem::take(&mut self.pace.unrecorded);
        StepRecord {
            step: event.step,
            epoch: event.epoch,
            loss: event.loss,
            learning_rate: event.learning_rate,
            grad_norm: event.grad_norm,
            mean_token_accuracy: event.mean_token_accuracy,
            entropy: event.entropy,
            aux_loss: event.aux_loss,
            targets: event.targets,
            tokens: event.tokens,
            tokens_per_second: per_second(tokens, seconds),
            peak_memory_bytes: event.peak_memory_bytes,
        }
    }
}

fn per_second(count: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { count as f64 / seconds } else { 0.0 }
}

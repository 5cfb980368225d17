//! The rows of each step. They depend on the number of the step alone, so a resumed run needs no other state.

use crate::Settings;
use crate::rng::{Purpose, Rng};

/// The order of the rows, divided into micro-batches and steps.
///
/// An epoch is a permutation of the rows: file order, or a Fisher–Yates shuffle with ChaCha8 keyed by
/// `data_seed`, with the epoch as the stream. Its micro-batches have `batch` rows and its steps
/// `accumulation` micro-batches for each rank; the last of each may have fewer, as in transformers 5. No batch extends
/// over the end of an epoch. The micro-batches of a step are dealt out in turn ([`Sampler::dealt`]), as accelerate does.
#[derive(Clone, Debug)]
pub struct Sampler {
    rows: usize,
    batch: usize,
    /// Micro-batches in a step, those of all ranks.
    micro_batches: usize,
    shuffle: bool,
    data_seed: u64,
    /// The last epoch used, with its permutation.
    cached: Option<(u64, Vec<usize>)>,
}

impl Sampler {
    /// A sampler over `rows` rows, of a run of one rank.
    pub fn new(rows: usize, settings: &Settings) -> Sampler {
        Sampler::of_ranks(rows, settings, 1)
    }

    /// A sampler over `rows` rows, of a run of this many ranks.
    pub fn of_ranks(rows: usize, settings: &Settings, ranks: usize) -> Sampler {
        Sampler {
            rows,
            batch: settings.per_device_train_batch_size,
            micro_batches: settings.gradient_accumulation_steps.saturating_mul(ranks),
            shuffle: settings.shuffle_dataset,
            data_seed: settings.data_seed(),
            cached: None,
        }
    }

    /// Micro-batches in an epoch.
    pub fn micro_batches_per_epoch(&self) -> u64 {
        self.rows.div_ceil(self.batch) as u64
    }

    /// Steps in an epoch.
    pub fn steps_per_epoch(&self) -> u64 {
        self.micro_batches_per_epoch().div_ceil(self.micro_batches as u64)
    }

    /// Rows of a step, of all ranks.
    pub fn rows_per_step(&self) -> u64 {
        self.micro_batches.saturating_mul(self.batch) as u64
    }

    /// Steps of a run: `max_steps`, else `ceil(num_train_epochs · steps per epoch)`.
    pub fn total_steps(&self, settings: &Settings) -> u64 {
        settings
            .max_steps
            .unwrap_or_else(|| (settings.num_train_epochs * self.steps_per_epoch() as f64).ceil() as u64)
    }

    /// The rows of an epoch, in order.
    pub fn order(&self, epoch: u64) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.rows).collect();
        if self.shuffle {
            let mut rng = Rng::new(self.data_seed, Purpose::Shuffle, epoch);
            for i in (1..order.len()).rev() {
                order.swap(i, rng.below(i as u64 + 1) as usize);
            }
        }
        order
    }

    /// The micro-batches of the step after `done` finished ones, of all ranks, as row indices.
    pub fn step(&mut self, done: u64) -> Vec<Vec<usize>> {
        let (epoch, first) = self.position(done);
        if self.cached.as_ref().is_none_or(|(cached, _)| *cached != epoch) {
            self.cached = Some((epoch, self.order(epoch)));
        }
        let (_, order) = self.cached.as_ref().expect("filled above");
        let from = first as usize * self.batch;
        let to = from.saturating_add(self.micro_batches.saturating_mul(self.batch)).min(self.rows);
        order[from..to].chunks(self.batch).map(<[usize]>::to_vec).collect()
    }

    /// The micro-batches of a step that are a rank's: the one of its number, and every `ranks`-th after it. At the end of an
    /// epoch a rank may have none.
    pub fn dealt<T>(micro_batches: Vec<T>, rank: usize, ranks: usize) -> Vec<T> {
        micro_batches.into_iter().skip(rank).step_by(ranks).collect()
    }

    /// The position in the data after `done` steps: the epoch (from 0) and the next micro-batch in it.
    pub fn position(&self, done: u64) -> (u64, u64) {
        let steps = self.steps_per_epoch();
        (done / steps, done % steps * self.micro_batches as u64)
    }

    /// The Trainer's `epoch` after `done` steps: finished epochs plus the finished share of the current one.
    pub fn epoch(&self, done: u64) -> f64 {
        let (epoch, micro) = self.position(done);
        epoch as f64 + micro as f64 / self.micro_batches_per_epoch() as f64
    }
}

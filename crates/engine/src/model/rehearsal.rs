//! How much memory of a card a run needs, found by running its steps on a card that only counts allocations.

use super::optimizer::Share;
use super::{Budget, Model, Optimizer, Rates, Regularisation, Update};
use crate::Result;
use crate::arch::Architecture;
use crate::batch::{Batch, Target};
use crate::dtype::WeightType;
use crate::kernels::cuda::OVERHEAD;
use crate::kernels::{Backend, FileTensor, Packed, TargetLoss};
use crate::map::Map;
use crate::params::{Base, Trainable};
use crate::{Cuda, Precision, weights};
use std::path::Path;
use std::sync::Arc;

/// Tokens of a short row in the rehearsed batch: rows of real batches have at least as many on average.
const SHORT: usize = 8;

/// Micro-batches of a step that are rehearsed; each further one only adds its losses.
const PASSES: usize = 3;

/// A run on a card: what determines its memory, besides architecture and budget.
#[derive(Clone, Copy, Debug)]
pub struct CardRun<'a> {
    /// What is trained.
    pub trainable: &'a Trainable,
    /// Where an adapter's base is kept.
    pub base: Base,
    /// The folder of the base's files, which determines their type; bf16 if they cannot be read.
    pub files: &'a Path,
    /// The optimizer, and the number of ranks that divide its state.
    pub optimizer: Optimizer,
    /// See [`CardRun::optimizer`].
    pub ranks: usize,
    /// Keep an average of the weights.
    pub average: bool,
    /// Micro-batches of a step.
    pub passes: usize,
    /// Types of the factors of products.
    pub precision: Precision,
    /// Run passes as CUDA graphs.
    pub graphs: bool,
}

impl<'a> CardRun<'a> {
    /// AdamW, one rank, one micro-batch a step, graphs.
    pub fn new(trainable: &'a Trainable, base: Base, precision: Precision) -> CardRun<'a> {
        CardRun {
            trainable,
            base,
            files: Path::new(""),
            optimizer: Optimizer::AdamW,
            ranks: 1,
            average: false,
            passes: 1,
            precision,
            graphs: true,
        }
    }

    /// The most bytes allocated in steps whose batches use the whole budget: everything but the memory of the driver,
    /// the kernels and cuBLASLt.
    ///
    /// # Errors
    /// As [`Model::with_base`].
    pub fn memory(&self, arch: &Architecture, budget: Budget) -> Result<u64> {
        let card = Cuda::dry(self.precision).with_graphs(self.graphs);
        let mut model = Model::with_base(arch.clone(), card, budget, self.trainable, self.base)?;
        model.map_nothing(weights::widest_type(self.files).unwrap_or(WeightType::BF16))?;
        if budget.train {
            model.keep(self.optimizer, Share { rank: 0, ranks: self.ranks })?;
        }
        let batch = largest(arch, budget);
        let passes = if budget.train { self.passes.clamp(1, PASSES) } else { 1 };
        // Buffers that grow have grown after two steps, and graphs are created in the second.
        for _ in 0..3 {
            model.rehearse(&batch, passes, self.average)?;
        }
        let each = (budget.targets * TargetLoss::COLUMNS * size_of::<f32>()).next_multiple_of(256) as u64;
        let further = self.passes.saturating_sub(passes) as u64;
        Ok(model.backend.usage().peak.saturating_add(further.saturating_mul(each)))
    }

    /// As [`CardRun::memory`], plus the memory of the driver, the kernels and cuBLASLt.
    ///
    /// # Errors
    /// As [`CardRun::memory`].
    pub fn needed(&self, arch: &Architecture, budget: Budget) -> Result<u64> {
        Ok(self.memory(arch, budget)?.saturating_add(OVERHEAD))
    }
}

/// A batch that uses the whole budget, with one long row and many short ones: attention's lists have an entry for each
/// row.
fn largest(arch: &Architecture, budget: Budget) -> Batch {
    let mut batch = Batch::default();
    let limit = arch.position_limit().unwrap_or(usize::MAX).max(1);
    let long = (budget.tokens / 2).clamp(1, limit);
    batch.push(&vec![0; long], []);
    while batch.tokens() < budget.tokens {
        let len = SHORT.min(limit).min(budget.tokens - batch.tokens());
        batch.push(&vec![0; len], []);
    }
    // In as many rows as possible.
    let place = |n: usize| (n * budget.tokens / budget.targets) as u32;
    batch.targets = (0..budget.targets).map(|n| Target { row: place(n), id: 0, weight: 1.0 }).collect();
    batch
}

impl Model<Cuda> {
    /// Maps tensors without content in place of those that stay in files.
    fn map_nothing(&mut self, kind: WeightType) -> Result<()> {
        let mapped = |p: &&crate::params::Parameter| p.mapped && p.packing.is_none();
        let len = |shape: &[usize]| shape.iter().product::<usize>() * kind.bytes();
        let most = self.map.parameters.iter().filter(mapped).map(|p| len(&p.shape)).max();
        let (map, reads) = (Arc::new(Map::nothing(most.unwrap_or(1))?), self.map.read_by_products());
        for (n, read) in reads.into_iter().enumerate() {
            let p = &self.map.parameters[n];
            let tensor = match p.packing {
                Some(packing) => Some(FileTensor::packed(Packed::zeros(packing, (p.rows(), p.width())))),
                None => FileTensor::new(Arc::clone(&map), 0..len(&p.shape), kind),
            };
            if let Some(tensor) = tensor.filter(|_| p.mapped) {
                let buffer = self.backend.map(tensor.clone())?;
                if let Some(alone) = read.filter(|_| p.packing.is_none()) {
                    self.backend.keep_factor(buffer.view(), alone)?;
                }
                self.files[n] = Some((buffer, tensor));
            }
        }
        Ok(())
    }

    /// Runs a step as a trainer does, or an evaluation.
    fn rehearse(&mut self, batch: &Batch, passes: usize, average: bool) -> Result<()> {
        if !self.budget.train {
            return self.forward(batch).map(|_| ());
        }
        self.zero_gradients();
        let most =
            Regularisation { seed: Some(0), dropout: true, noise_alpha: 1.0, ..Regularisation::default() };
        self.regularise(most);
        let pending: Vec<_> = (0..passes).map(|_| self.accumulate(batch, 1.0)).collect::<Result<_>>()?;
        for losses in pending {
            self.read_balance(&losses)?;
            self.read_losses(&losses)?;
        }
        self.gradient_norm()?;
        let update = Update { t: 1, beta1: 0.9, beta2: 0.99, eps: 1e-8, momentum: 0.9, gradient_scale: 1.0 };
        self.update(&update, &|p| Rates { lr: 1.0, weight_decay: f64::from(u8::from(p.kind.decays())) })?;
        if average {
            self.update_average(0.5)?;
        }
        Ok(())
    }
}

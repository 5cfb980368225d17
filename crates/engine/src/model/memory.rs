//! The memory that a model needs, by kind.

use super::Budget;
use super::arena::Arena;
use super::optimizer::Optimizer;
use crate::arch::Architecture;
use crate::dtype::WeightType;
use crate::kernels::LOGITS;
use crate::kernels::cuda::Precision;
use crate::params::{Base, ParameterMap, Trainable};
use crate::{Result, weights};
use std::path::Path;

/// Bytes that a model needs, by kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// The weights that are in the model's own buffers.
    pub parameters: u64,
    /// Copies of the weights for products, on a device whose products take another type.
    pub copies: u64,
    /// Weights that stay in their files and are read there; two bytes each if the files are not known
    /// ([`MemoryPlan::over_files`]). The system can reclaim their memory. On a card, the bytes that it holds of them.
    pub mapped: u64,
    /// Weights in 4 or 8 bits.
    pub packed: u64,
    /// Gradients of the trained weights.
    pub gradients: u64,
    /// The optimizer's state of the trained weights, and their average.
    pub optimizer: u64,
    /// Values saved between forward and backward.
    pub activations: u64,
    /// Values used within an operation, logits included.
    pub scratch: u64,
    factors: Factors,
}

/// Elements of the weights that products read, grouped by what a device that copies them holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Factors {
    /// In the model's own buffers.
    resident: usize,
    /// In files: those read by products only, those that other operations read too, and all others.
    mapped: [usize; 3],
    /// The type of the files.
    kind: WeightType,
}

/// Bytes that a device holds per element of a file: `alone` as in [`ParameterMap::read_by_products`], `copy` the bytes
/// of a copy for products.
pub(super) fn held_bytes(kind: WeightType, alone: Option<bool>, copy: usize) -> usize {
    match alone {
        Some(true) if copy > 0 => copy,
        Some(_) => kind.bytes() + copy,
        None => kind.bytes(),
    }
}

impl MemoryPlan {
    /// Plans a model with all parameters trained, without allocating. Sums that overflow become `u64::MAX`.
    pub fn of(a: &Architecture, b: Budget) -> MemoryPlan {
        MemoryPlan::new(a, b, &ParameterMap::of(a), LOGITS)
    }

    /// Plans a model with some parameters trained.
    ///
    /// # Errors
    /// [`crate::Error::Parameter`] as [`ParameterMap::with`].
    pub fn with(a: &Architecture, b: Budget, trainable: &Trainable) -> Result<MemoryPlan> {
        MemoryPlan::over(a, b, trainable, Base::Resident)
    }

    /// As [`MemoryPlan::with`], with the base's parameters in the place given by `base`.
    ///
    /// # Errors
    /// As [`MemoryPlan::with`].
    pub fn over(a: &Architecture, b: Budget, trainable: &Trainable, base: Base) -> Result<MemoryPlan> {
        Ok(MemoryPlan::new(a, b, &ParameterMap::over(a, trainable, base)?, LOGITS))
    }

    /// The plan with another optimizer, whose state is divided among `ranks` ranks: the most that one rank holds.
    ///
    /// # Errors
    /// As [`MemoryPlan::with`].
    pub fn under(
        self,
        optimizer: Optimizer,
        ranks: usize,
        a: &Architecture,
        trainable: &Trainable,
    ) -> Result<MemoryPlan> {
        Ok(self.optimized(optimizer, ranks, &ParameterMap::with(a, trainable)?))
    }

    pub(super) fn optimized(self, optimizer: Optimizer, ranks: usize, map: &ParameterMap) -> MemoryPlan {
        // Without gradients there is no optimizer state.
        let optimizer = if self.gradients > 0 { optimizer.bytes(map, ranks) } else { 0 };
        MemoryPlan { optimizer, ..self }
    }

    /// Plans a model whose head computes at most `logits` elements at once.
    pub(super) fn new(a: &Architecture, b: Budget, map: &ParameterMap, logits: usize) -> MemoryPlan {
        let arena = Arena::carve(a, b, map.low(), logits, None);
        let bytes = |n: usize| (n as u64).saturating_mul(size_of::<f32>() as u64);
        let trained = if b.train { bytes(map.trained_len()) } else { 0 };
        let mut mapped = [0usize; 3];
        for (p, read) in
            map.parameters.iter().zip(map.read_by_products()).filter(|(p, _)| p.mapped && p.packing.is_none())
        {
            let class = read.map_or(2, |alone| usize::from(!alone));
            mapped[class] = mapped[class].saturating_add(p.range.len());
        }
        let resident = map.factors().iter().map(|range| range.len()).fold(0, usize::saturating_add);
        let plan = MemoryPlan {
            parameters: bytes(map.len().saturating_add(map.low().dora.saturating_mul(2))),
            copies: 0,
            mapped: 0,
            packed: map.packed_bytes() as u64,
            gradients: trained,
            optimizer: trained.saturating_mul(2),
            activations: bytes(arena.activations),
            scratch: bytes(arena.used.saturating_sub(arena.activations)),
            factors: Factors { resident, mapped, kind: WeightType::BF16 },
        };
        plan.copied(|_| 0)
    }

    /// The plan on a device that keeps copies for products; `copy` gives their bytes per element by weight type.
    pub(super) fn copied(self, copy: impl Fn(WeightType) -> usize) -> MemoryPlan {
        let Factors { resident, mapped, kind } = self.factors;
        let times = |n: usize, bytes: usize| (n as u64).saturating_mul(bytes as u64);
        let held = mapped.iter().zip([Some(true), Some(false), None]);
        let held = held.map(|(n, alone)| times(*n, held_bytes(kind, alone, copy(kind))));
        let mapped = held.fold(0, u64::saturating_add);
        MemoryPlan { copies: times(resident, copy(WeightType::F32)), mapped, ..self }
    }

    /// The plan with the base's files in this folder: two or four bytes per weight, by their type. Two if they cannot
    /// be read.
    #[must_use]
    pub fn over_files(self, dir: &Path) -> MemoryPlan {
        let kind = weights::widest_type(dir).unwrap_or(WeightType::BF16);
        MemoryPlan { factors: Factors { kind, ..self.factors }, ..self }.copied(|_| 0)
    }

    /// All of it, in bytes.
    pub fn total(&self) -> u64 {
        self.own().saturating_add(self.mapped)
    }

    /// Bytes that the process itself must hold: everything but the mapped weights.
    pub fn own(&self) -> u64 {
        [self.copies, self.packed, self.gradients, self.optimizer, self.activations, self.scratch]
            .into_iter()
            .fold(self.parameters, u64::saturating_add)
    }

    /// The plan on a card with products in this precision, including the copies of weights that it keeps.
    #[must_use]
    pub fn in_precision(self, precision: Precision) -> MemoryPlan {
        self.copied(|kind| precision.copy_bytes(kind))
    }
}

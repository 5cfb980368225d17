//! Sums over the ranks of a data-parallel run.

use crate::Result;

/// The ranks of a run. Every rank calls the same methods in the same order, and each call waits for all
/// ranks.
///
/// Implementations add in the order of the ranks, so that all ranks get the same bits.
pub trait Collective {
    /// Number of ranks; with 1 the model does not call [`Collective::all_reduce`].
    fn ranks(&self) -> usize;

    /// The number of this rank, from 0.
    fn rank(&self) -> usize;

    /// The sum of `value` over all ranks.
    ///
    /// # Errors
    /// [`crate::Error::Collective`] where a rank is lost.
    fn sum(&self, value: f64) -> Result<f64>;

    /// Replaces each element by its sum over all ranks, which give slices of equal length.
    ///
    /// # Errors
    /// As [`Collective::sum`].
    fn all_reduce(&self, values: &mut [f32]) -> Result<()>;
}

/// A run of one process: sums are the values themselves.
#[derive(Clone, Copy, Debug, Default)]
pub struct SingleRank;

impl Collective for SingleRank {
    fn ranks(&self) -> usize {
        1
    }

    fn rank(&self) -> usize {
        0
    }

    fn sum(&self, value: f64) -> Result<f64> {
        Ok(value)
    }

    fn all_reduce(&self, _: &mut [f32]) -> Result<()> {
        Ok(())
    }
}

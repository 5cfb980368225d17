//! Sums over the cards of ranks.

use super::Cuda;
use super::driver::{Call, Move};
use crate::Result;
use crate::collective::Collective;
use crate::kernels::View;

impl Cuda {
    /// Connects to the cards of the other ranks, unless already connected.
    pub(super) fn join_ranks(&self, collective: &dyn Collective) -> Result<()> {
        if collective.ranks() == 1 { Ok(()) } else { self.driver.join(collective) }
    }

    /// Sums or broadcasts each rank's share in place. The share of rank `r` is `cuts[r]..cuts[r + 1]` of `x`, which has
    /// no gaps.
    pub(super) fn exchange_shares(
        &self,
        what: Move,
        x: View,
        cuts: &[usize],
        collective: &dyn Collective,
    ) -> Result<()> {
        if collective.ranks() == 1 {
            return Ok(());
        }
        self.join_ranks(collective)?;
        let start = self.target(x)?;
        let share = |(root, cut): (usize, &[usize])| {
            let count = cut[1] - cut[0];
            (count > 0).then_some(Call { what, root, address: start + 4 * cut[0] as u64, count })
        };
        let calls: Vec<Call> = cuts.windows(2).enumerate().filter_map(share).collect();
        // SAFETY: `target` checks that the view is inside its memory, and the caller that shares are inside the view;
        // memory is freed in stream order.
        unsafe { self.driver.exchange(&calls) }
    }

    /// The sum of the whole vector, by way of shares of equal size: the order of summation does not depend on which
    /// algorithm NCCL considers fastest.
    pub(super) fn sum_over_ranks(&self, x: View, collective: &dyn Collective) -> Result<()> {
        let ranks = collective.ranks();
        let cuts: Vec<usize> = (0..=ranks).map(|rank| x.len() * rank / ranks).collect();
        self.exchange_shares(Move::Sum, x, &cuts, collective)?;
        self.exchange_shares(Move::Copy, x, &cuts, collective)
    }
}

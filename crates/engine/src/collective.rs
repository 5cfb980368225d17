//! Sums over the ranks of a data-parallel run.

use crate::{Error, Result};
use std::ops::Range;
use std::sync::Arc;

/// Elements that are on their way at once: what a rank must hold beside its own values.
const BLOCK: usize = 1 << 20;

/// How a run over ranks stands, for threads that wait for other ranks elsewhere than in a [`Collective`]'s calls.
pub trait Watch: Send + Sync {
    /// What has ended the run.
    fn failure(&self) -> Option<String>;

    /// Ends the run: the calls of this rank fail from now on, and the others learn why when it leaves.
    fn fail(&self, message: &str);
}

/// The ranks of a run. Every rank calls the same methods in the same order, and each call waits for the ranks
/// that it needs.
///
/// An implementation carries messages between two ranks; sums are made of them here, in the order of the ranks,
/// so that all ranks get the same bits. A device whose ranks have a transport of their own meets with the help of
/// [`Collective::exchange`], and overrides what [`Backend`](crate::Backend) does with a collective.
pub trait Collective {
    /// Number of ranks; with 1 nothing is sent.
    fn ranks(&self) -> usize;

    /// The number of this rank, from 0.
    fn rank(&self) -> usize;

    /// Sends a message to another rank. Messages from one rank to another arrive in their order.
    ///
    /// # Errors
    /// [`Error::Collective`] if a rank is lost.
    fn send(&self, to: usize, message: &[u8]) -> Result<()>;

    /// Waits for the next message of another rank.
    ///
    /// # Errors
    /// As [`Collective::send`].
    fn receive(&self, from: usize) -> Result<Vec<u8>>;

    /// Whether the run has failed, for other threads; `None` if only the calls know.
    fn watch(&self) -> Option<Arc<dyn Watch>> {
        None
    }

    /// The messages of all ranks, in their order, this rank's own among them.
    ///
    /// # Errors
    /// As [`Collective::send`].
    fn exchange(&self, message: &[u8]) -> Result<Vec<Vec<u8>>> {
        others(self).try_for_each(|to| self.send(to, message))?;
        let each = |rank| if rank == self.rank() { Ok(message.to_vec()) } else { self.receive(rank) };
        (0..self.ranks()).map(each).collect()
    }

    /// Replaces each value by its sum over all ranks.
    ///
    /// # Errors
    /// As [`Collective::send`].
    fn sum(&self, values: &mut [f64]) -> Result<()> {
        if self.ranks() == 1 {
            return Ok(());
        }
        let own: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        values.fill(0.0);
        for (rank, message) in self.exchange(&own)?.iter().enumerate() {
            let theirs = message.as_chunks().0;
            expect(rank, message.len(), size_of_val(values))?;
            values.iter_mut().zip(theirs).for_each(|(sum, theirs)| *sum += f64::from_le_bytes(*theirs));
        }
        Ok(())
    }

    /// Replaces this rank's share of the values by its sum over all ranks; the other shares are left as they are.
    /// The share of rank `r` is `cuts[r]..cuts[r + 1]`.
    ///
    /// # Errors
    /// As [`Collective::send`].
    fn reduce_scatter(&self, values: &mut [f32], cuts: &[usize]) -> Result<()> {
        for start in steps(self, cuts) {
            for to in others(self) {
                let theirs = block(cuts, to, start);
                if !theirs.is_empty() {
                    self.send(to, &to_bytes(&values[theirs]))?;
                }
            }
            let own = block(cuts, self.rank(), start);
            if own.is_empty() {
                continue;
            }
            let mine = values[own.clone()].to_vec();
            for rank in 0..self.ranks() {
                let theirs = match rank == self.rank() {
                    true => mine.clone(),
                    false => to_floats(rank, &self.receive(rank)?, own.len())?,
                };
                match rank {
                    0 => values[own.clone()].copy_from_slice(&theirs),
                    _ => values[own.clone()].iter_mut().zip(theirs).for_each(|(sum, x)| *sum += x),
                }
            }
        }
        Ok(())
    }

    /// Replaces every share of the values by what the rank has whose share it is.
    ///
    /// # Errors
    /// As [`Collective::send`].
    fn all_gather(&self, values: &mut [f32], cuts: &[usize]) -> Result<()> {
        for start in steps(self, cuts) {
            let own = block(cuts, self.rank(), start);
            if !own.is_empty() {
                let message = to_bytes(&values[own]);
                others(self).try_for_each(|to| self.send(to, &message))?;
            }
            for from in others(self) {
                let theirs = block(cuts, from, start);
                if !theirs.is_empty() {
                    let received = to_floats(from, &self.receive(from)?, theirs.len())?;
                    values[theirs].copy_from_slice(&received);
                }
            }
        }
        Ok(())
    }

    /// Replaces each element by its sum over all ranks, which give slices of equal length.
    ///
    /// # Errors
    /// As [`Collective::send`].
    fn all_reduce(&self, values: &mut [f32]) -> Result<()> {
        let ranks = self.ranks();
        let cuts: Vec<usize> = (0..=ranks).map(|rank| values.len() * rank / ranks).collect();
        self.reduce_scatter(values, &cuts)?;
        self.all_gather(values, &cuts)
    }
}

/// The ranks beside this one. Each begins with the one after it, so that not all send to the same.
fn others<C: Collective + ?Sized>(collective: &C) -> impl Iterator<Item = usize> + use<C> {
    let (rank, ranks) = (collective.rank(), collective.ranks());
    (1..ranks).map(move |n| (rank + n) % ranks)
}

/// Where the blocks of all shares start, counted from the start of each share.
fn steps<C: Collective + ?Sized>(collective: &C, cuts: &[usize]) -> impl Iterator<Item = usize> + use<C> {
    let longest = cuts.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0);
    (0..if collective.ranks() == 1 { 0 } else { longest }).step_by(BLOCK)
}

/// The block of a rank's share that starts there.
fn block(cuts: &[usize], rank: usize, start: usize) -> Range<usize> {
    let end = cuts[rank + 1];
    let from = (cuts[rank] + start).min(end);
    from..(from + BLOCK).min(end)
}

/// Values as a message.
pub(crate) fn to_bytes(values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; size_of_val(values)];
    bytes.as_chunks_mut().0.iter_mut().zip(values).for_each(|(to, value)| *to = value.to_le_bytes());
    bytes
}

/// The values of a message, of which there must be `len`.
pub(crate) fn to_floats(rank: usize, message: &[u8], len: usize) -> Result<Vec<f32>> {
    expect(rank, message.len(), len * size_of::<f32>())?;
    Ok(message.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
}

/// Refuses a message of another length: the ranks do not do the same.
fn expect(rank: usize, bytes: usize, wanted: usize) -> Result<()> {
    if bytes == wanted {
        return Ok(());
    }
    Err(Error::Collective {
        message: format!("rank {rank} sent {bytes} bytes where {wanted} belong: the ranks are not in step"),
    })
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

    fn send(&self, to: usize, _: &[u8]) -> Result<()> {
        Err(Error::Collective { message: format!("there is no rank {to}") })
    }

    fn receive(&self, from: usize) -> Result<Vec<u8>> {
        Err(Error::Collective { message: format!("there is no rank {from}") })
    }
}

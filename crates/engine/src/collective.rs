//! Sums over the ranks of a data-parallel run.

use crate::{Error, Result};
use std::ops::Range;
use std::sync::Arc;

/// Elements sent at once: the memory that a rank needs besides its own values.
const BLOCK: usize = 1 << 20;

/// The state of a run over ranks, for threads that wait for other ranks outside the calls of a [`Collective`].
pub trait Watch: Send + Sync {
    /// The error that has ended the run, if any.
    fn failure(&self) -> Option<String>;

    /// Ends the run: the calls of this rank fail from now on, and the other ranks get the message when it leaves.
    fn fail(&self, message: &str);
}

/// The ranks of a run. Every rank calls the same methods in the same order, and each call waits for the ranks
/// that it needs.
///
/// An implementation sends messages between two ranks; sums are computed here, in the order of the ranks, so that all
/// ranks get the same bits. Devices whose ranks have their own transport connect through [`Collective::exchange`], and
/// override the collective operations of [`Backend`](crate::Backend).
pub trait Collective {
    /// Number of ranks; with one, nothing is sent.
    fn ranks(&self) -> usize;

    /// The number of this rank, from 0.
    fn rank(&self) -> usize;

    /// Sends a message to another rank. Messages between two ranks arrive in order.
    ///
    /// # Errors
    /// [`Error::Collective`] if a rank is lost.
    fn send(&self, to: usize, message: &[u8]) -> Result<()>;

    /// Waits for the next message of another rank.
    ///
    /// # Errors
    /// As [`Collective::send`].
    fn receive(&self, from: usize) -> Result<Vec<u8>>;

    /// The state of the run, for other threads; `None` if only the calls can tell.
    fn watch(&self) -> Option<Arc<dyn Watch>> {
        None
    }

    /// The messages of all ranks, in rank order, including this rank's own.
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

    /// Replaces this rank's share of the values by its sum over all ranks; the other shares are unchanged. The share of
    /// rank `r` is `cuts[r]..cuts[r + 1]`.
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

    /// Replaces every share of the values by the values of the rank that owns it.
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

    /// Replaces each element by its sum over all ranks, whose slices must have equal length.
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

/// The other ranks. Each rank begins with the one after it, so that not all send to the same rank first.
fn others<C: Collective + ?Sized>(collective: &C) -> impl Iterator<Item = usize> + use<C> {
    let (rank, ranks) = (collective.rank(), collective.ranks());
    (1..ranks).map(move |n| (rank + n) % ranks)
}

/// Start offsets of the blocks within each share.
fn steps<C: Collective + ?Sized>(collective: &C, cuts: &[usize]) -> impl Iterator<Item = usize> + use<C> {
    let longest = cuts.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0);
    (0..if collective.ranks() == 1 { 0 } else { longest }).step_by(BLOCK)
}

/// The block of a rank's share at this offset.
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

/// The values of a message, which must hold `len` of them.
pub(crate) fn to_floats(rank: usize, message: &[u8], len: usize) -> Result<Vec<f32>> {
    expect(rank, message.len(), len * size_of::<f32>())?;
    Ok(message.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
}

/// Rejects a message of another length: the ranks are out of step.
fn expect(rank: usize, bytes: usize, wanted: usize) -> Result<()> {
    if bytes == wanted {
        return Ok(());
    }
    Err(Error::Collective {
        message: format!("rank {rank} sent {bytes} bytes where {wanted} belong: the ranks are not in step"),
    })
}

/// A run of one process: each sum is the value itself.
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

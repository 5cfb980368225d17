//! Ranks for tests, also used by suasion-train's.

use std::sync::mpsc::{Receiver, Sender, channel};
use suasion_engine::{Collective, Error, Result};

/// A rank that is a thread of this process.
pub struct Threads {
    rank: usize,
    /// The channel to each rank, including itself.
    to: Vec<Sender<Vec<u8>>>,
    from: Vec<Receiver<Vec<u8>>>,
}

impl Threads {
    /// A connected set of ranks.
    fn all(ranks: usize) -> Vec<Threads> {
        let mut channels: Vec<Vec<_>> =
            (0..ranks).map(|_| (0..ranks).map(|_| Some(channel())).collect()).collect();
        let mut all: Vec<Threads> =
            (0..ranks).map(|rank| Threads { rank, to: Vec::new(), from: Vec::new() }).collect();
        for (from, row) in channels.iter_mut().enumerate() {
            for (to, channel) in row.iter_mut().enumerate() {
                let (sender, receiver) = channel.take().unwrap();
                all[from].to.push(sender);
                all[to].from.push(receiver);
            }
        }
        all
    }

    /// Runs each rank on a thread; returns the results in rank order.
    pub fn run<T: Send>(ranks: usize, run: impl Fn(usize, &dyn Collective) -> T + Sync) -> Vec<T> {
        std::thread::scope(|scope| {
            let run = &run;
            let spawn = |rank: Threads| scope.spawn(move || run(rank.rank, &rank));
            let handles: Vec<_> = Threads::all(ranks).into_iter().map(spawn).collect();
            handles.into_iter().map(|handle| handle.join().unwrap()).collect()
        })
    }
}

impl Collective for Threads {
    fn ranks(&self) -> usize {
        self.to.len()
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn send(&self, to: usize, message: &[u8]) -> Result<()> {
        let lost = |_| Error::Collective { message: format!("rank {to} was lost") };
        self.to[to].send(message.to_vec()).map_err(lost)
    }

    fn receive(&self, from: usize) -> Result<Vec<u8>> {
        self.from[from].recv().map_err(|_| Error::Collective { message: format!("rank {from} was lost") })
    }
}

//! Ranks connected by TCP, each with every other.
//!
//! For each connection one thread reads what arrives and another sends heartbeats, so that the loss of a rank is noticed while
//! the others compute. What ends a rank ends all of them.

use super::meeting::{Meeting, PAUSE, Patience, connection};
use super::place::Place;
use super::wire::{self, Frame};
use crate::{Error, Result};
use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};
use suasion_data::start_thread;
use suasion_engine::{Collective, Watch};

/// How long the end of a run waits for the others to acknowledge it.
const FAREWELL: Duration = Duration::from_secs(2);

/// Called once when a rank is lost, with what happened.
pub type OnLoss = Box<dyn Fn(&str) + Send + Sync>;

/// The connections of a rank to all others.
pub struct Mesh {
    rank: usize,
    /// By rank; `None` for this one.
    peers: Vec<Option<Peer>>,
    shared: Arc<Shared>,
    patience: Patience,
}

struct Peer {
    writer: Arc<Mutex<TcpStream>>,
    /// The same connection, for closing it while the writer is busy.
    stream: TcpStream,
}

/// What the threads of a process share.
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    on_loss: OnLoss,
}

#[derive(Default)]
struct State {
    /// Messages that have arrived, by the rank that sent them.
    arrived: Vec<VecDeque<Vec<u8>>>,
    /// The ranks that have done their part.
    done: Vec<bool>,
    /// The ranks whose connection has ended.
    ended: Vec<bool>,
    /// What has ended the run.
    failure: Option<String>,
    /// This rank is ending and ignores what the others do.
    closing: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // After a panic elsewhere the lists are still valid.
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn fail(&self, message: String) {
        let mut state = self.lock();
        if state.closing || state.failure.is_some() {
            return;
        }
        state.failure = Some(message.clone());
        drop(state);
        self.changed.notify_all();
        (self.on_loss)(&message);
    }
}

impl Watch for Shared {
    fn failure(&self) -> Option<String> {
        self.lock().failure.clone()
    }

    fn fail(&self, message: &str) {
        Shared::fail(self, message.to_string());
    }
}

impl Mesh {
    /// Connects this process with all other ranks. `stop` ends the wait. `on_loss` is called on a separate thread when a
    /// rank is lost: the caller may be computing, and would only learn of it at its next call.
    ///
    /// # Errors
    /// [`crate::Error::Rank`] if ranks do not connect in time, or the port is taken; [`crate::Error::RankMismatch`] for other versions
    /// and numbers of ranks; [`crate::Error::Interrupted`].
    pub fn connect(place: &Place, patience: Patience, stop: &AtomicBool, on_loss: OnLoss) -> Result<Mesh> {
        let meeting = Meeting::new(place, patience, stop);
        let streams = meeting.hold()?;
        let ranks = place.ranks;
        let state = State {
            arrived: (0..ranks).map(|_| VecDeque::new()).collect(),
            done: vec![false; ranks],
            ended: vec![false; ranks],
            ..State::default()
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new(), on_loss });
        let mut peers = Vec::with_capacity(place.ranks);
        for (rank, stream) in streams.into_iter().enumerate() {
            let Some(stream) = stream else {
                peers.push(None);
                continue;
            };
            peers.push(Some(Peer::start(rank, stream, &shared, patience)?));
        }
        Ok(Mesh { rank: place.rank, peers, shared, patience })
    }

    /// Tells the others that this rank has failed, so that their message names it, and leaves. Where another rank was the
    /// reason, that is the message.
    pub fn fail(&self, message: &str) {
        let known = self.shared.lock().failure.clone();
        let text = known.unwrap_or_else(|| format!("rank {} has ended the run: {message}", self.rank));
        self.leave(&Frame::Failed(text));
    }

    /// Leaves after the last call of every rank.
    pub fn finish(&self) {
        self.leave(&Frame::Bye);
    }

    /// True if the run has ended because of another rank.
    pub fn has_failed(&self) -> bool {
        self.shared.lock().failure.is_some()
    }

    fn leave(&self, frame: &Frame) {
        if std::mem::replace(&mut self.shared.lock().closing, true) {
            return;
        }
        self.shared.changed.notify_all();
        for peer in self.peers.iter().flatten() {
            // Does not wait for a rank that does not read.
            let _ = peer.stream.set_write_timeout(Some(FAREWELL));
            if let Ok(mut writer) = peer.writer.try_lock() {
                let _ = wire::write(&mut *writer, frame);
            }
            let _ = peer.stream.shutdown(Shutdown::Write);
        }
        // Data that a process has sent is lost if it ends with unread input.
        let until = Instant::now() + FAREWELL;
        let mut state = self.shared.lock();
        while state.ended.iter().enumerate().any(|(rank, ended)| rank != self.rank && !ended) {
            let Some(left) = until.checked_duration_since(Instant::now()) else { break };
            state = match self.shared.changed.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(_) => return,
            };
        }
    }

    fn peer(&self, rank: usize) -> suasion_engine::Result<&Peer> {
        let peer = self.peers.get(rank).and_then(Option::as_ref);
        peer.ok_or_else(|| lost(format!("there is no other rank {rank}")))
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        self.fail("it has stopped unexpectedly");
        for peer in self.peers.iter().flatten() {
            let _ = peer.stream.shutdown(Shutdown::Both);
        }
    }
}

fn lost(message: String) -> suasion_engine::Error {
    suasion_engine::Error::Collective { message }
}

impl Collective for Mesh {
    fn ranks(&self) -> usize {
        self.peers.len()
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn watch(&self) -> Option<Arc<dyn Watch>> {
        Some(self.shared.clone())
    }

    fn send(&self, to: usize, message: &[u8]) -> suasion_engine::Result<()> {
        let peer = self.peer(to)?;
        if let Some(failure) = &self.shared.lock().failure {
            return Err(lost(failure.clone()));
        }
        let mut writer = peer.writer.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let Err(error) = wire::write_message(&mut *writer, message) else { return Ok(()) };
        drop(writer);
        // The rank's own message about its end may still arrive.
        let until = Instant::now() + FAREWELL;
        while self.shared.lock().failure.is_none() && Instant::now() < until {
            thread::sleep(PAUSE);
        }
        self.shared.fail(format!("rank {to} was lost: {error}"));
        Err(lost(self.shared.lock().failure.clone().unwrap_or_default()))
    }

    fn receive(&self, from: usize) -> suasion_engine::Result<Vec<u8>> {
        self.peer(from)?;
        let until = Instant::now() + self.patience.message;
        let mut state = self.shared.lock();
        loop {
            if let Some(message) = state.arrived[from].pop_front() {
                return Ok(message);
            }
            if let Some(failure) = &state.failure {
                return Err(lost(failure.clone()));
            }
            if state.done[from] {
                return Err(lost(format!(
                    "rank {from} has ended before this rank: the ranks are not in step"
                )));
            }
            let Some(left) = until.checked_duration_since(Instant::now()) else {
                let seconds = self.patience.message.as_secs();
                let text = format!("rank {from} is alive, but has sent nothing for {seconds} seconds");
                drop(state);
                self.shared.fail(text.clone());
                return Err(lost(text));
            };
            state = match self.shared.changed.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }
}

impl Peer {
    /// Starts the threads of a connection.
    fn start(rank: usize, stream: TcpStream, shared: &Arc<Shared>, patience: Patience) -> Result<Peer> {
        let prepare = || {
            stream.set_nonblocking(false)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(patience.silence))?;
            stream.set_write_timeout(Some(patience.silence))?;
            io::Result::Ok((stream.try_clone()?, stream.try_clone()?))
        };
        let (mut from, writer) = prepare().map_err(|error| connection(format!("rank {rank}"), &error))?;
        let writer = Arc::new(Mutex::new(writer));
        let of_reader = Arc::clone(shared);
        let read = move || {
            let failure = loop {
                match wire::read(&mut from) {
                    Ok(Frame::Message(message)) => of_reader.lock().arrived[rank].push_back(message),
                    Ok(Frame::Beat) => continue,
                    Ok(Frame::Bye) => of_reader.lock().done[rank] = true,
                    Ok(Frame::Failed(text)) => break Some(text),
                    Err(error) => break ending(rank, &error, patience),
                }
                of_reader.changed.notify_all();
            };
            let mut state = of_reader.lock();
            state.ended[rank] = true;
            let done = state.done[rank];
            drop(state);
            of_reader.changed.notify_all();
            if let Some(text) = failure.filter(|_| !done) {
                of_reader.fail(text);
            }
        };
        start_thread(read).map_err(Error::Thread)?;
        let (of_beat, to) = (Arc::clone(shared), Arc::clone(&writer));
        let beat = move || {
            let pause = patience.silence / 15;
            loop {
                let state = of_beat.lock();
                let waited = of_beat.changed.wait_timeout_while(state, pause, |state| !state.closing);
                if waited.map_or(true, |(state, _)| state.closing || state.ended[rank]) {
                    return;
                }
                // A message on its way also counts as a heartbeat.
                if let Ok(mut to) = to.try_lock() {
                    // The reader reports the error.
                    let _ = wire::write(&mut *to, &Frame::Beat);
                }
            }
        };
        start_thread(beat).map_err(Error::Thread)?;
        Ok(Peer { writer, stream })
    }
}

/// What the end of a connection means.
fn ending(rank: usize, error: &io::Error, patience: Patience) -> Option<String> {
    Some(match error.kind() {
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
            format!("rank {rank} was lost: its connection has ended, as when its process is killed")
        }
        ErrorKind::WouldBlock | ErrorKind::TimedOut => format!(
            "rank {rank} was lost: nothing was heard of it for {} seconds (its machine, its network, or a process that was \
             stopped)",
            patience.silence.as_secs()
        ),
        _ => format!("rank {rank} was lost: {error}"),
    })
}

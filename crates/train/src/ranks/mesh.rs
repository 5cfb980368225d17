//! Ranks that are connected by TCP, each with each.
//!
//! The first rank listens on `MASTER_ADDR:MASTER_PORT`, the others come there, and it tells all of them where the others
//! listen. Then a thread for each connection reads what arrives, and another says now and then that this process is
//! alive, so that the end of a rank is noticed while the others compute. What ends a rank ends all of them.

use super::place::{OWN_PORT, Place, TOKEN};
use super::wire::{self, Answer, Frame, Hello};
use crate::{Error, Result};
use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, mpsc};
use std::thread;
use std::time::{Duration, Instant};
use suasion_engine::Collective;

/// How long ranks wait for each other.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For all ranks to come, at the start.
    pub start: Duration,
    /// For a message while the sender is alive: as long as torch's process groups wait.
    pub message: Duration,
    /// For any sign of life.
    pub silence: Duration,
}

impl Default for Patience {
    fn default() -> Patience {
        let [start, message, silence] = [300, 1800, 30].map(Duration::from_secs);
        Patience { start, message, silence }
    }
}

/// How long a connection may take to say who it is.
const GREETING: Duration = Duration::from_secs(5);
/// Between two looks at what is waited for.
const PAUSE: Duration = Duration::from_millis(20);
/// How long the end of a run waits for the others to take note.
const FAREWELL: Duration = Duration::from_secs(2);

/// Called once where a rank is lost, with what happened.
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
    /// This rank is ending, and what the others do is no concern of it any more.
    closing: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves lists, which are still lists.
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

impl Mesh {
    /// Connects this process with all other ranks. `stop` ends the wait. `on_loss` is called on a thread of its own when a
    /// rank is lost: the caller may be computing, and learns of it at its next call only.
    ///
    /// # Errors
    /// [`Error::Rank`] where ranks do not come in time, or the port is taken; [`Error::RankMismatch`] for other versions
    /// and numbers of ranks; [`Error::Interrupted`].
    pub fn connect(place: &Place, patience: Patience, stop: &AtomicBool, on_loss: OnLoss) -> Result<Mesh> {
        let meeting = Meeting { place, until: Instant::now() + patience.start, patience, stop };
        let streams = if place.rank == 0 { meeting.receive_all()? } else { meeting.come()? };
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
            let peer = Peer::start(rank, stream, &shared, patience);
            peers.push(Some(peer.map_err(|error| connection(format!("rank {rank}"), &error))?));
        }
        Ok(Mesh { rank: place.rank, peers, shared, patience })
    }

    /// Tells the others that this rank has failed, so that their message names it, and leaves. Where another rank was the
    /// reason, they are told that.
    pub fn fail(&self, message: &str) {
        let known = self.shared.lock().failure.clone();
        let text = known.unwrap_or_else(|| format!("rank {} has ended the run: {message}", self.rank));
        self.leave(&Frame::Failed(text));
    }

    /// Leaves after the last call of every rank.
    pub fn finish(&self) {
        self.leave(&Frame::Bye);
    }

    /// True where the run has ended because of another rank.
    pub fn has_failed(&self) -> bool {
        self.shared.lock().failure.is_some()
    }

    fn leave(&self, frame: &Frame) {
        if std::mem::replace(&mut self.shared.lock().closing, true) {
            return;
        }
        self.shared.changed.notify_all();
        for peer in self.peers.iter().flatten() {
            // One that does not read is not waited for.
            let _ = peer.stream.set_write_timeout(Some(FAREWELL));
            if let Ok(mut writer) = peer.writer.try_lock() {
                let _ = wire::write(&mut *writer, frame);
            }
            let _ = peer.stream.shutdown(Shutdown::Write);
        }
        // What a process has sent is lost where it ends with something unread.
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

    fn send(&self, to: usize, message: &[u8]) -> suasion_engine::Result<()> {
        let peer = self.peer(to)?;
        if let Some(failure) = &self.shared.lock().failure {
            return Err(lost(failure.clone()));
        }
        let mut writer = peer.writer.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let Err(error) = wire::write_message(&mut *writer, message) else { return Ok(()) };
        drop(writer);
        // What the rank itself has said of its end arrives in a moment.
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
                let text = format!(
                    "rank {from} was waited for in vain: it is alive, and has sent nothing for {seconds} seconds"
                );
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
    fn start(rank: usize, stream: TcpStream, shared: &Arc<Shared>, patience: Patience) -> io::Result<Peer> {
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(patience.silence))?;
        stream.set_write_timeout(Some(patience.silence))?;
        let (mut from, writer) = (stream.try_clone()?, Arc::new(Mutex::new(stream.try_clone()?)));
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
        thread::Builder::new().name(format!("from rank {rank}")).spawn(read)?;
        let (of_beat, to) = (Arc::clone(shared), Arc::clone(&writer));
        let beat = move || {
            let pause = patience.silence / 15;
            loop {
                let state = of_beat.lock();
                let waited = of_beat.changed.wait_timeout_while(state, pause, |state| !state.closing);
                if waited.map_or(true, |(state, _)| state.closing || state.ended[rank]) {
                    return;
                }
                // Where a message is on its way, that is a sign of life.
                if let Ok(mut to) = to.try_lock() {
                    // The reader notices what is wrong.
                    let _ = wire::write(&mut *to, &Frame::Beat);
                }
            }
        };
        thread::Builder::new().name(format!("to rank {rank}")).spawn(beat)?;
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

/// How the ranks find each other.
struct Meeting<'a> {
    place: &'a Place,
    until: Instant,
    patience: Patience,
    stop: &'a AtomicBool,
}

impl Meeting<'_> {
    fn hello(&self, port: u16) -> Hello {
        let Place { rank, ranks, token, .. } = self.place;
        let suasion = env!("CARGO_PKG_VERSION").to_string();
        Hello { suasion, token: token.clone(), rank: *rank, ranks: *ranks, port }
    }

    /// Fails where the time is over or the run is stopped.
    fn go_on(&self, waiting_for: impl Fn() -> String) -> Result<()> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        if Instant::now() < self.until {
            return Ok(());
        }
        let Place { host, port, rank, .. } = self.place;
        Err(Error::Rank {
            message: format!(
                "rank {rank} has waited {} seconds for {}",
                self.patience.start.as_secs(),
                waiting_for()
            ),
            help: format!(
                "all ranks must be started within this time (under Slurm by srun), and reach {host}:{port}, the address of \
                 rank 0 (MASTER_ADDR and MASTER_PORT); SUASION_RANK_TIMEOUT=SECONDS waits longer"
            ),
        })
    }

    /// The first rank: waits for the others, and tells each where they are.
    fn receive_all(&self) -> Result<Vec<Option<TcpStream>>> {
        let Place { host, port, ranks, .. } = self.place;
        let listener = listen(host, *port).map_err(|error| self.no_port(&error))?;
        let came = self.accept(&listener, 1)?;
        let mut peers = vec![String::new(); *ranks];
        for (hello, stream) in came.iter().flatten() {
            let address =
                stream.peer_addr().map_err(|error| connection(format!("rank {}", hello.rank), &error))?;
            peers[hello.rank] = SocketAddr::new(address.ip(), hello.port).to_string();
        }
        let mut streams = Vec::with_capacity(*ranks);
        for (rank, came) in came.into_iter().enumerate() {
            let Some((_, mut stream)) = came else {
                streams.push(None);
                continue;
            };
            let said = wire::say(&mut stream, &Answer::Peers(peers.clone()));
            said.map_err(|error| connection(format!("rank {rank}"), &error))?;
            streams.push(Some(stream));
        }
        Ok(streams)
    }

    /// The others: come to the first, go to those of lower numbers, and wait for those of higher ones.
    fn come(&self) -> Result<Vec<Option<TcpStream>>> {
        let Place { host, port, rank, ranks, .. } = self.place;
        let name = format!("rank 0 at {host}:{port}");
        let mut first =
            self.go_to(&name, || (host.as_str(), *port).to_socket_addrs().map(Iterator::collect))?;
        let failed = |error: io::Error| connection(name.clone(), &error);
        let own = first.local_addr().map_err(failed)?.ip();
        // Where the first rank is on this machine too, the others come to the same address.
        let listener = TcpListener::bind((own, 0)).map_err(failed)?;
        let hello = self.hello(listener.local_addr().map_err(failed)?.port());
        wire::say(&mut first, &hello).map_err(failed)?;
        let peers = match self.answer(&mut first, &name)? {
            Answer::Peers(peers) if peers.len() == *ranks => peers,
            Answer::Peers(_) => return Err(failed(ErrorKind::InvalidData.into())),
            Answer::Refused(why) => {
                return Err(Error::Rank {
                    message: format!("{name} has refused rank {rank}: {why}"),
                    help: "start all ranks of a run with the same program, WORLD_SIZE and run id".into(),
                });
            }
        };
        let mut streams = vec![Some(first)];
        for (lower, address) in peers.iter().enumerate().take(*rank).skip(1) {
            let name = format!("rank {lower} at {address}");
            let mut stream = self.go_to(&name, || address.to_socket_addrs().map(Iterator::collect))?;
            wire::say(&mut stream, &hello).map_err(|error| connection(name, &error))?;
            streams.push(Some(stream));
        }
        let mut higher = self.accept(&listener, rank + 1)?;
        streams.push(None);
        streams.extend(higher.drain(rank + 1..).map(|came| came.map(|(_, stream)| stream)));
        Ok(streams)
    }

    /// The first rank's answer, which comes when all ranks are there.
    fn answer(&self, first: &mut TcpStream, name: &str) -> Result<Answer> {
        let failed = |error: io::Error| connection(name.to_string(), &error);
        first.set_read_timeout(Some(PAUSE)).map_err(failed)?;
        let mut byte = [0];
        loop {
            match first.peek(&mut byte) {
                Ok(0) => return Err(failed(ErrorKind::UnexpectedEof.into())),
                Ok(_) => break,
                Err(error) if is_timeout(&error) => self.go_on(|| format!("the other ranks, with {name}"))?,
                Err(error) => return Err(failed(error)),
            }
        }
        first.set_read_timeout(Some(GREETING)).map_err(failed)?;
        wire::hear(first).map_err(failed)
    }

    /// Connects, and tries again until there is somebody.
    fn go_to(&self, name: &str, addresses: impl Fn() -> io::Result<Vec<SocketAddr>>) -> Result<TcpStream> {
        let mut last = String::new();
        loop {
            match addresses() {
                Err(error) => last = format!(" ({error})"),
                Ok(addresses) => {
                    for address in addresses {
                        match TcpStream::connect_timeout(&address, GREETING) {
                            Ok(stream) => return Ok(stream),
                            Err(error) => last = format!(" ({error})"),
                        }
                    }
                }
            }
            self.go_on(|| format!("{name}{last}"))?;
            thread::sleep(5 * PAUSE);
        }
    }

    /// Waits until all ranks from `lowest` on have come, and refuses what does not belong to the run.
    fn accept(&self, listener: &TcpListener, lowest: usize) -> Result<Vec<Option<(Hello, TcpStream)>>> {
        let ranks = self.place.ranks;
        let mut came: Vec<Option<(Hello, TcpStream)>> = (0..ranks).map(|_| None).collect();
        let mut refused = 0;
        let (greeted, greetings) = mpsc::channel();
        let name = || format!("connections of other ranks to rank {}", self.place.rank);
        listener.set_nonblocking(true).map_err(|error| connection(name(), &error))?;
        while came.iter().skip(lowest).any(Option::is_none) {
            self.go_on(|| {
                let missing = (lowest..ranks).filter(|rank| came[*rank].is_none());
                let missing: Vec<String> = missing.map(|rank| format!("rank {rank}")).collect();
                let strangers = match refused {
                    0 => String::new(),
                    n => format!(" ({n} connections of another run, or of none, were refused)"),
                };
                format!("{}{strangers}", missing.join(", "))
            })?;
            match listener.accept() {
                Ok((mut stream, _)) => {
                    let greeted = greeted.clone();
                    // A connection that says nothing keeps nobody waiting.
                    thread::spawn(move || {
                        let set = stream.set_nonblocking(false).and(stream.set_read_timeout(Some(GREETING)));
                        let hello = set.and_then(|()| wire::hear::<Hello>(&mut stream));
                        let _ = greeted.send((hello, stream));
                    });
                }
                Err(error) if is_timeout(&error) => thread::sleep(PAUSE),
                // One that is gone again.
                Err(_) => thread::sleep(PAUSE),
            }
            while let Ok((hello, mut stream)) = greetings.try_recv() {
                let mut refuse = |why: &str| drop(wire::say(&mut stream, &Answer::Refused(why.into())));
                let Ok(hello) = hello else {
                    refused += 1;
                    continue;
                };
                if hello.token != self.place.token {
                    refuse(&format!("it is of another run ({TOKEN}, TORCHELASTIC_RUN_ID or SLURM_JOB_ID)"));
                    refused += 1;
                    continue;
                }
                let own = self.hello(0);
                let pairs = [
                    ("the version of suasion", hello.suasion.clone(), own.suasion),
                    ("WORLD_SIZE", hello.ranks.to_string(), ranks.to_string()),
                ];
                if let Some((what, theirs, first)) = pairs.into_iter().find(|(_, a, b)| a != b) {
                    refuse(&format!("{what} is {theirs}, and {first} there"));
                    return Err(Error::RankMismatch { what: what.into(), rank: hello.rank, theirs, first });
                }
                let rank = hello.rank;
                if rank < lowest || rank >= ranks || came[rank].is_some() {
                    let why = format!("there is another rank {rank} already");
                    refuse(&why);
                    return Err(Error::Rank {
                        message: format!("two processes say that they are rank {rank}"),
                        help: "each rank has a RANK of its own, from 0 to WORLD_SIZE - 1".into(),
                    });
                }
                came[rank] = Some((hello, stream));
            }
        }
        Ok(came)
    }

    fn no_port(&self, error: &io::Error) -> Error {
        let Place { host, port, .. } = self.place;
        let help = match error.kind() {
            ErrorKind::AddrInUse => format!(
                "another program, or another run, has the port: choose another MASTER_PORT (or {OWN_PORT}) for all ranks"
            ),
            _ => {
                "MASTER_ADDR must be a name or address of rank 0's machine, and MASTER_PORT free there".into()
            }
        };
        Error::Rank { message: format!("rank 0 cannot listen on {host}:{port}: {error}"), help }
    }
}

/// Listens on the addresses of a host. Where they are not this machine's own, as those of a service in front of it, on all
/// of its addresses.
fn listen(host: &str, port: u16) -> io::Result<TcpListener> {
    let addresses: Vec<SocketAddr> = (host, port).to_socket_addrs()?.collect();
    let bound = TcpListener::bind(addresses.as_slice());
    match bound {
        Err(error) if error.kind() == ErrorKind::AddrNotAvailable => {
            let all = [IpAddr::V6(Ipv6Addr::UNSPECIFIED), IpAddr::V4(Ipv4Addr::UNSPECIFIED)];
            TcpListener::bind(all.map(|ip| SocketAddr::new(ip, port)).as_slice())
        }
        bound => bound,
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

fn connection(with: String, error: &io::Error) -> Error {
    let what = match error.kind() {
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset => "the other side has ended".to_string(),
        _ => error.to_string(),
    };
    Error::Rank {
        message: format!("no connection with {with}: {what}"),
        help: "look at the messages of that rank, and at the network between the machines".into(),
    }
}

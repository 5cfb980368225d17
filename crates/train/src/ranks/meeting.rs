//! How the ranks of a run find each other: the first listens on `MASTER_ADDR:MASTER_PORT`, the others connect to it, and it sends
//! everyone's addresses to all of them.

use super::place::{OWN_PORT, Place, TOKEN};
use super::wire::{self, Answer, Hello};
use crate::{Error, Result};
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};
use suasion_data::start_thread;

/// How long ranks wait for each other.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For all ranks to connect at the start.
    pub start: Duration,
    /// For a message while the sender is alive; the default of torch's process groups.
    pub message: Duration,
    /// For a heartbeat or any other message.
    pub silence: Duration,
}

impl Default for Patience {
    fn default() -> Patience {
        let [start, message, silence] = [300, 1800, 30].map(Duration::from_secs);
        Patience { start, message, silence }
    }
}

/// How long a connection may take to send its greeting.
const GREETING: Duration = Duration::from_secs(5);
/// The pause between two polls.
pub(super) const PAUSE: Duration = Duration::from_millis(20);

/// How the ranks find each other.
pub(super) struct Meeting<'a> {
    place: &'a Place,
    until: Instant,
    patience: Patience,
    stop: &'a AtomicBool,
}

impl<'a> Meeting<'a> {
    /// A meeting that begins now; `stop` ends it.
    pub(super) fn new(place: &'a Place, patience: Patience, stop: &'a AtomicBool) -> Meeting<'a> {
        Meeting { place, until: Instant::now() + patience.start, patience, stop }
    }

    /// The connections with all other ranks, by rank.
    pub(super) fn hold(&self) -> Result<Vec<Option<TcpStream>>> {
        if self.place.rank == 0 { self.receive_all() } else { self.come() }
    }

    fn hello(&self, port: u16) -> Hello {
        let Place { rank, ranks, token, .. } = self.place;
        let suasion = env!("CARGO_PKG_VERSION").to_string();
        Hello { suasion, token: token.clone(), rank: *rank, ranks: *ranks, port }
    }

    /// Fails if the time is over or the run is stopped.
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

    /// For the first rank: waits for the others, and sends each the addresses of all.
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

    /// For the others: connects to the first and to those with lower numbers, and waits for those with higher ones.
    fn come(&self) -> Result<Vec<Option<TcpStream>>> {
        let Place { host, port, rank, ranks, .. } = self.place;
        let name = format!("rank 0 at {host}:{port}");
        let mut first =
            self.go_to(&name, || (host.as_str(), *port).to_socket_addrs().map(Iterator::collect))?;
        let failed = |error: io::Error| connection(name.clone(), &error);
        let own = first.local_addr().map_err(failed)?.ip();
        // If the first rank is on this machine too, the others use the same address.
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

    /// The first rank's answer, sent once all ranks are connected.
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

    /// Connects, retrying until somebody listens.
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

    /// Waits until all ranks from `lowest` on have connected, and refuses connections of other runs.
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
                    // On its own thread, so that a silent connection delays nobody.
                    start_thread(move || {
                        let set = stream.set_nonblocking(false).and(stream.set_read_timeout(Some(GREETING)));
                        let hello = set.and_then(|()| wire::hear::<Hello>(&mut stream));
                        let _ = greeted.send((hello, stream));
                    })
                    .map_err(Error::Thread)?;
                }
                Err(error) if is_timeout(&error) => thread::sleep(PAUSE),
                // A connection that has closed again.
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

/// Listens on the addresses of a host, or on all addresses if they are not this machine's own (those of a service in front
/// of it, for example).
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

/// An error of a connection.
pub(super) fn connection(with: String, error: &io::Error) -> Error {
    let what = match error.kind() {
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset => "the other side has ended".to_string(),
        _ => error.to_string(),
    };
    Error::Rank {
        message: format!("no connection with {with}: {what}"),
        help: "look at the messages of that rank, and at the network between the machines".into(),
    }
}

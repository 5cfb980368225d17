//! Ranks that are connected by TCP: how they meet, what they say, and how the loss of one is noticed.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use suasion_engine::Collective;
use suasion_train::ranks::{Mesh, Patience, Place};
use suasion_train::{Error, Result};

fn port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn place(rank: usize, ranks: usize, port: u16) -> Place {
    let (host, token) = ("127.0.0.1".into(), "this run".into());
    Place { rank, ranks, local: Some(ranks), local_rank: Some(rank), processors: None, host, port, token }
}

fn patience(start: u64) -> Patience {
    let [start, message, silence] = [start, 20, 20].map(Duration::from_secs);
    Patience { start, message, silence }
}

static NEVER: AtomicBool = AtomicBool::new(false);

fn connect(place: &Place, patience: Patience) -> Result<Mesh> {
    Mesh::connect(place, patience, &NEVER, Box::new(|_| {}))
}

/// Runs so many ranks, each on a thread.
pub fn team<T: Send>(ranks: usize, run: impl Fn(Mesh) -> T + Sync) -> Vec<T> {
    let (port, run) = (port(), &run);
    std::thread::scope(|scope| {
        // The last comes first, and waits for the first.
        let start = |rank: usize| {
            scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(30 * (ranks - rank) as u64));
                run(connect(&place(rank, ranks, port), patience(20)).unwrap())
            })
        };
        let all: Vec<_> = (0..ranks).map(start).collect();
        all.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn ranks_meet_and_sum() {
    for ranks in [2, 4] {
        let len = 1_300_000;
        let got = team(ranks, |mesh| {
            let rank = mesh.rank();
            let mut values: Vec<f32> = (0..len).map(|i| ((i % 1000) * (rank + 1)) as f32 / 7.0).collect();
            mesh.all_reduce(&mut values).unwrap();
            let mut sum = [1.0, rank as f64];
            mesh.sum(&mut sum).unwrap();
            let all = mesh.exchange(format!("rank {rank}").as_bytes()).unwrap();
            assert!(all.iter().enumerate().all(|(r, m)| *m == format!("rank {r}").into_bytes()));
            mesh.finish();
            assert!(!mesh.has_failed());
            (values, sum)
        });
        let term = |i: usize, rank: usize| ((i % 1000) * (rank + 1)) as f32 / 7.0;
        let want: Vec<f32> =
            (0..len).map(|i| (1..ranks).fold(term(i, 0), |sum, r| sum + term(i, r))).collect();
        for (values, sum) in got {
            assert!(values == want);
            assert_eq!(sum, [ranks as f64, (ranks * (ranks - 1) / 2) as f64]);
        }
    }
}

#[test]
fn the_loss_of_a_rank_ends_all_and_names_it() {
    for how in ["fails", "panics"] {
        let errors = team(3, |mesh| {
            if mesh.rank() == 2 {
                match how {
                    "fails" => mesh.fail("out/checkpoint-4: No space left on device"),
                    _ => drop(mesh),
                }
                return String::new();
            }
            let started = Instant::now();
            let error = mesh.receive(2).unwrap_err().to_string();
            assert!(started.elapsed() < Duration::from_secs(5), "{how}");
            // So does every later call, whoever it is with.
            assert!(mesh.sum(&mut [0.0]).is_err() && mesh.has_failed());
            mesh.fail(&error);
            error
        });
        let want = match how {
            "fails" => "rank 2 has ended the run: out/checkpoint-4: No space left on device",
            _ => "rank 2 has ended the run: it has stopped unexpectedly",
        };
        assert_eq!(errors, [want, want, ""], "{how}");
    }
}

/// What a connection says that greets as a rank.
fn greet(port: u16, token: &str, ranks: usize, version: &str) -> TcpStream {
    let mut stream = loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(stream) => break stream,
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    let hello = serde_json::json!({"suasion": version, "token": token, "rank": 1, "ranks": ranks, "port": 1});
    stream.write_all(format!("suasion-ranks 1 {hello}\n").as_bytes()).unwrap();
    stream
}

const VERSION: &str = env!("CARGO_PKG_VERSION");

#[test]
fn strangers_are_refused_and_the_ranks_meet_all_the_same() {
    let port = port();
    std::thread::scope(|scope| {
        let first = scope.spawn(move || connect(&place(0, 2, port), patience(20)).unwrap().ranks());
        let mut stranger = greet(port, "another run", 2, VERSION);
        let mut answer = String::new();
        stranger.read_to_string(&mut answer).unwrap();
        assert!(answer.contains("refused") && answer.contains("another run"), "{answer}");
        // A browser, and one that says nothing.
        let mut browser = TcpStream::connect(("127.0.0.1", port)).unwrap();
        browser.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let _silent = TcpStream::connect(("127.0.0.1", port)).unwrap();
        assert_eq!(connect(&place(1, 2, port), patience(20)).unwrap().ranks(), 2);
        assert_eq!(first.join().unwrap(), 2);
    });
}

#[test]
fn ranks_of_other_versions_and_numbers_are_refused_by_name() {
    for (ranks, version, what) in [
        (2, "0.0.1", "rank 1 and rank 0 differ in the version of suasion: 0.0.1 and "),
        (3, VERSION, "rank 1 and rank 0 differ in WORLD_SIZE: 3 and 2"),
    ] {
        let port = port();
        let first = std::thread::spawn(move || connect(&place(0, 2, port), patience(20)).map(drop));
        let mut other = greet(port, "this run", ranks, version);
        let mut answer = String::new();
        other.read_to_string(&mut answer).unwrap();
        assert!(answer.contains("refused"), "{answer}");
        let error = first.join().unwrap().unwrap_err();
        assert!(error.is_usage() && error.to_string().contains(what), "{error}");
    }
}

#[test]
fn nobody_waits_for_ever() {
    // A rank that does not come, a first rank that is not there, and a wait that is stopped.
    let of = |rank| connect(&place(rank, 3, port()), patience(1)).map(drop).unwrap_err();
    let (first, second) = (of(0), of(1));
    assert!(first.to_string().contains("has waited 1 seconds for rank 1, rank 2"), "{first}");
    assert!(second.to_string().contains("has waited 1 seconds for rank 0 at 127.0.0.1:"), "{second}");
    assert!(first.help().unwrap().contains("MASTER_PORT"));
    let stop = AtomicBool::new(true);
    for rank in [0, 1] {
        let stopped = Mesh::connect(&place(rank, 2, port()), patience(20), &stop, Box::new(|_| {}));
        assert!(matches!(stopped.map(drop), Err(Error::Interrupted)));
    }
    // The port is taken.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = place(0, 2, listener.local_addr().unwrap().port());
    let error = connect(&taken, patience(1)).map(drop).unwrap_err();
    assert!(error.help().unwrap().contains("choose another MASTER_PORT"), "{error}");
}

#[test]
fn silence_is_noticed() {
    let port = port();
    let lost = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let lost = &lost;
        let first = scope.spawn(move || {
            let patience = Patience { silence: Duration::from_secs(1), ..patience(20) };
            let (sender, hook) = std::sync::mpsc::channel();
            let sender = Mutex::new(sender);
            let on_loss = Box::new(move |text: &str| drop(sender.lock().unwrap().send(text.to_string())));
            let mesh = Mesh::connect(&place(0, 2, port), patience, &NEVER, on_loss).unwrap();
            // Without a call that would wait for the rank.
            let text = hook.recv_timeout(Duration::from_secs(10)).unwrap();
            lost.store(true, Ordering::Relaxed);
            (text, mesh.send(1, b"").unwrap_err().to_string())
        });
        // A machine that is gone: its connection stays, and is silent.
        let silent = greet(port, "this run", 2, VERSION);
        while !lost.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let (text, error) = first.join().unwrap();
        assert!(text.starts_with("rank 1 was lost: nothing was heard of it for 1 seconds"), "{text}");
        assert_eq!(text, error);
        drop(silent);
    });
}

#[test]
fn a_rank_that_is_alive_and_sends_nothing_is_not_waited_for_for_ever() {
    let port = port();
    let patience =
        Patience { message: Duration::from_secs(3), silence: Duration::from_secs(1), ..patience(20) };
    let done = &AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let _idle = connect(&place(1, 2, port), patience).unwrap();
            while !done.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let error = connect(&place(0, 2, port), patience).unwrap().receive(1).unwrap_err().to_string();
        done.store(true, Ordering::Relaxed);
        assert!(error.contains("rank 1 is alive, but has sent nothing"), "{error}");
    });
}

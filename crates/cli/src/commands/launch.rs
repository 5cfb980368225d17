//! `suasion train --ranks N`: starts N processes of this program on this machine, and waits for them.

use crate::failure::{Exit, Failure};
use crate::interrupt;
use crate::ranks::LAUNCHED;
use std::hash::{BuildHasher, RandomState};
use std::net::{Ipv4Addr, TcpListener};
use std::num::NonZeroUsize;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};
use suasion_train::ranks::place::{OWN_PORT, TOKEN};

/// Between two looks at the processes.
const PAUSE: Duration = Duration::from_millis(20);
/// How long the others may take to end after one has failed; they end by themselves.
const GRACE: Duration = Duration::from_secs(20);

/// Runs this process's command as `ranks` processes.
pub fn run(ranks: NonZeroUsize) -> anyhow::Result<Exit> {
    let stop = interrupt::flag();
    let program = std::env::current_exe()?;
    // Free now; whoever takes it first is refused by the token.
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
    let token = format!("{:016x}", RandomState::new().hash_one(std::process::id()));
    let mut children = Children(Vec::new());
    for rank in 0..ranks.get() {
        let mut command = Command::new(&program);
        command.args(std::env::args_os().skip(1)).stdin(Stdio::piped());
        let set = [
            ("RANK", rank.to_string()),
            ("LOCAL_RANK", rank.to_string()),
            ("WORLD_SIZE", ranks.to_string()),
            ("LOCAL_WORLD_SIZE", ranks.to_string()),
            ("MASTER_ADDR", Ipv4Addr::LOCALHOST.to_string()),
            ("MASTER_PORT", port.to_string()),
            (TOKEN, token.clone()),
            (LAUNCHED, "1".into()),
        ];
        command.envs(set).env_remove(OWN_PORT).env_remove("TORCHELASTIC_USE_AGENT_STORE");
        children.0.push((command.spawn()?, None));
    }
    let mut failed: Option<Instant> = None;
    while let Some(left) = children.look()? {
        if stop.load(Ordering::Relaxed) {
            children.stop();
        }
        let any = children.0.iter().any(|(_, ended)| ended.is_some_and(|status| !status.success()));
        if any && failed.is_none() {
            failed = Some(Instant::now());
            // The others would wait for it in vain.
            children.stop();
        }
        if failed.is_some_and(|since| since.elapsed() > GRACE) {
            left.into_iter().for_each(|at| drop(children.0[at].0.kill()));
        }
        thread::sleep(PAUSE);
    }
    let ended: Vec<ExitStatus> = children.0.iter().filter_map(|(_, status)| *status).collect();
    if let Some(rank) = ended.iter().position(|status| status.code().is_none()) {
        return Err(Failure::run_time(
            "E-RANK",
            format!("rank {rank} was ended from outside: {}", ended[rank]),
            "SIGKILL often means that the system ran out of memory; the messages above name the checkpoint to resume from",
        )
        .into());
    }
    match ended.iter().filter_map(ExitStatus::code).filter(|code| *code != 0).min() {
        None => Ok(Exit::Done),
        Some(1) => Ok(Exit::Findings),
        Some(2) => Ok(Exit::Usage),
        Some(code) if code == i32::from(interrupt::INTERRUPTED) => {
            interrupt::stop();
            Ok(Exit::Done)
        }
        Some(_) => Ok(Exit::RunTime),
    }
}

/// The processes, and how they have ended.
struct Children(Vec<(Child, Option<ExitStatus>)>);

impl Children {
    /// Those that have not ended; `None` when all have.
    fn look(&mut self) -> std::io::Result<Option<Vec<usize>>> {
        let mut left = Vec::new();
        for (at, (child, ended)) in self.0.iter_mut().enumerate() {
            if ended.is_none() {
                *ended = child.try_wait()?;
            }
            if ended.is_none() {
                left.push(at);
            }
        }
        Ok(Some(left).filter(|left| !left.is_empty()))
    }

    /// Closes their stdin, which stops them where they can be resumed.
    fn stop(&mut self) {
        self.0.iter_mut().for_each(|(child, _)| drop(child.stdin.take()));
    }
}

impl Drop for Children {
    /// No process is left running if this one ends with an error.
    fn drop(&mut self) {
        for (child, ended) in &mut self.0 {
            if ended.is_none() {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}

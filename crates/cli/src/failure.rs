//! Errors as the user sees them, and the exit codes that go with them.

use crate::paths;
use std::path::Path;
use std::{fmt, io};

/// The exit codes of the contract (CLI.md).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The command succeeded.
    Done = 0,
    /// Findings of level error, or a check that failed.
    Findings = 1,
    /// Usage or configuration.
    Usage = 2,
    /// Run time: bad data, I/O, out of memory.
    RunTime = 3,
}

/// An error of the binary itself; the libraries have their own, printed the same way.
#[derive(Debug)]
pub struct Failure {
    /// The code in `error[..]`.
    pub tag: &'static str,
    /// What is wrong, with the operands.
    pub message: String,
    /// What to do.
    pub help: Option<String>,
    /// How the process ends.
    pub exit: Exit,
}

impl Failure {
    /// Wrong flags or a wrong combination of them.
    pub fn usage(message: impl Into<String>, help: impl Into<String>) -> Failure {
        Failure { tag: "E-USAGE", message: message.into(), help: Some(help.into()), exit: Exit::Usage }
    }

    /// A configuration that cannot be run.
    pub fn config(message: impl Into<String>, help: impl Into<String>) -> Failure {
        Failure { tag: "E-CONFIG", message: message.into(), help: Some(help.into()), exit: Exit::Usage }
    }

    /// Something that is wrong at run time.
    pub fn run_time(tag: &'static str, message: impl Into<String>, help: impl Into<String>) -> Failure {
        Failure { tag, message: message.into(), help: Some(help.into()), exit: Exit::RunTime }
    }
}

/// What follows the message of a panic: a thread that the system refuses, or a bug.
pub fn panicked() -> Failure {
    Failure::run_time(
        "E-INTERNAL",
        "the program has stopped at the place above",
        "where the system refused a thread or memory, use fewer --threads or raise the limit (ulimit); else this is a bug in \
         suasion: please report it",
    )
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

/// Several errors that were found together; each is reported with its own help.
#[derive(Debug)]
pub struct Failures(pub Vec<Failure>);

impl Failures {
    /// `Ok` if there are none; one alone is a [`Failure`].
    pub fn none(mut failures: Vec<Failure>) -> anyhow::Result<()> {
        match failures.len() {
            0 => Ok(()),
            1 => Err(failures.remove(0).into()),
            _ => Err(Failures(failures).into()),
        }
    }
}

impl fmt::Display for Failures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let messages: Vec<_> = self.0.iter().map(|failure| failure.message.as_str()).collect();
        f.write_str(&messages.join("\n"))
    }
}

impl std::error::Error for Failures {}

/// The code of an error of files.
const IO: &str = "E-IO";

/// What accompanies an error's message, whichever crate it comes from.
pub struct Outcome {
    /// The code in `error[..]`.
    pub tag: &'static str,
    /// What to do.
    pub help: Option<String>,
    /// How the process ends.
    pub exit: Exit,
}

impl Outcome {
    /// Of the first error in the chain that is a library's or our own.
    pub fn of(error: &anyhow::Error) -> Outcome {
        let mut outcome = Outcome { tag: "E-INTERNAL", help: None, exit: Exit::RunTime };
        for cause in error.chain() {
            if let Some(e) = cause.downcast_ref::<Failure>() {
                outcome = Outcome { tag: e.tag, help: e.help.clone(), exit: e.exit };
            } else if let Some(e) = cause.downcast_ref::<suasion_data::Error>() {
                outcome = Outcome { tag: e.tag(), help: e.help().map(str::to_string), exit: Exit::RunTime };
            } else if let Some(e) = cause.downcast_ref::<suasion_train::Error>() {
                let exit = if e.is_usage() { Exit::Usage } else { Exit::RunTime };
                outcome = Outcome { tag: e.tag(), help: e.help(), exit };
            } else if let Some(e) = cause.downcast_ref::<suasion_engine::Error>() {
                outcome = Outcome { tag: e.tag(), help: e.help().map(str::to_string), exit: Exit::RunTime };
            } else if cause.is::<io::Error>() {
                outcome = Outcome { tag: IO, help: None, exit: Exit::RunTime };
            } else {
                continue;
            }
            break;
        }
        let io = error.chain().find_map(|cause| cause.downcast_ref::<io::Error>()).map(io::Error::kind);
        if io == Some(io::ErrorKind::OutOfMemory) {
            outcome.tag = "E-MEMORY";
        }
        if let (None, Some(path)) = (&outcome.help, missing_path(error)) {
            outcome.help = Some(paths::missing(path));
        }
        if outcome.help.is_none() {
            outcome.help = general_help(outcome.tag, io).map(str::to_string);
        }
        outcome
    }
}

/// The path that does not exist, according to an error.
fn missing_path(error: &anyhow::Error) -> Option<&Path> {
    let (path, source) = error.chain().find_map(|cause| {
        if let Some(suasion_data::Error::Io { path, source, .. }) = cause.downcast_ref() {
            Some((path, source))
        } else if let Some(suasion_train::Error::Io { path, source, .. }) = cause.downcast_ref() {
            Some((path, source))
        } else if let Some(suasion_engine::Error::Io { path, source, .. }) = cause.downcast_ref() {
            Some((path, source))
        } else {
            None
        }
    })?;
    (source.kind() == io::ErrorKind::NotFound).then_some(path.as_path())
}

/// Help for an error without its own.
fn general_help(tag: &str, io: Option<io::ErrorKind>) -> Option<&'static str> {
    use io::ErrorKind::*;
    match (tag, io) {
        (_, Some(PermissionDenied)) => Some("check who may read and write there"),
        (_, Some(StorageFull | QuotaExceeded | FileTooLarge)) => {
            Some("free some space, or write to another disk")
        }
        (_, Some(OutOfMemory)) => Some("raise the limit of the process (ulimit -v), or close other programs"),
        (IO, _) => Some("check the file and the disk it is on"),
        ("E-INTERNAL", _) => Some("this is a bug in suasion: please report it"),
        _ => None,
    }
}

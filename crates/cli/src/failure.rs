//! Errors as the user sees them, and the exit codes that go with them.

use std::fmt;

/// The exit codes of the contract (CLI.md).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// What was asked for is done.
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
    /// What stands in `error[..]`.
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

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

//! Errors of the library as Python exceptions, with the text and the help of the command line.

use pyo3::prelude::*;
use std::any::Any;
use suasion_cli::embed::Problem;

/// The exception for a problem: a subclass of `suasion.Error` by its tag.
pub fn raised(py: Python<'_>, problem: &Problem) -> PyErr {
    let made = py.import("suasion._errors").and_then(|module| {
        module.getattr("of_problem")?.call1((problem.tag, &problem.message, problem.help.as_deref()))
    });
    match made {
        Ok(exception) => PyErr::from_value(exception),
        Err(error) => error,
    }
}

/// The problem that a panic is.
pub fn panicked(panic: &(dyn Any + Send)) -> Problem {
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    Problem {
        tag: "E-INTERNAL",
        message: format!("the library panicked: {}", text.unwrap_or("without a message")),
        help: Some("this is a bug in suasion: please report it".into()),
    }
}

/// A problem of what was handed over.
pub fn wrong(message: impl Into<String>, help: &str) -> Problem {
    Problem { tag: "E-USAGE", message: message.into(), help: Some(help.into()) }
}

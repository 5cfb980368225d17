//! The extension module of the Python package `suasion`: the program, and what its Python code calls.
//!
//! Python decides what an object is (`_inputs.py`) and how results look; here rows are taken in, the library runs
//! without the interpreter's lock, and results are handed out as Arrow data or plain values. Nothing panics across the
//! border: a panic is an `InternalError`.
#![forbid(unsafe_code)]

mod arrow;
mod error;
mod folder;
mod input;
mod job;
mod pipeline;
mod prepare;
mod preparer;
mod verify;
mod view;

use pyo3::prelude::*;
use std::ffi::OsString;

/// Runs the program on its arguments (the first is its name) and returns its exit code.
#[pyfunction]
fn main(py: Python<'_>, args: Vec<OsString>) -> u8 {
    py.detach(|| suasion_cli::main_from(args))
}

/// The extension module.
#[pymodule]
fn _suasion(module: &Bound<'_, PyModule>) -> PyResult<()> {
    suasion_data::hush_guarded_panics();
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("MASKING_VERSION", suasion_data::MASKING_VERSION)?;
    module.add_function(wrap_pyfunction!(main, module)?)?;
    module.add_class::<folder::Model>()?;
    module.add_class::<input::Source>()?;
    module.add_class::<prepare::Prepared>()?;
    module.add_class::<preparer::Preparer>()?;
    module.add_class::<verify::Verification>()?;
    module.add_class::<view::Row>()?;
    module.add_function(wrap_pyfunction!(prepare::prepare, module)?)?;
    module.add_function(wrap_pyfunction!(verify::verify, module)?)?;
    module.add_function(wrap_pyfunction!(view::look, module)?)?;
    Ok(())
}

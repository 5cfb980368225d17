//! Model folders that Python holds, and keys from Python.

use crate::error::{raised, wrong};
use pyo3::prelude::*;
use serde_json::{Map, Value};
use std::path::PathBuf;
use std::sync::Arc;
use suasion_cli::embed::{self, Choices, Problem};
use suasion_data::ModelFolder;

/// A model's tokenizer, chat template and sizes.
#[pyclass(frozen, module = "suasion._suasion")]
pub struct Model(pub Arc<ModelFolder>);

#[pymethods]
impl Model {
    /// Opens a folder, by its path or its hub id.
    #[new]
    fn new(py: Python<'_>, name: PathBuf) -> PyResult<Model> {
        let opened = py.detach(|| embed::model(&name));
        opened.map(|folder| Model(Arc::new(folder))).map_err(|problem| raised(py, &problem))
    }

    /// The fingerprint of the tokenizer; None without one.
    #[getter]
    fn tokenizer(&self) -> Option<String> {
        self.0.tokenizer.as_ref().map(|tokenizer| tokenizer.fingerprint().to_string())
    }

    /// The fingerprint of the chat template; None without one.
    #[getter]
    fn template(&self) -> Option<String> {
        self.0.template.as_ref().map(|template| template.fingerprint().to_string())
    }

    /// Why the chat template cannot be used.
    #[getter]
    fn template_error(&self) -> Option<String> {
        self.0.template_error.as_ref().map(ToString::to_string)
    }
}

/// Resolves keys, which are a JSON object.
pub fn choices(keys: &str, command: &str, place: &str) -> Result<Choices, Problem> {
    let keys: Map<String, Value> = serde_json::from_str(keys).map_err(|error| {
        wrong(format!("{place}: keys: {error}"), "values are those of a configuration file")
    })?;
    embed::choices(&keys, command, place)
}

//! Arrow data from and to Python.

use crate::error::{raised, wrong};
use arrow_array::ffi_stream::FFI_ArrowArrayStream;
use arrow_array::{RecordBatch, RecordBatchIterator};
use arrow_pyarrow::FromPyArrow;
use arrow_schema::SchemaRef;
use pyo3::prelude::*;
use pyo3::types::PyCapsule;

pub use arrow_array::ffi_stream::RecordBatchStreamReader as Reader;

/// The stream of an object with `__arrow_c_stream__`, or of a `pyarrow.RecordBatchReader`.
pub fn reader(object: &Bound<'_, PyAny>) -> PyResult<Reader> {
    Reader::from_pyarrow_bound(object).map_err(|error| refused(object, error))
}

/// The batches of a table or of a record batch, whichever the object is.
pub fn batches(object: &Bound<'_, PyAny>) -> PyResult<Vec<RecordBatch>> {
    if object.hasattr("__arrow_c_array__")? {
        let batch = RecordBatch::from_pyarrow_bound(object).map_err(|error| refused(object, error))?;
        return Ok(vec![batch]);
    }
    reader(object)?.collect::<Result<_, _>>().map_err(|error| {
        let help = "give rows as a table of columns with one type each";
        raised(object.py(), &wrong(error.to_string(), help))
    })
}

fn refused(object: &Bound<'_, PyAny>, error: PyErr) -> PyErr {
    let py = object.py();
    let kind = object.get_type().fully_qualified_name().map(|name| name.to_string()).unwrap_or_default();
    let help = "give a table, a record batch, or a stream of record batches";
    let own = raised(py, &wrong(format!("{kind}: no rows in Arrow columns: {}", error.value(py)), help));
    own.set_cause(py, Some(error));
    own
}

/// Batches that wait to be fetched.
#[pyclass(frozen, module = "suasion._suasion")]
pub struct Stream {
    pub schema: SchemaRef,
    pub batches: Vec<RecordBatch>,
}

#[pymethods]
impl Stream {
    #[pyo3(signature = (requested_schema=None))]
    fn __arrow_c_stream__<'py>(
        &self,
        py: Python<'py>,
        requested_schema: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyCapsule>> {
        // The protocol lets a producer ignore a request that it does not support.
        drop(requested_schema);
        let batches = RecordBatchIterator::new(self.batches.clone().into_iter().map(Ok), self.schema.clone());
        PyCapsule::new_with_value(py, FFI_ArrowArrayStream::new(Box::new(batches)), c"arrow_array_stream")
    }
}

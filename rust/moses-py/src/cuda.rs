//! The CUDA sources, which ride in the extension so that no compiler is needed where moses is built.

use pyo3::exceptions::PyKeyError;
use pyo3::prelude::*;

const SOURCES: [(&str, &str); 2] =
    [("dispatch", include_str!("../../../cuda/dispatch.cu")), ("combine", include_str!("../../../cuda/combine.cu"))];

#[pyfunction]
pub(crate) fn cuda_source(name: &str) -> PyResult<&'static str> {
    let found = SOURCES.iter().find(|(key, _)| *key == name);
    found.map(|(_, text)| *text).ok_or_else(|| PyKeyError::new_err(name.to_owned()))
}

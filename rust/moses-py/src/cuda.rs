//! The CUDA sources, which ride in the extension so that no compiler is needed where moses is built.

use pyo3::exceptions::PyKeyError;
use pyo3::prelude::*;

/// A source with what every source begins with in front.
macro_rules! source {
    ($name:literal) => {
        (
            $name,
            concat!(
                include_str!("../../../cuda/device.cuh"),
                "\n",
                include_str!(concat!("../../../cuda/", $name, ".cu"))
            ),
        )
    };
}

const SOURCES: [(&str, &str); 2] = [source!("dispatch"), source!("combine")];

#[pyfunction]
pub(crate) fn cuda_source(name: &str) -> PyResult<&'static str> {
    let found = SOURCES.iter().find(|(key, _)| *key == name);
    found.map(|(_, text)| *text).ok_or_else(|| PyKeyError::new_err(name.to_owned()))
}

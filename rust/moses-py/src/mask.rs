//! `Mask`.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use moses_core::Mask as CoreMask;
use pyo3::basic::CompareOp;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};

use crate::buffer::Bytes;
use crate::error::Failure;

#[pyclass(frozen, module = "moses._core")]
pub(crate) struct Mask(pub(crate) CoreMask);

fn made(mask: moses_core::Result<CoreMask>) -> PyResult<Mask> {
    Ok(Mask(mask.map_err(Failure)?))
}

/// Indices as 64-bit numbers: a numpy array of any integer type without a copy a number, else any iterable of ints.
fn indices(object: &Bound<'_, PyAny>) -> PyResult<Vec<u64>> {
    if let Ok(buffer) = object.extract::<Bytes>() {
        let bytes = buffer.as_slice();
        let negative = || PyValueError::new_err("indices must not be negative");
        macro_rules! numbers {
            ($type:ty) => {
                bytes
                    .as_chunks::<{ size_of::<$type>() }>()
                    .0
                    .iter()
                    .map(|chunk| u64::try_from(<$type>::from_ne_bytes(*chunk)).map_err(|_| negative()))
                    .collect()
            };
        }
        match (buffer.format().trim_start_matches(['@', '=', '<']), buffer.item_size()) {
            ("q" | "l", 8) => return numbers!(i64),
            ("Q" | "L", 8) => return numbers!(u64),
            ("i" | "l", 4) => return numbers!(i32),
            ("I" | "L", 4) => return numbers!(u32),
            _ => {}
        }
    }
    object.try_iter()?.map(|index| index?.extract::<u64>()).collect()
}

#[pymethods]
impl Mask {
    #[staticmethod]
    fn from_indices(py: Python<'_>, length: u64, indices: &Bound<'_, PyAny>) -> PyResult<Self> {
        let indices = self::indices(indices)?;
        py.detach(|| made(CoreMask::from_indices(length, &indices)))
    }

    #[staticmethod]
    fn from_bool(py: Python<'_>, selected: Bytes) -> PyResult<Self> {
        if selected.item_size() != 1 {
            let format = selected.format();
            return Err(PyValueError::new_err(format!(
                "a mask is made from bool or uint8, not from items of format {format:?}"
            )));
        }
        py.detach(|| made(CoreMask::from_bool(selected.as_slice())))
    }

    #[staticmethod]
    fn empty(length: u64) -> PyResult<Self> {
        made(CoreMask::empty(length))
    }

    #[staticmethod]
    fn full(length: u64) -> PyResult<Self> {
        made(CoreMask::full(length))
    }

    #[staticmethod]
    fn from_bytes(py: Python<'_>, data: Bytes) -> PyResult<Self> {
        py.detach(|| made(CoreMask::from_bytes(data.as_slice())))
    }

    fn to_bytes<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &py.detach(|| self.0.to_bytes()))
    }

    fn to_bool<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &py.detach(|| self.0.to_bool()))
    }

    fn to_indices<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &py.detach(|| self.0.to_indices()))
    }

    fn resized(&self, length: u64) -> PyResult<Self> {
        made(self.0.resized(length))
    }

    #[getter]
    fn length(&self) -> u64 {
        self.0.length()
    }

    #[getter]
    fn count(&self) -> u64 {
        self.0.count()
    }

    #[getter]
    fn density(&self) -> f64 {
        self.0.density()
    }

    #[getter]
    fn nbytes(&self, py: Python<'_>) -> usize {
        py.detach(|| self.0.to_bytes().len())
    }

    fn __or__(&self, py: Python<'_>, other: &Self) -> PyResult<Self> {
        py.detach(|| made(self.0.union(&other.0)))
    }

    fn __and__(&self, py: Python<'_>, other: &Self) -> PyResult<Self> {
        py.detach(|| made(self.0.intersection(&other.0)))
    }

    fn __sub__(&self, py: Python<'_>, other: &Self) -> PyResult<Self> {
        py.detach(|| made(self.0.difference(&other.0)))
    }

    fn __richcmp__(&self, other: &Self, comparison: CompareOp, py: Python<'_>) -> PyResult<Py<PyAny>> {
        match comparison {
            CompareOp::Eq => Ok((self.0 == other.0).into_pyobject(py)?.to_owned().into_any().unbind()),
            CompareOp::Ne => Ok((self.0 != other.0).into_pyobject(py)?.to_owned().into_any().unbind()),
            _ => Ok(py.NotImplemented()),
        }
    }

    fn __hash__(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.0.hash(&mut hasher);
        hasher.finish()
    }

    fn __contains__(&self, index: i128) -> bool {
        u64::try_from(index).is_ok_and(|index| self.0.contains(index))
    }

    fn __len__(&self) -> usize {
        self.0.length() as usize
    }

    fn __bool__(&self) -> bool {
        !self.0.is_empty()
    }

    fn __repr__(&self) -> String {
        format!("Mask({} of {} units)", self.0.count(), self.0.length())
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyTuple>> {
        let py = slf.py();
        let make = slf.get_type().getattr("from_bytes")?;
        (make, (slf.get().to_bytes(py),)).into_pyobject(py)
    }

    fn __copy__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __deepcopy__(slf: Py<Self>, _memo: &Bound<'_, PyAny>) -> Py<Self> {
        slf
    }
}

//! Functions of the module.

use std::collections::BTreeMap;
use std::path::PathBuf;

use moses_core::{Error, Kind, shard, vfs};
use pyo3::prelude::*;

use crate::buffer::Bytes;
use crate::error::{Failure, class_name};

/// Every code of the core, with the name of its class.
#[pyfunction]
pub(crate) fn error_codes() -> BTreeMap<&'static str, &'static str> {
    Error::CODES.iter().filter(|(_, kind)| *kind != Kind::Io).map(|(code, kind)| (*code, class_name(*kind))).collect()
}

#[pyfunction]
pub(crate) fn blake3_hex(py: Python<'_>, buffer: Bytes) -> String {
    py.detach(|| moses_core::hash::hash_hex(buffer.as_slice()))
}

#[pyfunction]
pub(crate) fn hash_buffers(py: Python<'_>, buffers: Vec<(String, Bytes)>) -> PyResult<String> {
    py.detach(|| {
        let named: Vec<(String, &[u8])> =
            buffers.iter().map(|(name, bytes)| (name.clone(), bytes.as_slice())).collect();
        Ok(moses_core::hash::hash_buffers(&named).map_err(Failure)?)
    })
}

#[pyfunction]
pub(crate) fn atomic_write(py: Python<'_>, path: PathBuf, data: Bytes) -> PyResult<()> {
    py.detach(|| {
        vfs::real::atomic_write(&path, data.as_slice()).map_err(|source| {
            PyErr::from(Failure(Error::Io { path: path.display().to_string(), doing: "writing", source }))
        })
    })
}

type Tensors = BTreeMap<String, (&'static str, Vec<u64>, u64, u64)>;

#[pyfunction]
pub(crate) fn safetensors_header(py: Python<'_>, path: PathBuf) -> PyResult<(Tensors, BTreeMap<String, String>)> {
    py.detach(|| {
        let header = shard::read_header(&path).map_err(Failure)?;
        let tensors = header.tensors.into_iter();
        let tensors = tensors.map(|(name, tensor)| (name, (tensor.dtype, tensor.shape, tensor.begin, tensor.end)));
        Ok((tensors.collect(), header.metadata))
    })
}

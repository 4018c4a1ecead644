//! `Store` and `FileInfo`.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use moses_core::vfs::real::RealFs;
use moses_core::{Error, Store as CoreStore};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::buffer::Buffers;
use crate::error::{Failure, poisoned};

#[pyclass(frozen, get_all, eq, module = "moses._core")]
#[derive(PartialEq)]
pub(crate) struct FileInfo {
    path: String,
    bytes: u64,
    blake3: String,
}

#[pymethods]
impl FileInfo {
    fn __repr__(&self) -> String {
        format!("FileInfo(path={:?}, bytes={}, blake3={:?})", self.path, self.bytes, self.blake3)
    }
}

#[pyclass(frozen, module = "moses._core")]
pub(crate) struct Store(Mutex<CoreStore<RealFs>>);

fn at(path: &Path, doing: &'static str) -> impl FnOnce(std::io::Error) -> Failure {
    let path = path.display().to_string();
    move |source| Failure(Error::Io { path, doing, source })
}

impl Store {
    /// Without the GIL.
    fn with<T: Send>(
        &self,
        py: Python<'_>,
        work: impl Send + FnOnce(&mut CoreStore<RealFs>) -> moses_core::Result<T>,
    ) -> PyResult<T> {
        py.detach(|| Ok(work(&mut *self.0.lock().map_err(poisoned)?).map_err(Failure)?))
    }
}

#[pymethods]
impl Store {
    #[staticmethod]
    fn create(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        py.detach(|| {
            let files = RealFs::create(&path).map_err(at(&path, "creating"))?;
            Ok(Self(Mutex::new(CoreStore::create(files).map_err(Failure)?)))
        })
    }

    #[staticmethod]
    #[pyo3(signature = (path, write = false))]
    fn open(py: Python<'_>, path: PathBuf, write: bool) -> PyResult<Self> {
        py.detach(|| {
            let files = RealFs::open(&path).map_err(at(&path, "opening"))?;
            Ok(Self(Mutex::new(CoreStore::open(files, write).map_err(Failure)?)))
        })
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        self.with(py, |store| {
            store.close();
            Ok(())
        })
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyAny>) -> PyResult<()> {
        self.close(py)
    }

    #[getter]
    fn generation(&self, py: Python<'_>) -> PyResult<u64> {
        self.with(py, |store| Ok(store.generation()))
    }

    #[getter]
    fn recovered(&self, py: Python<'_>) -> PyResult<Option<String>> {
        self.with(py, |store| Ok(store.recovered().map(str::to_owned)))
    }

    fn files(&self, py: Python<'_>) -> PyResult<BTreeMap<String, FileInfo>> {
        self.with(py, |store| {
            let files = store.files().iter();
            Ok(files
                .map(|(name, info)| {
                    (name.clone(), FileInfo { path: info.path.clone(), bytes: info.bytes, blake3: info.blake3.clone() })
                })
                .collect())
        })
    }

    fn read<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyBytes>> {
        let content = self.with(py, |store| store.read(name))?;
        Ok(PyBytes::new(py, &content))
    }

    fn path(&self, py: Python<'_>, name: &str) -> PyResult<OsString> {
        self.with(py, |store| Ok(store.file_system().path().join(&store.info(name)?.path).into_os_string()))
    }

    #[pyo3(signature = (put, delete = Vec::new()), text_signature = "($self, put, delete=())")]
    fn commit(&self, py: Python<'_>, put: Buffers<String>, delete: Vec<String>) -> PyResult<u64> {
        self.with(py, |store| store.commit(&put.as_slices(|name| name), &delete))
    }

    fn verify(&self, py: Python<'_>) -> PyResult<Vec<(String, String, String)>> {
        let damages = self.with(py, |store| store.verify())?;
        Ok(damages.into_iter().map(|damage| (damage.name, damage.code.to_owned(), damage.message)).collect())
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        self.with(py, |store| {
            Ok(format!("Store({}, generation {})", store.file_system().path().display(), store.generation()))
        })
    }
}

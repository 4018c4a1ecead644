//! Any contiguous buffer of Python (bytes, memoryview, numpy array) as bytes, without copying.

use std::collections::BTreeMap;

use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::PyBufferError;
use pyo3::prelude::*;
use pyo3::types::PyMapping;

/// A buffer that is held, so that Python neither frees nor resizes it.
pub(crate) struct Bytes(PyUntypedBuffer);

impl Bytes {
    pub(crate) fn as_slice(&self) -> &[u8] {
        let length = self.0.len_bytes();
        if length == 0 {
            return &[];
        }
        // SAFETY: the buffer is C-contiguous (checked when it was taken), so `length` bytes from `buf_ptr` are its
        // content, and they stay there while `self.0` is held. Another thread may write to them while the GIL is
        // released, as with hashlib: the documented face asks the caller not to.
        unsafe { std::slice::from_raw_parts(self.0.buf_ptr().cast::<u8>(), length) }
    }

    pub(crate) fn item_size(&self) -> usize {
        self.0.item_size()
    }

    pub(crate) fn format(&self) -> String {
        self.0.format().to_string_lossy().into_owned()
    }
}

impl<'a, 'py> FromPyObject<'a, 'py> for Bytes {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let buffer = PyUntypedBuffer::get(&object)?;
        if !buffer.is_c_contiguous() {
            return Err(PyBufferError::new_err("the buffer is not contiguous: make a copy of it first"));
        }
        Ok(Self(buffer))
    }
}

/// Buffers by key, out of any mapping.
pub(crate) struct Buffers<K>(BTreeMap<K, Bytes>);

impl<K: Clone + Ord> Buffers<K> {
    pub(crate) fn as_slices<T: Ord>(&self, key: impl Fn(K) -> T) -> BTreeMap<T, &[u8]> {
        self.0.iter().map(|(name, bytes)| (key(name.clone()), bytes.as_slice())).collect()
    }
}

impl<'a, 'py, K: FromPyObjectOwned<'py, Error = PyErr> + Ord> FromPyObject<'a, 'py> for Buffers<K> {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let items = object.cast::<PyMapping>()?.items()?;
        let pair = |item: Bound<'py, PyAny>| Ok((item.get_item(0)?.extract::<K>()?, item.get_item(1)?.extract()?));
        Ok(Self(items.iter().map(pair).collect::<PyResult<_>>()?))
    }
}

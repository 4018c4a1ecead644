//! Errors of the core as Python's: a class for each kind, with the code; those of the operating system stay OSError.

use std::sync::PoisonError;

use moses_core::{Error, Kind};
use pyo3::exceptions::{PyOSError, PyRuntimeError};
use pyo3::prelude::*;

pub(crate) fn class_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Registry => "RegistryError",
        Kind::Dispatch => "DispatchError",
        Kind::Format => "FormatError",
        Kind::Store => "StoreError",
        Kind::Surgery => "SurgeryError",
        Kind::Io => "OSError",
    }
}

/// An error on its way to Python; made without the GIL, turned into an exception with it.
pub(crate) struct Failure(pub(crate) Error);

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

impl From<Failure> for PyErr {
    fn from(failure: Failure) -> Self {
        if let Error::Io { path, doing, source } = &failure.0 {
            let text = source.to_string();
            return match source.raw_os_error() {
                // OSError picks the subclass by the number.
                Some(number) => PyOSError::new_err((number, format!("{doing} failed: {text}"), path.clone())),
                None => PyOSError::new_err(failure.0.to_string()),
            };
        }
        let (message, code) = (failure.0.to_string(), failure.0.code());
        Python::attach(|py| {
            let class = py.import("moses.errors").and_then(|errors| errors.getattr(class_name(failure.0.kind())));
            match class.and_then(|class| class.call1((message, code))) {
                Ok(exception) => PyErr::from_value(exception),
                Err(error) => error,
            }
        })
    }
}

/// A lock is poisoned only by a panic, which is a bug of ours.
pub(crate) fn poisoned<T>(_: PoisonError<T>) -> PyErr {
    PyRuntimeError::new_err("an earlier call failed inside; this object cannot be used any more")
}

//! `Checkpoint`, `SurgeryJob` and what compares checkpoints. Plans and descriptions cross as JSON.

use std::path::PathBuf;
use std::sync::Arc;

use moses_core::checkpoint::Checkpoint as CoreCheckpoint;
use moses_core::layout::Layout;
use moses_core::surgery::{self, Job, Options, RealDisk, Request, Target};
use moses_core::{Error, Result};
use pyo3::prelude::*;

use crate::error::Failure;

#[pyclass(frozen, module = "moses._core")]
pub(crate) struct Checkpoint(Arc<CoreCheckpoint>);

#[pymethods]
impl Checkpoint {
    #[staticmethod]
    fn open(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        py.detach(|| Ok(Self(Arc::new(CoreCheckpoint::open(&path).map_err(Failure)?))))
    }

    fn describe(&self, py: Python<'_>) -> String {
        py.detach(|| self.0.describe().to_string())
    }

    fn expert_norms(&self, py: Python<'_>) -> PyResult<Vec<(String, Vec<f64>)>> {
        py.detach(|| Ok(surgery::norms(&self.0).map_err(Failure)?))
    }
}

fn layout_of(layout: Option<&str>) -> Result<Option<Layout>> {
    let Some(name) = layout else { return Ok(None) };
    let unknown = || Error::Unsupported {
        what: format!("the layout {name:?}"),
        problem: "it is none of per-expert, fused and mxfp4".to_owned(),
    };
    Layout::from_name(name).map(Some).ok_or_else(unknown)
}

#[pyclass(frozen, module = "moses._core")]
pub(crate) struct SurgeryJob(Job);

#[pymethods]
impl SurgeryJob {
    #[staticmethod]
    #[pyo3(signature = (sources, plan, operation, layout = None, uneven = false, in_place = false))]
    fn plan(
        py: Python<'_>,
        sources: Vec<Py<Checkpoint>>,
        plan: &str,
        operation: String,
        layout: Option<&str>,
        uneven: bool,
        in_place: bool,
    ) -> PyResult<Self> {
        let options = Options { layout: layout_of(layout).map_err(Failure)?, uneven, in_place, operation };
        py.detach(|| {
            let sources: Vec<&CoreCheckpoint> = sources.iter().map(|source| &*source.get().0).collect();
            let request = Request::parse(plan.as_bytes()).map_err(Failure)?;
            Ok(Self(surgery::build(&sources, &request, &options).map_err(Failure)?))
        })
    }

    /// `empty`: tensors that stand for nothing, by block; -1 in a shape is the model's width.
    #[staticmethod]
    #[allow(clippy::too_many_arguments)] // They are keywords in Python.
    #[pyo3(signature = (source, model_type, config, layers, num_experts, noise, seed, empty))]
    fn upcycle(
        py: Python<'_>,
        source: Py<Checkpoint>,
        model_type: String,
        config: String,
        layers: Vec<u64>,
        num_experts: u64,
        noise: f64,
        seed: u64,
        empty: Vec<(String, Vec<i64>)>,
    ) -> PyResult<Self> {
        let sizes = |shape: Vec<i64>| shape.into_iter().map(|size| u64::try_from(size).unwrap_or(u64::MAX)).collect();
        let empty = empty.into_iter().map(|(name, shape)| (name, sizes(shape))).collect();
        let wanted = surgery::Upcycle { model_type, config, layers, num_experts, noise, seed, empty };
        py.detach(|| Ok(Self(surgery::upcycle(&source.get().0, &wanted).map_err(Failure)?)))
    }

    fn describe(&self, py: Python<'_>, linked: bool) -> String {
        py.detach(|| self.0.describe(linked).to_string())
    }

    #[pyo3(signature = (out, link = false, hash = false, progress = None))]
    fn run(
        &self,
        py: Python<'_>,
        out: PathBuf,
        link: bool,
        hash: bool,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<(PathBuf, u64)> {
        let target = Target { link, hash, ..Target::new(out) };
        let raised = std::sync::Mutex::new(None);
        let tell = |done: u64, total: u64| {
            Python::attach(|py| {
                let told = py.check_signals().and_then(|()| match &progress {
                    Some(progress) => progress.call1(py, (done, total)).map(|_| ()),
                    None => Ok(()),
                });
                let goes_on = told.is_ok();
                if let (Err(error), Ok(mut raised)) = (told, raised.lock()) {
                    raised.get_or_insert(error);
                }
                goes_on
            })
        };
        let done = py.detach(|| surgery::execute(&RealDisk::default(), &self.0, &target, &tell));
        if let Some(error) = raised.into_inner().ok().flatten() {
            return Err(error);
        }
        let done = done.map_err(Failure)?;
        Ok((done.path, done.bytes_written))
    }
}

type Compared = (u64, u64, u64, u64, Vec<(String, String)>);

/// Whether `out` is what the plan makes of `sources`: tensors, experts and rows that are the same, new ones, problems.
#[pyfunction]
pub(crate) fn compare_checkpoints(
    py: Python<'_>,
    out: Py<Checkpoint>,
    sources: Vec<Py<Checkpoint>>,
    plan: &str,
) -> PyResult<Compared> {
    py.detach(|| {
        let sources: Vec<&CoreCheckpoint> = sources.iter().map(|source| &*source.get().0).collect();
        let request = Request::parse(plan.as_bytes()).map_err(Failure)?;
        let found = surgery::compare(&out.get().0, &sources, &request).map_err(Failure)?;
        Ok((found.tensors, found.experts, found.rows, found.new, found.problems))
    })
}
